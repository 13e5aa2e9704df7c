// A head of a sequence. Several heads may share keys, values, states or content.
#pragma once
#include "block.h"

namespace fastpe {
namespace {

// Head h of H reads this one of `heads` heads. Mostly there are as many, which takes no division.
FASTPE_HD int64_t shared_head(int64_t h, int64_t H, int64_t heads) {
  return heads == H ? h : int(h) / (int(H) / int(heads));
}

// a head of a sequence
template <class T> struct Head {
  const FastpeCausalDot &args;
  const int64_t index, s, h;  // index: s H + h
  const int64_t b, row;       // batch row of its tokens; row: b H + h

  FASTPE_DEVICE Head(const FastpeCausalDot &args_, int64_t index_)
      : args(args_), index(index_), s(int(index) / int(args.H)), h(int(index) % int(args.H)),
        b(args.ranges ? 0 : s), row(args.ranges ? h : index) {}

  FASTPE_DEVICE Rows<T> rows(const FastpeTensor &x) const { return Rows<T>(x, b, h); }
  FASTPE_DEVICE Rows<T> k() const { return Rows<T>(args.k, b, shared_head(h, args.H, args.Hk)); }
  FASTPE_DEVICE Rows<T> v() const { return Rows<T>(args.v, b, shared_head(h, args.H, args.Hv)); }
  // in [S, Hs]
  FASTPE_DEVICE int64_t state() const { return shared_head(index, args.H, args.Hs); }
  // whether it is the first of the heads that share the state
  FASTPE_DEVICE bool owner() const {
    return args.Hs == args.H || int(index) % (int(args.H) / int(args.Hs)) == 0;
  }
};

// The gradient by rows of T: in T, or in S where the caller adds those of several heads.
template <class T> struct Gradient {
  const FastpeTensor &x;
  int64_t first;

  FASTPE_DEVICE Gradient(const FastpeTensor &x_, int64_t b, int64_t h)
      : x(x_), first(b * x_.stride[0] + h * x_.stride[2]) {}
  template <class S> FASTPE_DEVICE void put(int64_t t, int64_t j, S value) const {
    const int64_t at = first + t * x.stride[1] + j * x.stride[3];
    if (sizeof(T) < sizeof(S) && x.dtype == FASTPE_F32)
      as<S>(x.data)[at] = value;
    else
      as<T>(x.data)[at] = narrow<T>(value);
  }
};

}  // namespace
}  // namespace fastpe
