// Device memory: accesses must lie inside of one array and be aligned; what is stored twice must be the same, or it must
// be certain which comes last.

#pragma once

#include <vector>

#include "clocks.h"
#include "report.h"

class GlobalMemory {
 public:
  GlobalMemory(const Launch& launch, Report& report) : launch_(launch), report_(report) {
    for (int i = 0; i < launch.array_count; i++) {
      const Array& array = launch.arrays[i];
      stored_.emplace_back(array.writable ? (array.end - array.begin) / kWord + 1 : 0);
    }
  }

  void begin_block() { block_++; }

  // False, with a fault, if there is nothing to read.
  bool load(int pc, uint64_t address, uint32_t bytes, void* to) {
    if (!find(pc, address, bytes, "out of bounds: load")) return false;
    memcpy(to, reinterpret_cast<const void*>(address), bytes);
    return true;
  }

  void store(const Access& who, uint64_t address, uint32_t bytes, const void* from) {
    if (!find(who.pc, address, bytes, "out of bounds: store")) return;
    if (!last_->writable) return report_.fault(who.pc, "store to an input", place(address));
    const Store now{block_, who.agent, who.lane, who.now};
    for (uint32_t at = 0; at < bytes; at += kWord) {
      Store& before = stored_[last_ - launch_.arrays][(address + at - last_->begin) / kWord];
      const uint8_t* word = static_cast<const uint8_t*>(from) + at;
      if (!comes_after(who, before) && memcmp(reinterpret_cast<const void*>(address + at), word, kWord)) {
        report_.fault(who.pc, "stored twice with different values", place(address));
      }
      before = now;
    }
    memcpy(reinterpret_cast<void*>(address), from, bytes);
  }

 private:
  static constexpr uint32_t kWord = 2;  // bytes of the smallest type that is stored

  struct Store {
    int block = 0, agent = 0, lane = 0;
    uint32_t now = 0;  // the agent's clock
  };

  // Whether it is certain that an access comes after a store: there was none, or the block's threads have met since.
  bool comes_after(const Access& who, const Store& store) const {
    if (!store.block) return true;
    if (store.block != block_) return false;
    if (store.agent != who.agent) return who.knows.seen.at[store.agent] >= store.now;
    return store.lane == who.lane || store.now < who.synced;
  }

  bool find(int pc, uint64_t address, uint32_t bytes, const char* otherwise) {
    auto holds = [=](const Array& array) { return address >= array.begin && address + bytes <= array.end; };
    if (!last_ || !holds(*last_)) {
      const Array* end = launch_.arrays + launch_.array_count;
      last_ = std::find_if(launch_.arrays, end, holds);
      if (last_ == end) {
        last_ = nullptr;
        report_.fault(pc, otherwise, near(address));
        return false;
      }
    }
    if (address % bytes)
      report_.fault(pc, "misaligned access to device memory", place(address) + ", bytes " + str(bytes));
    return address % bytes == 0;
  }

  std::string place(uint64_t address) const {
    return "array " + str(last_->number) + ", offset " + str(address - last_->begin);
  }

  std::string near(uint64_t address) const {
    constexpr uint64_t kNear = 4096;  // the guard that Python leaves around arrays
    for (int i = 0; i < launch_.array_count; i++) {
      const Array& array = launch_.arrays[i];
      if (address + kNear < array.begin || address >= array.end + kNear) continue;
      return "array " + str(array.number) + ", offset " + str(static_cast<int64_t>(address - array.begin)) + " of " +
             str(array.end - array.begin);
    }
    return "near no array";
  }

  const Launch& launch_;
  Report& report_;
  const Array* last_ = nullptr;
  int block_ = 0;  // they are counted from 1
  std::vector<std::vector<Store>> stored_;  // to the words of each array
};
