#include "version_probe.h"

#include <unistd.h>

#include <algorithm>

#include "prefetch.h"

namespace fusedoptim {
namespace {

class Pipe {
 public:
  Pipe() : open_(::pipe(ends_) == 0) {}
  ~Pipe() {
    if (open_)
      for (int end : ends_) ::close(end);
  }
  Pipe(const Pipe&) = delete;
  Pipe& operator=(const Pipe&) = delete;

  // False for memory that cannot be read.
  bool copy(const char* from, uint32_t& to) const {
    return open_ && ::write(ends_[1], from, sizeof(to)) == sizeof(to) &&
           ::read(ends_[0], &to, sizeof(to)) == sizeof(to);
  }

 private:
  int ends_[2];
  const bool open_;
};

const char* word_at(const torch::stable::Tensor& t, int offset) {
  return *reinterpret_cast<const char* const*>(VersionCounters::object(t.get()) + offset);
}

}  // namespace

// The only word of a tensor object, before its sizes, that is the same in the first two of each three and in no other
// tensor. So the memory's is none, which the third shares.
std::optional<int> VersionProbe::find_pointer() const {
  int end = kTensorBytes;
  for (const torch::stable::Tensor& t : tensors_) {
    const char* memory = tensor_memory(t.get());  // null unless the sizes lie in the object that the handle points at
    int64_t* sizes = nullptr;
    if (!memory || aoti_torch_get_sizes(t.get(), &sizes) != 0) return std::nullopt;
    end = std::min(end, static_cast<int>(reinterpret_cast<const char*>(sizes) - memory));
  }
  std::optional<int> found;
  for (int offset = 0; offset + static_cast<int>(sizeof(void*)) <= end; offset += sizeof(void*)) {
    bool fits = true;
    for (size_t i = 0; i < tensors_.size() && fits; ++i) {
      const char* word = word_at(tensors_[i], offset);
      fits = word && reinterpret_cast<uintptr_t>(word) % alignof(void*) == 0;
      for (size_t k = 0; k < i && fits; ++k) {
        const bool shared = i % 3 == 1 && k == i - 1;
        fits = (word == word_at(tensors_[k], offset)) == shared;
      }
    }
    if (fits && found) return std::nullopt;
    if (fits) found = offset;
  }
  return found;
}

// The first place in the counters that has the versions: so nothing behind their end is read, unless no place has them.
std::optional<int> VersionProbe::find_number(int pointer, const std::vector<uint32_t>& versions) const {
  constexpr int kCounterBytes = 32;
  const Pipe pipe;
  for (int offset = 0; offset < kCounterBytes; offset += sizeof(uint32_t)) {
    bool fits = true;
    for (size_t i = 0; i < versions.size() && fits; ++i) {
      uint32_t there = 0;
      if (!pipe.copy(word_at(tensors_[3 * i], pointer) + offset, there)) return std::nullopt;
      fits = there == versions[i];
    }
    if (fits) return offset;
  }
  return std::nullopt;
}

bool VersionProbe::find(const std::vector<uint32_t>& versions) {
  if (tensors_.empty() || tensors_.size() != 3 * versions.size()) return false;
  const std::optional<int> pointer = find_pointer();
  if (!pointer) return false;
  const std::optional<int> number = find_number(*pointer, versions);
  if (!number || (layout_ && (layout_->pointer != *pointer || layout_->number != *number))) return false;
  layout_ = VersionLayout{*pointer, *number};
  return true;
}

void VersionProbe::raise(size_t tensor) const {
  VersionRaiser(layout_.value()).raise(VersionCounters::object(tensors_.at(tensor).get()));
}

}  // namespace fusedoptim
