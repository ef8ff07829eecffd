// What a launch costs with kernel arguments of various sizes: a table on stdout.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

template <int kBytes>
struct Args {
  long long words[kBytes / 8];
};

template <int kBytes>
__global__ void kernel(const __grid_constant__ Args<kBytes> args, long long* out) {
  if (out) *out = args.words[threadIdx.x];
}

// Keeps the device busy while launches queue up behind it, so that its time for them does not wait for the host.
__global__ void busy(unsigned nanoseconds) {
  for (unsigned slept = 0; slept < nanoseconds; slept += 500000) __nanosleep(500000);
}

using Clock = std::chrono::steady_clock;

double microseconds(Clock::duration d) { return std::chrono::duration<double, std::micro>(d).count(); }

// Per launch: the host's time, and the device's where launches follow each other.
template <int kBytes>
void measure() {
  constexpr int kLaunches = 50, kRounds = 25;  // few enough to queue up
  static Args<kBytes> args{};
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<double> host, device;
  for (int round = 0; round < kRounds; ++round) {
    cudaDeviceSynchronize();
    busy<<<1, 1>>>(2000000);
    cudaEventRecord(begin);
    const auto start = Clock::now();
    for (int i = 0; i < kLaunches; ++i) {
      args.words[0] = i;
      kernel<kBytes><<<1, 32>>>(args, nullptr);
    }
    host.push_back(microseconds(Clock::now() - start) / kLaunches);
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    device.push_back(ms * 1000.0 / kLaunches);
  }
  const auto median = [](std::vector<double>& x) {
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
  };
  std::printf("arguments of %5d bytes: %6.2f us on the host, %6.2f us on the device per launch\n", kBytes, median(host),
              median(device));
}

int main() {
  measure<256>();
  measure<4096>();
  measure<32752>();
  measure<256>();
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) std::printf("%s\n", cudaGetErrorString(error));
  return error != cudaSuccess;
}
