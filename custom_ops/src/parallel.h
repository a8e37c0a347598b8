// The one way to split work over threads: onnxruntime's own pool, through the kernel context.
#pragma once
#include <cstddef>
#include <type_traits>

#include "status.h"

namespace octavo {

// Enough for every core of a large socket; a work item's lane is its index into per-lane scratch.
inline constexpr std::size_t kMaxLanes = 64;

class Parallel {
 public:
  Parallel(const OrtApi* api, const OrtKernelContext* context) : api_(api), context_(context) {}

  // Lanes that `run` uses: no more than the processor has cores.
  static std::size_t lanes(std::size_t items);

  // Calls body(item, lane) for every item in [0, items), in any order and on any thread. The pool tells no thread index, so lanes stand in for
  // it: no two calls that run at the same time share a lane. Which lane meets which item is chance: results must not depend on it.
  template <class Body>
  Status run(std::size_t items, Body&& body) const {
    return run_erased(items, [](void* user, std::size_t item, std::size_t lane) { (*static_cast<std::remove_reference_t<Body>*>(user))(item, lane); },
                      &body);
  }

 private:
  using Erased = void (*)(void* user, std::size_t item, std::size_t lane);
  Status run_erased(std::size_t items, Erased body, void* user) const;

  const OrtApi* api_;
  const OrtKernelContext* context_;
};

}  // namespace octavo
