// The vectors that kernels are written in, one width per instruction set: a file of isa/ each, with one interface.
//
// Every kernel source is compiled once for each instruction set, with KNLTRAIN_ISA naming the variant. Whatever such a
// source defines lives in a namespace of that name or is static: the linker would merge an inline function that two
// variants share, and the AVX-512 copy could end up on a processor that has none. That is also why these sources use no
// templates of the standard library. Intrinsics are in isa/ alone.
//
//     vec                                  vec::lanes float32
//     lane_mask                            one bit, or all bits, a lane
//     ivec                                 as many uint32
//     dvec                                 as many float64
//     bf16_vec                             as many bf16
//
//     splat(x), zero()                     the same in all lanes
//     load(p), store(p, a)                 float, bf16, or uint8_t of whole numbers 0 to 255; no alignment needed
//     load(p, n), store(p, a, n)           the first n lanes; the others of a load are zero
//     stream(p, a)                         past the caches, aligned to a vector; store_fence() after the last
//     store_exact(p, a, n)                 of numbers that the type holds as they are: not rounded
//     round_to_bf16(a)                     to nearest, ties to even; NaN stays NaN
//     a + b, a - b, a * b, a += b
//     fma(a, b, c)                         a * b + c
//     relu(a), clamp_max(a, cap)           max(a, 0), min(a, cap); NaN stays NaN
//     sqrt(a), rsqrt(a)                    rsqrt: for a > 0, to the last digit or two; 0 for infinity
//     eq(a, b), ge(a, b)                   false where one is NaN
//     not_le(a, b), not_ge(a, b)           true where one is NaN
//     gt_or_nan(a, b)                      a > b, or a is NaN
//     select(mask, yes, no)                yes where the mask is set, else no
//     select_or_zero(mask, yes)
//
//     splat_u32(x), lane_index()           ivec: the same in all lanes; 0, 1, 2, …
//     a + b, a * b, a ^ b, shift_right<n>(a), to_float(a)
//
//     zero_f64(), widen(a), fma(a, b, c)   dvec
//     sum(a)                               of all lanes, in a fixed order
//
// avx512_bf16.h has load_pairs and dot_pairs beside these.
#pragma once

#if defined(__AVX512BF16__)
#include "isa/avx512_bf16.h"
#elif defined(__AVX512F__)
#include "isa/avx512f.h"
#else
#include "isa/avx2.h"
#endif

namespace knltrain {
namespace KNLTRAIN_ISA {

static inline void operator+=(vec &a, vec b) { a = a + b; }

static inline void store(bf16 *p, vec a) { store(p, round_to_bf16(a)); }
static inline void stream(bf16 *p, vec a) { stream(p, round_to_bf16(a)); }

static inline vec load(const bf16 *p, int n) {
    bf16 copy[vec::lanes] = {};
    memcpy(copy, p, n * sizeof(bf16));
    return load(copy);
}
static inline void store(bf16 *p, vec a, int n) {
    bf16 copy[vec::lanes];
    store(copy, a);
    memcpy(p, copy, n * sizeof(bf16));
}
static inline vec load(const uint8_t *p, int n) {
    uint8_t copy[16] = {};
    memcpy(copy, p, n);
    return load(copy);
}
static inline void store(uint8_t *p, vec a, int n) {
    uint8_t copy[vec::lanes];
    store(copy, a);
    memcpy(p, copy, n);
}

// The count of a whole vector, known when compiling: loads and stores need no test for their length.
struct whole {
    constexpr operator int() const { return vec::lanes; }
};
template <class T> static inline vec load(const T *p, whole) { return load(p); }
template <class T> static inline void store(T *p, vec a, whole) { store(p, a); }
template <class T, class N> static inline void store_exact(T *p, vec a, N n) { store(p, a, n); }

// Calls body(offset, count) for 0, lanes, 2 lanes, …; count is a `whole`, or an int for a shorter last vector.
template <class Body> static inline KNLTRAIN_INLINE void each_vector(int64_t n, Body &&body) {
    int64_t at = 0;
    for (; at + vec::lanes <= n; at += vec::lanes) body(at, whole{});
    if (at < n) body(at, int(n - at));
}

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
