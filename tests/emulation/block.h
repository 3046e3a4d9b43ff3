// Runs the blocks of a launch, one after another, and the threads of a block by turns: a thread
// runs until it waits at a barrier or for the other lanes of its warp. The order of threads and
// blocks is shuffled by SRA_EMULATION_SEED, so that a missing barrier shows for some seed.
#ifndef EMULATION_BLOCK_H
#define EMULATION_BLOCK_H

#include "fibers.h"
#include "shared_memory.h"

#include <algorithm>
#include <cstdio>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

constexpr int kWarp = 32;

// Where a kernel waits. Place::here() as a default argument names the line of the caller.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Place& o) const { return line == o.line && !std::strcmp(file, o.file); }
  std::string text() const {
    const std::string path = file;
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
  }
};

// What all lanes of a mask do together: from what each gives, `finish` makes what each gets.
struct Warp;
using Finish = void (*)(Warp& warp, uint32_t mask);

struct Lane {
  uint64_t given = 0, got = 0;
  int source = 0;
};
struct Warp {
  Lane lanes[kWarp];
  uint32_t arrived = 0;
};

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Thread {
  Fiber fiber;
  State state = State::kReady;
  dim3 index;
  int number = 0;  // in the block
  // What it waits for.
  Place place{"", 0};
  uint32_t mask = 0;
  Finish finish = nullptr;
  int vote = 0;
};

class Block {
 public:
  dim3 index, size, grid;

  Thread& current() { return *current_; }
  SharedMemory& shared() { return shared_; }

  // Runs every block of a launch; returns what went wrong, or nothing.
  std::string run(dim3 grid_size, dim3 block_size, size_t dynamic_bytes,
                  std::function<void()> kernel) {
    grid = grid_size;
    size = block_size;
    kernel_ = std::move(kernel);
    fault_.clear();
    shared_.begin(dynamic_bytes);
    threads_.resize(size.x * size.y * size.z);
    warps_.resize((threads_.size() + kWarp - 1) / kWarp);
    for (size_t i = 0; i < threads_.size(); ++i) {
      threads_[i].number = int(i);
      threads_[i].index = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
    }
    const char* seed = std::getenv("SRA_EMULATION_SEED");
    seed_ = seed ? std::strtoul(seed, nullptr, 10) : 0;
    random_.seed(seed_);

    std::vector<size_t> blocks(size_t(grid.x) * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), size_t(0));
    shuffle(blocks);
    for (const size_t i : blocks) {
      index = dim3(i % grid.x, i / grid.x % grid.y, i / (size_t(grid.x) * grid.y));
      run_block();
      if (fault_.empty()) continue;
      threads_.clear();  // their stacks are left in the middle of functions
      return fault_ + " (block " + text(index) + ")";
    }
    return "";
  }

  // Returns the sum of all threads' votes.
  int barrier(Place place, int vote = 0) {
    current().place = place;
    current().vote = vote;
    wait(State::kAtBarrier);
    return votes_;
  }

  // Every lane of `mask` must come, with the same mask and the same operation, to one place.
  uint64_t together(uint32_t mask, Finish finish, uint64_t given, int source, Place place) {
    Thread& me = current();
    const int lane = me.number % kWarp;
    Warp& warp = warps_[me.number / kWarp];
    if (!(mask >> lane & 1)) {
      fault_ = "lane " + std::to_string(lane) + " is not in its own mask at " + place.text();
      stop();
    }
    warp.lanes[lane] = {given, 0, source};
    warp.arrived |= 1u << lane;
    me.mask = mask, me.finish = finish, me.place = place;
    if ((warp.arrived & mask) != mask) {
      wait(State::kInWarp);
      return warp.lanes[lane].got;
    }
    for (int other = 0; other < kWarp; ++other) {
      if (other == lane || !(mask >> other & 1)) continue;
      Thread& thread = threads_[me.number / kWarp * kWarp + other];
      if (thread.mask != mask || thread.finish != finish) {
        fault_ = "lane " + std::to_string(other) + " at " + thread.place.text() +
                 " does not do the same as lane " + std::to_string(lane) + " at " + place.text();
        stop();
      }
      thread.state = State::kReady;
    }
    finish(warp, mask);
    warp.arrived &= ~mask;
    return warp.lanes[lane].got;
  }

 private:
  static std::string text(dim3 i) {
    return std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z);
  }

  template <class T>
  void shuffle(std::vector<T>& things) {
    if (seed_) std::shuffle(things.begin(), things.end(), random_);
  }

  static Block*& running() {
    static thread_local Block* block = nullptr;
    return block;
  }

  static void entry() {
    Block& block = *running();
    Thread& me = block.current();
    me.fiber.arrived();
    block.kernel_();
    me.state = State::kDone;
    me.fiber.pause(true);
    std::abort();
  }

  void wait(State state) {
    current().state = state;
    current().fiber.pause();
  }

  // After a fault: the thread is left where it stands, so nothing on its stack may need an end.
  void stop() { current().fiber.pause(); }

  void run_block() {
    running() = this;
    shared_.poison();
    for (Warp& warp : warps_) warp.arrived = 0;
    for (Thread& thread : threads_) {
      thread.state = State::kReady;
      thread.fiber.begin(&entry);
    }
    std::vector<Thread*> order;
    for (Thread& thread : threads_) order.push_back(&thread);
    while (count(State::kDone) < threads_.size() && fault_.empty()) {
      shuffle(order);
      bool ran = false;
      for (Thread* thread : order) {
        if (thread->state != State::kReady || !fault_.empty()) continue;
        current_ = thread;
        thread->fiber.resume();
        ran = true;
      }
      if (!ran) open_barrier();
    }
    if (!fault_.empty()) return;
    if (shared_.overrun()) fault_ = "wrote behind the end of shared memory";
    if (shared_.static_bytes() > kStaticShared) fault_ = "more than 48 KiB of static shared memory";
  }

  // Nothing can run: either all stand at one barrier, or they wait for ever.
  void open_barrier() {
    if (count(State::kAtBarrier) < threads_.size()) {
      fault_ = "deadlock: " + waiting();
      return;
    }
    for (Thread& thread : threads_) {
      if (!(thread.place == threads_[0].place)) {
        fault_ = "threads of one block stand at different barriers: " + waiting();
        return;
      }
    }
    votes_ = 0;
    for (Thread& thread : threads_) {
      thread.state = State::kReady;
      votes_ += thread.vote;
    }
  }

  size_t count(State state) const {
    return size_t(std::count_if(threads_.begin(), threads_.end(),
                                [=](const Thread& t) { return t.state == state; }));
  }

  // How many threads wait where.
  std::string waiting() const {
    std::vector<std::pair<std::string, int>> groups;
    for (const Thread& thread : threads_) {
      const std::string what = what_for(thread);
      const auto same = std::find_if(groups.begin(), groups.end(),
                                     [&](const auto& group) { return group.first == what; });
      if (same == groups.end()) groups.emplace_back(what, 1);
      else ++same->second;
    }
    std::string text;
    for (const auto& [what, threads] : groups)
      text += (text.empty() ? "" : ", ") + std::to_string(threads) + " " + what;
    return text;
  }

  std::string what_for(const Thread& thread) const {
    if (thread.state == State::kDone) return "have ended";
    if (thread.state == State::kAtBarrier) return "at the barrier of " + thread.place.text();
    char lanes[16];
    const uint32_t missing = thread.mask & ~warps_[thread.number / kWarp].arrived;
    std::snprintf(lanes, sizeof lanes, "%08x", missing);
    return "in " + thread.place.text() + " without lanes " + lanes;
  }

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  SharedMemory shared_;
  std::function<void()> kernel_;
  Thread* current_ = nullptr;
  int votes_ = 0;
  std::mt19937 random_;
  unsigned long seed_ = 0;  // 0: in order
  std::string fault_;
};

// Those of this host thread. Fibers never leave it.
inline Block& block() {
  static thread_local Block block;
  return block;
}

}  // namespace emulation
#endif
