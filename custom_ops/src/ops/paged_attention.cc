// ai.octavo::PagedAttention: tensors to checked spans, then append, then attend.
#include <cmath>
#include <initializer_list>

#include "kv/paged_keys.h"
#include "kv/step.h"
#include "ops/heads.h"
#include "ops/ops.h"

namespace octavo {
namespace {

enum Input : std::size_t {
  kQuery, kKey, kValue, kKeyCache, kValueCache, kCumulative, kPast, kBlockTable, kCosCache, kSinCache, kSlotMapping, kHeadSink,
  kQNormWeight, kKNormWeight, kKScale, kVScale, kMetadata, kParent, kAlibiSlopes, kInputCount
};

// Names and order are those of custom_ops/contract.py; a test compares them.
constexpr PortDefinition kInputs[] = {
    {"query", ort::kFloat, false},          {"key", ort::kFloat, true},
    {"value", ort::kFloat, true},          {"key_cache", ort::kUndefined, false},
    {"value_cache", ort::kUndefined, false}, {"cumulative_sequence_length", ort::kInt32, false},
    {"past_seqlens", ort::kInt32, false},   {"block_table", ort::kInt32, false},
    {"cos_cache", ort::kFloat, true},       {"sin_cache", ort::kFloat, true},
    {"slot_mapping", ort::kInt32, false},   {"head_sink", ort::kFloat, true},
    {"q_norm_weight", ort::kFloat, true},   {"k_norm_weight", ort::kFloat, true},
    {"k_scale", ort::kFloat, true},         {"v_scale", ort::kFloat, true},
    {"attention_metadata", ort::kInt32, true}, {"parent", ort::kInt32, false},
    {"alibi_slopes", ort::kFloat, true},
};
static_assert(sizeof kInputs / sizeof kInputs[0] == kInputCount);
constexpr PortDefinition kOutputs[] = {{"output", ort::kFloat, false}};

constexpr int kMaxRank = 4;  // of query, key and value

class PagedAttention {
 public:
  Status init(const Attributes& attributes) {
    OCTAVO_TRY(heads_.init(attributes));
    OCTAVO_TRY(attributes.get("rotary_interleaved", &interleaved_));
    OCTAVO_TRY(attributes.get("qk_norm_epsilon", &norm_epsilon_));
    if (!std::isfinite(norm_epsilon_) || norm_epsilon_ < 0) return Status::invalid("attribute 'qk_norm_epsilon' must be finite and not negative");
    if (interleaved_ != 0 && interleaved_ != 1) {
      return Status::invalid("attribute 'rotary_interleaved' is %lld, must be 0 or 1", static_cast<long long>(interleaved_));
    }
    OCTAVO_TRY(attributes.get("chunk_size", &chunk_));
    if (chunk_ != -1 && chunk_ < 1) {
      return Status::invalid("attribute 'chunk_size' is %lld, must be -1 or at least 1", static_cast<long long>(chunk_));
    }
    return Status::ok();
  }

  Status compute(Call& call) const {
    Tensor in[kInputCount];
    for (std::size_t i = 0; i < kInputCount; ++i) OCTAVO_TRY(call.input(i, &in[i]));
    PagedCache cache{};
    StepInput step_input{};
    Step step{};
    Rows rows{};
    OCTAVO_TRY(check(in, &rows, &cache, &step_input));
    OCTAVO_TRY(read_step(step_input, call.scratch, &step));

    char* query = nullptr;
    const std::int64_t query_bytes = cache.type == kCacheInt8 ? int8_query_bytes(cache.D) : cache.D * static_cast<std::int64_t>(sizeof(float));
    float* output = nullptr;
    char* lanes = nullptr;
    const std::int64_t T = step_input.T;
    OCTAVO_TRY(call.scratch.take(static_cast<std::size_t>(T * heads_.H * query_bytes), &query));
    if (step.has_tree) OCTAVO_TRY(call.scratch.take(static_cast<std::size_t>(PagedKeys::lane_bytes(cache)) * kMaxLanes, &lanes));
    OCTAVO_TRY(make_output(call, in[kQuery], heads_.H * cache.E, &output));
    OCTAVO_TRY(append(call, in, rows, cache, step_input, step, query, query_bytes));

    const PagedKeys keys(cache, step_input, step, lanes);
    Attention attention{};
    attention.H = static_cast<int>(heads_.H);
    attention.G = static_cast<int>(heads_.G);
    attention.D = static_cast<int>(cache.D);
    attention.E = static_cast<int>(cache.E);
    attention.cache_type = cache.type;
    attention.softcap = heads_.softcap;
    attention.query = query;
    attention.query_bytes = query_bytes;
    attention.output = output;
    attention.ranges = step.ranges;
    attention.sequences = step.sequences;
    attention.sequence_count = step.sequence_count;
    attention.head_sink = in[kHeadSink].as<float>();
    attention.alibi_slopes = in[kAlibiSlopes].as<float>();
    attention.keys = &keys;
    return attend(attention, *call.kernels, call.parallel, call.scratch);
  }

 private:
  // Where the heads of a token lie: `stride` floats from one token to the next.
  struct Rows {
    std::int64_t T;
    const float *query, *key, *value;
    std::int64_t query_stride, key_stride, value_stride;
  };

  // The tokens of a tensor (..., width): every dimension but the last counts them.
  static Status row_count(const Tensor& tensor, std::int64_t* T) {
    if (tensor.rank < 2 || tensor.rank > kMaxRank) {
      return Status::invalid("input '%s' has rank %d, expected 2 to %d: rows of tokens", tensor.name, tensor.rank, kMaxRank);
    }
    *T = 1;
    for (int i = 0; i + 1 < tensor.rank; ++i) *T *= tensor.shape[i];
    return Status::ok();
  }

  static Status expect_rows(const Tensor& tensor, std::int64_t T, std::int64_t width, const char* meaning) {
    std::int64_t rows = 0;
    OCTAVO_TRY(row_count(tensor, &rows));
    const std::int64_t shape[2] = {T, width};
    if (rows == T && (width < 0 || tensor.shape[tensor.rank - 1] == width)) return Status::ok();
    return expect_shape(tensor, 2, shape, meaning);
  }

  // As many leading dimensions as the query has.
  static Status make_output(Call& call, const Tensor& query, std::int64_t width, float** out) {
    std::int64_t shape[kMaxRank];
    for (int i = 0; i < query.rank; ++i) shape[i] = query.shape[i];
    shape[query.rank - 1] = width;
    return call.output(0, shape, static_cast<std::size_t>(query.rank), out);
  }

  // Head sizes and rows, from query, key and value, or from a query that holds all three.
  Status check_rows(const Tensor* in, Rows* rows, std::int64_t* D, std::int64_t* E) const {
    const std::int64_t H = heads_.H, G = heads_.G;
    OCTAVO_TRY(row_count(in[kQuery], &rows->T));
    if (in[kKey].present() != in[kValue].present()) return Status::invalid("inputs 'key' and 'value' must be given together, or lie in 'query'");
    const int last = in[kQuery].rank - 1;
    const std::int64_t width = in[kQuery].shape[last];
    rows->query = in[kQuery].as<float>();
    rows->query_stride = width;
    if (!in[kKey].present()) {
      OCTAVO_TRY(head_size(in[kQuery], last, H + 2 * G, D));
      *E = *D;
      rows->key = rows->query + H * *D;
      rows->value = rows->key + G * *D;
      rows->key_stride = rows->value_stride = width;
      return Status::ok();
    }
    OCTAVO_TRY(head_size(in[kQuery], last, H, D));
    OCTAVO_TRY(expect_rows(in[kKey], rows->T, G * *D, "(T, G*D)"));
    OCTAVO_TRY(expect_rows(in[kValue], rows->T, -1, "(T, G*E)"));
    OCTAVO_TRY(head_size(in[kValue], in[kValue].rank - 1, G, E));
    rows->key = in[kKey].as<float>();
    rows->value = in[kValue].as<float>();
    rows->key_stride = G * *D;
    rows->value_stride = G * *E;
    return Status::ok();
  }

  // Shapes and types of every input, against each other and the attributes.
  Status check(const Tensor* in, Rows* rows, PagedCache* cache, StepInput* step) const {
    for (std::size_t i : {kKScale, kVScale, kMetadata}) {
      if (in[i].present()) return Status::invalid("input '%s' is reserved and must be absent", in[i].name);
    }
    const std::int64_t H = heads_.H, G = heads_.G;
    std::int64_t D = 0, E = 0;
    OCTAVO_TRY(check_rows(in, rows, &D, &E));
    const std::int64_t T = rows->T;
    const CacheType type = in[kKeyCache].type == ort::kUint8 ? kCacheInt8 : in[kKeyCache].type == ort::kFloat16 ? kCacheHalf : kCacheFloat;
    if (type == kCacheFloat) OCTAVO_TRY(expect_type(in[kKeyCache], ort::kFloat, "float32, float16 or uint8"));
    const bool int8 = type == kCacheInt8;
    OCTAVO_TRY(expect_shape(in[kKeyCache], {-1, G, int8 ? int8_key_width(D) : D, -1}, "(N, G, D, P)"));
    const std::int64_t N = in[kKeyCache].shape[0], P = in[kKeyCache].shape[3];
    if (P < kLanes || P > kChunk || (P & (P - 1)) != 0) {
      return Status::invalid("input 'key_cache' has blocks of %lld slots, must be 16, 32, 64, 128 or 256", static_cast<long long>(P));
    }
    if (N > INT32_MAX / P) return Status::invalid("input 'key_cache' has more slots than an int32 can number");
    OCTAVO_TRY(expect_shape(in[kValueCache], {N, G, P, int8 ? int8_value_width(E) : E}, "(N, G, P, E)"));
    OCTAVO_TRY(expect_type(in[kValueCache], static_cast<ort::ElementType>(in[kKeyCache].type), "that of key_cache"));
    OCTAVO_TRY(expect_shape(in[kCumulative], {-1}, "(B+1)"));
    if (in[kCumulative].shape[0] < 1) return Status::invalid("input 'cumulative_sequence_length' is empty, expected (B+1)");
    const std::int64_t B = in[kCumulative].shape[0] - 1;
    OCTAVO_TRY(expect_shape(in[kPast], {B}, "(B)"));
    OCTAVO_TRY(expect_shape(in[kBlockTable], {B, -1}, "(B, M)"));
    OCTAVO_TRY(expect_shape(in[kSlotMapping], {T}, "(T)"));
    OCTAVO_TRY(expect_shape(in[kParent], {T}, "(T)"));
    if (in[kHeadSink].present()) OCTAVO_TRY(expect_shape(in[kHeadSink], {H}, "(H)"));
    if (in[kAlibiSlopes].present()) OCTAVO_TRY(expect_shape(in[kAlibiSlopes], {H}, "(H)"));
    OCTAVO_TRY(check_rotary(in, D));
    OCTAVO_TRY(check_norms(in, D));
    *cache = {type, N, G, D, E, P, in[kKeyCache].data, in[kValueCache].data};
    *step = {T, B, in[kBlockTable].shape[1], N, P, heads_.window, chunk_, in[kCosCache].present() ? in[kCosCache].shape[0] : -1,
             in[kCumulative].as<std::int32_t>(), in[kPast].as<std::int32_t>(), in[kBlockTable].as<std::int32_t>(),
             in[kSlotMapping].as<std::int32_t>(), in[kParent].as<std::int32_t>()};
    return Status::ok();
  }

  Status check_norms(const Tensor* in, std::int64_t D) const {
    if (in[kQNormWeight].present() != in[kKNormWeight].present()) {
      return Status::invalid("inputs 'q_norm_weight' and 'k_norm_weight' must be given together");
    }
    if (!in[kQNormWeight].present()) return Status::ok();
    OCTAVO_TRY(expect_shape(in[kQNormWeight], {D}, "(D)"));
    return expect_shape(in[kKNormWeight], {D}, "(D)");
  }

  Status check_rotary(const Tensor* in, std::int64_t D) const {
    if (in[kCosCache].present() != in[kSinCache].present()) {
      return Status::invalid("inputs 'cos_cache' and 'sin_cache' must be given together");
    }
    if (!in[kCosCache].present()) return Status::ok();
    OCTAVO_TRY(expect_shape(in[kCosCache], {-1, -1}, "(C, r/2)"));
    OCTAVO_TRY(expect_shape(in[kSinCache], {in[kCosCache].shape[0], in[kCosCache].shape[1]}, "(C, r/2)"));
    if (in[kCosCache].shape[1] < 1 || 2 * in[kCosCache].shape[1] > D) {
      return Status::invalid("input 'cos_cache' rotates %lld of %lld elements of a head", static_cast<long long>(2 * in[kCosCache].shape[1]),
                             static_cast<long long>(D));
    }
    return Status::ok();
  }

  // Normed, rotated and scaled queries into `query`, normed and rotated keys and values into the cache.
  Status append(Call& call, const Tensor* in, const Rows& rows, const PagedCache& cache, const StepInput& step_input, const Step& step, char* query,
                std::int64_t query_bytes) const {
    constexpr std::int64_t rows_per_item = 8;  // several microseconds of work, far above the cost of taking an item
    const std::int64_t T = step_input.T, D = cache.D, E = cache.E;
    const Kernels& kernels = *call.kernels;
    const CacheKernels& stored = *kernels.cache[cache.type];
    const int size = static_cast<int>(D), P = static_cast<int>(cache.P);
    const std::int64_t half = in[kCosCache].present() ? in[kCosCache].shape[1] : 0;
    const float scale = heads_.scale_for(D);
    const auto row = [&](std::int64_t t) {
      const std::int64_t at = step.ranges[t].position * half;
      const Rotary rotary{half ? in[kCosCache].as<float>() + at : nullptr, half ? in[kSinCache].as<float>() + at : nullptr,
                          static_cast<int>(half), interleaved_ == 1};
      alignas(64) float normed[kMaxHead], rotated[kMaxHead];
      const auto turn = [&](const float* x, const Tensor& weight, float factor, float* y) {
        if (weight.present()) kernels.normalize(x, normed, size, weight.as<float>(), norm_epsilon_);
        kernels.rotate(weight.present() ? normed : x, y, size, rotary, factor);
      };
      for (std::int64_t h = 0; h < heads_.H; ++h) {
        char* to = query + (t * heads_.H + h) * query_bytes;
        turn(rows.query + t * rows.query_stride + h * D, in[kQNormWeight], scale, stored.prepare_query ? rotated : reinterpret_cast<float*>(to));
        if (stored.prepare_query) stored.prepare_query(rotated, size, to);
      }
      const std::int64_t slot = step_input.slots[t];
      if (slot < 0) return;
      for (std::int64_t g = 0; g < heads_.G; ++g) {
        const int place = static_cast<int>(slot % P);
        turn(rows.key + t * rows.key_stride + g * D, in[kKNormWeight], 1.0f, rotated);
        stored.append_key(rotated, size, cache.key_block(slot, g), place, P);
        stored.append_value(rows.value + t * rows.value_stride + g * E, static_cast<int>(E), cache.value_block(slot, g), place, P);
      }
    };
    return call.parallel.run(static_cast<std::size_t>((T + rows_per_item - 1) / rows_per_item), [&](std::size_t item, std::size_t) {
      const std::int64_t begin = static_cast<std::int64_t>(item) * rows_per_item;
      for (std::int64_t t = begin; t < T && t < begin + rows_per_item; ++t) row(t);
    });
  }

  Heads heads_;
  std::int64_t interleaved_ = 0;
  std::int64_t chunk_ = -1;
  float norm_epsilon_ = 1e-6f;
};

}  // namespace

const OpDefinition* paged_attention() {
  static const OpDefinition op = define<PagedAttention>("PagedAttention", kInputs, kOutputs);
  return &op;
}

}  // namespace octavo
