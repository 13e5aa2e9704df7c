// Causal linear attention of a few heads of one sequence, and its gradient.
//
// From a, b [., inner] and c [., outer] a scan computes o_t = sum_{s<=t} (a_t . b_s) c_s + a_t S_0.
// It goes chunk by chunk: a masked product covers the tokens inside a chunk, and the state
// S = sum b_s (x) c_s those before it. The same scan computes the output and three gradients:
//
//     role      a    b    c      tokens       after it
//     forward   phi  psi  v      in order     divide by the normaliser
//     grad_q    g    v    psi    in order     turn back, slope of the feature map
//     grad_k    v    g    phi    backwards    the same
//     grad_v    psi  phi  g      backwards    (together with grad_k: its state is the transpose)
//
// phi and psi are the features of q and k, g = grad_o / normaliser. Memory holds all heads of a
// token together, so heads take turns after each chunk, and the scan visits each page once.
#pragma once
#include "features.h"
#include "gemm.h"
#include "scan_head.h"
#include "step.h"

namespace fastpe {
namespace {

enum Role { kForward, kGradQ, kGradKV };

template <class S> class Scan {
 public:
  // the number of heads that take turns: their states should fit the second-level cache
  static int64_t heads_at_once(const FastpeCausalDot &args) {
    const int64_t features = args.pool ? args.W : args.D;
    const int64_t each = 2 * larger(features * args.E, 1) * int64_t(sizeof(S));
    const int64_t fit = (int64_t(512) << 10) / each;
    const int64_t share = (args.S * args.H + args.threads - 1) / larger(args.threads, 1);
    return larger(1, smaller(smaller(kHeads, fit), smaller(share, args.H)));
  }

  explicit Scan(const FastpeCausalDot &args)
      : args_(args), map_(args), at_once_(heads_at_once(args)),
        chunk_(smaller(args.chunk > 0 ? smaller(args.chunk, kLargestChunk) : kDefaultChunk,
                       larger(args.T, 1))),
        features_(map_.width()), ld_(padded<S>(larger(larger(args.D, args.E), features_))),
        lc_(padded<S>(chunk_)), a_(lc_ * ld_), b_(lc_ * ld_), b_transposed_(ld_ * lc_),
        c_(lc_ * ld_), weights_(lc_ * lc_), out_(lc_ * ld_), psi_(args.grad_o.data ? lc_ * ld_ : 1),
        c_transposed_(args.grad_o.data ? ld_ * lc_ : 1),
        state_transposed_(args.grad_o.data ? state_size() : 1),
        // a step needs these only if heads share a state; with ranges a sequence may also be empty
        states_(stepping(args.T) && !args.ranges && args.Hs == args.H
                    ? 1
                    : 2 * at_once_ * state_size()),
        norm_a_(map_.split() ? lc_ * ld_ : 1), norm_b_(map_.split() ? lc_ * ld_ : 1),
        rotation_(map_.rotates() ? 2 * chunk_ * ld_ : 1), sums_(2 * at_once_ * ld_), row_(5 * ld_),
        by_token_(args.grad_o.data ? 2 * at_once_ * args.T : 1),
        grad_freq_(larger(at_once_ * args.W * args.L, 1)) {}

  // heads [begin, end) of sequence s, at most heads_at_once
  void forward(int64_t s, int64_t begin, int64_t end) {
    enter(s, begin, end);
    if (stepping(sequence_.length))
      for (int64_t i = 0; i < count_; ++i) step(heads_[i]);
    else
      run<kForward>();
  }

  void backward(int64_t s, int64_t begin, int64_t end) {
    enter(s, begin, end);
    bool positional = args_.grad_freq || args_.grad_positions;
    prepared_ = args_.grad_q.data || positional;
    if (prepared_) run<kGradQ>();
    if (args_.grad_k.data || args_.grad_v.data || args_.grad_s0 || args_.grad_z0 || positional)
      run<kGradKV>();
    if (!args_.grad_freq) return;
    const int64_t n = args_.W * args_.L;
    for (int64_t i = 0; i < count_ * n; ++i)
      args_.grad_freq[heads_[0].index * n + i] = kTwoPi * grad_freq_[i];
  }

 private:
  static constexpr int64_t kDefaultChunk = 32, kLargestChunk = 512;  // its weights are a square
  static constexpr int64_t kHeads = 8;

  using Head = ScanHead<S>;

  void enter(int64_t s, int64_t begin, int64_t end) {
    sequence_ = sequence_of(args_, s);
    count_ = end - begin;
    for (int64_t i = 0; i < count_; ++i) {
      Head &x = heads_[i];
      x.enter(args_, sequence_, begin + i);
      x.state = states_ + 2 * i * state_size();
      x.lost = x.state + state_size();
      x.running = sums_ + 2 * i * ld_;
      x.compensation = x.running + ld_;
      x.inverse = by_token_ + 2 * i * args_.T;
      x.delta = x.inverse + args_.T;
      x.grad_freq = grad_freq_ + i * args_.W * args_.L;
    }
    zero<double>(grad_freq_, count_ * args_.W * args_.L);
  }

  // one token after a state needs no tiles
  bool stepping(int64_t length) const { return length == 1 && args_.s0 && !args_.grad_o.data; }
  // room for [R, padded E] or [E, padded R], padded so that whole vectors can be transposed
  int64_t state_size() const { return padded<S>(features_) * padded<S>(args_.E); }
  bool normalizes() const { return args_.normalize != FASTPE_NORM_NONE; }
  int64_t norm_width() const { return map_.split() ? args_.D : features_; }

  // inverse[t] = 1 / divisor, delta[t] = d loss / d den
  void prepare_gradient(const Head &x, int64_t t) {
    x.inverse[t] = 1;
    x.delta[t] = 0;
    if (!normalizes()) return;
    S sign, den = as<const S>(args_.den)[x.first + t];
    x.inverse[t] = 1 / divisor(args_, den, sign);
    const S *g = x.grad_o.get(t, row_), *o = x.o.get(t, row_ + ld_);
    x.delta[t] = -sign * dot(g, o, args_.E) * x.inverse[t];
  }

  template <Role role> void run() {
    constexpr bool back = role == kGradKV;
    const int64_t inner = role == kForward ? features_ : args_.E;
    const int64_t outer = role == kForward ? args_.E : features_;
    for (int64_t i = 0; i < count_; ++i)
      get_state(heads_[i], back ? args_.grad_s : args_.s0, back ? args_.grad_z : args_.z0,
                !back || heads_[i].owner, inner, outer, role != kForward);

    for (int64_t first = 0; first < sequence_.length; first += chunk_) {
      const int64_t n = smaller(chunk_, sequence_.length - first);
      begin_ = back ? sequence_.length - 1 - first : first;
      step_ = back ? -1 : 1;
      for (int64_t i = 0; i < count_; ++i) {
        if (map_.rotates() && (i == 0 || args_.Hf > 1))
          map_.prepare(sequence_.row, heads_[i].h, sequence_.first + begin_, step_, n, rotation_,
                       ld_);
        load_tiles<role>(heads_[i], n);
        // the products fetch the rows that are read next
        const bool last = i + 1 == count_;
        const int64_t ahead = last ? first + chunk_ : first;
        auto fetch = [&](int64_t j) { prefetch<role>(heads_[last ? 0 : i + 1], ahead + j); };
        transpose<S>(b_, ld_, padded<S>(n), padded<S>(inner), b_transposed_, lc_);
        if constexpr (role == kGradKV) grad_v(heads_[i], n);
        const Product<S> scores = {inner, a_, ld_, 1, b_transposed_, lc_};
        multiply_tiles(scores, c_, heads_[i].state, n, padded<S>(outer), out_, fetch);
        Product<S> update = {n, b_transposed_, lc_, 1, c_, ld_};
        multiply<S>(inner, padded<S>(outer), &update, 1,
                    {heads_[i].state, padded<S>(outer), true, heads_[i].lost});
        finish<role>(heads_[i], n);
      }
    }
    for (int64_t i = 0; i < count_; ++i) {
      if (role == kForward && heads_[i].owner)
        put_state(heads_[i], args_.s, args_.z, heads_[i].state_index, false);
      if constexpr (role == kGradKV)
        put_state(heads_[i], args_.grad_s0, args_.grad_z0, heads_[i].index, true);
    }
  }

  template <Role role> void prefetch(const Head &head, int64_t i) const {
    if (i >= sequence_.length) return;
    const int64_t t = role == kGradKV ? sequence_.length - 1 - i : i;
    if constexpr (role != kGradQ) head.q.prefetch(t);
    head.k.prefetch(t);
    head.v.prefetch(t);
    if constexpr (role != kForward) head.grad_o.prefetch(t);
    if constexpr (role == kGradQ) head.o.prefetch(t);
  }

  // out [n, columns] = tril(scores) c + a state, with state [depth, columns]
  template <class Fetch>
  void multiply_tiles(const Product<S> &scores, const S *c, const S *state, int64_t n,
                      int64_t columns, S *out, Fetch fetch) {
    for (int64_t i = 0; i < n; i += kTileRows) {
      const int64_t count = smaller(kTileRows, n - i);
      S *weights = weights_ + i * lc_;
      few_rows<S>(count, &scores, 1, i, 0, padded<S>(i + count), {weights, lc_});
      // inside the chunk, and through the state before it
      const Product<S> terms[] = {{i, weights, lc_, 1, c, ld_, true},
                                  {scores.depth, scores.a + i * ld_, ld_, 1, state, columns}};
      few_rows<S>(count, terms, 2, 0, 0, columns, {out + i * ld_, ld_});
      for (int64_t r = 0; r < count; ++r) fetch(i + r);
    }
  }

  // grad_v from the tiles of grad_k: b and c change places, and the state is transposed
  void grad_v(const Head &head, int64_t n) {
    if (!head.grad_v) return;
    const int64_t e = padded<S>(args_.E), r = padded<S>(features_);
    transpose<S>(head.state, r, e, r, state_transposed_, e);
    transpose<S>(c_, ld_, padded<S>(n), padded<S>(features_), c_transposed_, lc_);
    const Product<S> scores = {features_, psi_, ld_, 1, c_transposed_, lc_};
    multiply_tiles(scores, b_, state_transposed_, n, padded<S>(args_.E), out_, [](int64_t) {});
    for (int64_t i = 0; i < n; ++i) head.grad_v.put(begin_ + i * step_, out_ + i * ld_);
  }

  template <Role role> void load_tiles(const Head &head, int64_t n) {
    const bool split = map_.split() && normalizes();
    S *norm_a = split ? norm_a_.get() : nullptr, *norm_b = split ? norm_b_.get() : nullptr;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = begin_ + i * step_, at = i * ld_;
      const S *turn = rotation_ + 2 * at;
      // the first of the two sweeps of the gradient does this
      if (role == kGradQ || (role == kGradKV && !prepared_)) prepare_gradient(head, t);
      auto feature = [&](const Rows<S> &x, S *out, S *norm) {
        map_.value(x.get(t, row_), turn, ld_, out + at, norm ? norm + at : nullptr, row_ + ld_);
      };
      if constexpr (role == kForward) {
        feature(head.q, a_, norm_a);
        feature(head.k, b_, norm_b);
        copy(head.v, t, 1, c_ + at);
      } else if constexpr (role == kGradQ) {
        copy(head.grad_o, t, head.inverse[t], a_ + at);
        copy(head.v, t, 1, b_ + at);
        feature(head.k, c_, norm_b);
      } else {
        copy(head.v, t, 1, a_ + at);
        copy(head.grad_o, t, head.inverse[t], b_ + at);
        feature(head.q, c_, norm_b);
        // finish() takes psi(k) for the slope
        feature(head.k, psi_, map_.split() ? norm_a_.get() : nullptr);
      }
    }
    // a shorter chunk clears old rows, which would reach the transposed tiles
    for (int64_t i = n; i < padded<S>(n); ++i)
      for (int64_t j = 0; j < ld_; ++j) b_[i * ld_ + j] = c_[i * ld_ + j] = 0;
  }

  void copy(const Rows<S> &x, int64_t t, S factor, S *out) {
    const S *row = x.get(t, row_);
    for (int64_t j = 0; j < x.width; j += kLanes<S>) store(out + j, load(row + j) * factor);
  }

  // one token after a state: each number of the state is read and written once
  void step(const Head &head) {
    begin_ = 0;
    step_ = 1;
    if (map_.rotates()) map_.prepare(sequence_.row, head.h, sequence_.first, 1, 1, rotation_, ld_);
    load_tiles<kForward>(head, 1);
    const int64_t e = args_.E, size = features_ * e;
    const S *s0 = as<const S>(args_.s0) + head.state_index * size;
    // the owner writes the state that the heads share, the others theirs to scratch
    S *s = head.owner ? as<S>(args_.s) + head.state_index * size : states_;
    const int64_t width = normalizes() ? norm_width() : 0, numbers = size + width;
    const S *lost0 = args_.lost0 ? as<const S>(args_.lost0) + head.state_index * numbers : nullptr;
    S *lost = !args_.lost  ? nullptr
              : head.owner ? as<S>(args_.lost) + head.state_index * numbers
                           : states_ + state_size();
    if (lost)
      StateStep<S, true>{a_, b_, c_, features_, e, s0, s, lost0, lost, out_}.run();
    else
      StateStep<S, false>{a_, b_, c_, features_, e, s0, s, lost0, lost, out_}.run();
    if (width) {
      const S *z0 = as<const S>(args_.z0) + head.state_index * width;
      zero(head.running, 2 * ld_);
      copy_n(head.running, z0, width);
      if (lost0) copy_n(head.compensation, lost0 + size, width);
    }
    finish<kForward>(head, 1);
    if (!width || !head.owner) return;
    copy_n(as<S>(args_.z) + head.state_index * width, head.running, width);
    if (lost) copy_n(lost + size, head.compensation, width);
  }

  // replace the normaliser's features [n] by running sums, which the next chunk continues
  void accumulate_norm(const Head &head, int64_t n, S *features, const S *weight) const {
    const S *first = weight ? weight + begin_ : nullptr;
    int64_t j = 0;
    for (; j + 4 * kLanes<S> <= norm_width(); j += 4 * kLanes<S>)
      running_sums<S, 4>(features + j, ld_, n, first, step_, head.running + j,
                         head.compensation + j);
    for (; j < norm_width(); j += kLanes<S>)
      running_sums<S, 1>(features + j, ld_, n, first, step_, head.running + j,
                         head.compensation + j);
  }

  template <Role role> void finish(const Head &head, int64_t n) {
    S *norm = map_.split() ? norm_b_ : role == kForward ? b_ : c_;
    if (normalizes()) accumulate_norm(head, n, norm, role == kGradKV ? head.delta : nullptr);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = begin_ + i * step_, at = i * ld_;
      S *out = out_ + at;
      if constexpr (role == kForward) {
        if (normalizes()) {
          S sign, den = dot((map_.split() ? norm_a_ : a_) + at, norm + at, norm_width());
          S inverse = 1 / divisor(args_, den, sign);
          if (args_.den) as<S>(args_.den)[head.first + t] = den;
          for (int64_t j = 0; j < args_.E; j += kLanes<S>) store(out + j, load(out + j) * inverse);
        }
        head.o.put(t, out);
      } else {
        const Rows<S> &x = role == kGradQ ? head.q : head.k;
        const Rows<S> &grad = role == kGradQ ? head.grad_q : head.grad_k;
        const bool positional = args_.grad_freq || args_.grad_positions;
        S *turn_gradient = positional ? row_ + 4 * ld_ : nullptr;
        const S *known = nullptr;
        if (role == kGradKV && map_.content_known()) known = (map_.split() ? norm_a_ : psi_) + at;
        map_.gradient(x.get(t, row_), known, rotation_ + 2 * at, ld_, out,
                      normalizes() ? norm + at : nullptr, role == kGradQ ? head.delta[t] : S(1),
                      row_ + ld_, turn_gradient);
        if (turn_gradient) add_positional(head, t, turn_gradient, role == kGradKV);
        if (grad) grad.put(t, out);
      }
    }
  }

  // add to the gradients of freq and positions; turn_gradient [W] is by the angles, in radians
  void add_positional(const Head &head, int64_t t, const S *turn_gradient, bool add) {
    const double *p = map_.position(sequence_.row, sequence_.first + t), *freq = map_.freq(head.h);
    double *by_position =
        args_.grad_positions ? args_.grad_positions + (head.first + t) * args_.L : nullptr;
    for (int64_t l = 0; l < args_.L; ++l) {
      double total = 0;
      for (int64_t w = 0; w < args_.W; ++w) {
        head.grad_freq[w * args_.L + l] += double(turn_gradient[w]) * p[l];
        total += double(turn_gradient[w]) * freq[w * args_.L + l];
      }
      if (by_position) by_position[l] = (add ? by_position[l] : 0) + kTwoPi * total;
    }
  }

  // Read the state [rows, padded columns] from a contiguous [rows, columns] or its transpose, and
  // the running sum. Both are zero if null, or if not wanted.
  void get_state(const Head &head, const void *s, const void *z, bool wanted, int64_t rows,
                 int64_t columns, bool transposed) {
    const int64_t ld = padded<S>(columns);
    zero(head.state, 2 * state_size());
    zero(head.running, 2 * ld_);
    if (!wanted) return;
    const S *x = as<const S>(s) + head.state_index * rows * columns;
    for (int64_t i = 0; s && i < rows; ++i) {
      if (!transposed) copy_n(head.state + i * ld, x + i * columns, columns);
      for (int64_t j = 0; transposed && j < columns; ++j) head.state[i * ld + j] = x[j * rows + i];
    }
    if (!z || !normalizes()) return;
    const int64_t width = norm_width();
    copy_n(head.running, as<const S>(z) + head.state_index * width, width);
  }
  // write the state to a contiguous [R, E], transposed if it is [E, R]
  void put_state(const Head &head, void *s, void *z, int64_t index, bool transposed) {
    const int64_t width = norm_width(), e = args_.E;
    const int64_t ld = padded<S>(transposed ? features_ : e);
    S *out = as<S>(s) + index * features_ * e;
    for (int64_t i = 0; s && i < features_; ++i) {
      if (!transposed) copy_n(out + i * e, head.state + i * ld, e);
      for (int64_t j = 0; transposed && j < e; ++j) out[i * e + j] = head.state[j * ld + i];
    }
    if (z) copy_n(as<S>(z) + index * width, head.running, width);
  }

  const FastpeCausalDot &args_;
  FeatureMap<S> map_;
  const int64_t at_once_, chunk_, features_, ld_, lc_;
  Scratch<S> a_, b_, b_transposed_, c_, weights_, out_, psi_, c_transposed_, state_transposed_;
  Scratch<S> states_, norm_a_, norm_b_;
  Scratch<S> rotation_, sums_, row_, by_token_;
  Scratch<double> grad_freq_;
  Head heads_[kHeads];
  Sequence sequence_ = {};
  int64_t count_ = 0;             // heads
  int64_t begin_ = 0, step_ = 1;  // first token of the chunk, and direction
  bool prepared_ = false;
};

}  // namespace
}  // namespace fastpe
