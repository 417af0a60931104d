// A warp: its registers, its lanes in groups that are at different instructions, and what it waits for.

#pragma once

#include <array>
#include <deque>
#include <vector>

#include "clocks.h"
#include "numbers.h"
#include "program.h"

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = ~0u;

struct Product {  // a wgmma that was issued
  const Instruction* instruction;
  int pc;
  uint64_t a, b;  // descriptors of matrices in shared memory
  bool accumulate;
};

struct ThreadCopy {  // a cp.async that was issued
  int pc, lane;
  uint64_t address;
  uint32_t bytes;
  std::array<uint8_t, 16> values;
};

class Warp {
 public:
  enum State { RUNNING, AT_BARRIER, AT_MBARRIER, DONE };
  struct Group {
    int pc;
    uint32_t lanes;
  };

  Warp(const Launch& launch, int number, uint32_t lanes, uint32_t unset_predicates)
      : lanes(lanes),
        predicates(launch.predicates, unset_predicates),
        words_(kLanes * (launch.registers32 + launch.constants32_length), 0x7fc07fc0),  // NaN, in bfloat16 too
        double_words_(kLanes * (launch.registers64 + launch.constants64_length), 0xdead0000dead0001) {
    for (int i = 0; i < launch.constants32_length; i++) {
      std::fill_n(&words_[kLanes * (launch.registers32 + i)], kLanes, launch.constants32[i]);
    }
    for (int i = 0; i < launch.constants64_length; i++) {
      std::fill_n(&double_words_[kLanes * (launch.registers64 + i)], kLanes, launch.constants64[i]);
    }
    groups.push_back({0, lanes});
    knows.seen.at[number] = 1;
  }

  template <class T>
  T get(int reg, int lane) const {
    if constexpr (sizeof(T) == 8) {
      return bits<T>(double_words_[kLanes * reg + lane]);
    } else {
      return bits<T>(words_[kLanes * reg + lane]);
    }
  }

  template <class T>
  void set(int reg, int lane, T value) {
    if constexpr (sizeof(T) == 8) {
      double_words_[kLanes * reg + lane] = bits<uint64_t>(value);
    } else {
      words_[kLanes * reg + lane] = bits<uint32_t>(value);
    }
  }

  void set_predicate(int reg, uint32_t mask, uint32_t value) {
    predicates[reg] = (predicates[reg] & ~mask) | (value & mask);
  }

  uint64_t address(const Instruction& in, int lane) const {
    if (in.operand[0] >= 0) return get<uint64_t>(in.operand[0], lane) + in.immediate;
    if (in.operand[1] >= 0) return get<uint32_t>(in.operand[1], lane) + static_cast<uint32_t>(in.immediate);
    return in.immediate;
  }

  // The group that is furthest behind.
  size_t next_group() const {
    size_t found = 0;
    for (size_t i = 1; i < groups.size(); i++) {
      if (groups[i].pc < groups[found].pc) found = i;
    }
    return found;
  }

  void merge_groups() {
    for (size_t i = 0; i < groups.size(); i++) {
      for (size_t j = groups.size() - 1; j > i; j--) {
        if (groups[i].pc != groups[j].pc) continue;
        groups[i].lanes |= groups[j].lanes;
        groups.erase(groups.begin() + j);
      }
    }
  }

  const uint32_t lanes;
  State state = RUNNING;
  std::vector<uint32_t> predicates;  // a bit a lane
  std::vector<Group> groups;
  uint32_t waits_for = 0;  // number of the barrier or address of the mbarrier
  int waits_at = 0;        // instruction

  Knowledge knows;
  uint32_t synced = 0;  // its clock when its lanes last met

  std::vector<Product> issued;
  std::deque<std::vector<Product>> committed;
  std::vector<ThreadCopy> issued_copies;
  std::deque<std::vector<ThreadCopy>> committed_copies;

 private:
  std::vector<uint32_t> words_;
  std::vector<uint64_t> double_words_;
};
