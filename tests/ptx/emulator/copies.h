// TMA: copies of boxes from device memory to shared memory, which end when the scheduler says so.

#pragma once

#include "global_memory.h"
#include "mbarriers.h"
#include "shared_memory.h"
#include "tensor_cores.h"
#include "tensor_map.h"

struct Copy {
  int pc;
  uint32_t destination, barrier;
  const TensorMap* map;
  int32_t start[kMaxRank];
  int agent;
  Knowledge knows;  // of the warp that issued it
};

class CopyEngine {
 public:
  CopyEngine(Report& report, GlobalMemory& device, SharedMemory& shared, Mbarriers& barriers)
      : report_(report), device_(device), shared_(shared), barriers_(barriers) {}

  void issue(Copy copy) {
    if (copy.map->magic != kTensorMapMagic) report_.stop(copy.pc, "TMA: no descriptor");
    if (copy.destination % 128) report_.fault(copy.pc, "TMA: misaligned destination", str(copy.destination));
    if (copy.map->swizzle_bytes && copy.destination % (8 * copy.map->swizzle_bytes)) {
      report_.fault(copy.pc, "TMA: destination not aligned to its swizzle", SharedMemory::offset(copy.destination));
    }
    barriers_.find(copy.pc, copy.barrier);
    copy.agent = kMaxWarps + issued_ % kCopies;
    copy.knows.seen.at[copy.agent] = ++clocks_[issued_++ % kCopies];
    under_way_.push_back(copy);
  }

  bool idle() const { return under_way_.empty(); }
  size_t under_way() const { return under_way_.size(); }
  int first_pc() const { return under_way_.front().pc; }

  void finish(size_t which) {
    const Copy copy = under_way_[which];
    under_way_.erase(under_way_.begin() + which);
    const TensorMap& map = *copy.map;
    uint32_t index[kMaxRank] = {};  // of a row of the box
    uint64_t bytes = 0;
    while (true) {
      bytes += move_row(copy, index, bytes);
      int d = 1;
      while (d < map.rank && ++index[d] == map.box[d]) index[d++] = 0;
      if (d >= map.rank) break;
    }
    barriers_.complete(copy.pc, copy.barrier, bytes, copy.knows.seen.at[copy.agent], copy.agent);
  }

 private:
  static constexpr uint32_t kGroup = 16;  // bytes that a swizzle keeps together

  uint32_t move_row(const Copy& copy, const uint32_t* index, uint64_t offset) {
    const TensorMap& map = *copy.map;
    const uint32_t bytes = map.box[0] * map.element_bytes;
    const Access who{copy.pc, copy.agent, 0, true, copy.knows.seen.at[copy.agent], 0, copy.knows};
    for (uint32_t at = 0; at < bytes; at += kGroup) {
      uint8_t group[kGroup] = {};  // zeros where the box is outside of the array
      for (uint32_t byte = 0; byte < kGroup; byte += map.element_bytes) {
        const int64_t column = static_cast<int64_t>(copy.start[0]) + (at + byte) / map.element_bytes;
        uint64_t source = map.base + column * map.element_bytes;
        bool inside = column >= 0 && column < map.dimensions[0];
        for (int d = 1; d < map.rank; d++) {
          const int64_t i = static_cast<int64_t>(copy.start[d]) + index[d];
          inside = inside && i >= 0 && i < map.dimensions[d];
          source += i * map.strides[d - 1];
        }
        if (inside) device_.load(copy.pc, source, map.element_bytes, group + byte);
      }
      shared_.write(who, swizzled(copy.destination + offset + at, map.swizzle_bytes), kGroup, group);
    }
    return bytes;
  }

  Report& report_;
  GlobalMemory& device_;
  SharedMemory& shared_;
  Mbarriers& barriers_;
  std::vector<Copy> under_way_;
  uint32_t issued_ = 0, clocks_[kCopies] = {};
};
