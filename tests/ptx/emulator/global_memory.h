// Device memory: accesses must lie inside of one array and be aligned; what is stored twice must be the same.

#pragma once

#include <vector>

#include "report.h"

class GlobalMemory {
 public:
  GlobalMemory(const Launch& launch, Report& report) : launch_(launch), report_(report) {
    for (int i = 0; i < launch.array_count; i++) {
      const Array& array = launch.arrays[i];
      stored_.emplace_back(array.writable ? array.end - array.begin : 0);
    }
  }

  // False, with a fault, if there is nothing to read.
  bool load(int pc, uint64_t address, uint32_t bytes, void* to) {
    if (!find(pc, address, bytes, "out of bounds: load")) return false;
    memcpy(to, reinterpret_cast<const void*>(address), bytes);
    return true;
  }

  void store(int pc, uint64_t address, uint32_t bytes, const void* from) {
    if (!find(pc, address, bytes, "out of bounds: store")) return;
    if (!last_->writable) return report_.fault(pc, "store to an input", place(address));
    uint8_t* stored = &stored_[last_ - launch_.arrays][address - last_->begin];
    if (*stored && memcmp(reinterpret_cast<const void*>(address), from, bytes)) {
      report_.fault(pc, "stored twice with different values", place(address));
    }
    memset(stored, 1, bytes);
    memcpy(reinterpret_cast<void*>(address), from, bytes);
  }

 private:
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
  std::vector<std::vector<uint8_t>> stored_;  // bytes of each array
};
