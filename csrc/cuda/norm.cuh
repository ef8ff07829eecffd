// Sums of squares as core/sum_of_squares.h defines them. A warp sums a tile of 1024 in registers: lane l holds elements
// 128*k + 4*l + j, so that adding element i+512 to i, then i+256, and i+128, stays in the lane, i+64 to i+4 are
// shuffles, and the last two stay in the lane again.
#pragma once

#include "block_work.cuh"

namespace fusedoptim::cuda {

// Sums 1024 terms; load4(i, x) gives terms i to i+3, zeros for missing ones. The sum is lane 0's result.
template <class Load4>
__device__ __forceinline__ double warp_sum_by_halving(const Load4& load4) {
  const int lane = threadIdx.x % kWarp;
  double s[4][4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    double upper[4];
    load4(128 * k + 4 * lane, s[k]);
    load4(128 * k + 4 * lane + 512, upper);
    for (int j = 0; j < 4; ++j) s[k][j] += upper[j];
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    double x = (s[0][j] + s[2][j]) + (s[1][j] + s[3][j]);
#pragma unroll
    for (int delta = 16; delta > 0; delta /= 2) x += __shfl_down_sync(0xffffffffu, x, delta);
    s[0][j] = x;
  }
  return (s[0][0] + s[0][2]) + (s[0][1] + s[0][3]);
}

template <class T>
__device__ __forceinline__ double square(T x, const GradTransform<T>& transform) {
  const double y = static_cast<double>(transform_grad<Lane<T>>(x, transform));
  return y * y;
}

// The square of element i of the gradient, wherever it lies; 0 beyond the end. One copy, called: its divisions and
// cases would fill the instruction cache 32 times over.
template <class T, bool wide>
__device__ __noinline__ double square_at(const BlockWork& work, int64_t i, const int64_t* layouts) {
  const DeviceEntry& e = work.entry;
  if (i >= e.numel) return 0.0;
  int64_t at[kOperands];
  at[kGrad] = i;
  if (e.sum_layout >= 0) strided_offsets(layouts + e.sum_layout, i, at);
  return square(load_single<T, wide>(work.data(kGrad), work.dtype(kGrad), at[kGrad]), work.transforms<T>().grad);
}

// The sum of squares of a tile of the gradient that the rule gets.
template <class T, bool wide>
__device__ __forceinline__ double warp_tile_sum(const BlockWork& work, int64_t tile, const int64_t* layouts) {
  const DeviceEntry& e = work.entry;
  const auto transform = work.transforms<T>().grad;
  const DType d = work.dtype(kGrad);
  const int64_t start = tile * kTile;
  if constexpr (!wide) {
    const int64_t bytes = size_of(d);
    const char* base = static_cast<const char*>(work.data(kGrad)) + start * bytes;
    if (e.sum_layout < 0 && reinterpret_cast<uintptr_t>(base) % (4 * bytes) == 0 && start + kTile <= e.numel) {
      // All loads before the first use. They are plain ones: the update should find the gradient in the L2.
      Raw raw[8];
      base += 4 * (threadIdx.x % kWarp) * bytes;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (d == DType::f32) {
          const uint4 x = *reinterpret_cast<const uint4*>(base + 512 * k);
          raw[k].word[0] = x.x, raw[k].word[1] = x.y, raw[k].word[2] = x.z, raw[k].word[3] = x.w;
        } else {
          const uint2 x = *reinterpret_cast<const uint2*>(base + 256 * k);
          raw[k].word[0] = x.x, raw[k].word[1] = x.y;
        }
      }
      return warp_sum_by_halving([&](int i, double (&out)[4]) {
        T x[4];
        decode<4>(x, raw[i / 128], d);
        for (int j = 0; j < 4; ++j) out[j] = square(x[j], transform);
      });
    }
  }
  return warp_sum_by_halving([&](int i, double (&out)[4]) {
    for (int j = 0; j < 4; ++j) out[j] = square_at<T, wide>(work, start + i + j, layouts);
  });
}

// Sums `count` numbers that other blocks wrote, at most 1024.
__device__ inline double warp_sum(const double* x, int64_t count) {
  return warp_sum_by_halving([&](int i, double (&out)[4]) {
    for (int j = 0; j < 4; ++j) out[j] = i + j < count ? __ldcg(x + i + j) : 0.0;
  });
}

// One warp's part in the tree of sums above the tiles, after its block wrote a part's tile sums: of the blocks below a
// node the last to arrive sums the node and goes on to the next; at the root it calls publish(sum), with the sum in
// lane 0. Who does it varies, the order of summation never does.
template <class Publish>
__device__ __forceinline__ void reduce_up(const BlockWork& work, const Tables& tables, const Publish& publish) {
  const DeviceEntry& e = work.entry;
  constexpr int64_t kPartsPerNode = kTile / kTilesPerPart;
  int64_t count = tiles(e.numel), node = work.item / kPartsPerNode;  // sums of this level; the node above them
  int64_t children = work.items - node * kPartsPerNode;
  children = children < kPartsPerNode ? children : kPartsPerNode;
  double* sums = tables.partials + e.partials;
  uint32_t* arrivals = tables.nodes + e.nodes;
  for (;;) {
    uint32_t before = 0;
    if (threadIdx.x % kWarp == 0) {
      __threadfence();
      before = atomicAdd(arrivals + node, 1u);
    }
    before = __shfl_sync(0xffffffffu, before, 0);
    if (before + 1 != children) return;
    __threadfence();
    __syncwarp();  // lane 0's atomic was the first to see the others' sums
    if (threadIdx.x % kWarp == 0) arrivals[node] = 0;
    const int64_t left = count - node * kTile, nodes = tiles(count);
    const double sum = warp_sum(sums + node * kTile, left < kTile ? left : kTile);
    if (nodes == 1) {
      publish(sum);
      return;
    }
    sums += count;
    arrivals += nodes;
    if (threadIdx.x % kWarp == 0) sums[node] = sum;
    const int64_t parent = node / kTile;
    children = nodes - parent * kTile < kTile ? nodes - parent * kTile : kTile;
    node = parent;
    count = nodes;
  }
}

__device__ inline void publish_sum(EntryControl& control, double sum) {
  if (threadIdx.x % kWarp != 0) return;
  control.sums[0] = sum;
  __threadfence();
  atomicExch(&control.ready, 1u);
}

// Waits until the last of the blocks that sum is through. They have lower tickets: they run or have run.
__device__ inline double wait_for_sum(EntryControl& control) {
  while (atomicAdd(&control.ready, 0u) == 0) __nanosleep(100);
  __threadfence();
  return __ldcg(&control.sums[0]);
}

}  // namespace fusedoptim::cuda
