// What a kernel is written in: vectors of float32, one width per instruction set.
//
// Every kernel source is compiled once for each instruction set, with KNLTRAIN_ISA naming the variant. Whatever such a
// source defines lives in a namespace of that name or is static: an inline function that two variants shared would be
// merged by the linker, and the AVX-512 copy could end up on a processor that has none. That is also why these sources
// use no templates of the standard library.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "parallel.h"

#define KNLTRAIN_CONCAT_(a, b) a##b
#define KNLTRAIN_CONCAT(a, b) KNLTRAIN_CONCAT_(a, b)

// For the innermost parts, which a call would cost more than they do; on a lambda, after its parameters.
#define KNLTRAIN_INLINE __attribute__((always_inline))

namespace knltrain {
namespace KNLTRAIN_ISA {

// The upper half of a float32.
struct bf16 {
    uint16_t bits;
};

#if defined(__AVX512F__)

// Sixteen lanes. AVX512F only where nothing more is said: Xeon Phi has no BW, DQ or VL.
struct vec {
    static constexpr int lanes = 16;
    __m512 v;
};
using lane_mask = __mmask16;

static inline vec splat(float x) { return {_mm512_set1_ps(x)}; }
static inline vec zero() { return {_mm512_setzero_ps()}; }
static inline vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float *p, vec a) { _mm512_storeu_ps(p, a.v); }
static inline void stream(float *p, vec a) { _mm512_stream_ps(p, a.v); }
static inline vec operator+(vec a, vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline vec operator-(vec a, vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline vec operator*(vec a, vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
// a * b + c
static inline vec fma(vec a, vec b, vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// max(a, 0) that keeps NaN: where an operand is NaN the instruction returns the second.
static inline vec relu(vec a) { return {_mm512_max_ps(_mm512_setzero_ps(), a.v)}; }
// a where not (y <= 0), else 0: a NaN in y lets a through, as torch's threshold_backward does.
static inline vec where_positive(vec y, vec a) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y.v, _mm512_setzero_ps(), _CMP_NLE_UQ), a.v)};
}
// min(a, cap) that keeps NaN.
static inline vec at_most(vec cap, vec a) { return {_mm512_min_ps(cap.v, a.v)}; }
// a where not (y >= cap), else 0: a NaN in y lets a through, as above.
static inline vec where_below(vec y, vec cap, vec a) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y.v, cap.v, _CMP_NGE_UQ), a.v)};
}
static inline vec square_root(vec a) { return {_mm512_sqrt_ps(a.v)}; }
// 1 / sqrt(a) for a > 0, to the last digit or two; 0 for infinity.
static inline vec inverse_square_root(vec a) {
    const __m512 guess = _mm512_rsqrt14_ps(a.v);
    // A step of Newton's, but not at infinity, where it would be NaN.
    const __m512 error = _mm512_fnmadd_ps(_mm512_mul_ps(a.v, guess), guess, _mm512_set1_ps(1));
    const __mmask16 finite = _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(__builtin_inff()), _CMP_NEQ_UQ);
    return {_mm512_mask_fmadd_ps(guess, finite, _mm512_mul_ps(error, _mm512_set1_ps(0.5f)), guess)};
}
static inline lane_mask equal(vec a, vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
static inline lane_mask not_below(vec a, vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
// Where a > b, or a is NaN.
static inline lane_mask beats(vec a, vec b) {
    return _mm512_kor(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q));
}
static inline vec select(lane_mask mask, vec yes, vec no) { return {_mm512_mask_mov_ps(no.v, mask, yes.v)}; }

static inline vec load(const bf16 *p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
// To nearest, ties to even; NaN stays NaN.
static inline __m256i round_to_bf16(vec a) {
#if defined(__AVX512BF16__)
    // One instruction in the place of eight. It takes denormals, numbers below 1.2e-38, for zero.
    return (__m256i)_mm512_cvtneps_pbh(a.v);
#endif
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
static inline void store(bf16 *p, vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), round_to_bf16(a));
}
static inline void stream(bf16 *p, vec a) {
    _mm256_stream_si256(reinterpret_cast<__m256i *>(p), round_to_bf16(a));
}
// Eight bytes or more of pixels as numbers 0 to 255.
static inline vec load(const uint8_t *p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
}
// Whole numbers 0 to 255 as bytes.
static inline void store(uint8_t *p, vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

static inline vec load_first(const float *p, int n) { return {_mm512_maskz_loadu_ps((1u << n) - 1, p)}; }
static inline void store_first(float *p, vec a, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, a.v); }
// The sum of all lanes in float64, in a fixed order.
static inline double sum(vec a) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
    const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}

#else

// Eight lanes: AVX2 and FMA.
struct vec {
    static constexpr int lanes = 8;
    __m256 v;
};
using lane_mask = __m256;

static inline vec splat(float x) { return {_mm256_set1_ps(x)}; }
static inline vec zero() { return {_mm256_setzero_ps()}; }
static inline vec load(const float *p) { return {_mm256_loadu_ps(p)}; }
static inline void store(float *p, vec a) { _mm256_storeu_ps(p, a.v); }
static inline void stream(float *p, vec a) { _mm256_stream_ps(p, a.v); }
static inline vec operator+(vec a, vec b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline vec operator-(vec a, vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline vec operator*(vec a, vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline vec fma(vec a, vec b, vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline vec relu(vec a) { return {_mm256_max_ps(_mm256_setzero_ps(), a.v)}; }
static inline vec where_positive(vec y, vec a) {
    return {_mm256_and_ps(_mm256_cmp_ps(y.v, _mm256_setzero_ps(), _CMP_NLE_UQ), a.v)};
}
static inline vec at_most(vec cap, vec a) { return {_mm256_min_ps(cap.v, a.v)}; }
static inline vec where_below(vec y, vec cap, vec a) {
    return {_mm256_and_ps(_mm256_cmp_ps(y.v, cap.v, _CMP_NGE_UQ), a.v)};
}
static inline vec square_root(vec a) { return {_mm256_sqrt_ps(a.v)}; }
static inline vec inverse_square_root(vec a) { return {_mm256_div_ps(_mm256_set1_ps(1), _mm256_sqrt_ps(a.v))}; }
static inline lane_mask equal(vec a, vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ); }
static inline lane_mask not_below(vec a, vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ); }
static inline lane_mask beats(vec a, vec b) {
    return _mm256_or_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ), _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
}
static inline vec select(lane_mask mask, vec yes, vec no) { return {_mm256_blendv_ps(no.v, yes.v, mask)}; }

static inline vec load(const bf16 *p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
static inline __m128i round_to_bf16(vec a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}
static inline void store(bf16 *p, vec a) { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), round_to_bf16(a)); }
static inline void stream(bf16 *p, vec a) { _mm_stream_si128(reinterpret_cast<__m128i *>(p), round_to_bf16(a)); }
static inline vec load(const uint8_t *p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))};
}
static inline void store(uint8_t *p, vec a) {
    const __m256i wide = _mm256_cvtps_epi32(a.v);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packus_epi16(half, half));
}

static inline vec load_first(const float *p, int n) {
    float copy[vec::lanes] = {};
    memcpy(copy, p, n * sizeof(float));
    return load(copy);
}
static inline void store_first(float *p, vec a, int n) {
    float copy[vec::lanes];
    store(copy, a);
    memcpy(p, copy, n * sizeof(float));
}
static inline double sum(vec a) {
    const __m256d halves = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)),
                                         _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)));
    double lane[4];
    _mm256_storeu_pd(lane, halves);
    return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}

#endif

static inline void operator+=(vec &a, vec b) { a = a + b; }

// The first n of vec::lanes numbers; the others are zero.
static inline vec load_first(const bf16 *p, int n) {
    bf16 copy[vec::lanes] = {};
    memcpy(copy, p, n * sizeof(bf16));
    return load(copy);
}
static inline vec load_first(const uint8_t *p, int n) {
    uint8_t copy[16] = {};
    memcpy(copy, p, n);
    return load(copy);
}
static inline void store_first(bf16 *p, vec a, int n) {
    bf16 copy[vec::lanes];
    store(copy, a);
    memcpy(p, copy, n * sizeof(bf16));
}
static inline void store_first(uint8_t *p, vec a, int n) {
    uint8_t copy[vec::lanes];
    store(copy, a);
    memcpy(p, copy, n);
}

// Numbers that bf16 holds as they are: written without the instruction that rounds, and takes denormals for zero.
template <class T, class N> static inline void store_exact(T *p, vec a, N n) { store_first(p, a, n); }
#if defined(__AVX512BF16__)
template <class N> static inline void store_exact(bf16 *p, vec a, N n) {
    bf16 copy[vec::lanes];
    const __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(a.v), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(copy), _mm512_cvtepi32_epi16(upper));
    memcpy(p, copy, n * sizeof(bf16));
}
#endif

// One rounding for single numbers, the same as the vectors'.
static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Calls body(offset, count) for 0, lanes, 2 lanes, …; count is the constant vec::lanes but for a shorter last one.
// body takes `count` as a type, so that whole vectors are compiled without a test for their length.
struct whole {
    constexpr operator int() const { return vec::lanes; }
};
template <class Body> static inline KNLTRAIN_INLINE void each_vector(int64_t n, Body &&body) {
    int64_t at = 0;
    for (; at + vec::lanes <= n; at += vec::lanes) body(at, whole{});
    if (at < n) body(at, int(n - at));
}
template <class T> static inline vec load_first(const T *p, whole) { return load(p); }
template <class T> static inline void store_first(T *p, vec a, whole) { store(p, a); }

// body(task) for every task, at once.
template <class Body> static inline void each_task(int tasks, Body &body) {
    run_tasks(tasks, [](void *data, int task) { (*static_cast<Body *>(data))(task); }, &body);
}

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
