// The sums of squares that a rule of a library of its own asks for: of expressions of an element's operands as they are
// before the step, in the tiles of core/sum_of_squares.h.
#pragma once

#include "../core/strided.h"
#include "../core/sum_of_squares.h"
#include "../core/tensor_table.h"
#include "blocks.h"

namespace fusedoptim {

// Operands of the elements [start, start + n) in logical order, in the compute type; zeros up to the end of the tile.
template <class M>
class TileReader {
 public:
  using T = typename M::T;

  TileReader(const Entry& e, int64_t start, int64_t n) : e_(e), start_(start), n_(n) {}

  // In place, if that is possible, else in the buffer.
  const T* read(int k, T* buffer) {
    const Operand& o = e_.operand[k];
    const Layout* const l = e_.sum_layout;
    if (!l && o.storage == kPlain && n_ == kTile) return static_cast<const T*>(o.data) + start_;
    memset(buffer + n_, 0, sizeof(T) * (kTile - n_));
    if (l && is_dtype(o.storage)) {
      gather<M>({buffer, nullptr, kPlain}, o, l->sizes, l->strides[k], start_, n_);
    } else if (is_in_blocks(o.storage)) {
      if constexpr (sizeof(T) == 4) {
        const uint8_t* codes = static_cast<const uint8_t*>(o.data) + start_;
        if (l) {
          gather_bytes(raw_, o.data, 1, Runs(l->sizes, l->strides[k], start_), n_);
          codes = raw_;
        }
        decode_pieces_of_blocks<M>(buffer, codes, static_cast<const float*>(o.extra), o.storage, e_.row, start_, n_);
      }
    } else if (l) {
      const Operand in_order{raw_, raw_extra_, o.storage};
      gather<M>(in_order, o, l->sizes, l->strides[k], start_, n_);
      decode<M>(buffer, in_order, 0, n_);
    } else {
      decode<M>(buffer, o, start_, n_);
    }
    return buffer;
  }

 private:
  static constexpr Storage kPlain = storage_of(kCompute<T>);

  const Entry& e_;
  const int64_t start_, n_;
  alignas(64) unsigned char raw_[2 * kTile], raw_extra_[4 * kTile];
};

template <class Rule, class M>
void measure_tile(const Entry& e, int64_t tile, const UpdateInputs& in, double* sums) {
  using T = typename M::T;
  using V = typename M::V;
  constexpr int kRead = kFirstState + Rule::kSlots;
  const auto& c = *static_cast<const typename Rule::template Scalars<T>*>(in.scalars);
  const auto transform = GradTransform<T>::of(in.transforms);
  const bool leave_gradient = in.transforms.leave_gradient();
  const int64_t start = tile * kTile, left = e.numel - start, n = left < kTile ? left : kTile;
  alignas(64) T buffer[kRead][kTile], summed[Rule::sums][kTile];
  const T* from[kRead];
  TileReader<M> reader(e, start, n);
  for (int k = 0; k < kRead; ++k)
    if (Rule::measures(k)) from[k] = reader.read(k, buffer[k]);
  for (int64_t i = 0; i < kTile; i += M::width) {
    V value[kRead], x[Rule::sums];
    for (int k = 0; k < kRead; ++k) value[k] = Rule::measures(k) ? M::load(from[k] + i) : M::set(0);
    if (!leave_gradient) value[kGrad] = transform_grad<M>(value[kGrad], transform);
    Rule::template measured<M>(value[kParam], value[kGrad], value + kFirstState, c, x);
    for (int k = 0; k < Rule::sums; ++k) M::store(summed[k] + i, x[k]);
  }
  for (int k = 0; k < Rule::sums; ++k) {
    memset(summed[k] + n, 0, sizeof(T) * (kTile - n));  // what was made of zeros may be something else
    sums[k] = tile_sum_of_squares(summed[k]);
  }
}

template <class Rule, class M>
constexpr MeasureFn measure_of() {
  if constexpr (Rule::sums > 0)
    return measure_tile<Rule, M>;
  else
    return nullptr;
}

}  // namespace fusedoptim
