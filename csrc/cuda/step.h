// One token after a state, for CUDA: one launch makes the features, the state and the output.
#pragma once
#include "normalizer.h"
#include "sine_features.h"

namespace fastpe {
namespace {

// Features are [2, width]: those of q, then those of k.
struct StepPlan {
  int columns, slices, depth, parts;  // depth: D J rows of u; parts: groups of rows with own sums
  int features, norm, rows, sums;
  int bytes;
};

template <class T> struct StepKernel {
  using S = typename Types<T>::S;
  struct Args {
    FastpeCausalDot dot;
    FastpeSineFeatures sines[2];  // of q and k, if x is not null
    StepPlan plan;
  };

  static StepPlan plan(const Args &args) {
    const FastpeSineFeatures &sines = args.sines[0];
    const PairMap<S> map(args.dot);
    StepPlan p = {};
    // features of sines cost too much to make them in several blocks
    p.columns = int(sines.x.data ? args.dot.E : smaller(32, args.dot.E));
    p.slices = int(parts_of(args.dot.E, p.columns));
    Layout memory;
    p.features = memory.take(2 * map.width(), sizeof(S));
    p.norm = memory.take(2 * map.norm_width(), sizeof(S));
    if (sines.x.data) {
      p.depth = int(sines.D * sines.J);
      p.parts = parts(int(sines.R));
      p.rows = memory.take(2 * p.depth, sizeof(S));
    }
    p.sums = memory.take(larger(larger(parts(p.columns) * p.columns, kThreads + kFew),
                                sines.noise ? 2 * p.parts * sines.R : 0),
                         sizeof(S));
    p.bytes = memory.bytes;
    return p;
  }
  static int64_t blocks(const Args &args) { return args.dot.B * args.dot.H * args.plan.slices; }

  FASTPE_DEVICE static void run(const Block &block, const Args &args) {
    StepKernel(block, args).step();
  }

 private:
  static constexpr int kFew = 16, kAhead = 8;  // kAhead: reads in flight
  FASTPE_HD static int parts(int columns) { return int(larger(1, kThreads / columns)); }

  const Block &block_;
  const Args &all_;
  const FastpeCausalDot &args_;
  const StepPlan &p_;
  const PairMap<S> map_;
  const int slice_;
  const Head<T> head_;
  S *features_, *norm_, *rows_, *sums_;

  FASTPE_DEVICE StepKernel(const Block &block, const Args &args)
      : block_(block), all_(args), args_(args.dot), p_(args.plan), map_(args_),
        slice_(int(block.index % p_.slices)), head_(args_, block.index / p_.slices),
        features_(as<S>(block.memory + p_.features)), norm_(as<S>(block.memory + p_.norm)),
        rows_(as<S>(block.memory + p_.rows)), sums_(as<S>(block.memory + p_.sums)) {}

  FASTPE_DEVICE void step() {
    all_.sines[0].x.data ? make_sine_features() : make_features();
    const S inverse = normalize();
    const int width = map_.width(), columns = p_.columns, groups = parts(columns);
    const int64_t size = width * args_.E, first = int64_t(slice_) * columns;
    const Rows<T> v = head_.v(), o = head_.rows(args_.o);
    const S *s0 = as<const S>(args_.s0) + head_.state() * size;
    S *s = as<S>(args_.s) + head_.state() * size;
    const S *lost0 = as<const S>(args_.lost0);
    S *lost = as<S>(args_.lost);
    if (lost) {
      lost0 += lost_at();
      lost += lost_at();
    }
    const bool owner = head_.owner();
    block_.each(groups, columns, [&](int group, int j) {
      const int64_t e = first + j;
      if (e >= args_.E) return;
      const S value = v.get(0, e);
      S total = 0;
      for (int begin = group; begin < width; begin += groups * kAhead) {
        S state[kAhead];
        for (int n = 0; n < kAhead; ++n) {
          const int r = begin + n * groups;
          state[n] = r < width ? s0[r * args_.E + e] : S(0);
        }
        for (int n = 0; n < kAhead; ++n) {
          const int r = begin + n * groups;
          if (r >= width) break;
          const int64_t at = r * args_.E + e;
          S add = features_[width + r] * value;
          if (lost) add += lost0[at];
          const S now = state[n] + add;
          if (owner) s[at] = now;
          if (owner && lost) lost[at] = add - (now - state[n]);
          total += features_[r] * now;
        }
      }
      sums_[group * columns + j] = total;
    });
    block_.each(columns, [&](int j) {
      if (first + j >= args_.E) return;
      S total = 0;
      for (int i = 0; i < groups; ++i) total += sums_[i * columns + j];
      o.put(0, first + j, total * inverse);
    });
  }

  FASTPE_DEVICE void make_features() {
    const int pairs = int(args_.D + 1) / 2, width = map_.width(), norm_width = map_.norm_width();
    block_.each(2, pairs, [&](int side, int w) {
      const Rows<T> x = side ? head_.k() : head_.rows(args_.q);
      if (map_.stride() * w >= width) return;
      Pair<S> seen;
      const Pair<S> turn = map_.rotated(w) ? map_.turn(head_.b, head_.h, 0, w) : Pair<S>{};
      const Pair<S> y = map_.value(map_.read(x, 0, w), w, turn, seen);
      set(features_ + side * width, width, map_.stride(), w, y,
          [&](int j) { return map_.feature(j); });
      set(norm_ + side * norm_width, norm_width, map_.norm_stride(), w, seen,
          [&](int j) { return map_.norm(j); });
    });
  }
  template <class Place>
  FASTPE_DEVICE void set(S *out, int width, int stride, int w, Pair<S> y, Place place) const {
    if (stride * w < width) out[place(stride * w)] = y.first;
    if (stride == 2 && 2 * w + 1 < width) out[place(2 * w + 1)] = y.second;
  }

  FASTPE_DEVICE void make_sine_features() {
    const FastpeSineFeatures &one = all_.sines[0];
    const int d = int(one.D), k = int(one.K), j = int(one.J);
    const int width = map_.width(), depth = p_.depth;
    block_.each(2, d * k, [&](int side, int i) {
      const FastpeSineFeatures &sines = all_.sines[side];
      const SineMapOf<S> map = {sines, head_.h};
      const Pair<S> sine = map.sine(head_.b, 0, i);
      const S content = map.template x<T>(head_.b).get(0, i / k) * map.gain(i);
      S *row = rows_ + side * depth + i / k * j + i % k * 2;
      row[0] = content * sine.first;
      row[1] = content * sine.second;
    });
    if (one.gate)
      block_.each(2, d, [&](int side, int i) {
        const FastpeSineFeatures &sines = all_.sines[side];
        const SineMapOf<S> map = {sines, head_.h};
        rows_[side * depth + i * j + 2 * k] = map.template x<T>(head_.b).get(0, i) * map.gate(i);
      });
    if (one.noise) project();
    block_.each(2, width, [&](int side, int r) {
      S total = 0;
      if (one.noise)
        for (int i = 0; i < p_.parts; ++i) total += sums_[(side * p_.parts + i) * width + r];
      else if (one.pool)
        for (int i = 0; i < d; ++i) total += rows_[side * depth + i * j + r];
      else
        total = rows_[side * depth + r];
      const int at = side * width + r;
      features_[at] = map_.psi(total);
      if (map_.norm_width()) norm_[at] = features_[at];
    });
  }

  // sums_ [2, parts, R] = u Z; q and k usually share the noise
  FASTPE_DEVICE void project() {
    const int width = map_.width(), depth = p_.depth, parts = p_.parts;
    const S *for_q = as<const S>(all_.sines[0].noise) + head_.h * depth * width;
    const S *for_k = as<const S>(all_.sines[1].noise) + head_.h * depth * width;
    block_.each(parts, width, [&](int part, int r) {
      S by_q = 0, by_k = 0;
#pragma unroll 8
      for (int i = part; i < depth; i += parts) {
        const S z = for_q[i * width + r];
        by_q += rows_[i] * z;
        by_k += rows_[depth + i] * (for_k == for_q ? z : for_k[i * width + r]);
      }
      sums_[part * width + r] = by_q;
      sums_[(parts + part) * width + r] = by_k;
    });
  }

  // where the lost digits of this state begin
  FASTPE_DEVICE int64_t lost_at() const {
    return head_.state() * (map_.width() * args_.E + map_.norm_width());
  }

  // return 1 / divisor, and update the running sum
  FASTPE_DEVICE S normalize() {
    const int width = map_.norm_width();
    if (!width) return 1;
    const S *z0 = as<const S>(args_.z0) + head_.state() * width;
    S *z = as<S>(args_.z) + head_.state() * width, *few = sums_ + kThreads;
    const int64_t size = map_.width() * args_.E;
    const S *lost0 = as<const S>(args_.lost0);
    S *lost = as<S>(args_.lost);
    if (lost) {
      lost0 += lost_at() + size;
      lost += lost_at() + size;
    }
    block_.each(kThreads, [&](int e) {
      S total = 0;
      for (int j = e; j < width; j += kThreads) {
        const S add = lost ? norm_[width + j] + lost0[j] : norm_[width + j], now = z0[j] + add;
        total += norm_[j] * now;
        if (slice_ != 0 || !head_.owner()) continue;
        z[j] = now;
        if (lost) lost[j] = add - (now - z0[j]);
      }
      sums_[e] = total;
    });
    block_.each(kFew, [&](int e) {
      S total = 0;
      for (int i = e; i < kThreads; i += kFew) total += sums_[i];
      few[e] = total;
    });
    S den = 0, sign;
    for (int i = 0; i < kFew; ++i) den += few[i];
    const S inverse = 1 / divisor(args_, den, sign);
    block_.each(1, [&](int) {
      if (args_.den && slice_ == 0) as<S>(args_.den)[head_.row] = den;
    });
    return inverse;
  }
};

}  // namespace
}  // namespace fastpe
