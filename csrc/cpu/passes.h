// Passes over a few hundred elements, between an operand and numbers of the compute type in the L1 cache: for storages
// that are looked up, once for a pass.
#pragma once

#include "../rules/step_element.h"
#include "codec.h"

namespace fusedoptim {

template <class M, Storage s, class T>
FUSEDOPTIM_INLINE int64_t decode_registers(T* out, const Operand& o, int64_t i, int64_t n) {
  int64_t k = 0;
  for (; k + M::width <= n; k += M::width) M::store(out + k, load<M, s>(o, i + k));
  return k;
}

// n elements, from i on.
template <class M, class T = typename M::T>
__attribute__((noinline)) void decode(T* out, const Operand& o, int64_t i, int64_t n) {
  int64_t done = 0;
  if constexpr (sizeof(T) == 4) {
    switch (o.storage) {
      case Storage::f32:
        done = decode_registers<M, Storage::f32>(out, o, i, n);
        break;
      case Storage::f16:
        done = decode_registers<M, Storage::f16>(out, o, i, n);
        break;
      case Storage::bf16:
      case Storage::bf16_stochastic:
        done = decode_registers<M, Storage::bf16>(out, o, i, n);
        break;
      case Storage::bf16_remainder:
        done = decode_registers<M, Storage::bf16_remainder>(out, o, i, n);
        break;
      case Storage::bf16_remainder8:
        done = decode_registers<M, Storage::bf16_remainder8>(out, o, i, n);
        break;
      case Storage::bf16_master:
        done = decode_registers<M, Storage::bf16_master>(out, o, i, n);
        break;
      case Storage::f16_master:
        done = decode_registers<M, Storage::f16_master>(out, o, i, n);
        break;
      default:
        break;
    }
  }
  if (done < n) load_some<M>(out + done, o, i + done, n - done);
}

template <class M>
FUSEDOPTIM_INLINE typename Integers<M::width>::U load_random(RandomHalves random, int64_t k) {
  typename Integers<M::width>::U words = {};
  if (random.words) memcpy(&words, random.words + k, sizeof(words));
  return words >> random.shift & 0xffffu;
}

template <class M, Storage s, class T>
FUSEDOPTIM_INLINE int64_t encode_registers(const T* in, const Operand& o, int64_t i, int64_t n, RandomHalves random) {
  int64_t k = 0;
  for (; k + M::width <= n; k += M::width) {
    typename Integers<M::width>::U bits = {};
    if constexpr (is_stochastic(s)) bits = load_random<M>(random, k);
    store<M, s>(o, i + k, M::load(in + k), bits);
  }
  return k;
}

template <class M, class T = typename M::T>
__attribute__((noinline)) void encode(const T* in, const Operand& o, int64_t i, int64_t n, RandomHalves random) {
  int64_t done = 0;
  if constexpr (sizeof(T) == 4) {
    switch (o.storage) {
      case Storage::f32:
        done = encode_registers<M, Storage::f32>(in, o, i, n, random);
        break;
      case Storage::f16:
        done = encode_registers<M, Storage::f16>(in, o, i, n, random);
        break;
      case Storage::bf16:
        done = encode_registers<M, Storage::bf16>(in, o, i, n, random);
        break;
      case Storage::bf16_stochastic:
        done = encode_registers<M, Storage::bf16_stochastic>(in, o, i, n, random);
        break;
      case Storage::bf16_remainder:
        done = encode_registers<M, Storage::bf16_remainder>(in, o, i, n, random);
        break;
      case Storage::bf16_remainder8:
        done = encode_registers<M, Storage::bf16_remainder8>(in, o, i, n, random);
        break;
      case Storage::bf16_master:
        done = encode_registers<M, Storage::bf16_master>(in, o, i, n, random);
        break;
      case Storage::f16_master:
        done = encode_registers<M, Storage::f16_master>(in, o, i, n, random);
        break;
      default:
        break;
    }
  }
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
