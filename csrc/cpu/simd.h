// Vectors as wide as the instruction set allows, rows of tensors of any dtype, scratch memory.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <utility>

#include "../elementwise.h"

// Everything has internal linkage: the same names exist once for each instruction set.
namespace fastpe {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class S> struct VectorOf {
  typedef S type __attribute__((vector_size(kVectorBytes)));
};
template <class S> using Vec = typename VectorOf<S>::type;
template <class S> constexpr int kLanes = kVectorBytes / int(sizeof(S));

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <class S> constexpr int64_t padded(int64_t n) { return round_up(n, kLanes<S>); }

template <class S> FASTPE_HD Vec<S> load(const S *p) {
  Vec<S> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class S> FASTPE_HD void store(S *p, Vec<S> v) { memcpy(p, &v, sizeof v); }
template <class S> FASTPE_HD void zero(S *p, int64_t n) { memset(p, 0, sizeof(S) * size_t(n)); }
template <class S> FASTPE_HD void copy_n(S *to, const S *from, int64_t n) {
  memcpy(to, from, sizeof(S) * size_t(n));
}
template <class S> FASTPE_HD Vec<S> splat(S x) {
  return x - Vec<S>{};  // x + 0 would turn -0 into 0
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
  // the low bits of `shifted` hold n + 254; 2^n takes two factors, as n goes from -150 to 128
  Int bits;
  memcpy(&bits, &shifted, sizeof bits);
  const Int half = bits >> 1, low_bits = half << 23, high_bits = (bits - half) << 23;
  Vec<float> first, second;
  memcpy(&first, &low_bits, sizeof first);
  memcpy(&second, &high_bits, sizeof second);
  p = p * first * second;
  return x > 88.722839f ? splat(float(INFINITY)) : p;
}
FASTPE_HD Vec<double> exp_of(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

template <class S> FASTPE_HD void sincos_of(Vec<S> turns, Vec<S> &sin, Vec<S> &cos) {
  if constexpr (sizeof(S) == 4) {
    sincos_turns<S>(turns, sin, cos);
  } else {
    for (int i = 0; i < kLanes<S>; ++i) {
      sin[i] = S(::sin(kTwoPi * double(turns[i])));
      cos[i] = S(::cos(kTwoPi * double(turns[i])));
    }
  }
}

// lane i of the result is lane Pattern::at(i) of a, followed by b
template <class S> struct IndexOf {
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
};
template <> struct IndexOf<double> {
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
template <class S, class Pattern> FASTPE_HD Vec<S> permute(Vec<S> a, Vec<S> b) {
  return permute<S, Pattern>(a, b, std::make_integer_sequence<int, kLanes<S>>());
}

struct SwapNeighbours {  // 1 0 3 2 ...
  static constexpr int at(int i) { return i ^ 1; }
};
template <int kLane, int kStep, bool kHigh>
struct Exchange {  // a step of a transpose: two rows exchange blocks of kStep lanes
  static constexpr int at(int i) {
    return kHigh ? ((i & kStep) ? i + kLane : i + kStep) : ((i & kStep) ? i - kStep + kLane : i);
  }
};

template <int kStep> struct Across {
  static constexpr int at(int i) { return i ^ kStep; }
};
template <class S, int kStep = kLanes<S> / 2> FASTPE_HD S sum(Vec<S> v) {
  v += permute<S, Across<kStep>>(v, v);
  if constexpr (kStep > 1)
    return sum<S, kStep / 2>(v);
  else
    return v[0];
}
// x . y, of rows padded with zeros
template <class S> FASTPE_HD S dot(const S *x, const S *y, int64_t width) {
  Vec<S> total = {};
  for (int64_t j = 0; j < width; j += kLanes<S>) total += load(x + j) * load(y + j);
  return sum<S>(total);
}

template <class S, int kStep> FASTPE_HD void transpose_step(Vec<S> *row) {
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

// the rows of one (b, h) of a tensor of any dtype and strides
template <class S> struct Rows {
  char *base = nullptr;
  int64_t row = 0, column = 0, width = 0;
  int dtype = FASTPE_F32;

  Rows() = default;
  // token `first` is row 0
  Rows(const FastpeTensor &x, int64_t b, int64_t h, int64_t width_, int64_t first = 0)
      : row(x.stride[1]), column(x.stride[3]), width(width_), dtype(x.dtype) {
    if (x.data)
      base = as<char>(x.data) + (b * x.stride[0] + first * row + h * x.stride[2]) * size();
  }
  int64_t size() const { return dtype == FASTPE_F64 ? 8 : dtype == FASTPE_F32 ? 4 : 2; }
  explicit operator bool() const { return base != nullptr; }

  // row t, padded with zeros to whole vectors; copied to `space` unless it can be read in place
  const S *get(int64_t t, S *space) const {
    const char *p = base + t * row * size();
    bool same = dtype == (sizeof(S) == 8 ? FASTPE_F64 : FASTPE_F32);
    if (same && column == 1 && width % kLanes<S> == 0) return as<const S>(p);
    switch (dtype) {
      case FASTPE_F32: read_row(as<const float>(p), column, width, space); break;
      case FASTPE_F64: read_row(as<const double>(p), column, width, space); break;
      case FASTPE_BF16: read_row(as<const BFloat16>(p), column, width, space); break;
      default: read_row(as<const _Float16>(p), column, width, space);
    }
    for (int64_t i = width; i < padded<S>(width); ++i) space[i] = 0;
    return space;
  }
  void prefetch(int64_t t) const {
    const char *p = base + t * row * size();
    asm volatile("");  // gcc would drop the call, which has no effect
    for (int64_t i = 0; i < width * size(); i += 64) __builtin_prefetch(p + i);
  }
  void put(int64_t t, const S *in) const {
    char *p = base + t * row * size();
    switch (dtype) {
      case FASTPE_F32: write_row(as<float>(p), column, width, in); break;
      case FASTPE_F64: write_row(as<double>(p), column, width, in); break;
      case FASTPE_BF16: write_row(as<BFloat16>(p), column, width, in); break;
      default: write_row(as<_Float16>(p), column, width, in);
    }
  }
};

// aligned memory for the tiles of one thread, filled with zeros
template <class S> class Scratch {
 public:
  explicit Scratch(int64_t count) {
    void *memory;
    if (posix_memalign(&memory, 64, size_t(larger(count, 1)) * sizeof(S))) abort();
    data_ = static_cast<S *>(memory);
    zero(data_, count);
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  operator S *() const { return data_; }
  S *get() const { return data_; }

 private:
  S *data_;
};

}  // namespace
}  // namespace fastpe
