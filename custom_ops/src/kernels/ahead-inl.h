// Asking memory for what comes next, a few lines at a time between the products.
//
// A tile of few rows takes less time over a chunk than memory does to bring the next, and blocks lie anywhere: no hardware guesses where. Asked
// for all at once the lines would queue before the products; spread over all of them they come while these run.
#pragma once
#include "kernels/kernels.h"

namespace octavo::OCTAVO_TARGET {

// A tile with at most this many rows is decoding: what it reads comes from memory, once.
inline constexpr int kReadingRows = 8;

class Ahead {
 public:
  // Nobody has asked for a cold chunk: its keys are asked for here and now, and its values come first.
  OCTAVO_INLINE explicit Ahead(const ChunkView& view) {
    if (view.cold) {
      add(view, view.key, view.key_bytes);
      while (at_ < end_) step<8>();
      at_ = end_ = nullptr;
      used_ = next_ = 0;
      add(view, view.value, view.value_bytes);
    }
    if (view.ahead != nullptr) {
      add(*view.ahead, view.ahead->key, view.ahead->key_bytes);
      add(*view.ahead, view.ahead->value, view.ahead->value_bytes);
    }
  }

  // Asks for the next `Lines` of 64 bytes.
  template <int Lines>
  OCTAVO_INLINE void step() {
    if (at_ >= end_) return;
    for (int i = 0; i < Lines; ++i) prefetch(at_ + i * 64);
    at_ += Lines * 64;
    if (at_ >= end_) turn();
  }

 private:
  OCTAVO_INLINE void add(const ChunkView& view, const void* const* blocks, std::int64_t bytes) {
    for (int i = 0; bytes != 0 && i < kChunk >> view.log2_block; ++i) {
      if (blocks[i] != nullptr) spans_[used_++] = {static_cast<const char*>(blocks[i]), static_cast<const char*>(blocks[i]) + bytes};
    }
    if (at_ >= end_) turn();
  }
  OCTAVO_INLINE void turn() {
    if (next_ == used_) return;
    at_ = spans_[next_].begin;
    end_ = spans_[next_++].end;
  }

  struct Span {
    const char *begin, *end;
  };
  const char *at_ = nullptr, *end_ = nullptr;
  int used_ = 0, next_ = 0;
  Span spans_[3 * kMaxBlocks];
};

// In its place where nothing is asked for.
struct NothingAhead {
  OCTAVO_INLINE explicit NothingAhead(const ChunkView&) {}
  template <int>
  OCTAVO_INLINE void step() {}
};

OCTAVO_INLINE bool reads(const Tile& tile, const ChunkView& view) { return tile.rows <= kReadingRows && (view.cold || view.ahead != nullptr); }

}  // namespace octavo::OCTAVO_TARGET
