// A plain pass over memory with the reads and writes of an optimizer step and next to no arithmetic: the limit that a
// step can reach. 4 bytes per element and array; the first `writes` of the `reads` arrays are written back.
#include <stddef.h>

#define LOOP(body) \
  _Pragma("omp parallel for schedule(static)") for (ptrdiff_t i = 0; i < n; ++i) { body }

void stream(float** x, int reads, int writes, ptrdiff_t n) {
  float* restrict a = x[0], * restrict b = x[1], * restrict c = x[2], * restrict d = x[3];
  if (reads == 4 && writes == 3) LOOP(const float g = d[i]; a[i] += g; b[i] += g; c[i] += g;)
  if (reads == 3 && writes == 2) LOOP(const float g = c[i]; a[i] += g; b[i] += g;)
  if (reads == 2 && writes == 1) LOOP(a[i] += b[i];)
}
