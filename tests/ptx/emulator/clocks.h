// Vector clocks: which of the others' actions happened before one's own.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

constexpr int kMaxWarps = 32;
constexpr int kCopies = 16;  // under way at once, each an agent of its own
constexpr int kAgents = kMaxWarps + kCopies;

struct VectorClock {
  std::array<uint32_t, kAgents> at{};

  void join(const VectorClock& other) {
    for (int i = 0; i < kAgents; i++) at[i] = std::max(at[i], other.at[i]);
  }
};

// What an agent has seen, and what of that is also visible to the asynchronous proxy (TMA, tensor cores).
struct Knowledge {
  VectorClock seen, fenced;

  void join(const Knowledge& other) {
    seen.join(other.seen);
    fenced.join(other.fenced);
  }
};

// Who accesses memory: a lane of a warp, the tensor cores for a warp, or a copy.
struct Access {
  int pc, agent, lane;
  bool asynchronous;
  uint32_t now;     // the agent's clock
  uint32_t synced;  // its clock when the lanes of the warp last met
  const Knowledge& knows;
};
