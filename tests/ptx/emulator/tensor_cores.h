// wgmma: how matrices lie in shared memory, and their products.

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

// One wgmma.m64nNk16 of a warp, which has 16 of the 64 rows: sums in double, rounded once.
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
        const int row = lane / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        const int accumulator = launch_.lists[in.list + i];
        double sum = product.accumulate ? warp_.get<float>(accumulator, lane) : 0;
        for (int k = 0; k < kDepth; k++) sum += static_cast<double>(a[row * kDepth + k]) * b[column * kDepth + k];
        warp_.set<float>(accumulator, lane, sum);
      }
    }
  }

 private:
  static constexpr int kRows = 16, kDepth = 16;

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
