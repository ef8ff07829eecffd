// How often power() of device code differs from the C library's, over the powers that bias corrections take.
#define FUSEDOPTIM_CUDA_ON_HOST 1
#include <initializer_list>

#include "../../csrc/core/power.h"

// counts: powers, of which differ in fp64, of which one minus them differs in fp32; the same two for roots
extern "C" void count_powers(int64_t* counts) {
  for (double beta : {0.9, 0.99, 0.999, 0.95, 0.98, 0.5, 0.9999, 0.8})
    for (int step = 1; step <= 50000; ++step) {
      const double mine = fusedoptim::power(beta, step), theirs = std::pow(beta, step);
      const double root = fusedoptim::power(1 - theirs, 0.5), their_root = std::pow(1 - theirs, 0.5);
      counts[0] += 1;
      counts[1] += mine != theirs;
      counts[2] += static_cast<float>(1 - mine) != static_cast<float>(1 - theirs);
      counts[3] += root != their_root;
      counts[4] += static_cast<float>(root) != static_cast<float>(their_root);
    }
}
