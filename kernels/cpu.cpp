#include "cpu.h"

#include <cpuid.h>

#include <cstdint>

namespace knltrain {
namespace {

bool bit(uint32_t word, int index) { return (word >> index) & 1; }

// XCR0, the register states that the operating system saves. In inline assembly, as _xgetbv needs a compiler flag.
uint64_t saved_states() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t(high) << 32) | low;
}

}  // namespace

CpuFeatures cpu_features() {
    CpuFeatures features{};
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return features;  // no OSXSAVE
    const bool fma = bit(c, 12);
    const uint64_t states = saved_states();
    const bool ymm = (states & 0x06) == 0x06, zmm = (states & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
    features.avx2 = ymm && fma && bit(b, 5);
    features.avx512f = features.avx2 && zmm && bit(b, 16);
    features.avx512 = features.avx512f && bit(b, 17) && bit(b, 28) && bit(b, 30) && bit(b, 31);
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) features.avx512_bf16 = features.avx512 && bit(a, 5);
    return features;
}

}  // namespace knltrain
