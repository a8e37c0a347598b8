// Memory of one call, from onnxruntime's own arena: after the first steps nothing is asked of the system any more.
#pragma once
#include <cstddef>
#include <cstdint>

#include "status.h"

namespace octavo {

class Scratch {
 public:
  Scratch(const OrtApi* api, OrtAllocator* allocator) : api_(api), allocator_(allocator) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();

  // `count` uninitialised Ts, 64-byte aligned, freed with this object. Failure is a status. At most kMax pieces a call.
  template <class T>
  Status take(std::size_t count, T** out) {
    void* raw = nullptr;
    OCTAVO_TRY(take_bytes(count, sizeof(T), &raw));
    *out = static_cast<T*>(raw);
    return Status::ok();
  }

 private:
  static constexpr int kMax = 16;
  Status take_bytes(std::size_t count, std::size_t size, void** out);

  const OrtApi* api_;
  OrtAllocator* allocator_;
  void* pieces_[kMax] = {};
  int used_ = 0;
};

}  // namespace octavo
