// What the executor asks of a device: memory, copies, launches. The compiled kernels and those of Triton each have one.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "table.h"

namespace fusedoptim::cuda {

// Memory on the device, kept as long as any copy of this lives. It goes back to the stream that it was allocated on
// once all streams that it was used on are through with it.
struct Memory {
  std::shared_ptr<void> owner;
  char* address = nullptr;
  void* stream = nullptr;        // of its allocation
  std::vector<void*> elsewhere;  // other streams that are known to use it
  char* at(int64_t offset) const { return address ? address + offset : nullptr; }
};

struct Launch {
  int rule;
  bool mixed;  // the table may hold operands of 64 bits
  uint32_t blocks;
  // Of the entries, see DeviceEntry; for norms the dtypes of parameter and gradient.
  const std::vector<uint64_t>& kinds;
  void* stream;
};

// Functions throw, having launched and copied nothing.
class Launcher {
 public:
  virtual ~Launcher() = default;
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
  // Makes ready for launches of a rule on such entries, so that only the device itself can make one fail.
  virtual void prepare(int rule, const std::vector<uint64_t>& kinds) = 0;
  // header is null if arguments go by value.
  virtual void step(const Launch& launch, const StepArgs& args, const StepHeader* header) = 0;
};

}  // namespace fusedoptim::cuda
