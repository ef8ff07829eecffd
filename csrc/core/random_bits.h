// Random bits for rounding, from a counter: the seed, the parameter, its step and the element's place in the whole
// tensor. So they are the same on every backend, for any number of threads, for every replica and any cut into shards,
// and after a restart.
//
// The key is made by SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). A word takes two multiplications after a Weyl
// start; Philox4x32-7, which passes the same tests, takes three to four times as many instructions.
#pragma once

#include <cstdint>

#include "inline.h"

namespace fusedoptim {

FUSEDOPTIM_HD uint64_t split_mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// Of one parameter in one step. seed: the group's. step: counted from 1.
FUSEDOPTIM_HD uint64_t random_stream(uint64_t seed, uint64_t id, uint64_t step) {
  return split_mix(split_mix(split_mix(seed) ^ id) ^ step);
}

// Of one of its words, for elements whose indices have the same upper half.
struct RandomKey {
  uint32_t start, middle;

  FUSEDOPTIM_HD static RandomKey of(uint64_t stream, uint32_t word, uint32_t upper_index) {
    const uint64_t key = split_mix(stream ^ (word | static_cast<uint64_t>(upper_index) << 8));
    return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
  }
};

// Words of one key follow from numbers that are this far apart for elements that follow each other.
inline constexpr uint32_t kWeylStep = 0x9E3779B1u;

// index: the lower half. U: a uint32, or a vector of them.
template <class U>
FUSEDOPTIM_HD U weyl_number(U index, RandomKey key) {
  return index * kWeylStep + key.start;
}
// Of such a number. Each half of a word serves one operand: see half_of_slot().
template <class U>
FUSEDOPTIM_HD U mixed_word(U x, RandomKey key) {
  x ^= x >> 16;
  x = x * 0x21F0AAADu + key.middle;
  x ^= x >> 15;
  x *= 0x735A2D97u;
  return x ^ x >> 15;
}
template <class U>
FUSEDOPTIM_HD U random_word(U index, RandomKey key) {
  return mixed_word(weyl_number(index, key), key);
}

// Which 16 bits of a parameter's words a state is rounded with, counted in halves: the parameter has the first, the
// second moment the second, so that what is rounded most often takes one word; others the next.
// second: the rule's slot with the second moment, or -1.
constexpr int kHalves = 5, kWords = 3;
FUSEDOPTIM_HD constexpr int half_of_slot(int slot, int second) {
  return slot == second ? 1 : second >= 0 && slot > second ? slot + 1 : slot + 2;
}

}  // namespace fusedoptim
