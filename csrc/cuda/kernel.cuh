// The kernels: a block finds its work, works out its scalars and updates its range. Grids are one-dimensional, blocks
// have kThreads threads.
#pragma once

#include "../core/step_count.h"
#include "norm.cuh"
#include "stored_update.cuh"
#include "update.cuh"

namespace fusedoptim::cuda {

// Called by the block's first warp; fills `work` except for its transforms. False if there is nothing to update.
__device__ inline bool find_work(BlockWork& work, const StepArgs& args, uint32_t item) {
  const Tables& t = args.tables;
  const uint32_t s = t.segment_of[item];
  const Segment segment = t.segments[s];
  const uint64_t* grads = args.grads ? args.grads : args.words + args.inline_grads;
  const uint64_t grad = grads[segment.entry];
  if (threadIdx.x == 0) {
    work.index = segment.entry;
    work.work = segment.work;
    work.entry = t.entries[segment.entry].entry;
    work.first = (grad & kFirst) != 0;
    work.entry.operand[kGrad].data = reinterpret_cast<void*>(static_cast<uintptr_t>(grad & kAddress));
    work.items = t.first_item[s + 1] - t.first_item[s];
    work.item = item - t.first_item[s];
    // The update goes backwards: what was read last is still in the cache.
    if (segment.work == Work::apply) work.item = work.items - 1 - work.item;
    const int64_t size = segment.work == Work::update ? args.chunk : kPart;
    work.begin = work.item * size;
    work.end = work.begin + size < work.entry.numel ? work.begin + size : work.entry.numel;
  }
  return grad != 0;
}

__device__ inline const uint64_t* row_of(const StepArgs& args, int32_t group) {
  const uint64_t* rows = args.rows ? args.rows : args.words + args.inline_rows;
  return rows + static_cast<int64_t>(group) * args.row_words;
}

__device__ inline double hyper_of(const uint64_t* row, int k) {
  const uint64_t word = row[k];  // copied from the row itself, it would be read byte by byte
  double x;
  memcpy(&x, &word, 8);
  return x;
}

// What surrounds the rule for a tensor of this group.
__device__ inline GroupTransforms transforms_of(const StepArgs& args, int32_t group) {
  const uint64_t* row = row_of(args, group);
  const GroupOptions options{hyper_of(row, kMaxGradNorm), hyper_of(row, kClipGradValue), hyper_of(row, kEmaDecay)};
  const double norm = options.max_grad_norm >= 0 ? args.norm_stats->norm : 0;  // half a microsecond
  return GroupTransforms::of(options, unscale_by(args.grad_scale), norm, (args.flags & kNormInF64) != 0,
                             (args.flags & kZeroGrad) != 0);
}

// The launch before is through, and what it wrote can be seen.
__device__ inline void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether nothing is to be updated in this step.
__device__ inline bool is_skipped(const StepArgs& args) {
  if (args.found_inf && *args.found_inf != 0) return true;
  return (args.flags & kSkipNonfinite) && !is_finite(args.norm_stats->norm);
}

// What a step makes of a tensor's numbers.
struct Progress {
  double step;
  float number;  // of a rule with one
};

// The first warp's work: the scalars of the block's tensor, which lane 0 writes. Returns what they were made from.
// Powers are the longest part of it by far, up to a microsecond each: each has a lane of its own.
template <class Rule, class T, bool stored>
__device__ __noinline__ Progress prepare_scalars(typename Rule::template Scalars<T>& scalars, BlockWork& work,
                                                 const StepArgs& args, double sum_of_squares) {
  const DeviceEntry& e = work.entry;
  const uint64_t* row = row_of(args, e.group);
  double hyper[Rule::kHypers];
  for (int k = 0; k < Rule::kHypers; ++k) hyper[k] = hyper_of(row, k);
  if (hyper[kLrDType] >= kLrOnDevice) {
    hyper[kLrDType] -= kLrOnDevice;
    const DType d = dtype_of(static_cast<LrDType>(static_cast<int>(hyper[kLrDType])));
    hyper[kLr] = load_element<double>(reinterpret_cast<const void*>(static_cast<uintptr_t>(row[kLr])), d, 0);
  }
  const double step = next_step(e.step, e.kind.step_dtype);
  if constexpr (stored) {
    if (threadIdx.x < kWords && work.is_stochastic())
      work.random.prepare(threadIdx.x, static_cast<uint64_t>(hyper_of(row, kRoundingSeed)), e, step, work.begin);
  }
  PowMemo pow;
  if constexpr (Rule::powers > 0) {
    const int lane = threadIdx.x % kWarp;
    const double base = Rule::power_base(hyper, lane < Rule::powers ? lane : 0), result = power(base, step);
    for (int k = 0; k < Rule::powers; ++k) {
      pow.base[k] = __shfl_sync(0xffffffffu, base, k);
      pow.result[k] = __shfl_sync(0xffffffffu, result, k);
      pow.exponent[k] = step;
    }
  }
  static_assert(Rule::kNumbers <= 1 && Rule::sums <= 1);
  float number = 0;
  if constexpr (Rule::kNumbers == 1) number = *e.number;
  // None of these rules asks for the number of elements.
  const StepInputs in{hyper, step, work.first, &sum_of_squares, &number, 0, &pow};
  if (threadIdx.x == 0) scalars = Rule::template prepare<T>(in);
  float next = 0;
  if constexpr (Rule::kNumbers == 1) Rule::next_numbers(in, &next);
  return {step, next};
}

// The entry's own variant of the rule.
template <class Rule, class T, bool wide, bool stored, int variant = 0>
__device__ __forceinline__ void update_variant(const BlockWork& work, const typename Rule::template Scalars<T>& scalars,
                                               const int64_t* layouts) {
  if constexpr (variant < Rule::variants) {
    if (work.entry.kind.variant != variant)
      update_variant<Rule, T, wide, stored, variant + 1>(work, scalars, layouts);
    else if constexpr (stored)
      update_stored_range<Rule, variant, T, wide>(work, scalars, layouts);
    else
      update_range<Rule, variant, T, wide>(work, scalars, layouts);
  }
}

// One thread's work, after its block has read the step and the average: the last block of the tensor to get here stores
// the new ones.
template <class Rule, bool stored>
__device__ __forceinline__ void arrive(const BlockWork& work, const StepArgs& args, Progress progress) {
  if constexpr (!Rule::has_step && Rule::kNumbers == 0 && Rule::sums == 0 && !stored)
    return;  // what rounds stochastically counts steps
  const DeviceEntry& e = work.entry;
  EntryControl& control = args.tables.control[work.index];
  const uint32_t blocks = static_cast<uint32_t>(work.items);
  if (blocks > 1) {
    __threadfence();
    if (atomicAdd(&control.arrivals, 1u) + 1 != blocks) return;
    __threadfence();
    control.arrivals = 0;
  }
  if constexpr (Rule::sums > 0) control.ready = 0;
  store_step(e.step, e.kind.step_dtype, progress.step);
  if constexpr (Rule::kNumbers == 1) *e.number = progress.number;
}

template <class Rule, class T, bool wide, bool stored>
__device__ __forceinline__ void prepare_and_update(BlockWork& work, const StepArgs& args, double sum_of_squares) {
  __shared__ typename Rule::template Scalars<T> scalars;
  Progress progress;
  if (threadIdx.x < kWarp) progress = prepare_scalars<Rule, T, stored>(scalars, work, args, sum_of_squares);
  __syncthreads();
  // Behind the barrier, so that the other warps need not wait for it.
  if (threadIdx.x == 0) arrive<Rule, stored>(work, args, progress);
  update_variant<Rule, T, wide, stored>(work, scalars, args.tables.layouts);
}

template <class Rule, bool wide, bool stored>
__device__ __forceinline__ void prepare_and_update(BlockWork& work, const StepArgs& args, double sum_of_squares) {
  if constexpr (wide) {
    if (work.computes_in_f64()) {
      prepare_and_update<Rule, double, wide, stored>(work, args, sum_of_squares);
      return;
    }
  }
  prepare_and_update<Rule, float, wide, stored>(work, args, sum_of_squares);
}

// Sums the tiles of a part, each by a warp, and leaves the sums at `out`, tile by tile.
template <bool wide>
__device__ __forceinline__ void sum_tiles(const BlockWork& work, const int64_t* layouts, double* out) {
  const int64_t first = work.item * kTilesPerPart, left = tiles(work.entry.numel) - first;
  const int count = static_cast<int>(left < kTilesPerPart ? left : kTilesPerPart);
  for (int k = threadIdx.x / kWarp; k < count; k += kWarps) {
    double sum;
    if (wide && work.computes_in_f64())
      sum = warp_tile_sum<double, wide>(work, first + k, layouts);
    else
      sum = warp_tile_sum<float, wide>(work, first + k, layouts);
    if (threadIdx.x % kWarp == 0) out[k] = sum;
  }
}

// The sum of squares of a tensor of one part, for the block's first warp: in lane 0.
__device__ inline double sum_of_part(const BlockWork& work, const double* sums) {
  const int count = static_cast<int>(tiles(work.entry.numel));
  return warp_sum_by_halving([&](int i, double (&out)[4]) {
    for (int j = 0; j < 4; ++j) out[j] = i + j < count ? sums[(i + j) % kTilesPerPart] : 0.0;
  });
}

// An elementwise rule. wide: some operands may have 64 bits. stored: some storages may be no dtypes.
template <class Rule, bool wide, bool stored>
__global__ void __launch_bounds__(kThreads, wide ? kWideBlocksPerSM : kBlocksPerSM)
    step_kernel(const __grid_constant__ StepArgs args) {
  __shared__ BlockWork work;
  if (args.flags & kOverlap) wait_for_launch_before();
  const bool skip = is_skipped(args);
  if (skip && !(args.flags & kZeroGrad)) return;
  if (threadIdx.x < kWarp) {
    const bool any = find_work(work, args, blockIdx.x);
    if (threadIdx.x == 0) {
      work.set_transforms(transforms_of(args, work.entry.group));
      if (!any) work.items = 0;
    }
  }
  __syncthreads();
  if (work.items == 0) return;
  if (skip)
    zero_gradient<wide>(work, args.tables.layouts);
  else
    prepare_and_update<Rule, wide, stored>(work, args, 0.0);
}

// A rule that needs the gradient's norm first. Blocks take tickets, so that what a block waits for has begun already.
template <class Rule, bool wide, bool stored>
__global__ void __launch_bounds__(kThreads, kWideBlocksPerSM) norm_step_kernel(const __grid_constant__ StepArgs args) {
  __shared__ BlockWork work;
  __shared__ double sums[kTilesPerPart];
  __shared__ double sum_of_squares;
  if (args.flags & kOverlap) wait_for_launch_before();
  const bool skip = is_skipped(args);
  if (skip && !(args.flags & kZeroGrad)) return;
  if (threadIdx.x < kWarp) {
    uint32_t ticket = blockIdx.x;
    if (!skip) {
      if (threadIdx.x == 0) ticket = atomicAdd(&args.tables.launch->tickets, 1u);
      ticket = __shfl_sync(0xffffffffu, ticket, 0);
      // Only two launches at once that share their counters get here, as of two captured steps: see NOTES.md.
      if (ticket >= args.items) __trap();
    }
    const bool any = find_work(work, args, ticket);
    if (threadIdx.x == 0) {
      work.set_transforms(transforms_of(args, work.entry.group));
      if (!any) work.items = 0;
    }
  }
  __syncthreads();
  const Tables& t = args.tables;
  if (skip) {
    if (work.items != 0 && work.work != Work::sum) zero_gradient<wide>(work, t.layouts);
    return;
  }
  if (work.items != 0) {
    const bool given = (args.flags & kSumsGiven) != 0;
    if (work.work == Work::sum && !given) {
      sum_tiles<wide>(work, t.layouts, t.partials + work.entry.partials + work.item * kTilesPerPart);
      __syncthreads();
      if (threadIdx.x < kWarp) reduce_up(work, t, [&](double sum) { publish_sum(t.control[work.index], sum); });
    } else if (work.work != Work::sum) {
      if (given) {
        if (threadIdx.x == 0) sum_of_squares = t.sums[work.index];
      } else if (work.work == Work::sum_apply) {
        sum_tiles<wide>(work, t.layouts, sums);
        __syncthreads();
        if (threadIdx.x < kWarp) {
          const double sum = sum_of_part(work, sums);
          if (threadIdx.x == 0) sum_of_squares = sum;
        }
      } else if (threadIdx.x == 0) {
        sum_of_squares = wait_for_sum(t.control[work.index]);
      }
      __syncthreads();
      prepare_and_update<Rule, wide, stored>(work, args, sum_of_squares);
    }
  }
  // The last block leaves the counters as it found them.
  if (threadIdx.x == 0 && atomicAdd(&t.launch->finished, 1u) + 1 == gridDim.x) {
    t.launch->tickets = 0;
    t.launch->finished = 0;
  }
}

// One warp's work: makes the norm of all gradients of the sums, added in the order of the parameters, for the launch
// that updates.
__device__ inline void reduce_sums(const StepArgs& args) {
  const int lane = threadIdx.x % kWarp;
  double total = 0;
  for (int32_t first = 0; first < args.entries; first += kWarp) {
    const double x = first + lane < args.entries ? __ldcg(args.tables.sums + first + lane) : 0.0;
    for (int k = 0; k < kWarp; ++k) total += __shfl_sync(0xffffffffu, x, k);
  }
  if (lane != 0) return;
  const double norm = norm_of(total, (args.flags & kNormInF64) != 0);
  args.norm_stats->norm = norm;
  if ((args.flags & kSkipNonfinite) && !is_finite(norm)) args.norm_stats->skipped += 1;
}

// One warp's work, with a tensor's sum of squares in lane 0. The last to come reduces, if this launch is to.
__device__ inline void leave_sum(const StepArgs& args, int32_t index, double sum) {
  const Tables& t = args.tables;
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) t.sums[index] = sum;
  if (!(args.flags & kReduces)) return;
  uint32_t before = 0;
  if (lane == 0) {
    __threadfence();
    before = atomicAdd(&t.launch->summed, 1u);
  }
  before = __shfl_sync(0xffffffffu, before, 0);
  if (before + 1 != static_cast<uint32_t>(args.tensors)) return;
  __threadfence();
  __syncwarp();  // lane 0's atomic was the first to see the others' sums
  reduce_sums(args);
  if (lane == 0) t.launch->summed = 0;
}

// The sum of squares of every gradient.
template <bool wide>
__global__ void __launch_bounds__(kThreads, kWideBlocksPerSM) measure_kernel(const __grid_constant__ StepArgs args) {
  __shared__ BlockWork work;
  __shared__ double sums[kTilesPerPart];
  if (threadIdx.x < kWarp) {
    const bool any = find_work(work, args, blockIdx.x);
    if (threadIdx.x == 0) {
      work.set_transforms((args.flags & kTransformed) ? transforms_of(args, work.entry.group)
                                                      : GroupTransforms::unscaled(unscale_by(args.grad_scale)));
      if (!any) work.items = work.item == 0 ? 0 : -1;
    }
  }
  __syncthreads();
  const Tables& t = args.tables;
  if (work.items <= 0) {  // no gradient: one of its blocks tells so
    if (work.items == 0 && threadIdx.x < kWarp) leave_sum(args, work.index, 0.0);
    return;
  }
  const bool one_part = work.items == 1;
  sum_tiles<wide>(work, t.layouts, one_part ? sums : t.partials + work.entry.partials + work.item * kTilesPerPart);
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  if (one_part)
    leave_sum(args, work.index, sum_of_part(work, sums));
  else
    reduce_up(work, t, [&](double sum) { leave_sum(args, work.index, sum); });
}

// One block.
static __global__ void reduce_kernel(const __grid_constant__ StepArgs args) {
  if (threadIdx.x < kWarp) reduce_sums(args);
}

// Writes data that travels in the arguments, so that a captured graph holds it.
static __global__ void write_kernel(const __grid_constant__ WriteArgs args) {
  for (int64_t i = threadIdx.x; i < args.count; i += kThreads) args.to[i] = args.words[i];
}

}  // namespace fusedoptim::cuda
