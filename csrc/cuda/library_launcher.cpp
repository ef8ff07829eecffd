#include "library_launcher.h"

#include <stdexcept>
#include <string>

namespace fusedoptim::cuda {

const Api* api = nullptr;

namespace {

void require(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

}  // namespace

LibraryLauncher::LibraryLauncher(int32_t device, Allocate allocate, UsedOn used_on)
    : device_(device), allocate_(std::move(allocate)), used_on_(std::move(used_on)) {
  if (!api) throw std::runtime_error("the CUDA kernels are not loaded");
}

void LibraryLauncher::upload(const Memory& to, int64_t offset, const void* from, int64_t bytes, void* stream) {
  require(api->upload(device_, to.at(offset), from, bytes, stream));
}

void LibraryLauncher::write(const Memory& to, const void* from, int64_t bytes, void* stream) {
  require(api->write(device_, to.at(0), from, bytes, stream));
}

void LibraryLauncher::step(const Launch& launch, const StepArgs& args, const StepHeader*) {
  require(api->step(device_, launch.rule, launch.mixed, args, launch.blocks, launch.stream));
}

}  // namespace fusedoptim::cuda
