// Features of SPE and F-StrIPE, for CUDA.
//
// A block makes a few sines for a tile of tokens, multiplies them by x in shared memory, and
// projects the product: y = u Z with u = x_d (gain cos, gain sin, gate)_d. The gradient is du = dy
// Z^T. The rows of Z are cos and sin of each (d, k), then the gates.
#pragma once
#include "pairs.h"

namespace fastpe {
namespace {

// the tile of a block: its tokens, sines and features, and its layout in shared memory
struct SinePlan {
  int tokens, sines, columns, slices;
  int ld_rows, ld_noise, ld_sums, ld_x;
  int rows, noise, sums, by_x, by_position;
  int bytes;
};

template <class S> struct SineMapOf {
  const FastpeSineFeatures &args;
  const int64_t h;

  template <class T> FASTPE_DEVICE Rows<T> x(int64_t b) const {
    return Rows<T>(args.x, b, shared_head(h, args.H, args.Hx));
  }
  FASTPE_DEVICE const double *position(int64_t b, int64_t t) const {
    return args.positions + ((args.Bp == 1 ? 0 : b) * args.T + t) * args.L;
  }
  // cos and sin of sine i = d K + k
  FASTPE_DEVICE Pair<S> sine(int64_t b, int64_t t, int i) const {
    const int64_t at = h * args.D * args.K + i;
    const double *p = position(b, t);
    double turns = args.offset ? args.offset[at] : 0;
    for (int64_t l = 0; l < args.L; ++l) turns += args.freq[at * args.L + l] * p[l];
    S sin, cos;
    sincos_of(S(reduce_turns(turns)), sin, cos);
    return {cos, sin};
  }
  FASTPE_DEVICE S gain(int i) const { return S(args.gain[h * args.D * args.K + i]); }
  FASTPE_DEVICE S gate(int d) const { return S(args.gate[h * args.D + d]); }

  // Depth blocks have 2 `sines` rows: first the blocks of sines, then those of gates.
  FASTPE_DEVICE int sine_blocks(int sines) const { return int(parts_of(args.D * args.K, sines)); }
  FASTPE_DEVICE int depth_blocks(int sines) const {
    return sine_blocks(sines) + (args.gate ? int(parts_of(args.D, 2 * sines)) : 0);
  }
  // the place of row j of a depth block in the published order, d J + row; negative for padding
  FASTPE_DEVICE int64_t row(int depth_block, int sines, int j) const {
    const int gates = depth_block - sine_blocks(sines);
    if (gates < 0) {
      const int64_t i = int64_t(depth_block) * sines + j / 2;
      return i < args.D * args.K ? i / args.K * args.J + i % args.K * 2 + j % 2 : -1;
    }
    const int64_t d = int64_t(gates) * 2 * sines + j;
    return d < args.D ? d * args.J + 2 * args.K : -1;
  }
};

// load the noise of a depth block, [2 sines, columns] from column `first` on
template <class T>
FASTPE_DEVICE void load_noise(const Block &block, const FastpeSineFeatures &args, int64_t h,
                              int depth_block, int sines, int first, int columns,
                              typename Types<T>::Operand *out, int ld) {
  using S = typename Types<T>::S;
  const SineMapOf<S> map = {args, h};
  block.move(
      2 * sines, columns,
      [&](int j, int r) {
        const int64_t row = map.row(depth_block, sines, j);
        if (row < 0 || first + r >= args.R) return S(0);
        return as<const S>(args.noise)[(h * args.D * args.J + row) * args.R + first + r];
      },
      [&](int j, int r, S x) { out[j * ld + r] = narrow<typename Types<T>::Operand>(x); });
}

template <class T> struct SineKernel {
  using S = typename Types<T>::S;
  using Operand = typename Types<T>::Operand;
  struct Args {
    FastpeSineFeatures sines;
    SinePlan plan;
  };

  static SinePlan plan(const FastpeSineFeatures &args) {
    SinePlan p = {};
    p.tokens = int(smaller(sizeof(S) == 8 ? 32 : 64, tiled(larger(args.T, 1))));
    p.sines = 32;
    p.columns = int(smaller(64, tiled(args.R)));
    p.slices = args.noise ? int(parts_of(args.R, p.columns)) : 1;
    p.ld_rows = row_length<Operand>(2 * p.sines);
    p.ld_noise = row_length<Operand>(p.columns);
    p.ld_sums = row_length<S>(p.columns);
    if (!args.noise) return p;
    Layout memory;
    p.rows = memory.take(p.tokens * p.ld_rows, sizeof(Operand));
    p.noise = memory.take(2 * p.sines * p.ld_noise, sizeof(Operand));
    p.sums = memory.take(p.tokens * p.ld_sums, sizeof(S));
    p.bytes = memory.bytes;
    return p;
  }
  // slices of the features, then heads, then tiles of tokens
  static int64_t blocks(const Args &args) {
    return args.sines.B * parts_of(args.sines.T, args.plan.tokens) * args.sines.H *
           args.plan.slices;
  }

  FASTPE_DEVICE static void run(const Block &block, const Args &all) {
    const FastpeSineFeatures &args = all.sines;
    const SinePlan &p = all.plan;
    const int64_t tile = block.index / p.slices / args.H, tiles = parts_of(args.T, p.tokens);
    const int64_t b = tile / tiles, first = tile % tiles * p.tokens;
    const SineMapOf<S> map = {args, block.index / p.slices % args.H};
    const int n = int(smaller(p.tokens, args.T - first));
    const Rows<T> x = map.template x<T>(b), y(args.y, b, map.h);
    if (args.noise)
      projected(block, args, p, map, b, first, n, x, y);
    else if (args.pool)
      pooled(block, args, map, b, first, n, x, y);
    else
      plain(block, args, map, b, first, n, x, y);
  }

 private:
  FASTPE_DEVICE static void projected(const Block &block, const FastpeSineFeatures &args,
                                      const SinePlan &p, const SineMapOf<S> &map, int64_t b,
                                      int64_t first, int n, const Rows<T> &x, const Rows<T> &y) {
    Operand *u = as<Operand>(block.memory + p.rows), *noise = as<Operand>(block.memory + p.noise);
    S *sums = as<S>(block.memory + p.sums);
    const int column = int(block.index % p.slices) * p.columns, rows = tiled(n);
    block.each(rows, p.columns, [&](int t, int r) { sums[t * p.ld_sums + r] = 0; });
    for (int depth = 0; depth < map.depth_blocks(p.sines); ++depth) {
      const int gates = depth - map.sine_blocks(p.sines);
      block.each(rows, p.sines, [&](int t, int j) {
        S first_row = 0, second_row = 0;
        if (gates < 0) {
          const int64_t i = int64_t(depth) * p.sines + j;
          if (t < n && i < args.D * args.K) {
            const Pair<S> sine = map.sine(b, first + t, int(i));
            const S content = x.get(first + t, i / args.K) * map.gain(int(i));
            first_row = content * sine.first;
            second_row = content * sine.second;
          }
        } else if (t < n) {
          const int d = (gates * p.sines + j) * 2;
          if (d < args.D) first_row = x.get(first + t, d) * map.gate(d);
          if (d + 1 < args.D) second_row = x.get(first + t, d + 1) * map.gate(d + 1);
        }
        u[t * p.ld_rows + 2 * j] = narrow<Operand>(first_row);
        u[t * p.ld_rows + 2 * j + 1] = narrow<Operand>(second_row);
      });
      load_noise<T>(block, args, map.h, depth, p.sines, column, p.columns, noise, p.ld_noise);
      product<T>(
          block, rows, p.columns, false, [&](int i, int j, S v) { sums[i * p.ld_sums + j] += v; },
          term<false, false>(u, p.ld_rows, noise, p.ld_noise, 2 * p.sines));
    }
    block.each(n, p.columns, [&](int t, int r) {
      if (column + r < args.R) y.put(first + t, column + r, sums[t * p.ld_sums + r]);
    });
  }

  // sums over the components
  FASTPE_DEVICE static void pooled(const Block &block, const FastpeSineFeatures &args,
                                   const SineMapOf<S> &map, int64_t b, int64_t first, int n,
                                   const Rows<T> &x, const Rows<T> &y) {
    const int k = int(args.K), d = int(args.D);
    block.each(n, k, [&](int row, int column) {
      const int64_t t = first + row;
      S by_cos = 0, by_sin = 0;
      for (int i = column; i < d * k; i += k) {
        const Pair<S> sine = map.sine(b, t, i);
        const S content = x.get(t, i / k) * map.gain(i);
        by_cos += content * sine.first;
        by_sin += content * sine.second;
      }
      y.put(t, column * 2, by_cos);
      y.put(t, column * 2 + 1, by_sin);
    });
    if (args.gate)
      block.each(n, [&](int i) {
        S total = 0;
        for (int j = 0; j < d; ++j) total += x.get(first + i, j) * map.gate(j);
        y.put(first + i, 2 * k, total);
      });
  }

  FASTPE_DEVICE static void plain(const Block &block, const FastpeSineFeatures &args,
                                  const SineMapOf<S> &map, int64_t b, int64_t first, int n,
                                  const Rows<T> &x, const Rows<T> &y) {
    const int dk = int(args.D * args.K), d = int(args.D);
    block.each(n, dk, [&](int row, int i) {
      const int64_t t = first + row, at = i / args.K * args.J + i % args.K * 2;
      const Pair<S> sine = map.sine(b, t, i);
      const S content = x.get(t, i / args.K) * map.gain(i);
      y.put(t, at, content * sine.first);
      y.put(t, at + 1, content * sine.second);
    });
    if (args.gate)
      block.each(n, d, [&](int row, int i) {
        y.put(first + row, i * args.J + 2 * args.K, x.get(first + row, i) * map.gate(i));
      });
  }
};

}  // namespace
}  // namespace fastpe
