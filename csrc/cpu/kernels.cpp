// The CPU kernels. setup.py compiles this file once for each instruction set.
#include "causal_dot.h"
#include "noise.h"
#include "sine_features.h"

namespace fastpe {
namespace {

template <class S> void causal_dot(const FastpeCausalDot &args, bool backward) {
  const int64_t heads = Scan<S>::heads_at_once(args), groups = (args.H + heads - 1) / heads;
  // a decoding step ends before a second thread would start
  const bool small = args.B * args.T * args.H * args.D * args.E < (1 << 18);
#pragma omp parallel num_threads(small ? 1 : args.threads)
  {
    Scan<S> scan(args);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < args.S * groups; ++i) {
      const int64_t begin = i % groups * heads, end = smaller(args.H, begin + heads);
      backward ? scan.backward(i / groups, begin, end) : scan.forward(i / groups, begin, end);
    }
  }
}

template <class S> void philox_normal(const FastpePhiloxNormal &args) {
#pragma omp parallel for num_threads(args.threads) schedule(static)
  for (int64_t i = 0; i < args.hd * args.rows; ++i)
    normal_row<S>(args, i / args.rows, i % args.rows);
}

}  // namespace
}  // namespace fastpe

#define FASTPE_JOIN(a, b) a##b
#define FASTPE_NAME(isa, op) FASTPE_JOIN(fastpe_##op##_, isa)

extern "C" {

void FASTPE_NAME(FASTPE_ISA, causal_dot)(const FastpeCausalDot *args, int backward) {
  if (args->q.dtype == FASTPE_F64)
    fastpe::causal_dot<double>(*args, backward);
  else
    fastpe::causal_dot<float>(*args, backward);
}

void FASTPE_NAME(FASTPE_ISA, sine_features)(const FastpeSineFeatures *args, int backward) {
  if (args->x.dtype == FASTPE_F64)
    fastpe::sine_features<double>(*args, backward);
  else
    fastpe::sine_features<float>(*args, backward);
}

void FASTPE_NAME(FASTPE_ISA, philox_normal)(const FastpePhiloxNormal *args) {
  if (args->dtype == FASTPE_F64)
    fastpe::philox_normal<double>(*args);
  else
    fastpe::philox_normal<float>(*args);
}

}  // extern "C"
