// Products of small matrices of any shape that lie in the caches, and compensated sums.
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

// acc [kRows, kVectors] += tril(A) B, with A [kRows, kRows]. The zeros of tril(A) are skipped, so a
// NaN or an infinity in a row of B does not reach the rows above.
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

// A [m, depth] and B [depth, n], with their strides. With `triangle` a block of rows of A has a
// lower triangle behind column `depth`, and B has the rows that it multiplies.
template <class S> struct Product {
  int64_t depth;
  const S *a;
  int64_t a_row, a_col;
  const S *b;
  int64_t ldb;
  bool triangle = false;
};

// The place of the result [m, n]: written, or with `add` added to. With `lost` the sum is
// compensated: `lost` has the layout of `data` and keeps the digits that do not fit in there.
template <class S> struct Sum {
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

// acc holds the products and the old `lost`: one addition to `data` loses digits once
template <class S, int kRows, int kVectors>
FASTPE_HD void put_compensated(const Vec<S> (&acc)[kRows][kVectors], const Sum<S> &out) {
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const int64_t at = i * out.ld + j * kLanes<S>;
      const Vec<S> before = load(out.data + at), total = before + acc[i][j];
      store(out.lost + at, acc[i][j] - (total - before));
      store(out.data + at, total);
    }
}

// out [kRows, kVectors * lanes] (+)= the sum of `count` products, from `row` and `column` on
template <class S, int kRows, int kVectors>
void tile(const Product<S> *p, int count, int64_t row, int64_t column, const Sum<S> &out) {
  Vec<S> acc[kRows][kVectors];
  // fetch from the second-level cache: the data of this tile and `lost` of the tile below
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

// the columns that a tile takes of the `left` ones; it leaves no single vector behind
template <class S> int64_t panel(int64_t left) {
  const int64_t vectors = left / kLanes<S>;
  const bool one_more = vectors == kTileVectors + 1;
  return kLanes<S> * (one_more ? vectors / 2 : smaller(vectors, kTileVectors));
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
// rows <= kTileRows; begin and end are multiples of the lanes; `out` starts at `row`
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
  // all rows use a panel of B before the next, as it fits the first-level cache
  for (int64_t j = 0, width; j < n; j += width) {
    width = panel<S>(n - j);
    for (int64_t i = 0; i < m; i += kTileRows)
      few_rows<S>(smaller(m - i, kTileRows), p, count, i, j, j + width, out.from(i, 0));
  }
}

// Replace each row of x [n, kVectors * lanes] by running + the sum of the rows up to it, weighted
// if `weight` is given. Add all of them to `running`, compensated by `lost` as above.
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
    store(lost + j * lanes, inside[j] - (total - before[j]));
    store(running + j * lanes, total);
  }
}

}  // namespace
}  // namespace fastpe
