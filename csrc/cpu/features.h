// The features of one query or key: feature map and rotation, in either order.
#pragma once
#include "simd.h"

namespace fastpe {
namespace {

template <class S> class FeatureMap {
 public:
  explicit FeatureMap(const FastpeCausalDot &args) : args_(args) {}

  bool rotates() const { return args_.freq != nullptr; }
  // the normaliser takes features without the rotation
  bool split() const { return rotates() && args_.map_first; }
  // the feature map takes x itself, before any rotation
  bool content_known() const { return !rotates() || args_.map_first; }
  int64_t width() const { return args_.pool ? args_.W : args_.D; }

  const double *freq(int64_t h) const {
    return args_.freq + (args_.Hf == 1 ? 0 : h) * args_.W * args_.L;
  }
  // [L], of token t in batch row b
  const double *position(int64_t b, int64_t t) const {
    return args_.positions + ((args_.Bp == 1 ? 0 : b) * args_.T + t) * args_.L;
  }

  // row i of the table is for token begin + i step: cosines [ld], then signed sines [ld]
  void prepare(int64_t b, int64_t h, int64_t begin, int64_t step, int64_t n, S *table, int64_t ld) {
    const double *f = freq(h);
    const int64_t pairs = args_.W, lanes = kLanes<S>;
    const S scale = S(args_.scale);
    for (int64_t i = 0; i < n; ++i) {
      const double *p = position(b, begin + i * step);
      S *cosines = table + 2 * i * ld, *sines = cosines + ld;
      for (int64_t w0 = 0; w0 < pairs; w0 += lanes) {
        const int64_t count = smaller(lanes, pairs - w0);
        S turns[kLanes<S>] = {}, cos_of[kLanes<S>], sin_of[kLanes<S>];
        if (args_.L == 1) {
          for (int64_t w = 0; w < count; ++w) turns[w] = S(reduce_turns(f[w0 + w] * p[0]));
        } else {
          for (int64_t w = 0; w < count; ++w) {
            double u = 0;
            for (int64_t l = 0; l < args_.L; ++l) u += f[(w0 + w) * args_.L + l] * p[l];
            turns[w] = S(reduce_turns(u));
          }
        }
        Vec<S> sin, cos;
        sincos_of<S>(load(turns), sin, cos);
        store(cos_of, cos * scale);
        store(sin_of, sin * scale);
        const int64_t at = args_.interleaved ? 2 * w0 : w0;
        S *c = cosines + at, *s = sines + at;
        if (args_.interleaved) {
          for (int64_t w = 0; w < count; ++w) {
            c[2 * w] = c[2 * w + 1] = cos_of[w];
            s[2 * w] = -sin_of[w];
            s[2 * w + 1] = sin_of[w];
          }
        } else {
          for (int64_t w = 0; w < count; ++w) {
            c[w] = c[w + pairs] = cos_of[w];
            s[w] = -sin_of[w];
            s[w + pairs] = sin_of[w];
          }
        }
      }
      for (int64_t j = 2 * pairs; j < padded<S>(args_.D); ++j) {
        cosines[j] = j < args_.D ? scale : S(0);
        sines[j] = 0;
      }
    }
  }

  // Map x [D] to out [R]. `norm` [D] receives the features of the normaliser, unless it is null.
  // `space` has two rows.
  void value(const S *x, const S *turn, int64_t ld, S *out, S *norm, S *space) const {
    if (!rotates()) return psi(x, args_.D, out);
    if (args_.map_first) {
      S *content = norm ? norm : space;
      psi(x, args_.D, content);
      encode(content, turn, ld, space + ld, out);
    } else {
      encode(x, turn, ld, space + ld, space);
      psi(space, width(), out);
    }
  }

  // Turn g from the gradient by the features [R] into that by x [D], and add the normaliser's part,
  // factor * running [D or R]. `known` is psi(x) [D] or null. `turn_gradient` [W] receives the
  // gradient by the angles, unless it is null. `space` has three rows.
  void gradient(const S *x, const S *known, const S *turn, int64_t ld, S *g, const S *running,
                S factor, S *space, S *turn_gradient) const {
    if (content_known()) {
      if (!known) {
        psi(x, args_.D, space);
        known = space;
      }
      if (rotates()) {
        encode_adjoint(g, turn, ld, space + ld);
        if (turn_gradient) by_angle(known, g, turn_gradient);
      }
      add(g, running, factor, args_.D);
      slope(x, known, args_.D, g);
    } else {
      S *turned = space + ld, *value = space + 2 * ld;
      encode(x, turn, ld, space, turned);
      psi(turned, width(), value);
      add(g, running, factor, width());
      slope(turned, value, width(), g);
      encode_adjoint(g, turn, ld, space);
      if (turn_gradient) by_angle(x, g, turn_gradient);
    }
  }

 private:
  // distances in memory: from a pair to the next, and from the first of a pair to the second
  int64_t between_pairs() const { return args_.interleaved ? 2 : 1; }
  int64_t inside_pair() const { return args_.interleaved ? 1 : args_.W; }

  struct Exp {
    FASTPE_HD Vec<S> operator()(Vec<S> x) const { return exp_of(x); }
  };

  template <class Map> static void map_row(const S *x, int64_t width, S *out) {
    for (int64_t j = 0; j < width; j += kLanes<S>)
      store(out + j, Map::template value<S>(load(x + j), Exp()));
    for (int64_t j = width; j < padded<S>(width); ++j) out[j] = 0;
  }
  template <class Map> static void slope_row(const S *x, const S *value, int64_t width, S *g) {
    for (int64_t j = 0; j < width; j += kLanes<S>)
      store(g + j, load(g + j) * Map::template slope<S>(load(x + j), load(value + j)));
  }

  void psi(const S *x, int64_t width, S *out) const {
    switch (args_.feature_map) {
      case FASTPE_ELU1: return map_row<Elu1>(x, width, out);
      case FASTPE_RELU: return map_row<Relu>(x, width, out);
      case FASTPE_EXP: return map_row<ExpMap>(x, width, out);
      default: return map_row<Identity>(x, width, out);
    }
  }
  // g *= psi'(x)
  void slope(const S *x, const S *value, int64_t width, S *g) const {
    switch (args_.feature_map) {
      case FASTPE_ELU1: return slope_row<Elu1>(x, value, width, g);
      case FASTPE_RELU: return slope_row<Relu>(x, value, width, g);
      case FASTPE_EXP: return slope_row<ExpMap>(x, value, width, g);
      default: return;
    }
  }

  static void add(S *g, const S *running, S factor, int64_t width) {
    if (!running) return;
    for (int64_t j = 0; j < width; j += kLanes<S>)
      store(g + j, load(g + j) + load(running + j) * factor);
  }

  // x [D] with each pair exchanged; null if pairs are neighbours, which vectors exchange
  const S *partners(const S *x, S *out) const {
    const int64_t pairs = args_.W;
    if (args_.interleaved) return nullptr;
    copy_n(out, x + pairs, pairs);
    copy_n(out + pairs, x, pairs);
    for (int64_t j = 2 * pairs; j < padded<S>(args_.D); ++j) out[j] = 0;
    return out;
  }

  template <bool adjoint>
  void turn_row(const S *x, const S *turn, int64_t ld, S *space, S *out) const {
    const S *other = partners(x, space);
    for (int64_t j = 0; j < args_.D; j += kLanes<S>) {
      Vec<S> v = load(x + j), p = other ? load(other + j) : permute<S, SwapNeighbours>(v, v);
      Vec<S> c = load(turn + j), s = load(turn + ld + j);
      store(out + j, adjoint ? rotate_adjoint(v, p, c, s) : rotate(v, p, c, s));
    }
  }

  // rotate x [D] into out, and sum pairs if pooled; `space` has one row
  void encode(const S *x, const S *turn, int64_t ld, S *space, S *out) const {
    turn_row<false>(x, turn, ld, space, out);
    if (!args_.pool) return;
    const int64_t first = between_pairs(), second = inside_pair();
    for (int64_t w = 0; w < args_.W; ++w) out[w] = out[first * w] + out[first * w + second];
    for (int64_t w = args_.W; w < padded<S>(args_.D); ++w) out[w] = 0;
  }

  void encode_adjoint(S *g, const S *turn, int64_t ld, S *space) const {
    if (args_.pool) {
      const int64_t first = between_pairs(), second = inside_pair();
      for (int64_t w = 0; w < args_.W; ++w) space[first * w] = space[first * w + second] = g[w];
      for (int64_t j = 2 * args_.W; j < padded<S>(args_.D); ++j) space[j] = 0;
      copy_n(g, space, padded<S>(args_.D));
    }
    turn_row<true>(g, turn, ld, space, g);
  }

  // the gradient by the angle of each pair: x1 g2 - x2 g1
  void by_angle(const S *x, const S *g, S *out) const {
    for (int64_t w = 0; w < args_.W; ++w) {
      const int64_t i = between_pairs() * w, j = i + inside_pair();
      out[w] = x[i] * g[j] - x[j] * g[i];
    }
  }

  const FastpeCausalDot &args_;
};

}  // namespace
}  // namespace fastpe
