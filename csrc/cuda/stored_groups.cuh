// The loops of groups for any storages. A warp goes through spans of one group for each lane. It stores nothing of a
// span where a number is out of the range of roots, quotients and codecs (see lanes.cuh and stored_codec.cuh), and has
// such spans done by stored.cuh when it is through: so no loop holds code for them. A rule's states are finite where
// the parameter is, which they all end in.
#pragma once

#include "stored.cuh"
#include "stored_codec.cuh"

namespace fusedoptim::cuda {

// The storages of a loop, and n, the elements of a group. State is that of all states but the second moment.
template <class Rule, int n, Storage param, Storage state, Storage second = state>
struct KnownStorages {
  static constexpr int width = n;
  static constexpr __device__ Storage of(const BlockWork&, int operand) {
    if (operand == kParam) return param;
    if (operand == kGrad) return param == Storage::f32 ? Storage::f32 : Storage::bf16;
    return Rule::second_moment >= 0 && operand == kFirstState + Rule::second_moment ? second : state;
  }
};
// Any: looked up for each group. Four elements, whatever they are kept in, are 16 bytes at most.
struct AnyStorages {
  static constexpr int width = 4;
  static __device__ Storage of(const BlockWork& work, int operand) { return work.storage(operand); }
};

template <class... Loops>
struct LoopList {};
template <class... A, class... B>
constexpr LoopList<A..., B...> join(LoopList<A...>, LoopList<B...>) {
  return {};
}

// Of tensors without a storage of this kind, in a launch with others that have some: embeddings, and norms.
template <class Rule>
using BesideOthers =
    LoopList<KnownStorages<Rule, 4, Storage::f32, Storage::f32>, KnownStorages<Rule, 8, Storage::bf16, Storage::bf16>>;

// The mixes with loops of their own, beside the one for all: of the variants that are used most. Compiling one takes a
// second.
template <class Rule, int variant>
constexpr auto known_loops() {
  constexpr Storage F = Storage::f32, B = Storage::bf16, S = Storage::bf16_stochastic, R = Storage::bf16_remainder;
  constexpr Storage R8 = Storage::bf16_remainder8, M = Storage::bf16_master;
  constexpr Storage Q = Storage::q8, V = Storage::q8_squares_stochastic;
  constexpr int states = states_of<Rule, variant>();
  if constexpr (states > 2 || variant > 1)
    return LoopList<>{};
  else if constexpr (states == 0)
    return LoopList<KnownStorages<Rule, 8, S, B>, KnownStorages<Rule, 8, R, B>>{};
  else if constexpr (Rule::second_moment < 0)
    return LoopList<KnownStorages<Rule, 8, S, B>, KnownStorages<Rule, 8, S, S>, KnownStorages<Rule, 8, R, B>,
                    KnownStorages<Rule, 4, R, F>, KnownStorages<Rule, 8, R, Q>, KnownStorages<Rule, 8, R8, Q>,
                    KnownStorages<Rule, 4, M, F>, KnownStorages<Rule, 4, F, B>, KnownStorages<Rule, 4, F, Q>>{};
  else
    return join(LoopList<KnownStorages<Rule, 8, B, B, S>, KnownStorages<Rule, 8, S, B, S>, KnownStorages<Rule, 8, S, S>,
                         KnownStorages<Rule, 8, R, B, S>, KnownStorages<Rule, 4, R, F>, KnownStorages<Rule, 8, R, Q, V>,
                         KnownStorages<Rule, 8, R8, Q, V>, KnownStorages<Rule, 4, M, F>,
                         KnownStorages<Rule, 4, F, B, S>, KnownStorages<Rule, 4, F, Q, V>>{},
                std::conditional_t<variant == 0, BesideOthers<Rule>, LoopList<>>{});
}

// The largest magnitude of a block, for the lanes that have its groups.
template <int n>
__device__ __forceinline__ float largest_of_block(const float (&x)[n]) {
  float largest = fabsf(x[0]);
#pragma unroll
  for (int j = 1; j < n; ++j) largest = fmaxf(largest, fabsf(x[j]));
#pragma unroll
  for (int delta = static_cast<int>(kBlock) / n / 2; delta > 0; delta /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, delta));
  return largest;
}

// What comes after the rule, of a group that was stored from element i on.
template <int n>
__device__ __forceinline__ void finish_stored(const StoredRaw& param, Storage s, const BlockWork& work, int64_t i) {
  const Transforms<float>& t = work.transforms<float>();
  if (work.average()) {
    float params[n];
    decode_stored<n>(params, param, s);
#pragma unroll
    for (int j = 0; j < n; j += 4) {
      char* const at = static_cast<char*>(work.data(kAverageOperand)) + (i + j) * 4;
      Raw raw;
      fetch_bytes(raw, at, 16);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Element<float> e;
        e.state[kAverage] = float_of(raw.word[k]);
        average_element<Lane<float>>(e, t, params[j + k]);
        raw.word[k] = bits_of(e.state[kAverage]);
      }
      put_bytes(at, raw, 16);
    }
  }
  if (t.zero_grad) {
    const int bytes = static_cast<int>(size_of(work.storage(kGrad)));
    put_bytes(static_cast<char*>(work.data(kGrad)) + i * bytes, Raw{}, n * bytes);
  }
}

// The spans that a warp has left: a bit for each of its own. In shared memory, because a register for what hardly ever
// happens is one too many.
__device__ inline uint32_t& left_by_warp() {
  __shared__ uint32_t left[kWarps];
  return left[threadIdx.x / kWarp];
}

// `spans` of them from element `begin` on.
template <class Rule, int variant, class Storages>
__device__ __forceinline__ void update_stored_groups(const BlockWork& work, int64_t begin, uint32_t spans,
                                                     const typename Rule::template Scalars<float>& c) {
  constexpr int n = Storages::width;
  const auto t = work.transforms<float>();
  const bool finishes = work.average() || work.zero_grad();
  const uint32_t lane = threadIdx.x % kWarp, index = static_cast<uint32_t>(work.entry.first_index + begin);
  RandomKey key[kWords];
  char *data[kOperands], *extra[kOperands];
#pragma unroll
  for (int k = 0; k < words_of<Rule, variant>(); ++k) key[k] = work.random.key[k];
#pragma unroll
  for (int k = 0; k < kOperands; ++k) {
    if (!uses<Rule, variant>(k)) continue;
    const Storage s = Storages::of(work, k);
    data[k] = static_cast<char*>(work.data(k)) + begin * size_of(s);
    extra[k] = static_cast<char*>(work.entry.operand[k].extra) +
               (is_in_blocks(s) ? begin / kBlock * 4 : begin * extra_size_of(s));
  }
#pragma unroll 1
  for (uint32_t span = threadIdx.x / kWarp; span < spans; span += kWarps) {
    const uint32_t at = (span * kWarp + lane) * n;
    StoredRaw raw[kOperands];
#pragma unroll
    for (int k = 0; k < kOperands; ++k) {
      if (!uses<Rule, variant>(k)) continue;
      const Storage s = Storages::of(work, k);
      fetch_bytes(raw[k].data, data[k] + at * size_of(s), n * static_cast<int>(size_of(s)));
      if (is_in_blocks(s))
        raw[k].scale = __ldcg(reinterpret_cast<const float*>(extra[k] + at / kBlock * 4));
      else if (extra_size_of(s))
        fetch_bytes(raw[k].extra, extra[k] + at * extra_size_of(s), n * static_cast<int>(extra_size_of(s)));
    }
    Element<float> elements[n];
#pragma unroll
    for (int k = 0; k < kOperands; ++k) {
      if (!uses<Rule, variant>(k)) continue;
      float x[n];
      decode_stored<n>(x, raw[k], Storages::of(work, k));
      for (int j = 0; j < n; ++j) value_of(elements[j], k) = x[j];
    }
    update_elements<Rule, variant, LaneOfGroups, Around::before>(elements, t, c);
    bool right = true;
#pragma unroll
    for (int j = 0; j < n; ++j) right &= FastLane::is_right(elements[j].param);
#pragma unroll
    for (int k = kFirstState; k < kOperands; ++k) {
      if (!uses<Rule, variant>(k) || !is_in_blocks(Storages::of(work, k))) continue;
      float x[n];
      for (int j = 0; j < n; ++j) x[j] = value_of(elements[j], k);
      const float largest = largest_of_block<n>(x);
      raw[k].scale = largest > 0 ? fmaxf(largest, FastLane::kTiny) : 0.0f;  // block_scale()'s
      right &= largest <= FastLane::kHuge;
    }
    if (!__all_sync(0xffffffffu, right)) {
      if (lane == 0) left_by_warp() |= 1u << span / kWarps;
      continue;
    }
#pragma unroll
    for (int k = 0; k < kOperands; ++k) {
      if (k == kGrad || !uses<Rule, variant>(k)) continue;
      const Storage s = Storages::of(work, k);
      const int half = k == kParam ? 0 : half_of_slot(k - kFirstState, Rule::second_moment);
      float x[n];
      for (int j = 0; j < n; ++j) x[j] = value_of(elements[j], k);
      uint32_t random[n];
      if (is_stochastic(s)) {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const uint32_t word = random_word(index + at + j, key[half / 2]);
          random[j] = half % 2 ? word >> 16 : word & 0xffffu;
        }
      }
      encode_stored<n>(raw[k], x, s, random);
      put_bytes(data[k] + at * size_of(s), raw[k].data, n * static_cast<int>(size_of(s)));
      if (is_in_blocks(s)) {
        if (at % kBlock == 0) __stcg(reinterpret_cast<float*>(extra[k] + at / kBlock * 4), raw[k].scale);
      } else if (extra_size_of(s)) {
        put_bytes(extra[k] + at * extra_size_of(s), raw[k].extra, n * static_cast<int>(extra_size_of(s)));
      }
    }
    if (finishes) finish_stored<n>(raw[kParam], Storages::of(work, kParam), work, begin + at);
  }
}

}  // namespace fusedoptim::cuda
