// For the source of a library with one program of a rule: this header, a struct, and FUSEDOPTIM_PROGRAM. It is compiled
// for the instruction set that the compiler's options name, with -ffp-contract=off, and needs neither torch nor Python.
//
// The struct has of a rule in csrc/rules (see ../rules/common.h) `sums`, `second_moment`, `uses`, `Scalars`, `prepare`,
// `update`, and the enums Slot with kSlots and Number with kNumbers; `next_numbers` if there are any. It has one
// variant, 0, and beside these:
//   Linear, Unencoded   the MixLists of mixes.h that there are loops for; with Lanes of fp64 Mix<f64, f64> alone
//   kTiles              whether there is the loop over tiles, too, which takes whatever is no Mix
//   measures(operand)   whether what is summed depends on one (OperandIndex), where there are sums
//   measured<M>(p, g, s, c, x)  gives x[0..sums-1], whose squares are summed, of the values before the step, where the
//                       gradient is the one that update() gets. c: of sums that are NaN: no sum may depend on another
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "lanes_avx512.h"
namespace fusedoptim {
namespace lanes = avx512;
}
#define FUSEDOPTIM_CAPABILITY kAvx512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "lanes_avx2.h"
namespace fusedoptim {
namespace lanes = avx2;
}
#define FUSEDOPTIM_CAPABILITY kAvx2
#else
#include "lanes_portable.h"
namespace fusedoptim {
namespace lanes = portable;
}
#define FUSEDOPTIM_CAPABILITY kPortable
#endif

#include "measured_tile.h"
#include "prepare.h"
#include "tiles.h"

namespace fusedoptim {

template <class Rule, class M>
bool computes_in(const Entry& e) {
  return e.compute_dtype() == kCompute<typename M::T>;
}

template <class Rule>
constexpr int32_t states_of() {
  int32_t states = 0;
  for (int k = 0; k < Rule::kSlots; ++k) states |= Rule::uses(0, k) << k;
  return states;
}

template <class Rule, class M>
UpdateFn find_own_linear(const Entry& e) {
  return computes_in<Rule, M>(e) && !e.layout && !e.row ? find_linear<Rule, 0, M>(e) : nullptr;
}

template <class Rule, class M>
UpdateFn find_own_tiles(const Entry& e) {
  const bool fits = computes_in<Rule, M>(e) && needs_tiles(e, states_of<Rule>(), Rule::second_moment);
  return fits ? update_tiles<Rule, 0, M> : nullptr;
}

template <class Rule, class M>
constexpr ProgramCode program_code() {
  check_sizes<Rule>();
  ProgramCode code{kProgramVersion,
                   sizeof(Entry),
                   sizeof(StepInputs),
                   sizeof(UpdateInputs),
                   FUSEDOPTIM_CAPABILITY,
                   sizeof(typename M::T) == 8,
                   states_of<Rule>(),
                   Rule::kNumbers,
                   Rule::sums,
                   prepare_into<Rule, typename M::T>,
                   next_numbers_of<Rule>(),
                   find_own_linear<Rule, M>,
                   nullptr,
                   measure_of<Rule, M>()};
  if constexpr (Rule::kTiles) code.find_tiles = find_own_tiles<Rule, M>;
  return code;
}

}  // namespace fusedoptim

// Lanes: F32 or F64.
#define FUSEDOPTIM_PROGRAM(Rule, Lanes)                                                                         \
  extern "C" __attribute__((visibility("default"))) const fusedoptim::ProgramCode* fusedoptim_program() {       \
    static constexpr fusedoptim::ProgramCode code = fusedoptim::program_code<Rule, fusedoptim::lanes::Lanes>(); \
    return &code;                                                                                               \
  }
