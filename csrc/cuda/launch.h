// From a kernel's class to its launch: on the device a grid, on the host a loop over the blocks.
#pragma once
#include "block.h"
#ifdef __CUDACC__
#include <atomic>
#else
#include <vector>
#endif

namespace fastpe {
namespace {

#ifdef __CUDACC__

// two blocks to a multiprocessor leave 128 registers to a thread; doubles take more
template <class Kernel>
__global__ void __launch_bounds__(kThreads, sizeof(typename Kernel::S) == 8 ? 1 : 2)
    run(const __grid_constant__ typename Kernel::Args args) {
  extern __shared__ __align__(16) char memory[];
  Kernel::run(Block{int64_t(blockIdx.x), memory}, args);
}

// null, or what went wrong
template <class Kernel>
const char *launch(const typename Kernel::Args &args, int64_t blocks, int bytes, void *stream) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more blocks than a launch can have";
  constexpr int kFree = 48 << 10, kDevices = 64;  // shared memory that need not be asked for
  if (bytes > kFree) {
    // all that the card has, so that threads which ask at one time ask for the same
    static std::atomic<bool> asked[kDevices];
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess && (device >= kDevices || !asked[device])) {
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      if (error == cudaSuccess)
        error = cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
      if (error == cudaSuccess && device < kDevices) asked[device] = true;
    }
    if (error != cudaSuccess) return cudaGetLastError(), cudaGetErrorString(error);
  }
  run<Kernel><<<unsigned(blocks), kThreads, size_t(bytes), (cudaStream_t)stream>>>(args);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#else

template <class Kernel>
const char *launch(const typename Kernel::Args &args, int64_t blocks, int bytes, void *) {
  // of double for its alignment
  std::vector<double> memory(size_t(bytes) / sizeof(double) + 1);
  for (int64_t i = 0; i < blocks; ++i) {
#ifdef FASTPE_BACKWARDS
    const int64_t index = blocks - 1 - i;
#else
    const int64_t index = i;
#endif
    // NaN, whatever it is read as
    memset((void *)memory.data(), 0xff, memory.size() * sizeof(double));
    Kernel::run(Block{index, (char *)memory.data()}, args);
  }
  return nullptr;
}

#endif

}  // namespace
}  // namespace fastpe
