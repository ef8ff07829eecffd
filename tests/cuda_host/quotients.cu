// Checks csrc/cuda/lanes.cuh's roots and quotients without branches: each is IEEE's, or refused where that is allowed.
// Compiled by nvcc for a GPU, whose own approximations it then uses, or for the host.
#include <cmath>
#include <cstdint>

#include "../../csrc/cuda/lanes.cuh"

namespace {

using namespace fusedoptim;
using cuda::FastLane;
using Fast = Quotients<FastLane>;
using Exact = cuda::Lane<float>;

struct Counts {
  unsigned long long checked, wrong, refused;
};

struct Tally {
  Counts n{0, 0, 0};
  __device__ void add(float found, float expected, bool may_refuse) {
    ++n.checked;
    const bool right = bits_of(found) == bits_of(expected) || (found != found && expected != expected);
    const bool refuses = !right && !FastLane::is_right(found);
    n.refused += refuses;
    n.wrong += !right && !(refuses && may_refuse);
  }
};

__device__ inline uint32_t mix(uint64_t x) {  // splitmix64 (Steele, Lea and Flood, 2014)
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return static_cast<uint32_t>((x ^ (x >> 31)) >> 16);
}

// Every float is the root of one n in [0, 2^32).
__device__ inline void check_root(uint64_t n, Tally& tally) {
  const float x = float_of(static_cast<uint32_t>(n));
  const bool may_refuse = !(x <= 0x1p79f);
  tally.add(FastLane::sqrt(x), Exact::sqrt(x), may_refuse);
  const auto d = Divisor<float>::of(std::ldexp(1.0 + mix(n) * 0x1p-32, -static_cast<int>(mix(~n) % 28)));
  tally.add(Fast::root_over(x, d), Exact::sqrt(x) / d.value, may_refuse);
}

// Every divisor's mantissa, n in [0, 2^23), with all numerators whose quotient is so near to the middle between two
// floats that it could be rounded wrongly. A and B are 24-bit integers; a / b = A / B. A quotient misses the middle
// M / 2^s by k / (B * 2^s) where k = A * 2^s - M * B, with s = 24 for A >= B and 25 otherwise. The error before
// rounding, at most two units of the first quotient times the reciprocal's relative error, is below 2^-21 units of the
// last place, so that |k| <= 16; for each k and B the A are those of a congruence.
__device__ inline void check_divisor(uint64_t n, Tally& tally) {
  const uint32_t B = (1u << 23) + static_cast<uint32_t>(n);
  const float b = static_cast<float>(B) * 0x1p-23f;
  int twos = 0;
  while (twos < 5 && (B >> twos & 1) == 0) ++twos;
  if (twos == 5) return;  // k is a multiple of 32, or 0, which no odd M gives
  const uint64_t odd = B >> twos;
  for (int s = 24; s <= 25; ++s) {
    uint64_t inverse = 1 % odd;  // of 2^(s - twos)
    for (int i = 0; i < s - twos; ++i) inverse = inverse & 1 ? (inverse + odd) / 2 : inverse / 2;
    for (int k = -(16 >> twos); k <= 16 >> twos; ++k) {
      if (k == 0) continue;
      uint64_t A =
          (k < 0 ? odd + static_cast<uint64_t>(k + 16 * static_cast<int64_t>(odd)) % odd : k) % odd * inverse % odd;
      if (A < 1u << 23) A += ((1u << 23) - A + odd - 1) / odd * odd;
      for (; A < 1u << 24; A += odd) {
        if ((A >= B) != (s == 24)) continue;
        const int64_t M =
            (static_cast<int64_t>(A << s) - static_cast<int64_t>(k) * (1 << twos)) / static_cast<int64_t>(B);
        if (M % 2 == 0) continue;
        const float a = static_cast<float>(A) * 0x1p-23f;
        tally.add(Fast::add_ratio(0.0f, a, b), a / b, false);
        tally.add(Fast::divide(-a, b, 1.0f / b), a / b, false);
      }
    }
  }
}

// Numbers of all magnitudes, and of mantissas and sums at which roundings are near. Divisors are roots, with something
// added that is not negative.
__device__ inline void check_ratio(uint64_t n, Tally& tally) {
  const uint32_t choice = mix(4 * n), more = mix(4 * n + 1);
  float s = float_of(mix(4 * n + 2)), a = float_of(mix(4 * n + 3)), b = float_of(mix(~n) & 0x7fffffffu);
  const float small[] = {0.0f, -0.0f, 0x1p-149f, -0x1p-126f, 0x1p-100f, 1.0f, INFINITY, NAN};
  if (choice % 8 == 0) a = small[choice / 8 % 8];
  if (choice / 64 % 8 == 0) b = std::fabs(small[choice / 512 % 8]);
  if (choice / 4096 % 4 == 0) s = small[choice / 16384 % 8];
  if (more % 2 == 0) b = std::fma(b, 0.0f, 0x1p-27f) + std::ldexp(1.0f + (more >> 8) * 0x1p-24f, more / 2 % 64 - 40);
  if (more / 128 % 2 == 0)
    a = std::ldexp(a > 0 ? 1.5f : -1.25f, static_cast<int>(more >> 20) % 250 - 150) * (1 + (more & 127) * 0x1p-23f);
  if (choice >> 30 == 0) s = -(a / b);
  if (more >> 29 == 0) a = std::ldexp(b, static_cast<int>(more >> 20 & 255) - 150);  // an exact quotient, up to 2^105
  const float expected = s + a / b;
  const bool may_refuse = (a != 0 && !(std::fabs(expected) > 0x1p-99f)) || !(std::fabs(a) <= 0x1p79f) ||
                          !(b >= 0x1p-126f && b <= 0x1p100f) || !(std::fabs(a / b) < 0x1p78f);
  tally.add(Fast::add_ratio(s, a, b), expected, may_refuse);
}

using Check = void (*)(uint64_t, Tally&);

template <Check check>
__device__ inline void check_from(uint64_t first, uint64_t count, uint64_t begin, uint64_t step, Counts* counts) {
  Tally tally;
  for (uint64_t n = begin; n < count; n += step) check(first + n, tally);
#if defined(FUSEDOPTIM_CUDA_ON_HOST)
  *counts = tally.n;
#else
  atomicAdd(&counts->checked, tally.n.checked);
  atomicAdd(&counts->wrong, tally.n.wrong);
  atomicAdd(&counts->refused, tally.n.refused);
#endif
}

#if defined(FUSEDOPTIM_CUDA_ON_HOST)
template <Check check>
int run(uint64_t first, uint64_t count, uint64_t stride, Counts* counts) {
  check_from<check>(first, count, 0, stride, counts);
  return 0;
}
#else
template <Check check>
__global__ void kernel(uint64_t first, uint64_t count, Counts* counts) {
  check_from<check>(first, count, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x, counts);
}
template <Check check>
int run(uint64_t first, uint64_t count, uint64_t, Counts* counts) {
  Counts* found = nullptr;
  cudaError_t error = cudaMalloc(&found, sizeof(Counts));
  if (error == cudaSuccess) error = cudaMemset(found, 0, sizeof(Counts));
  if (error == cudaSuccess) kernel<check><<<4096, 128>>>(first, count, found);
  if (error == cudaSuccess) error = cudaGetLastError();
  if (error == cudaSuccess) error = cudaMemcpy(counts, found, sizeof(Counts), cudaMemcpyDeviceToHost);
  cudaFree(found);
  return error;
}
#endif

}  // namespace

// Each goes through [first, first + count), on the host in steps of `stride`, and returns an error of CUDA's.
#define EXPORT extern "C" __attribute__((visibility("default"))) int
EXPORT roots(uint64_t first, uint64_t count, uint64_t stride, Counts* counts) {
  return run<check_root>(first, count, stride, counts);
}
EXPORT divisors(uint64_t first, uint64_t count, uint64_t stride, Counts* counts) {
  return run<check_divisor>(first, count, stride, counts);
}
EXPORT ratios(uint64_t first, uint64_t count, uint64_t stride, Counts* counts) {
  return run<check_ratio>(first, count, stride, counts);
}
