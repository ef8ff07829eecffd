// The addresses of tensors that a plan keeps, checked at every step: a tensor object can be given other memory
// (.data =, set_, resize_, share_memory_, FSDP) without becoming another object.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "prefetch.h"

namespace fusedoptim {

class AddressBook {
 public:
  // Returns the tensor's address.
  void* add(const torch::stable::Tensor& t) {
    tensors_.push_back(t);
    items_.push_back({t.get(), t.mutable_data_ptr(), t.numel(), tensor_memory(t.get())});
    return items_.back().data;
  }

  // True if every tensor still has the address and number of elements that it was added with. Touches no Python
  // object, so that any thread may call it.
  bool unchanged() const {
    const size_t n = items_.size();
    for (size_t i = 0; i < n; ++i) {
      if (i + kFar < n) {
        __builtin_prefetch(items_[i + kFar].handle);
        prefetch_tensor(items_[i + kFar].memory);
      }
      if (i + kNear < n) prefetch_storage(items_[i + kNear].memory);
      void* data = nullptr;
      int64_t numel = 0;
      if (aoti_torch_get_data_ptr(items_[i].handle, &data) != 0 || data != items_[i].data) return false;
      if (aoti_torch_get_numel(items_[i].handle, &numel) != 0 || numel != items_[i].numel) return false;
    }
    return true;
  }

 private:
  struct Item {
    AtenTensorHandle handle;
    void* data;
    int64_t numel;
    const char* memory;
  };
  static constexpr size_t kFar = 24, kNear = 12;

  std::vector<torch::stable::Tensor> tensors_;
  std::vector<Item> items_;
};

}  // namespace fusedoptim
