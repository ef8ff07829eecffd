// What the executor asks of a device: memory, copies, launches. The compiled kernels and those of Triton each have one.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../rules/rule_handle.h"
#include "table.h"

namespace fusedoptim::gpu {

// Memory on the device, kept as long as any copy of this lives. It goes back to the stream that it was allocated on
// once all streams that it was used on are through with it.
struct Memory {
  std::shared_ptr<void> owner;
  char* address = nullptr;
  void* stream = nullptr;        // of its allocation
  std::vector<void*> elsewhere;  // other streams that are known to use it
  char* at(int64_t offset) const { return address ? address + offset : nullptr; }
};

// What a launch does: sums squares; makes the norm of all gradients of the sums; updates by a rule.
enum class Purpose { measure, reduce, update };

// A kernel that is ready to be launched, as its device knows it.
using Program = std::shared_ptr<const void>;

// Functions throw, having launched and copied nothing.
class Device {
 public:
  virtual ~Device() = default;
  // Whether kernels take their arguments, with gradients and hyper-parameters, by value. Otherwise they take the
  // address of a StepHeader in device memory, and all words are in tables.
  virtual bool by_value() const = 0;
  virtual Memory allocate(int64_t bytes) = 0;
  // Says that a stream other than the one of its allocation works with the memory.
  virtual void used_on(const Memory& memory, void* stream) = 0;
  // Copies host memory to the device in the stream's order, and has read it when it returns.
  virtual void upload(const Memory& to, int64_t offset, const void* from, int64_t bytes, void* stream) = 0;
  // The same for a step that is being captured: a replay copies the same values again.
  virtual void write(const Memory& to, const void* from, int64_t bytes, void* stream) = 0;
  virtual bool capturing(void* stream) = 0;
  virtual int64_t l2_bytes() = 0;
  virtual int64_t multiprocessors() = 0;
  // Makes ready for launches on entries of these kinds, so that only the device itself can make one fail. wide: there
  // may be operands of 64 bits. The rule does not matter to what measures and reduces.
  virtual Program prepare(Purpose purpose, const RuleHandle& rule, bool wide, const std::vector<Kind>& kinds) = 0;
  // header is null if arguments go by value. overlaps: see kOverlap.
  virtual void launch(const Program& program, uint32_t blocks, const StepArgs& args, const StepHeader* header,
                      bool overlaps, void* stream) = 0;
};

}  // namespace fusedoptim::gpu
