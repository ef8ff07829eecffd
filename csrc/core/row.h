// The numbers of a group, as every backend reads them: lr, in which dtype it computes, the options that every group can
// have, then what the rule itself has.
#pragma once

#include <cstdint>

namespace fusedoptim {

enum Column { kLr, kLrDType, kMaxGradNorm, kClipGradValue, kEmaDecay, kRoundingSeed, kFirstRuleHyper };

// The options' keys in a group. Below 0 each is off.
inline constexpr const char* kOptionKeys[] = {"max_grad_norm", "clip_grad_value", "ema_decay", "rounding_seed"};
inline constexpr int kFirstOption = kLrDType + 1, kOptions = kFirstRuleHyper - kFirstOption;
static_assert(sizeof(kOptionKeys) / sizeof(*kOptionKeys) == kOptions);

// Added to kLrDType where kLr holds the bits of the address of a learning rate on the device.
inline constexpr int kLrOnDevice = 8;

inline constexpr int kMaxHypers = 24;

struct HyperRow {
  double value[kMaxHypers] = {};
  HyperRow() {
    for (int k = kFirstOption; k < kFirstRuleHyper; ++k) value[k] = -1;
  }
};

}  // namespace fusedoptim
