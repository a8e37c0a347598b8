// Which kernels run: the best instruction set that processor and system have, or the one that the environment variable OCTAVO_ISA names.
//
//     avx512vnni  AVX-512 with byte products        avx512bw  AVX-512 F, BW, DQ, VL without them      avx512  whichever of the two is here
//     neon        AArch64 with byte products
//     avxvnni     AVX2 with byte products           avx2      AVX2, FMA, F16C                         scalar  no vector instruction asked for
#pragma once
#include "kernels/kernels.h"
#include "status.h"

namespace octavo {

// The choice is made at the first call and stays. An unknown name, or one that this machine lacks, is a status and nothing is chosen.
Status active_kernels(const Kernels** out);

}  // namespace octavo
