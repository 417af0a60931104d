// Bits of numbers.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits are kept");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline uint32_t to_bfloat16(float value) {  // to the nearest, ties to even
  const uint32_t word = bits<uint32_t>(value);
  if (std::isnan(value)) return 0x7fff;
  return (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

inline float from_bfloat16(uint32_t half) { return bits<float>(half << 16); }

inline float flush_subnormal(float value) {
  return std::fabs(value) < 1.17549435e-38f ? std::copysign(0.0f, value) : value;
}

// The instruction bfe: `length` bits of `value` from `position` on.
inline uint64_t extract_bits(uint64_t value, uint32_t position, uint32_t length, uint32_t width, bool is_signed) {
  position &= 0xff;
  length &= 0xff;
  if (!length) return 0;
  const uint64_t sign = is_signed ? value >> std::min(position + length - 1, width - 1) & 1 : 0;
  uint64_t found = 0;
  for (uint32_t i = 0; i < width; i++) {
    const bool inside = i < length && position + i < width;
    found |= (inside ? value >> (position + i) & 1 : sign) << i;
  }
  return found;
}
