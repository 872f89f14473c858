// The instruction sets that this processor and its operating system support.
#pragma once

namespace knltrain {

struct CpuFeatures {
    bool avx2;         // with FMA
    bool avx512f;      // Xeon Phi has no more
    bool avx512;       // F, CD, BW, DQ, VL
    bool avx512_bf16;  // those and BF16
};

CpuFeatures cpu_features();

}  // namespace knltrain
