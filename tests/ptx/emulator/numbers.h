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

inline float maximum_or_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? bits<float>(0x7fffffff) : std::max(a, b);
}

inline float minimum_or_nan(float a, float b) { return -maximum_or_nan(-a, -b); }

inline int32_t truncated(float value) {  // the nearest there is, 0 of a NaN
  if (std::isnan(value)) return 0;
  return static_cast<int32_t>(std::clamp<double>(value, INT32_MIN, INT32_MAX));
}

// The instruction prmt: four of the eight bytes of `high` and `low`, or their signs.
inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selection) {
  const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
  uint32_t found = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t chosen = selection >> 4 * i, byte = bytes >> 8 * (chosen & 7) & 0xff;
    found |= (chosen & 8 ? (byte >> 7) * 0xff : byte) << 8 * i;
  }
  return found;
}

// The instruction lop3: bit 4 a + 2 b + c of the table.
inline uint32_t look_up(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t found = 0;
  for (int i = 0; i < 8; i++) {
    if (table >> i & 1) found |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return found;
}

// The instruction bfi: `length` bits of `bits` from `position` of `base` on.
inline uint32_t insert_bits(uint32_t bits, uint32_t base, uint32_t position, uint32_t length) {
  position &= 0xff;
  length &= 0xff;
  const uint64_t wanted = length < 32 ? (uint64_t{1} << length) - 1 : UINT32_MAX;
  const uint32_t mask = position < 32 ? wanted << position : 0;
  return (base & ~mask) | (position < 32 ? bits << position & mask : 0);
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
