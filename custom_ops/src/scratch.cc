#include "scratch.h"

namespace octavo {

Scratch::~Scratch() {
  for (int i = used_; i-- > 0;) {
    if (OrtStatus* status = ort::AllocatorFree(api_, allocator_, pieces_[i])) ort::ReleaseStatus(api_, status);
  }
}

Status Scratch::take_bytes(std::size_t count, std::size_t size, void** out) {
  constexpr std::size_t align = 64;
  if (used_ == kMax) return Status::failed("more than %d pieces of scratch in one call", kMax);
  if (count > (PTRDIFF_MAX - align) / size) return Status::failed("a scratch of %zu elements is beyond any memory", count);
  void* raw = nullptr;
  OrtStatus* status = ort::AllocatorAlloc(api_, allocator_, count * size + align, &raw);
  if (status != nullptr || raw == nullptr) {
    if (status != nullptr) ort::ReleaseStatus(api_, status);
    return Status::failed("out of memory: %zu bytes of scratch", count * size);
  }
  pieces_[used_++] = raw;
  *out = reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(raw) + align - 1) / align * align);
  return Status::ok();
}

}  // namespace octavo
