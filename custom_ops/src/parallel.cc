#include "parallel.h"

#include <atomic>
#include <thread>

namespace octavo {
namespace {

// Items [begin, end) that a lane has still to do, in one word. Its own cache line: lanes write theirs at every item.
struct alignas(64) Share {
  std::atomic<std::uint64_t> range;
};

constexpr std::uint64_t packed(std::uint64_t begin, std::uint64_t end) { return begin << 32 | end; }
constexpr std::uint64_t begin_of(std::uint64_t range) { return range >> 32; }
constexpr std::uint64_t end_of(std::uint64_t range) { return range & 0xffffffffu; }

struct Work {
  void (*body)(void*, std::size_t, std::size_t);
  void* user;
  std::size_t lanes;
  Share* shares;
};

// The upper half of the largest share (all of it, where it is one item) becomes this lane's, which has none.
bool take_half(Work* work, std::size_t lane) {
  for (;;) {
    std::uint64_t largest = 0, left = 0;
    std::size_t from = 0;
    for (std::size_t i = 0; i < work->lanes; ++i) {
      const std::uint64_t range = work->shares[i].range.load(std::memory_order_relaxed);
      if (end_of(range) - begin_of(range) > left) {
        left = end_of(range) - begin_of(range);
        largest = range;
        from = i;
      }
    }
    if (left == 0) return false;
    const std::uint64_t middle = begin_of(largest) + left / 2;
    if (work->shares[from].range.compare_exchange_strong(largest, packed(begin_of(largest), middle), std::memory_order_relaxed)) {
      work->shares[lane].range.store(packed(middle, end_of(largest)), std::memory_order_relaxed);
      return true;
    }
  }
}

// A lane does its items in order and then halves another's rest: each thread reads a stretch of memory of its own, and all end together. Lane 0
// begins with everything, so a thread that runs alone goes straight through, and one that arrives late finds half of what is left.
void drain(void* raw, std::size_t lane) {
  Work* work = static_cast<Work*>(raw);
  std::atomic<std::uint64_t>& own = work->shares[lane].range;
  do {
    std::uint64_t range = own.load(std::memory_order_relaxed);
    while (begin_of(range) < end_of(range)) {
      if (!own.compare_exchange_weak(range, packed(begin_of(range) + 1, end_of(range)), std::memory_order_relaxed)) continue;
      work->body(work->user, static_cast<std::size_t>(begin_of(range)), lane);
      range = own.load(std::memory_order_relaxed);
    }
  } while (take_half(work, lane));
}

}  // namespace

std::size_t Parallel::lanes(std::size_t items) {
  static const std::size_t cores = std::thread::hardware_concurrency();  // 0 where the system does not tell
  const std::size_t most = cores == 0 || cores > kMaxLanes ? kMaxLanes : cores;
  return items < most ? items : most;
}

Status Parallel::run_erased(std::size_t items, Erased body, void* user) const {
  if (items == 0) return Status::ok();
  const std::size_t count = lanes(items);
  if (count == 1) {
    for (std::size_t i = 0; i < items; ++i) body(user, i, 0);
    return Status::ok();
  }
  if (items > 0xffffffffu) return Status::failed("%zu work items in one call", items);
  Share shares[kMaxLanes];
  for (std::size_t i = 0; i < count; ++i) shares[i].range.store(i == 0 ? items : 0, std::memory_order_relaxed);
  Work work{body, user, count, shares};
  return Status::from_ort(api_, ort::KernelContext_ParallelFor(api_, context_, drain, count, 0, &work));
}

}  // namespace octavo
