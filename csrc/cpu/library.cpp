// Entry points of the CPU library: they pick the widest instruction set that the machine has.
#include "../fastpe.h"

#define FASTPE_EXPORT __attribute__((visibility("default")))

#define FASTPE_DECLARE(isa)                                               \
  extern "C" void fastpe_causal_dot_##isa(const FastpeCausalDot *, int);  \
  extern "C" void fastpe_sine_features_##isa(const FastpeSineFeatures *, int); \
  extern "C" void fastpe_philox_normal_##isa(const FastpePhiloxNormal *);

FASTPE_DECLARE(portable)
#ifdef FASTPE_HAS_AVX2
FASTPE_DECLARE(avx2)
#define FASTPE_RUN_AVX2(op, ...) \
  case FASTPE_ISA_AVX2: fastpe_##op##_avx2(__VA_ARGS__); break;
#else
#define FASTPE_RUN_AVX2(op, ...)
#endif
#ifdef FASTPE_HAS_AVX512
FASTPE_DECLARE(avx512)
#define FASTPE_RUN_AVX512(op, ...) \
  case FASTPE_ISA_AVX512: fastpe_##op##_avx512(__VA_ARGS__); break;
#else
#define FASTPE_RUN_AVX512(op, ...)
#endif

#define FASTPE_RUN(op, args, ...)                                       \
  switch (choose((args)->isa)) {                                        \
    case -1: return 1;                                                  \
      FASTPE_RUN_AVX2(op, args, ##__VA_ARGS__)                          \
      FASTPE_RUN_AVX512(op, args, ##__VA_ARGS__)                        \
    default: fastpe_##op##_portable(args, ##__VA_ARGS__);               \
  }                                                                     \
  return 0;

namespace {

thread_local const char *error = "";

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

int choose(int wanted) {
  if (wanted == FASTPE_ISA_BEST) return best();
  if (wanted < 0 || wanted > best()) {
    error = "this machine does not have the instruction set asked for";
    return -1;
  }
  return wanted;
}

}  // namespace

extern "C" {

FASTPE_EXPORT int fastpe_causal_dot(const FastpeCausalDot *args) { FASTPE_RUN(causal_dot, args, 0) }
FASTPE_EXPORT int fastpe_causal_dot_backward(const FastpeCausalDot *args) {
  FASTPE_RUN(causal_dot, args, 1)
}
FASTPE_EXPORT int fastpe_sine_features(const FastpeSineFeatures *args) {
  FASTPE_RUN(sine_features, args, 0)
}
FASTPE_EXPORT int fastpe_sine_features_backward(const FastpeSineFeatures *args) {
  FASTPE_RUN(sine_features, args, 1)
}
FASTPE_EXPORT int fastpe_step(const FastpeCausalDot *args, const FastpeSineFeatures *q,
                              const FastpeSineFeatures *k) {
  if (q && (fastpe_sine_features(q) || fastpe_sine_features(k))) return 1;
  return fastpe_causal_dot(args);
}
FASTPE_EXPORT int fastpe_philox_normal(const FastpePhiloxNormal *args) {
  FASTPE_RUN(philox_normal, args)
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
