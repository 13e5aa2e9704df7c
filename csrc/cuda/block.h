// The CUDA kernels are written with these: a block of threads, shared memory, products of tiles.
//
// A host compiler turns the kernels into loops for tests without a GPU: they take the same steps
// and round operands the same. Iterations of one `each` may run in any order. FASTPE_BACKWARDS runs
// them in reverse on the host, to catch iterations that read each other's output.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../elementwise.h"
#include "../fastpe.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTPE_DEVICE __device__ __forceinline__
#else
#define FASTPE_DEVICE inline
#endif

namespace fastpe {
namespace {

constexpr int kThreads = 256, kTile = 16;

FASTPE_HD int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
FASTPE_HD int tiled(int64_t n) { return int(parts_of(n, kTile)) * kTile; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// for inputs of type T: S is the type of arithmetic, Operand that of tiles to be multiplied
template <class T> struct Types {
  using S = T;
  using Operand = T;
};
template <> struct Types<BFloat16> {
  using S = float;
  using Operand = BFloat16;
};
template <> struct Types<Float16> {
  using S = float;
  using Operand = float;  // tf32 has its mantissa, and does not overflow
};

FASTPE_DEVICE float widen(float x) { return x; }
FASTPE_DEVICE double widen(double x) { return x; }
FASTPE_DEVICE float widen(BFloat16 x) { return from_bf16(x.bits); }
FASTPE_DEVICE float widen(Float16 x) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(x.bits));
#else
  _Float16 f;
  memcpy(&f, &x.bits, 2);
  return float(f);
#endif
}

// round to the nearest number of type T
template <class T, class S> FASTPE_DEVICE T narrow(S x) { return x; }
template <> FASTPE_DEVICE BFloat16 narrow<BFloat16>(float x) {
#ifdef __CUDACC__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  return {to_bf16(x)};
#endif
}
template <> FASTPE_DEVICE Float16 narrow<Float16>(float x) {
#ifdef __CUDACC__
  return {__half_as_ushort(__float2half_rn(x))};
#else
  _Float16 f = _Float16(x);
  Float16 out;
  memcpy(&out.bits, &f, 2);
  return out;
#endif
}
FASTPE_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
#ifdef __CUDACC__
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
  memcpy(&bits, &x, 4);
  if (x == x) bits = (bits + 0x1000) & ~0x1fffu;
#endif
  return bits;
}

// the rows of one (b, h) of a tensor
template <class T> struct Rows {
  T *data;
  int64_t row, column;

  FASTPE_DEVICE Rows(const FastpeTensor &x, int64_t b, int64_t h)
      : data(as<T>(x.data) + b * x.stride[0] + h * x.stride[2]), row(x.stride[1]),
        column(x.stride[3]) {}
  FASTPE_DEVICE auto get(int64_t t, int64_t j) const { return widen(data[t * row + j * column]); }
  template <class S> FASTPE_DEVICE void put(int64_t t, int64_t j, S x) const {
    data[t * row + j * column] = narrow<T>(x);
  }
};

#ifdef __CUDACC__
// the entries of a matrix that a thread visits; it divides only once
struct Walk {
  int columns, down, right, i, j;

  FASTPE_DEVICE explicit Walk(int columns_)
      : columns(columns_), down(kThreads / columns_), right(kThreads % columns_),
        i(int(threadIdx.x) / columns_), j(int(threadIdx.x) % columns_) {}
  FASTPE_DEVICE void next() {
    i += down;
    j += right;
    if (j < columns) return;
    j -= columns;
    ++i;
  }
};
#endif

struct Block {
  int64_t index;
  char *memory;

  // f(i) for i < n; no f(i) reads what another one writes
  template <class F> FASTPE_DEVICE void each(int n, F f) const {
#ifdef __CUDACC__
    for (int i = int(threadIdx.x); i < n; i += kThreads) f(i);
    __syncthreads();
#elif defined(FASTPE_BACKWARDS)
    for (int i = n; i-- > 0;) f(i);
#else
    for (int i = 0; i < n; ++i) f(i);
#endif
  }
  // f(i, j) for i < rows and j < columns
  template <class F> FASTPE_DEVICE void each(int rows, int columns, F f) const {
#ifdef __CUDACC__
    for (Walk at(columns); at.i < rows; at.next()) f(at.i, at.j);
    __syncthreads();
#else
    each(rows * columns, [&](int n) { f(n / columns, n % columns); });
#endif
  }
  // write(i, j, read(i, j)), with several reads in flight
  template <class Read, class Write>
  FASTPE_DEVICE void move(int rows, int columns, Read read, Write write) const {
#ifdef __CUDACC__
    constexpr int kAhead = 4;
    Walk at(columns);
    while (at.i < rows) {
      decltype(read(0, 0)) x[kAhead];
      Walk ahead = at;
#pragma unroll
      for (int n = 0; n < kAhead; ++n, ahead.next())
        if (ahead.i < rows) x[n] = read(ahead.i, ahead.j);
#pragma unroll
      for (int n = 0; n < kAhead; ++n, at.next())
        if (at.i < rows) write(at.i, at.j, x[n]);
    }
    __syncthreads();
#else
    each(rows, columns, [&](int i, int j) { write(i, j, read(i, j)); });
#endif
  }
  // f(i) for i < n, each by a whole warp
  template <class F> FASTPE_DEVICE void each_warp(int n, F f) const {
#ifdef __CUDACC__
    for (int i = int(threadIdx.x) / 32; i < n; i += kThreads / 32) f(i);
    __syncthreads();
#else
    each(n, f);
#endif
  }
};

// Two matrices to be multiplied, each stored by rows or by columns.
template <bool kColumnsA, bool kColumnsB, class A, class B> struct Term {
  const A *a;
  int lda;
  const B *b;
  int ldb, depth;
  bool lower;  // a is zero above its diagonal

  FASTPE_DEVICE const A *left(int i, int k) const {
    return a + (kColumnsA ? k * lda + i : i * lda + k);
  }
  FASTPE_DEVICE const B *right(int k, int j) const {
    return b + (kColumnsB ? j * ldb + k : k * ldb + j);
  }
  FASTPE_DEVICE int depth_at(int i) const { return lower && i + kTile < depth ? i + kTile : depth; }
};
template <bool kColumnsA, bool kColumnsB, class A, class B>
FASTPE_DEVICE Term<kColumnsA, kColumnsB, A, B> term(const A *a, int lda, const B *b, int ldb,
                                                    int depth, bool lower = false) {
  return {a, lda, b, ldb, depth, lower};
}

#ifdef __CUDACC__

// 16 x 16 sums of a warp: a lane holds eight, in the order of the tensor cores
template <class S> struct Tile {
  S value[8] = {};  // [half of the columns][half of the rows][2]

  FASTPE_DEVICE static int group() { return int(threadIdx.x) % 32 / 4; }
  FASTPE_DEVICE static int within() { return int(threadIdx.x) % 4; }
  template <class F> FASTPE_DEVICE void visit(F f) const {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      f(group() + i / 2 % 2 * 8, within() * 2 + i / 4 * 8 + i % 2, value[i]);
  }
};

// two neighbours along the depth, `step` apart in memory, packed for the tensor cores
FASTPE_DEVICE uint32_t pack(const BFloat16 *x, int step) {
  if (step == 1) return *as<const uint32_t>(x);
  return x[0].bits | uint32_t(x[step].bits) << 16;
}
FASTPE_DEVICE uint32_t pack(const float *x, int step) {
  __nv_bfloat162 two = __floats2bfloat162_rn(x[0], x[step]);
  return *as<const uint32_t>(&two);
}

// tile += rows [i, i + 16) of the product, columns [j, j + 16)
template <bool kColumnsA, bool kColumnsB, class A, class B>
FASTPE_DEVICE void accumulate(Tile<float> &tile, const Term<kColumnsA, kColumnsB, A, B> &x, int i,
                              int j, BFloat16) {
  const int g = Tile<float>::group(), w = Tile<float>::within() * 2, depth = x.depth_at(i);
  const int step_a = kColumnsA ? x.lda : 1, step_b = kColumnsB ? 1 : x.ldb;
  for (int k = 0; k < depth; k += 16) {
    uint32_t a[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) a[n] = pack(x.left(i + g + n % 2 * 8, k + w + n / 2 * 8), step_a);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float *c = tile.value + 4 * n;
      uint32_t b0 = pack(x.right(k + w, j + g + n * 8), step_b);
      uint32_t b1 = pack(x.right(k + w + 8, j + g + n * 8), step_b);
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
          "{%8, %9}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
  }
}
template <class X>
FASTPE_DEVICE void accumulate(Tile<float> &tile, const X &x, int i, int j, Float16) {
  const int g = Tile<float>::group(), w = Tile<float>::within(), depth = x.depth_at(i);
  for (int k = 0; k < depth; k += 8) {
    uint32_t a[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) a[n] = to_tf32(*x.left(i + g + n % 2 * 8, k + w + n / 2 * 4));
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float *c = tile.value + 4 * n;
      uint32_t b0 = to_tf32(*x.right(k + w, j + g + n * 8));
      uint32_t b1 = to_tf32(*x.right(k + w + 4, j + g + n * 8));
      asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
          "{%8, %9}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
  }
}
template <class S, class X>
FASTPE_DEVICE void accumulate(Tile<S> &tile, const X &x, int i, int j, S) {
  const int g = Tile<S>::group(), w = Tile<S>::within() * 2, depth = x.depth_at(i);
#pragma unroll 2  // more would run out of registers
  for (int k = 0; k < depth; ++k) {
    const S a0 = *x.left(i + g, k), a1 = *x.left(i + g + 8, k);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const S b = *x.right(k, j + w + n / 2 * 8 + n % 2);
      tile.value[n / 2 * 4 + n % 2] += a0 * b;
      tile.value[n / 2 * 4 + 2 + n % 2] += a1 * b;
    }
  }
}

#else

template <class S> struct Tile {
  S value[kTile][kTile] = {};

  template <class F> void visit(F f) const {
    for (int i = 0; i < kTile; ++i)
      for (int j = 0; j < kTile; ++j) f(i, j, value[i][j]);
  }
};

// round an operand as the tensor cores do
inline float operand(float x, BFloat16) { return widen(narrow<BFloat16>(x)); }
inline float operand(float x, Float16) {
  uint32_t bits = to_tf32(x);
  memcpy(&x, &bits, 4);
  return x;
}
inline float operand(float x, float) { return x; }
inline double operand(double x, double) { return x; }

template <class S, class X, class T>
void accumulate(Tile<S> &tile, const X &x, int i, int j, T type) {
  const int depth = x.depth_at(i);
  for (int k = 0; k < depth; ++k) {
    S a[kTile], b[kTile];
    for (int n = 0; n < kTile; ++n) {
      a[n] = operand(widen(*x.left(i + n, k)), type);
      b[n] = operand(widen(*x.right(k, j + n)), type);
    }
    for (int r = 0; r < kTile; ++r)
      for (int c = 0; c < kTile; ++c) tile.value[r][c] += a[r] * b[c];
  }
}

#endif

// Call out(i, j, x) for each entry x of the sum of the terms, [rows, columns]. `lower` leaves out
// the tiles above the diagonal. All sizes are multiples of 16.
template <class T, class Out, class... Terms>
FASTPE_DEVICE void product(const Block &block, int rows, int columns, bool lower, Out out,
                           const Terms &...terms) {
  const int across = columns / kTile;
  block.each_warp(rows / kTile * across, [&](int n) {
    const int i = n / across * kTile, j = n % across * kTile;
    if (lower && j > i) return;
    Tile<typename Types<T>::S> tile;
    (accumulate(tile, terms, i, j, T()), ...);
    tile.visit([&](int r, int c, auto x) { out(i + r, j + c, x); });
  });
}

// the layout of shared memory
struct Layout {
  int bytes = 0;
  int take(int64_t count, int64_t size) {
    const int at = bytes;
    bytes = int(parts_of(bytes + count * size, 16) * 16);
    return at;
  }
};
// the row length of a matrix whose tiles a warp reads without bank conflicts
template <class X> FASTPE_HD int row_length(int width) { return width + 16 / int(sizeof(X)); }

}  // namespace
}  // namespace fastpe
