// What the kernels share beside vectors: the division of work among tasks, memory, and the sizes of caches.
//
// Each source that includes this has a copy of its own; isa.h says why.
#pragma once

#include <cstdlib>

#include "isa.h"
#include "parallel.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

constexpr bool kIsAvx512 = vec::lanes == 16;

constexpr int64_t kCacheLine = 64;  // bytes
// A task that writes more than this streams it: it would leave the caches before it is read again, and a streamed store
// saves the read that a store to an uncached line begins with.
constexpr int64_t kStreamBytes = 8 << 20;
// The operands of a block of products: most of a second-level cache.
constexpr int64_t kMaxOperandBytes = (kIsAvx512 ? 640 : 320) << 10;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void *p, int64_t bytes = kCacheLine) {
    return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

struct Range {
    int64_t begin, end;
};
inline bool operator==(Range a, Range b) { return a.begin == b.begin && a.end == b.end; }

// A task's part of [0, count).
inline Range task_range(int64_t count, int task, int tasks) {
    return {count * task / tasks, count * (task + 1) / tasks};
}

// Calls body(task) for every task, at once.
template <class Body> inline void each_task(int tasks, Body &body) {
    run_tasks(tasks, [](void *data, int task) { (*static_cast<Body *>(data))(task); }, &body);
}

// A constant passed as an argument.
template <int n> struct Constant {
    static constexpr int value = n;
};

// The parts of a buffer of floats, each at the beginning of a cache line.
struct BufferLayout {
    int64_t size = 0;
    // Returns where the part begins.
    int64_t add(int64_t count) {
        constexpr int64_t line = kCacheLine / sizeof(float);
        const int64_t at = size;
        size += ceil_div(count, line) * line;
        return at;
    }
};

// Memory for a call, from the beginning of a cache line on. Null where there is none left.
struct Buffer {
    float *data;
    explicit Buffer(int64_t size) : data(static_cast<float *>(aligned_alloc(kCacheLine, size * sizeof(float)))) {}
    Buffer(const Buffer &) = delete;
    ~Buffer() { free(data); }
};

}  // namespace
}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
