#include "native/sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa/dispatch.h"
#include "native/export.h"

namespace octavo {
namespace {

// So few candidates are ordered one by one rather than looked at again as a whole.
constexpr int kFew = 96;

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
  float *scores, *weights;
  float *row_peaks, *peaks, *sums, *bounds, *order;  // by run; row_peaks of the row as it came, peaks of the scores
  std::int32_t* ids;
  Candidate* candidates;

  static std::size_t bytes(int V) {
    const std::size_t n = static_cast<std::size_t>(V), runs = static_cast<std::size_t>(runs_of(V));
    return n * (2 * sizeof(float) + sizeof(std::int32_t) + sizeof(Candidate)) + 5 * runs * sizeof(float) + 64;
  }
  Work(void* scratch, int V) {
    const auto address = (reinterpret_cast<std::uintptr_t>(scratch) + 63) & ~std::uintptr_t{63};
    scores = reinterpret_cast<float*>(address);
    weights = scores + V;
    ids = reinterpret_cast<std::int32_t*>(weights + V);
    candidates = reinterpret_cast<Candidate*>(ids + V);
    row_peaks = reinterpret_cast<float*>(candidates + V);
    peaks = row_peaks + runs_of(V);
    sums = peaks + runs_of(V);
    bounds = sums + runs_of(V);
    order = bounds + runs_of(V);
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

// Bias, bans, penalties: each in float64, rounded to float32. `scores` are the row's logits before.
void adjust(const SampleRow& row, float* scores) {
  for (int i = 0; i < row.num_bias; ++i) scores[row.bias_ids[i]] = static_cast<float>(static_cast<double>(scores[row.bias_ids[i]]) + row.bias[i]);
  for (int i = 0; i < row.num_banned; ++i) scores[row.banned[i]] = -HUGE_VALF;
  for (int i = 0; i < row.num_seen; ++i) {
    double score = static_cast<double>(scores[row.seen[i]]);
    score = score > 0 ? score / row.repetition : score * row.repetition;
    if (row.counts[i] > 0) score -= row.frequency * row.counts[i] + row.presence;
    scores[row.seen[i]] = static_cast<float>(score);
  }
}

// The k-th largest element is at least this: the k-th largest of the runs' peaks. −inf where there are fewer runs.
float at_least_k(const float* peaks, int runs, int k, float* order) {
  if (k > runs) return -HUGE_VALF;
  std::copy(peaks, peaks + runs, order);
  std::nth_element(order, order + (k - 1), order + runs, [](float a, float b) { return a > b; });
  return order[k - 1];
}

double total_of(const float* sums, int runs) {
  double total = 0;
  for (int run = 0; run < runs; ++run) total += static_cast<double>(sums[run]);
  return total;
}

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

// Two weights: what has `sure` or more is needed, and `mass` is less than what is wanted; what has `least` or more is enough.
struct Bracket {
  float least, sure;
  double mass;
};

// Narrows until few tokens lie between, on the representation, in which floats are ordered as integers. All from `floor` on make up `total`, which is
// enough, and no token below counts. Each look is taken where the wanted mass would lie were it spread evenly, and a little farther on, toward the
// end that is farther away.
Bracket narrow(const SampleKernels& kernels, const float* weights, int V, const float* bounds, float floor, double total, double wanted) {
  std::uint32_t low = to_bits(floor), high = to_bits(1.0f) + 1;
  int low_count = V, high_count = 0;
  double low_mass = total, high_mass = 0;
  // 1 where what lies from there on is enough, −1 where it is not, 0 where sums can't tell.
  const auto look = [&](std::uint32_t at) {
    int count = 0;
    const double mass = kernels.mass_from(weights, V, bounds, from_bits(at), &count);
    if (mass > wanted * kSurely) {
      low = at;
      low_count = count;
      low_mass = mass;
      return 1;
    }
    if (mass * kSurely < wanted) {
      high = at;
      high_count = count;
      high_mass = mass;
      return -1;
    }
    return 0;
  };
  bool halve = false;
  while (low_count - high_count > kFew && high - low > 1) {
    const double share = halve ? 0.5 : std::min(std::max((low_mass - wanted) / (low_mass - high_mass), 0.0), 1.0);
    const bool up = share < 0.5;
    const double aim = halve ? 0.5 : up ? share + (1 - share) / 16 : share - share / 16;
    const std::uint32_t at = low + std::min(std::max(static_cast<std::uint32_t>(aim * (high - low)), std::uint32_t{1}), high - low - 1);
    const int side = look(at);
    if (side == 0) {
      // What is wanted begins about here: near it from both sides.
      for (std::uint32_t step = (at - low) / 2; low_count - high_count > kFew && step > 0 && look(at - step) > 0;) step = (at - low) / 2;
      for (std::uint32_t step = (high - at) / 2; low_count - high_count > kFew && step > 0 && look(at + step) < 0;) step = (high - at) / 2;
      break;
    }
    halve = !halve && (side < 0) != up;  // a guess that went wrong
  }
  return {from_bits(low), from_bits(high), high_mass};
}

// Orders the first of `count` candidates until their weights reach `wanted`; how many that takes, at least one unless there are `some` above them.
// Quickselect by mass.
int reach(Candidate* all, int count, double wanted, bool some) {
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
  while (low < high && ((low == 0 && !some) || mass < wanted)) mass += static_cast<double>(all[low++].weight);
  return low;
}

// The token at `left` of the way through the weights that are `least` or more, in the order of ids; the last with any weight where rounding puts
// the point on the very end.
int token_at(const std::int32_t* ids, const float* weights, int first, int end, float least, double left) {
  int token = first;
  for (int i = first; i < end; ++i) {
    if (weights[i] == 0.0f || weights[i] < least) continue;
    token = i;
    left -= static_cast<double>(weights[i]);
    if (left < 0) break;
  }
  return ids != nullptr ? ids[token] : token;
}

// The token at `u` of the way through the weights that are `least` or more, whose sums by run are given.
int draw(const float* weights, int V, const float* sums, float least, double u) {
  double left = u * total_of(sums, runs_of(V));
  int last = 0;
  bool found = false;
  for (int run = 0; run < runs_of(V) && !found; ++run) {
    const double sum = static_cast<double>(sums[run]);
    if (sum > 0) last = run;
    found = left < sum;
    if (!found) left -= sum;
  }
  return token_at(nullptr, weights, last * kRun, std::min(V, (last + 1) * kRun), least, found ? left : HUGE_VAL);
}

// Leaves in `weights` those that min_p and top_p keep at the value returned or above it, all others below.
float cut_by_mass(const SampleKernels& kernels, const SampleRow& row, const float* scores, int V, double total, const Work& work) {
  float* weights = work.weights;
  const float min_p = static_cast<float>(row.min_p);
  if (!(row.top_p < 1)) return min_p;
  int count = 0;
  if (min_p > 0.0f) total = kernels.mass_from(weights, V, work.bounds, min_p, &count);
  const double wanted = row.top_p * total;
  // Below (1 − p)·total/V all together are less than 1 − p: no token there is ever needed.
  const float floor = std::max(min_p, static_cast<float>((1 - row.top_p) * total / V * 0.999));
  const Bracket bracket = narrow(kernels, weights, V, work.bounds, floor, total, wanted);
  const int between = kernels.collect(weights, V, work.bounds, bracket.least, bracket.sure, work.ids);
  Candidate* all = work.candidates;
  for (int i = 0; i < between; ++i) all[i] = {scores[work.ids[i]], weights[work.ids[i]], work.ids[i]};
  const int kept = reach(all, between, wanted - bracket.mass, bracket.mass > 0);
  for (int i = kept; i < between; ++i) weights[all[i].id] = 0.0f;
  return bracket.least;
}

// With a cut to the k best: these are few, and all else is done among them.
int draw_from_best(const SampleKernels& kernels, const SampleRow& row, const float* scores, int V, float best, float inverse, double u, const Work& work) {
  const float min_p = static_cast<float>(row.min_p);
  float* weights = work.weights;
  std::int32_t* ids = work.ids;
  const int found = kernels.collect(scores, V, work.peaks, at_least_k(work.peaks, runs_of(V), row.top_k, work.order), HUGE_VALF, ids);
  for (int i = 0; i < found; ++i) weights[i] = scores[ids[i]];
  kernels.weigh(weights, found, best, inverse, nullptr, weights, work.sums);
  // ids and weights stay in the order of ids, for the draw; `all` is put into the order of cuts.
  Candidate* all = work.candidates;
  double mass = 0;
  int count = 0;
  for (int i = 0; i < found; ++i) {
    if (weights[i] < min_p) continue;
    ids[count] = ids[i];
    weights[count] = weights[i];
    all[count] = {scores[ids[count]], weights[count], ids[count]};
    mass += static_cast<double>(weights[count]);
    ++count;
  }
  int kept = count;
  if (row.top_k < kept) {
    kept = row.top_k;
    std::nth_element(all, all + (kept - 1), all + count, before);
    mass = 0;
    for (int i = 0; i < kept; ++i) mass += static_cast<double>(all[i].weight);
  }
  Candidate last = *std::max_element(all, all + kept, before);
  if (row.top_p < 1) {
    kept = reach(all, kept, row.top_p * mass, false);
    last = all[kept - 1];
  }
  mass = 0;
  for (int i = 0; i < count; ++i) {
    if (before(last, {scores[ids[i]], weights[i], ids[i]})) weights[i] = 0.0f;
    mass += static_cast<double>(weights[i]);
  }
  return token_at(ids, weights, 0, count, 0.0f, u * mass);
}

// Log probabilities of the row as it came, before bias and penalties; `total` of its weights, where it is known already, else 0.
void measure(const SampleKernels& kernels, SampleRow& row, int V, float best, double total, const Work& work) {
  const int runs = runs_of(V);
  if (total == 0) {
    kernels.weigh(row.logits, V, best, 1.0f, nullptr, nullptr, work.sums);
    total = total_of(work.sums, runs);
  }
  const double norm = static_cast<double>(best) + std::log(total);
  const float own = row.logits[row.token];
  row.logprob = static_cast<double>(own) - norm;
  row.rank = 1;
  for (int run = 0; run < runs; ++run) {
    if (work.row_peaks[run] > own) row.rank += kernels.count_above(row.logits + run * kRun, std::min(kRun, V - run * kRun), own);
  }
  const int k = row.num_top = std::min(row.logprobs, V);
  if (k == 0) return;
  const int count = kernels.collect(row.logits, V, work.row_peaks, at_least_k(work.row_peaks, runs, k, work.order), HUGE_VALF, work.ids);
  for (int i = 0; i < count; ++i) work.candidates[i] = {row.logits[work.ids[i]], 0.0f, work.ids[i]};
  std::partial_sort(work.candidates, work.candidates + k, work.candidates + count, before);
  for (int i = 0; i < k; ++i) {
    row.top_ids[i] = work.candidates[i].id;
    row.top_logprobs[i] = static_cast<double>(work.candidates[i].score) - norm;
  }
}

// The first token whose score is the highest.
int best_token(const SampleKernels& kernels, const float* scores, int V, float best, const float* peaks) {
  const int run = static_cast<int>(std::find(peaks, peaks + runs_of(V), best) - peaks);
  return run * kRun + kernels.find(scores + run * kRun, std::min(kRun, V - run * kRun), best);
}

// `ahead`: the logits of the row that comes next; may be null.
void choose(const SampleKernels& kernels, SampleRow& row, int V, const float* ahead, Work work) {
  const bool adjusted = row.given < 0 && touches(row);
  const float highest = kernels.highest(row.logits, V, work.row_peaks, adjusted ? work.scores : nullptr);
  row.status = kRowNan;
  if (std::isnan(highest)) return;
  row.status = kRowNothingFinite;
  double total = 0;  // of the row's own weights, once they are known
  if (row.given >= 0) {
    row.token = row.given;
  } else {
    const float* scores = row.logits;
    float best = highest;
    if (adjusted) {
      adjust(row, work.scores);
      scores = work.scores;
      best = kernels.highest(scores, V, work.peaks, nullptr);
    } else {
      work.peaks = work.row_peaks;
    }
    if (!std::isfinite(best)) return;
    if (row.temperature == 0) {
      row.token = best_token(kernels, scores, V, best, work.peaks);
    } else {
      // Between the two, both a difference of 0 and one of −inf survive the product.
      const float inverse = static_cast<float>(1 / std::min(std::max(row.temperature, 0x1p-126), 0x1p126));
      const double u = uniform(row.seed, row.completion, row.index);
      if (row.top_k > 0 && row.top_k < V) {
        row.token = draw_from_best(kernels, row, scores, V, best, inverse, u, work);
      } else {
        kernels.weigh(scores, V, best, inverse, ahead, work.weights, work.sums);
        const double mass = total_of(work.sums, runs_of(V));
        if (scores == row.logits && inverse == 1.0f) total = mass;
        float least = 0.0f;
        if (row.top_p < 1 || row.min_p > 0) {
          kernels.weigh(work.peaks, runs_of(V), best, inverse, nullptr, work.bounds, work.order);
          for (int run = 0; run < runs_of(V); ++run) work.bounds[run] *= 1.0001f;  // whatever the rounding of a smaller one
          least = cut_by_mass(kernels, row, scores, V, mass, work);
          kernels.sums_from(work.weights, V, work.bounds, least, work.sums);
        }
        row.token = draw(work.weights, V, work.sums, least, u);
      }
    }
  }
  if (row.logprobs >= 0) {
    if (!std::isfinite(highest)) return;
    measure(kernels, row, V, highest, total, work);
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
  for (int i = 0; i < count; ++i) choose(*kernels->sample, *rows[i], V, i + 1 < count ? rows[i + 1]->logits : nullptr, work);
  return 0;
}
