// A head of a sequence: its tokens, and its state. Several heads may share a state.
#pragma once
#include "simd.h"

namespace fastpe {
namespace {

// sequence s: a row of the batch, or with ranges a part of row 0
struct Sequence {
  int64_t s, row, first, length;
};
inline Sequence sequence_of(const FastpeCausalDot &args, int64_t s) {
  if (!args.ranges) return {s, s, 0, args.T};
  const int64_t *range = args.ranges + 2 * s;
  return {s, 0, range[0], range[1] - range[0]};
}

template <class S> struct ScanHead {
  // index: in [S, H]; state_index: of its state in [S, Hs]; first: of its first token in [B, H, T]
  int64_t h, index, state_index, first;
  bool owner;  // the first of the heads that share the state
  Rows<S> q, k, v, o, grad_o, grad_q, grad_k, grad_v;
  S *state, *lost, *running, *compensation, *inverse, *delta;
  double *grad_freq;

  void enter(const FastpeCausalDot &args, const Sequence &at, int64_t h_) {
    const int64_t group = args.H / args.Hs, d = args.D, e = args.E;
    h = h_;
    index = at.s * args.H + h;
    state_index = at.s * args.Hs + h / group;
    owner = h % group == 0;
    first = (at.row * args.H + h) * args.T + at.first;
    auto rows = [&](const FastpeTensor &x, int64_t heads, int64_t width) {
      return Rows<S>(x, at.row, h / (args.H / heads), width, at.first);
    };
    q = rows(args.q, args.H, d);
    k = rows(args.k, args.Hk, d);
    v = rows(args.v, args.Hv, e);
    o = rows(args.o, args.H, e);
    grad_o = rows(args.grad_o, args.H, e);
    grad_q = rows(args.grad_q, args.H, d);
    grad_k = rows(args.grad_k, args.H, d);
    grad_v = rows(args.grad_v, args.H, e);
  }
};

}  // namespace
}  // namespace fastpe
