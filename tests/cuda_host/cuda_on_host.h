// Just enough of CUDA to compile and run csrc/cuda on the host, for tests: blocks one after the other, in shuffled
// order; the threads of a block as fibers that give way at barriers and warp-wide operations, in shuffled order as
// well, so that a missing barrier shows. Device memory is memory. Included before everything else (g++ -include).
#pragma once

#undef _FORTIFY_SOURCE  // which takes a jump to another stack for an error

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define CUDA_ON_HOST_ASAN 1
#endif

#define FUSEDOPTIM_CUDA_ON_HOST 1
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
// To inline all takes the compiler twice as long, and no test is faster for it.
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))

struct Index3 {
  unsigned x;
};
inline Index3 threadIdx, blockIdx, gridDim;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace cuda_on_host {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = size_t{256} << 10;

// A place where a group of threads meets, again and again.
struct Meeting {
  int members = 0, arrived = 0;
  unsigned generation = 0;
};

// Goes through one block after the other. A switch by setjmp takes a tenth of one by swapcontext, which asks the system
// for the signal mask; the address sanitizer knows swapcontext alone.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  bool begun = false, done = true;
};

class Block {
 public:
  static Block& current() {
    static Block block;
    return block;
  }

  void run(int threads, const std::function<void()>& body) {
    body_ = &body;
    while (static_cast<int>(fibers_.size()) < threads) {
      Fiber f;
      f.stack = static_cast<char*>(
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (f.stack == MAP_FAILED) fail("no memory for stacks");
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack;
      f.context.uc_stack.ss_size = kStackBytes;
      f.context.uc_link = nullptr;
      fibers_.push_back(f);
      makecontext(&fibers_.back().context, &Block::enter, 0);
    }
    block_ = Meeting{threads, 0, 0};
    warps_.assign((threads + kWarpSize - 1) / kWarpSize, Meeting{});
    slots_.assign(warps_.size(), {});
    std::vector<int> order(threads);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
    for (int t = 0; t < threads; ++t) {
      ++warps_[t / kWarpSize].members;
      fibers_[t].done = false;
    }
    for (int left = threads; left > 0;) {
      moved_ = false;
      for (int t : order) {
        if (fibers_[t].done) continue;
        running_ = t;
        threadIdx.x = static_cast<unsigned>(t);
        resume(fibers_[t]);
        if (fibers_[t].done) --left;
      }
      if (!moved_ && left > 0) fail("threads wait for each other forever");
    }
  }

  void sync() { meet(block_); }

  // Every lane of the warp gives a value and sees those of all.
  template <class T, class F>
  auto exchange(T value, const F& read) {
    static_assert(sizeof(T) <= 8);
    const int warp = running_ / kWarpSize, lane = running_ % kWarpSize;
    uint64_t* slot = slots_[warp].value[warps_[warp].generation % 2];
    std::memcpy(slot + lane, &value, sizeof(T));
    meet(warps_[warp]);
    return read([&](int from) {
      T x;
      std::memcpy(&x, slot + from, sizeof(T));
      return x;
    });
  }
  int lane() const { return running_ % kWarpSize; }
  std::mt19937& random() { return random_; }

  [[noreturn]] static void fail(const char* why) {
    std::fprintf(stderr, "CUDA on the host: %s\n", why);
    std::abort();
  }

 private:
  static void enter() {
    Block& b = current();
    finish_switch(nullptr, &b.scheduler_stack_, &b.scheduler_bytes_);
    for (;;) {
      (*b.body_)();
      b.fibers_[b.running_].done = true;
      b.moved_ = true;
      b.leave(b.block_);
      b.leave(b.warps_[b.running_ / kWarpSize]);
      b.yield();
    }
  }
  __noinline__ void resume(Fiber& f) {
#if CUDA_ON_HOST_ASAN
    start_switch(&scheduler_fake_stack_, f.stack, kStackBytes);
    swapcontext(&scheduler_, &f.context);
    finish_switch(scheduler_fake_stack_, nullptr, nullptr);
#else
    if (_setjmp(scheduler_place_)) return;
    if (f.begun) _longjmp(f.place, 1);
    f.begun = true;
    setcontext(&f.context);
#endif
  }
  __noinline__ void yield() {
    Fiber& f = fibers_[running_];
#if CUDA_ON_HOST_ASAN
    start_switch(&f.fake_stack, scheduler_stack_, scheduler_bytes_);
    swapcontext(&f.context, &scheduler_);
    finish_switch(f.fake_stack, &scheduler_stack_, &scheduler_bytes_);
#else
    if (!_setjmp(f.place)) _longjmp(scheduler_place_, 1);
#endif
  }
  void meet(Meeting& m) {
    const unsigned generation = m.generation;
    moved_ = true;
    ++m.arrived;
    open(m);
    while (m.generation == generation) yield();
    moved_ = true;
  }
  // A thread that has returned is not waited for.
  void leave(Meeting& m) {
    --m.members;
    open(m);
  }
  void open(Meeting& m) {
    if (m.arrived < m.members || m.arrived == 0) return;
    m.arrived = 0;
    ++m.generation;
  }
  static void start_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* bottom,
                           [[maybe_unused]] size_t bytes) {
#if CUDA_ON_HOST_ASAN
    __sanitizer_start_switch_fiber(save, bottom, bytes);
#endif
  }
  static void finish_switch([[maybe_unused]] void* saved, [[maybe_unused]] const void** bottom,
                            [[maybe_unused]] size_t* bytes) {
#if CUDA_ON_HOST_ASAN
    __sanitizer_finish_switch_fiber(saved, bottom, bytes);
#endif
  }

  struct Slots {
    uint64_t value[2][kWarpSize];
  };
  std::deque<Fiber> fibers_;  // contexts must not move
  std::vector<Meeting> warps_;
  std::vector<Slots> slots_;
  Meeting block_;
  ucontext_t scheduler_;
  jmp_buf scheduler_place_;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_bytes_ = 0;
  const std::function<void()>* body_ = nullptr;
  int running_ = 0;
  bool moved_ = false;
  std::mt19937 random_{1};
};

inline int64_t launches = 0;
inline int64_t streamed = 0;  // bytes that groups of elements were fetched by
// Only these blocks of a launch run; for tensors too large to go through.
inline unsigned first_block = 0, last_block = ~0u;

inline void launch(unsigned blocks, int threads, const std::function<void()>& body) {
  ++launches;
  gridDim.x = blocks;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), Block::current().random());
  for (unsigned b : order) {
    if (b < first_block || b > last_block) continue;
    blockIdx.x = b;
    Block::current().run(threads, body);
  }
}

inline float with_bits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

// The hardware's approximations are within about one unit in the last place. Which way they err is made up here, from
// the bits of x, but where it would make even the compiler's own division or root wrong, which are known to be right.
inline float off_by_one(float x, float y) { return with_bits(bits_of(y) + (bits_of(x) * 2654435761u >> 30) % 3 - 1); }

inline float approximate_reciprocal(float x) {
  if (std::fpclassify(x) == FP_SUBNORMAL) x = std::copysign(0.0f, x);
  const float y = 1 / x;
  if (std::fpclassify(y) == FP_SUBNORMAL) return std::copysign(0.0f, y);
  if (std::fpclassify(y) != FP_NORMAL) return y;
  const float z = off_by_one(x, y);
  return std::fma(z, std::fma(-x, z, 1.0f), z) == y ? z : y;
}
inline float approximate_rsqrt(float x) {
  if (std::fpclassify(x) == FP_SUBNORMAL) x = std::copysign(0.0f, x);
  const float y = static_cast<float>(1 / std::sqrt(static_cast<double>(x)));
  if (std::fpclassify(y) != FP_NORMAL) return y;
  const float z = off_by_one(x, y), s = x * z;
  return std::fma(std::fma(-s, s, x), 0.5f * z, s) == std::sqrt(x) ? z : y;
}

}  // namespace cuda_on_host

extern "C" __attribute__((visibility("default"), used)) inline int64_t cuda_on_host_launches() {
  return cuda_on_host::launches;
}

extern "C" __attribute__((visibility("default"), used)) inline int64_t cuda_on_host_streamed() {
  return cuda_on_host::streamed;
}

extern "C" __attribute__((visibility("default"), used)) inline void cuda_on_host_only_blocks(unsigned first,
                                                                                             unsigned last) {
  cuda_on_host::first_block = first;
  cuda_on_host::last_block = last;
}

// ---- device functions ----

inline void __syncthreads() { cuda_on_host::Block::current().sync(); }
inline void __syncwarp() {
  cuda_on_host::Block::current().exchange(0, [](const auto& of) { return of(0); });
}
inline void __threadfence() {}
inline void __trap() { cuda_on_host::Block::fail("a block has no work"); }
inline void __nanosleep(unsigned) { cuda_on_host::Block::fail("a block waits for one that has not begun"); }

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return cuda_on_host::Block::current().exchange(value, [&](const auto& of) { return of(from); });
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  auto& block = cuda_on_host::Block::current();
  const int from = block.lane() + delta;
  return block.exchange(value, [&](const auto& of) { return from < cuda_on_host::kWarpSize ? of(from) : value; });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  auto& block = cuda_on_host::Block::current();
  const int from = block.lane() ^ mask;
  return block.exchange(value, [&](const auto& of) { return of(from); });
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  return cuda_on_host::Block::current().exchange(predicate, [](const auto& of) {
    unsigned bits = 0;
    for (int lane = 0; lane < cuda_on_host::kWarpSize; ++lane) bits |= (of(lane) ? 1u : 0u) << lane;
    return bits;
  });
}
inline bool __all_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) == ~0u; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// Vector accesses must be aligned, as on a GPU.
template <class T>
void require_alignment(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) cuda_on_host::Block::fail("misaligned access");
}
template <class T>
T __ldcg(const T* p) {
  require_alignment(p);
  T x;
  std::memcpy(&x, p, sizeof(T));
  return x;
}
template <class T>
T __ldcs(const T* p) {
  cuda_on_host::streamed += sizeof(T);
  return __ldcg(p);
}
template <class T>
void __stcg(T* p, T x) {
  require_alignment(p);
  std::memcpy(p, &x, sizeof(T));
}
template <class T>
void __stcs(T* p, T x) {
  __stcg(p, x);
}
inline uint32_t atomicAdd(uint32_t* p, uint32_t x) {
  const uint32_t before = *p;
  *p += x;
  return before;
}
inline uint32_t atomicExch(uint32_t* p, uint32_t x) {
  const uint32_t before = *p;
  *p = x;
  return before;
}

#include "runtime_on_host.h"
