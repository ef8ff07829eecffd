// A pass with the reads and writes of an optimizer step and next to no arithmetic: the limit that a step can reach. On
// integers, which have no slow values.
#include <stddef.h>
#include <stdint.h>

#define LOOP(body) \
  _Pragma("omp parallel for schedule(static)") for (ptrdiff_t i = 0; i < n; ++i) { body }
#define PASS(name, word)                                                             \
  static void name(void** x, int states, ptrdiff_t n) {                              \
    uint32_t* restrict p = x[0], * restrict g = x[1];                                \
    word* restrict a = x[2], * restrict b = x[3];                                    \
    if (states == 0) LOOP(p[i] += g[i];)                                             \
    if (states == 1) LOOP(const uint32_t w = g[i]; p[i] += w; a[i] += w;)            \
    if (states == 2) LOOP(const uint32_t w = g[i]; p[i] += w; a[i] += w; b[i] += w;) \
  }
PASS(equal, uint32_t)
PASS(wide, uint64_t)

// x: parameter, gradient, up to two states, n words each; the words of the states are twice as long if they are wide.
void stream(void** x, int states, int wide_states, ptrdiff_t n) { (wide_states ? wide : equal)(x, states, n); }
