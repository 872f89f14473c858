// Dropout whose mask is a function of key and position: the backward pass computes it again, and results do not depend
// on how the work is divided.
#include "common.h"
#include "kernels.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

// The finalizer of MurmurHash3: every bit of the result depends on every bit of x.
inline ivec mix(ivec x) {
    x = (x ^ shift_right<16>(x)) * splat_u32(0x85ebca6b);
    x = (x ^ shift_right<13>(x)) * splat_u32(0xc2b2ae35);
    return x ^ shift_right<16>(x);
}

// Which elements from `index` on are kept: those whose 24 random bits are not below the threshold.
inline lane_mask kept(const Dropout &p, int64_t index) {
    const ivec position = splat_u32(uint32_t(index)) + lane_index();
    const ivec once = mix(position ^ splat_u32(p.key[0]));
    const ivec twice = mix(once + splat_u32(p.key[1]));
    return ge(to_float(shift_right<8>(twice)), splat(p.threshold));
}

template <class T> void forward(const Dropout &p) {
    const T *x = static_cast<const T *>(p.x);
    T *y = static_cast<T *>(p.y);
    const vec scale = splat(p.scale);
    auto work = [&](int task) {
        const Range mine = task_range(p.count, task, p.tasks);
        each_vector(mine.end - mine.begin, [&](int64_t offset, auto n) {
            const int64_t at = mine.begin + offset;
            vec value = load(x + at, n);
            if (p.relu) value = relu(value);
            store(y + at, select_or_zero(kept(p, at), value * scale), n);
        });
    };
    each_task(p.tasks, work);
}

template <class T> void backward(const Dropout &p) {
    const T *y = static_cast<const T *>(p.y), *dy = static_cast<const T *>(p.dy);
    T *dx = static_cast<T *>(p.dx);
    const vec scale = splat(p.scale);
    auto work = [&](int task) {
        const Range mine = task_range(p.count, task, p.tasks);
        each_vector(mine.end - mine.begin, [&](int64_t offset, auto n) {
            const int64_t at = mine.begin + offset;
            const vec gradient = load(dy + at, n) * scale;
            // After a ReLU, the positive elements of y are those that were kept.
            const lane_mask passed = p.relu ? not_le(load(y + at, n), zero()) : kept(p, at);
            store(dx + at, select_or_zero(passed, gradient), n);
        });
    };
    each_task(p.tasks, work);
}

}  // namespace

void dropout_forward(const Dropout &p) { p.is_bf16 ? forward<bf16>(p) : forward<float>(p); }
void dropout_backward(const Dropout &p) { p.is_bf16 ? backward<bf16>(p) : backward<float>(p); }

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
