// The addresses of tensors that a plan keeps, checked at every step: a tensor object can be given other memory, strides
// or dtype (.data =, set_, resize_, share_memory_, FSDP) without becoming another object.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "prefetch.h"

namespace fusedoptim {

class StorageWatch {
 public:
  // Returns the tensor's address.
  void* add(const torch::stable::Tensor& t) {
    tensors_.push_back(t);
    Item item{t.get(), t.mutable_data_ptr(), tensor_memory(t.get()), 0, 0, shapes_.size()};
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &item.dtype));
    const auto sizes = t.sizes(), strides = t.strides();
    item.ndim = static_cast<int32_t>(strides.size());
    shapes_.insert(shapes_.end(), sizes.begin(), sizes.end());
    shapes_.insert(shapes_.end(), strides.begin(), strides.end());
    items_.push_back(item);
    return item.data;
  }

  // True if every tensor still has the address, sizes, strides and dtype that it was added with. Touches
  // no Python object, so that any thread may call it.
  bool unchanged() const {
    const size_t n = items_.size();
    for (size_t i = 0; i < n; ++i) {
      if (i + kFar < n) {
        __builtin_prefetch(items_[i + kFar].handle);
        prefetch_tensor(items_[i + kFar].memory);
      }
      if (i + kNear < n) prefetch_storage(items_[i + kNear].memory);
      const Item& item = items_[i];
      void* data = nullptr;
      int64_t ndim = 0, *sizes = nullptr, *strides = nullptr;
      int32_t dtype = 0;
      if (aoti_torch_get_data_ptr(item.handle, &data) != 0 || data != item.data) return false;
      if (aoti_torch_get_dtype(item.handle, &dtype) != 0 || dtype != item.dtype) return false;
      if (aoti_torch_get_dim(item.handle, &ndim) != 0 || ndim != item.ndim) return false;
      if (ndim == 0) continue;
      if (aoti_torch_get_sizes(item.handle, &sizes) != 0) return false;
      if (aoti_torch_get_strides(item.handle, &strides) != 0) return false;
      for (int64_t d = 0; d < ndim; ++d)
        if (sizes[d] != shapes_[item.shape + d] || strides[d] != shapes_[item.shape + ndim + d]) return false;
    }
    return true;
  }

 private:
  struct Item {
    AtenTensorHandle handle;
    void* data;
    const char* memory;
    int32_t dtype, ndim;
    size_t shape;  // where its sizes, then its strides, begin in shapes_
  };
  static constexpr size_t kFar = 24, kNear = 12;

  std::vector<torch::stable::Tensor> tensors_;
  std::vector<Item> items_;
  std::vector<int64_t> shapes_;
};

}  // namespace fusedoptim
