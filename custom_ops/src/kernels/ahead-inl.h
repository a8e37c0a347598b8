// Asking memory for what comes next, a few lines at a time between the products.
//
// A tile of few rows takes less time over a chunk than memory does to bring the next, and blocks lie anywhere: no hardware guesses where. Asked
// for all at once the lines would queue before the products; spread over all of them they come while these run. Of several tiles over one chunk the
// first asks.
#pragma once
#include <type_traits>

#include "kernels/kernels.h"

namespace octavo::OCTAVO_TARGET {

// Loops say how many lines a step asks for where the tile decodes; one of many rows has `Slower` times as many steps, and asks for fewer at each.
template <int Slower>
class Ahead {
 public:
  // Nobody has asked for a cold chunk: its keys are asked for here and now, and its values come first.
  OCTAVO_INLINE explicit Ahead(const ChunkView& view) {
    if (view.cold) {
      add(view, view.key, view.key_bytes);
      while (at_ < end_) step<8 * Slower>();
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
    constexpr int now = Lines > Slower ? Lines / Slower : 1;
    if (at_ >= end_) return;
    for (int i = 0; i < now; ++i) prefetch(at_ + i * 64);
    at_ += now * 64;
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

// A tile with at most this many rows takes few steps over a chunk.
inline constexpr int kFewSteps = 8;

// body(Asks{}) with what a tile has to ask for at its pace.
template <class Body>
OCTAVO_INLINE void with_ahead(const Tile& tile, const ChunkView& view, const Body& body) {
  if (!view.cold && view.ahead == nullptr) {
    body(static_cast<NothingAhead*>(nullptr));
  } else if (tile.rows <= kFewSteps) {
    body(static_cast<Ahead<1>*>(nullptr));
  } else {
    body(static_cast<Ahead<4>*>(nullptr));
  }
}

}  // namespace octavo::OCTAVO_TARGET
