// Shared memory of a block, with a detector of races that knows for each word of 4 bytes who wrote and read it when.

#pragma once

#include <vector>

#include "clocks.h"
#include "report.h"

constexpr uint32_t kSharedBase = 1024;  // the address of its first byte, so that 0 is none

class SharedMemory {
 public:
  SharedMemory(const Launch& launch, Report& report)
      : launch_(launch), report_(report), bytes_(launch.shared_bytes), cells_(launch.shared_bytes / 4 + 1) {
    const uint32_t poison = 0x7fc07fc0;  // NaN, in float32 and in bfloat16
    for (size_t i = 0; i + 4 <= bytes_.size(); i += 4) memcpy(&bytes_[i], &poison, 4);
  }

  void read(const Access& who, uint64_t address, uint32_t bytes, void* to) {
    check(who.pc, address, bytes);
    for (size_t i = first(address); i < last(address, bytes); i++) note_read(who, i);
    memcpy(to, &bytes_[address - kSharedBase], bytes);
  }

  void write(const Access& who, uint64_t address, uint32_t bytes, const void* from) {
    check(who.pc, address, bytes);
    for (size_t i = first(address); i < last(address, bytes); i++) note_write(who, i);
    memcpy(&bytes_[address - kSharedBase], from, bytes);
  }

  void reserve_for_barrier(int pc, uint64_t address) {
    check(pc, address, 8);
    for (size_t i = first(address); i < last(address, 8); i++) cells_[i].is_barrier = true;
  }

  static std::string offset(uint64_t address) {
    return "offset " + str(static_cast<int64_t>(address) - static_cast<int64_t>(kSharedBase));
  }

 private:
  static constexpr uint8_t kSeveral = 255;  // lanes

  struct Cell {
    int writer = -1, writer_lane = 0, writer_pc = -1, reader_pc = -1;
    uint32_t written = 0;  // by the writer's clock
    uint32_t readers = 0;  // warps that read it since, one bit each
    bool asynchronous = false, is_barrier = false;
    uint32_t read[kMaxWarps] = {};
    uint8_t reader_lane[kMaxWarps] = {};
  };

  static size_t first(uint64_t address) { return (address - kSharedBase) / 4; }
  static size_t last(uint64_t address, uint32_t bytes) { return (address - kSharedBase + bytes + 3) / 4; }

  void check(int pc, uint64_t address, uint32_t bytes) {
    const bool inside = address >= kSharedBase && address + bytes <= kSharedBase + bytes_.size();
    if (inside && address % bytes == 0) return;
    report_.stop(pc, inside ? "shared memory: misaligned" : "shared memory: out of bounds",
                 offset(address) + ", bytes " + str(bytes) + " of " + str(bytes_.size()));
  }

  void note_read(const Access& who, size_t i) {
    Cell& cell = cells_[i];
    if (cell.is_barrier) report_.fault(who.pc, "shared memory: word of an mbarrier", at(i, cell));
    if (cell.writer < 0) return report_.fault(who.pc, "shared memory: read of what nobody wrote", at(i, cell));
    if (cell.writer != who.agent) {
      if (!saw_write(who, cell)) report_.fault(who.pc, "race: read after write", at(i, cell));
    } else if (!who.asynchronous && cell.writer_lane != who.lane && cell.written >= who.synced) {
      report_.fault(who.pc, "race within a warp: read after write", at(i, cell));
    }
    if (lacks_fence(who, cell)) report_.fault(who.pc, "missing proxy fence", at(i, cell));
    const bool again = cell.readers >> who.agent & 1 && cell.read[who.agent] >= who.synced;
    cell.reader_lane[who.agent] = again && cell.reader_lane[who.agent] != who.lane ? kSeveral : who.lane;
    cell.read[who.agent] = who.now;
    cell.readers |= 1u << who.agent;
    cell.reader_pc = who.pc;
  }

  void note_write(const Access& who, size_t i) {
    Cell& cell = cells_[i];
    if (cell.is_barrier) report_.fault(who.pc, "shared memory: word of an mbarrier", at(i, cell));
    if (cell.writer >= 0) {
      if (cell.writer != who.agent) {
        if (!saw_write(who, cell)) report_.fault(who.pc, "race: write after write", at(i, cell));
      } else if (!who.asynchronous && cell.writer_lane != who.lane && cell.written >= who.synced) {
        report_.fault(who.pc, "race within a warp: write after write", at(i, cell));
      }
      if (lacks_fence(who, cell)) report_.fault(who.pc, "missing proxy fence", at(i, cell));
    }
    for (uint32_t readers = cell.readers; readers; readers &= readers - 1) {
      const int reader = __builtin_ctz(readers);
      if (reader != who.agent) {
        if (cell.read[reader] > who.knows.seen.at[reader]) report_.fault(who.pc, "race: write after read", at(i, cell));
      } else if (cell.read[reader] >= who.synced && cell.reader_lane[reader] != who.lane) {
        report_.fault(who.pc, "race within a warp: write after read", at(i, cell));
      }
    }
    cell.writer = who.agent;
    cell.writer_lane = who.lane;
    cell.writer_pc = who.pc;
    cell.written = who.now;
    cell.asynchronous = who.asynchronous;
    cell.readers = 0;
  }

  static bool saw_write(const Access& who, const Cell& cell) { return who.knows.seen.at[cell.writer] >= cell.written; }

  static bool lacks_fence(const Access& who, const Cell& cell) {
    return who.asynchronous && !cell.asynchronous && who.knows.fenced.at[cell.writer] < cell.written;
  }

  std::string at(size_t word, const Cell& cell) const {
    auto line = [this](int pc) { return pc < 0 ? "nowhere"_s : "line " + str(launch_.code[pc].line); };
    return "offset " + str(4 * word) + ", last written at " + line(cell.writer_pc) + ", read at " +
           line(cell.reader_pc);
  }

  const Launch& launch_;
  Report& report_;
  std::vector<uint8_t> bytes_;
  std::vector<Cell> cells_;
};
