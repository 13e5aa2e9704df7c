// The gradient of the features of SPE and F-StrIPE, for CUDA.
#pragma once
#include "sine_features.h"

namespace fastpe {
namespace {

// A block takes one head and one slice of the tokens, tile by tile.
template <class T> struct SineGradientKernel {
  using S = typename Types<T>::S;
  using Operand = typename Types<T>::Operand;
  using Args = typename SineKernel<T>::Args;

  static SinePlan plan(const FastpeSineFeatures &args, int tokens, int sines) {
    SinePlan p = {};
    p.tokens = int(smaller(tokens, tiled(larger(args.T, 1))));
    p.sines = sines;
    p.columns = tiled(args.R);
    p.slices = int(args.slices);
    p.ld_sums = row_length<S>(2 * sines);
    p.ld_x = int(args.D);
    p.ld_rows = p.ld_noise = row_length<Operand>(p.columns);
    Layout memory;
    if (args.noise) {
      p.rows = memory.take(p.tokens * p.ld_rows, sizeof(Operand));
      p.noise = memory.take(2 * sines * p.ld_noise, sizeof(Operand));
    }
    p.sums = memory.take(p.tokens * p.ld_sums, sizeof(S));
    p.by_x = memory.take(p.tokens * p.ld_x, sizeof(S));
    p.by_position = memory.take(args.grad_positions ? p.tokens * args.L : 0, sizeof(double));
    p.bytes = memory.bytes;
    return p;
  }
  static int64_t blocks(const Args &args) { return args.plan.slices * args.sines.H; }

  FASTPE_DEVICE static void run(const Block &block, const Args &all) {
    SineGradientKernel(block, all).slice();
  }

 private:
  const Block &block_;
  const FastpeSineFeatures &args_;
  const SinePlan &p_;
  const SineMapOf<S> map_;
  Operand *by_y_, *noise_;
  S *sums_, *by_x_;
  double *by_position_, *partial_;
  int64_t b_ = 0, first_ = 0;
  int n_ = 0;

  FASTPE_DEVICE SineGradientKernel(const Block &block, const Args &all)
      : block_(block), args_(all.sines), p_(all.plan), map_{args_, block.index % args_.H},
        by_y_(as<Operand>(block.memory + p_.rows)), noise_(as<Operand>(block.memory + p_.noise)),
        sums_(as<S>(block.memory + p_.sums)), by_x_(as<S>(block.memory + p_.by_x)),
        by_position_(as<double>(block.memory + p_.by_position)),
        partial_(args_.scratch ? args_.scratch + block.index * partial_size(args_) : nullptr) {}

  FASTPE_DEVICE void slice() {
    const int64_t per_sequence = parts_of(args_.T, p_.tokens), tiles = args_.B * per_sequence;
    const int64_t slice = block_.index / args_.H;
    if (partial_) block_.each(int(partial_size(args_)), [&](int i) { partial_[i] = 0; });
    for (int64_t i = tiles * slice / p_.slices; i < tiles * (slice + 1) / p_.slices; ++i) {
      b_ = i / per_sequence;
      first_ = i % per_sequence * p_.tokens;
      n_ = int(smaller(p_.tokens, args_.T - first_));
      tile();
    }
  }

  FASTPE_DEVICE void tile() {
    const Rows<T> by_y(args_.grad_y, b_, map_.h), x = map_.template x<T>(b_);
    const int d = int(args_.D), levels = int(args_.L), rows = tiled(n_);
    block_.each(n_ * d, [&](int e) { by_x_[e] = 0; });
    if (args_.grad_positions) block_.each(n_ * levels, [&](int e) { by_position_[e] = 0; });
    if (args_.noise)
      block_.move(
          rows, p_.columns,
          [&](int t, int r) { return t < n_ && r < args_.R ? S(by_y.get(first_ + t, r)) : S(0); },
          [&](int t, int r, S value) { by_y_[t * p_.ld_rows + r] = narrow<Operand>(value); });
    for (int depth = 0; depth < map_.depth_blocks(p_.sines); ++depth) {
      load_sums(depth, rows, by_y);
      const int gates = depth - map_.sine_blocks(p_.sines);
      gates < 0 ? sines(depth * p_.sines, x) : gate(gates * 2 * p_.sines, x);
    }
    const Gradient<T> out(args_.grad_x, b_, map_.h);
    if (args_.grad_x.data)
      block_.each(n_, d, [&](int t, int i) { out.put(first_ + t, i, by_x_[t * d + i]); });
    if (args_.grad_positions)
      block_.each(n_ * levels, [&](int e) {
        args_.grad_positions[((b_ * args_.H + map_.h) * args_.T + first_) * levels + e] =
            kTwoPi * by_position_[e];
      });
  }

  // sums_ [tokens, 2 sines] = the gradient by the rows of a depth block
  FASTPE_DEVICE void load_sums(int depth, int rows, const Rows<T> &by_y) {
    const int width = 2 * p_.sines;
    if (!args_.noise) {
      block_.each(n_, width, [&](int t, int j) {
        const int64_t row = map_.row(depth, p_.sines, j);
        if (row < 0) return;
        sums_[t * p_.ld_sums + j] = by_y.get(first_ + t, args_.pool ? row % args_.J : row);
      });
      return;
    }
    load_noise<T>(block_, args_, map_.h, depth, p_.sines, 0, p_.columns, noise_, p_.ld_noise);
    product<T>(
        block_, rows, width, false, [&](int i, int j, S v) { sums_[i * p_.ld_sums + j] = v; },
        term<false, true>(by_y_, p_.ld_rows, noise_, p_.ld_noise, p_.columns));
  }

  // the gradients by sines [first, first + sines)
  FASTPE_DEVICE void sines(int first, const Rows<T> &x) {
    const int k = int(args_.K), dk = int(args_.D) * k, levels = int(args_.L), ld = p_.ld_sums;
    const int count = int(smaller(p_.sines, dk - first));
    // replace the gradients by cos and sin by those by gain and phase, both without the gain
    block_.each(n_, count, [&](int t, int i) {
      S *g = sums_ + t * ld + i * 2;
      const Pair<S> sine = map_.sine(b_, first_ + t, first + i);
      const S by_cos = g[0], by_sin = g[1];
      g[0] = by_cos * sine.first + by_sin * sine.second;
      g[1] = by_sin * sine.first - by_cos * sine.second;
    });
    // these sines belong to these components
    const int begin = first / k, components = (first + count - 1) / k - begin + 1;
    block_.each(n_, components, [&](int t, int component) {
      const int d = begin + component;
      const int from = int(larger(d * k, first)), to = int(smaller(d * k + k, first + count));
      S total = 0;
      for (int i = from; i < to; ++i) total += map_.gain(i) * sums_[t * ld + (i - first) * 2];
      by_x_[t * p_.ld_x + d] += total;
    });
    if (args_.grad_positions)
      block_.each(n_, levels, [&](int t, int l) {
        double total = 0;
        for (int i = first; i < first + count; ++i)
          total += double(map_.gain(i) * x.get(first_ + t, i / k) *
                          sums_[t * ld + (i - first) * 2 + 1]) *
                   args_.freq[(map_.h * dk + i) * levels + l];
        by_position_[t * levels + l] += total;
      });
    if (!partial_) return;
    block_.each(2 + levels, count, [&](int what, int j) {  // gain, phase, phase * position
      const int i = first + j;
      double total = 0;
      for (int t = 0; t < n_; ++t) {
        const S *g = sums_ + t * ld + j * 2;
        const S term = x.get(first_ + t, i / k) * (what == 0 ? g[0] : g[1]);
        total += what < 2 ? double(term) : double(term) * map_.position(b_, first_ + t)[what - 2];
      }
      partial_[what < 2 ? what * dk + i : 2 * dk + i * levels + what - 2] += total;
    });
  }

  // the gradients by the gates of components [first, first + 2 sines)
  FASTPE_DEVICE void gate(int first, const Rows<T> &x) {
    const int count = int(smaller(2 * p_.sines, args_.D - first));
    block_.each(n_, count, [&](int t, int j) {
      by_x_[t * p_.ld_x + first + j] += map_.gate(first + j) * sums_[t * p_.ld_sums + j];
    });
    if (!partial_) return;
    block_.each(count, [&](int j) {
      double total = 0;
      for (int t = 0; t < n_; ++t)
        total += double(x.get(first_ + t, first + j) * sums_[t * p_.ld_sums + j]);
      partial_[(2 + args_.L) * args_.D * args_.K + first + j] += total;
    });
  }
};

// Add the sums of the slices, in order, to the gradients of the parameters.
struct SineParametersKernel {
  using S = double;
  using Args = FastpeSineFeatures;
  static int64_t blocks(const Args &args) {
    return args.H * parts_of(partial_size(args), kThreads);
  }

  FASTPE_DEVICE static void run(const Block &block, const Args &args) {
    const int64_t size = partial_size(args), per_head = parts_of(size, kThreads);
    const int64_t h = block.index / per_head, dk = args.D * args.K, levels = args.L;
    block.each(kThreads, [&](int e) {
      const int64_t i = block.index % per_head * kThreads + e;
      if (i >= size) return;
      double total = 0;
      for (int64_t slice = 0; slice < args.slices; ++slice)
        total += args.scratch[(slice * args.H + h) * size + i];
      const double *gain = args.gain + h * dk;
      if (i < dk) {
        if (args.grad_gain) args.grad_gain[h * dk + i] = total;
      } else if (i < 2 * dk) {
        if (args.grad_offset) args.grad_offset[h * dk + i - dk] = kTwoPi * gain[i - dk] * total;
      } else if (i < (2 + levels) * dk) {
        const int64_t j = i - 2 * dk;
        if (args.grad_freq) args.grad_freq[h * dk * levels + j] = kTwoPi * gain[j / levels] * total;
      } else if (args.grad_gate) {
        args.grad_gate[h * args.D + i - (2 + levels) * dk] = total;
      }
    });
  }
};

}  // namespace
}  // namespace fastpe
