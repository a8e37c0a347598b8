// The integers of a step: which rows belong to which sequence, at which position each stands, what it sees, and whether all of it can be
// true. Everything that indexes memory later is checked here.
#pragma once
#include <cstdint>

#include "attention.h"
#include "scratch.h"
#include "status.h"

namespace octavo {

struct StepInput {
  std::int64_t T, B, M, N;
  std::int64_t P;            // block size
  std::int64_t window;       // ≥ 1, or −1
  std::int64_t chunk;        // ≥ 1, or −1
  std::int64_t table_rows;   // positions that the rotary tables hold, −1 without rotation
  const std::int32_t* cumulative;
  const std::int32_t* past;
  const std::int32_t* block_table;
  const std::int32_t* slots;
  const std::int32_t* parent;
};

// Which keys a `Sequence` of the attention reads: those of the step's sequence b through its block table. Where `tree_row` is not −1, it is
// that one row, and some of its ancestors (or itself) do not lie in the slot of their position: they are gathered there.
struct Owner {
  std::int32_t b;
  std::int32_t tree_row;
};

struct Step {
  RowRange* ranges;  // (T)
  Sequence* sequences;
  Owner* owners;
  std::int64_t sequence_count;
  bool has_tree;
};

// Slot of `position` through the table of sequence b, −1 where unmapped.
std::int64_t slot_of(const StepInput&, std::int64_t b, std::int64_t position);

Status read_step(const StepInput&, Scratch&, Step* out);

}  // namespace octavo
