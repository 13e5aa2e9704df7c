// The one matrix product that everything else is made of: small, in cache, any shape.
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

// A [m, depth] by row and column strides, B [depth, n] by its row stride
template <class S>
struct Product {
  int64_t depth;
  const S *a;
  int64_t a_row, a_col;
  const S *b;
  int64_t ldb;
};

// out [kRows, kVectors * lanes] (+)= the sum of `count` products, from their `row` and `column` on
template <class S, int kRows, int kVectors>
void tile(const Product<S> *p, int count, int64_t row, int64_t column, bool add, S *out,
          int64_t ldo) {
  Vec<S> acc[kRows][kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      acc[i][j] = add ? load(out + i * ldo + j * kLanes<S>) : Vec<S>{};
  for (int k = 0; k < count; ++k)
    accumulate<S, kRows, kVectors>(acc, p[k].depth, p[k].a + row * p[k].a_row, p[k].a_row,
                                   p[k].a_col, p[k].b + column, p[k].ldb);
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(out + i * ldo + j * kLanes<S>, acc[i][j]);
}

template <class S, int kRows>
void row_block(const Product<S> *p, int count, int64_t row, int64_t begin, int64_t end, bool add,
               S *out, int64_t ldo) {
  constexpr int64_t lanes = kLanes<S>;
  for (int64_t j = begin; j < end; j += kTileVectors * lanes) {
    switch (smaller<int64_t>((end - j) / lanes, kTileVectors)) {
      case 1: tile<S, kRows, 1>(p, count, row, j, add, out + j, ldo); break;
      case 2: tile<S, kRows, 2>(p, count, row, j, add, out + j, ldo); break;
      case 3: tile<S, kRows, 3>(p, count, row, j, add, out + j, ldo); break;
      default: tile<S, kRows, kTileVectors>(p, count, row, j, add, out + j, ldo);
    }
  }
}

// rows [row, row + rows) and columns [begin, end) of out (+)= the sum of `count` products;
// rows <= kTileRows, begin and end multiples of the lanes; `out` is where `row` goes
template <class S>
void few_rows(int64_t rows, const Product<S> *p, int count, int64_t row, int64_t begin, int64_t end,
              bool add, S *out, int64_t ldo) {
  switch (rows) {
    case 1: row_block<S, 1>(p, count, row, begin, end, add, out, ldo); break;
    case 2: row_block<S, 2>(p, count, row, begin, end, add, out, ldo); break;
    case 3: row_block<S, 3>(p, count, row, begin, end, add, out, ldo); break;
    default: row_block<S, kTileRows>(p, count, row, begin, end, add, out, ldo);
  }
}

// out [m, n] (+)= the sum of `count` products; n a multiple of the lanes
template <class S>
void multiply(int64_t m, int64_t n, const Product<S> *p, int count, bool add, S *out, int64_t ldo) {
  // a panel of B that fits the first-level cache is used for all rows
  constexpr int64_t panel = kTileVectors * kLanes<S>;
  for (int64_t j = 0; j < n; j += panel)
    for (int64_t i = 0; i < m; i += kTileRows)
      few_rows<S>(smaller<int64_t>(m - i, kTileRows), p, count, i, j, smaller(n, j + panel), add,
                  out + i * ldo, ldo);
}

}  // namespace
}  // namespace fastpe
