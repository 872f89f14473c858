// AVX2 and FMA: eight lanes. isa.h documents the interface.
#pragma once

#include "base.h"

namespace knltrain {
namespace KNLTRAIN_ISA {

struct vec {
    static constexpr int lanes = 8;
    __m256 v;
};
struct bf16_vec {
    __m128i v;
};
struct ivec {
    __m256i v;
};
struct dvec {
    __m256d low, high;
};
using lane_mask = __m256;

static inline vec splat(float x) { return {_mm256_set1_ps(x)}; }
static inline vec zero() { return {_mm256_setzero_ps()}; }
static inline vec load(const float *p) { return {_mm256_loadu_ps(p)}; }
static inline void store(float *p, vec a) { _mm256_storeu_ps(p, a.v); }
static inline void stream(float *p, vec a) { _mm256_stream_ps(p, a.v); }
static inline vec load(const float *p, int n) {
    float copy[vec::lanes] = {};
    memcpy(copy, p, n * sizeof(float));
    return load(copy);
}
static inline void store(float *p, vec a, int n) {
    float copy[vec::lanes];
    store(copy, a);
    memcpy(p, copy, n * sizeof(float));
}

static inline vec operator+(vec a, vec b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline vec operator-(vec a, vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline vec operator*(vec a, vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline vec fma(vec a, vec b, vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// Where an operand is NaN, max and min return the second.
static inline vec relu(vec a) { return {_mm256_max_ps(_mm256_setzero_ps(), a.v)}; }
static inline vec clamp_max(vec a, vec cap) { return {_mm256_min_ps(cap.v, a.v)}; }
static inline vec sqrt(vec a) { return {_mm256_sqrt_ps(a.v)}; }
static inline vec rsqrt(vec a) { return {_mm256_div_ps(_mm256_set1_ps(1), _mm256_sqrt_ps(a.v))}; }

static inline lane_mask eq(vec a, vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ); }
static inline lane_mask ge(vec a, vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ); }
static inline lane_mask not_le(vec a, vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ); }
static inline lane_mask not_ge(vec a, vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_NGE_UQ); }
static inline lane_mask gt_or_nan(vec a, vec b) {
    return _mm256_or_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ), _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
}
static inline vec select(lane_mask mask, vec yes, vec no) { return {_mm256_blendv_ps(no.v, yes.v, mask)}; }
static inline vec select_or_zero(lane_mask mask, vec yes) { return {_mm256_and_ps(mask, yes.v)}; }

static inline vec load(const bf16 *p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
static inline bf16_vec round_to_bf16(vec a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return {_mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1))};
}
static inline void store(bf16 *p, bf16_vec a) { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), a.v); }
static inline void stream(bf16 *p, bf16_vec a) { _mm_stream_si128(reinterpret_cast<__m128i *>(p), a.v); }

static inline vec load(const uint8_t *p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))};
}
static inline void store(uint8_t *p, vec a) {
    const __m256i wide = _mm256_cvtps_epi32(a.v);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packus_epi16(half, half));
}

static inline ivec splat_u32(uint32_t x) { return {_mm256_set1_epi32(int(x))}; }
static inline ivec lane_index() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
static inline ivec operator+(ivec a, ivec b) { return {_mm256_add_epi32(a.v, b.v)}; }
static inline ivec operator*(ivec a, ivec b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
static inline ivec operator^(ivec a, ivec b) { return {_mm256_xor_si256(a.v, b.v)}; }
template <int bits> static inline ivec shift_right(ivec a) { return {_mm256_srli_epi32(a.v, bits)}; }
static inline vec to_float(ivec a) { return {_mm256_cvtepi32_ps(a.v)}; }

static inline dvec zero_f64() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
static inline dvec widen(vec a) {
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1))};
}
static inline dvec fma(dvec a, dvec b, dvec c) {
    return {_mm256_fmadd_pd(a.low, b.low, c.low), _mm256_fmadd_pd(a.high, b.high, c.high)};
}
static inline double sum(dvec a) {
    double lane[4];
    _mm256_storeu_pd(lane, _mm256_add_pd(a.low, a.high));
    return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
