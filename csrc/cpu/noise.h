// Philox4x32-10 (Salmon et al. 2011) and Box-Muller: see fastpe/backends/reference/noise.py.
#pragma once
#include "simd.h"

namespace fastpe {
namespace {

FASTPE_HD void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = uint64_t(c[0]) * 0xD2511F53u, p1 = uint64_t(c[2]) * 0xCD9E8D57u;
    const uint32_t c1 = c[1], c3 = c[3];
    c[0] = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c[1] = uint32_t(p1);
    c[2] = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c[3] = uint32_t(p0);
  }
}

FASTPE_HD double unit(uint32_t x) { return (double(x >> 9) + 0.5) * (1.0 / 8388608.0); }

template <class S> void normal_row(const FastpePhiloxNormal &args, int64_t hd, int64_t row) {
  const uint32_t k0 = uint32_t(args.seed);
  const uint32_t k1 = uint32_t(args.seed >> 32) ^ (args.module << 3 | args.kind);
  S *out = as<S>(args.out) + (hd * args.rows + row) * args.r;
  for (int64_t r = 0; r < args.r; r += 4) {
    uint32_t c[4] = {uint32_t(r >> 2), args.first + uint32_t(row), uint32_t(hd), args.step};
    philox(c, k0, k1);
    for (int64_t lane = r; lane < smaller(r + 4, args.r); lane += 2) {
      const double radius = sqrt(-2 * log(unit(c[lane - r])));
      const double angle = kTwoPi * unit(c[lane - r + 1]);
      out[lane] = S(radius * cos(angle));
      if (lane + 1 < args.r) out[lane + 1] = S(radius * sin(angle));
    }
  }
}

}  // namespace
}  // namespace fastpe
