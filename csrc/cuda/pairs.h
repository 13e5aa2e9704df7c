// Features of queries and keys, a pair of columns at a time: feature map and rotation.
//
// In tiles the two columns of a rotated pair are neighbours, whatever their places in memory.
#pragma once
#include "heads.h"

namespace fastpe {
namespace {

struct Exp {
  template <class S> FASTPE_HD S operator()(S x) const { return ::exp(x); }
};

FASTPE_HD void sincos_of(float turns, float &sin, float &cos) {
  sincos_turns<float>(turns, sin, cos);
}
FASTPE_HD void sincos_of(double turns, double &sin, double &cos) {
#ifdef __CUDA_ARCH__
  sincospi(2 * turns, &sin, &cos);
#else
  sin = ::sin(kTwoPi * turns);
  cos = ::cos(kTwoPi * turns);
#endif
}

template <class S> struct Pair {
  S first, second;
};

template <class S> class PairMap {
 public:
  FASTPE_HD explicit PairMap(const FastpeCausalDot &args) : args_(args) {}

  FASTPE_HD bool rotates() const { return args_.freq != nullptr; }
  // the normaliser takes features without the rotation
  FASTPE_HD bool split() const { return rotates() && args_.map_first; }
  FASTPE_HD bool content_known() const { return !rotates() || args_.map_first; }
  FASTPE_HD int width() const { return int(args_.pool ? args_.W : args_.D); }
  FASTPE_HD int norm_width() const {
    return args_.normalize == FASTPE_NORM_NONE ? 0 : split() ? int(args_.D) : width();
  }
  // how many columns a pair has in the features, and in those of the normaliser
  FASTPE_HD int stride() const { return args_.pool ? 1 : 2; }
  FASTPE_HD int norm_stride() const { return split() ? 2 : stride(); }
  FASTPE_HD bool rotated(int w) const { return rotates() && w < args_.W; }

  // the place in memory of column j of x, of the features, of the normaliser's features
  FASTPE_HD int column(int j) const {
    const int pairs = int(args_.W);
    return !rotates() || args_.interleaved || j >= 2 * pairs ? j : j / 2 + j % 2 * pairs;
  }
  FASTPE_HD int feature(int j) const { return args_.pool ? j : column(j); }
  FASTPE_HD int norm(int j) const { return split() ? column(j) : feature(j); }

  // cos and sin of pair w at token t, times the scale
  FASTPE_DEVICE Pair<S> turn(int64_t b, int64_t h, int64_t t, int w) const {
    const double *f = args_.freq + ((args_.Hf == 1 ? 0 : h) * args_.W + w) * args_.L;
    const double *p = args_.positions + ((args_.Bp == 1 ? 0 : b) * args_.T + t) * args_.L;
    double turns = 0;
    for (int64_t l = 0; l < args_.L; ++l) turns += f[l] * p[l];
    S sin, cos;
    sincos_of(S(reduce_turns(turns)), sin, cos);
    return {cos * S(args_.scale), sin * S(args_.scale)};
  }

  // pair w of token t; a missing second is 0
  template <class T> FASTPE_DEVICE Pair<S> read(const Rows<T> &x, int64_t t, int w) const {
    return {S(x.get(t, column(2 * w))),
            2 * w + 1 < args_.D ? S(x.get(t, column(2 * w + 1))) : S(0)};
  }

  // the features of x, a pooled one as the first, and those of the normaliser
  FASTPE_DEVICE Pair<S> value(Pair<S> x, int w, Pair<S> turn, Pair<S> &norm) const {
    if (content_known()) {
      norm = psi(x);
      return rotates() ? encode(norm, w, turn) : norm;
    }
    return norm = psi(encode(x, w, turn));
  }

  // The gradient by x. `g` is the gradient by the features, `norm` that by the features of the
  // normaliser. `angle` receives the gradient by the angle.
  FASTPE_DEVICE Pair<S> gradient(Pair<S> x, int w, Pair<S> turn, Pair<S> g, Pair<S> norm,
                                 S &angle) const {
    if (content_known()) {
      const Pair<S> value = psi(x);
      if (rotates()) {
        g = adjoint(g, w, turn);
        angle = value.first * g.second - value.second * g.first;
      }
      return slope(x, value, {g.first + norm.first, g.second + norm.second});
    }
    const Pair<S> turned = encode(x, w, turn);
    g = slope(turned, psi(turned), {g.first + norm.first, g.second + norm.second});
    g = adjoint(g, w, turn);
    angle = x.first * g.second - x.second * g.first;
    return g;
  }

  FASTPE_DEVICE S psi(S x) const { return psi(Pair<S>{x, S(0)}).first; }

 private:
  FASTPE_DEVICE Pair<S> psi(Pair<S> x) const {
    switch (args_.feature_map) {
      case FASTPE_ELU1: return map<Elu1>(x);
      case FASTPE_RELU: return map<Relu>(x);
      case FASTPE_EXP: return map<ExpMap>(x);
      default: return x;
    }
  }
  template <class Map> FASTPE_DEVICE static Pair<S> map(Pair<S> x) {
    return {Map::template value<S>(x.first, Exp()), Map::template value<S>(x.second, Exp())};
  }

  FASTPE_DEVICE Pair<S> slope(Pair<S> x, Pair<S> value, Pair<S> g) const {
    switch (args_.feature_map) {
      case FASTPE_ELU1: return times_slope<Elu1>(x, value, g);
      case FASTPE_RELU: return times_slope<Relu>(x, value, g);
      case FASTPE_EXP: return times_slope<ExpMap>(x, value, g);
      default: return g;
    }
  }
  template <class Map>
  FASTPE_DEVICE static Pair<S> times_slope(Pair<S> x, Pair<S> value, Pair<S> g) {
    return {g.first * Map::template slope<S>(x.first, value.first),
            g.second * Map::template slope<S>(x.second, value.second)};
  }

  FASTPE_DEVICE Pair<S> encode(Pair<S> x, int w, Pair<S> turn) const {
    if (!rotated(w)) return {x.first * S(args_.scale), x.second * S(args_.scale)};
    const Pair<S> y = {rotate(x.first, x.second, turn.first, -turn.second),
                       rotate(x.second, x.first, turn.first, turn.second)};
    return args_.pool ? Pair<S>{y.first + y.second, S(0)} : y;
  }
  FASTPE_DEVICE Pair<S> adjoint(Pair<S> g, int w, Pair<S> turn) const {
    if (!rotated(w)) return {g.first * S(args_.scale), g.second * S(args_.scale)};
    if (args_.pool) g.second = g.first;
    return {rotate_adjoint(g.first, g.second, turn.first, -turn.second),
            rotate_adjoint(g.second, g.first, turn.first, turn.second)};
  }

  const FastpeCausalDot &args_;
};

}  // namespace
}  // namespace fastpe
