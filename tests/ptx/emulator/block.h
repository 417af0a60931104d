// A block of threads: its warps take turns, an instruction at a time, as a policy says.

#pragma once

#include "arithmetic.h"
#include "copies.h"
#include "scheduler.h"

class Block {
 public:
  Block(const Launch& launch, Report& report, GlobalMemory& device, std::mt19937_64& random, const int* index)
      : launch_(launch),
        report_(report),
        device_(device),
        random_(random),
        index_(index),
        memory_(launch, report),
        warps_(make_warps(launch, report, random)),
        mbarriers_(report, memory_, warps_),
        copies_(report, device, memory_, mbarriers_),
        scheduler_(launch, random, warps_, copies_) {}

  // Returns the number of instructions of warps.
  uint64_t run() {
    device_.begin_block();
    uint64_t steps = 0;
    while (!scheduler_.all_done()) {
      if (scheduler_.copy_is_next()) {
        copies_.finish(random_() % copies_.under_way());
      } else if (!scheduler_.any(Warp::RUNNING)) {
        stop_at_deadlock();
      } else {
        step(scheduler_.next_warp());
        if (++steps > kMostSteps) report_.stop(-1, "no end", str(steps) + " instructions of a block");
      }
    }
    if (!copies_.idle()) report_.fault(copies_.first_pc(), "block ended before its copies", str(copies_.under_way()));
    for (const Barrier& barrier : barriers_) {
      if (barrier.arrived) report_.fault(-1, "block ended at a barrier that others did not reach");
    }
    return steps;
  }

 private:
  static constexpr uint64_t kMostSteps = 1 << 30;

  struct Barrier {  // of bar.sync
    uint32_t expected = 0, arrived = 0;
    std::vector<int> warps;
    Knowledge knows;
  };

  static std::vector<Warp> make_warps(const Launch& launch, Report& report, std::mt19937_64& random) {
    const int threads = launch.block[0] * launch.block[1] * launch.block[2];
    if (threads > kLanes * kMaxWarps) report.stop(-1, "not covered: threads of a block", str(threads));
    std::vector<Warp> warps;
    for (int first = 0; first < threads; first += kLanes) {
      const uint32_t lanes = threads - first >= kLanes ? kAllLanes : (1u << (threads - first)) - 1;
      warps.emplace_back(launch, warps.size(), lanes, static_cast<uint32_t>(random()));
    }
    return warps;
  }

  [[noreturn]] void stop_at_deadlock() {
    std::string waiting;
    int pc = -1;
    for (size_t i = 0; i < warps_.size(); i++) {
      const Warp& warp = warps_[i];
      if (warp.state == Warp::DONE) continue;
      pc = warp.waits_at;
      const bool named = warp.state == Warp::AT_BARRIER;
      waiting +=
          "; warp " + str(i) + " at " +
          (named ? "bar.sync " + str(warp.waits_for) : "the mbarrier at " + SharedMemory::offset(warp.waits_for)) +
          ", line " + str(launch_.code[pc].line);
    }
    report_.stop(pc, "deadlock", waiting.substr(2) + mbarriers_.state());
  }

  // ---- one instruction of one warp

  void step(int number) {
    Warp& warp = warps_[number];
    const size_t which = warp.next_group();
    Warp::Group& group = warp.groups[which];
    const int pc = group.pc;
    const Instruction& in = launch_.code[pc];
    uint32_t mask = group.lanes;
    if (in.predicate >= 0) mask &= warp.predicates[in.predicate] ^ (in.negated ? kAllLanes : 0);
    if (mask) needs_all_lanes(warp, pc, mask);
    switch (in.operation) {
      case BRANCH: branch(warp, which, mask); break;
      case BRANCH_INDEX: branch_by_index(warp, which, mask); break;
      case RETURN: leave(warp, which, mask); break;
      default:
        group.pc++;
        if (!Arithmetic(launch_, in, warp, mask).run() && mask) execute(number, pc, mask);
    }
    if (warp.groups.size() > 1) warp.merge_groups();
  }

  void branch(Warp& warp, size_t which, uint32_t mask) {
    Warp::Group& group = warp.groups[which];
    const uint32_t others = group.lanes & ~mask;
    const int target = launch_.code[group.pc].immediate;
    group.pc = others ? group.pc + 1 : target;
    group.lanes = others ? others : mask;
    if (others && mask) warp.groups.push_back({target, mask});
  }

  // brx.idx: lanes with the same target stay together.
  void branch_by_index(Warp& warp, size_t which, uint32_t mask) {
    const auto [pc, lanes] = warp.groups[which];
    const Instruction& in = launch_.code[pc];
    warp.groups.erase(warp.groups.begin() + which);
    if (lanes & ~mask) warp.groups.push_back({pc + 1, lanes & ~mask});
    for (int lane = 0; lane < kLanes; lane++) {
      if (!(mask >> lane & 1)) continue;
      const int index = warp.get<int32_t>(in.operand[0], lane);
      if (index < 0 || index >= in.list_length) report_.stop(pc, "brx.idx: no such target", str(index));
      warp.groups.push_back({launch_.lists[in.list + index], 1u << lane});
    }
  }

  void leave(Warp& warp, size_t which, uint32_t mask) {
    Warp::Group& group = warp.groups[which];
    group.lanes &= ~mask;
    const int pc = group.pc++;
    if (group.lanes) return;
    warp.groups.erase(warp.groups.begin() + which);
    if (!warp.groups.empty()) return;
    warp.state = Warp::DONE;
    if (!warp.issued.empty() || !warp.committed.empty()) report_.fault(pc, "warp ended before its products");
    if (!warp.issued_copies.empty() || !warp.committed_copies.empty()) {
      report_.fault(pc, "warp ended before its copies");
    }
  }

  void needs_all_lanes(const Warp& warp, int pc, uint32_t lanes) {
    const int operation = launch_.code[pc].operation;
    const bool together = operation == BARRIER || operation == WARP_BARRIER || operation == ELECT ||
                          (operation >= SHUFFLE_INDEX && operation <= SHUFFLE_UP) || operation == LOAD_MATRIX ||
                          operation == STORE_MATRIX || operation == MMA ||
                          (operation >= WGMMA && operation <= WGMMA_WAIT);
    const uint32_t needed = operation == MMA ? kAllLanes : warp.lanes;
    if (together && lanes != needed) report_.stop(pc, "part of a warp", kOperationNames[operation]);
  }

  void execute(int number, int pc, uint32_t mask) {
    const Instruction& in = launch_.code[pc];
    Warp& warp = warps_[number];
    switch (in.operation) {
      case SPECIAL: return special(number, in, mask);
      case LOAD: return load(number, pc, mask);
      case STORE: return store(number, pc, mask);
      case LOAD_MATRIX:
      case STORE_MATRIX: return move_matrices(number, pc);
      case MMA: return multiply_fragments(launch_, in, warp);
      case ELECT: return elect(warp, in);
      case SHUFFLE_INDEX:
      case SHUFFLE_XOR:
      case SHUFFLE_DOWN:
      case SHUFFLE_UP: return shuffle(warp, in, mask);
      case BARRIER: return meet(number, pc);
      case WARP_BARRIER: return sync_lanes(number);
      case MBARRIER_INIT: return create_mbarrier(warp, pc, mask);
      case MBARRIER_ARRIVE:
      case MBARRIER_EXPECT: return arrive(number, pc, mask);
      case MBARRIER_WAIT: return wait(number, pc, mask);
      case PROXY_FENCE: return fence(number);
      case TMA_LOAD: return copy(number, pc, mask);
      case CP_ASYNC: return begin_copies(number, pc, mask);
      case CP_ASYNC_COMMIT: return commit_copies(warp, pc, mask);
      case CP_ASYNC_WAIT: return finish_copies(number, pc, mask);
      case WGMMA: return issue_product(warp, pc);
      case WGMMA_COMMIT: return commit_products(number);
      case WGMMA_WAIT: return finish_products(number, in.immediate);
      case TRAP: report_.stop(pc, "trap");
      default: report_.stop(pc, "not covered: operation", kOperationNames[in.operation]);
    }
  }

  void special(int number, const Instruction& in, uint32_t mask) {
    const uint32_t values[] = {0, index32(0), index32(1), index32(2), threads(), 0, grid(0), grid(1), grid(2), 0};
    for (int lane = 0; lane < kLanes; lane++) {
      const uint32_t value = in.kind == TID ? kLanes * number + lane : in.kind == LANEID ? lane : values[in.kind];
      if (mask >> lane & 1) warps_[number].set(in.operand[0], lane, value);
    }
  }

  uint32_t index32(int d) const { return index_[d]; }
  uint32_t grid(int d) const { return launch_.grid[d]; }
  uint32_t threads() const { return launch_.block[0]; }

  // ---- memory

  Access by(int number, int pc, int lane) const {
    const Warp& warp = warps_[number];
    return {pc, number, lane, false, warp.knows.seen.at[number], warp.synced, warp.knows};
  }

  void load(int number, int pc, uint32_t mask) {
    const Instruction& in = launch_.code[pc];
    Warp& warp = warps_[number];
    const int32_t* registers = launch_.lists + in.list;
    uint8_t values[16];
    for (int lane = 0; lane < kLanes; lane++) {
      if (!(mask >> lane & 1)) continue;
      const uint64_t address = warp.address(in, lane);
      const uint32_t bytes = in.bytes * in.count;
      if (in.kind == SHARED) {
        memory_.read(by(number, pc, lane), address, bytes, values);
      } else if (!device_.load(pc, address, bytes, values)) {
        memset(values, 0xff, sizeof values);  // NaN
      }
      for (int i = 0; i < in.count; i++) {
        uint64_t value = 0;
        memcpy(&value, values + i * in.bytes, in.bytes);
        in.bytes == 8 ? warp.set<uint64_t>(registers[i], lane, value) : warp.set<uint32_t>(registers[i], lane, value);
      }
    }
  }

  void store(int number, int pc, uint32_t mask) {
    const Instruction& in = launch_.code[pc];
    Warp& warp = warps_[number];
    const int32_t* registers = launch_.lists + in.list;
    uint8_t values[16];
    for (int lane = 0; lane < kLanes; lane++) {
      if (!(mask >> lane & 1)) continue;
      for (int i = 0; i < in.count; i++) {
        const uint64_t value =
            in.bytes == 8 ? warp.get<uint64_t>(registers[i], lane) : warp.get<uint32_t>(registers[i], lane);
        memcpy(values + i * in.bytes, &value, in.bytes);
      }
      const uint64_t address = warp.address(in, lane);
      const uint32_t bytes = in.bytes * in.count;
      in.kind == SHARED ? memory_.write(by(number, pc, lane), address, bytes, values)
                        : device_.store(by(number, pc, lane), address, bytes, values);
    }
  }

  // ldmatrix and stmatrix: lane 8 m + r has the address of row r of matrix m, lane 4 r + t two of its elements.
  void move_matrices(int number, int pc) {
    const Instruction& in = launch_.code[pc];
    Warp& warp = warps_[number];
    uint64_t rows[kLanes];
    for (int i = 0; i < 8 * in.count; i++) {
      rows[i] = warp.address(in, i);
      if (rows[i] % 16)
        report_.stop(pc, "shared memory: misaligned", SharedMemory::offset(rows[i]) + ", row of a matrix");
    }
    for (int matrix = 0; matrix < in.count; matrix++) {
      const int reg = launch_.lists[in.list + matrix];
      for (int lane = 0; lane < kLanes; lane++) {
        const Access who = by(number, pc, lane);
        const uint64_t* row = rows + 8 * matrix;
        uint32_t pair = warp.get<uint32_t>(reg, lane);
        const uint64_t address = row[lane / 4] + lane % 4 * sizeof pair;
        if (in.operation == STORE_MATRIX) {
          memory_.write(who, address, sizeof pair, &pair);
        } else if (in.mode) {  // transposed: two rows of a column
          uint16_t halves[2];
          for (int i = 0; i < 2; i++) memory_.read(who, row[lane % 4 * 2 + i] + lane / 4 * 2, 2, &halves[i]);
          memcpy(&pair, halves, sizeof pair);
        } else {
          memory_.read(who, address, sizeof pair, &pair);
        }
        if (in.operation == LOAD_MATRIX) warp.set(reg, lane, pair);
      }
    }
  }

  // ---- within a warp

  void elect(Warp& warp, const Instruction& in) {
    const uint32_t leader = __builtin_ctz(warp.lanes);
    for (int lane = 0; lane < kLanes && in.operand[0] >= 0; lane++) warp.set(in.operand[0], lane, leader);
    warp.predicates[in.operand[1]] = 1u << leader;
  }

  void shuffle(Warp& warp, const Instruction& in, uint32_t mask) {
    uint32_t values[kLanes];
    for (int lane = 0; lane < kLanes; lane++) {
      const int by = warp.get<int32_t>(in.operand[2], lane);
      const int wanted = in.operation == SHUFFLE_INDEX  ? by & 31
                         : in.operation == SHUFFLE_XOR  ? lane ^ by
                         : in.operation == SHUFFLE_DOWN ? lane + by
                                                        : lane - by;
      values[lane] = warp.get<uint32_t>(in.operand[1], wanted >= 0 && wanted < kLanes ? wanted : lane);
    }
    for (int lane = 0; lane < kLanes; lane++) {
      if (mask >> lane & 1) warp.set(in.operand[0], lane, values[lane]);
    }
  }

  uint32_t tick(int number) { return ++warps_[number].knows.seen.at[number]; }

  // What lanes of the warp did until now is ordered before what others of its lanes do from now on.
  void sync_lanes(int number) { warps_[number].synced = tick(number); }

  void fence(int number) {
    Knowledge& knows = warps_[number].knows;
    knows.fenced.join(knows.seen);
    tick(number);
  }

  // ---- barriers

  void meet(int number, int pc) {
    const Instruction& in = launch_.code[pc];
    Warp& warp = warps_[number];
    const uint32_t id = warp.get<uint32_t>(in.operand[0], 0);
    const uint32_t threads = in.operand[1] >= 0 ? warp.get<uint32_t>(in.operand[1], 0) : kLanes * warps_.size();
    for (int lane = 0; lane < kLanes; lane++) {
      if (id > 15 || warp.get<uint32_t>(in.operand[0], lane) != id) report_.stop(pc, "bar.sync: number", str(id));
    }
    Barrier& barrier = barriers_[id];
    if (threads % kLanes || (barrier.arrived && barrier.expected != threads)) {
      report_.fault(pc, "bar.sync: threads", str(threads) + ", others said " + str(barrier.expected));
    }
    barrier.expected = threads;
    barrier.arrived += kLanes;
    barrier.warps.push_back(number);
    barrier.knows.join(warp.knows);
    warp.state = Warp::AT_BARRIER;
    warp.waits_for = id;
    warp.waits_at = pc;
    if (barrier.arrived < threads) return;
    for (int other : barrier.warps) {
      warps_[other].state = Warp::RUNNING;
      warps_[other].knows.join(barrier.knows);
      sync_lanes(other);
    }
    barrier = Barrier();
  }

  void create_mbarrier(Warp& warp, int pc, uint32_t mask) {
    const Instruction& in = launch_.code[pc];
    for (int lane = 0; lane < kLanes; lane++) {
      if (mask >> lane & 1) mbarriers_.create(pc, warp.address(in, lane), warp.get<uint32_t>(in.operand[2], lane));
    }
  }

  void arrive(int number, int pc, uint32_t mask) {
    const Instruction& in = launch_.code[pc];
    Warp& warp = warps_[number];
    for (int lane = 0; lane < kLanes; lane++) {
      if (!(mask >> lane & 1)) continue;
      const uint32_t bytes = in.operation == MBARRIER_EXPECT ? warp.get<uint32_t>(in.operand[2], lane) : 0;
      mbarriers_.arrive(pc, warp.address(in, lane), in.count, bytes, warp.knows);
    }
    tick(number);
  }

  // try_wait: false for lanes whose phase has not ended; then the warp sleeps until one ends, and asks again.
  void wait(int number, int pc, uint32_t mask) {
    const Instruction& in = launch_.code[pc];
    Warp& warp = warps_[number];
    uint32_t passed = 0;
    warp.waits_at = pc;
    for (int lane = 0; lane < kLanes; lane++) {
      if (!(mask >> lane & 1)) continue;
      const uint32_t address = warp.address(in, lane), parity = warp.get<uint32_t>(in.operand[3], lane) & 1;
      Mbarrier& barrier = mbarriers_.find(pc, address);
      if ((barrier.phase & 1) != parity) {
        passed |= 1u << lane;
        warp.knows.join(barrier.done);
        warp.synced = std::max(warp.synced, barrier.done.seen.at[number] + 1);
      } else {
        warp.state = Warp::AT_MBARRIER;
        warp.waits_for = address;
      }
    }
    warp.set_predicate(in.operand[2], mask, passed);
  }

  // ---- asynchronous

  void copy(int number, int pc, uint32_t mask) {
    const Instruction& in = launch_.code[pc];
    const Warp& warp = warps_[number];
    if (mask & (mask - 1)) report_.fault(pc, "TMA: issued by several lanes");
    for (int lane = 0; lane < kLanes; lane++) {
      if (!(mask >> lane & 1)) continue;
      const uint64_t descriptor = warp.get<uint64_t>(in.operand[2], lane);
      const uint64_t parameters = reinterpret_cast<uint64_t>(launch_.parameters);
      const bool inside =
          descriptor >= parameters && descriptor + sizeof(TensorMap) <= parameters + launch_.parameter_bytes;
      if (!inside || descriptor % 64) report_.stop(pc, "TMA: descriptor not among the parameters");
      Copy copy{pc,
                warp.get<uint32_t>(in.operand[0], lane),
                warp.get<uint32_t>(in.operand[1], lane),
                reinterpret_cast<const TensorMap*>(descriptor),
                {},
                0,
                warp.knows};
      if (copy.map->rank != in.list_length) report_.stop(pc, "TMA: coordinates", str(in.list_length));
      for (int d = 0; d < in.list_length; d++) copy.start[d] = warp.get<int32_t>(launch_.lists[in.list + d], lane);
      copies_.issue(copy);
    }
    tick(number);
  }

  // cp.async: the bytes arrive when they are waited for; until then NaN is there.
  void begin_copies(int number, int pc, uint32_t mask) {
    const Instruction& in = launch_.code[pc];
    Warp& warp = warps_[number];
    uint16_t unset[8];
    std::fill_n(unset, 8, 0x7fc0);
    for (int lane = 0; lane < kLanes; lane++) {
      if (!(mask >> lane & 1)) continue;
      ThreadCopy copy{pc, lane, warp.address(in, lane), static_cast<uint32_t>(in.bytes), {}};
      const uint64_t source = warp.get<uint64_t>(in.operand[2], lane) + in.mode;
      if (!device_.load(pc, source, copy.bytes, copy.values.data())) copy.values.fill(0xff);
      memory_.write(by(number, pc, lane), copy.address, copy.bytes, unset);
      warp.issued_copies.push_back(copy);
    }
  }

  void commit_copies(Warp& warp, int pc, uint32_t mask) {
    if (mask != warp.lanes) report_.stop(pc, "not covered: cp.async.commit_group of a part of a warp");
    warp.committed_copies.push_back(std::move(warp.issued_copies));
    warp.issued_copies.clear();
  }

  void finish_copies(int number, int pc, uint32_t mask) {
    Warp& warp = warps_[number];
    if (mask != warp.lanes) report_.stop(pc, "not covered: cp.async.wait_group of a part of a warp");
    while (warp.committed_copies.size() > static_cast<size_t>(launch_.code[pc].immediate)) {
      for (const ThreadCopy& copy : warp.committed_copies.front()) {
        memory_.write(by(number, copy.pc, copy.lane), copy.address, copy.bytes, copy.values.data());
      }
      warp.committed_copies.pop_front();
    }
  }

  void issue_product(Warp& warp, int pc) {
    const Instruction& in = launch_.code[pc];
    const uint64_t a = warp.get<uint64_t>(in.operand[0], 0), b = warp.get<uint64_t>(in.operand[1], 0);
    const uint32_t accumulate = warp.predicates[in.operand[2]];
    bool uniform = accumulate == 0 || accumulate == kAllLanes;
    for (int lane = 1; lane < kLanes; lane++) {
      uniform &= warp.get<uint64_t>(in.operand[0], lane) == a && warp.get<uint64_t>(in.operand[1], lane) == b;
    }
    if (!uniform) report_.stop(pc, "wgmma: lanes disagree");
    warp.issued.push_back({&in, pc, a, b, accumulate != 0});
  }

  // Products are made when they are committed or when they are waited for, at random.
  void commit_products(int number) {
    Warp& warp = warps_[number];
    warp.committed.push_back(std::move(warp.issued));
    warp.issued.clear();
    if (random_() % 2) finish_products(number, 0);
  }

  void finish_products(int number, size_t groups_left) {
    Warp& warp = warps_[number];
    TensorCore core(launch_, report_, memory_, number, warp);
    while (warp.committed.size() > groups_left) {
      for (const Product& product : warp.committed.front()) core.multiply(product);
      warp.committed.pop_front();
    }
  }

  const Launch& launch_;
  Report& report_;
  GlobalMemory& device_;
  std::mt19937_64& random_;
  const int* index_;
  SharedMemory memory_;
  std::vector<Warp> warps_;
  Mbarriers mbarriers_;
  CopyEngine copies_;
  Scheduler scheduler_;
  Barrier barriers_[16];
};
