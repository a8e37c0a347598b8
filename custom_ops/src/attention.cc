#include "attention.h"

#include <atomic>
#include <new>

namespace octavo {
namespace {

// Where a sequence has few rows, each chunk is a piece of work of its own for each of its tiles, chunk after chunk, so that its keys and values come
// from memory once and many threads find enough to do: decode and short drafts always, longer stretches of a prompt while the states of all their
// chunks stay near. Beyond that a tile keeps one running state in the first-level cache.
constexpr std::int64_t kFewRows = 8;
constexpr std::int64_t kSplitFloats = 1 << 19;

// Query rows of a KV head are numbered token by token, group member by group member: number n is token n / (H/G), head g·(H/G) + n % (H/G).
// A piece of work is one tile (up to kLanes numbers) over the chunks [chunk0, chunk1). The pieces of a chunk follow each other for all KV
// heads, as their keys and values do in memory. Of a tile whose chunks were spread, whoever computes the last one joins them.
struct Work {
  std::int64_t sequence;
  std::int64_t number0;
  int g, rows;
  std::int32_t chunk0, chunk1;
  std::int64_t split;  // index of the split tile that this chunk belongs to; −1: not split, finish at once
};

struct Split {
  Work tile;
  std::int64_t partial;  // offset of its first chunk's state in the scratch of split tiles
  std::atomic<std::int32_t> left;
};

constexpr int padded(int E) { return (E + kLanes - 1) / kLanes * kLanes; }

class Driver {
 public:
  Driver(const Attention& a, const Kernels& k) : a_(a), k_(k), group_(a.H / a.G) {}

  Status run(const Parallel& parallel, Scratch& scratch) {
    for (std::int64_t b = 0; b < a_.sequence_count; ++b) count(b);
    OCTAVO_TRY(scratch.take(work_count_, &work_));
    OCTAVO_TRY(scratch.take(split_count_, &split_));
    OCTAVO_TRY(scratch.take(static_cast<std::size_t>(partial_floats_), &partial_));
    work_count_ = split_count_ = 0;
    partial_floats_ = 0;
    for (std::int64_t b = 0; b < a_.sequence_count; ++b) place(b);
    for (std::size_t lane = 0; lane < Parallel::lanes(work_count_); ++lane) reading_[lane].known = false;
    return parallel.run(work_count_, [this](std::size_t i, std::size_t lane) { attend_piece(i, lane); });
  }

 private:
  const RowRange& range_of(const Work& w, int r) const {
    return a_.ranges[a_.sequences[w.sequence].row0 + (w.number0 + r) / group_];
  }
  int head_of(const Work& w, int r) const { return w.g * group_ + static_cast<int>((w.number0 + r) % group_); }

  template <class Body>
  void for_each_tile(std::int64_t b, const Body& body) const {
    const std::int64_t numbers = a_.sequences[b].rows * group_;
    for (std::int64_t n = 0; n < numbers; n += kLanes) {
      Work tile{b, n, 0, static_cast<int>(numbers - n < kLanes ? numbers - n : kLanes), 0, 0, -1};
      set_chunks(&tile);
      body(tile);
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

  bool few_rows(std::int64_t b) const {
    const Sequence& s = a_.sequences[b];
    if (s.rows <= kFewRows) return true;
    const RowRange& last = a_.ranges[s.row0 + s.rows - 1];
    return s.rows * a_.H * ((last.hi - last.lo) / kChunk + 1) * padded(a_.E) <= kSplitFloats;
  }
  bool splits(const Work& tile) const { return few_rows(tile.sequence) && tile.chunk1 - tile.chunk0 > 1; }
  std::int64_t floats_of(int rows) const { return 2 * kLanes + static_cast<std::int64_t>(rows) * padded(a_.E); }
  static Softmax state_at(float* p) { return {p, p + kLanes, p + 2 * kLanes}; }

  void count(std::int64_t b) {
    const std::size_t G = static_cast<std::size_t>(a_.G);
    for_each_tile(b, [&](const Work& tile) {
      const std::size_t chunks = static_cast<std::size_t>(tile.chunk1 - tile.chunk0);
      work_count_ += splits(tile) ? G * chunks : G;
      if (!splits(tile)) return;
      split_count_ += G;
      partial_floats_ += static_cast<std::int64_t>(G * chunks) * floats_of(tile.rows);
    });
  }

  void place(std::int64_t b) {
    const std::int64_t first_split = static_cast<std::int64_t>(split_count_);
    std::int32_t chunk0 = INT32_MAX, chunk1 = 0;
    for_each_tile(b, [&](Work tile) {
      const bool split = splits(tile);
      for (tile.g = 0; tile.g < a_.G; ++tile.g) {
        if (!split) {
          work_[work_count_++] = tile;
          continue;
        }
        new (&split_[split_count_++]) Split{tile, partial_floats_, {tile.chunk1 - tile.chunk0}};
        partial_floats_ += (tile.chunk1 - tile.chunk0) * floats_of(tile.rows);
      }
      if (!split) return;
      chunk0 = tile.chunk0 < chunk0 ? tile.chunk0 : chunk0;
      chunk1 = tile.chunk1 > chunk1 ? tile.chunk1 : chunk1;
    });
    // All tiles of a chunk and KV head one after the other: its keys and values come from memory once.
    for (std::int32_t chunk = chunk0; chunk < chunk1; ++chunk) {
      for (int g = 0; g < a_.G; ++g) {
        for (std::int64_t at = first_split + g; at < static_cast<std::int64_t>(split_count_); at += a_.G) {
          Work one = split_[at].tile;
          if (chunk < one.chunk0 || chunk >= one.chunk1) continue;
          one.chunk0 = chunk;
          one.chunk1 = chunk + 1;
          one.split = at;
          work_[work_count_++] = one;
        }
      }
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
    std::int64_t token = w.number0 / group_;
    int member = static_cast<int>(w.number0 % group_);
    for (int r = 0; r < w.rows; ++r, token += member + 1 == group_, member = member + 1 == group_ ? 0 : member + 1) {
      const std::int64_t row = sequence.row0 + token;
      const int head = w.g * group_ + member;
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

  // The keys and values that a lane has at hand, views[turn], and after them those that it reads next if it goes on with the chunk or piece
  // that follows, as it mostly does.
  struct alignas(64) Reading {
    bool known;          // views[turn] is `here`
    bool next_known;     // the other one is `next`
    int turn;
    struct Place {
      std::int64_t sequence;
      int g;
      std::int32_t chunk;
      bool operator==(const Place& o) const { return sequence == o.sequence && g == o.g && chunk == o.chunk; }
    } here, next;
    ChunkView views[2];
  };
  using Place = Reading::Place;

  void view(const Place& place, std::size_t lane, ChunkView* out) const { a_.keys->view(place.sequence, place.g, place.chunk, lane, out); }

  // The chunk to read now. Where it comes from memory it points at the one that follows, which is asked for while this one is computed.
  const ChunkView& take(std::size_t piece, std::int32_t chunk, std::size_t lane) {
    Reading& reading = reading_[lane];
    const Place wanted{work_[piece].sequence, work_[piece].g, chunk};
    const bool in_place = a_.keys->in_place(wanted.sequence);
    if (reading.known && in_place && reading.here == wanted) {
      ChunkView& now = reading.views[reading.turn];
      now.cold = false;
      now.ahead = nullptr;
      return now;
    }
    const bool known = reading.known && reading.next_known && reading.next == wanted;
    reading.turn = known ? reading.turn ^ 1 : 0;
    ChunkView& now = reading.views[reading.turn];
    if (!known) view(wanted, lane, &now);
    const bool asks = few_rows(wanted.sequence);
    now.cold = asks && !known;
    now.ahead = nullptr;
    reading.known = true;
    reading.here = wanted;
    reading.next_known = asks && next_place(piece, chunk, wanted, &reading.next);
    if (reading.next_known) {
      ChunkView& next = reading.views[reading.turn ^ 1];
      view(reading.next, lane, &next);
      now.ahead = &next;
    }
    return now;
  }

  // Where the first chunk after this one lies that is another, if a view of it can be made before it is read.
  bool next_place(std::size_t piece, std::int32_t chunk, const Place& here, Place* next) const {
    for (++chunk; piece < work_count_; chunk = ++piece < work_count_ ? work_[piece].chunk0 : 0) {
      const Work& w = work_[piece];
      if (chunk >= w.chunk1) continue;
      *next = {w.sequence, w.g, chunk};
      if (!(*next == here)) return a_.keys->in_place(w.sequence);
    }
    return false;
  }

  void attend_piece(std::size_t piece, std::size_t lane) {
    const Work& w = work_[piece];
    Tile tile;
    fill(w, &tile);
    const CacheKernels& kernels = *k_.cache[a_.cache_type];
    if (w.split >= 0) {
      Split& split = split_[w.split];
      kernels.attend_chunk(tile, take(piece, w.chunk0, lane), state_of(split, w.chunk0));
      if (split.left.fetch_sub(1, std::memory_order_acq_rel) == 1) join(split);
      return;
    }
    alignas(64) float buffers[2][2 * kLanes + kLanes * kMaxHead];
    const Softmax state = state_at(buffers[0]), chunk = state_at(buffers[1]);
    clear(state);
    for (std::int32_t c = w.chunk0; c < w.chunk1; ++c) {
      kernels.attend_chunk(tile, take(piece, c, lane), chunk);
      k_.merge(w.rows, a_.E, state, chunk);
    }
    finish(w, state);
  }

  Softmax state_of(const Split& split, std::int32_t chunk) const {
    return state_at(partial_ + split.partial + (chunk - split.tile.chunk0) * floats_of(split.tile.rows));
  }

  void join(const Split& split) const {
    const Work& w = split.tile;
    alignas(64) float buffer[2 * kLanes + kLanes * kMaxHead];
    const Softmax state = state_at(buffer);
    clear(state);
    for (std::int32_t c = w.chunk0; c < w.chunk1; ++c) k_.merge(w.rows, a_.E, state, state_of(split, c));
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
  Split* split_ = nullptr;  // the tiles whose chunks were spread
  float* partial_ = nullptr;
  std::size_t work_count_ = 0, split_count_ = 0;
  std::int64_t partial_floats_ = 0;
  Reading reading_[kMaxLanes];
};

}  // namespace

Status attend(const Attention& attention, const Kernels& kernels, const Parallel& parallel, Scratch& scratch) {
  return Driver(attention, kernels).run(parallel, scratch);
}

}  // namespace octavo
