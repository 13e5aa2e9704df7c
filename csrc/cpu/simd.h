// Vectors of the widest kind this translation unit is compiled for, rows of any dtype, scratch.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <utility>

#include "../fastpe.h"
#include "../elementwise.h"

// internal linkage throughout: the same names exist once for each instruction set
namespace fastpe {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class S>
struct VectorOf {
  typedef S type __attribute__((vector_size(kVectorBytes)));
};
template <class S>
using Vec = typename VectorOf<S>::type;
template <class S>
constexpr int kLanes = kVectorBytes / int(sizeof(S));

template <class T>
constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T larger(T a, T b) {
  return a < b ? b : a;
}
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <class S>
constexpr int64_t padded(int64_t n) {
  return round_up(n, kLanes<S>);
}

template <class S>
FASTPE_HD Vec<S> load(const S *p) {
  Vec<S> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class S>
FASTPE_HD void store(S *p, Vec<S> v) {
  memcpy(p, &v, sizeof v);
}
template <class S>
FASTPE_HD Vec<S> splat(S x) {
  return x - Vec<S>{};  // not x + 0, which is an addition: it changes -0
}
// e^x, denormals included: 0 below -103.97, infinity above 88.72
FASTPE_HD Vec<float> exp_of(Vec<float> x) {
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  constexpr float kShift = kRound<float> + 254;
  Vec<float> low = splat(-104.0f), y = x < low ? low : x;
  Vec<float> shifted = y * 1.44269504088896341f + kShift;
  Vec<float> n = shifted - kShift;
  Vec<float> r = y - n * 0.693359375f + n * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // n + 254 stands in the low bits of `shifted`: 2^n in two factors, for n goes from -150 to 128
  Int bits, half;
  memcpy(&bits, &shifted, sizeof bits);
  half = bits >> 1, bits = (bits - half) << 23, half = half << 23;
  Vec<float> first, second;
  memcpy(&first, &half, sizeof half), memcpy(&second, &bits, sizeof bits);
  p = p * first * second;
  return x > 88.722839f ? splat(float(INFINITY)) : p;
}
FASTPE_HD Vec<double> exp_of(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

template <class S>
FASTPE_HD void sincos_of(Vec<S> turns, Vec<S> &sin, Vec<S> &cos) {
  if (sizeof(S) == 4) {
    sincos_turns<S>(turns, sin, cos);
  } else {
    for (int i = 0; i < kLanes<S>; ++i) {
      sin[i] = S(::sin(kTwoPi * double(turns[i])));
      cos[i] = S(::cos(kTwoPi * double(turns[i])));
    }
  }
}

// lane i of the result is lane Pattern::at(i) of a and b laid end to end
template <class S>
struct IndexOf {
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct IndexOf<double> {
  typedef int64_t type __attribute__((vector_size(kVectorBytes)));
};
template <class S, class Pattern, int... I>
FASTPE_HD Vec<S> permute(Vec<S> a, Vec<S> b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, Pattern::at(I)...);
#else
  return __builtin_shuffle(a, b, typename IndexOf<S>::type{Pattern::at(I)...});
#endif
}
template <class S, class Pattern>
FASTPE_HD Vec<S> permute(Vec<S> a, Vec<S> b) {
  return permute<S, Pattern>(a, b, std::make_integer_sequence<int, kLanes<S>>());
}

struct SwapNeighbours {  // 1 0 3 2 ...
  static constexpr int at(int i) { return i ^ 1; }
};
struct Evens {  // 0 2 4 ... of both
  static constexpr int at(int i) { return 2 * i; }
};
struct Odds {
  static constexpr int at(int i) { return 2 * i + 1; }
};
template <int kHalf>
struct ZipFrom {  // a b a b ... from lane kHalf on
  static constexpr int at(int i) { return i / 2 + kHalf + (i % 2) * 2 * kHalf; }
};
template <int kLane, int kStep, bool kHigh>
struct Exchange {  // blocks of kStep lanes of two rows of a matrix that is being transposed
  static constexpr int at(int i) {
    return kHigh ? ((i & kStep) ? i + kLane : i + kStep) : ((i & kStep) ? i - kStep + kLane : i);
  }
};

template <int kStep>
struct Across {
  static constexpr int at(int i) { return i ^ kStep; }
};
template <class S, int kStep = kLanes<S> / 2>
FASTPE_HD S sum(Vec<S> v) {
  v += permute<S, Across<kStep>>(v, v);
  if constexpr (kStep > 1)
    return sum<S, kStep / 2>(v);
  else
    return v[0];
}

template <class S, int kStep>
FASTPE_HD void transpose_step(Vec<S> *row) {
  constexpr int n = kLanes<S>;
  for (int i = 0; i < n; ++i) {
    if (i & kStep) continue;
    Vec<S> a = row[i], b = row[i + kStep];
    row[i] = permute<S, Exchange<n, kStep, false>>(a, b);
    row[i + kStep] = permute<S, Exchange<n, kStep, true>>(a, b);
  }
  if constexpr (kStep > 1) transpose_step<S, kStep / 2>(row);
}

// out [cols, ld_out] = in [rows, ld_in] transposed; rows and cols multiples of the lanes
template <class S>
void transpose(const S *in, int64_t ld_in, int64_t rows, int64_t cols, S *out, int64_t ld_out) {
  constexpr int n = kLanes<S>;
  for (int64_t i = 0; i < rows; i += n)
    for (int64_t j = 0; j < cols; j += n) {
      Vec<S> block[n];
      for (int k = 0; k < n; ++k) block[k] = load(in + (i + k) * ld_in + j);
      transpose_step<S, n / 2>(block);
      for (int k = 0; k < n; ++k) store(out + (j + k) * ld_out + i, block[k]);
    }
}

// rows of a tensor of any dtype and strides

inline float from_bf16(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (f != f) return uint16_t(bits >> 16 | 64);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class S, class F>
FASTPE_HD void read_row(const F *p, int64_t stride, int64_t width, S *out) {
  if (stride == 1)
    for (int64_t i = 0; i < width; ++i) out[i] = S(p[i]);
  else
    for (int64_t i = 0; i < width; ++i) out[i] = S(p[i * stride]);
}
template <class S, class F>
FASTPE_HD void write_row(F *p, int64_t stride, int64_t width, const S *in) {
  if (stride == 1)
    for (int64_t i = 0; i < width; ++i) p[i] = F(in[i]);
  else
    for (int64_t i = 0; i < width; ++i) p[i * stride] = F(in[i]);
}
struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  explicit BFloat16(float f) : bits(to_bf16(f)) {}
  explicit BFloat16(double f) : bits(to_bf16(float(f))) {}
  explicit operator float() const { return from_bf16(bits); }
  explicit operator double() const { return from_bf16(bits); }
};

// one (b, h) of a tensor
template <class S>
struct Rows {
  char *base = nullptr;
  int64_t row = 0, column = 0, width = 0;
  int dtype = FASTPE_F32;

  Rows() = default;
  // from token `first` on
  Rows(const FastpeTensor &x, int64_t b, int64_t h, int64_t width_, int64_t first = 0)
      : row(x.stride[1]), column(x.stride[3]), width(width_), dtype(x.dtype) {
    if (x.data) base = (char *)x.data + (b * x.stride[0] + first * row + h * x.stride[2]) * size();
  }
  int64_t size() const { return dtype == FASTPE_F64 ? 8 : dtype == FASTPE_F32 ? 4 : 2; }
  explicit operator bool() const { return base != nullptr; }

  // row t with zeros up to a whole vector: where it lies, or else copied to `space`
  const S *get(int64_t t, S *space) const {
    const char *p = base + t * row * size();
    bool same = dtype == (sizeof(S) == 8 ? FASTPE_F64 : FASTPE_F32);
    if (same && column == 1 && width % kLanes<S> == 0) return (const S *)p;
    switch (dtype) {
      case FASTPE_F32: read_row(( const float *)p, column, width, space); break;
      case FASTPE_F64: read_row((const double *)p, column, width, space); break;
      case FASTPE_BF16: read_row((const BFloat16 *)p, column, width, space); break;
      default: read_row((const _Float16 *)p, column, width, space);
    }
    for (int64_t i = width; i < padded<S>(width); ++i) space[i] = 0;
    return space;
  }
  void prefetch(int64_t t) const {
    const char *p = base + t * row * size();
    asm volatile("");  // else gcc drops the calls of a function without effect
    for (int64_t i = 0; i < width * size(); i += 64) __builtin_prefetch(p + i);
  }
  void put(int64_t t, const S *in) const {
    char *p = base + t * row * size();
    switch (dtype) {
      case FASTPE_F32: write_row((float *)p, column, width, in); break;
      case FASTPE_F64: write_row((double *)p, column, width, in); break;
      case FASTPE_BF16: write_row((BFloat16 *)p, column, width, in); break;
      default: write_row((_Float16 *)p, column, width, in);
    }
  }
};

// aligned memory for the tiles of one thread, zero at first
template <class S>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(nullptr) {
    if (posix_memalign((void **)&data_, 64, size_t(larger<int64_t>(count, 1)) * sizeof(S))) abort();
    memset((void *)data_, 0, size_t(count) * sizeof(S));
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  operator S *() const { return data_; }

 private:
  S *data_;
};

}  // namespace
}  // namespace fastpe
