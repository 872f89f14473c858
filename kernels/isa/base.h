// What every instruction set here has: bf16 as it lies in memory, prefetches, the store fence, and 128-bit vectors.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// For the innermost functions, where a call would cost more than the work; on a lambda, after its parameters.
#define KNLTRAIN_INLINE __attribute__((always_inline))

namespace knltrain {
namespace KNLTRAIN_ISA {

// The upper half of a float32.
struct bf16 {
    uint16_t bits;
};

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// One cache line into the first-level cache, into the second-level cache, or to be written. Any address will do.
static inline void prefetch_l1(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }
static inline void prefetch_l2(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T1); }
static inline void prefetch_write(const void *p) { __builtin_prefetch(p, 1); }

// Orders streamed stores before what other threads are told next.
static inline void store_fence() { _mm_sfence(); }

// Four float32.
struct vec4 {
    __m128 v;
};
static inline vec4 zero4() { return {_mm_setzero_ps()}; }
static inline vec4 splat4(float x) { return {_mm_set1_ps(x)}; }
static inline vec4 load4(const float *p) { return {_mm_loadu_ps(p)}; }
static inline void store(float *p, vec4 a) { _mm_storeu_ps(p, a.v); }
static inline vec4 fma(vec4 a, vec4 b, vec4 c) { return {_mm_fmadd_ps(a.v, b.v, c.v)}; }

// Sixteen pixels of three bytes in reverse order.
static inline void reverse_16_pixels(const uint8_t *from, uint8_t *to) {
    // They fill three vectors. By result vector (a, b, c) and source vector (0, 1, 2): which source byte goes to each
    // place, -1 where none does.
    const __m128i a2 = _mm_setr_epi8(13, 14, 15, 10, 11, 12, 7, 8, 9, 4, 5, 6, 1, 2, 3, -1);
    const __m128i a1 = _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 14);
    const __m128i b2 = _mm_setr_epi8(-1, 0, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i b1 = _mm_setr_epi8(15, -1, 11, 12, 13, 8, 9, 10, 5, 6, 7, 2, 3, 4, -1, 0);
    const __m128i b0 = _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 15, -1);
    const __m128i c1 = _mm_setr_epi8(1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i c0 = _mm_setr_epi8(-1, 12, 13, 14, 9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2);
    const __m128i *three = reinterpret_cast<const __m128i *>(from);
    const __m128i x0 = _mm_loadu_si128(three), x1 = _mm_loadu_si128(three + 1), x2 = _mm_loadu_si128(three + 2);
    const __m128i a = _mm_or_si128(_mm_shuffle_epi8(x2, a2), _mm_shuffle_epi8(x1, a1));
    const __m128i b = _mm_or_si128(_mm_shuffle_epi8(x2, b2), _mm_shuffle_epi8(x1, b1));
    const __m128i c = _mm_or_si128(_mm_shuffle_epi8(x1, c1), _mm_shuffle_epi8(x0, c0));
    __m128i *reversed = reinterpret_cast<__m128i *>(to);
    _mm_storeu_si128(reversed, a);
    _mm_storeu_si128(reversed + 1, _mm_or_si128(b, _mm_shuffle_epi8(x0, b0)));
    _mm_storeu_si128(reversed + 2, c);
}

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
