// The loops that update elements, once for every rule, variant, compute type and instruction set: they load, have
// rules/step_element.h do the work, and store.
//
// Cost: a step waits for memory (28 bytes per element for AdamW in fp32), and has about 30 cycles per 16 elements and
// core to spare for arithmetic. Storages that all agree get a loop of their own.
#pragma once

#include "../core/strided.h"
#include "../rules/step_element.h"
#include "blocks.h"
#include "codec.h"
#include "kernels.h"
#include "tuning.h"

namespace fusedoptim {

// fixed: the storage of parameter and gradient, fixed_state: of the rule's states, where they are known.
template <class Rule, int variant, class M, int fixed, int fixed_state, Around around>
class Loop {
 public:
  using T = typename M::T;
  using V = typename M::V;
  using Scalars = typename Rule::template Scalars<T>;

  // param_storage: what the parameter is rounded to for its moving average. indices: of elements of which the first is
  // `begin`, in the whole tensor; null: they follow each other from the entry's first on.
  FUSEDOPTIM_INLINE Loop(const Entry& e, const UpdateInputs& in, Storage param_storage,
                         const uint32_t* indices = nullptr, uint32_t upper_index = 0)
      : e_(e),
        c_(*static_cast<const Scalars*>(in.scalars)),
        t_(without_asking(Transforms<T>::of(in.transforms))),
        average_(around == Around::everything && e.state(kAverage).data && in.transforms.ema_decay >= 0),
        zero_grad_(around == Around::everything && in.transforms.zero_grad),
        param_storage_(param_storage),
        indices_(indices) {
    if constexpr (fixed == kAnyStorage) {
      for (int k = 0; k < kWords; ++k) key_[k] = RandomKey::of(in.stream, k, upper_index);
      takes_[0] = fusedoptim::is_stochastic(e.param().storage);
      for (int k = 0; k < Rule::kSlots; ++k)
        if (Rule::uses(variant, k) && fusedoptim::is_stochastic(e.state(k).storage))
          takes_[half_of_slot(k, Rule::second_moment) / 2] = true;
    }
  }

  FUSEDOPTIM_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int bf16 = static_cast<int>(Storage::bf16);
    int64_t i = begin;
    if constexpr (fixed == bf16 && fixed_state == bf16 && M::has_pairs)
      if (!average_)
        for (; i + 2 * M::width <= end; i += 2 * M::width) step_bf16_pair(i);
    for (; i + M::width <= end; i += M::width) step<true>(i, M::width);
    if (i < end) step<false>(i, static_cast<int>(end - i));
  }

 private:
  // The last n < width elements go through the same lanes as all others, hence have the same bits, but perhaps for the
  // sign of a NaN.
  template <bool full>
  FUSEDOPTIM_INLINE void step(int64_t i, int n) const {
    Element<V> y[1], &x = y[0];
    x.param = load<M, fixed, full>(e_.param(), i, n);
    x.grad = load<M, fixed, full>(e_.grad(), i, n);
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) x.state[k] = load<M, fixed_state, full>(e_.state(k), i, n);
    update_elements<Rule, variant, M, around>(y, t_, c_);
    const RandomBits<M> random = random_bits(i, n);
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k))
        store<M, fixed_state, full>(e_.state(k), i, n, x.state[k], random.half(half_of_slot(k, Rule::second_moment)));
    store<M, fixed, full>(e_.param(), i, n, x.param, random.half(0));
    if (average_) {
      x.state[kAverage] = load<M, kAverageStorage, full>(e_.state(kAverage), i, n);
      average_element<M>(x, t_, as_stored<M, kParamStorage>(x.param, param_storage_, random.half(0)));
      store<M, kAverageStorage, full>(e_.state(kAverage), i, n, x.state[kAverage], kNoBits);
    }
    if (zero_grad_) store<M, fixed, full>(e_.grad(), i, n, M::set(0), kNoBits);
  }

  FUSEDOPTIM_INLINE RandomBits<M> random_bits(int64_t i, int n) const {
    RandomBits<M> random = {};
    if constexpr (fixed == kAnyStorage) {
      if (!(takes_[0] || takes_[1] || takes_[2])) return random;
      using N = Integers<M::width>;
      typename N::U index = N::counting() + static_cast<uint32_t>(e_.first_index + i);
      if (indices_) memcpy(&index, indices_ + i, sizeof(uint32_t) * n);
      for (int k = 0; k < kWords; ++k)
        if (takes_[k]) random.word[k] = random_word(index, key_[k]);
    }
    return random;
  }

  // All operands bf16: 2*width elements at once.
  FUSEDOPTIM_INLINE void step_bf16_pair(int64_t i) const {
    const auto at = [i](const Operand& o) { return static_cast<uint16_t*>(o.data) + i; };
    Element<V> x[2];
    M::load_bf16_pair(at(e_.param()), x[0].param, x[1].param);
    M::load_bf16_pair(at(e_.grad()), x[0].grad, x[1].grad);
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) M::load_bf16_pair(at(e_.state(k)), x[0].state[k], x[1].state[k]);
    update_elements<Rule, variant, M, around>(x, t_, c_);
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) M::store_bf16_pair(at(e_.state(k)), x[0].state[k], x[1].state[k]);
    M::store_bf16_pair(at(e_.param()), x[0].param, x[1].param);
    if (zero_grad_) M::store_bf16_pair(at(e_.grad()), M::set(0), M::set(0));
  }

  // In a loop that does everything, transforming costs less than asking whether to.
  static FUSEDOPTIM_INLINE Transforms<T> without_asking(Transforms<T> t) {
    if (around == Around::everything) t.leave_gradient = false;
    return t;
  }

  // Elements of the compute type may be those of a tile, and the parameter of any.
  static constexpr int kParamStorage = fixed == static_cast<int>(kCompute<T>) ? kAnyStorage : fixed;
  static constexpr typename RandomBits<M>::U kNoBits{};
  static constexpr int kAverageStorage = static_cast<int>(kCompute<T>);
  const Entry e_;  // copies, whose fields no store can alias
  const Scalars c_;
  const Transforms<T> t_;
  const bool average_, zero_grad_;
  const Storage param_storage_;
  const uint32_t* const indices_;
  RandomKey key_[kWords];    // of each word
  bool takes_[kWords] = {};  // whether anything is rounded with it
};

template <class Rule, int variant, class M, int fixed, int fixed_state>
FUSEDOPTIM_INLINE void run_loop(const Entry& e, int64_t begin, int64_t end, const UpdateInputs& in,
                                Storage param_storage, const uint32_t* indices = nullptr, uint32_t upper_index = 0) {
  // fp32 and 16 bits have a loop without anything around the rule: 16 bits have few cycles to spare.
  constexpr bool may_be_alone = sizeof(typename M::T) == 4 && fixed != kAnyStorage;
  if constexpr (may_be_alone) {
    if (in.transforms.do_nothing()) {
      Loop<Rule, variant, M, fixed, fixed_state, Around::nothing>(e, in, param_storage).run(begin, end);
      return;
    }
  }
  Loop<Rule, variant, M, fixed, fixed_state, Around::everything>(e, in, param_storage, indices, upper_index)
      .run(begin, end);
}

// Operands that share one dense memory order.
template <class Rule, int variant, class M, int fixed, int fixed_state = fixed>
void update_linear(const Entry& e, int64_t begin, int64_t end, const UpdateInputs& in) {
  run_loop<Rule, variant, M, fixed, fixed_state>(e, begin, end, in, e.param().storage);
}

// The same in the logical order, for storages that are looked up. Keys of random bits change every 2^32 elements.
template <class Rule, int variant, class M>
void update_stored(const Entry& e, int64_t begin, int64_t end, const UpdateInputs& in) {
  for (int64_t i = begin; i < end;) {
    const int64_t index = e.first_index + i, left = (int64_t{1} << 32) - (index & 0xffffffff);
    const int64_t until = end - i < left ? end : i + left;
    run_loop<Rule, variant, M, kAnyStorage, kAnyStorage>(e, i, until, in, e.param().storage, nullptr,
                                                         static_cast<uint32_t>(index >> 32));
    i = until;
  }
}

// All others: tile by tile, through contiguous buffers that stay in the L1 cache. Operands in some other memory order
// are copied there: as the compute type, or if their storage is no dtype as they are. What is stored in blocks becomes
// the compute type; tiles are then whole blocks of one row, and a range has those that begin in it.
template <class Rule, int variant, class M>
class Tiles {
 public:
  using T = typename M::T;

  Tiles(const Entry& e, const UpdateInputs& in) : e_(e), in_(in), is_stochastic_(e.is_stochastic) {
    for (int k = 0; k < kOperands; ++k) {
      const bool read = is_read(k);
      used_[k] = !read ? kNot : is_in_blocks(e.operand[k].storage) ? kBlocks : e.layout ? kCopied : kInPlace;
      if (!read) continue;
      const Storage s = e.operand[k].storage;
      const bool becomes_plain = used_[k] == kBlocks || (used_[k] == kCopied && is_dtype(s));
      tile_.operand[k] = {buffer_[k], extra_[k], becomes_plain ? storage_of(kCompute<T>) : s};
      all_plain_ = all_plain_ && tile_.operand[k].storage == storage_of(kCompute<T>);
    }
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t i = e_.row ? first_block(begin) : begin, n; i < (e_.row ? first_block(end) : end); i += n) {
      n = end_of_tile(i, end) - i;
      if (is_stochastic_) find_indices(i, n);
      for (int k = 0; k < kOperands; ++k) load(k, i, n);
      constexpr int same = static_cast<int>(kCompute<T>);
      const Storage param = e_.param().storage;
      if (all_plain_) {
        run_loop<Rule, variant, M, same, same>(tile_, 0, n, in_, param);
      } else {
        const int64_t cut = is_stochastic_ ? cut_ : n;
        const uint32_t* const index = is_stochastic_ ? index_ : nullptr;
        run_loop<Rule, variant, M, kAnyStorage, kAnyStorage>(tile_, 0, cut, in_, param, index, upper_[0]);
        if (cut < n) run_loop<Rule, variant, M, kAnyStorage, kAnyStorage>(tile_, cut, n, in_, param, index, upper_[1]);
      }
      for (int k = 0; k < kOperands; ++k)
        if (k != kGrad || in_.transforms.zero_grad) store(k, i, n);
    }
  }

 private:
  enum Use { kNot, kInPlace, kCopied, kBlocks };

  bool is_read(int k) const {
    if (k < kFirstState) return true;
    const int state = k - kFirstState;
    if (state == kAverage) return e_.state(state).data && in_.transforms.ema_decay >= 0;
    return state < Rule::kSlots && Rule::uses(variant, state);
  }

  // The first block that begins at i or later.
  int64_t first_block(int64_t i) const {
    const int64_t in_row = i % e_.row, up = (in_row + kBlock - 1) / kBlock * kBlock;
    return i - in_row + (up < e_.row ? up : in_row ? e_.row : 0);
  }
  int64_t end_of_tile(int64_t i, int64_t end) const {
    if (!e_.row) return end - i < tuning::kTileElements ? end : i + tuning::kTileElements;
    const int64_t row_end = i - i % e_.row + e_.row, last = first_block(end);
    const int64_t until = row_end - i < tuning::kTileElements ? row_end : i + tuning::kTileElements;
    return until < last ? until : last;
  }

  // Keys of random bits change every 2^32 elements: once in a tile, at most, which is a row's or follows in memory.
  void find_indices(int64_t i, int64_t n) {
    cut_ = find_indices(0, i, n);
    if (cut_ < n) find_indices(1, i + cut_, n - cut_);
  }
  int64_t find_indices(int part, int64_t i, int64_t n) {
    uint32_t* const index = part ? index_ + cut_ : index_;
    if (e_.layout)
      return gather_indices<M>(index, upper_[part], e_.first_index, e_.layout->sizes, e_.layout->strides[kIndex], i, n);
    const int64_t first = e_.first_index + i, left = (int64_t{1} << 32) - (first & 0xffffffff);
    upper_[part] = static_cast<uint32_t>(first >> 32);
    for (int64_t k = 0; k < n; ++k) index[k] = static_cast<uint32_t>(first + k);
    return n < left ? n : left;
  }

  void load(int k, int64_t i, int64_t n) {
    const Operand& o = e_.operand[k];
    Operand& to = tile_.operand[k];
    switch (used_[k]) {
      case kNot:
        return;
      case kInPlace:
        to.data = static_cast<char*>(o.data) + i * size_of(o.storage);
        to.extra = static_cast<char*>(o.extra) + i * extra_size_of(o.storage);
        return;
      case kCopied:
        return gather<M>(to, o, e_.layout->sizes, e_.layout->strides[k], i, n);
      case kBlocks:
        if constexpr (sizeof(T) == 4)
          decode_blocks<M>(buffer_[k], codes(k, i, n, true), scales(o, i), o.storage, i % e_.row, n);
    }
  }

  void store(int k, int64_t i, int64_t n) {
    const Operand& o = e_.operand[k];
    if (used_[k] == kCopied) scatter<M>(tile_.operand[k], o, e_.layout->sizes, e_.layout->strides[k], i, n);
    if (used_[k] != kBlocks) return;
    if constexpr (sizeof(T) == 4) {
      const uint32_t* random = nullptr;
      if (is_stochastic(o.storage)) {
        const int half = half_of_slot(k - kFirstState, Rule::second_moment);
        random_halves<M>(random_, index_, cut_, RandomKey::of(in_.stream, half / 2, upper_[0]), half);
        if (cut_ < n)
          random_halves<M>(random_ + cut_, index_ + cut_, n - cut_, RandomKey::of(in_.stream, half / 2, upper_[1]),
                           half);
        random = random_;
      }
      uint8_t* const to = codes(k, i, n, false);
      encode_blocks<M>(to, scales(o, i), buffer_[k], o.storage, i % e_.row, n, random);
      if (e_.layout) scatter_bytes(to, o.data, 1, Runs(e_.layout->sizes, e_.layout->strides[k], i), n);
    }
  }

  uint8_t* codes(int k, int64_t i, int64_t n, bool read) {
    const Operand& o = e_.operand[k];
    if (!e_.layout) return static_cast<uint8_t*>(o.data) + i;
    if (read) gather_bytes(extra_[k], o.data, 1, Runs(e_.layout->sizes, e_.layout->strides[k], i), n);
    return extra_[k];
  }
  float* scales(const Operand& o, int64_t i) const {
    return static_cast<float*>(o.extra) + i / e_.row * blocks_of_row(e_.row);
  }

  alignas(64) T buffer_[kOperands][tuning::kTileElements];
  alignas(64) unsigned char extra_[kOperands][4 * tuning::kTileElements];
  alignas(64) uint32_t index_[tuning::kTileElements], random_[tuning::kTileElements];
  Entry tile_;
  const Entry& e_;
  const UpdateInputs& in_;
  const bool is_stochastic_;
  bool all_plain_ = true;
  Use used_[kOperands];
  uint32_t upper_[2] = {};  // of the indices before `cut_`, and from there on
  int64_t cut_ = 0;
};

template <class Rule, int variant, class M>
void update_tiles(const Entry& e, int64_t begin, int64_t end, const UpdateInputs& in) {
  Tiles<Rule, variant, M>(e, in).run(begin, end);
}

// ---- which of them a tensor needs ----

template <class Rule>
FUSEDOPTIM_INLINE bool storages_are(const Entry& e, int variant, Storage d, Storage state) {
  bool same = e.param().storage == d && e.grad().storage == d;
  for (int k = 0; k < Rule::kSlots; ++k)
    if (Rule::uses(variant, k)) same = same && e.state(k).storage == state;
  return same;
}

template <class Rule, int variant, class F32, class F64>
UpdateFn find_update_of_variant(const Entry& e) {
  constexpr Storage F = Storage::f32, D = Storage::f64, B = Storage::bf16, H = Storage::f16;
  constexpr int f32 = static_cast<int>(F), f64 = static_cast<int>(D), bf16 = static_cast<int>(B);
  constexpr int f16 = static_cast<int>(H);
  if (e.compute_dtype() == DType::f64) {
    if (e.layout || e.row) return update_tiles<Rule, variant, F64>;
    if (storages_are<Rule>(e, variant, D, D)) return update_linear<Rule, variant, F64, f64>;
    return update_stored<Rule, variant, F64>;
  }
  if (e.layout || e.row) return update_tiles<Rule, variant, F32>;
  if (storages_are<Rule>(e, variant, F, F)) return update_linear<Rule, variant, F32, f32>;
  if (storages_are<Rule>(e, variant, B, B)) return update_linear<Rule, variant, F32, bf16>;
  if (storages_are<Rule>(e, variant, H, H)) return update_linear<Rule, variant, F32, f16>;
  if (storages_are<Rule>(e, variant, B, F)) return update_linear<Rule, variant, F32, bf16, f32>;
  return update_stored<Rule, variant, F32>;
}

template <class Rule, class F32, class F64, int variant = 0>
UpdateFn find_update(int wanted, const Entry& e) {
  if constexpr (variant < Rule::variants) {
    if (wanted == variant) return find_update_of_variant<Rule, variant, F32, F64>(e);
    return find_update<Rule, F32, F64, variant + 1>(wanted, e);
  } else {
    return nullptr;
  }
}

template <class F32, class F64, class... R>
constexpr UpdatesOfRules updates_of(RuleList<R...>) {
  return {{find_update<R, F32, F64>...}};
}

}  // namespace fusedoptim
