// The one way from Python's tensors to handles of the stable ABI is an operator, which anybody can call with any
// number. So whoever waits for tensors gets a number that nothing else has had, under which they can be handed over
// once; the operator trusts no address.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fusedoptim {

class TensorHandOver {
 public:
  using Tensors = std::vector<torch::stable::Tensor>;
  using Take = std::function<void(const Tensors&)>;

  // take() runs without the interpreter. A member of this type comes last, so that it is the first to go: its end waits
  // for a take() that runs.
  explicit TensorHandOver(Take take) {
    const std::lock_guard<std::mutex> lock(mutex());
    static int64_t last = 0;
    number_ = ++last;
    waiting().emplace(number_, std::move(take));
  }
  ~TensorHandOver() {
    const std::lock_guard<std::mutex> lock(mutex());
    waiting().erase(number_);
  }
  TensorHandOver(const TensorHandOver&) = delete;
  TensorHandOver& operator=(const TensorHandOver&) = delete;

  int64_t number() const { return number_; }

  static void to(int64_t number, const Tensors& tensors) {
    const std::lock_guard<std::mutex> lock(mutex());
    const auto found = waiting().find(number);
    if (found == waiting().end())
      throw std::invalid_argument("nothing waits for tensors under the number " + std::to_string(number) +
                                  ": this operator is fusedoptim's own, which calls it once for each that waits");
    const Take take = std::move(found->second);
    waiting().erase(found);
    take(tensors);
  }

 private:
  // Both outlive everything, since the process may end in any order.
  static std::mutex& mutex() {
    static auto* const m = new std::mutex;
    return *m;
  }
  static std::map<int64_t, Take>& waiting() {
    static auto* const m = new std::map<int64_t, Take>;
    return *m;
  }

  int64_t number_;
};

}  // namespace fusedoptim
