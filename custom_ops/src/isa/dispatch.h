// Which kernels run: the best instruction set that processor and system have, or the one that the environment variable OCTAVO_ISA names.
#pragma once
#include "kernels/kernels.h"
#include "status.h"

namespace octavo {

// The choice is made at the first call and stays. An unknown name, or one that this machine lacks, is a status and nothing is chosen.
Status active_kernels(const Kernels** out);

}  // namespace octavo
