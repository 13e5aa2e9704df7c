// The element-wise maths of every map, for one number or a vector of them, on the CPU and in CUDA.
//
// V is float, double or a vector type whose comparisons and `?:` go lane by lane. A map and its
// derivative stand together.
#pragma once
#ifdef __CUDACC__
#define FASTPE_HD __host__ __device__ __forceinline__
#else
#define FASTPE_HD inline __attribute__((always_inline))
#endif

namespace fastpe {

constexpr double kTwoPi = 6.283185307179586476925286766559;
constexpr double kReluShift = 1e-3;

// adding and subtracting it rounds to the nearest integer
template <class S>
constexpr S kRound = S(0);
template <>
constexpr float kRound<float> = 12582912.0f;  // 1.5 * 2^23
template <>
constexpr double kRound<double> = 6755399441055744.0;  // 1.5 * 2^52

// whole turns removed: a number in [-1/2, 1/2]; from 2^51 turns on a double has no fraction
FASTPE_HD double reduce_turns(double u) {
  u = u < 2251799813685248.0 && u > -2251799813685248.0 ? u : 0.0;
  double whole = u + kRound<double>;
  whole -= kRound<double>;
  return u - whole;
}

// sin and cos of 2 pi u for u in [-1/2, 1/2], to about 1e-7 in float
template <class S, class V>
FASTPE_HD void sincos_turns(V u, V &sin, V &cos) {
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

// Feature maps and their slopes, these from x and the value at x. `Exp` computes e^x of a V.
struct Identity {
  template <class S, class V, class Exp>
  static FASTPE_HD V value(V x, Exp) {
    return x;
  }
  template <class S, class V>
  static FASTPE_HD V slope(V, V) {
    return V{} + S(1);
  }
};

struct Elu1 {
  template <class S, class V, class Exp>
  static FASTPE_HD V value(V x, Exp exp) {
    return x > S(0) ? x + S(1) : exp(x);
  }
  template <class S, class V>
  static FASTPE_HD V slope(V x, V value) {
    return x > S(0) ? V{} + S(1) : value;
  }
};

struct Relu {
  template <class S, class V, class Exp>
  static FASTPE_HD V value(V x, Exp) {
    return (x < S(0) ? V{} : x) + S(kReluShift);
  }
  template <class S, class V>
  static FASTPE_HD V slope(V x, V) {
    return x > S(0) ? V{} + S(1) : V{};
  }
};

struct ExpMap {
  template <class S, class V, class Exp>
  static FASTPE_HD V value(V x, Exp exp) {
    return exp(x);
  }
  template <class S, class V>
  static FASTPE_HD V slope(V, V value) {
    return value;
  }
};

// A rotation as y = x * c + partner(x) * s, with c = cos, s = -sin on the first of a pair and
// +sin on the second; its transpose turns back.
template <class V>
FASTPE_HD V rotate(V x, V partner, V c, V s) {
  return x * c + partner * s;
}
template <class V>
FASTPE_HD V rotate_adjoint(V y, V partner, V c, V s) {
  return y * c - partner * s;
}

}  // namespace fastpe
