// Barriers in shared memory, which count arrivals and bytes of copies; a wait is for the end of a phase of one parity.

#pragma once

#include <map>
#include <vector>

#include "shared_memory.h"
#include "warp.h"

struct Mbarrier {
  explicit Mbarrier(uint32_t count) : count(count), pending(count) {}

  uint32_t count;     // arrivals of a phase
  int64_t pending;    // arrivals that this phase still needs
  int64_t bytes = 0;  // that copies still have to bring
  uint64_t phase = 0;
  Knowledge arriving, done;  // of those who arrived in this phase, and in those before
};

class Mbarriers {
 public:
  Mbarriers(Report& report, SharedMemory& memory, std::vector<Warp>& warps)
      : report_(report), memory_(memory), warps_(warps) {}

  void create(int pc, uint32_t address, uint32_t count) {
    memory_.reserve_for_barrier(pc, address);
    if (!barriers_.try_emplace(address, count).second) {
      report_.fault(pc, "mbarrier: initialised twice", SharedMemory::offset(address));
    }
  }

  Mbarrier& find(int pc, uint32_t address) {
    auto found = barriers_.find(address);
    if (found == barriers_.end()) report_.stop(pc, "mbarrier: none here", SharedMemory::offset(address));
    return found->second;
  }

  void arrive(int pc, uint32_t address, int arrivals, uint32_t expected_bytes, const Knowledge& knows) {
    Mbarrier& barrier = find(pc, address);
    barrier.bytes += expected_bytes;
    if (barrier.pending < arrivals) report_.fault(pc, "mbarrier: too many arrivals", SharedMemory::offset(address));
    barrier.arriving.join(knows);
    barrier.pending -= arrivals;
    end_phase(address, barrier);
  }

  // A copy has brought so many bytes.
  void complete(int pc, uint32_t address, uint64_t bytes, uint32_t clock, int agent) {
    Mbarrier& barrier = find(pc, address);
    barrier.bytes -= bytes;
    uint32_t& known = barrier.arriving.seen.at[agent];
    known = std::max(known, clock);
    end_phase(address, barrier);
  }

  std::string state() const {
    std::string all;
    for (const auto& [address, barrier] : barriers_) {
      all += "; mbarrier at " + SharedMemory::offset(address) + " in phase " + str(barrier.phase) + " lacks " +
             str(barrier.pending) + " of " + str(barrier.count) + " arrivals and " + str(barrier.bytes) + " bytes";
    }
    return all;
  }

 private:
  void end_phase(uint32_t address, Mbarrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.phase++;
    barrier.pending = barrier.count;
    barrier.done.join(barrier.arriving);
    barrier.arriving = Knowledge();
    for (Warp& warp : warps_) {
      if (warp.state == Warp::AT_MBARRIER && warp.waits_for == address) warp.state = Warp::RUNNING;
    }
  }

  Report& report_;
  SharedMemory& memory_;
  std::vector<Warp>& warps_;
  std::map<uint32_t, Mbarrier> barriers_;
};
