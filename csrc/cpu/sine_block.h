// Cosines and sines of one head at a few positions at a time, and the tokens at these positions.
//
// A row of features has a block of `kp` cosines, the gate behind them, then a block of `kp` sines.
// Tensors have them in the published order: cos, sin, cos, sin, ..., gate.
#pragma once
#include "groups.h"

namespace fastpe {
namespace {

constexpr int64_t kPositions = 16;  // at a time

inline bool wants_parameters(const FastpeSineFeatures &args) {
  return args.grad_gain || args.grad_freq || args.grad_offset || args.grad_gate;
}

template <class S> class SineBlock {
 public:
  SineBlock(const FastpeSineFeatures &args, const Groups &groups)
      : kp(half(args)), dk(args.D * args.K), ldk(padded<S>(dk) + kp), ldx(padded<S>(args.D)),
        at_once(smaller(kPositions, groups.size())), cosines(at_once * ldk), sines(at_once * ldk),
        row_cosines(at_once * ldk), row_sines(at_once * ldk), gain(ldk), gate(ldx),
        freq(args.L * ldk), args_(args), groups_(groups), space_(padded<S>(larger(args.R, args.D))),
        step_cos_(at_once > 2 ? kPositions * ldk : 1),
        step_sin_(at_once > 2 ? kPositions * ldk : 1), offset_(ldk), step_(args.L),
        multiple_(args.L) {}

  // kp: the cosines of one component and its gate
  static int64_t half(const FastpeSineFeatures &args) {
    return padded<S>(args.K + (args.gate ? 1 : 0));
  }

  const int64_t kp, dk, ldk, ldx, at_once;
  // [at_once, ldk]: of each position; `row_` are multiplied by the gains
  const Scratch<S> cosines, sines, row_cosines, row_sines;
  const Scratch<S> gain, gate;  // [ldk], [ldx]
  const Scratch<double> freq;   // [L, ldk], cycles

  void enter(int64_t h) {
    head_ = h;
    for (int64_t i = 0; i < dk; ++i) {
      gain[i] = S(args_.gain[h * dk + i]);
      offset_[i] = args_.offset ? args_.offset[h * dk + i] : 0;
      for (int64_t l = 0; l < args_.L; ++l)
        freq[l * ldk + i] = args_.freq[(h * dk + i) * args_.L + l];
    }
    for (int64_t d = 0; d < args_.D; ++d)
      gate[d] = args_.gate ? S(args_.gate[h * args_.D + d]) : S(0);
  }

  const double *position(int64_t u) const {
    return args_.positions + groups_.row(groups_.begin(u)) * args_.L;
  }

  // make the cosines and sines of positions [u, u + n)
  void make_rows(int64_t u, int64_t n) {
    const bool even = evenly_spaced(u, n);
    for (int64_t p = 0; p < n; ++p) {
      S *cos = cosines + p * ldk, *sin = sines + p * ldk;
      if (p == 0 || !even) {
        sincos_row(position(u + p), offset_, cos, sin);
      } else {
        // turn the first position by p steps
        const S *step_cos = step_cos_ + p * ldk, *step_sin = step_sin_ + p * ldk;
        for (int64_t i = 0; i < dk; i += kLanes<S>) {
          Vec<S> c = load(cosines + i), s = load(sines + i);
          Vec<S> dc = load(step_cos + i), ds = load(step_sin + i);
          store(cos + i, c * dc - s * ds);
          store(sin + i, s * dc + c * ds);
        }
      }
      for (int64_t i = 0; i < dk; i += kLanes<S>) {
        Vec<S> factor = load(gain + i);
        store(row_cosines + p * ldk + i, load(cos + i) * factor);
        store(row_sines + p * ldk + i, load(sin + i) * factor);
      }
    }
  }

  // call visit(n, b, t) for the tokens [i, end) of group u; n counts from 0
  template <class Visit> void tokens(int64_t u, int64_t i, int64_t end, Visit visit) const {
    const int64_t times = args_.Bp == 1 ? args_.B : 1, first = groups_.begin(u);
    for (int64_t n = 0; i < end; ++i, ++n) {
      const int64_t row = groups_.row(first + i / times);
      visit(n, args_.Bp == 1 ? i % times : row / args_.T, args_.Bp == 1 ? row : row % args_.T);
    }
  }
  int64_t token_count(int64_t u) const {
    return (groups_.end(u) - groups_.begin(u)) * (args_.Bp == 1 ? args_.B : 1);
  }

  void read_x(int64_t b, int64_t t, S *out) {
    read(Rows<S>(args_.x, b, head_ / (args_.H / args_.Hx), args_.D), t, out);
  }
  // the gradient by the features, [R]
  void read_grad(int64_t b, int64_t t, S *out) {
    read(Rows<S>(args_.grad_y, b, head_, args_.R), t, out);
  }

  double &grad_position(int64_t b, int64_t t, int64_t l) const {
    return args_.grad_positions[((b * args_.H + head_) * args_.T + t) * args_.L + l];
  }

 private:
  void read(const Rows<S> &x, int64_t t, S *out) {
    const S *row = x.get(t, space_);
    for (int64_t j = 0; j < x.width; j += kLanes<S>) store(out + j, load(row + j));
  }

  // Return whether the positions are first + p step. If so, make step_cos_ and step_sin_.
  bool evenly_spaced(int64_t u, int64_t n) {
    if (n < 3) return false;
    const double *first = position(u), *second = position(u + 1);
    bool same = step_head_ == head_;
    for (int64_t l = 0; l < args_.L; ++l) {
      for (int64_t p = 2; p < n; ++p)
        if (position(u + p)[l] != first[l] + double(p) * (second[l] - first[l])) return false;
      same = same && step_[l] == second[l] - first[l];
    }
    if (same) return true;
    step_head_ = head_;
    for (int64_t l = 0; l < args_.L; ++l) step_[l] = second[l] - first[l];
    for (int64_t p = 1; p < kPositions; ++p) {
      for (int64_t l = 0; l < args_.L; ++l) multiple_[l] = double(p) * step_[l];
      sincos_row(multiple_, nullptr, step_cos_ + p * ldk, step_sin_ + p * ldk);
    }
    return true;
  }

  void sincos_row(const double *at, const double *offset, S *cos, S *sin) const {
    constexpr int64_t lanes = kLanes<S>;
    for (int64_t i = 0; i < dk; i += lanes) {
      double turns[lanes];
      S reduced[lanes];
      for (int64_t j = 0; j < lanes; ++j) turns[j] = offset ? offset[i + j] : 0;
      for (int64_t l = 0; l < args_.L; ++l)
        for (int64_t j = 0; j < lanes; ++j) turns[j] += freq[l * ldk + i + j] * at[l];
      for (int64_t j = 0; j < lanes; ++j) reduced[j] = S(reduce_turns(turns[j]));
      Vec<S> c, s;
      sincos_of<S>(load(reduced), s, c);
      store(cos + i, c);
      store(sin + i, s);
    }
  }

  const FastpeSineFeatures &args_;
  const Groups &groups_;
  Scratch<S> space_, step_cos_, step_sin_;
  Scratch<double> offset_, step_, multiple_;
  int64_t head_ = 0, step_head_ = -1;
};

}  // namespace
}  // namespace fastpe
