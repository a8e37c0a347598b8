// ai.octavo::QuantEmbedding: rows of a packed weight as float32.
#include <algorithm>

#include "ops/ops.h"
#include "quant_weight.h"

namespace octavo {
namespace {

enum Input : std::size_t { kIds, kWeight, kInputCount };

// Names and order are those of custom_ops/contract.py; a test compares them.
constexpr PortDefinition kInputs[] = {{"ids", ort::kInt64, false}, {"weight", ort::kUint8, false}};
static_assert(sizeof kInputs / sizeof kInputs[0] == kInputCount);
constexpr PortDefinition kOutputs[] = {{"output", ort::kFloat, false}};

class QuantEmbedding {
 public:
  Status init(const Attributes& attributes) { return weight_.init(attributes, 1); }

  Status compute(Call& call) const {
    Tensor ids, packed;
    OCTAVO_TRY(call.input(kIds, &ids));
    OCTAVO_TRY(call.input(kWeight, &packed));
    PackedWeight weight{};
    OCTAVO_TRY(weight_.bind(packed, &weight));
    constexpr int kMaxRank = 7;
    if (ids.rank > kMaxRank) return Status::invalid("input 'ids' has rank %d, expected at most %d", ids.rank, kMaxRank);
    std::int64_t shape[kMaxRank + 1], count = 1;
    for (int i = 0; i < ids.rank; ++i) count *= shape[i] = ids.shape[i];
    shape[ids.rank] = weight_.K();
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t id = ids.as<std::int64_t>()[i];
      if (id < 0 || id >= weight_.M()) {
        return Status::invalid("input 'ids' has %lld, outside of 0 to %lld", static_cast<long long>(id), static_cast<long long>(weight_.M() - 1));
      }
    }
    float* output = nullptr;
    OCTAVO_TRY(call.output(0, shape, ids.rank + 1, &output));
    constexpr std::int64_t kItemRows = 8;
    return call.parallel.run(static_cast<std::size_t>((count + kItemRows - 1) / kItemRows), [&](std::size_t item, std::size_t) {
      const std::int64_t first = static_cast<std::int64_t>(item) * kItemRows;
      for (std::int64_t i = first; i < std::min(count, first + kItemRows); ++i) {
        call.kernels->quant->dequantize(weight, ids.as<std::int64_t>()[i], output + i * weight_.K());
      }
    });
  }

 private:
  QuantWeight weight_;
};

}  // namespace

const OpDefinition* quant_embedding() {
  static const OpDefinition op = define<QuantEmbedding>("QuantEmbedding", kInputs, kOutputs);
  return &op;
}

}  // namespace octavo
