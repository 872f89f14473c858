// Local response normalisation in one pass over the rows, forward and backward. A few rows at a time are squared into a
// buffer with zeros on both sides of each, from which the windows are summed while it is in the first cache.
#include "isa.h"
#include "kernels.h"
#include "parallel.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

// Several rows of float32, each with room for half a window before and after it.
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
    vec sum = load_first(channel - size / 2, width);
    for (int64_t i = 1; i < size; ++i) sum += load_first(channel - size / 2 + i, width);
    return sum;
}

// Calls body(row, index, channel, count) for the vectors of a block of rows; index is the row's place in the buffers.
template <class Body> inline void each_of(const ResponseNorm &p, int64_t begin, int64_t end, Body &&body) {
    for (int64_t row = begin; row < end; ++row)
        each_vector(p.channels, [&](int64_t ch, auto count) { body(row * p.channels + ch, row - begin, ch, count); });
}

// Calls body(begin, end) for the blocks of a task's rows.
template <class Body> inline void each_block(const ResponseNorm &p, int task, Body &&body) {
    const int64_t last = p.rows * (task + 1) / p.tasks;
    for (int64_t begin = p.rows * task / p.tasks; begin < last; begin += kResponseNormRows)
        body(begin, begin + kResponseNormRows < last ? begin + kResponseNormRows : last);
}

template <class T> void forward(const ResponseNorm &p) {
    const T *x = static_cast<const T *>(p.x);
    T *y = static_cast<T *>(p.y);
    const vec strength = splat(p.alpha / float(p.size)), one = splat(1);
    auto part = [&](int task) {
        const Rows squares = rows_of(p, task, 0);
        each_block(p, task, [&](int64_t begin, int64_t end) {
            each_of(p, begin, end, [&](int64_t at, int64_t index, int64_t ch, auto count) {
                const vec value = load_first(x + at, count);
                store_first(squares.row(index) + ch, value * value, count);
            });
            each_of(p, begin, end, [&](int64_t at, int64_t index, int64_t ch, auto count) {
                const vec denominator = fma(window(squares.row(index) + ch, p.size, count), strength, one);
                const vec root = inverse_square_root(denominator);
                store_first(y + at, load_first(x + at, count) * (root * square_root(root)), count);
            });
        });
    };
    each_task(p.tasks, part);
}

// With d the denominator: dx = dy d^-3/4 - 2 * 3/4 * alpha / size * x * window(dy x d^-3/4 / d).
template <class T> void backward(const ResponseNorm &p) {
    const T *x = static_cast<const T *>(p.x), *dy = static_cast<const T *>(p.dy);
    T *dx = static_cast<T *>(p.dx);
    const vec strength = splat(p.alpha / float(p.size)), one = splat(1);
    const vec minus_slope = splat(-1.5f * p.alpha / float(p.size));
    auto part = [&](int task) {
        const Rows squares = rows_of(p, task, 0), shares = rows_of(p, task, 1), scaled = rows_of(p, task, 2);
        each_block(p, task, [&](int64_t begin, int64_t end) {
            each_of(p, begin, end, [&](int64_t at, int64_t index, int64_t ch, auto count) {
                const vec value = load_first(x + at, count);
                store_first(squares.row(index) + ch, value * value, count);
            });
            each_of(p, begin, end, [&](int64_t at, int64_t index, int64_t ch, auto count) {
                const vec denominator = fma(window(squares.row(index) + ch, p.size, count), strength, one);
                const vec root = inverse_square_root(denominator);
                const vec gradient = load_first(dy + at, count) * (root * square_root(root));
                store_first(scaled.row(index) + ch, gradient, count);
                store_first(shares.row(index) + ch, gradient * load_first(x + at, count) * (root * root), count);
            });
            each_of(p, begin, end, [&](int64_t at, int64_t index, int64_t ch, auto count) {
                const vec others = window(shares.row(index) + ch, p.size, count) * load_first(x + at, count);
                store_first(dx + at, fma(others, minus_slope, load_first(scaled.row(index) + ch, count)), count);
            });
        });
    };
    each_task(p.tasks, part);
}

}  // namespace

void local_response_norm_forward(const ResponseNorm &p) { p.is_bf16 ? forward<bf16>(p) : forward<float>(p); }
void local_response_norm_backward(const ResponseNorm &p) { p.is_bf16 ? backward<bf16>(p) : backward<float>(p); }

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
