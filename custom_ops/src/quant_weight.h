// The packed weight of a node: its attributes checked, its bytes counted. Used by QuantLinear and QuantEmbedding.
#pragma once
#include "kernels/quant.h"
#include "op.h"

namespace octavo {

class QuantWeight {
 public:
  // `values_per_output` is 2 where a gate follows: outputs of the weight = M·values_per_output.
  Status init(const Attributes& attributes, std::int64_t values_per_output);
  // INVALID_ARGUMENT unless `tensor` has exactly the bytes of this format.
  Status bind(const Tensor& tensor, PackedWeight* out) const;

  std::int64_t K() const { return K_; }
  std::int64_t M() const { return M_; }

 private:
  std::int64_t K_ = 0, M_ = 0, bits_ = 4, group_ = 32, zero_point_ = 0, scale_type_ = ort::kFloat16, tiles_ = 0;
};

}  // namespace octavo
