// Passes over the elements of a tile, between an operand and numbers of the compute type in the L1 cache: for storages
// that are looked up, once for a pass.
#pragma once

#include <type_traits>

#include "../rules/step_element.h"
#include "codec.h"

namespace fusedoptim {

// Has f handle whole registers of what is no code, by the storage as a constant. Returns of how many elements.
template <class F>
FUSEDOPTIM_INLINE int64_t by_storage(Storage s, const F& f) {
  using S = Storage;
  switch (s) {
    case S::f32:
      return f(std::integral_constant<S, S::f32>{});
    case S::f16:
      return f(std::integral_constant<S, S::f16>{});
    case S::bf16:
      return f(std::integral_constant<S, S::bf16>{});
    case S::bf16_stochastic:
      return f(std::integral_constant<S, S::bf16_stochastic>{});
    case S::bf16_remainder:
      return f(std::integral_constant<S, S::bf16_remainder>{});
    case S::bf16_remainder8:
      return f(std::integral_constant<S, S::bf16_remainder8>{});
    case S::bf16_master:
      return f(std::integral_constant<S, S::bf16_master>{});
    case S::f16_master:
      return f(std::integral_constant<S, S::f16_master>{});
    case S::f64:
    case S::unsupported:
    case S::q8:
    case S::q8_stochastic:
    case S::q8_squares:
    case S::q8_squares_stochastic:
      return 0;
  }
  return 0;
}

// n elements, from i on. Operands are passed by value: see codec.h.
template <class M, class T = typename M::T>
__attribute__((noinline)) void decode(T* out, Operand o, int64_t i, int64_t n) {
  int64_t done = 0;
  if constexpr (sizeof(T) == 4)
    done = by_storage(o.storage, [&](auto s) FUSEDOPTIM_INLINE_LAMBDA {
      int64_t k = 0;
      for (; k + M::width <= n; k += M::width) M::store(out + k, load<M, s>(o, i + k));
      return k;
    });
  if (done < n) load_some<M>(out + done, o, i + done, n - done);
}

// In the lower 16 bits of each lane, or that much further up.
template <class M>
FUSEDOPTIM_INLINE typename Integers<M::width>::U load_random(RandomHalves random, int64_t k, int up = 0) {
  typename Integers<M::width>::U words;
  memcpy(&words, random.words + k, sizeof(words));
  return (random.shift ? words >> (16 - up) : words << up) & (0xffffu << up);
}

template <class M, class T = typename M::T>
__attribute__((noinline)) void encode(const T* in, Operand o, int64_t i, int64_t n, RandomHalves random) {
  int64_t done = 0;
  if constexpr (sizeof(T) == 4)
    done = by_storage(o.storage, [&](auto s) FUSEDOPTIM_INLINE_LAMBDA {
      int64_t k = 0;
      for (; k + M::width <= n; k += M::width) {
        typename Integers<M::width>::U bits = {};
        if constexpr (is_stochastic(s)) bits = load_random<M>(random, k);
        store<M, s>(o, i + k, M::load(in + k), bits);
      }
      return k;
    });
  if (done < n)
    store_some<M>(in + done, o, i + done, n - done, {random.words ? random.words + done : nullptr, random.shift});
}

// The moving average of a parameter. params: as they read once they are stored.
template <class M, class T = typename M::T>
__attribute__((noinline)) void average(T* averages, const T* params, int64_t n, const LerpWeight<T>& toward_param) {
  int64_t k = 0;
  for (; k + M::width <= n; k += M::width)
    M::store(averages + k, lerp<M>(M::load(averages + k), M::load(params + k), toward_param));
  if (k == n) return;
  alignas(64) T x[2][M::width] = {};
  memcpy(x[0], averages + k, sizeof(T) * (n - k));
  memcpy(x[1], params + k, sizeof(T) * (n - k));
  M::store(x[0], lerp<M>(M::load(x[0]), M::load(x[1]), toward_param));
  memcpy(averages + k, x[0], sizeof(T) * (n - k));
}

// For n elements. indices: the lower halves of theirs; null if they follow each other from `first` on.
template <class M>
__attribute__((noinline)) void random_words(uint32_t* out, const uint32_t* indices, uint32_t first, int64_t n,
                                            RandomKey key) {
  using U = typename Integers<M::width>::U;
  int64_t k = 0;
  RandomWords<M> words(first, key);
  for (; k + M::width <= n; k += M::width) {
    U word;
    if (indices) {
      memcpy(&word, indices + k, sizeof(word));
      word = random_word(word, key);
    } else {
      word = words.next();
    }
    memcpy(out + k, &word, sizeof(word));
  }
  for (; k < n; ++k) out[k] = random_word(indices ? indices[k] : first + static_cast<uint32_t>(k), key);
}

}  // namespace fusedoptim
