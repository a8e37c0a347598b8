#include "attention.h"

namespace octavo {
namespace {

// A sequence with at most this many rows (decode, short drafts) gives each chunk to a thread of its own: its few tiles would not fill the
// pool, and reading the cache is what takes the time. Longer ones keep their running state in the first-level cache.
constexpr std::int64_t kSplitRows = 8;

// Query rows of a KV head are numbered token by token, group member by group member: number n is token n / (H/G), head g·(H/G) + n % (H/G).
// A piece of work is one tile (up to kLanes numbers) over the chunks [chunk0, chunk1).
struct Work {
  std::int64_t sequence;
  std::int64_t number0;
  int g, rows;
  std::int32_t chunk0, chunk1;
  std::int64_t partial;  // offset of this chunk's state in the scratch of split tiles; −1: not split, finish at once
};

constexpr int padded(int E) { return (E + kLanes - 1) / kLanes * kLanes; }

class Driver {
 public:
  Driver(const Attention& a, const Kernels& k) : a_(a), k_(k), group_(a.H / a.G) {}

  Status run(const Parallel& parallel, Scratch& scratch) {
    for_each_tile([&](const Work& tile) { count(tile); });
    OCTAVO_TRY(scratch.take(work_count_, &work_));
    OCTAVO_TRY(scratch.take(split_count_, &split_));
    OCTAVO_TRY(scratch.take(static_cast<std::size_t>(partial_floats_), &partial_));
    work_count_ = split_count_ = 0;
    partial_floats_ = 0;
    for_each_tile([&](const Work& tile) { place(tile); });
    OCTAVO_TRY(parallel.run(work_count_, [this](std::size_t i, std::size_t lane) { attend_tile(work_[i], lane); }));
    return parallel.run(split_count_, [this](std::size_t i, std::size_t) { join(split_[i]); });
  }

 private:
  const RowRange& range_of(const Work& w, int r) const {
    return a_.ranges[a_.sequences[w.sequence].row0 + (w.number0 + r) / group_];
  }
  int head_of(const Work& w, int r) const { return w.g * group_ + static_cast<int>((w.number0 + r) % group_); }

  template <class Body>
  void for_each_tile(const Body& body) const {
    for (std::int64_t b = 0; b < a_.sequence_count; ++b) {
      const std::int64_t numbers = a_.sequences[b].rows * group_;
      for (std::int64_t n = 0; n < numbers; n += kLanes) {
        Work tile{b, n, 0, static_cast<int>(numbers - n < kLanes ? numbers - n : kLanes), 0, 0, -1};
        set_chunks(&tile);
        for (tile.g = 0; tile.g < a_.G; ++tile.g) body(tile);
      }
    }
  }

  void set_chunks(Work* tile) const {
    std::int32_t lo = INT32_MAX, hi = 0;
    for (int r = 0; r < tile->rows; ++r) {
      const RowRange& range = range_of(*tile, r);
      if (range.lo >= range.hi) continue;
      if (range.lo < lo) lo = range.lo;
      if (range.hi > hi) hi = range.hi;
    }
    if (lo >= hi) return;
    tile->chunk0 = lo / kChunk;
    tile->chunk1 = (hi - 1) / kChunk + 1;
  }

  bool splits(const Work& tile) const { return a_.sequences[tile.sequence].rows <= kSplitRows && tile.chunk1 - tile.chunk0 > 1; }
  std::int64_t floats_of(int rows) const { return 2 * kLanes + static_cast<std::int64_t>(rows) * padded(a_.E); }
  static Softmax state_at(float* p) { return {p, p + kLanes, p + 2 * kLanes}; }

  void count(const Work& tile) {
    if (!splits(tile)) {
      ++work_count_;
      return;
    }
    ++split_count_;
    work_count_ += static_cast<std::size_t>(tile.chunk1 - tile.chunk0);
    partial_floats_ += (tile.chunk1 - tile.chunk0) * floats_of(tile.rows);
  }

  void place(const Work& tile) {
    if (!splits(tile)) {
      work_[work_count_++] = tile;
      return;
    }
    Work whole = tile;
    whole.partial = partial_floats_;
    split_[split_count_++] = whole;
    for (std::int32_t chunk = tile.chunk0; chunk < tile.chunk1; ++chunk) {
      Work one = tile;
      one.chunk0 = chunk;
      one.chunk1 = chunk + 1;
      one.partial = partial_floats_;
      work_[work_count_++] = one;
      partial_floats_ += floats_of(tile.rows);
    }
  }

  void fill(const Work& w, Tile* tile) const {
    const Sequence& sequence = a_.sequences[w.sequence];
    const Bias& bias = a_.bias;
    tile->rows = w.rows;
    tile->D = a_.D;
    tile->E = a_.E;
    tile->softcap = a_.softcap;
    tile->has_slopes = a_.alibi_slopes != nullptr;
    tile->bias_type = bias.type;
    tile->keys = bias.keys;
    tile->key_mask = bias.key_mask != nullptr ? bias.key_mask + w.sequence * bias.keys : nullptr;
    for (int r = 0; r < w.rows; ++r) {
      const std::int64_t token = (w.number0 + r) / group_, row = sequence.row0 + token;
      const int head = head_of(w, r);
      const RowRange& range = a_.ranges[row];
      tile->lo[r] = range.lo;
      tile->hi[r] = range.hi;
      tile->position[r] = range.position;
      tile->slope[r] = tile->has_slopes ? a_.alibi_slopes[head] : 0.0f;
      tile->query[r] = a_.query + (row * a_.H + head) * a_.query_bytes;
      const std::int64_t at = w.sequence * bias.sequence_stride + head * bias.head_stride + token * bias.row_stride;
      tile->bias[r] = bias.type == kFloatBias ? static_cast<const void*>(static_cast<const float*>(bias.data) + at)
                      : bias.type == kBoolBias ? static_cast<const void*>(static_cast<const std::uint8_t*>(bias.data) + at)
                                               : nullptr;
    }
  }

  void attend_tile(const Work& w, std::size_t lane) const {
    Tile tile;
    ChunkView view;
    fill(w, &tile);
    if (w.partial >= 0) {
      a_.keys->view(w.sequence, w.g, w.chunk0, lane, &view);
      k_.cache[a_.cache_type]->attend_chunk(tile, view, state_at(partial_ + w.partial));
      return;
    }
    alignas(64) float buffers[2][2 * kLanes + kLanes * kMaxHead];
    const Softmax state = state_at(buffers[0]), chunk = state_at(buffers[1]);
    clear(state);
    for (std::int32_t c = w.chunk0; c < w.chunk1; ++c) {
      a_.keys->view(w.sequence, w.g, c, lane, &view);
      k_.cache[a_.cache_type]->attend_chunk(tile, view, chunk);
      k_.merge(w.rows, a_.E, state, chunk);
    }
    finish(w, state);
  }

  void join(const Work& w) const {
    alignas(64) float buffer[2 * kLanes + kLanes * kMaxHead];
    const Softmax state = state_at(buffer);
    clear(state);
    for (std::int32_t c = w.chunk0; c < w.chunk1; ++c) {
      k_.merge(w.rows, a_.E, state, state_at(partial_ + w.partial + (c - w.chunk0) * floats_of(w.rows)));
    }
    finish(w, state);
  }

  static void clear(const Softmax& state) {
    for (int r = 0; r < kLanes; ++r) {
      state.m[r] = -__builtin_inff();
      state.l[r] = 0.0f;
    }
  }

  void finish(const Work& w, const Softmax& state) const {
    alignas(64) float sink[kLanes] = {};
    float* out[kLanes];
    for (int r = 0; r < w.rows; ++r) {
      const int head = head_of(w, r);
      const std::int64_t row = a_.sequences[w.sequence].row0 + (w.number0 + r) / group_;
      out[r] = a_.output + (row * a_.H + head) * a_.E;
      if (a_.head_sink != nullptr) sink[r] = a_.head_sink[head];
    }
    k_.finish(w.rows, a_.E, state, a_.head_sink != nullptr ? sink : nullptr, out);
  }

  const Attention& a_;
  const Kernels& k_;
  const int group_;
  Work* work_ = nullptr;    // everything the threads take
  Work* split_ = nullptr;   // the tiles whose chunks were spread, to be joined
  float* partial_ = nullptr;
  std::size_t work_count_ = 0, split_count_ = 0;
  std::int64_t partial_floats_ = 0;
};

}  // namespace

Status attend(const Attention& attention, const Kernels& kernels, const Parallel& parallel, Scratch& scratch) {
  return Driver(attention, kernels).run(parallel, scratch);
}

}  // namespace octavo
