// Offsets and constants of the tables by name, for kernels in other languages.
#pragma once

#include <cstddef>
#include <map>
#include <string>

#include "table.h"

namespace fusedoptim::cuda {

inline std::map<std::string, int64_t> table_layout() {
  const auto tables = [](size_t offset) { return offset + offsetof(StepHeader, tables); };
  const std::map<std::string, size_t> offsets = {
      {"HEADER_ENTRIES", tables(offsetof(Tables, entries))},
      {"HEADER_SEGMENT_OF", tables(offsetof(Tables, segment_of))},
      {"HEADER_FIRST_ITEM", tables(offsetof(Tables, first_item))},
      {"HEADER_SEGMENTS", tables(offsetof(Tables, segments))},
      {"HEADER_LAYOUTS", tables(offsetof(Tables, layouts))},
      {"HEADER_CONTROL", tables(offsetof(Tables, control))},
      {"HEADER_LAUNCH", tables(offsetof(Tables, launch))},
      {"HEADER_NODES", tables(offsetof(Tables, nodes))},
      {"HEADER_PARTIALS", tables(offsetof(Tables, partials))},
      {"HEADER_SUMS", tables(offsetof(Tables, sums))},
      {"HEADER_GRADS", offsetof(StepHeader, grads)},
      {"HEADER_ROWS", offsetof(StepHeader, rows)},
      {"HEADER_FOUND_INF", offsetof(StepHeader, found_inf)},
      {"HEADER_GRAD_SCALE", offsetof(StepHeader, grad_scale)},
      {"HEADER_NORM_STATS", offsetof(StepHeader, norm_stats)},
      {"HEADER_FLAGS", offsetof(StepHeader, flags)},
      {"HEADER_ENTRY_COUNT", offsetof(StepHeader, entries)},
      {"HEADER_TENSORS", offsetof(StepHeader, tensors)},
      {"HEADER_CHUNK", offsetof(StepHeader, chunk)},
      {"HEADER_ROW_WORDS", offsetof(StepHeader, row_words)},
      {"ENTRY_BYTES", sizeof(DeviceEntry)},
      {"ENTRY_PARAM", offsetof(DeviceEntry, param)},
      {"ENTRY_STATE", offsetof(DeviceEntry, state)},
      {"ENTRY_STEP", offsetof(DeviceEntry, step)},
      {"ENTRY_SCALAR_STATE", offsetof(DeviceEntry, scalar_state)},
      {"ENTRY_NUMEL", offsetof(DeviceEntry, numel)},
      {"ENTRY_LAYOUT", offsetof(DeviceEntry, layout)},
      {"ENTRY_SUM_LAYOUT", offsetof(DeviceEntry, sum_layout)},
      {"ENTRY_PARTIALS", offsetof(DeviceEntry, partials)},
      {"ENTRY_NODES", offsetof(DeviceEntry, nodes)},
      {"ENTRY_GROUP", offsetof(DeviceEntry, group)},
      {"ENTRY_KIND", offsetof(DeviceEntry, param_dtype)},
      {"CONTROL_BYTES", sizeof(EntryControl)},
      {"CONTROL_ARRIVALS", offsetof(EntryControl, arrivals)},
      {"CONTROL_READY", offsetof(EntryControl, ready)},
      {"CONTROL_SUM_OF_SQUARES", offsetof(EntryControl, sum_of_squares)},
      {"LAUNCH_TICKETS", offsetof(LaunchControl, tickets)},
      {"LAUNCH_FINISHED", offsetof(LaunchControl, finished)},
      {"LAUNCH_SUMMED", offsetof(LaunchControl, summed)},
      {"STATS_NORM", offsetof(NormStats, norm)},
      {"STATS_SKIPPED", offsetof(NormStats, skipped)},
      {"SEGMENT_BYTES", sizeof(Segment)},
      {"SEGMENT_WORK", offsetof(Segment, work)},
      {"LAYOUT_WORDS_PER_DIM", kLayoutWordsPerDim},
      {"LR_ON_DEVICE", kLrOnDevice},
      {"MAX_GRAD_NORM", kMaxGradNorm},
      {"CLIP_GRAD_VALUE", kClipGradValue},
      {"EMA_DECAY", kEmaDecay},
      {"FIRST_RULE_HYPER", kFirstRuleHyper},
      {"SKIP_NONFINITE", kSkipNonfinite},
      {"ZERO_GRAD", kZeroGrad},
      {"NORM_IN_F64", kNormInF64},
      {"EMA", kEma},
      {"TILE", kTile},
      {"PART", kPart},
  };
  std::map<std::string, int64_t> out(offsets.begin(), offsets.end());
  out["ADDRESS"] = static_cast<int64_t>(kAddress);
  out["FIRST"] = static_cast<int64_t>(kFirst);
  for (const auto& [name, work] : {std::pair{"UPDATE", Work::update}, {"SUM", Work::sum}, {"APPLY", Work::apply}})
    out[std::string("WORK_") + name] = static_cast<int64_t>(work);
  for (const auto& [name, d] :
       {std::pair{"F32", DType::f32}, {"F64", DType::f64}, {"BF16", DType::bf16}, {"F16", DType::f16}})
    out[name] = static_cast<int64_t>(d);
  return out;
}

}  // namespace fusedoptim::cuda
