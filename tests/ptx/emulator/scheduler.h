// Whose turn it is: the warps of a block and its copies, interleaved as a policy says.

#pragma once

#include <numeric>
#include <random>
#include <vector>

#include "copies.h"
#include "warp.h"

class Scheduler {
 public:
  Scheduler(const Launch& launch, std::mt19937_64& random, const std::vector<Warp>& warps, const CopyEngine& copies)
      : policy_(launch.policy), random_(random), warps_(warps), copies_(copies), order_(warps.size()) {
    std::iota(order_.begin(), order_.end(), 0);
    std::shuffle(order_.begin(), order_.end(), random_);
  }

  bool any(Warp::State state) const {
    return std::any_of(warps_.begin(), warps_.end(), [=](const Warp& warp) { return warp.state == state; });
  }

  bool all_done() const {
    return std::all_of(warps_.begin(), warps_.end(), [](const Warp& warp) { return warp.state == Warp::DONE; });
  }

  // Whether a copy ends before another instruction runs.
  bool copy_is_next() {
    if (copies_.idle()) return false;
    if (!any(Warp::RUNNING) || policy_ == EARLY_COPIES) return true;
    const bool at_random = policy_ == RANDOM || policy_ == ROUND_ROBIN;
    return at_random && left_ == 0 && random_() % 4 == 0;
  }

  // One that runs; there must be one.
  int next_warp() {
    if (left_ <= 0 || !running(current_)) choose();
    left_--;
    return current_;
  }

 private:
  bool running(int warp) const { return warps_[warp].state == Warp::RUNNING; }

  void choose() {
    const int count = warps_.size();
    auto runs = [this](int warp) { return running(warp); };
    left_ = 1;
    switch (policy_) {
      case ROUND_ROBIN: do { current_ = (current_ + 1) % count;
        } while (!running(current_));
        break;
      case LATE_COPIES: current_ = *std::find_if(order_.begin(), order_.end(), runs); break;
      case EARLY_COPIES:
        current_ = *std::find_if(order_.rbegin(), order_.rend(), runs);
        left_ = 1 + random_() % 8;
        break;
      default: do { current_ = random_() % count;
        } while (!running(current_));
        left_ = policy_ == UNTIL_IT_WAITS ? 1 << 30 : 1 + random_() % (1 << random_() % 10);
    }
  }

  const int32_t policy_;
  std::mt19937_64& random_;
  const std::vector<Warp>& warps_;
  const CopyEngine& copies_;
  std::vector<int> order_;
  int current_ = 0;
  int left_ = 0;  // instructions until another warp is chosen
};
