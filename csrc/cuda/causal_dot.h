// The scans of ../cpu/causal_dot.h for CUDA. A block walks the chunks of one head of a sequence,
// and keeps its columns of the state in shared memory.
//
//     role      a [inner]  b [inner]  c [outer]   tokens       after it
//     forward   phi        psi        v           in order     divide by the normaliser
//     grad_q    g          v          psi         in order     turn back, slope of the feature map
//     grad_k    v          g          phi         backwards    the same
//     grad_v    psi        phi        g           backwards
//
// A block has the whole inner width and a slice of the outer. Slices do not depend on one another,
// so their number does not change the bits.
#pragma once
#include "normalizer.h"
#include "plan.h"

namespace fastpe {
namespace {

template <class T, Role role> struct ScanKernel {
  using S = typename Types<T>::S;
  struct Args {
    FastpeCausalDot dot;
    ScanPlan plan;
    int first_slice, slices;  // of the outer columns
  };
  FASTPE_DEVICE static void run(const Block &block, const Args &args) {
    ScanKernel(block, args).scan();
  }

 private:
  using Operand = typename Types<T>::Operand;
  static constexpr bool kBack = role == kGradK || role == kGradV;
  static constexpr bool kAlongFeatures = role == kForward || role == kGradV;
  static constexpr bool kOfFeatures = role == kGradQ || role == kGradK;

  const Block &block_;
  const FastpeCausalDot &args_;
  const ScanPlan &plan_;
  const PairMap<S> map_;
  const int slice_;
  const Head<T> head_;
  Operand *a_tile_, *b_tile_, *c_tile_, *weights_;
  Lost *lost_;
  S *state_, *out_, *sums_, *base_, *running_, *by_row_;
  Pair<S> *turn_;
  const int column_, norm_column_, pair_;  // the first of this slice
  int64_t begin_ = 0;
  int n_ = 0, rows_ = 0;  // tokens of this chunk, and up to a multiple of 16

  FASTPE_DEVICE ScanKernel(const Block &block, const Args &args)
      : block_(block), args_(args.dot), plan_(args.plan), map_(args_),
        slice_(args.first_slice + int(block.index % args.slices)),
        head_(args_, block.index / args.slices), a_tile_(as<Operand>(block.memory + plan_.a)),
        b_tile_(as<Operand>(block.memory + plan_.b)), c_tile_(as<Operand>(block.memory + plan_.c)),
        weights_(as<Operand>(block.memory + plan_.weights)),
        lost_(as<Lost>(block.memory + plan_.lost)), state_(as<S>(block.memory + plan_.state)),
        out_(as<S>(block.memory + plan_.out)), sums_(as<S>(block.memory + plan_.sums)),
        base_(as<S>(block.memory + plan_.base)), running_(as<S>(block.memory + plan_.running)),
        by_row_(as<S>(block.memory + plan_.by_row)), turn_(as<Pair<S>>(block.memory + plan_.turn)),
        column_(slice_ * plan_.outer),
        norm_column_(kOfFeatures ? column_ / map_.stride() * map_.norm_stride() : 0),
        pair_(kOfFeatures ? column_ / map_.stride() : 0) {}

  FASTPE_DEVICE bool normalizes() const { return args_.normalize != FASTPE_NORM_NONE; }
  FASTPE_DEVICE bool positional() const { return args_.grad_freq || args_.grad_positions; }
  FASTPE_DEVICE int64_t token(int i) const { return kBack ? begin_ - i : begin_ + i; }
  // from NormalizerKernel: 1 / divisor of each token, then d loss / d den of each
  FASTPE_DEVICE S inverse(int64_t t) const {
    return normalizes() ? as<const S>(args_.scratch)[head_.row * args_.T + t] : S(1);
  }
  FASTPE_DEVICE S delta(int64_t t) const {
    return as<const S>(args_.scratch)[(args_.B * args_.H + head_.row) * args_.T + t];
  }

  FASTPE_DEVICE void scan() {
    get_state();
    const int64_t *range = args_.ranges ? args_.ranges + 2 * head_.s : nullptr;
    int64_t left = range ? range[1] - range[0] : args_.T;
    begin_ = (range ? range[0] : 0) + (kBack ? left - 1 : 0);
    for (; left > 0; left -= plan_.chunk, begin_ += kBack ? -plan_.chunk : plan_.chunk) {
      n_ = int(smaller(plan_.chunk, left));
      rows_ = tiled(n_);
      if (plan_.turns)
        block_.each(n_, plan_.turns, [&](int i, int p) {
          if (pair_ + p < args_.W)
            turn_[i * plan_.turns + p] = map_.turn(head_.b, head_.h, token(i), pair_ + p);
        });
      if (kOfFeatures && plan_.norm) block_.each(n_, [&](int i) { by_row_[i] = delta(token(i)); });
      load();
      const int ld = plan_.ld_inner;
      product<T>(
          block_, rows_, rows_, true,
          [&](int i, int j, S x) {
            weights_[i * plan_.ld_weights + j] = narrow<Operand>(j <= i ? x : S(0));
          },
          term<false, true>(a_tile_, ld, b_tile_, ld, plan_.inner));
      // inside the chunk, and through the state before it
      product<T>(
          block_, rows_, plan_.outer, false, [&](int i, int j, S x) { put(i, j, x); },
          term<false, false>(weights_, plan_.ld_weights, c_tile_, plan_.ld_outer, rows_, true),
          term<false, false>(a_tile_, ld, state_, plan_.ld_state, plan_.inner));
      product<T>(
          block_, plan_.inner, plan_.outer, false,
          [&](int i, int j, S x) { add_to_state(i * plan_.ld_state + j, x); },
          term<true, false>(b_tile_, ld, c_tile_, plan_.ld_outer, rows_));
      if constexpr (kOfFeatures) finish();
    }
    put_state();
  }

  FASTPE_DEVICE void add_to_state(int at, S x) {
    const S before = state_[at];
    const bool compensated = kCompensated<T> && plan_.compensated;
    if (compensated) x += widen(lost_[at]);
    const S total = before + x;
    if (compensated) lost_[at] = narrow<Lost>(float(x - (total - before)));
    state_[at] = total;
  }

  FASTPE_DEVICE void load() {
    auto nothing = [](int, int, S) {};
    auto set = [&](int i, int j, S x) {
      if (plan_.norm) sums_[i * plan_.ld_norm + j] = x;
    };
    const int inner = plan_.inner, outer = plan_.outer;
    if constexpr (role == kForward) {
      features(head_.k(), b_tile_, plan_.ld_inner, inner, set);
      values(head_.v(), c_tile_, plan_.ld_outer, column_, outer, false);
      if (plan_.norm) accumulate_norm();
      features(head_.rows(args_.q), a_tile_, plan_.ld_inner, inner, [&](int i, int j, S x) {
        if (plan_.norm) sums_[i * plan_.ld_norm + j] = x * norm_sum(i, j);
      });
      if (plan_.norm) normalizer();
    } else if constexpr (role == kGradQ) {
      values(head_.rows(args_.grad_o), a_tile_, plan_.ld_inner, 0, inner, true);
      values(head_.v(), b_tile_, plan_.ld_inner, 0, inner, false);
      features(head_.k(), c_tile_, plan_.ld_outer, outer, set);
      if (plan_.norm) accumulate_norm();
    } else if constexpr (role == kGradK) {
      values(head_.v(), a_tile_, plan_.ld_inner, 0, inner, false);
      values(head_.rows(args_.grad_o), b_tile_, plan_.ld_inner, 0, inner, true);
      features(head_.rows(args_.q), c_tile_, plan_.ld_outer, outer, [&](int i, int j, S x) {
        if (plan_.norm) sums_[i * plan_.ld_norm + j] = i < n_ ? x * by_row_[i] : S(0);
      });
      if (plan_.norm) accumulate_norm();
    } else {
      features(head_.k(), a_tile_, plan_.ld_inner, inner, nothing);
      features(head_.rows(args_.q), b_tile_, plan_.ld_inner, inner, nothing);
      values(head_.rows(args_.grad_o), c_tile_, plan_.ld_outer, column_, outer, true);
    }
  }

  // out [rows, columns] = x from column `first` on, divided by the normaliser if `scaled`
  FASTPE_DEVICE void values(const Rows<T> &x, Operand *out, int ld, int first, int columns,
                            bool scaled) {
    block_.move(
        rows_, columns,
        [&](int i, int j) {
          if (i >= n_ || first + j >= args_.E) return S(0);
          const S value = x.get(token(i), first + j);
          return scaled ? value * inverse(token(i)) : value;
        },
        [&](int i, int j, S value) { out[i * ld + j] = narrow<Operand>(value); });
  }

  // out [rows, columns] = features of this slice; norm(i, j, x) receives those of the normaliser
  template <class Norm>
  FASTPE_DEVICE void features(const Rows<T> &x, Operand *out, int ld, int columns, Norm norm) {
    const int stride = map_.stride(), norm_stride = map_.norm_stride(), pairs = columns / stride;
    auto exists = [&](int i, int p) { return i < n_ && stride * (pair_ + p) < map_.width(); };
    block_.move(
        rows_, pairs,
        [&](int i, int p) { return exists(i, p) ? map_.read(x, token(i), pair_ + p) : Pair<S>{}; },
        [&](int i, int p, Pair<S> content) {
          const int w = pair_ + p;
          Pair<S> y = {}, seen = {};
          if (exists(i, p)) y = map_.value(content, w, turn(i, p), seen);
          // the last of an odd number of columns has no partner
          if (2 * w + 1 >= args_.D) y.second = seen.second = 0;
          out[i * ld + stride * p] = narrow<Operand>(y.first);
          if (stride == 2) out[i * ld + stride * p + 1] = narrow<Operand>(y.second);
          norm(i, norm_stride * p, seen.first);
          if (norm_stride == 2) norm(i, norm_stride * p + 1, seen.second);
        });
  }
  FASTPE_DEVICE Pair<S> turn(int i, int p) const {
    return map_.rotated(pair_ + p) ? turn_[i * plan_.turns + p] : Pair<S>{};
  }

  // sum the normaliser's features inside groups of eight tokens, and before each group
  FASTPE_DEVICE void accumulate_norm() {
    const int width = plan_.norm, ld = plan_.ld_norm, groups = rows_ / 8;
    block_.each(groups, width, [&](int group, int j) {
      S *x = sums_ + group * 8 * ld + j, total = 0;
      for (int i = 0; i < 8; ++i) x[i * ld] = total += x[i * ld];
    });
    block_.each(width, [&](int j) {
      const S before = running_[j];
      S inside = 0;
      for (int i = 0; i < groups; ++i) {
        base_[i * ld + j] = before + inside;
        inside += sums_[(i * 8 + 7) * ld + j];
      }
      // compensated (Kahan), so that long sums keep their last digits
      S &compensation = running_[width + j];
      inside -= compensation;
      const S total = before + inside, kept = total - before;
      compensation = kept - inside;
      running_[j] = total;
    });
  }
  FASTPE_DEVICE S norm_sum(int i, int j) const {
    return base_[i / 8 * plan_.ld_norm + j] + sums_[i * plan_.ld_norm + j];
  }

  // by_row_ = 1 / divisor, from sums_: the features of q times the sums of those of k
  FASTPE_DEVICE void normalizer() {
    S *parts = as<S>(block_.memory + plan_.parts);
    block_.each(n_ * 8, [&](int e) {
      const S *x = sums_ + e / 8 * plan_.ld_norm;
      S total = 0;
      for (int j = e % 8; j < plan_.norm; j += 8) total += x[j];
      parts[e] = total;
    });
    block_.each(n_, [&](int i) {
      S den = 0, sign;
      for (int j = 0; j < 8; ++j) den += parts[i * 8 + j];
      by_row_[i] = 1 / divisor(args_, den, sign);
      if (args_.den && slice_ == 0) as<S>(args_.den)[head_.row * args_.T + token(i)] = den;
    });
  }

  FASTPE_DEVICE void put(int i, int j, S x) {
    if constexpr (kOfFeatures) {
      out_[i * plan_.ld_state + j] = x;
    } else {
      if (i >= n_ || column_ + j >= args_.E) return;
      if constexpr (role == kForward)
        head_.rows(args_.o).put(token(i), column_ + j, plan_.norm ? x * by_row_[i] : x);
      else if (args_.grad_v.data)
        Gradient<T>(args_.grad_v, head_.b, head_.h).put(token(i), column_ + j, x);
    }
  }

  // turn the gradient by the features in out_ into that by q or k
  FASTPE_DEVICE void finish() {
    const FastpeTensor &to = role == kGradQ ? args_.grad_q : args_.grad_k;
    const Rows<T> x = role == kGradQ ? head_.rows(args_.q) : head_.k();
    const Gradient<T> grad(to, head_.b, head_.h);
    const int stride = map_.stride(), norm_stride = map_.norm_stride();
    const int pairs = plan_.outer / stride;
    block_.each(n_, pairs, [&](int i, int p) {
      const int w = pair_ + p;
      if (stride * w >= map_.width()) return;
      const int64_t t = token(i);
      S *g = out_ + i * plan_.ld_state + stride * p, angle = 0;
      Pair<S> norm = {};
      if (plan_.norm) {
        const S factor = role == kGradQ ? by_row_[i] : S(1);
        norm.first = factor * norm_sum(i, norm_stride * p);
        if (norm_stride == 2) norm.second = factor * norm_sum(i, norm_stride * p + 1);
      }
      const Pair<S> by_x = map_.gradient(map_.read(x, t, w), w, turn(i, p),
                                         {g[0], stride == 2 ? g[1] : S(0)}, norm, angle);
      g[0] = angle;
      if (!to.data) return;
      grad.put(t, map_.column(2 * w), by_x.first);
      if (2 * w + 1 < args_.D) grad.put(t, map_.column(2 * w + 1), by_x.second);
    });
    if (positional()) finish_positional(int(smaller(pairs, args_.W - pair_)));
  }

  // add to the gradients of freq and positions: finish() leaves those by the angles in out_
  FASTPE_DEVICE void finish_positional(int pairs) {
    const int levels = int(args_.L), stride = map_.stride();
    const double *positions = args_.positions + (args_.Bp == 1 ? 0 : head_.b) * args_.T * levels;
    const double *freq = args_.freq + (args_.Hf == 1 ? 0 : head_.h) * args_.W * levels;
    if (args_.grad_freq)
      block_.each(pairs, levels, [&](int p, int l) {
        double total = 0;
        for (int i = 0; i < n_; ++i)
          total += double(out_[i * plan_.ld_state + p * stride]) * positions[token(i) * levels + l];
        args_.grad_freq[(head_.index * args_.W + pair_ + p) * levels + l] += kTwoPi * total;
      });
    // backward() in kernels.cu launches the slices one after another
    if (args_.grad_positions)
      block_.each(n_, levels, [&](int i, int l) {
        double total = 0;
        for (int p = 0; p < pairs; ++p)
          total += double(out_[i * plan_.ld_state + p * stride]) * freq[(pair_ + p) * levels + l];
        double &out = args_.grad_positions[(head_.row * args_.T + token(i)) * levels + l];
        out = (role == kGradQ && slice_ == 0 ? 0 : out) + kTwoPi * total;
      });
  }

  // the place of entry (i, j) of a state [inner, outer] in [heads, R, E]; negative for padding
  FASTPE_DEVICE int64_t state_at(int64_t head, int i, int j) const {
    const int r = kAlongFeatures ? i : column_ + j, e = kAlongFeatures ? column_ + j : i;
    if (r >= map_.width() || e >= args_.E) return -1;
    return (head * map_.width() + map_.feature(r)) * args_.E + e;
  }
  FASTPE_DEVICE int64_t norm_at(int64_t head, int j) const {
    if (norm_column_ + j >= map_.norm_width()) return -1;
    return head * map_.norm_width() + map_.norm(norm_column_ + j);
  }

  FASTPE_DEVICE void get_state() {
    // only one of the heads that share a state takes its gradient
    const bool none = kBack && !head_.owner();
    const int64_t head = head_.state();
    const S *s = none ? nullptr : as<const S>(kBack ? args_.grad_s : args_.s0);
    const S *z = none ? nullptr : as<const S>(kBack ? args_.grad_z : args_.z0);
    block_.each(plan_.inner, plan_.outer, [&](int i, int j) {
      const int64_t at = s ? state_at(head, i, j) : -1;
      state_[i * plan_.ld_state + j] = at < 0 ? S(0) : s[at];
      if (kCompensated<T> && plan_.compensated) lost_[i * plan_.ld_state + j] = {0};
    });
    block_.each(plan_.norm, [&](int j) {
      const int64_t at = z ? norm_at(head, j) : -1;
      running_[j] = at < 0 ? S(0) : z[at];
      running_[plan_.norm + j] = 0;
    });
    if (role == kGradQ && args_.grad_freq)
      block_.each(int(smaller(plan_.outer / map_.stride(), args_.W - pair_) * args_.L), [&](int e) {
        args_.grad_freq[(head_.index * args_.W + pair_) * args_.L + e] = 0;
      });
  }

  FASTPE_DEVICE void put_state() {
    if (role == kForward && !head_.owner()) return;
    const int64_t head = role == kForward ? head_.state() : head_.index;
    S *s = as<S>(role == kForward ? args_.s : role == kGradV ? args_.grad_s0 : nullptr);
    S *z = as<S>(role == kForward ? args_.z : role == kGradK ? args_.grad_z0 : nullptr);
    if (s)
      block_.each(plan_.inner, plan_.outer, [&](int i, int j) {
        const int64_t at = state_at(head, i, j);
        if (at >= 0) s[at] = state_[i * plan_.ld_state + j];
      });
    if (z && (role == kGradK || slice_ == 0))
      block_.each(plan_.norm, [&](int j) {
        const int64_t at = norm_at(head, j);
        if (at >= 0) z[at] = running_[j];
      });
  }
};

}  // namespace
}  // namespace fastpe
