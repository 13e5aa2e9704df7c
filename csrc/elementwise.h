// Shared by the CPU and CUDA kernels: small helpers, and the maths of the feature maps.
//
// V is float, double or a vector type whose comparisons and `?:` go lane by lane.
#pragma once
#include <stdint.h>
#include <string.h>

#include "fastpe.h"

#ifdef __CUDACC__
#define FASTPE_HD __host__ __device__ __forceinline__
#else
#define FASTPE_HD inline __attribute__((always_inline))
#endif

namespace fastpe {

FASTPE_HD constexpr int64_t smaller(int64_t a, int64_t b) { return b < a ? b : a; }
FASTPE_HD constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// the pointer p as a pointer to T
template <class T, class P> FASTPE_HD T *as(P *p) { return reinterpret_cast<T *>(p); }

FASTPE_HD float from_bf16(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
// rounds to the nearest; a NaN stays a NaN
FASTPE_HD uint16_t to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (f != f) return uint16_t(bits >> 16 | 64);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The divisor of the weights. `sign` receives its derivative by den: 0 where eps takes over.
template <class S> FASTPE_HD S divisor(const FastpeCausalDot &args, S den, S &sign) {
  const S eps = S(args.eps), size = den < 0 ? -den : den;
  sign = 1;
  if (args.normalize == FASTPE_NORM_SUM) return den + eps;
  sign = size < eps ? S(0) : den < 0 ? S(-1) : S(1);
  return size < eps ? eps : size;
}

// The doubles that sum up the gradients of the parameters of one head: d gain [DK], d phase [DK],
// d phase * position [DK, L], d gate [D].
FASTPE_HD int64_t partial_size(const FastpeSineFeatures &args) {
  return (2 + args.L) * args.D * args.K + args.D;
}

constexpr double kTwoPi = 6.283185307179586476925286766559;
constexpr double kReluShift = 1e-3;

// x + kRound - kRound is x rounded to the nearest integer
template <class S> constexpr S kRound = S(0);
template <> constexpr float kRound<float> = 12582912.0f;           // 1.5 * 2^23
template <> constexpr double kRound<double> = 6755399441055744.0;  // 1.5 * 2^52

// Remove whole turns, which leaves a number in [-1/2, 1/2]. From 2^51 turns on u has no fraction.
FASTPE_HD double reduce_turns(double u) {
  u = u < 2251799813685248.0 && u > -2251799813685248.0 ? u : 0.0;
  double whole = u + kRound<double>;
  whole -= kRound<double>;
  return u - whole;
}

// sin and cos of 2 pi u for u in [-1/2, 1/2], to about 1e-7 in float
template <class S, class V> FASTPE_HD void sincos_turns(V u, V &sin, V &cos) {
  V quarter = u * S(4) + kRound<S>;
  quarter -= kRound<S>;  // -2, -1, 0, 1 or 2
  V t = (u - quarter * S(0.25)) * S(kTwoPi), z = t * t;
  V s = ((z * S(-1.9515295891e-4) + S(8.3321608736e-3)) * z + S(-1.6666654611e-1)) * z * t + t;
  V c = ((z * S(2.443315711809948e-5) + S(-1.388731625493765e-3)) * z + S(4.166664568298827e-2)) *
            z * z -
        z * S(0.5) + S(1);
  V square = quarter * quarter;
  sin = square == S(1) ? c * quarter : (square == S(4) ? -s : s);
  cos = square == S(1) ? -s * quarter : (square == S(4) ? -c : c);
}

// Feature maps: `value` maps x, `slope` is the derivative from x and value(x). `Exp` computes e^x.
struct Identity {
  template <class S, class V, class Exp> static FASTPE_HD V value(V x, Exp) { return x; }
  template <class S, class V> static FASTPE_HD V slope(V, V) { return V{} + S(1); }
};

struct Elu1 {
  template <class S, class V, class Exp> static FASTPE_HD V value(V x, Exp exp) {
    return x > S(0) ? x + S(1) : exp(x);
  }
  template <class S, class V> static FASTPE_HD V slope(V x, V value) {
    return x > S(0) ? V{} + S(1) : value;
  }
};

struct Relu {
  template <class S, class V, class Exp> static FASTPE_HD V value(V x, Exp) {
    return (x < S(0) ? V{} : x) + S(kReluShift);
  }
  template <class S, class V> static FASTPE_HD V slope(V x, V) {
    return x > S(0) ? V{} + S(1) : V{};
  }
};

struct ExpMap {
  template <class S, class V, class Exp> static FASTPE_HD V value(V x, Exp exp) { return exp(x); }
  template <class S, class V> static FASTPE_HD V slope(V, V value) { return value; }
};

// Rotate one of a pair, whose other is `partner`: c = cos, s = -sin for the first, +sin for the
// second. The adjoint turns back.
template <class V> FASTPE_HD V rotate(V x, V partner, V c, V s) { return x * c + partner * s; }
template <class V> FASTPE_HD V rotate_adjoint(V y, V partner, V c, V s) {
  return y * c - partner * s;
}

}  // namespace fastpe
