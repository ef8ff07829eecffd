// The storages by name, for other languages.
#pragma once

#include <initializer_list>
#include <utility>

#include "storage.h"

namespace fusedoptim {

inline std::initializer_list<std::pair<const char*, Storage>> storage_names() {
  static constexpr std::initializer_list<std::pair<const char*, Storage>> names = {
      {"f32", Storage::f32},
      {"f64", Storage::f64},
      {"bf16", Storage::bf16},
      {"f16", Storage::f16},
      {"bf16_stochastic", Storage::bf16_stochastic},
      {"bf16_remainder", Storage::bf16_remainder},
      {"bf16_remainder8", Storage::bf16_remainder8},
      {"bf16_master", Storage::bf16_master},
      {"f16_master", Storage::f16_master},
      {"q8", Storage::q8},
      {"q8_stochastic", Storage::q8_stochastic},
      {"q8_squares", Storage::q8_squares},
      {"q8_squares_stochastic", Storage::q8_squares_stochastic},
  };
  return names;
}

}  // namespace fusedoptim
