// Dropout whose mask is a function of key and position: the backward pass computes it again, and no number depends on
// how the work is divided.
#include "isa.h"
#include "kernels.h"
#include "parallel.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

#if defined(__AVX512F__)
using ivec = __m512i;
inline ivec splat_bits(uint32_t x) { return _mm512_set1_epi32(int(x)); }
inline ivec add(ivec a, ivec b) { return _mm512_add_epi32(a, b); }
inline ivec multiply(ivec a, ivec b) { return _mm512_mullo_epi32(a, b); }
inline ivec exclusive_or(ivec a, ivec b) { return _mm512_xor_si512(a, b); }
template <int kBits> inline ivec right(ivec a) { return _mm512_srli_epi32(a, kBits); }
inline vec to_float(ivec a) { return {_mm512_cvtepi32_ps(a)}; }
inline ivec lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
#else
using ivec = __m256i;
inline ivec splat_bits(uint32_t x) { return _mm256_set1_epi32(int(x)); }
inline ivec add(ivec a, ivec b) { return _mm256_add_epi32(a, b); }
inline ivec multiply(ivec a, ivec b) { return _mm256_mullo_epi32(a, b); }
inline ivec exclusive_or(ivec a, ivec b) { return _mm256_xor_si256(a, b); }
template <int kBits> inline ivec right(ivec a) { return _mm256_srli_epi32(a, kBits); }
inline vec to_float(ivec a) { return {_mm256_cvtepi32_ps(a)}; }
inline ivec lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
#endif

// Every bit of the result depends on every bit of x: the constants are those of MurmurHash3's last step.
inline ivec mix(ivec x) {
    x = multiply(exclusive_or(x, right<16>(x)), splat_bits(0x85ebca6b));
    x = multiply(exclusive_or(x, right<13>(x)), splat_bits(0xc2b2ae35));
    return exclusive_or(x, right<16>(x));
}

// Which of the numbers from `index` on are kept: those whose 24 random bits are not below the threshold.
inline lane_mask kept(const Dropout &p, int64_t index) {
    const ivec position = add(splat_bits(uint32_t(index)), lane_numbers());
    const ivec once = mix(exclusive_or(position, splat_bits(p.key[0])));
    const ivec twice = mix(add(once, splat_bits(p.key[1])));
    return not_below(to_float(right<8>(twice)), splat(p.threshold));
}

template <class T> void forward(const Dropout &p) {
    const T *x = static_cast<const T *>(p.x);
    T *y = static_cast<T *>(p.y);
    const vec scale = splat(p.scale);
    auto part = [&](int task) {
        const int64_t begin = p.count * task / p.tasks;
        each_vector(p.count * (task + 1) / p.tasks - begin, [&](int64_t at, auto width) {
            vec value = load_first(x + begin + at, width);
            if (p.relu) value = relu(value);
            store_first(y + begin + at, select(kept(p, begin + at), value * scale, zero()), width);
        });
    };
    each_task(p.tasks, part);
}

template <class T> void backward(const Dropout &p) {
    const T *y = static_cast<const T *>(p.y), *dy = static_cast<const T *>(p.dy);
    T *dx = static_cast<T *>(p.dx);
    const vec scale = splat(p.scale);
    auto part = [&](int task) {
        const int64_t begin = p.count * task / p.tasks;
        each_vector(p.count * (task + 1) / p.tasks - begin, [&](int64_t at, auto width) {
            const vec gradient = load_first(dy + begin + at, width) * scale;
            // With ReLU, what is positive is what has been kept.
            const vec passed = p.relu ? where_positive(load_first(y + begin + at, width), gradient)
                                      : select(kept(p, begin + at), gradient, zero());
            store_first(dx + begin + at, passed, width);
        });
    };
    each_task(p.tasks, part);
}

}  // namespace

void dropout_forward(const Dropout &p) { p.is_bf16 ? forward<bf16>(p) : forward<float>(p); }
void dropout_backward(const Dropout &p) { p.is_bf16 ? backward<bf16>(p) : backward<float>(p); }

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
