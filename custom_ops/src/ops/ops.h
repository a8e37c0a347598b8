// The ops of this library.
#pragma once
#include "op.h"

namespace octavo {

const OpDefinition* paged_attention();
const OpDefinition* flash_attention();
const OpDefinition* quant_linear();
const OpDefinition* quant_embedding();

}  // namespace octavo
