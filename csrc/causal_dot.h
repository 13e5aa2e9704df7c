// Causal linear attention of one (b, h): one scan in four roles.
//
// With a, b [., inner] and c [., outer] a scan computes o_t = sum_{s<=t} (a_t . b_s) c_s + a_t S_0,
// chunk by chunk: causally masked inside a chunk, through the state S = sum b_s (x) c_s before it.
// Its derivative is three more scans (T reads tokens backwards):
//
//     role      a    b    c      order    after it
//     forward   phi  psi  v      on       divide by the normaliser
//     grad_q    g    v    psi    on       turn back, slope of the feature map
//     grad_k    v    g    phi    back     the same
//     grad_v    psi  phi  g      back
//
// phi and psi are the features of q and k, g = grad_o / normaliser.
#pragma once
#include "features.h"
#include "gemm.h"

namespace fastpe {
namespace {

enum Role { kForward, kGradQ, kGradK, kGradV };

template <class S>
class Scan {
 public:
  explicit Scan(const FastpeCausalDot &args)
      : args_(args),
        map_(args),
        chunk_(smaller<int64_t>(args.chunk > 0 ? args.chunk : kDefaultChunk,
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
        state_(larger(features_, args.E) * ld_),
        norm_a_(map_.split() ? lc_ * ld_ : 1),
        norm_b_(map_.split() ? lc_ * ld_ : 1),
        rotation_(map_.rotates() ? 2 * chunk_ * ld_ : 1),
        running_(ld_),
        compensation_(ld_),
        row_(5 * ld_),
        inverse_(args.grad_o.data ? args.T : 1),
        delta_(args.grad_o.data ? args.T : 1),
        grad_freq_(larger<int64_t>(args.W * args.L, 1)) {}

  void forward(int64_t b, int64_t h) {
    enter(b, h);
    run<kForward>();
  }

  void backward(int64_t b, int64_t h) {
    enter(b, h);
    prepare_gradient();
    bool positional = args_.grad_freq || args_.grad_positions;
    if (args_.grad_q.data || positional) run<kGradQ>();
    if (args_.grad_k.data || args_.grad_z0 || positional) run<kGradK>();
    if (args_.grad_v.data || args_.grad_s0) run<kGradV>();
    if (args_.grad_freq) {
      int64_t n = args_.W * args_.L;
      for (int64_t i = 0; i < n; ++i) args_.grad_freq[index_ * n + i] = kTwoPi * grad_freq_[i];
    }
  }

 private:
  static constexpr int64_t kDefaultChunk = 32;

  void enter(int64_t b, int64_t h) {
    const int64_t d = args_.D, e = args_.E;
    batch_ = b, head_ = h, index_ = b * args_.H + h;
    q_ = Rows<S>(args_.q, b, h, d), k_ = Rows<S>(args_.k, b, h, d), v_ = Rows<S>(args_.v, b, h, e);
    o_ = Rows<S>(args_.o, b, h, e), grad_o_ = Rows<S>(args_.grad_o, b, h, e);
    grad_q_ = Rows<S>(args_.grad_q, b, h, d), grad_k_ = Rows<S>(args_.grad_k, b, h, d);
    grad_v_ = Rows<S>(args_.grad_v, b, h, e);
    memset((void *)(double *)grad_freq_, 0, sizeof(double) * size_t(args_.W * args_.L));
  }

  bool normalizes() const { return args_.normalize != FASTPE_NORM_NONE; }
  int64_t norm_width() const { return map_.split() ? args_.D : features_; }

  // what the weights are divided by, and its sign (0 where it is clamped)
  S divisor(S den, S *sign) const {
    if (args_.normalize == FASTPE_NORM_SUM) return *sign = 1, den + S(args_.eps);
    S size = den < 0 ? -den : den;
    *sign = size < S(args_.eps) ? S(0) : den < 0 ? S(-1) : S(1);
    return larger(size, S(args_.eps));
  }

  // inverse_[t] = 1 / divisor, delta_[t] = d loss / d den
  void prepare_gradient() {
    const S *den = normalizes() ? (const S *)args_.den + index_ * args_.T : nullptr;
    for (int64_t t = 0; t < args_.T; ++t) {
      inverse_[t] = 1, delta_[t] = 0;
      if (!den) continue;
      S sign;
      inverse_[t] = 1 / divisor(den[t], &sign);
      const S *g = grad_o_.get(t, row_), *o = o_.get(t, row_ + ld_);
      delta_[t] = -sign * dot(g, o, args_.E) * inverse_[t];
    }
  }

  static S dot(const S *x, const S *y, int64_t width) {
    Vec<S> total = {};
    for (int64_t j = 0; j < width; j += kLanes<S>) total += load(x + j) * load(y + j);
    return sum<S>(total);
  }

  static constexpr bool backwards(Role role) { return role == kGradK || role == kGradV; }

  template <Role role>
  void run() {
    constexpr bool wide = role == kForward || role == kGradV;  // the state is [R, E], else [E, R]
    const int64_t inner = wide ? features_ : args_.E, outer = wide ? args_.E : features_;
    const int64_t columns = padded<S>(outer);
    const void *start = backwards(role) ? args_.grad_s : args_.s0;
    get_state(start, inner, outer, !wide);
    start = backwards(role) ? args_.grad_z : args_.z0;
    if (normalizes()) get_running(start);

    for (int64_t first = 0; first < args_.T; first += chunk_) {
      const int64_t n = smaller(chunk_, args_.T - first);
      begin_ = backwards(role) ? args_.T - 1 - first : first;
      step_ = backwards(role) ? -1 : 1;
      if (map_.rotates()) map_.prepare(batch_, head_, begin_, step_, n, rotation_, ld_);
      load_tiles<role>(n);
      const int64_t rows = padded<S>(n);
      transpose<S>(b_, ld_, rows, padded<S>(inner), b_transposed_, lc_);
      for (int64_t i = 0; i < n; i += kTileRows) {
        const int64_t count = smaller<int64_t>(kTileRows, n - i), seen = i + count;
        Product<S> scores = {inner, a_ + i * ld_, ld_, 1, b_transposed_, lc_};
        S *weights = weights_ + i * lc_;
        few_rows<S>(count, &scores, 1, 0, padded<S>(seen), false, weights, lc_);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t j = i + r + 1; j < seen; ++j) weights[r * lc_ + j] = 0;
        // inside the chunk, and through the state before it
        Product<S> terms[] = {{seen, weights, lc_, 1, c_, ld_},
                              {inner, a_ + i * ld_, ld_, 1, state_, ld_}};
        few_rows<S>(count, terms, 2, 0, columns, false, out_ + i * ld_, ld_);
      }
      Product<S> update = {n, b_transposed_, lc_, 1, c_, ld_};
      multiply<S>(inner, columns, &update, 1, true, state_, ld_);
      finish<role>(n);
    }
    if (role == kForward) put_state(args_.s, args_.z);
    if (role == kGradV) put_state(args_.grad_s0, nullptr);
    if (role == kGradK) put_state(nullptr, args_.grad_z0);
  }

  template <Role role>
  void load_tiles(int64_t n) {
    S *norm_a = map_.split() && normalizes() ? norm_a_ : (S *)nullptr;
    S *norm_b = map_.split() && normalizes() ? norm_b_ : (S *)nullptr;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = begin_ + i * step_, at = i * ld_;
      const S *turn = rotation_ + 2 * at;
      auto feature = [&](const Rows<S> &x, S *out, S *norm) {
        map_.value(x.get(t, row_), turn, ld_, out + at, norm ? norm + at : nullptr, row_ + ld_);
      };
      if (role == kForward) {
        feature(q_, a_, norm_a), feature(k_, b_, norm_b), copy(v_, t, 1, c_ + at);
      } else if (role == kGradQ) {
        copy(grad_o_, t, inverse_[t], a_ + at), copy(v_, t, 1, b_ + at);
        feature(k_, c_, norm_b);
      } else if (role == kGradK) {
        copy(v_, t, 1, a_ + at), copy(grad_o_, t, inverse_[t], b_ + at);
        feature(q_, c_, norm_b);
      } else {
        feature(k_, a_, nullptr), feature(q_, b_, nullptr);
        copy(grad_o_, t, inverse_[t], c_ + at);
      }
    }
    // what a shorter chunk leaves behind must not reach the transposed tile
    const int64_t rows = padded<S>(n);
    if (rows > n) memset((void *)(b_ + n * ld_), 0, sizeof(S) * size_t((rows - n) * ld_));
  }

  void copy(const Rows<S> &x, int64_t t, S factor, S *out) {
    const S *row = x.get(t, row_);
    for (int64_t j = 0; j < x.width; j += kLanes<S>) store(out + j, load(row + j) * factor);
  }

  template <Role role>
  void finish(int64_t n) {
    const int64_t width = norm_width();
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = begin_ + i * step_, at = i * ld_;
      S *out = out_ + at;
      if (role == kGradV) {
        if (grad_v_) grad_v_.put(t, out);
        continue;
      }
      // running_ is the sum of the normaliser's features, in grad_k weighted with delta
      S weight = role == kGradK ? delta_[t] : S(1), den = 0;
      if (normalizes()) {
        const S *add = map_.split() ? norm_b_ + at : (role == kForward ? b_ : c_) + at;
        for (int64_t j = 0; j < width; j += kLanes<S>) {
          // compensated (Kahan): a sum over a million tokens keeps its last digits
          Vec<S> term = load(add + j) * weight - load(compensation_ + j), old = load(running_ + j);
          Vec<S> total = old + term, kept = total - old;
          store(compensation_ + j, kept - term), store(running_ + j, total);
        }
        if (role == kForward) den = dot((map_.split() ? norm_a_ : a_) + at, running_, width);
      }
      if (role == kForward) {
        if (normalizes()) {
          S sign, inverse = 1 / divisor(den, &sign);
          ((S *)args_.den)[index_ * args_.T + t] = den;
          for (int64_t j = 0; j < args_.E; j += kLanes<S>)
            store(out + j, load(out + j) * inverse);
        }
        o_.put(t, out);
        continue;
      }
      const Rows<S> &x = role == kGradQ ? q_ : k_, &grad = role == kGradQ ? grad_q_ : grad_k_;
      S *turn_gradient = args_.grad_freq || args_.grad_positions ? row_ + 4 * ld_ : nullptr;
      map_.gradient(x.get(t, row_), rotation_ + 2 * at, ld_, out,
                    normalizes() ? (S *)running_ : nullptr, role == kGradQ ? delta_[t] : S(1),
                    row_ + ld_, turn_gradient);
      if (grad) grad.put(t, out);
      if (turn_gradient) add_positional(t, turn_gradient, role == kGradK);
    }
  }

  // turn_gradient [W]: by the angles, in radians
  void add_positional(int64_t t, const S *turn_gradient, bool add) {
    const double *p = map_.position(batch_, t), *freq = map_.freq(head_);
    double *by_position =
        args_.grad_positions ? args_.grad_positions + (index_ * args_.T + t) * args_.L : nullptr;
    for (int64_t l = 0; l < args_.L; ++l) {
      double total = 0;
      for (int64_t w = 0; w < args_.W; ++w) {
        grad_freq_[w * args_.L + l] += double(turn_gradient[w]) * p[l];
        total += double(turn_gradient[w]) * freq[w * args_.L + l];
      }
      if (by_position) by_position[l] = (add ? by_position[l] : 0) + kTwoPi * total;
    }
  }

  // state_ [rows, ld_] from a contiguous [rows, columns], or from its transpose; zero from null
  void get_state(const void *from, int64_t rows, int64_t columns, bool transposed) {
    memset((void *)(S *)state_, 0, sizeof(S) * size_t(larger(features_, args_.E) * ld_));
    if (!from) return;
    const S *x = (const S *)from + index_ * rows * columns;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        state_[i * ld_ + j] = transposed ? x[j * rows + i] : x[i * columns + j];
  }
  void get_running(const void *from) {
    const int64_t width = norm_width();
    memset((void *)(S *)running_, 0, sizeof(S) * size_t(ld_));
    memset((void *)(S *)compensation_, 0, sizeof(S) * size_t(ld_));
    if (from) memcpy(running_, (const S *)from + index_ * width, sizeof(S) * size_t(width));
  }
  void put_state(void *s, void *z) {
    const int64_t width = norm_width();
    if (s)
      for (int64_t i = 0; i < features_; ++i)
        memcpy((S *)s + (index_ * features_ + i) * args_.E, state_ + i * ld_,
               sizeof(S) * size_t(args_.E));
    if (z) memcpy((S *)z + index_ * width, running_, sizeof(S) * size_t(width));
  }

  const FastpeCausalDot &args_;
  FeatureMap<S> map_;
  const int64_t chunk_, features_, ld_, lc_;
  Scratch<S> a_, b_, b_transposed_, c_, weights_, out_, state_, norm_a_, norm_b_;
  Scratch<S> rotation_, running_, compensation_, row_, inverse_, delta_;
  Scratch<double> grad_freq_;
  Rows<S> q_, k_, v_, o_, grad_o_, grad_q_, grad_k_, grad_v_;
  int64_t batch_ = 0, head_ = 0, index_ = 0, begin_ = 0, step_ = 1;
};

}  // namespace
}  // namespace fastpe
