// Launches, copies and questions to the driver.
#include <cstring>
#include <mutex>
#include <vector>

#include "../rules/all.h"
#include "api.h"
#include "kernel.cuh"

namespace fusedoptim::cuda {
namespace {

// Makes a device the current one, and the one before current again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

// Errors are reported once: the runtime is not to tell the next caller of them again.
const char* text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

#if !defined(FUSEDOPTIM_CUDA_ON_HOST)
template <class Args>
cudaError_t launch(void (*kernel)(Args), uint32_t blocks, int threads, void* stream, const Args& args,
                   bool overlaps = false) {
  void* pointers[] = {const_cast<Args*>(&args)};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = overlaps ? 1 : 0;
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
}
#endif

using Kernel = void (*)(StepArgs);

template <class Rule, bool wide, bool stored>
Kernel kernel_of() {
  if constexpr (std::is_same_v<Rule, Clip>)  // what clips has gradients alone, whose storages are dtypes
    return step_kernel<Rule, wide, false>;
  else if constexpr (Rule::sums > 0)
    return norm_step_kernel<Rule, wide, stored>;
  else
    return step_kernel<Rule, wide, stored>;
}

struct Named {
  const char* name;
  // For operands of up to 32 bits, and of 64; and the same for storages that may be no dtypes.
  Kernel kernel[4];
};

template <class... R>
const std::vector<Named>& kernels(RuleList<R...>) {
  static const std::vector<Named> all{
      {R::name,
       {kernel_of<R, false, false>(), kernel_of<R, true, false>(), kernel_of<R, false, true>(),
        kernel_of<R, true, true>()}}...,
      {kMeasure, {measure_kernel<false>, measure_kernel<true>, measure_kernel<false>, measure_kernel<true>}},
      {kReduce, {reduce_kernel, reduce_kernel, reduce_kernel, reduce_kernel}}};
  return all;
}

const void* find(const char* rule, int32_t wide, int32_t stored) {
  for (const Named& named : kernels(Rules{}))
    if (std::strcmp(named.name, rule) == 0)
      return reinterpret_cast<const void*>(named.kernel[(wide ? 1 : 0) + (stored ? 2 : 0)]);
  return nullptr;
}

const char* launch_step(int32_t device, const void* kernel, const StepArgs& args, uint32_t blocks, int32_t overlaps,
                        void* stream) {
  const DeviceGuard on(device);
  if (on.error() != cudaSuccess) return text(on.error());
  if (overlaps) {  // code made for older GPUs would not wait
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return text(error);
    overlaps = attributes.ptxVersion >= 90;
  }
  return text(launch(reinterpret_cast<Kernel>(const_cast<void*>(kernel)), blocks, kThreads, stream, args, overlaps));
}

const char* write(int32_t device, void* to, const void* from, size_t bytes, void* stream) {
  const DeviceGuard on(device);
  if (on.error() != cudaSuccess) return text(on.error());
  WriteArgs args;
  for (size_t done = 0; done < bytes; done += kWriteWords * 8) {
    const size_t now = bytes - done < kWriteWords * 8 ? bytes - done : kWriteWords * 8;
    args.to = reinterpret_cast<uint64_t*>(static_cast<char*>(to) + done);
    args.count = static_cast<int64_t>(now / 8);
    std::memcpy(args.words, static_cast<const char*>(from) + done, now);
    if (const cudaError_t error = launch(write_kernel, 1u, kThreads, stream, args); error != cudaSuccess)
      return text(error);
  }
  return nullptr;
}

// Pinned buffers. A buffer is free again when the event behind its last copy has passed; only if none of many is, the
// host waits for the oldest.
class Staging {
 public:
  cudaError_t upload(void* to, const void* from, size_t bytes, cudaStream_t stream) {
    int free = 0;
    while (free < kBuffers && buffer_[free].passed && cudaEventQuery(buffer_[free].passed) == cudaErrorNotReady) ++free;
    cudaGetLastError();  // "not ready" is an answer
    if (free == kBuffers) {
      free = next_;
      next_ = (next_ + 1) % kBuffers;
    }
    Buffer& b = buffer_[free];
    cudaError_t error = cudaSuccess;
    if (!b.passed) error = cudaEventCreateWithFlags(&b.passed, cudaEventDisableTiming);
    if (error == cudaSuccess) error = cudaEventSynchronize(b.passed);
    if (error == cudaSuccess && b.bytes < bytes) {
      if (b.memory) error = cudaFreeHost(b.memory);
      b.memory = nullptr;
      b.bytes = 0;
      if (error == cudaSuccess) error = cudaMallocHost(&b.memory, 2 * bytes);
      if (error == cudaSuccess) b.bytes = 2 * bytes;
    }
    if (error != cudaSuccess) return error;
    std::memcpy(b.memory, from, bytes);
    error = cudaMemcpyAsync(to, b.memory, bytes, cudaMemcpyHostToDevice, stream);
    return error == cudaSuccess ? cudaEventRecord(b.passed, stream) : error;
  }

 private:
  static constexpr int kBuffers = 16;
  struct Buffer {
    void* memory = nullptr;
    size_t bytes = 0;
    cudaEvent_t passed = nullptr;
  };
  Buffer buffer_[kBuffers];
  int next_ = 0;
};

constexpr int kMaxDevices = 64;

const char* upload(int32_t device, void* to, const void* from, size_t bytes, void* stream) {
  static std::mutex mutex;
  static Staging* staging = new Staging[kMaxDevices];  // never destroyed: the driver may be gone by then
  const DeviceGuard on(device);
  if (on.error() != cudaSuccess) return text(on.error());
  if (device < 0 || device >= kMaxDevices) return "there are more devices than expected";
  const std::lock_guard<std::mutex> lock(mutex);
  return text(staging[device].upload(to, from, bytes, static_cast<cudaStream_t>(stream)));
}

const char* check(int32_t device) {
  int driver = 0;
  if (const cudaError_t error = cudaDriverGetVersion(&driver); error != cudaSuccess) return text(error);
  if (driver < 12010) return "the driver is older than CUDA 12.1 (R530), which kernel arguments of 32 KB need";
  const DeviceGuard on(device);
  if (on.error() != cudaSuccess) return text(on.error());
  int runtime = 0;
  cudaRuntimeGetVersion(&runtime);
  if (driver / 1000 < runtime / 1000)
    return "the driver is for an older CUDA than the toolkit that they were built with: update it, or build with "
           "CUDA_HOME set to an older toolkit";
  // Asking also loads them, so that no launch of a step fails for want of code after another one has run.
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(write_kernel));
  for (const Named& named : kernels(Rules{}))
    for (Kernel kernel : named.kernel)
      if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  return text(error);
}

int32_t capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  return status != cudaStreamCaptureStatusNone;
}

int64_t l2_bytes(int32_t device) {
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device);
  return bytes;
}

int64_t multiprocessors(int32_t device) {
  int count = 1;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

#if defined(FUSEDOPTIM_CUDA_ON_HOST)
constexpr int32_t kOnHost = 1;
#else
constexpr int32_t kOnHost = 0;
#endif
const Api kApi = {kApiVersion, kOnHost, sizeof(StepArgs), sizeof(TableEntry), check,          find, launch_step,
                  upload,      write,   capturing,        l2_bytes,           multiprocessors};

}  // namespace
}  // namespace fusedoptim::cuda

#define FUSEDOPTIM_TEXT_OF(...) #__VA_ARGS__
#define FUSEDOPTIM_TEXT(...) FUSEDOPTIM_TEXT_OF(__VA_ARGS__)

// The GPUs that the library has code for and the release of CUDA, as "750,800;13.0": for people to read.
extern "C" __attribute__((visibility("default"))) const char* fusedoptim_cuda_targets() {
#if defined(FUSEDOPTIM_CUDA_ON_HOST)
  return "";
#else
  return FUSEDOPTIM_TEXT(__CUDA_ARCH_LIST__) ";" FUSEDOPTIM_TEXT(__CUDACC_VER_MAJOR__) "." FUSEDOPTIM_TEXT(
      __CUDACC_VER_MINOR__);
#endif
}

extern "C" __attribute__((visibility("default"))) const fusedoptim::cuda::Api* fusedoptim_cuda_api() {
  return &fusedoptim::cuda::kApi;
}
