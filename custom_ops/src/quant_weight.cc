#include "quant_weight.h"

#include <initializer_list>

namespace octavo {
namespace {

// Far above any model, and low enough that no product of two sizes overflows.
constexpr std::int64_t kMaxSize = std::int64_t{1} << 24;

constexpr std::int64_t rounded_up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step * step; }

Status expect_one_of(const char* name, std::int64_t value, std::initializer_list<std::int64_t> allowed, const char* words) {
  for (const std::int64_t one : allowed) {
    if (value == one) return Status::ok();
  }
  return Status::invalid("attribute '%s' is %lld, must be %s", name, static_cast<long long>(value), words);
}

}  // namespace

Status QuantWeight::init(const Attributes& attributes, std::int64_t values_per_output) {
  OCTAVO_TRY(attributes.require("K", &K_));
  OCTAVO_TRY(attributes.require("M", &M_));
  OCTAVO_TRY(attributes.get("bits", &bits_));
  OCTAVO_TRY(attributes.get("group_size", &group_));
  OCTAVO_TRY(attributes.get("zero_point", &zero_point_));
  OCTAVO_TRY(attributes.get("scale_type", &scale_type_));
  OCTAVO_TRY(expect_one_of("bits", bits_, {4, 8}, "4 or 8"));
  OCTAVO_TRY(expect_one_of("group_size", group_, {32, 64, 128}, "32, 64 or 128"));
  OCTAVO_TRY(expect_one_of("zero_point", zero_point_, {kSymmetric, kZeroPointBytes, kMinimum}, "0 (none), 1 (uint8) or 2 (float)"));
  OCTAVO_TRY(expect_one_of("scale_type", scale_type_, {ort::kFloat, ort::kFloat16}, "1 (float32) or 10 (float16)"));
  if (K_ < 1 || K_ > kMaxSize || K_ % group_ != 0) {
    return Status::invalid("attribute 'K' is %lld, must be a multiple of group_size %lld", static_cast<long long>(K_), static_cast<long long>(group_));
  }
  if (M_ < 1 || M_ > kMaxSize) return Status::invalid("attribute 'M' is %lld, must be at least 1", static_cast<long long>(M_));
  tiles_ = rounded_up(M_, kTileOutputs) / kTileOutputs * values_per_output;
  return Status::ok();
}

Status QuantWeight::bind(const Tensor& tensor, PackedWeight* out) const {
  const std::int64_t quantities = K_ / group_ * kTileOutputs, number = scale_type_ == ort::kFloat16 ? 2 : 4;
  const std::int64_t zeros = zero_point_ == kSymmetric ? 0 : zero_point_ == kZeroPointBytes ? 1 : number;
  const std::int64_t lines = rounded_up(quantities * (number + zeros), 64);
  out->tiles = tensor.as<std::uint8_t>();
  out->tile_bytes = lines + K_ * bits_ / 8 * kTileOutputs;
  out->zero_offset = quantities * number;
  out->lines_offset = lines;
  out->K = static_cast<int>(K_);
  out->group = static_cast<int>(group_);
  out->bits = static_cast<int>(bits_);
  out->tile_count = static_cast<int>(tiles_);
  out->zero_point = static_cast<ZeroPoint>(zero_point_);
  out->half_scales = scale_type_ == ort::kFloat16;
  return expect_shape(tensor, {tiles_ * out->tile_bytes}, "(bytes of the packed weight)");
}

}  // namespace octavo
