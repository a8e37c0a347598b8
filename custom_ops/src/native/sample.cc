#include "native/sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa/dispatch.h"
#include "native/export.h"

namespace octavo {
namespace {

// So many candidates are too many to order one by one.
constexpr int kMany = 2048;

// Far more than the error of a sum.
constexpr double kSurely = 1.00002;

struct Candidate {
  float score, weight;
  std::int32_t id;
};

// The order of cuts: the likelier first, of equals the smaller id.
bool before(const Candidate& a, const Candidate& b) { return a.score != b.score ? a.score > b.score : a.id < b.id; }

int runs_of(int V) { return (V + kRun - 1) / kRun; }

// Where a row's intermediate arrays lie in the caller's scratch.
struct Work {
  float *scores, *weights, *sums, *order;
  std::int32_t* ids;
  Candidate* candidates;

  static std::size_t bytes(int V) {
    const std::size_t n = static_cast<std::size_t>(V), runs = static_cast<std::size_t>(runs_of(V));
    return n * (2 * sizeof(float) + sizeof(std::int32_t) + sizeof(Candidate)) + 2 * runs * sizeof(float) + 64;
  }
  Work(void* scratch, int V) {
    const auto address = (reinterpret_cast<std::uintptr_t>(scratch) + 63) & ~std::uintptr_t{63};
    scores = reinterpret_cast<float*>(address);
    weights = scores + V;
    ids = reinterpret_cast<std::int32_t*>(weights + V);
    candidates = reinterpret_cast<Candidate*>(ids + V);
    sums = reinterpret_cast<float*>(candidates + V);
    order = sums + runs_of(V);
  }
};

// The first of Philox4x64-10's words at counter (1, 0, 0, index), as a float64 in [0, 1): what numpy.random.Generator(Philox(…)).random() gives.
double uniform(std::uint64_t seed, std::uint64_t completion, std::uint64_t index) {
  std::uint64_t c[4] = {1, 0, 0, index}, k[2] = {seed, completion};
  for (int round = 0; round < 10; ++round) {
    if (round > 0) {
      k[0] += 0x9E3779B97F4A7C15u;
      k[1] += 0xBB67AE8584CAA73Bu;
    }
    const unsigned __int128 a = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * c[0];
    const unsigned __int128 b = static_cast<unsigned __int128>(0xCA5A826395121157u) * c[2];
    const std::uint64_t next[4] = {static_cast<std::uint64_t>(b >> 64) ^ c[1] ^ k[0], static_cast<std::uint64_t>(b),
                                   static_cast<std::uint64_t>(a >> 64) ^ c[3] ^ k[1], static_cast<std::uint64_t>(a)};
    std::memcpy(c, next, sizeof c);
  }
  return static_cast<double>(c[0] >> 11) * 0x1p-53;
}

bool touches(const SampleRow& row) { return row.num_bias > 0 || row.num_banned > 0 || row.num_seen > 0; }

// Bias, bans, penalties: each in float64, rounded to float32.
void adjust(const SampleRow& row, int V, float* scores) {
  std::memcpy(scores, row.logits, static_cast<std::size_t>(V) * sizeof(float));
  for (int i = 0; i < row.num_bias; ++i) scores[row.bias_ids[i]] = static_cast<float>(static_cast<double>(scores[row.bias_ids[i]]) + row.bias[i]);
  for (int i = 0; i < row.num_banned; ++i) scores[row.banned[i]] = -HUGE_VALF;
  for (int i = 0; i < row.num_seen; ++i) {
    double score = static_cast<double>(scores[row.seen[i]]);
    score = score > 0 ? score / row.repetition : score * row.repetition;
    if (row.counts[i] > 0) score -= row.frequency * row.counts[i] + row.presence;
    scores[row.seen[i]] = static_cast<float>(score);
  }
}

// The k-th largest of x is at least this: the k-th largest of the runs' maxima. −inf where there are fewer runs.
float at_least_k(const SampleKernels& kernels, const float* x, int V, int k, float* order) {
  const int runs = runs_of(V);
  if (k > runs) return -HUGE_VALF;
  kernels.peaks(x, V, order);
  std::nth_element(order, order + (k - 1), order + runs, [](float a, float b) { return a > b; });
  return order[k - 1];
}

double total_of(const float* sums, int runs) {
  double total = 0;
  for (int run = 0; run < runs; ++run) total += static_cast<double>(sums[run]);
  return total;
}

// A weight such that those from it on make up `wanted` of `total`, and few tokens have it where few are needed. Below (1 − p)·total/V all
// together are less than 1 − p, so no token there is ever needed.
float enough(const SampleKernels& kernels, const float* weights, int V, double total, double wanted) {
  const double last = (1 - wanted) * total / V;
  for (double least = 0.0625; least > last; least *= 0.0625) {
    if (kernels.mass_from(weights, V, static_cast<float>(least)) > wanted * total * kSurely) return static_cast<float>(least);
  }
  return static_cast<float>(last * 0.999);
}

// Two weights: what has `sure` or more is needed, together it makes up less than `wanted` of `total`; what has `least` or more is enough.
struct Bracket {
  float least, sure;
};

float from_bits(std::uint32_t raw) {
  float value;
  std::memcpy(&value, &raw, sizeof value);
  return value;
}

std::uint32_t to_bits(float value) {
  std::uint32_t raw;
  std::memcpy(&raw, &value, sizeof raw);
  return raw;
}

// Bisects on the representation, in which floats are ordered as integers, until what lies between is next to nothing.
Bracket narrow(const SampleKernels& kernels, const float* weights, int V, float least, double wanted) {
  std::uint32_t low = to_bits(least), high = to_bits(1.0f) + 1;
  for (int round = 0; round < 24 && high - low > 1; ++round) {
    const std::uint32_t middle = low + (high - low) / 2;
    const double mass = kernels.mass_from(weights, V, from_bits(middle));
    if (mass > wanted * kSurely) {
      low = middle;
    } else if (mass * kSurely < wanted) {
      high = middle;
    } else {
      break;
    }
  }
  return {from_bits(low), from_bits(high)};
}

// Orders the first of `count` candidates until their weights reach `wanted`; how many that takes. Quickselect by mass.
int reach(Candidate* all, int count, double wanted) {
  double mass = 0;
  int low = 0, high = count;
  while (high - low > 32) {
    Candidate* middle = all + low + (high - low) / 2;
    if (before(*middle, all[low])) std::swap(*middle, all[low]);
    if (before(all[high - 1], all[low])) std::swap(all[high - 1], all[low]);
    if (before(all[high - 1], *middle)) std::swap(all[high - 1], *middle);
    std::swap(*middle, all[high - 1]);  // the median of three is the pivot
    int to = low;
    double left = 0;
    for (int i = low; i < high - 1; ++i) {
      if (before(all[i], all[high - 1])) {
        left += static_cast<double>(all[i].weight);
        std::swap(all[i], all[to++]);
      }
    }
    std::swap(all[to], all[high - 1]);
    if (mass + left >= wanted) {
      high = to;  // reached without the pivot
    } else {
      mass += left + static_cast<double>(all[to].weight);
      low = to + 1;
    }
  }
  std::sort(all + low, all + high, before);
  // The first token stays whatever it weighs.
  while (low < high && (low == 0 || mass < wanted)) mass += static_cast<double>(all[low++].weight);
  return low;
}

// The token at `left` of the way through the weights, in the order of ids; the last with any weight where rounding puts the point on the very end.
int token_at(const std::int32_t* ids, const float* weights, int first, int end, double left) {
  int token = first;
  for (int i = first; i < end; ++i) {
    if (weights[i] == 0.0f) continue;
    token = i;
    left -= static_cast<double>(weights[i]);
    if (left < 0) break;
  }
  return ids != nullptr ? ids[token] : token;
}

int draw_from_all(const SampleKernels& kernels, const float* scores, int V, float best, float inverse, double u, const Work& work) {
  kernels.weigh(scores, V, best, inverse, work.weights, work.sums);
  double left = u * total_of(work.sums, runs_of(V));
  int last = 0;
  bool found = false;
  for (int run = 0; run < runs_of(V) && !found; ++run) {
    const double sum = static_cast<double>(work.sums[run]);
    if (sum > 0) last = run;
    found = left < sum;
    if (!found) left -= sum;
  }
  return token_at(nullptr, work.weights, last * kRun, std::min(V, (last + 1) * kRun), found ? left : HUGE_VAL);
}

int draw_from_some(const SampleKernels& kernels, const SampleRow& row, const float* scores, int V, float best, float inverse, double u, const Work& work) {
  const float min_p = static_cast<float>(row.min_p);
  const bool cut_k = row.top_k > 0 && row.top_k < V;
  float* weights = work.weights;
  std::int32_t* ids = work.ids;
  double total = 0;
  float sure = HUGE_VALF;
  int found;
  if (cut_k) {
    found = kernels.collect(scores, V, at_least_k(kernels, scores, V, row.top_k, work.order), ids);
  } else {
    kernels.weigh(scores, V, best, inverse, weights, work.sums);
    total = total_of(work.sums, runs_of(V));
    const float least = min_p > 0.0f ? min_p : enough(kernels, weights, V, total, row.top_p);
    found = kernels.collect(weights, V, least, ids);
    if (found > kMany && !(min_p > 0.0f)) {
      const Bracket bracket = narrow(kernels, weights, V, least, row.top_p * total);
      sure = bracket.sure;
      found = kernels.collect(weights, V, bracket.least, ids);
    }
  }
  for (int i = 0; i < found; ++i) weights[i] = scores[ids[i]];
  kernels.weigh(weights, found, best, inverse, weights, work.sums);
  // ids and weights stay in the order of ids, for the draw; `all`, those that may be cut, are put into the order of cuts.
  Candidate* all = work.candidates;
  double mass = 0, safe = 0;
  int count = 0, cuttable = 0;
  for (int i = 0; i < found; ++i) {
    if (weights[i] < min_p) continue;
    ids[count] = ids[i];
    weights[count] = weights[i];
    if (weights[count] >= sure) {
      safe += static_cast<double>(weights[count]);
    } else {
      all[cuttable++] = {scores[ids[count]], weights[count], ids[count]};
      mass += static_cast<double>(weights[count]);
    }
    ++count;
  }
  int kept = cuttable;
  if (cut_k && row.top_k < kept) {
    kept = row.top_k;
    std::nth_element(all, all + (kept - 1), all + cuttable, before);
    mass = 0;
    for (int i = 0; i < kept; ++i) mass += static_cast<double>(all[i].weight);
  }
  // Without other cuts the candidates are a part of the row, and its whole mass counts.
  if (row.top_p < 1) kept = reach(all, kept, row.top_p * (cut_k || min_p > 0.0f ? mass : total) - safe);
  mass = 0;
  for (int i = 0; i < count; ++i) {
    if (kept < cuttable && before(all[kept - 1], {scores[ids[i]], weights[i], ids[i]})) weights[i] = 0.0f;
    mass += static_cast<double>(weights[i]);
  }
  return token_at(ids, weights, 0, count, u * mass);
}

// Log probabilities of the row as it came, before bias and penalties.
void measure(const SampleKernels& kernels, SampleRow& row, int V, float best, const Work& work) {
  kernels.weigh(row.logits, V, best, 1.0f, work.weights, work.sums);
  const double norm = static_cast<double>(best) + std::log(total_of(work.sums, runs_of(V)));
  row.logprob = static_cast<double>(row.logits[row.token]) - norm;
  row.rank = kernels.count_above(row.logits, V, row.logits[row.token]) + 1;
  const int k = row.num_top = std::min(row.logprobs, V);
  if (k == 0) return;
  const int count = kernels.collect(row.logits, V, at_least_k(kernels, row.logits, V, k, work.order), work.ids);
  for (int i = 0; i < count; ++i) work.candidates[i] = {row.logits[work.ids[i]], 0.0f, work.ids[i]};
  std::partial_sort(work.candidates, work.candidates + k, work.candidates + count, before);
  for (int i = 0; i < k; ++i) {
    row.top_ids[i] = work.candidates[i].id;
    row.top_logprobs[i] = static_cast<double>(work.candidates[i].score) - norm;
  }
}

void choose(const SampleKernels& kernels, SampleRow& row, int V, const Work& work) {
  const float highest = kernels.highest(row.logits, V);
  row.status = kRowNan;
  if (std::isnan(highest)) return;
  row.status = kRowNothingFinite;
  if (row.given >= 0) {
    row.token = row.given;
  } else {
    const float* scores = row.logits;
    float best = highest;
    if (touches(row)) {
      adjust(row, V, work.scores);
      scores = work.scores;
      best = kernels.highest(scores, V);
    }
    if (!std::isfinite(best)) return;
    if (row.temperature == 0) {
      row.token = kernels.find(scores, V, best);
    } else {
      // Between the two, both a difference of 0 and one of −inf survive the product.
      const float inverse = static_cast<float>(1 / std::min(std::max(row.temperature, 0x1p-126), 0x1p126));
      const double u = uniform(row.seed, row.completion, row.index);
      const bool cut = (row.top_k > 0 && row.top_k < V) || row.top_p < 1 || row.min_p > 0;
      row.token = cut ? draw_from_some(kernels, row, scores, V, best, inverse, u, work) : draw_from_all(kernels, scores, V, best, inverse, u, work);
    }
  }
  if (row.logprobs >= 0) {
    if (!std::isfinite(highest)) return;
    measure(kernels, row, V, highest, work);
  }
  row.status = kRowFine;
}

bool inside(const std::int32_t* ids, int count, int V) {
  return count >= 0 && (count == 0 || ids != nullptr) && std::all_of(ids, ids + count, [V](std::int32_t id) { return 0 <= id && id < V; });
}

bool valid(const SampleRow& row, int V) {
  return row.logits != nullptr && inside(row.bias_ids, row.num_bias, V) && inside(row.banned, row.num_banned, V) && inside(row.seen, row.num_seen, V) &&
         row.given < V && row.logprobs <= kMaxLogprobs && row.temperature >= 0 && row.top_p > 0 && row.min_p >= 0 && row.min_p <= 1;
}

}  // namespace
}  // namespace octavo

// Bytes of scratch that rows of V logits take.
OCTAVO_EXPORT std::size_t octavo_sample_scratch(int V) { return V > 0 ? octavo::Work::bytes(V) : 0; }

// Answers every row, each by itself. 0; or 1 where an argument makes no sense and nothing was done, 2 where no instruction set was chosen.
OCTAVO_EXPORT int octavo_sample(octavo::SampleRow* const* rows, int count, int V, void* scratch, std::size_t scratch_bytes) {
  using namespace octavo;
  if (V < 1 || count < 0 || scratch == nullptr || scratch_bytes < Work::bytes(V)) return 1;
  for (int i = 0; i < count; ++i) {
    if (!valid(*rows[i], V)) return 1;
  }
  const Kernels* kernels = nullptr;
  if (!active_kernels(&kernels).is_ok()) return 2;
  const Work work(scratch, V);
  for (int i = 0; i < count; ++i) choose(*kernels->sample, *rows[i], V, work);
  return 0;
}
