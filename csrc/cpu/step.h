// One token after a state: S = S_0 + k (x) v and out = q S, before the normaliser.
#pragma once
#include "simd.h"

namespace fastpe {
namespace {

// With kKeep, `lost` keeps the digits that the sums in the state lose.
template <class S, bool kKeep> struct StateStep {
  const S *q, *k, *v;       // features [R], values [E]
  int64_t features, width;  // R, E
  const S *s0;              // [R, E] before the token
  S *s;                     // [R, E] after it
  const S *lost0;
  S *lost;
  S *out;  // [E]

  void run() const {
    int64_t j = 0;
    for (; j + 4 * kLanes<S> <= width; j += 4 * kLanes<S>) columns<4>(j);
    for (; j + kLanes<S> <= width; j += kLanes<S>) columns<1>(j);
    for (; j < width; ++j) {
      out[j] = 0;
      for (int64_t r = 0; r < features; ++r) {
        const int64_t at = r * width + j;
        S add = k[r] * v[j];
        if constexpr (kKeep) add += lost0[at];
        const S now = s0[at] + add;
        if constexpr (kKeep) lost[at] = add - (now - s0[at]);
        s[at] = now;
        out[j] += q[r] * now;
      }
    }
  }

 private:
  // kVectors vectors of each row of the state, from column j on
  template <int kVectors> void columns(int64_t j) const {
    Vec<S> value[kVectors], total[kVectors] = {};
    for (int i = 0; i < kVectors; ++i) value[i] = load(v + j + i * kLanes<S>);
    for (int64_t r = 0; r < features; ++r)
      for (int i = 0; i < kVectors; ++i) {
        const int64_t at = r * width + j + i * kLanes<S>;
        const Vec<S> before = load(s0 + at);
        Vec<S> add = value[i] * k[r];
        if constexpr (kKeep) add += load(lost0 + at);
        const Vec<S> now = before + add;
        if constexpr (kKeep) store(lost + at, add - (now - before));
        store(s + at, now);
        total[i] += now * q[r];
      }
    for (int i = 0; i < kVectors; ++i) store(out + j + i * kLanes<S>, total[i]);
  }
};

}  // namespace
}  // namespace fastpe
