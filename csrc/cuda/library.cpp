// The entry points of the CUDA library, which choose the kernels of the dtype.
#include "../fastpe.h"

#define FASTPE_EXPORT __attribute__((visibility("default")))

#define FASTPE_DECLARE(type)                                                                    \
  extern "C" const char *fastpe_cuda_causal_dot_##type(const FastpeCausalDot *);                \
  extern "C" const char *fastpe_cuda_causal_dot_backward_##type(const FastpeCausalDot *);       \
  extern "C" const char *fastpe_cuda_sine_features_##type(const FastpeSineFeatures *);          \
  extern "C" const char *fastpe_cuda_sine_features_backward_##type(const FastpeSineFeatures *); \
  extern "C" const char *fastpe_cuda_step_##type(                                               \
      const FastpeCausalDot *, const FastpeSineFeatures *, const FastpeSineFeatures *);         \
  extern "C" int fastpe_cuda_shared_memory_##type(const FastpeCausalDot *);

FASTPE_DECLARE(float)
FASTPE_DECLARE(double)
FASTPE_DECLARE(BFloat16)
FASTPE_DECLARE(Float16)

#define FASTPE_CHOOSE(dtype, op, ...)                                  \
  ((dtype) == FASTPE_F64    ? fastpe_cuda_##op##_double(__VA_ARGS__)   \
   : (dtype) == FASTPE_BF16 ? fastpe_cuda_##op##_BFloat16(__VA_ARGS__) \
   : (dtype) == FASTPE_F16  ? fastpe_cuda_##op##_Float16(__VA_ARGS__)  \
                            : fastpe_cuda_##op##_float(__VA_ARGS__))

namespace {

thread_local const char *error = "";

int report(const char *message) {
  if (message) error = message;
  return message != nullptr;
}

}  // namespace

extern "C" {

FASTPE_EXPORT int fastpe_cuda_causal_dot(const FastpeCausalDot *args) {
  return report(FASTPE_CHOOSE(args->q.dtype, causal_dot, args));
}
FASTPE_EXPORT int fastpe_cuda_causal_dot_backward(const FastpeCausalDot *args) {
  return report(FASTPE_CHOOSE(args->q.dtype, causal_dot_backward, args));
}
FASTPE_EXPORT int fastpe_cuda_sine_features(const FastpeSineFeatures *args) {
  return report(FASTPE_CHOOSE(args->x.dtype, sine_features, args));
}
FASTPE_EXPORT int fastpe_cuda_sine_features_backward(const FastpeSineFeatures *args) {
  return report(FASTPE_CHOOSE(args->x.dtype, sine_features_backward, args));
}
FASTPE_EXPORT int fastpe_cuda_step(const FastpeCausalDot *args, const FastpeSineFeatures *q,
                                   const FastpeSineFeatures *k) {
  return report(FASTPE_CHOOSE(args->v.dtype, step, args, q, k));
}
FASTPE_EXPORT int fastpe_cuda_shared_memory(const FastpeCausalDot *args) {
  return FASTPE_CHOOSE(args->q.dtype, shared_memory, args);
}
FASTPE_EXPORT const char *fastpe_cuda_error(void) { return error; }
FASTPE_EXPORT const int64_t *fastpe_cuda_abi(void) {
  static const int64_t table[] = FASTPE_ABI_TABLE;
  return table;
}

}  // extern "C"
