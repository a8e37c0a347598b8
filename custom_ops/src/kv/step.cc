#include "kv/step.h"

#include <algorithm>

namespace octavo {
namespace {

// Positions are int32 and a chunk's end must be one too.
constexpr std::int64_t kMaxPosition = INT32_MAX - kChunk;

Status check_cumulative(const StepInput& in) {
  if (in.cumulative[0] != 0) return Status::invalid("input 'cumulative_sequence_length' starts with %d, must start with 0", in.cumulative[0]);
  for (std::int64_t b = 0; b < in.B; ++b) {
    if (in.cumulative[b + 1] < in.cumulative[b]) {
      return Status::invalid("input 'cumulative_sequence_length' falls from %d to %d at sequence %lld", in.cumulative[b], in.cumulative[b + 1],
                             static_cast<long long>(b));
    }
  }
  if (in.cumulative[in.B] != in.T) {
    return Status::invalid("input 'cumulative_sequence_length' ends with %d, but the step has %lld tokens", in.cumulative[in.B],
                           static_cast<long long>(in.T));
  }
  return Status::ok();
}

// Two rows in one slot would leave there whichever thread came last.
Status check_slots(const StepInput& in, Scratch& scratch) {
  std::int32_t last = -1;
  bool ascending = true;
  std::int64_t written = 0;
  for (std::int64_t t = 0; t < in.T; ++t) {
    const std::int32_t slot = in.slots[t];
    if (slot < -1 || slot >= in.N * in.P) {
      return Status::invalid("input 'slot_mapping' has %d for token %lld, outside the pool of %lld slots", slot, static_cast<long long>(t),
                             static_cast<long long>(in.N * in.P));
    }
    if (slot < 0) continue;
    ascending = ascending && slot > last;
    last = slot;
    ++written;
  }
  if (ascending) return Status::ok();
  std::int32_t* sorted = nullptr;
  OCTAVO_TRY(scratch.take(static_cast<std::size_t>(written), &sorted));
  std::copy_if(in.slots, in.slots + in.T, sorted, [](std::int32_t slot) { return slot >= 0; });
  std::sort(sorted, sorted + written);
  const std::int32_t* twice = std::adjacent_find(sorted, sorted + written);
  return twice == sorted + written ? Status::ok() : Status::invalid("input 'slot_mapping' has slot %d for two tokens", *twice);
}

// Positions and visible ranges of the rows of sequence b; its visible positions are [*lo, *hi).
Status place_rows(const StepInput& in, std::int64_t b, RowRange* ranges, std::int64_t* lo, std::int64_t* hi) {
  *lo = kMaxPosition;
  *hi = 0;
  for (std::int64_t t = in.cumulative[b]; t < in.cumulative[b + 1]; ++t) {
    const std::int64_t parent = in.parent[t];
    if (parent != -1 && (parent < in.cumulative[b] || parent >= t)) {
      return Status::invalid("input 'parent' has %lld for token %lld, which must be -1 or an earlier token of its sequence",
                             static_cast<long long>(parent), static_cast<long long>(t));
    }
    const std::int64_t position = parent < 0 ? in.past[b] : std::int64_t{ranges[parent].position} + 1;
    if (position >= kMaxPosition) return Status::invalid("token %lld is beyond any position", static_cast<long long>(t));
    if (in.table_rows >= 0 && position >= in.table_rows) {
      return Status::invalid("token %lld is at position %lld, but input 'cos_cache' ends before %lld", static_cast<long long>(t),
                             static_cast<long long>(position), static_cast<long long>(in.table_rows));
    }
    const std::int64_t window_start = in.window > 0 ? std::max<std::int64_t>(0, position - in.window + 1) : 0;
    const std::int64_t chunk_start = in.chunk > 0 ? position - position % in.chunk : 0;
    const std::int64_t first = std::max(window_start, chunk_start);
    ranges[t] = {static_cast<std::int32_t>(first), static_cast<std::int32_t>(position + 1), static_cast<std::int32_t>(position)};
    *lo = std::min(*lo, first);
    *hi = std::max(*hi, position + 1);
  }
  return Status::ok();
}

Status check_mapped(const StepInput& in, std::int64_t b, std::int64_t lo, std::int64_t hi) {
  for (std::int64_t i = lo / in.P; i * in.P < hi; ++i) {
    const std::int32_t block = i < in.M ? in.block_table[b * in.M + i] : -1;
    if (block < 0 || block >= in.N) {
      return Status::invalid("input 'block_table' maps positions from %lld of sequence %lld to block %d, but they are visible and the pool has %lld",
                             static_cast<long long>(i * in.P), static_cast<long long>(b), block, static_cast<long long>(in.N));
    }
  }
  return Status::ok();
}

}  // namespace

std::int64_t slot_of(const StepInput& in, std::int64_t b, std::int64_t position) {
  const std::int64_t i = position / in.P;
  const std::int32_t block = i < in.M ? in.block_table[b * in.M + i] : -1;
  return block < 0 || block >= in.N ? -1 : block * in.P + position % in.P;
}

Status read_step(const StepInput& in, Scratch& scratch, Step* out) {
  bool* in_place = nullptr;  // the row and all its ancestors lie in the slots of their positions
  OCTAVO_TRY(check_cumulative(in));
  OCTAVO_TRY(check_slots(in, scratch));
  const std::size_t T = static_cast<std::size_t>(in.T);
  OCTAVO_TRY(scratch.take(T, &out->ranges));
  OCTAVO_TRY(scratch.take(T, &out->sequences));
  OCTAVO_TRY(scratch.take(T, &out->owners));
  OCTAVO_TRY(scratch.take(T, &in_place));
  out->sequence_count = 0;
  out->has_tree = false;
  for (std::int64_t b = 0; b < in.B; ++b) {
    if (in.past[b] < 0) return Status::invalid("input 'past_seqlens' has %d for sequence %lld", in.past[b], static_cast<long long>(b));
    const std::int64_t begin = in.cumulative[b], end = in.cumulative[b + 1];
    if (begin == end) continue;
    std::int64_t lo = 0, hi = 0;
    OCTAVO_TRY(place_rows(in, b, out->ranges, &lo, &hi));
    OCTAVO_TRY(check_mapped(in, b, lo, hi));
    bool all_in_place = true;
    for (std::int64_t t = begin; t < end; ++t) {
      in_place[t] = (in.slots[t] < 0 || in.slots[t] == slot_of(in, b, out->ranges[t].position)) && (in.parent[t] < 0 || in_place[in.parent[t]]);
      all_in_place = all_in_place && in_place[t];
    }
    if (all_in_place) {
      out->owners[out->sequence_count] = {static_cast<std::int32_t>(b), -1};
      out->sequences[out->sequence_count++] = {begin, end - begin};
      continue;
    }
    for (std::int64_t t = begin; t < end; ++t) {
      out->has_tree = out->has_tree || !in_place[t];
      out->owners[out->sequence_count] = {static_cast<std::int32_t>(b), in_place[t] ? -1 : static_cast<std::int32_t>(t)};
      out->sequences[out->sequence_count++] = {t, 1};
    }
  }
  return Status::ok();
}

}  // namespace octavo
