// The normaliser's part in the gradient.
#pragma once
#include "block.h"

namespace fastpe {
namespace {

// Write 1 / divisor and d loss / d den of each token to scratch, before the scans of the gradient.
template <class T> struct NormalizerKernel {
  using S = typename Types<T>::S;
  static constexpr int kTokens = 32, kParts = 8, kBytes = kTokens * kParts * int(sizeof(S));
  using Args = FastpeCausalDot;

  static int64_t blocks(const Args &args) { return args.B * args.H * parts_of(args.T, kTokens); }

  FASTPE_DEVICE static void run(const Block &block, const Args &args) {
    const int64_t tiles = parts_of(args.T, kTokens), head = block.index / tiles;
    const int64_t first = block.index % tiles * kTokens;
    const int n = int(smaller(kTokens, args.T - first));
    const int64_t b = head / args.H, h = head % args.H;
    const Rows<T> g(args.grad_o, b, h), o(args.o, b, h);
    S *parts = as<S>(block.memory);
    block.each(n, kParts, [&](int i, int part) {
      S total = 0;
      const int64_t t = first + i;
      for (int64_t e = part; e < args.E; e += kParts) total += g.get(t, e) * o.get(t, e);
      parts[i * kParts + part] = total;
    });
    block.each(n, [&](int i) {
      const int64_t at = head * args.T + first + i;
      S total = 0, sign;
      for (int j = 0; j < kParts; ++j) total += parts[i * kParts + j];
      const S inverse = 1 / divisor(args, as<const S>(args.den)[at], sign);
      S *out = as<S>(args.scratch);
      out[at] = inverse;
      out[args.B * args.H * args.T + at] = -sign * total * inverse;
    });
  }
};

}  // namespace
}  // namespace fastpe
