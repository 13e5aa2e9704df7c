// Causal linear attention of a few heads of one sequence: one scan in its roles.
//
// With a, b [., inner] and c [., outer] a scan computes o_t = sum_{s<=t} (a_t . b_s) c_s + a_t S_0,
// chunk by chunk: causally masked inside a chunk, through the state S = sum b_s (x) c_s before it.
// Its derivative is three more scans:
//
//     role      a    b    c      tokens       after it
//     forward   phi  psi  v      in order     divide by the normaliser
//     grad_q    g    v    psi    in order     turn back, slope of the feature map
//     grad_k    v    g    phi    backwards    the same
//     grad_v    psi  phi  g      backwards    (together with grad_k: its state is the transpose)
//
// phi and psi are the features of q and k, g = grad_o / normaliser. The heads of a token lie side by
// side in memory, so the heads take turns chunk by chunk, and each page is visited once.
#pragma once
#include "features.h"
#include "gemm.h"
#include "scan_head.h"

namespace fastpe {
namespace {

enum Role { kForward, kGradQ, kGradKV };

template <class S>
class Scan {
 public:
  // heads that take turns: their states should stay in the second-level cache
  static int64_t heads_at_once(const FastpeCausalDot &args) {
    const int64_t features = args.pool ? args.W : args.D;
    const int64_t each = 2 * larger<int64_t>(features * args.E, 1) * int64_t(sizeof(S));
    const int64_t fit = (int64_t(512) << 10) / each;
    const int64_t share = (args.S * args.H + args.threads - 1) / larger<int64_t>(args.threads, 1);
    return larger<int64_t>(1, smaller(smaller<int64_t>(kHeads, fit), smaller(share, args.H)));
  }

  explicit Scan(const FastpeCausalDot &args)
      : args_(args),
        map_(args),
        at_once_(heads_at_once(args)),
        chunk_(smaller<int64_t>(args.chunk > 0 ? smaller<int64_t>(args.chunk, kLargestChunk)
                                               : kDefaultChunk,
                                larger<int64_t>(args.T, 1))),
        features_(map_.width()),
        ld_(padded<S>(larger(larger(args.D, args.E), features_))),
        lc_(padded<S>(chunk_)),
        a_(lc_ * ld_),
        b_(lc_ * ld_),
        b_transposed_(ld_ * lc_),
        c_(lc_ * ld_),
        weights_(lc_ * lc_),
        out_(lc_ * ld_),
        psi_(args.grad_o.data ? lc_ * ld_ : 1),
        c_transposed_(args.grad_o.data ? ld_ * lc_ : 1),
        state_transposed_(args.grad_o.data ? state_size() : 1),
        // a range may be empty, which is no step
        states_(stepping(args.T) && !args.ranges && args.Hs == args.H ? 1
                                                                      : 2 * at_once_ * state_size()),
        norm_a_(map_.split() ? lc_ * ld_ : 1),
        norm_b_(map_.split() ? lc_ * ld_ : 1),
        rotation_(map_.rotates() ? 2 * chunk_ * ld_ : 1),
        sums_(2 * at_once_ * ld_),
        row_(5 * ld_),
        by_token_(args.grad_o.data ? 2 * at_once_ * args.T : 1),
        grad_freq_(larger<int64_t>(at_once_ * args.W * args.L, 1)) {}

  // heads [begin, end) of sequence s, at most heads_at_once
  void forward(int64_t s, int64_t begin, int64_t end) {
    enter(s, begin, end);
    if (stepping(length_))
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
    const Sequence sequence(args_, s);
    batch_ = sequence.row, first_ = sequence.first, length_ = sequence.length;
    count_ = end - begin;
    for (int64_t i = 0; i < count_; ++i) {
      Head &x = heads_[i];
      x.enter(args_, sequence, begin + i);
      x.state = states_ + 2 * i * state_size(), x.lost = x.state + state_size();
      x.running = sums_ + 2 * i * ld_, x.compensation = x.running + ld_;
      x.inverse = by_token_ + 2 * i * args_.T, x.delta = x.inverse + args_.T;
      x.grad_freq = grad_freq_ + i * args_.W * args_.L;
    }
    memset((void *)(double *)grad_freq_, 0, sizeof(double) * size_t(count_ * args_.W * args_.L));
  }

  // one token after a state: no tiles are needed
  bool stepping(int64_t length) const { return length == 1 && args_.s0 && !args_.grad_o.data; }
  // [R, padded E] or [E, padded R], and a whole number of rows to transpose it by
  int64_t state_size() const { return padded<S>(features_) * padded<S>(args_.E); }
  bool normalizes() const { return args_.normalize != FASTPE_NORM_NONE; }
  int64_t norm_width() const { return map_.split() ? args_.D : features_; }

  // what the weights are divided by, and its sign (0 where it is clamped)
  S divisor(S den, S *sign) const {
    if (args_.normalize == FASTPE_NORM_SUM) return *sign = 1, den + S(args_.eps);
    S size = den < 0 ? -den : den;
    *sign = size < S(args_.eps) ? S(0) : den < 0 ? S(-1) : S(1);
    return larger(size, S(args_.eps));
  }

  // inverse[t] = 1 / divisor, delta[t] = d loss / d den
  void prepare_gradient(const Head &x, int64_t t) {
    x.inverse[t] = 1, x.delta[t] = 0;
    if (!normalizes()) return;
    S sign, den = ((const S *)args_.den)[x.first + t];
    x.inverse[t] = 1 / divisor(den, &sign);
    const S *g = x.grad_o.get(t, row_), *o = x.o.get(t, row_ + ld_);
    x.delta[t] = -sign * dot(g, o, args_.E) * x.inverse[t];
  }

  static S dot(const S *x, const S *y, int64_t width) {
    Vec<S> total = {};
    for (int64_t j = 0; j < width; j += kLanes<S>) total += load(x + j) * load(y + j);
    return sum<S>(total);
  }

  template <Role role>
  void run() {
    constexpr bool back = role == kGradKV;
    const int64_t inner = role == kForward ? features_ : args_.E;
    const int64_t outer = role == kForward ? args_.E : features_;
    for (int64_t i = 0; i < count_; ++i)
      get_state(heads_[i], back ? args_.grad_s : args_.s0, back ? args_.grad_z : args_.z0,
                !back || heads_[i].owner, inner, outer, role != kForward);

    for (int64_t first = 0; first < length_; first += chunk_) {
      const int64_t n = smaller(chunk_, length_ - first);
      begin_ = back ? length_ - 1 - first : first;
      step_ = back ? -1 : 1;
      for (int64_t i = 0; i < count_; ++i) {
        if (map_.rotates() && (i == 0 || args_.Hf > 1))
          map_.prepare(batch_, heads_[i].h, first_ + begin_, step_, n, rotation_, ld_);
        load_tiles<role>(heads_[i], n);
        // what is read next is fetched meanwhile
        const bool last = i + 1 == count_;
        const int64_t ahead = last ? first + chunk_ : first;
        auto fetch = [&](int64_t j) { prefetch<role>(heads_[last ? 0 : i + 1], ahead + j); };
        transpose<S>(b_, ld_, padded<S>(n), padded<S>(inner), b_transposed_, lc_);
        if (role == kGradKV) grad_v(heads_[i], n);
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
      if (role == kGradKV)
        put_state(heads_[i], args_.grad_s0, args_.grad_z0, heads_[i].index, true);
    }
  }

  template <Role role>
  void prefetch(const Head &head, int64_t i) const {
    if (i >= length_) return;
    const int64_t t = role == kGradKV ? length_ - 1 - i : i;
    if (role != kGradQ) head.q.prefetch(t);
    head.k.prefetch(t), head.v.prefetch(t);
    if (role != kForward) head.grad_o.prefetch(t);
    if (role == kGradQ) head.o.prefetch(t);
  }

  // out [n, columns] = tril(scores) c + a state, state [depth, columns]
  template <class Fetch>
  void multiply_tiles(const Product<S> &scores, const S *c, const S *state, int64_t n,
                      int64_t columns, S *out, Fetch fetch) {
    for (int64_t i = 0; i < n; i += kTileRows) {
      const int64_t count = smaller<int64_t>(kTileRows, n - i);
      S *weights = weights_ + i * lc_;
      few_rows<S>(count, &scores, 1, i, 0, padded<S>(i + count), {weights, lc_});
      // inside the chunk, and through the state before it
      const Product<S> terms[] = {{i, weights, lc_, 1, c, ld_, true},
                                  {scores.depth, scores.a + i * ld_, ld_, 1, state, columns}};
      few_rows<S>(count, terms, 2, 0, 0, columns, {out + i * ld_, ld_});
      for (int64_t r = 0; r < count; ++r) fetch(i + r);
    }
  }

  // in the tiles of grad_k, b is the c and c the b of grad_v, and its state is the transpose
  void grad_v(const Head &head, int64_t n) {
    if (!head.grad_v) return;
    const int64_t e = padded<S>(args_.E), r = padded<S>(features_);
    transpose<S>(head.state, r, e, r, state_transposed_, e);
    transpose<S>(c_, ld_, padded<S>(n), padded<S>(features_), c_transposed_, lc_);
    const Product<S> scores = {features_, psi_, ld_, 1, c_transposed_, lc_};
    multiply_tiles(scores, b_, state_transposed_, n, padded<S>(args_.E), out_, [](int64_t) {});
    for (int64_t i = 0; i < n; ++i) head.grad_v.put(begin_ + i * step_, out_ + i * ld_);
  }

  template <Role role>
  void load_tiles(const Head &head, int64_t n) {
    S *norm_a = map_.split() && normalizes() ? norm_a_ : (S *)nullptr;
    S *norm_b = map_.split() && normalizes() ? norm_b_ : (S *)nullptr;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = begin_ + i * step_, at = i * ld_;
      const S *turn = rotation_ + 2 * at;
      // by the first of the two sweeps back
      if (role == kGradQ || (role == kGradKV && !prepared_)) prepare_gradient(head, t);
      auto feature = [&](const Rows<S> &x, S *out, S *norm) {
        map_.value(x.get(t, row_), turn, ld_, out + at, norm ? norm + at : nullptr, row_ + ld_);
      };
      if (role == kForward) {
        feature(head.q, a_, norm_a), feature(head.k, b_, norm_b);
        copy(head.v, t, 1, c_ + at);
      } else if (role == kGradQ) {
        copy(head.grad_o, t, head.inverse[t], a_ + at), copy(head.v, t, 1, b_ + at);
        feature(head.k, c_, norm_b);
      } else {
        copy(head.v, t, 1, a_ + at), copy(head.grad_o, t, head.inverse[t], b_ + at);
        feature(head.q, c_, norm_b);
        // psi(k) serves for its slope too
        feature(head.k, psi_, map_.split() ? norm_a_ : (S *)nullptr);
      }
    }
    // what a shorter chunk leaves behind must not reach the transposed tiles
    for (int64_t i = n; i < padded<S>(n); ++i)
      for (int64_t j = 0; j < ld_; ++j) b_[i * ld_ + j] = c_[i * ld_ + j] = 0;
  }

  void copy(const Rows<S> &x, int64_t t, S factor, S *out) {
    const S *row = x.get(t, row_);
    for (int64_t j = 0; j < x.width; j += kLanes<S>) store(out + j, load(row + j) * factor);
  }

  // one token after a state: read it once, write it once
  void step(const Head &head) {
    begin_ = 0, step_ = 1;
    if (map_.rotates()) map_.prepare(batch_, head.h, first_, 1, 1, rotation_, ld_);
    load_tiles<kForward>(head, 1);
    const int64_t e = args_.E, size = features_ * e;
    const S *s0 = (const S *)args_.s0 + head.state_index * size;
    // the others of its group make the same
    S *s = head.owner ? (S *)args_.s + head.state_index * size : (S *)states_;
    const int64_t width = normalizes() ? norm_width() : 0, numbers = size + width;
    const S *lost0 = args_.lost0 ? (const S *)args_.lost0 + head.state_index * numbers : nullptr;
    S *lost = !args_.lost ? nullptr
              : head.owner ? (S *)args_.lost + head.state_index * numbers
                           : (S *)states_ + state_size();
    if (lost)
      step_state<true>(s0, s, lost0, lost);
    else
      step_state<false>(s0, s, lost0, lost);
    if (width) {
      const S *z0 = (const S *)args_.z0 + head.state_index * width;
      memset((void *)head.running, 0, sizeof(S) * size_t(2 * ld_));
      memcpy(head.running, z0, sizeof(S) * size_t(width));
      if (lost0) memcpy(head.compensation, lost0 + size, sizeof(S) * size_t(width));
    }
    finish<kForward>(head, 1);
    if (!width || !head.owner) return;
    memcpy((S *)args_.z + head.state_index * width, head.running, sizeof(S) * size_t(width));
    if (lost) memcpy(lost + size, head.compensation, sizeof(S) * size_t(width));
  }

  // the state [R, E] after the token, and the output before it is divided
  template <bool kKeep>
  void step_state(const S *s0, S *s, const S *lost0, S *lost) {
    const int64_t e = args_.E;
    int64_t j = 0;
    for (; j + 4 * kLanes<S> <= e; j += 4 * kLanes<S>)
      step_columns<4, kKeep>(s0 + j, s + j, lost0 + (kKeep ? j : 0), lost + (kKeep ? j : 0), j);
    for (; j + kLanes<S> <= e; j += kLanes<S>)
      step_columns<1, kKeep>(s0 + j, s + j, lost0 + (kKeep ? j : 0), lost + (kKeep ? j : 0), j);
    for (; j < e; ++j) {
      out_[j] = 0;
      for (int64_t r = 0; r < features_; ++r) {
        const int64_t at = r * e + j;
        S add = b_[r] * c_[j];
        if constexpr (kKeep) add += lost0[at];
        const S now = s0[at] + add;
        if constexpr (kKeep) lost[at] = add - (now - s0[at]);
        s[at] = now;
        out_[j] += a_[r] * now;
      }
    }
  }

  // of the state, kVectors vectors of each row, the first of them at column j
  template <int kVectors, bool kKeep>
  void step_columns(const S *s0, S *s, const S *lost0, S *lost, int64_t j) {
    Vec<S> value[kVectors], total[kVectors];
    for (int i = 0; i < kVectors; ++i) value[i] = load(c_ + j + i * kLanes<S>), total[i] = Vec<S>{};
    for (int64_t r = 0; r < features_; ++r)
      for (int i = 0; i < kVectors; ++i) {
        const int64_t at = r * args_.E + i * kLanes<S>;
        const Vec<S> before = load(s0 + at);
        Vec<S> add = value[i] * b_[r];
        if constexpr (kKeep) add += load(lost0 + at);
        const Vec<S> now = before + add;
        if constexpr (kKeep) store(lost + at, add - (now - before));
        store(s + at, now);
        total[i] += now * a_[r];
      }
    for (int i = 0; i < kVectors; ++i) store(out_ + j + i * kLanes<S>, total[i]);
  }

  // sums [n] of the normaliser's features up to each token, in place; the running sum goes on
  void accumulate_norm(const Head &head, int64_t n, S *features, const S *weight) const {
    const S *first = weight ? weight + begin_ : nullptr;
    int64_t j = 0;
    for (; j + 4 * kLanes<S> <= norm_width(); j += 4 * kLanes<S>)
      running_sums<S, 4>(features + j, ld_, n, first, step_, head.running + j, head.compensation + j);
    for (; j < norm_width(); j += kLanes<S>)
      running_sums<S, 1>(features + j, ld_, n, first, step_, head.running + j, head.compensation + j);
  }

  template <Role role>
  void finish(const Head &head, int64_t n) {
    S *norm = map_.split() ? norm_b_ : role == kForward ? b_ : c_;
    if (normalizes()) accumulate_norm(head, n, norm, role == kGradKV ? head.delta : nullptr);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = begin_ + i * step_, at = i * ld_;
      S *out = out_ + at;
      if (role == kForward) {
        if (normalizes()) {
          S sign, den = dot((map_.split() ? norm_a_ : a_) + at, norm + at, norm_width());
          S inverse = 1 / divisor(den, &sign);
          if (args_.den) ((S *)args_.den)[head.first + t] = den;
          for (int64_t j = 0; j < args_.E; j += kLanes<S>)
            store(out + j, load(out + j) * inverse);
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

  // turn_gradient [W]: by the angles, in radians
  void add_positional(const Head &head, int64_t t, const S *turn_gradient, bool add) {
    const double *p = map_.position(batch_, first_ + t), *freq = map_.freq(head.h);
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

  // the state [rows, padded columns] from a contiguous [rows, columns] or its transpose, and the
  // running sum; zero from null, or where it is not this head's
  void get_state(const Head &head, const void *s, const void *z, bool wanted, int64_t rows,
                 int64_t columns, bool transposed) {
    const int64_t ld = padded<S>(columns);
    memset((void *)head.state, 0, sizeof(S) * size_t(2 * state_size()));
    memset((void *)head.running, 0, sizeof(S) * size_t(2 * ld_));
    if (!wanted) return;
    const S *x = (const S *)s + head.state_index * rows * columns;
    for (int64_t i = 0; s && i < rows; ++i) {
      if (!transposed) memcpy(head.state + i * ld, x + i * columns, sizeof(S) * size_t(columns));
      for (int64_t j = 0; transposed && j < columns; ++j) head.state[i * ld + j] = x[j * rows + i];
    }
    if (!z || !normalizes()) return;
    const int64_t width = norm_width();
    memcpy(head.running, (const S *)z + head.state_index * width, sizeof(S) * size_t(width));
  }
  // to a contiguous [R, E], transposed if the state is [E, R]
  void put_state(const Head &head, void *s, void *z, int64_t index, bool transposed) {
    const int64_t width = norm_width(), e = args_.E;
    const int64_t ld = padded<S>(transposed ? features_ : e);
    S *out = (S *)s + index * features_ * e;
    for (int64_t i = 0; s && i < features_; ++i) {
      if (!transposed) memcpy(out + i * e, head.state + i * ld, sizeof(S) * size_t(e));
      for (int64_t j = 0; transposed && j < e; ++j) out[i * e + j] = head.state[j * ld + i];
    }
    if (z) memcpy((S *)z + index * width, head.running, sizeof(S) * size_t(width));
  }

  const FastpeCausalDot &args_;
  FeatureMap<S> map_;
  const int64_t at_once_, chunk_, features_, ld_, lc_;
  Scratch<S> a_, b_, b_transposed_, c_, weights_, out_, psi_, c_transposed_, state_transposed_;
  Scratch<S> states_, norm_a_, norm_b_;
  Scratch<S> rotation_, sums_, row_, by_token_;
  Scratch<double> grad_freq_;
  Head heads_[kHeads];
  // of the sequence: its batch row, first token, length; of the chunk: its first token, direction
  int64_t batch_ = 0, first_ = 0, length_ = 0, count_ = 0, begin_ = 0, step_ = 1;
  bool prepared_ = false;
};

}  // namespace
}  // namespace fastpe
