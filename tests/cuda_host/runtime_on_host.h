// What csrc/cuda asks of the CUDA runtime, on the host: see cuda_on_host.h, which includes it last.
#pragma once

using cudaStream_t = void*;
using cudaEvent_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorUnknown, cudaErrorNotReady };
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaDeviceAttr { cudaDevAttrL2CacheSize, cudaDevAttrMultiProcessorCount };
struct cudaFuncAttributes {
  int ptxVersion;
};
constexpr unsigned cudaEventDisableTiming = 2;

// What streams answer when asked; tests set it.
inline bool cuda_on_host_is_capturing = false;
extern "C" __attribute__((visibility("default"), used)) inline void cuda_on_host_set_capturing(int capturing) {
  cuda_on_host_is_capturing = capturing != 0;
}

template <class Args>
cudaError_t launch(void (*kernel)(Args), unsigned blocks, int threads, cudaStream_t, const Args& args, bool = false) {
  cuda_on_host::launch(blocks, threads, [&] { kernel(args); });
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr asked, int) {
  return *value = asked == cudaDevAttrL2CacheSize ? 1 << 20 : 132, cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cuda_on_host_is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = event, cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMallocHost(void** memory, size_t bytes) {
  return (*memory = std::malloc(bytes)) ? cudaSuccess : cudaErrorUnknown;
}
inline cudaError_t cudaFreeHost(void* memory) { return std::free(memory), cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
