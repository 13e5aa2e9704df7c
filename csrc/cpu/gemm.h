// The one matrix product that everything else is made of: small, in cache, any shape. And sums that
// stay accurate however many chunks are added to them.
#pragma once
#include "simd.h"

namespace fastpe {
namespace {

constexpr int kTileRows = 4;
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 3;

// acc [kRows, kVectors] += A [kRows, depth] B [depth, kVectors * lanes]
template <class S, int kRows, int kVectors>
FASTPE_HD void accumulate(Vec<S> (&acc)[kRows][kVectors], int64_t depth, const S *a, int64_t a_row,
                          int64_t a_col, const S *b, int64_t ldb) {
  for (int64_t k = 0; k < depth; ++k, a += a_col, b += ldb) {
    Vec<S> right[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * kLanes<S>);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      Vec<S> left = splat(a[i * a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] += left * right[j];
    }
  }
}

// acc [kRows, kVectors] += A [kRows, kRows] up to its diagonal, times B. Nothing is multiplied by the
// zeros beyond it, so a NaN or an infinity in a row of B does not reach the rows above its own.
template <class S, int kRows, int kVectors>
FASTPE_HD void accumulate_triangle(Vec<S> (&acc)[kRows][kVectors], const S *a, int64_t a_row,
                                   int64_t a_col, const S *b, int64_t ldb) {
#pragma GCC unroll 4
  for (int k = 0; k < kRows; ++k, a += a_col, b += ldb) {
    Vec<S> right[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * kLanes<S>);
#pragma GCC unroll 4
    for (int i = k; i < kRows; ++i) {
      Vec<S> left = splat(a[i * a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] += left * right[j];
    }
  }
}

// A [m, depth] by row and column strides, B [depth, n] by its row stride; with `triangle` as many
// columns of A and rows of B follow as a block of rows has, of which row i takes the first i + 1
template <class S>
struct Product {
  int64_t depth;
  const S *a;
  int64_t a_row, a_col;
  const S *b;
  int64_t ldb;
  bool triangle = false;
};

// Where products go, [m, n]: in place of what is there, or added to it. With `lost`, which lies as
// `data` does, sums are compensated: it has what is too small for the digits of `data`.
template <class S>
struct Sum {
  S *data;
  int64_t ld;
  bool add = false;
  S *lost = nullptr;

  Sum from(int64_t row, int64_t column) const {
    const int64_t at = row * ld + column;
    return {data + at, ld, add, lost ? lost + at : nullptr};
  }
};

template <class S, int kRows, int kVectors>
FASTPE_HD void put(const Vec<S> (&acc)[kRows][kVectors], const Sum<S> &out) {
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(out.data + i * out.ld + j * kLanes<S>, acc[i][j]);
}

// acc: the products, and what was lost before; added as a whole, so that one rounding is lost of it
template <class S, int kRows, int kVectors>
FASTPE_HD void put_compensated(const Vec<S> (&acc)[kRows][kVectors], const Sum<S> &out) {
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const int64_t at = i * out.ld + j * kLanes<S>;
      const Vec<S> before = load(out.data + at), total = before + acc[i][j];
      store(out.lost + at, acc[i][j] - (total - before)), store(out.data + at, total);
    }
}

// out [kRows, kVectors * lanes] (+)= the sum of `count` products, from their `row` and `column` on
template <class S, int kRows, int kVectors>
void tile(const Product<S> *p, int count, int64_t row, int64_t column, const Sum<S> &out) {
  Vec<S> acc[kRows][kVectors];
  // what lies in the second-level cache: this tile's totals, and what the tile below it lost
  if (out.lost)
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; j += kVectors > 1 ? kVectors - 1 : 1) {
        __builtin_prefetch(out.data + i * out.ld + j * kLanes<S>);
        __builtin_prefetch(out.lost + (kRows + i) * out.ld + j * kLanes<S>);
      }
  const S *first = out.lost ? out.lost : out.add ? out.data : nullptr;
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      acc[i][j] = first ? load(first + i * out.ld + j * kLanes<S>) : Vec<S>{};
  for (int k = 0; k < count; ++k) {
    const Product<S> &x = p[k];
    const S *a = x.a + row * x.a_row, *b = x.b + column;
    accumulate<S, kRows, kVectors>(acc, x.depth, a, x.a_row, x.a_col, b, x.ldb);
    if (x.triangle)
      accumulate_triangle<S, kRows, kVectors>(acc, a + x.depth * x.a_col, x.a_row, x.a_col,
                                              b + x.depth * x.ldb, x.ldb);
  }
  out.lost ? put_compensated<S, kRows, kVectors>(acc, out) : put<S, kRows, kVectors>(acc, out);
}

// how many of the next `left` columns a tile takes: not so many that one vector is left alone
template <class S>
int64_t panel(int64_t left) {
  const int64_t vectors = left / kLanes<S>;
  const bool one_more = vectors == kTileVectors + 1;
  return kLanes<S> * (one_more ? vectors / 2 : smaller<int64_t>(vectors, kTileVectors));
}

template <class S, int kRows>
void row_block(const Product<S> *p, int count, int64_t row, int64_t begin, int64_t end,
               const Sum<S> &out) {
  for (int64_t j = begin, width; j < end; j += width) {
    width = panel<S>(end - j);
    switch (width / kLanes<S>) {
      case 1: tile<S, kRows, 1>(p, count, row, j, out.from(0, j)); break;
      case 2: tile<S, kRows, 2>(p, count, row, j, out.from(0, j)); break;
      case 3: tile<S, kRows, 3>(p, count, row, j, out.from(0, j)); break;
      default: tile<S, kRows, kTileVectors>(p, count, row, j, out.from(0, j));
    }
  }
}

// rows [row, row + rows) and columns [begin, end) of out (+)= the sum of `count` products;
// rows <= kTileRows, begin and end multiples of the lanes; `out` is where `row` goes
template <class S>
void few_rows(int64_t rows, const Product<S> *p, int count, int64_t row, int64_t begin, int64_t end,
              const Sum<S> &out) {
  switch (rows) {
    case 1: row_block<S, 1>(p, count, row, begin, end, out); break;
    case 2: row_block<S, 2>(p, count, row, begin, end, out); break;
    case 3: row_block<S, 3>(p, count, row, begin, end, out); break;
    default: row_block<S, kTileRows>(p, count, row, begin, end, out);
  }
}

// out [m, n] (+)= the sum of `count` products; n a multiple of the lanes
template <class S>
void multiply(int64_t m, int64_t n, const Product<S> *p, int count, const Sum<S> &out) {
  // a panel of B that fits the first-level cache is used for all rows
  for (int64_t j = 0, width; j < n; j += width) {
    width = panel<S>(n - j);
    for (int64_t i = 0; i < m; i += kTileRows)
      few_rows<S>(smaller<int64_t>(m - i, kTileRows), p, count, i, j, j + width, out.from(i, 0));
  }
}

// x [n, kVectors * lanes], times a weight of each row if given: the sum of rows up to each, in place.
// They begin with `running`, which goes on, compensated by `lost` as above.
template <class S, int kVectors>
FASTPE_HD void running_sums(S *x, int64_t ld, int64_t n, const S *weight, int64_t step, S *running,
                            S *lost) {
  constexpr int64_t lanes = kLanes<S>;
  Vec<S> before[kVectors], inside[kVectors] = {};
  for (int j = 0; j < kVectors; ++j) before[j] = load(running + j * lanes);
  for (int64_t i = 0; i < n; ++i, x += ld)
    for (int j = 0; j < kVectors; ++j) {
      inside[j] += weight ? load(x + j * lanes) * weight[i * step] : load(x + j * lanes);
      store(x + j * lanes, before[j] + inside[j]);
    }
  for (int j = 0; j < kVectors; ++j) {
    inside[j] += load(lost + j * lanes);
    const Vec<S> total = before[j] + inside[j];
    store(lost + j * lanes, inside[j] - (total - before[j])), store(running + j * lanes, total);
  }
}

}  // namespace
}  // namespace fastpe
