// Choose tiles and launch the CUDA kernels. setup.py compiles this file once for each dtype.
#include "causal_dot.h"
#include "launch.h"
#include "sine_features_backward.h"
#include "step.h"

namespace fastpe {
namespace {

using T = FASTPE_TYPE;

// shared memory that every card from compute capability 8.0 on has
constexpr int kShared = 99 << 10;
// enough blocks for a large card
constexpr int kFill = 128;

template <Role role> ScanPlan plan(const FastpeCausalDot &args) {
  constexpr int kChoices[][2] = {
      {64, 64}, {32, 64}, {32, 32}, {16, 32}, {16, 16}};  // chunk, columns
  ScanPlan p = {};
  for (const auto &choice : kChoices) {
    p = scan_plan<T, role>(args, choice[0], choice[1]);
    if (p.bytes <= kShared) break;
  }
  // the widest heads leave no room to compensate sums
  const bool compensated = p.compensated && p.bytes <= kShared;
  if (p.compensated != compensated) p = scan_plan<T, role>(args, p.chunk, p.outer, false);
  while (p.outer > kTile && args.S * args.H * p.blocks < kFill)
    p = scan_plan<T, role>(args, p.rows, tiled(p.outer / 2), compensated);
  return p;
}

template <Role role> const char *scan(const FastpeCausalDot &args, bool slice_by_slice = false) {
  using Kernel = ScanKernel<T, role>;
  const ScanPlan p = plan<role>(args);
  const char *error = nullptr;
  const int slices = slice_by_slice ? 1 : p.blocks;
  for (int first = 0; first < p.blocks && !error; first += slices)
    error =
        launch<Kernel>({args, p, first, slices}, args.S * args.H * slices, p.bytes, args.stream);
  return error;
}

const char *backward(const FastpeCausalDot &args) {
  const bool positional = args.grad_freq || args.grad_positions;
  const bool by_slice = args.grad_positions;  // the slices add to them in turn
  const char *error = nullptr;
  if (args.normalize != FASTPE_NORM_NONE) {
    using Kernel = NormalizerKernel<T>;
    error = launch<Kernel>(args, Kernel::blocks(args), Kernel::kBytes, args.stream);
  }
  if (!error && (args.grad_q.data || positional)) error = scan<kGradQ>(args, by_slice);
  if (!error && (args.grad_k.data || args.grad_z0 || positional))
    error = scan<kGradK>(args, by_slice);
  if (!error && (args.grad_v.data || args.grad_s0)) error = scan<kGradV>(args);
  return error;
}

const char *features(const FastpeSineFeatures &args) {
  using Kernel = SineKernel<T>;
  const Kernel::Args all = {args, Kernel::plan(args)};
  return launch<Kernel>(all, Kernel::blocks(all), all.plan.bytes, args.stream);
}

const char *features_backward(const FastpeSineFeatures &args) {
  using Kernel = SineGradientKernel<T>;
  constexpr int kChoices[][2] = {{64, 32}, {32, 32}, {32, 16}, {16, 16}, {16, 8}};  // tokens, sines
  SinePlan plan = {};
  for (const auto &choice : kChoices) {
    plan = Kernel::plan(args, choice[0], choice[1]);
    if (plan.bytes <= kShared) break;
  }
  const Kernel::Args all = {args, plan};
  const char *error = launch<Kernel>(all, Kernel::blocks(all), plan.bytes, args.stream);
  if (error || !args.scratch) return error;
  using Sum = SineParametersKernel;
  return launch<Sum>(args, Sum::blocks(args), 0, args.stream);
}

const char *step(const FastpeCausalDot &args, const FastpeSineFeatures *q,
                 const FastpeSineFeatures *k) {
  using Kernel = StepKernel<T>;
  Kernel::Args all = {args, {}, {}};
  if (q) all.sines[0] = *q;
  if (q) all.sines[1] = *k;
  all.plan = Kernel::plan(all);
  return launch<Kernel>(all, Kernel::blocks(all), all.plan.bytes, args.stream);
}

}  // namespace
}  // namespace fastpe

#define FASTPE_JOIN(a, b) a##b
#define FASTPE_NAME(type, op) FASTPE_JOIN(fastpe_cuda_##op##_, type)

extern "C" {

const char *FASTPE_NAME(FASTPE_TYPE, causal_dot)(const FastpeCausalDot *args) {
  return fastpe::scan<fastpe::kForward>(*args);
}
const char *FASTPE_NAME(FASTPE_TYPE, causal_dot_backward)(const FastpeCausalDot *args) {
  return fastpe::backward(*args);
}
const char *FASTPE_NAME(FASTPE_TYPE, sine_features)(const FastpeSineFeatures *args) {
  return fastpe::features(*args);
}
const char *FASTPE_NAME(FASTPE_TYPE, sine_features_backward)(const FastpeSineFeatures *args) {
  return fastpe::features_backward(*args);
}
const char *FASTPE_NAME(FASTPE_TYPE, step)(const FastpeCausalDot *args, const FastpeSineFeatures *q,
                                           const FastpeSineFeatures *k) {
  return fastpe::step(*args, q, k);
}
int FASTPE_NAME(FASTPE_TYPE, shared_memory)(const FastpeCausalDot *args) {
  using namespace fastpe;
  return int(larger(larger(plan<kForward>(*args).bytes, plan<kGradV>(*args).bytes),
                    larger(plan<kGradQ>(*args).bytes, plan<kGradK>(*args).bytes)));
}

}  // extern "C"
