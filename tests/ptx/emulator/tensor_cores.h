// wgmma and mma.sync: how their matrices lie in shared memory and in registers, and the products.

#pragma once

#include "report.h"
#include "shared_memory.h"
#include "warp.h"

// Where a byte of a swizzled buffer is: groups of 16 bytes are exchanged in a pattern that repeats every 8 rows.
inline uint64_t swizzled(uint64_t address, uint32_t swizzle_bytes) {
  const uint64_t groups = swizzle_bytes ? swizzle_bytes - 16 : 0;
  return address ^ (address >> 3 & groups);
}

// A matrix of bfloat16 in shared memory as the 64 bits of a wgmma descriptor tell.
class MatrixDescriptor {
 public:
  static constexpr uint64_t kBaseOffset = 7ull << 49;  // not covered

  MatrixDescriptor(uint64_t descriptor, bool transposed)
      : start_((descriptor & 0x3fff) << 4),
        leading_((descriptor >> 16 & 0x3fff) << 4),
        stride_((descriptor >> 32 & 0x3fff) << 4),
        transposed_(transposed) {
    static constexpr uint32_t kSwizzleBytes[] = {0, 128, 64, 32};
    swizzle_ = kSwizzleBytes[descriptor >> 62];
  }

  // Address of an element; k is the dimension that is summed over.
  uint64_t at(int row, int k) const {
    return swizzled(start_ + (transposed_ ? offset(k, row) : offset(row, k)), swizzle_);
  }

 private:
  // `outer` goes with the rows of 8 that a swizzle's pattern has, `inner` along such a row.
  uint64_t offset(int outer, int inner) const {
    if (!swizzle_) {
      return transposed_ ? inner % 8 * 2 + inner / 8 * stride_ + outer % 8 * 16 + outer / 8 * leading_
                         : outer % 8 * 16 + outer / 8 * stride_ + inner / 8 * leading_ + inner % 8 * 2;
    }
    const uint64_t rows = static_cast<uint64_t>(outer % 8) * swizzle_ + outer / 8 * stride_;
    if (!transposed_) return rows + inner * 2;
    const int columns = swizzle_ / 2;
    return rows + inner % columns * 2 + inner / columns * leading_;
  }

  uint64_t start_, leading_, stride_;
  bool transposed_;
  uint32_t swizzle_;
};

constexpr int kDepth = 16;  // what an instruction sums over

// Where the accumulator i of a lane is in the product.
inline int accumulator_row(int lane, int i) { return lane / 4 + 8 * (i / 2 % 2); }
inline int accumulator_column(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

// start + the sum of products of a row of A and a column of B, in double and rounded once.
inline float add_products(float start, const float* a, const float* b) {
  double sum = start;
  for (int k = 0; k < kDepth; k++) sum += static_cast<double>(a[k]) * b[k];
  return sum;
}

// One mma.sync.m16n8k16 of a warp, D = A B + C, all in registers.
inline void multiply_fragments(const Launch& launch, const Instruction& in, Warp& warp) {
  const int32_t *d = launch.lists + in.list, *a_words = d + 4, *b_words = a_words + 4, *c = b_words + 2;
  float a[16][kDepth], b[8][kDepth], sums[kLanes][4];  // B by columns
  const auto unpack = [](uint32_t word, float* to) {
    to[0] = from_bfloat16(word & 0xffff);
    to[1] = from_bfloat16(word >> 16);
  };
  for (int lane = 0; lane < kLanes; lane++) {
    const int row = lane / 4, k = lane % 4 * 2;
    for (int i = 0; i < 4; i++) unpack(warp.get<uint32_t>(a_words[i], lane), &a[row + i % 2 * 8][k + i / 2 * 8]);
    for (int i = 0; i < 2; i++) unpack(warp.get<uint32_t>(b_words[i], lane), &b[row][k + i * 8]);
  }
  for (int lane = 0; lane < kLanes; lane++) {
    for (int i = 0; i < 4; i++) {
      const float *row = a[accumulator_row(lane, i)], *column = b[accumulator_column(lane, i)];
      sums[lane][i] = add_products(warp.get<float>(c[i], lane), row, column);
    }
  }
  for (int lane = 0; lane < kLanes; lane++) {
    for (int i = 0; i < 4; i++) warp.set(d[i], lane, sums[lane][i]);
  }
}

// One wgmma.m64nNk16 of a warp, which has 16 of the 64 rows.
class TensorCore {
 public:
  TensorCore(const Launch& launch, Report& report, SharedMemory& memory, int number, Warp& warp)
      : launch_(launch), report_(report), memory_(memory), number_(number), warp_(warp) {}

  void multiply(const Product& product) {
    const Instruction& in = *product.instruction;
    if ((product.a | product.b) & MatrixDescriptor::kBaseOffset)
      report_.stop(product.pc, "not covered: wgmma base offset");
    const auto a = read(product, MatrixDescriptor(product.a, in.kind & 1), number_ % 4 * kRows, kRows);
    const auto b = read(product, MatrixDescriptor(product.b, in.kind & 2), 0, in.count);
    for (int lane = 0; lane < kLanes; lane++) {
      for (int i = 0; i < in.list_length; i++) {
        const float* row = &a[accumulator_row(lane, i) * kDepth];
        const float* column = &b[accumulator_column(lane, i) * kDepth];
        const int accumulator = launch_.lists[in.list + i];
        const float start = product.accumulate ? warp_.get<float>(accumulator, lane) : 0;
        warp_.set(accumulator, lane, add_products(start, row, column));
      }
    }
  }

 private:
  static constexpr int kRows = 16;

  std::vector<float> read(const Product& product, const MatrixDescriptor& matrix, int first, int rows) {
    const uint32_t now = warp_.knows.seen.at[number_];
    const Access who{product.pc, number_, 0, true, now, warp_.synced, warp_.knows};
    std::vector<float> found;
    found.reserve(rows * kDepth);
    for (int row = first; row < first + rows; row++) {
      for (int k = 0; k < kDepth; k++) {
        uint16_t element = 0;
        memory_.read(who, matrix.at(row, k), sizeof element, &element);
        found.push_back(from_bfloat16(element));
      }
    }
    return found;
  }

  const Launch& launch_;
  Report& report_;
  SharedMemory& memory_;
  const int number_;
  Warp& warp_;
};
