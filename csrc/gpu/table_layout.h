// Offsets and constants of the tables by name, for kernels in other languages.
#pragma once

#include <cctype>
#include <cstddef>
#include <map>
#include <string>

#include "../core/block.h"
#include "../core/row.h"
#include "../core/storage_names.h"
#include "table.h"

namespace fusedoptim::gpu {

// As a constant's name in Python.
inline std::string upper(std::string name) {
  for (char& c : name) c = static_cast<char>(std::toupper(c));
  return name;
}

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
      {"HEADER_PARTIALS_STRIDE", tables(offsetof(Tables, partials_stride))},
      {"HEADER_SUMS", tables(offsetof(Tables, sums))},
      {"HEADER_SUMS_STRIDE", tables(offsetof(Tables, sums_stride))},
      {"HEADER_GRADS", offsetof(StepHeader, grads)},
      {"HEADER_ROWS", offsetof(StepHeader, rows)},
      {"HEADER_FOUND_INF", offsetof(StepHeader, found_inf)},
      {"HEADER_GRAD_SCALE", offsetof(StepHeader, grad_scale)},
      {"HEADER_NORM_STATS", offsetof(StepHeader, norm_stats)},
      {"HEADER_FLAGS", offsetof(StepHeader, flags)},
      {"HEADER_ENTRY_COUNT", offsetof(StepHeader, entries)},
      {"HEADER_TENSORS", offsetof(StepHeader, tensors)},
      {"HEADER_SUM", offsetof(StepHeader, sum)},
      {"HEADER_CHUNK", offsetof(StepHeader, chunk)},
      {"HEADER_ROW_WORDS", offsetof(StepHeader, row_words)},
      {"ENTRY_BYTES", sizeof(TableEntry)},
      {"ENTRY_OPERANDS", offsetof(DeviceEntry, operand)},
      {"OPERAND_BYTES", sizeof(Addresses)},
      {"OPERAND_DATA", offsetof(Addresses, data)},
      {"OPERAND_EXTRA", offsetof(Addresses, extra)},
      {"ENTRY_ID", offsetof(DeviceEntry, id)},
      {"ENTRY_FIRST_INDEX", offsetof(DeviceEntry, first_index)},
      {"ENTRY_STEP", offsetof(DeviceEntry, step)},
      {"ENTRY_NUMBERS", offsetof(DeviceEntry, number)},
      {"ENTRY_ROW", offsetof(DeviceEntry, row)},
      {"ENTRY_NUMEL", offsetof(DeviceEntry, numel)},
      {"ENTRY_WHOLE_NUMEL", offsetof(TableEntry, whole_numel)},
      {"ENTRY_LAYOUT", offsetof(DeviceEntry, layout)},
      {"ENTRY_SUM_LAYOUT", offsetof(DeviceEntry, sum_layout)},
      {"ENTRY_PARTIALS", offsetof(DeviceEntry, partials)},
      {"ENTRY_NODES", offsetof(DeviceEntry, nodes)},
      {"ENTRY_GROUP", offsetof(DeviceEntry, group)},
      {"ENTRY_KIND", offsetof(DeviceEntry, kind_index)},
      {"CONTROL_BYTES", sizeof(EntryControl)},
      {"CONTROL_ARRIVALS", offsetof(EntryControl, arrivals)},
      {"CONTROL_READY", offsetof(EntryControl, ready)},
      {"CONTROL_SUMS", offsetof(EntryControl, sums)},
      {"LAUNCH_TICKETS", offsetof(LaunchControl, tickets)},
      {"LAUNCH_FINISHED", offsetof(LaunchControl, finished)},
      {"LAUNCH_SUMMED", offsetof(LaunchControl, summed)},
      {"STATS_NORM", offsetof(NormStats, norm)},
      {"STATS_SKIPPED", offsetof(NormStats, skipped)},
      {"SEGMENT_BYTES", sizeof(Segment)},
      {"SEGMENT_WORK", offsetof(Segment, work)},
      {"LAYOUT_WORDS_PER_DIM", kLayoutWordsPerDim},
      {"LR_ON_DEVICE", kLrOnDevice},
      {"LR", kLr},
      {"LR_DTYPE", kLrDType},
      {"SKIP_NONFINITE", kSkipNonfinite},
      {"ZERO_GRAD", kZeroGrad},
      {"NORM_IN_F64", kNormInF64},
      {"TRANSFORMED", kTransformed},
      {"REDUCES", kReduces},
      {"SUMS_GIVEN", kSumsGiven},
      {"OPERANDS", kOperands},
      {"INDEX", kIndex},
      {"PARAM", kParam},
      {"GRAD", kGrad},
      {"FIRST_STATE", kFirstState},
      {"MAX_SLOTS", kMaxSlots},
      {"AVERAGE", kAverage},
      {"MAX_NUMBERS", kMaxNumbers},
      {"MAX_SUMS", kMaxSums},
      {"BLOCK", kBlock},
      {"TILE", kTile},
      {"PART", kPart},
  };
  std::map<std::string, int64_t> out(offsets.begin(), offsets.end());
  out["ADDRESS"] = static_cast<int64_t>(kAddress);
  out["FIRST"] = static_cast<int64_t>(kFirst);
  for (const auto& [name, work] : {std::pair{"SUM", Work::sum}, {"APPLY", Work::apply}})
    out[std::string("WORK_") + name] = static_cast<int64_t>(work);
  for (const auto& [name, d] :
       {std::pair{"F32", DType::f32}, {"F64", DType::f64}, {"BF16", DType::bf16}, {"F16", DType::f16}})
    out[std::string("LR_") + name] = static_cast<int64_t>(lr_dtype_of(d));
  for (const auto& [name, s] : storage_names()) out[upper(name)] = static_cast<int64_t>(s);
  for (int k = 0; k < kOptions; ++k) out[upper(kOptionKeys[k])] = kFirstOption + k;
  return out;
}

}  // namespace fusedoptim::gpu
