// The tiles of the scan in causal_dot.h: tokens of a chunk, columns of a block, shared memory.
#pragma once
#include "pairs.h"

namespace fastpe {
namespace {

enum Role { kForward, kGradQ, kGradK, kGradV };

// Only float compensates the sums of the state: half precision rounds its results more than these
// sums, and double has digits to spare. BFloat16 keeps eight bits of the lost digits.
template <class T> constexpr bool kCompensated = sizeof(T) == sizeof(float);
using Lost = BFloat16;

struct ScanPlan {
  int chunk, rows, inner, outer, norm, turns, blocks;
  int ld_inner, ld_outer, ld_weights, ld_state, ld_norm;
  int a, b, c, weights, state, lost, out, sums, base, running, parts, by_row, turn;
  int bytes;
  bool compensated;
};

// the tiles for these chunks and at most `outer` columns
template <class T, Role role>
ScanPlan scan_plan(const FastpeCausalDot &args, int chunk, int outer,
                   bool compensated = kCompensated<T>) {
  using S = typename Types<T>::S;
  using Operand = typename Types<T>::Operand;
  constexpr bool along_features = role == kForward || role == kGradV;
  const PairMap<S> map(args);
  const int64_t width = along_features ? args.E : map.width();
  ScanPlan p = {};
  p.chunk = chunk;  // does not depend on T: a sequence has the same bits packed and alone
  if (args.chunk > 0) p.chunk = int(smaller(p.chunk, args.chunk));
  p.rows = tiled(p.chunk);
  p.inner = tiled(along_features ? map.width() : args.E);
  p.outer = int(smaller(outer, tiled(width)));
  p.blocks = int(parts_of(width, p.outer));
  if (args.normalize != FASTPE_NORM_NONE && role != kGradV)
    p.norm = (role == kForward ? p.inner : p.outer) / map.stride() * map.norm_stride();
  if (map.rotates())
    p.turns = int(smaller((along_features ? p.inner : p.outer) / map.stride(), args.W));
  p.ld_inner = row_length<Operand>(p.inner);
  p.ld_outer = row_length<Operand>(p.outer);
  p.ld_weights = row_length<Operand>(p.rows);
  p.ld_state = row_length<S>(p.outer);
  p.ld_norm = row_length<S>(p.norm);
  Layout memory;
  p.a = memory.take(p.rows * p.ld_inner, sizeof(Operand));
  p.b = memory.take(p.rows * p.ld_inner, sizeof(Operand));
  p.c = memory.take(p.rows * p.ld_outer, sizeof(Operand));
  p.weights = memory.take(p.rows * p.ld_weights, sizeof(Operand));
  p.state = memory.take(p.inner * p.ld_state, sizeof(S));
  p.compensated = compensated;
  p.lost = memory.take(compensated ? p.inner * p.ld_state : 0, sizeof(Lost));
  p.out = memory.take(role == kGradQ || role == kGradK ? p.rows * p.ld_state : 0, sizeof(S));
  p.sums = memory.take(p.norm ? p.rows * p.ld_norm : 0, sizeof(S));
  p.base = memory.take(p.norm ? p.rows / 8 * p.ld_norm : 0, sizeof(S));
  p.running = memory.take(2 * p.norm, sizeof(S));
  p.parts = memory.take(p.norm ? 8 * p.rows : 0, sizeof(S));
  p.by_row = memory.take(p.rows, sizeof(S));
  p.turn = memory.take(p.rows * p.turns, sizeof(Pair<S>));
  p.bytes = memory.bytes;
  return p;
}

}  // namespace
}  // namespace fastpe
