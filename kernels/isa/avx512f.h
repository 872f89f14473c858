// AVX512F alone, as Xeon Phi has it: sixteen lanes. isa.h documents the interface.
//
// The variant avx512 is this code too: its BW, DQ and VL are for the compiler, which has more registers and
// instructions for it then.
#pragma once

#include "base.h"

namespace knltrain {
namespace KNLTRAIN_ISA {

struct vec {
    static constexpr int lanes = 16;
    __m512 v;
};
struct bf16_vec {
    __m256i v;
};
struct ivec {
    __m512i v;
};
struct dvec {
    __m512d low, high;
};
using lane_mask = __mmask16;

static inline vec splat(float x) { return {_mm512_set1_ps(x)}; }
static inline vec zero() { return {_mm512_setzero_ps()}; }
static inline vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float *p, vec a) { _mm512_storeu_ps(p, a.v); }
static inline void stream(float *p, vec a) { _mm512_stream_ps(p, a.v); }
static inline vec load(const float *p, int n) { return {_mm512_maskz_loadu_ps((1u << n) - 1, p)}; }
static inline void store(float *p, vec a, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, a.v); }

static inline vec operator+(vec a, vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline vec operator-(vec a, vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline vec operator*(vec a, vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline vec fma(vec a, vec b, vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// Where an operand is NaN, max and min return the second.
static inline vec relu(vec a) { return {_mm512_max_ps(_mm512_setzero_ps(), a.v)}; }
static inline vec clamp_max(vec a, vec cap) { return {_mm512_min_ps(cap.v, a.v)}; }
static inline vec sqrt(vec a) { return {_mm512_sqrt_ps(a.v)}; }
static inline vec rsqrt(vec a) {
    const __m512 guess = _mm512_rsqrt14_ps(a.v);
    // One Newton iteration, but not at infinity, where it would be NaN.
    const __m512 error = _mm512_fnmadd_ps(_mm512_mul_ps(a.v, guess), guess, _mm512_set1_ps(1));
    const __mmask16 finite = _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(__builtin_inff()), _CMP_NEQ_UQ);
    return {_mm512_mask_fmadd_ps(guess, finite, _mm512_mul_ps(error, _mm512_set1_ps(0.5f)), guess)};
}

static inline lane_mask eq(vec a, vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
static inline lane_mask ge(vec a, vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
static inline lane_mask not_le(vec a, vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ); }
static inline lane_mask not_ge(vec a, vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NGE_UQ); }
static inline lane_mask gt_or_nan(vec a, vec b) {
    return _mm512_kor(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q));
}
static inline vec select(lane_mask mask, vec yes, vec no) { return {_mm512_mask_mov_ps(no.v, mask, yes.v)}; }
static inline vec select_or_zero(lane_mask mask, vec yes) { return {_mm512_maskz_mov_ps(mask, yes.v)}; }

static inline vec load(const bf16 *p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
#if !defined(__AVX512BF16__)  // avx512_bf16.h has an instruction for it
static inline bf16_vec round_to_bf16(vec a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return {_mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16))};
}
#endif
static inline void store(bf16 *p, bf16_vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a.v); }
static inline void stream(bf16 *p, bf16_vec a) { _mm256_stream_si256(reinterpret_cast<__m256i *>(p), a.v); }

static inline vec load(const uint8_t *p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
}
static inline void store(uint8_t *p, vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

static inline ivec splat_u32(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
static inline ivec lane_index() { return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
static inline ivec operator+(ivec a, ivec b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline ivec operator*(ivec a, ivec b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
static inline ivec operator^(ivec a, ivec b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int bits> static inline ivec shift_right(ivec a) { return {_mm512_srli_epi32(a.v, bits)}; }
static inline vec to_float(ivec a) { return {_mm512_cvtepi32_ps(a.v)}; }

static inline dvec zero_f64() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
static inline dvec widen(vec a) {
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)),
            _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)))};
}
static inline dvec fma(dvec a, dvec b, dvec c) {
    return {_mm512_fmadd_pd(a.low, b.low, c.low), _mm512_fmadd_pd(a.high, b.high, c.high)};
}
static inline double sum(dvec a) { return _mm512_reduce_add_pd(_mm512_add_pd(a.low, a.high)); }

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
