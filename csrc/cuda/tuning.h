// The shape of the CUDA kernels' blocks.
#pragma once

namespace fusedoptim::cuda {

// Blocks of 128 threads, so many to a multiprocessor: five have up to 96 registers, and 80 KB of loads under way where
// a thread has two groups of four operands; an H200 needs about 30. Sums of squares and fp64 get 128 registers.
inline constexpr int kThreads = 128, kWarp = 32, kWarps = kThreads / kWarp;
#if !defined(FUSEDOPTIM_BLOCKS)  // for measurements
#define FUSEDOPTIM_BLOCKS 5
#endif
inline constexpr int kBlocksPerSM = FUSEDOPTIM_BLOCKS, kWideBlocksPerSM = 4;

}  // namespace fusedoptim::cuda
