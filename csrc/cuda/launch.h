// Launch a kernel class: as a grid on the device, as a loop over the blocks on the host.
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

// two blocks on a multiprocessor leave 128 registers to a thread; doubles need more
template <class Kernel>
__global__ void __launch_bounds__(kThreads, sizeof(typename Kernel::S) == 8 ? 1 : 2)
    run(const __grid_constant__ typename Kernel::Args args) {
  extern __shared__ __align__(16) char memory[];
  Kernel::run(Block{int64_t(blockIdx.x), memory}, args);
}

// return null, or a message that says what went wrong
template <class Kernel>
const char *launch(const typename Kernel::Args &args, int64_t blocks, int bytes, void *stream) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more blocks than a launch can have";
  constexpr int kFree = 48 << 10, kDevices = 64;  // bytes of shared memory that need no request
  if (bytes > kFree) {
    // request all that the card has, so that threads never request different sizes
    static std::atomic<bool> asked[kDevices];
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess && (device >= kDevices || !asked[device])) {
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      if (error == cudaSuccess)
        error =
            cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
      if (error == cudaSuccess && device < kDevices) asked[device] = true;
    }
    if (error != cudaSuccess) {
      cudaGetLastError();  // clears it
      return cudaGetErrorString(error);
    }
  }
  const auto queue = static_cast<cudaStream_t>(stream);
  run<Kernel><<<unsigned(blocks), kThreads, size_t(bytes), queue>>>(args);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#else

template <class Kernel>
const char *launch(const typename Kernel::Args &args, int64_t blocks, int bytes, void *) {
  // double is aligned as the kernels need
  std::vector<double> memory(size_t(bytes) / sizeof(double) + 1);
  for (int64_t i = 0; i < blocks; ++i) {
#ifdef FASTPE_BACKWARDS
    const int64_t index = blocks - 1 - i;
#else
    const int64_t index = i;
#endif
    // NaN in every type
    memset(memory.data(), 0xff, memory.size() * sizeof(double));
    Kernel::run(Block{index, as<char>(memory.data())}, args);
  }
  return nullptr;
}

#endif

}  // namespace
}  // namespace fastpe
