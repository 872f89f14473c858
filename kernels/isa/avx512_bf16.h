// AVX512_BF16: the code of avx512f.h, with bf16's own instructions.
#pragma once

#include "avx512f.h"

namespace knltrain {
namespace KNLTRAIN_ISA {

// One instruction in the place of eight. It takes denormals, numbers below 1.2e-38, for zero.
static inline bf16_vec round_to_bf16(vec a) { return {(__m256i)_mm512_cvtneps_pbh(a.v)}; }

// Without the instruction that rounds.
template <class N> static inline void store_exact(bf16 *p, vec a, N n) {
    bf16 copy[vec::lanes];
    const __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(a.v), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(copy), _mm512_cvtepi32_epi16(upper));
    memcpy(p, copy, n * sizeof(bf16));
}

// Sixteen pairs of bf16, one of each pointer; zeros in the place of null.
static inline vec load_pairs(const bf16 *one, const bf16 *two) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                           6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(one));
    const __m256i high = two == nullptr ? _mm256_setzero_si256()
                                        : _mm256_loadu_si256(reinterpret_cast<const __m256i *>(two));
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both))};
}

// sum + a[0] * b[0] + a[1] * b[1] of each pair, in float32. b is one pair, in the bits of a float.
static inline vec dot_pairs(vec a, float b, vec sum) {
    const __m512bh pairs = (__m512bh)_mm512_castps_si512(a.v), pair = (__m512bh)_mm512_castps_si512(splat(b).v);
    return {_mm512_dpbf16_ps(sum.v, pairs, pair)};
}

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
