#include "parallel.h"

#include <atomic>

namespace octavo {
namespace {

struct Queue {
  void (*body)(void*, std::size_t, std::size_t);
  void* user;
  std::size_t items;
  std::atomic<std::size_t> next;
};

// A lane takes items until none is left: threads that arrive late find an empty queue.
void drain(void* raw, std::size_t lane) {
  Queue* queue = static_cast<Queue*>(raw);
  for (std::size_t item; (item = queue->next.fetch_add(1, std::memory_order_relaxed)) < queue->items;) {
    queue->body(queue->user, item, lane);
  }
}

}  // namespace

Status Parallel::run_erased(std::size_t items, Erased body, void* user) const {
  if (items == 0) return Status::ok();
  if (items == 1) {
    body(user, 0, 0);
    return Status::ok();
  }
  Queue queue{body, user, items, {0}};
  return Status::from_ort(api_, ort::KernelContext_ParallelFor(api_, context_, drain, lanes(items), 0, &queue));
}

}  // namespace octavo
