// Whatever no loop of loop.h was compiled for: storages that are looked up, other memory orders, blocks.
#pragma once

#include "../core/strided.h"
#include "blocks.h"
#include "loop.h"
#include "tuning.h"

namespace fusedoptim {

// Tile by tile, through buffers of the compute type that stay in the L1 cache. What is in some other memory order is
// copied first. With blocks, tiles are whole blocks of one row, and a range has those that begin in it. Parameter and
// gradient are read where they are if there is a loop for them beside states of the compute type. Of most such loops
// the updated parameter goes through its buffer: see unencoded in loop.h.
//
// Cost: beside its root and two quotients the loop has cycles to spare, but what waits for these keeps the next
// elements from beginning. On AVX2 (Zen 5), in ns per element of AdamW: to encode the parameter there costs 0.10 more
// than in a pass of its own, to decode states 0.05 more, to make random words 0.04 less.
template <class Rule, int variant, class M>
class Tiles {
 public:
  using T = typename M::T;

  Tiles(const Entry& e, const UpdateInputs& in) : e_(e), in_(in) {
    for (int k = 0; k < kOperands; ++k) tile_.operand[k] = {buffer_[k], nullptr, kPlain};
    tile_.id = e.id;
    if (!e.layout) {
      Entry as_they_are = tile_;
      as_they_are.param() = e.param();
      as_they_are.grad() = e.grad();
      const UpdateFn unencoded = find_unencoded<Rule, variant, M>(as_they_are);
      unencoded_ = unencoded != nullptr;
      if (const UpdateFn loop = unencoded ? unencoded : find_linear<Rule, variant, M>(as_they_are)) {
        loop_ = loop;
        tile_ = as_they_are;
        in_place_ = true;
      }
    }
    for (int k = 0; k < kOperands; ++k) {
      const Operand& o = e.operand[k];
      how_[k] = how(k);
      raw_[k] = e.layout ? Operand{raw_data_[k], raw_extra_[k], o.storage} : o;
      if (how_[k] != kNot && how_[k] != kInPlace && is_stochastic(o.storage)) takes_[half(k) / 2] = true;
    }
    without_average_.ema_decay = -1;
  }

  void run(int64_t begin, int64_t end) {
    uint32_t* const words = unencoded_ && takes_[0] ? words_[0] : nullptr;
    const int64_t last = e_.row ? first_block(end) : end;
    for (int64_t i = e_.row ? first_block(begin) : begin, n; i < last; i += n) {
      n = end_of_tile(i, last) - i;
      if (e_.row) block_ = i / e_.row * blocks_of_row(e_.row) + i % e_.row / kBlock;
      find_random_words(i, n);
      for (int k = 0; k < kOperands; ++k) load(k, i, n);
      tile_.first_index = e_.first_index + i;
      loop_(tile_, 0, n, {in_.scalars, without_average_, in_.stream, buffer_[kParam], words});
      for (int k = 0; k < kAverageOperand; ++k)
        if (k != kGrad || in_.transforms.zero_grad) store(k, i, n);
      if (how_[kAverageOperand] != kNot) update_average(i, n);
    }
  }

 private:
  static constexpr Storage kPlain = storage_of(kCompute<T>);
  static constexpr int kAverageOperand = kFirstState + kAverage;
  // An operand in its place; one that is read there, and left in its buffer; those that the loop finds in buffers.
  enum How { kNot, kInPlace, kUnencoded, kConverted, kDecoded, kBlocks };

  How how(int k) const {
    const Storage s = e_.operand[k].storage;
    if (!is_read(k)) return kNot;
    if (k < kFirstState && in_place_) return unencoded_ && k == kParam && s != kPlain ? kUnencoded : kInPlace;
    if (is_in_blocks(s)) return kBlocks;
    if (e_.layout && is_dtype(s)) return kConverted;
    return !e_.layout && s == kPlain ? kInPlace : kDecoded;
  }
  bool is_read(int k) const {
    if (k < kFirstState) return true;
    const int state = k - kFirstState;
    if (state == kAverage) return e_.state(state).data && in_.transforms.ema_decay >= 0;
    return state < Rule::kSlots && Rule::uses(variant, state);
  }

  // ---- where tiles begin and end ----

  // The first block that begins at i or later.
  int64_t first_block(int64_t i) const {
    const int64_t in_row = i % e_.row, up = (in_row + kBlock - 1) / kBlock * kBlock;
    return i - in_row + (up < e_.row ? up : in_row ? e_.row : 0);
  }
  int64_t end_of_tile(int64_t i, int64_t end) const {
    const int64_t row_end = e_.row ? i - i % e_.row + e_.row : end, until = i + tuning::kTileElements;
    return until < row_end ? (until < end ? until : end) : row_end < end ? row_end : end;
  }

  // ---- random bits ----

  static int half(int k) { return k < kFirstState ? 0 : half_of_slot(k - kFirstState, Rule::second_moment); }
  RandomHalves halves(int k) const {
    return is_stochastic(e_.operand[k].storage) ? RandomHalves{words_[half(k) / 2], half(k) % 2 * 16} : RandomHalves{};
  }

  // Keys change every 2^32 elements: once in a tile, at most, which is a row's or follows in memory.
  void find_random_words(int64_t i, int64_t n) {
    if (!((takes_[0] && !unencoded_) || takes_[1] || takes_[2])) return;
    for (int64_t k = 0; k < n;) k += find_random_words_of_key(k, i + k, n - k);
  }
  // Returns of how many.
  int64_t find_random_words_of_key(int64_t at, int64_t i, int64_t n) {
    const int64_t first = e_.first_index + i, left = (int64_t{1} << 32) - (first & 0xffffffff);
    uint32_t upper = static_cast<uint32_t>(first >> 32);
    if (e_.layout)
      n = gather_indices<M>(index_, upper, e_.first_index, e_.layout->sizes, e_.layout->strides[kIndex], i, n);
    else
      n = n < left ? n : left;
    for (int w = unencoded_ ? 1 : 0; w < kWords; ++w)
      if (takes_[w])
        random_words<M>(words_[w] + at, e_.layout ? index_ : nullptr, static_cast<uint32_t>(first), n,
                        RandomKey::of(in_.stream, w, upper));
    return n;
  }

  // ---- between operands and buffers ----

  void load(int k, int64_t i, int64_t n) {
    const Operand& o = e_.operand[k];
    switch (how_[k]) {
      case kNot:
        return;
      case kInPlace:
      case kUnencoded:
        tile_.operand[k] = {static_cast<char*>(o.data) + i * size_of(o.storage),
                            static_cast<char*>(o.extra) + i * extra_size_of(o.storage), o.storage};
        return;
      case kConverted:
        return gather<M>({buffer_[k], nullptr, kPlain}, o, e_.layout->sizes, e_.layout->strides[k], i, n);
      case kDecoded:
        if (e_.layout) gather<M>(raw_[k], o, e_.layout->sizes, e_.layout->strides[k], i, n);
        return decode<M>(buffer_[k], raw_[k], e_.layout ? 0 : i, n);
      case kBlocks:
        if constexpr (sizeof(T) == 4) {
          if (e_.layout) gather_bytes(raw_[k].data, o.data, 1, Runs(e_.layout->sizes, e_.layout->strides[k], i), n);
          decode_blocks<M>(buffer_[k], codes(k, i), scales(o), o.storage, n);
        }
    }
  }

  void store(int k, int64_t i, int64_t n) {
    const Operand& o = e_.operand[k];
    switch (how_[k]) {
      case kNot:
      case kInPlace:
        return;
      case kConverted:
        return scatter<M>({buffer_[k], nullptr, kPlain}, o, e_.layout->sizes, e_.layout->strides[k], i, n);
      case kUnencoded:
      case kDecoded:
        encode<M>(buffer_[k], raw_[k], e_.layout ? 0 : i, n, halves(k));
        if (e_.layout) scatter<M>(raw_[k], o, e_.layout->sizes, e_.layout->strides[k], i, n);
        return;
      case kBlocks:
        if constexpr (sizeof(T) == 4) {
          encode_blocks<M>(codes(k, i), scales(o), buffer_[k], o.storage, n, halves(k));
          if (e_.layout) scatter_bytes(raw_[k].data, o.data, 1, Runs(e_.layout->sizes, e_.layout->strides[k], i), n);
        }
    }
  }

  uint8_t* codes(int k, int64_t i) const { return static_cast<uint8_t*>(raw_[k].data) + (e_.layout ? 0 : i); }
  float* scales(const Operand& o) const { return static_cast<float*>(o.extra) + block_; }

  // Of the parameter as it reads now that it is stored.
  void update_average(int64_t i, int64_t n) {
    const T* params = static_cast<const T*>(tile_.param().data);
    if (tile_.param().storage != kPlain) {
      decode<M>(buffer_[kParam], tile_.param(), 0, n);
      params = buffer_[kParam];
    } else {
      load(kParam, i, n);
    }
    average<M>(static_cast<T*>(tile_.state(kAverage).data), params, n, Transforms<T>::of(in_.transforms).toward_param);
    store(kAverageOperand, i, n);
  }

  alignas(64) T buffer_[kOperands][tuning::kTileElements];
  alignas(64) unsigned char raw_data_[kOperands][2 * tuning::kTileElements];
  alignas(64) unsigned char raw_extra_[kOperands][4 * tuning::kTileElements];
  alignas(64) uint32_t index_[tuning::kTileElements], words_[kWords][tuning::kTileElements];
  Entry tile_;
  const Entry& e_;
  const UpdateInputs& in_;
  GroupTransforms without_average_ = in_.transforms;
  How how_[kOperands];
  Operand raw_[kOperands];  // without a layout, the operands themselves
  UpdateFn loop_ = update_linear<Rule, variant, M, Mix<kPlain, kPlain>>;
  int64_t block_ = 0;       // the tile's first, of all in the tensor
  bool in_place_ = false;   // parameter and gradient
  bool unencoded_ = false;  // loop_ leaves parameters in their buffer, and makes word 0
  bool takes_[kWords] = {};
};

template <class Rule, int variant, class M>
void update_tiles(const Entry& e, int64_t begin, int64_t end, const UpdateInputs& in) {
  Tiles<Rule, variant, M>(e, in).run(begin, end);
}

}  // namespace fusedoptim
