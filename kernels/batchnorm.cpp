// Batch norm + residual + ReLU in two passes over the rows, forward and backward.
//
// The first pass sums, the second transforms. Each task has a contiguous part of the rows, and the second pass goes
// over it from the end: what the first pass read last is still in the caches. Sums are float32 over a block of rows and
// float64 over blocks. They are of values shifted by the channel's first one, so that a mean much larger than the
// deviation costs no digits.
#include <math.h>

#include "common.h"
#include "kernels.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

constexpr int64_t kBlockRows = 128;           // summed in float32
constexpr int64_t kBlockChannels = 4096;      // whose sums a task has on its stack
// Where rows are short, several share a load and a store of their sums. Several long rows are too many streams for the
// processor to prefetch.
constexpr int kRowsTogether = 4;
constexpr int64_t kMaxShortRow = 128;         // channels
constexpr int64_t kPrefetchDistance = 1536;   // bytes; the processor's own prefetching does not keep up with two passes

// The parts of a BatchNorm's scratch memory.
struct Scratch {
    double *first, *second;  // sums, tasks x channels
    float *a, *b, *c;        // coefficients, channels
    explicit Scratch(const BatchNorm &p)
        : first(p.scratch),
          second(first + p.tasks * p.channels),
          a(reinterpret_cast<float *>(second + p.tasks * p.channels)),
          b(a + p.channels),
          c(b + p.channels) {}
};

inline void prefetch_ahead(const void *p) { prefetch_l1(static_cast<const char *>(p) + kPrefetchDistance); }

// Adds the float32 sums of a block of rows to the float64 ones, and clears them.
void flush(float *block, double *total, int64_t channels) {
    for (int64_t ch = 0; ch < channels; ++ch) {
        total[ch] += block[ch];
        block[ch] = 0;
    }
}

// Two sums a channel over a task's rows: body(offset, channel, count, first, second) adds to them.
template <class Body> inline void sum_rows(const BatchNorm &p, int task, Body body) {
    const Scratch s(p);
    const int64_t channels = p.channels;
    double *first = s.first + task * channels, *second = s.second + task * channels;
    // On the task's own stack, where no other task's sums share a cache line.
    float stack_first[kBlockChannels] = {}, stack_second[kBlockChannels] = {};
    float *block_first = stack_first, *block_second = stack_second;
    const Range rows = task_range(p.rows, task, p.tasks);
    for (int64_t from = 0; from < channels; from += kBlockChannels) {
        const int64_t width = min(channels - from, kBlockChannels);
        for (int64_t ch = from; ch < from + width; ++ch) first[ch] = second[ch] = 0;
        for (int64_t begin = rows.begin; begin < rows.end; begin += kBlockRows) {
            const int64_t end = min(begin + kBlockRows, rows.end);
            auto add_rows = [=](int64_t row, auto together) KNLTRAIN_INLINE {
                each_vector(width, [=](int64_t ch, auto count) KNLTRAIN_INLINE {
                    vec one = load(block_first + ch, count), two = load(block_second + ch, count);
                    for (int r = 0; r < decltype(together)::value; ++r)
                        body((row + r) * channels + from + ch, from + ch, count, one, two);
                    store(block_first + ch, one, count);
                    store(block_second + ch, two, count);
                });
            };
            int64_t row = begin;
            for (; channels <= kMaxShortRow && row + kRowsTogether <= end; row += kRowsTogether)
                add_rows(row, Constant<kRowsTogether>{});
            for (; row < end; ++row) add_rows(row, Constant<1>{});
            flush(block_first, first + from, width);
            flush(block_second, second + from, width);
        }
    }
}

double total(const double *sums, int64_t channel, const BatchNorm &p) {
    double value = 0;
    for (int task = 0; task < p.tasks; ++task) value += sums[task * p.channels + channel];
    return value;
}

// Whether tasks stream what they write to `target` past the caches.
template <class T> bool is_streamed(const BatchNorm &p, const T *target) {
    const bool aligned = p.channels % vec::lanes == 0 && is_aligned(target);
    return aligned && p.rows / p.tasks * p.channels * int64_t(sizeof(T)) > kStreamBytes;
}

// The count of a whole vector that is to be streamed.
struct whole_streamed : whole {};
template <class T> inline void put(T *p, vec a, int n) { store(p, a, n); }
template <class T> inline void put(T *p, vec a, whole) { store(p, a); }
template <class T> inline void put(T *p, vec a, whole_streamed) { stream(p, a); }
template <class T> inline void put(T *p, vec a, int n, bool) { store(p, a, n); }
template <class T> inline void put(T *p, vec a, whole, bool streamed) { streamed ? stream(p, a) : store(p, a); }

// Calls body(offset, channel, count) for every vector of a task's rows, the last block of rows first. Where the result
// is streamed, the caches hold nothing of the first pass, and rows are taken in order.
template <class T, class Body> inline void transform_rows(const BatchNorm &p, int task, const T *target, Body body) {
    const Range rows = task_range(p.rows, task, p.tasks);
    const int64_t channels = p.channels;
    if (is_streamed(p, target)) {
        for (int64_t row = rows.begin; row < rows.end; ++row)
            for (int64_t ch = 0; ch < channels; ch += vec::lanes) body(row * channels + ch, ch, whole_streamed{});
        store_fence();
        return;
    }
    for (int64_t end = rows.end; end > rows.begin; end -= kBlockRows)
        for (int64_t row = max(end - kBlockRows, rows.begin); row < end; ++row)
            each_vector(channels, [=](int64_t ch, auto count)
                                      KNLTRAIN_INLINE { body(row * channels + ch, ch, count); });
}

enum class Activation { none, relu, capped_relu };

template <class T, bool with_residual, Activation activation> void forward(const BatchNorm &p) {
    const T *x = static_cast<const T *>(p.x);
    const T *residual = static_cast<const T *>(p.residual);
    T *y = static_cast<T *>(p.y);
    const Scratch s(p);
    float *scale = s.a, *shift = s.b;

    if (p.training) {
        for (int64_t ch = 0; ch < p.channels; ++ch) shift[ch] = to_float(x[ch]);
        auto sums = [&](int task) {
            sum_rows(p, task, [=](int64_t at, int64_t ch, auto count, vec &first, vec &second) KNLTRAIN_INLINE {
                prefetch_ahead(x + at);
                const vec d = load(x + at, count) - load(shift + ch, count);
                first += d;
                second = fma(d, d, second);
            });
        };
        each_task(p.tasks, sums);
    }
    for (int64_t ch = 0; ch < p.channels; ++ch) {
        if (p.training) {
            const double d = total(s.first, ch, p) / double(p.rows);
            const double var = total(s.second, ch, p) / double(p.rows) - d * d;
            p.mean[ch] = float(shift[ch] + d);
            p.var[ch] = float(var < 0 ? 0 : var);
        }
        scale[ch] = float(p.weight[ch] / ::sqrt(double(p.var[ch]) + p.eps));
    }
    const float *mean = p.mean, *bias = p.bias, cap = p.cap;
    auto apply = [&](int task) {
        transform_rows(p, task, y, [=](int64_t at, int64_t ch, auto count) KNLTRAIN_INLINE {
            prefetch_ahead(x + at);
            const vec d = load(x + at, count) - load(mean + ch, count);
            vec z = fma(d, load(scale + ch, count), load(bias + ch, count));
            if (with_residual) z += load(residual + at, count);
            if (activation != Activation::none) z = relu(z);
            if (activation == Activation::capped_relu) z = clamp_max(z, splat(cap));
            put(y + at, z, count);
        });
    };
    each_task(p.tasks, apply);
}

template <class T, bool with_residual, Activation activation> void backward(const BatchNorm &p) {
    const T *x = static_cast<const T *>(p.x);
    const T *y = static_cast<const T *>(p.y);
    const T *dy = static_cast<const T *>(p.dy);
    T *dx = static_cast<T *>(p.dx);
    T *dresidual = static_cast<T *>(p.dresidual);
    const Scratch s(p);
    float *scale = s.a, *x_coefficient = s.b, *constant = s.c;
    const float *mean = p.mean, *bias = p.bias, cap = p.cap;

    for (int64_t ch = 0; ch < p.channels; ++ch)
        scale[ch] = float(p.weight[ch] / ::sqrt(double(p.var[ch]) + p.eps));
    // dy where the result was positive and below the cap, or NaN, as in torch's threshold_backward; else 0. With a
    // residual the result is read, else it follows from d, which is x - mean.
    auto through_relu = [=](int64_t at, int64_t ch, auto count, vec d) KNLTRAIN_INLINE {
        const vec gradient = load(dy + at, count);
        if (activation == Activation::none) return gradient;
        const vec z = with_residual ? load(y + at, count)
                                    : fma(d, load(scale + ch, count), load(bias + ch, count));
        const vec passed = select_or_zero(not_le(z, zero()), gradient);
        return activation == Activation::capped_relu ? select_or_zero(not_ge(z, splat(cap)), passed) : passed;
    };
    const bool streamed = is_streamed(p, dresidual);
    auto sums = [&](int task) {
        sum_rows(p, task, [=](int64_t at, int64_t ch, auto count, vec &first, vec &second) KNLTRAIN_INLINE {
            prefetch_ahead(x + at);
            prefetch_ahead(dy + at);
            const vec d = load(x + at, count) - load(mean + ch, count);
            const vec dz = through_relu(at, ch, count, d);
            // Written for the second pass, so that it need not read y and dy again.
            if (with_residual) put(dresidual + at, dz, count, streamed);
            first += dz;
            second = fma(dz, d, second);
        });
        if (with_residual) store_fence();
    };
    each_task(p.tasks, sums);
    for (int64_t ch = 0; ch < p.channels; ++ch) {
        const double sum_dz = total(s.first, ch, p), sum_dz_d = total(s.second, ch, p);
        const double inverse = 1 / ::sqrt(double(p.var[ch]) + p.eps);
        p.dbias[ch] = float(sum_dz);
        p.dweight[ch] = float(sum_dz_d * inverse);
        constant[ch] = float(-p.weight[ch] * inverse * (sum_dz / double(p.rows)));
        x_coefficient[ch] = float(-p.weight[ch] * inverse * inverse * inverse * (sum_dz_d / double(p.rows)));
    }
    const bool training = p.training;
    auto apply = [&](int task) {
        transform_rows(p, task, dx, [=](int64_t at, int64_t ch, auto count) KNLTRAIN_INLINE {
            prefetch_ahead(x + at);
            prefetch_ahead((with_residual ? dresidual : dy) + at);
            const vec a = load(scale + ch, count), b = load(x_coefficient + ch, count);
            const vec d = load(x + at, count) - load(mean + ch, count);
            const vec dz = with_residual ? load(dresidual + at, count) : through_relu(at, ch, count, d);
            const vec whole_gradient = fma(a, dz, fma(b, d, load(constant + ch, count)));
            put(dx + at, training ? whole_gradient : a * dz, count);
        });
    };
    each_task(p.tasks, apply);
}

template <class T, bool with_residual> void forward(const BatchNorm &p) {
    if (!p.relu)
        forward<T, with_residual, Activation::none>(p);
    else if (p.cap == __builtin_inff())
        forward<T, with_residual, Activation::relu>(p);
    else
        forward<T, with_residual, Activation::capped_relu>(p);
}

template <class T, bool with_residual> void backward(const BatchNorm &p) {
    if (!p.relu)
        backward<T, with_residual, Activation::none>(p);
    else if (p.cap == __builtin_inff())
        backward<T, with_residual, Activation::relu>(p);
    else
        backward<T, with_residual, Activation::capped_relu>(p);
}

template <class T> void forward(const BatchNorm &p) {
    p.residual != nullptr ? forward<T, true>(p) : forward<T, false>(p);
}

template <class T> void backward(const BatchNorm &p) {
    p.dresidual != nullptr ? backward<T, true>(p) : backward<T, false>(p);
}

}  // namespace

void batch_norm_forward(const BatchNorm &p) { p.is_bf16 ? forward<bf16>(p) : forward<float>(p); }
void batch_norm_backward(const BatchNorm &p) { p.is_bf16 ? backward<bf16>(p) : backward<float>(p); }

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
