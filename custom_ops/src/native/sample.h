// The native function `octavo_sample`: from rows of logits to tokens. Its meaning is custom_ops/sampling.py; native.py holds the twin of Row.
#pragma once
#include <cstddef>
#include <cstdint>

namespace octavo {

inline constexpr int kMaxLogprobs = 20;

enum RowStatus : std::int32_t { kRowFine = 0, kRowNan = 1, kRowNothingFinite = 2 };

// What is asked of one row, and the answer. Penalties and bias name their tokens; everything else is about the whole row.
struct SampleRow {
  const float* logits;           // [V], only read
  double temperature;            // 0: the best token
  double top_p, min_p;           // 1 and 0: no cut
  double repetition, frequency, presence;
  std::uint64_t seed, completion, index;
  const std::int32_t* bias_ids;  // distinct
  const double* bias;
  const std::int32_t* banned;
  const std::int32_t* seen;      // distinct tokens of prompt and output
  const std::int32_t* counts;    // how often each of them is in the output
  std::int32_t num_bias, num_banned, num_seen;
  std::int32_t top_k;            // 0: no cut
  std::int32_t given;            // ≥ 0: this token is taken, and only its log probabilities are wanted
  std::int32_t logprobs;         // log probabilities of so many best tokens beside the token's own; −1: none at all
  // The answer. num_top = min(logprobs, V) entries of top_ids and top_logprobs are filled, best first.
  std::int32_t status;
  std::int32_t token;
  std::int32_t rank;
  std::int32_t num_top;
  std::int32_t top_ids[kMaxLogprobs];
  double logprob;
  double top_logprobs[kMaxLogprobs];
};

}  // namespace octavo
