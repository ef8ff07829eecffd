// Numbers in 8 bits: codes, and a scale for each block. A code is the upper bits of 1 + |x| * top / scale as fp32, from
// those of 1 on: the logarithm, linearly interpolated. So it takes no table and no function of a library, 0 is exactly
// 0, and steps are 1/16 to 1/32 of a number, for squares down to a millionth of the block's largest.
//
// A block is 128 elements that follow each other in one row: row r is the elements with index r of the first dimension,
// in logical order; the last block of a row may be shorter. Whatever shards that dimension cuts no block.
#pragma once

#include "storage.h"

namespace fusedoptim {

inline constexpr int64_t kBlock = 128;
FUSEDOPTIM_HD int64_t blocks_of_row(int64_t row) { return (row + kBlock - 1) / kBlock; }

struct BlockFormat {
  int mantissa;  // bits of a code
  int largest;   // code
  float top;     // what the largest number of a block is scaled to
  bool squares;  // never negative; above 0 no code is 0, because a root of it divides
};
FUSEDOPTIM_HD constexpr BlockFormat block_format(Storage s) {
  return s >= Storage::q8_squares ? BlockFormat{4, 255, 63487.0f, true} : BlockFormat{5, 127, 14.75f, false};
}

// What is kept beside a block. largest: of the numbers' bits without their signs.
FUSEDOPTIM_HD float block_scale(uint32_t largest) {
  if (largest >= 0x7f800000u) return float_of(0x7fc00000u);  // loud: all of the block is NaN
  const float s = float_of(largest);
  return largest == 0 ? 0.0f : s < 7.888609052210118e-31f ? 7.888609052210118e-31f : s;  // 2^-100
}
// Numbers are multiplied by this before they become codes; 0 where all codes are 0.
FUSEDOPTIM_HD float block_inverse(BlockFormat f, float scale) { return scale > 0 ? f.top / scale : 0.0f; }
// Codes stand for multiples of this.
FUSEDOPTIM_HD float block_unit(BlockFormat f, float scale) { return scale * (1.0f / f.top); }

// What is added before bits are cut off: half of the last one, or 16 random bits below it.
FUSEDOPTIM_HD uint32_t block_half(BlockFormat f) { return 1u << (22 - f.mantissa); }
FUSEDOPTIM_HD uint32_t block_random(BlockFormat f, uint32_t random) { return random << (7 - f.mantissa); }

// Without the sign. inverse is 0 for a block that is NaN.
FUSEDOPTIM_HD int block_code(BlockFormat f, float x, float inverse, uint32_t rounding) {
  const float magnitude = float_of(bits_of(x) & 0x7fffffffu);
  if (!(inverse > 0)) return 0;
  int c = static_cast<int>((bits_of(magnitude * inverse + 1.0f) - 0x3f800000u + rounding) >> (23 - f.mantissa));
  if (c > f.largest) c = f.largest;
  return f.squares && c == 0 && magnitude > 0 ? 1 : c;
}
// As it is stored.
FUSEDOPTIM_HD uint8_t block_byte(BlockFormat f, float x, int code) {
  return static_cast<uint8_t>(!f.squares && bits_of(x) >> 31 ? -code : code);
}
FUSEDOPTIM_HD float block_value(BlockFormat f, uint8_t byte, float unit) {
  const int code = f.squares ? byte : static_cast<int8_t>(byte);
  const uint32_t magnitude = code < 0 ? -code : code;
  const float x = (float_of(0x3f800000u + (magnitude << (23 - f.mantissa))) - 1.0f) * unit;
  return code < 0 ? -x : x;
}

}  // namespace fusedoptim
