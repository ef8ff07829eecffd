// A pass with the reads and writes of an optimizer step and next to no arithmetic: the limit that a step can reach. On
// integers, which have no slow values.
#include <stddef.h>
#include <stdint.h>

#define PASS(name, others, body)                                                            \
  static void name(void** x, ptrdiff_t n) {                                                 \
    uint32_t* restrict p = x[0], * restrict g = x[1];                                       \
    others _Pragma("omp parallel for schedule(static)") for (ptrdiff_t i = 0; i < n; ++i) { \
      const uint32_t w = g[i];                                                              \
      p[i] += w;                                                                            \
      body                                                                                  \
    }                                                                                       \
  }
#define ARRAY(name, type, k) type* restrict name = x[k];
PASS(alone, , )
PASS(one, ARRAY(a, uint32_t, 2), a[i] += w;)
PASS(two, ARRAY(a, uint32_t, 2) ARRAY(b, uint32_t, 3), a[i] += w; b[i] += w;)
PASS(three, ARRAY(a, uint32_t, 2) ARRAY(b, uint32_t, 3) ARRAY(c, uint32_t, 4), a[i] += w; b[i] += w; c[i] += w;)
PASS(wide_one, ARRAY(a, uint64_t, 2), a[i] += w;)
PASS(wide_two, ARRAY(a, uint64_t, 2) ARRAY(b, uint64_t, 3), a[i] += w; b[i] += w;)
PASS(and_narrow_two, ARRAY(a, uint32_t, 2) ARRAY(b, uint16_t, 3) ARRAY(c, uint16_t, 4), a[i] += w; b[i] += w;
     c[i] += w;)

// x: parameter, gradient, `same` other arrays of n words each, then `others`, whose words are twice as long if they are
// wide, else half as long.
void stream(void** x, int same, int others, int wide, ptrdiff_t n) {
  if (others == 0) {
    void (*const pass[])(void**, ptrdiff_t) = {alone, one, two, three};
    pass[same](x, n);
  } else if (wide) {
    (others == 1 ? wide_one : wide_two)(x, n);
  } else {
    and_narrow_two(x, n);
  }
}
