// What the host hands to a kernel on a GPU: tables in device memory, written when something changed, and arguments that
// travel by value with every launch, or for Triton through a table as well. Plain structs, the same for the C++
// compiler and nvcc; Triton kernels get their offsets from table_layout.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../core/operand.h"
#include "../core/row.h"
#include "../core/sum_of_squares.h"
#include "../core/transforms.h"

namespace fusedoptim::gpu {

// A rule that needs a norm works in parts of this many elements, both when it sums and when it updates; a tensor of one
// part is done by one block, without waiting.
inline constexpr int64_t kTilesPerPart = 16, kPart = kTilesPerPart * kTile;

// What code a tensor needs.
struct Kind {
  Storage storage[kOperands];  // the gradient's included, whose address comes with every step
  DType step_dtype;
  uint8_t variant;
  uint8_t uses;  // bit k: state k belongs to the variant, the moving average included

  bool operator<(const Kind& other) const { return std::memcmp(this, &other, sizeof(Kind)) < 0; }
};
static_assert(sizeof(Kind) == kOperands + 3, "compared byte by byte");

// Where an operand is, as Operand has it.
struct Addresses {
  void *data, *extra;
};

// A tensor, as kernels copy it. It changes when memory, storages or layouts do, not from step to step. The storages
// stand side by side in its kind, so that a kernel has all of them in two registers.
struct DeviceEntry {
  Addresses operand[kOperands];  // but for the gradient's
  void* step;                    // 0-dim, fp32 or fp64; null for a rule without a step
  uint64_t id;                   // of the parameter, for its random bits
  int64_t first_index;           // of its first element, in the whole tensor
  int64_t row;                   // elements in one row of what is stored in blocks; 0 where nothing is
  int64_t numel;
  int64_t layout;      // where its layout starts in Tables::layouts; -1: all operands share one dense memory order
  int64_t sum_layout;  // the same for sums; -1: all lie in logical order
  int64_t partials;    // where its tile sums start in Tables::partials
  alignas(8) Kind kind;
  int32_t kind_index;  // which of those that its kernel was made ready for
  int32_t nodes;       // where its arrival counters start in Tables::nodes
  int32_t group;
  float* number;  // the first of the rule's states that are one; null for one that its group does without
};
// And what only rules read that are compiled later: to copy it would cost the built-in ones registers.
struct TableEntry {
  DeviceEntry entry;
  float* more_numbers[kMaxNumbers - 1];
  int64_t whole_numel;  // of the whole tensor that this one may be a shard of
};
static_assert(offsetof(TableEntry, more_numbers) == offsetof(DeviceEntry, number) + sizeof(float*));

// A layout, in words: the number of dimensions, then for each, the innermost first, its size and the stride of each
// operand, and of the index, in elements.
inline constexpr int kLayoutWordsPerDim = 1 + kStrides;

// What blocks tell each other about a tensor. All zero between steps.
struct EntryControl {
  uint32_t arrivals;  // blocks that have read the step and the other scalars
  uint32_t ready;     // the sums of squares are in
  double sums[kMaxSums];
};
struct LaunchControl {
  uint32_t tickets, finished;
  uint32_t summed;  // tensors whose sum of squares for the norm of all gradients is in
};

// Items of work follow each other in segments; a table has the segment of each item.
enum class Work : int32_t {
  update,     // a chunk of an elementwise update
  sum,        // a part's tile sums
  apply,      // a part's update, once all sums are in
  sum_apply,  // both, for a tensor of one part
};
struct Segment {
  int32_t entry;
  Work work;
};

// All pointers are to device memory.
struct Tables {
  const TableEntry* entries;
  const uint32_t* segment_of;  // of each item
  const uint32_t* first_item;  // of each segment, and the total
  const Segment* segments;
  const int64_t* layouts;
  EntryControl* control;
  LaunchControl* launch;
  uint32_t* nodes;
  double* partials;  // of a rule's first sum; of its second `partials_stride` further on
  double* sums;      // of squares, for each entry, in rows: see StepTable
  int64_t partials_stride, sums_stride;
};

// A gradient's address, with flags in bits that no address uses. A word of 0: no gradient, no update. kFirst: its
// states count as absent in this step.
inline constexpr uint64_t kActive = uint64_t{1} << 63, kFirst = uint64_t{1} << 62, kAddress = kFirst - 1;

// Flags of a step.
inline constexpr int32_t kSkipNonfinite = 1, kZeroGrad = 2, kNormInF64 = 4;
// The launch may begin while the one before, of norms, still runs: its blocks wait for that themselves.
inline constexpr int32_t kOverlap = 8;
// Of a launch that measures: the gradients are those that the rule gets; its last block makes the norm of the sums.
inline constexpr int32_t kTransformed = 16, kReduces = 32;
// Of one that updates by a rule of norms: the sums are there already.
inline constexpr int32_t kSumsGiven = 64;

// Kernel arguments may have 32,764 bytes from CUDA 12.1 on.
inline constexpr int64_t kArgumentBytes = 32760;

struct StepHeader {
  Tables tables;
  const uint64_t* grads;    // one word per entry; null: they are in `words`
  const uint64_t* rows;     // hyper-parameters, row_words per group; null: they are in `words`
  const float* found_inf;   // not 0: nothing is to be changed. May be null
  const float* grad_scale;  // gradients are divided by it. May be null
  NormStats* norm_stats;    // of all gradients: written by what reduces, read by what updates
  int64_t chunk;            // elements per item of Work::update
  uint32_t items;
  int32_t row_words, inline_grads, inline_rows;  // the last two: where they start in `words`
  int32_t flags, entries, tensors;               // tensors: how many entries have sums
  int32_t sum;                                   // of a launch that measures: which row of sums it writes
};
inline constexpr int64_t kInlineWords = (kArgumentBytes - static_cast<int64_t>(sizeof(StepHeader))) / 8;

struct StepArgs : StepHeader {
  uint64_t words[kInlineWords];
};
static_assert(sizeof(StepArgs) <= kArgumentBytes);

// Data that travels by value, to be written to device memory.
inline constexpr int64_t kWriteWords = (kArgumentBytes - 16) / 8;
struct WriteArgs {
  uint64_t* to;
  int64_t count;
  uint64_t words[kWriteWords];
};

}  // namespace fusedoptim::gpu
