// The C ABI of the native libraries: one struct per op, filled by fastpe/backends/native/.
//
// No torch header is needed to build or to load them. The caller checks the sizes of tensors.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { FASTPE_F32 = 0, FASTPE_F64 = 1, FASTPE_BF16 = 2, FASTPE_F16 = 3 };
enum { FASTPE_IDENTITY = 0, FASTPE_ELU1 = 1, FASTPE_RELU = 2, FASTPE_EXP = 3 };
enum { FASTPE_NORM_NONE = 0, FASTPE_NORM_SUM = 1, FASTPE_NORM_ABS = 2 };
// 0 chooses the best of the machine
enum { FASTPE_ISA_BEST = 0, FASTPE_ISA_PORTABLE = 1, FASTPE_ISA_AVX2 = 2, FASTPE_ISA_AVX512 = 3 };

// [B, T, H, width]; strides in elements, any sign
typedef struct {
  void *data;
  int64_t stride[4];
  int32_t dtype;
} FastpeTensor;

// Causal linear attention with its feature map, rotation and normaliser, and its gradient.
// Head h of q reads head h / (H / Hk) of k and h / (H / Hv) of v, and has state h / (H / Hs). With
// ranges, B is 1, and sequence i has the tokens [ranges[i][0], ranges[i][1]); else S is B. Scratch
// and states are contiguous, and double if the inputs are, else float. Parameters, positions and
// their gradients are contiguous doubles. Absent arguments are null.
typedef struct {
  int64_t B, T, H, D, E, S, Hk, Hv, Hs;
  const int64_t *ranges;  // [S, 2] or null
  int32_t chunk, threads, isa;
  int32_t feature_map, normalize;
  double eps;
  // rotation, if freq is given: freq [Hf, W, L], positions [Bp, T, L]
  int32_t interleaved, pool, map_first;
  double scale;
  int64_t Hf, W, L, Bp;
  const double *freq, *positions;
  FastpeTensor q, k, v, o;
  void *den;            // [B, H, T], the sum of weights before eps; null if not wanted
  const void *s0, *z0;  // [S, Hs, R, E], [S, Hs, Rz]
  void *s, *z;          // final state
  // for a step: the digits that s and z lost, [S, Hs, R E + Rz], before and after the token;
  // both null or neither
  const void *lost0;
  void *lost;
  // only for causal_dot_backward; H heads each, even if k and v have fewer
  FastpeTensor grad_o, grad_q, grad_k, grad_v;
  const void *grad_s, *grad_z;
  void *grad_s0, *grad_z0;  // [S, H, R, E], [S, H, Rz]
  double *grad_freq;        // [S, H, W, L]
  double *grad_positions;   // [B, H, T, L]
  // CUDA only
  void *stream;
  void *scratch;  // [2, B, H, T], for a gradient with a normaliser
} FastpeCausalDot;

// Features of SPE and F-StrIPE, and their gradient. Head h reads the head h / (H / Hx) of x.
typedef struct {
  int64_t B, T, H, D, K, J, R, L, Bp, Hx;
  int32_t threads, isa, pool, group;
  const double *positions;  // [Bp, T, L]
  const double *freq;       // [H, D, K, L], cycles
  const double *offset;     // [H, D, K], cycles
  const double *gain;       // [H, D, K]
  const double *gate;       // [H, D]
  const void *noise;        // [H, D, J, R], arithmetic type
  FastpeTensor x, y;
  FastpeTensor grad_y, grad_x;                              // H heads each
  double *grad_freq, *grad_offset, *grad_gain, *grad_gate;  // shapes as above
  double *grad_positions;                                   // [B, H, T, L]
  // CUDA only
  void *stream;
  int64_t slices;   // parts of the tokens with sums of their own
  double *scratch;  // these sums: [slices, H, D K (2 + L) + D]
} FastpeSineFeatures;

// Standard normal numbers [hd, rows, r], by Philox (docs/math.md).
typedef struct {
  uint64_t seed;
  uint32_t step, module, kind;
  uint32_t first;  // the counter of row 0
  int32_t threads, isa, dtype;
  int64_t hd, rows, r;
  void *out;
} FastpePhiloxNormal;

// A hash of this file, which setup.py computes, and the sizes of the structs. Python compares both
// with its own before it fills a struct (fastpe/backends/native/library.py).
#define FASTPE_ABI_TABLE                                                                  \
  {FASTPE_ABI, sizeof(FastpeTensor), sizeof(FastpeCausalDot), sizeof(FastpeSineFeatures), \
   sizeof(FastpePhiloxNormal)}
const int64_t *fastpe_abi(void);

// 0 on success, else the message of fastpe_error()
int fastpe_causal_dot(const FastpeCausalDot *args);
int fastpe_causal_dot_backward(const FastpeCausalDot *args);
int fastpe_sine_features(const FastpeSineFeatures *args);
int fastpe_sine_features_backward(const FastpeSineFeatures *args);
// one token after a state; q and k make its features first, into y, unless both are null
int fastpe_step(const FastpeCausalDot *args, const FastpeSineFeatures *q,
                const FastpeSineFeatures *k);
int fastpe_philox_normal(const FastpePhiloxNormal *args);
const char *fastpe_error(void);
// the FASTPE_ISA_* that an isa of 0 chooses
int fastpe_best_isa(void);
int fastpe_openmp(void);

// The same on device memory and a stream. These functions do not wait and do not allocate.
int fastpe_cuda_causal_dot(const FastpeCausalDot *args);
int fastpe_cuda_causal_dot_backward(const FastpeCausalDot *args);
int fastpe_cuda_sine_features(const FastpeSineFeatures *args);
int fastpe_cuda_sine_features_backward(const FastpeSineFeatures *args);
int fastpe_cuda_step(const FastpeCausalDot *args, const FastpeSineFeatures *q,
                     const FastpeSineFeatures *k);
const char *fastpe_cuda_error(void);
const int64_t *fastpe_cuda_abi(void);
// the bytes of shared memory that a block of causal_dot or its gradient needs at most
int fastpe_cuda_shared_memory(const FastpeCausalDot *args);

#ifdef __cplusplus
}
#endif
