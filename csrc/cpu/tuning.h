// Sizes that were measured (python -m benchmarks.run): costs are in elements of a plain fp32 pass.
#pragma once

#include <cstdint>

namespace fusedoptim::tuning {

// A step of less than this is over before a second thread has woken up.
inline constexpr int64_t kSerialCost = 16384;
// Releasing the interpreter and taking it back costs more than such a step.
inline constexpr int64_t kReleaseCost = int64_t{1} << 20;
// What a rule of norms sums before it updates: 8 MiB of fp32 gradients, which stay in the cache.
inline constexpr int64_t kWindowElements = int64_t{2} << 20;
// A tensor costs about as much as 128 elements whatever its size; elements that lie apart cost more.
inline constexpr int64_t kTensorCost = 128, kStridedFactor = 16;
// Chunks of 64 K elements instead of 1 M cost 3 % on large tensors: each begins with cold pages.
inline constexpr int64_t kMinChunk = 4096, kMaxChunk = int64_t{1} << 20, kChunksPerThread = 8;
// A tensor of up to kSmall elements is asked for, kPrefetchBytes of each operand, while the one kAhead before it is
// updated.
inline constexpr int64_t kSmall = 4096, kAhead = 4, kPrefetchBytes = 256;

// Of the loop over tiles: 16 KiB of buffers and random words for AdamW with a bf16 parameter and states in blocks.
// Tiles of half as many cost 4 % more.
inline constexpr int64_t kTileElements = 1024;

}  // namespace fusedoptim::tuning
