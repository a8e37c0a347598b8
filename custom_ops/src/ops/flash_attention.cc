// ai.octavo::FlashAttention: tensors to checked spans, keys packed into the layout of the cache, then attend.
#include <algorithm>

#include "attention.h"
#include "ops/heads.h"
#include "ops/ops.h"

namespace octavo {
namespace {

enum Input : std::size_t { kQuery, kKey, kValue, kBias, kKeyMask, kHeadSink, kAlibiSlopes, kInputCount };

// Names and order are those of custom_ops/contract.py; a test compares them.
constexpr PortDefinition kInputs[] = {
    {"query", ort::kFloat, false},  {"key", ort::kFloat, false},     {"value", ort::kFloat, false},        {"attention_bias", ort::kUndefined, true},
    {"key_mask", ort::kBool, true}, {"head_sink", ort::kFloat, true}, {"alibi_slopes", ort::kFloat, true},
};
static_assert(sizeof kInputs / sizeof kInputs[0] == kInputCount);
constexpr PortDefinition kOutputs[] = {{"output", ort::kFloat, false}};

struct Sizes {
  std::int64_t B, S, T, D, E;
  std::int64_t chunks() const { return (T + kChunk - 1) / kChunk; }
};

// Keys transposed chunk by chunk, (B, G, chunks, D, kChunk), as one block of the cache would hold them; values where they are.
class PackedKeys final : public KeySource {
 public:
  PackedKeys(const Sizes& n, std::int64_t G, const float* packed, const float* value) : n_(n), G_(G), packed_(packed), value_(value) {}

  void view(std::int64_t sequence, int g, std::int32_t chunk, std::size_t, ChunkView* out) const override {
    out->first = chunk * kChunk;
    out->log2_block = __builtin_ctz(kChunk);
    out->key_stride = kChunk;
    out->value_stride = G_ * n_.E;
    out->key_bytes = out->value_bytes = 0;
    out->key[0] = packed_ + ((sequence * G_ + g) * n_.chunks() + chunk) * n_.D * kChunk;
    out->value[0] = value_ + ((sequence * n_.T + out->first) * G_ + g) * n_.E;
  }
  bool in_place(std::int64_t) const override { return true; }

 private:
  const Sizes& n_;
  const std::int64_t G_;
  const float* packed_;
  const float* value_;
};

class FlashAttention {
 public:
  Status init(const Attributes& attributes) {
    OCTAVO_TRY(heads_.init(attributes));
    OCTAVO_TRY(attributes.get("is_causal", &causal_));
    if (causal_ != 0 && causal_ != 1) return Status::invalid("attribute 'is_causal' is %lld, must be 0 or 1", static_cast<long long>(causal_));
    if (heads_.window > 0 && causal_ == 0) return Status::invalid("attribute 'local_window_size' needs is_causal = 1");
    return Status::ok();
  }

  Status compute(Call& call) const {
    Tensor in[kInputCount];
    for (std::size_t i = 0; i < kInputCount; ++i) OCTAVO_TRY(call.input(i, &in[i]));
    Sizes n{};
    OCTAVO_TRY(check(in, &n));
    float *query = nullptr, *packed = nullptr, *output = nullptr;
    RowRange* ranges = nullptr;
    Sequence* sequences = nullptr;
    const std::int64_t rows = n.B * n.S;
    OCTAVO_TRY(call.scratch.take(static_cast<std::size_t>(rows * heads_.H * n.D), &query));
    OCTAVO_TRY(call.scratch.take(static_cast<std::size_t>(n.B * heads_.G * n.chunks() * n.D * kChunk), &packed));
    OCTAVO_TRY(call.scratch.take(static_cast<std::size_t>(rows), &ranges));
    OCTAVO_TRY(call.scratch.take(static_cast<std::size_t>(n.B), &sequences));
    OCTAVO_TRY(call.output(0, {n.B, n.S, heads_.H * n.E}, &output));
    OCTAVO_TRY(prepare(call, in, n, query, packed));
    for (std::int64_t b = 0; b < n.B; ++b) {
      sequences[b] = {b * n.S, n.S};
      for (std::int64_t i = 0; i < n.S; ++i) ranges[b * n.S + i] = range_of(n, i);
    }

    const PackedKeys keys(n, heads_.G, packed, in[kValue].as<float>());
    Attention attention{};
    attention.H = static_cast<int>(heads_.H);
    attention.G = static_cast<int>(heads_.G);
    attention.D = static_cast<int>(n.D);
    attention.E = static_cast<int>(n.E);
    attention.cache_type = kCacheFloat;
    attention.softcap = heads_.softcap;
    attention.query = reinterpret_cast<const char*>(query);
    attention.query_bytes = n.D * static_cast<std::int64_t>(sizeof(float));
    attention.output = output;
    attention.ranges = ranges;
    attention.sequences = sequences;
    attention.sequence_count = n.B;
    attention.head_sink = in[kHeadSink].as<float>();
    attention.alibi_slopes = in[kAlibiSlopes].as<float>();
    attention.bias = bias_of(in, n);
    attention.keys = &keys;
    return attend(attention, *call.kernels, call.parallel, call.scratch);
  }

 private:
  Status check(const Tensor* in, Sizes* n) const {
    const std::int64_t H = heads_.H, G = heads_.G;
    OCTAVO_TRY(expect_shape(in[kQuery], {-1, -1, -1}, "(B, S, H*D)"));
    OCTAVO_TRY(head_size(in[kQuery], 2, H, &n->D));
    n->B = in[kQuery].shape[0];
    n->S = in[kQuery].shape[1];
    OCTAVO_TRY(expect_shape(in[kKey], {n->B, -1, G * n->D}, "(B, T, G*D)"));
    n->T = in[kKey].shape[1];
    OCTAVO_TRY(expect_shape(in[kValue], {n->B, n->T, -1}, "(B, T, G*E)"));
    OCTAVO_TRY(head_size(in[kValue], 2, G, &n->E));
    if (n->T > INT32_MAX - kChunk || n->S > INT32_MAX - kChunk) return Status::invalid("input 'key' has more tokens than an int32 can number");
    if (in[kKeyMask].present()) OCTAVO_TRY(expect_shape(in[kKeyMask], {n->B, n->T}, "(B, T)"));
    if (in[kHeadSink].present()) OCTAVO_TRY(expect_shape(in[kHeadSink], {H}, "(H)"));
    if (in[kAlibiSlopes].present()) OCTAVO_TRY(expect_shape(in[kAlibiSlopes], {H}, "(H)"));
    const Tensor& bias = in[kBias];
    if (!bias.present()) return Status::ok();
    if (bias.type != ort::kFloat) OCTAVO_TRY(expect_type(bias, ort::kBool, "float32 or bool"));
    OCTAVO_TRY(expect_shape(bias, {-1, -1, -1, n->T}, "(B|1, H|1, S|1, T)"));
    const std::int64_t full[] = {n->B, H, n->S};
    for (int i = 0; i < 3; ++i) {
      if (bias.shape[i] != 1 && bias.shape[i] != full[i]) {
        return Status::invalid("input 'attention_bias' has %lld in dimension %d, expected 1 or %lld of (B|1, H|1, S|1, T)",
                               static_cast<long long>(bias.shape[i]), i, static_cast<long long>(full[i]));
      }
    }
    return Status::ok();
  }

  Bias bias_of(const Tensor* in, const Sizes& n) const {
    Bias bias{};
    bias.key_mask = in[kKeyMask].as<std::uint8_t>();
    bias.keys = static_cast<std::int32_t>(n.T);
    const Tensor& tensor = in[kBias];
    if (!tensor.present()) return bias;
    bias.type = tensor.type == ort::kBool ? kBoolBias : kFloatBias;
    bias.data = tensor.data;
    bias.row_stride = tensor.shape[2] == 1 ? 0 : n.T;
    bias.head_stride = tensor.shape[1] == 1 ? 0 : tensor.shape[2] * n.T;
    bias.sequence_stride = tensor.shape[0] == 1 ? 0 : tensor.shape[1] * tensor.shape[2] * n.T;
    return bias;
  }

  // Aligned at the bottom right: the last query stands at the last key. A row before the first key sees nothing.
  RowRange range_of(const Sizes& n, std::int64_t i) const {
    const std::int64_t position = i + n.T - n.S;
    const std::int64_t hi = causal_ ? std::clamp<std::int64_t>(position + 1, 0, n.T) : n.T;
    const std::int64_t lo = heads_.window > 0 ? std::max<std::int64_t>(0, position - heads_.window + 1) : 0;
    return {static_cast<std::int32_t>(std::min(lo, hi)), static_cast<std::int32_t>(hi), static_cast<std::int32_t>(position)};
  }

  // Scaled queries, and keys turned round.
  Status prepare(Call& call, const Tensor* in, const Sizes& n, float* query, float* packed) const {
    const std::int64_t H = heads_.H, G = heads_.G, D = n.D, rows = n.B * n.S;
    const float scale = heads_.scale_for(D);
    const Kernels& kernels = *call.kernels;
    constexpr std::int64_t rows_per_item = 32;
    const std::int64_t query_items = (rows + rows_per_item - 1) / rows_per_item;
    return call.parallel.run(static_cast<std::size_t>(query_items + n.B * G * n.chunks()), [&](std::size_t raw, std::size_t) {
      const std::int64_t item = static_cast<std::int64_t>(raw);
      if (item < query_items) {
        for (std::int64_t h = item * rows_per_item * H; h < std::min(rows, (item + 1) * rows_per_item) * H; ++h) {
          kernels.rotate(in[kQuery].as<float>() + h * D, query + h * D, static_cast<int>(D), Rotary{}, scale);
        }
        return;
      }
      const std::int64_t piece = item - query_items, chunk = piece % n.chunks(), g = piece / n.chunks() % G, b = piece / n.chunks() / G;
      const std::int64_t first = chunk * kChunk, count = std::min<std::int64_t>(kChunk, n.T - first);
      for (std::int64_t j = 0; j < count; ++j) {
        kernels.cache[kCacheFloat]->append_key(in[kKey].as<float>() + ((b * n.T + first + j) * G + g) * D, static_cast<int>(D),
                                               packed + piece * D * kChunk, static_cast<int>(j), kChunk);
      }
    });
  }

  Heads heads_;
  std::int64_t causal_ = 0;
};

}  // namespace

const OpDefinition* flash_attention() {
  static const OpDefinition op = define<FlashAttention>("FlashAttention", kInputs, kOutputs);
  return &op;
}

}  // namespace octavo
