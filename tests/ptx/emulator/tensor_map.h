// A TMA descriptor as the stand-in driver encodes it and the emulator reads it; 128 bytes, as CUDA's own.

#pragma once

#include <cstdint>

constexpr int kMaxRank = 5;
constexpr uint32_t kTensorMapMagic = 0x7e50a9f3;

struct TensorMap {
  uint32_t magic;
  uint8_t rank, swizzle_bytes, element_bytes, unused;
  uint64_t base;
  uint32_t dimensions[kMaxRank], box[kMaxRank];  // in elements, the fastest dimension first
  uint64_t strides[kMaxRank - 1];                // in bytes, of all dimensions but the first
  uint8_t padding[40];
};
static_assert(sizeof(TensorMap) == 128, "the size of CUtensorMap");
