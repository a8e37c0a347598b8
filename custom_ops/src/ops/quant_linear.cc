// ai.octavo::QuantLinear: a row's prologue once, then units of two tiles over the threads.
#include <algorithm>
#include <cmath>

#include "ops/ops.h"
#include "quant_weight.h"

namespace octavo {
namespace {

// A LoRA group (a stack of A and B matrices and an adapter number per row) will be added behind `residual`, its deltas to the sums.
enum Input : std::size_t { kInput, kWeight, kNormWeight, kSkip, kBias, kResidual, kActivationScale, kInputCount };

// Names and order are those of custom_ops/contract.py; a test compares them.
constexpr PortDefinition kInputs[] = {
    {"input", ort::kFloat, false}, {"weight", ort::kUint8, false}, {"norm_weight", ort::kFloat, true},
    {"skip", ort::kFloat, true},   {"bias", ort::kFloat, true},    {"residual", ort::kFloat, true},
    {"activation_scale", ort::kFloat, true},
};
static_assert(sizeof kInputs / sizeof kInputs[0] == kInputCount);
constexpr PortDefinition kOutputs[] = {{"output", ort::kFloat, false}, {"sum", ort::kFloat, true}};

// Below this many elements the rows are prepared before the threads are called: one join less, and about a microsecond of work.
constexpr std::int64_t kAlone = 8192;
// What one work item should be: enough weights to read, or products to add, that taking it from the queue does not show.
constexpr std::int64_t kItemBytes = 8 * 1024, kItemProducts = 1024 * 1024;

class QuantLinear {
 public:
  Status init(const Attributes& attributes) {
    std::int64_t activation_bits = 8;
    OCTAVO_TRY(attributes.get("activation_bits", &activation_bits));
    OCTAVO_TRY(attributes.get("gate", &gate_));
    OCTAVO_TRY(attributes.get("norm_epsilon", &epsilon_));
    if (activation_bits != 8 && activation_bits != 32) {
      return Status::invalid("attribute 'activation_bits' is %lld, must be 8 or 32", static_cast<long long>(activation_bits));
    }
    int8_ = activation_bits == 8;
    if (gate_ < kNoGate || gate_ > kGeluTanh) return Status::invalid("attribute 'gate' is %lld, must be 0 to 3", static_cast<long long>(gate_));
    if (!std::isfinite(epsilon_) || epsilon_ < 0) return Status::invalid("attribute 'norm_epsilon' must be finite and not negative");
    return weight_.init(attributes, gate_ == kNoGate ? 1 : 2);
  }

  Status compute(Call& call) const {
    Tensor in[kInputCount];
    for (std::size_t i = 0; i < kInputCount; ++i) OCTAVO_TRY(call.input(i, &in[i]));
    PackedWeight weight{};
    std::int64_t rows = 0;
    OCTAVO_TRY(check(in, &weight, &rows));
    const int rank = in[kInput].rank;
    std::int64_t shape[kMaxRank];
    std::copy_n(in[kInput].shape, rank - 1, shape);
    float *output = nullptr, *sum = nullptr;
    shape[rank - 1] = weight_.M();
    OCTAVO_TRY(call.output(0, shape, rank, &output));
    shape[rank - 1] = weight_.K();
    bool wants_sum = false;
    OCTAVO_TRY(call.optional_output(1, shape, rank, &sum, &wants_sum));
    if (rows == 0) return Status::ok();

    const Prologue prologue{in[kInput].as<float>(), in[kSkip].as<float>(), sum, in[kNormWeight].as<float>(), epsilon_, in[kActivationScale].as<float>()};
    const Epilogue epilogue{in[kBias].as<float>(), in[kResidual].as<float>(), output, weight_.M(), static_cast<Gate>(gate_)};
    Prepared prepared{};
    OCTAVO_TRY(prepare(call, weight, prologue, rows, &prepared));
    return multiply(call, weight, prepared, epilogue, rows);
  }

 private:
  static constexpr int kMaxRank = 8;

  Status check(const Tensor* in, PackedWeight* weight, std::int64_t* rows) const {
    const std::int64_t K = weight_.K(), M = weight_.M();
    const Tensor& input = in[kInput];
    if (input.rank < 1 || input.rank > kMaxRank) return Status::invalid("input 'input' has rank %d, expected 1 to %d", input.rank, kMaxRank);
    std::int64_t shape[kMaxRank];
    std::copy_n(input.shape, input.rank, shape);
    shape[input.rank - 1] = K;
    OCTAVO_TRY(expect_shape(input, input.rank, shape, "(..., K)"));
    *rows = 1;
    for (int i = 0; i < input.rank - 1; ++i) *rows *= shape[i];
    OCTAVO_TRY(weight_.bind(in[kWeight], weight));
    if (in[kNormWeight].present()) OCTAVO_TRY(expect_shape(in[kNormWeight], {K}, "(K)"));
    if (in[kSkip].present()) OCTAVO_TRY(expect_shape(in[kSkip], input.rank, shape, "(..., K)"));
    if (in[kBias].present()) OCTAVO_TRY(expect_shape(in[kBias], {gate_ == kNoGate ? M : 2 * M}, "(M), or (2*M) with a gate"));
    shape[input.rank - 1] = M;
    if (in[kResidual].present()) OCTAVO_TRY(expect_shape(in[kResidual], input.rank, shape, "(..., M)"));
    return in[kActivationScale].present() ? check_scales(in[kActivationScale], K / weight->group) : Status::ok();
  }

  Status check_scales(const Tensor& scales, std::int64_t groups) const {
    if (!int8_) return Status::invalid("input 'activation_scale' is given, and activations are float32");
    OCTAVO_TRY(expect_shape(scales, {groups}, "(K / group_size)"));
    for (std::int64_t g = 0; g < groups; ++g) {
      const float scale = scales.as<float>()[g];
      if (std::isfinite(scale) && scale >= 0x1p-120f) continue;
      return Status::invalid("input 'activation_scale' holds %g at %lld, must be finite and at least 2^-120", static_cast<double>(scale),
                             static_cast<long long>(g));
    }
    return Status::ok();
  }

  Status prepare(Call& call, const PackedWeight& weight, const Prologue& prologue, std::int64_t rows, Prepared* out) const {
    const QuantKernels& kernels = *call.kernels->quant;
    const std::int64_t step = kernels.row_block, blocks = (rows + step - 1) / step;
    const std::int64_t row_bytes = int8_ ? weight.K + weight.K / weight.group * 12 : weight.K * 4;
    out->int8 = int8_;
    out->block_bytes = (row_bytes * std::min(step, rows) + 63) / 64 * 64;
    OCTAVO_TRY(call.scratch.take(static_cast<std::size_t>(out->block_bytes * blocks), &out->blocks));
    auto block = [&](std::size_t i, std::size_t) {
      const std::int64_t row0 = static_cast<std::int64_t>(i) * step;
      kernels.prepare(weight, prologue, row0, static_cast<int>(std::min(step, rows - row0)), *out);
    };
    if (rows * weight.K > kAlone) return call.parallel.run(static_cast<std::size_t>(blocks), block);
    for (std::int64_t i = 0; i < blocks; ++i) block(static_cast<std::size_t>(i), 0);
    return Status::ok();
  }

  Status multiply(Call& call, const PackedWeight& weight, const Prepared& prepared, const Epilogue& epilogue, std::int64_t rows) const {
    const std::int64_t units = (weight.tile_count + kUnitTiles - 1) / kUnitTiles, chunks = (rows + kChunkRows - 1) / kChunkRows;
    const std::int64_t products = std::min<std::int64_t>(rows, kChunkRows) * weight.K * kUnitOutputs;
    const std::int64_t per_item = std::max<std::int64_t>(1, std::min(kItemBytes / (weight.tile_bytes * kUnitTiles), kItemProducts / products));
    const std::int64_t parts = (units + per_item - 1) / per_item;
    return call.parallel.run(static_cast<std::size_t>(parts * chunks), [&](std::size_t item, std::size_t) {
      const std::int64_t chunk = static_cast<std::int64_t>(item) / parts, unit0 = static_cast<std::int64_t>(item) % parts * per_item;
      const std::int64_t row0 = chunk * kChunkRows;
      call.kernels->quant->multiply(weight, prepared, epilogue, unit0, std::min(units, unit0 + per_item), row0,
                                    static_cast<int>(std::min<std::int64_t>(kChunkRows, rows - row0)));
    });
  }

  QuantWeight weight_;
  std::int64_t gate_ = kNoGate;
  float epsilon_ = 1e-5f;
  bool int8_ = true;
};

}  // namespace

const OpDefinition* quant_linear() {
  static const OpDefinition op = define<QuantLinear>("QuantLinear", kInputs, kOutputs);
  return &op;
}

}  // namespace octavo
