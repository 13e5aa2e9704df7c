// The entry points of the CPU library, which choose the widest instruction set of the machine.
#include "../fastpe.h"

#define FASTPE_EXPORT __attribute__((visibility("default")))

#define FASTPE_DECLARE(isa)                                                    \
  extern "C" void fastpe_causal_dot_##isa(const FastpeCausalDot *, int);       \
  extern "C" void fastpe_sine_features_##isa(const FastpeSineFeatures *, int); \
  extern "C" void fastpe_philox_normal_##isa(const FastpePhiloxNormal *);
#define FASTPE_KERNELS(isa) \
  {fastpe_causal_dot_##isa, fastpe_sine_features_##isa, fastpe_philox_normal_##isa}

FASTPE_DECLARE(portable)
FASTPE_DECLARE(avx2)
FASTPE_DECLARE(avx512)

namespace {

thread_local const char *error = "";

struct Kernels {
  void (*causal_dot)(const FastpeCausalDot *, int backward);
  void (*sine_features)(const FastpeSineFeatures *, int backward);
  void (*philox_normal)(const FastpePhiloxNormal *);
};
// by FASTPE_ISA_*
const Kernels kKernels[] = {
    {},
    FASTPE_KERNELS(portable),
#ifdef FASTPE_HAS_AVX2
    FASTPE_KERNELS(avx2),
#endif
#ifdef FASTPE_HAS_AVX512
    FASTPE_KERNELS(avx512),
#endif
};

int best() {
#ifdef FASTPE_HAS_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    return FASTPE_ISA_AVX512;
#endif
#ifdef FASTPE_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return FASTPE_ISA_AVX2;
#endif
  return FASTPE_ISA_PORTABLE;
}

// call a kernel of the instruction set asked for; 1 if the machine does not have it
template <class Args, class... More>
int run(void (*Kernels::*kernel)(const Args *, More...), const Args *args, More... more) {
  const int isa = args->isa == FASTPE_ISA_BEST ? best() : args->isa;
  if (isa < 0 || isa > best()) {
    error = "this machine does not have the instruction set asked for";
    return 1;
  }
  (kKernels[isa].*kernel)(args, more...);
  return 0;
}

}  // namespace

extern "C" {

FASTPE_EXPORT int fastpe_causal_dot(const FastpeCausalDot *args) {
  return run(&Kernels::causal_dot, args, 0);
}
FASTPE_EXPORT int fastpe_causal_dot_backward(const FastpeCausalDot *args) {
  return run(&Kernels::causal_dot, args, 1);
}
FASTPE_EXPORT int fastpe_sine_features(const FastpeSineFeatures *args) {
  return run(&Kernels::sine_features, args, 0);
}
FASTPE_EXPORT int fastpe_sine_features_backward(const FastpeSineFeatures *args) {
  return run(&Kernels::sine_features, args, 1);
}
FASTPE_EXPORT int fastpe_step(const FastpeCausalDot *args, const FastpeSineFeatures *q,
                              const FastpeSineFeatures *k) {
  if (q && (fastpe_sine_features(q) || fastpe_sine_features(k))) return 1;
  return fastpe_causal_dot(args);
}
FASTPE_EXPORT int fastpe_philox_normal(const FastpePhiloxNormal *args) {
  return run(&Kernels::philox_normal, args);
}
FASTPE_EXPORT const char *fastpe_error(void) { return error; }
FASTPE_EXPORT const int64_t *fastpe_abi(void) {
  static const int64_t table[] = FASTPE_ABI_TABLE;
  return table;
}
FASTPE_EXPORT int fastpe_best_isa(void) { return best(); }
FASTPE_EXPORT int fastpe_openmp(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

}  // extern "C"
