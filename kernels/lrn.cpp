// Local response normalisation in one pass over the rows, forward and backward.
//
// A few rows at a time are squared into a buffer with zeros on both sides of each. The windows are summed from it while
// it is in the first-level cache.
#include "common.h"
#include "kernels.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

// Several rows of float32, each between two borders of half a window.
struct Rows {
    float *first;
    int64_t length, half;
    float *row(int64_t index) const { return first + index * length + half; }
};

// The i-th of a task's three buffers; zero all over.
Rows rows_of(const ResponseNorm &p, int task, int i) {
    const int64_t length = p.channels + p.size;
    return {p.scratch + (task * 3 + i) * kResponseNormRows * length, length, p.size / 2};
}

// The sum of the window around each channel.
template <class Width> inline vec window(const float *channel, int64_t size, Width width) {
    vec sum = load(channel - size / 2, width);
    for (int64_t i = 1; i < size; ++i) sum += load(channel - size / 2 + i, width);
    return sum;
}

// Calls body(offset, index, channel, count) for the vectors of a block of rows; index is the row's in the buffers.
template <class Body> inline void each_row_vector(const ResponseNorm &p, int64_t begin, int64_t end, Body &&body) {
    for (int64_t row = begin; row < end; ++row)
        each_vector(p.channels, [&](int64_t ch, auto count) { body(row * p.channels + ch, row - begin, ch, count); });
}

// Calls body(begin, end) for the blocks of a task's rows.
template <class Body> inline void each_block(const ResponseNorm &p, int task, Body &&body) {
    const Range rows = task_range(p.rows, task, p.tasks);
    for (int64_t begin = rows.begin; begin < rows.end; begin += kResponseNormRows)
        body(begin, min(begin + kResponseNormRows, rows.end));
}

template <class T> void forward(const ResponseNorm &p) {
    const T *x = static_cast<const T *>(p.x);
    T *y = static_cast<T *>(p.y);
    const vec strength = splat(p.alpha / float(p.size)), one = splat(1);
    auto work = [&](int task) {
        const Rows squares = rows_of(p, task, 0);
        each_block(p, task, [&](int64_t begin, int64_t end) {
            each_row_vector(p, begin, end, [&](int64_t at, int64_t index, int64_t ch, auto count) {
                const vec value = load(x + at, count);
                store(squares.row(index) + ch, value * value, count);
            });
            each_row_vector(p, begin, end, [&](int64_t at, int64_t index, int64_t ch, auto count) {
                const vec denominator = fma(window(squares.row(index) + ch, p.size, count), strength, one);
                const vec inverse_root = rsqrt(denominator);
                store(y + at, load(x + at, count) * (inverse_root * sqrt(inverse_root)), count);
            });
        });
    };
    each_task(p.tasks, work);
}

// dx = dy d^-3/4 - 2 * 3/4 * alpha / size * x * window(dy x d^-3/4 / d), with d the denominator.
template <class T> void backward(const ResponseNorm &p) {
    const T *x = static_cast<const T *>(p.x), *dy = static_cast<const T *>(p.dy);
    T *dx = static_cast<T *>(p.dx);
    const vec strength = splat(p.alpha / float(p.size)), one = splat(1);
    const vec minus_slope = splat(-1.5f * p.alpha / float(p.size));
    auto work = [&](int task) {
        const Rows squares = rows_of(p, task, 0), ratios = rows_of(p, task, 1), scaled = rows_of(p, task, 2);
        each_block(p, task, [&](int64_t begin, int64_t end) {
            each_row_vector(p, begin, end, [&](int64_t at, int64_t index, int64_t ch, auto count) {
                const vec value = load(x + at, count);
                store(squares.row(index) + ch, value * value, count);
            });
            each_row_vector(p, begin, end, [&](int64_t at, int64_t index, int64_t ch, auto count) {
                const vec denominator = fma(window(squares.row(index) + ch, p.size, count), strength, one);
                const vec inverse_root = rsqrt(denominator);
                const vec gradient = load(dy + at, count) * (inverse_root * sqrt(inverse_root));
                store(scaled.row(index) + ch, gradient, count);
                store(ratios.row(index) + ch, gradient * load(x + at, count) * (inverse_root * inverse_root), count);
            });
            each_row_vector(p, begin, end, [&](int64_t at, int64_t index, int64_t ch, auto count) {
                const vec others = window(ratios.row(index) + ch, p.size, count) * load(x + at, count);
                store(dx + at, fma(others, minus_slope, load(scaled.row(index) + ch, count)), count);
            });
        });
    };
    each_task(p.tasks, work);
}

}  // namespace

void local_response_norm_forward(const ResponseNorm &p) { p.is_bf16 ? forward<bf16>(p) : forward<float>(p); }
void local_response_norm_backward(const ResponseNorm &p) { p.is_bf16 ? backward<bf16>(p) : backward<float>(p); }

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
