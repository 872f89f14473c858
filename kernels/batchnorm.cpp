// Batch norm + residual + ReLU in two passes over the rows, forward and backward.
//
// The first pass sums, the second transforms. Each task has a contiguous part of the rows, and the second pass walks it
// backwards: what the first pass read last is still in cache. Sums are float32 over a block of rows and float64 across
// blocks, of values shifted by the channel's first one, so that a mean much larger than the deviation costs no digits.
#include <math.h>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

// What a task writes beyond this is no longer in its share of the caches when it is needed: the stores go around them
// and save the read that a store to an uncached line begins with.
constexpr int64_t kStreamBytes = 8 << 20;
constexpr int64_t kBlock = 128;    // rows summed in float32
constexpr int kRows = 4;           // rows that share a load and a store of their sums, where rows are short:
constexpr int64_t kShortRow = 128;  // channels; several long rows at once are too many streams to fetch ahead
constexpr int64_t kAhead = 1536;  // bytes: the processor's own prefetching does not keep up with two passes

struct Span {
    int64_t begin, end;
};
Span part(int64_t rows, int task, int tasks) { return {rows * task / tasks, rows * (task + 1) / tasks}; }

// The scratch memory of a BatchNorm.
struct Scratch {
    double *first, *second;  // tasks x channels sums
    float *a, *b, *c;        // channels coefficients
    explicit Scratch(const BatchNorm &p)
        : first(p.scratch),
          second(first + p.tasks * p.channels),
          a(reinterpret_cast<float *>(second + p.tasks * p.channels)),
          b(a + p.channels),
          c(b + p.channels) {}
};

template <class T> inline void fetch_ahead(const T *p) {
    _mm_prefetch(reinterpret_cast<const char *>(p) + kAhead, _MM_HINT_T0);
}

template <int n> struct rows_at_once {
    static constexpr int value = n;
};

// Adds the float32 sums of a block of rows to the float64 ones, and clears them.
void flush(float *block, double *total, int64_t channels) {
    for (int64_t ch = 0; ch < channels; ++ch) {
        total[ch] += block[ch];
        block[ch] = 0;
    }
}

// The sums over a task's rows of two vectors a channel: body(offset, channel, count, first, second) adds to them.
template <class Body> inline void sum_rows(const BatchNorm &p, int task, Body body) {
    const Scratch s(p);
    const int64_t channels = p.channels;
    double *first = s.first + task * channels, *second = s.second + task * channels;
    // On the task's own stack, where no other task's sums share a line of the cache: one panel of channels after the
    // other serves any number of them.
    constexpr int64_t kPanel = 4096;
    float panel_first[kPanel] = {}, panel_second[kPanel] = {};
    float *block_first = panel_first, *block_second = panel_second;
    const Span rows = part(p.rows, task, p.tasks);
    for (int64_t from = 0; from < channels; from += kPanel) {
        const int64_t width = channels - from < kPanel ? channels - from : kPanel;
        for (int64_t ch = from; ch < from + width; ++ch) first[ch] = second[ch] = 0;
        for (int64_t begin = rows.begin; begin < rows.end; begin += kBlock) {
            const int64_t end = begin + kBlock < rows.end ? begin + kBlock : rows.end;
            auto add_rows = [=](int64_t row, auto together) KNLTRAIN_INLINE {
                each_vector(width, [=](int64_t ch, auto count) KNLTRAIN_INLINE {
                    vec one = load_first(block_first + ch, count), two = load_first(block_second + ch, count);
                    for (int r = 0; r < decltype(together)::value; ++r)
                        body((row + r) * channels + from + ch, from + ch, count, one, two);
                    store_first(block_first + ch, one, count);
                    store_first(block_second + ch, two, count);
                });
            };
            int64_t row = begin;
            for (; channels <= kShortRow && row + kRows <= end; row += kRows) add_rows(row, rows_at_once<kRows>{});
            for (; row < end; ++row) add_rows(row, rows_at_once<1>{});
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

// Whether what the tasks write there goes around the caches.
template <class T> bool is_streamed(const BatchNorm &p, const T *target) {
    const bool aligned = p.channels % vec::lanes == 0 && reinterpret_cast<uintptr_t>(target) % 64 == 0;
    return aligned && p.rows / p.tasks * p.channels * int64_t(sizeof(T)) > kStreamBytes;
}

// A whole vector, to be stored around the caches.
struct around_caches : whole {};
template <class T> inline void put(T *p, vec a, int n) { store_first(p, a, n); }
template <class T> inline void put(T *p, vec a, whole) { store(p, a); }
template <class T> inline void put(T *p, vec a, around_caches) { stream(p, a); }
template <class T> inline void put(T *p, vec a, int n, bool) { store_first(p, a, n); }
template <class T> inline void put(T *p, vec a, whole, bool streamed) { streamed ? stream(p, a) : store(p, a); }

// body(offset, channel, count) for every vector of a task's rows, the last block of rows first, unless the caches do not
// hold so much anyway.
template <class T, class Body> inline void transform_rows(const BatchNorm &p, int task, const T *target, Body body) {
    const Span rows = part(p.rows, task, p.tasks);
    const int64_t channels = p.channels;
    if (is_streamed(p, target)) {
        for (int64_t row = rows.begin; row < rows.end; ++row)
            for (int64_t ch = 0; ch < channels; ch += vec::lanes) body(row * channels + ch, ch, around_caches{});
        _mm_sfence();
        return;
    }
    for (int64_t end = rows.end; end > rows.begin; end -= kBlock)
        for (int64_t row = end - kBlock > rows.begin ? end - kBlock : rows.begin; row < end; ++row)
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
                fetch_ahead(x + at);
                const vec d = load_first(x + at, count) - load_first(shift + ch, count);
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
            fetch_ahead(x + at);
            const vec d = load_first(x + at, count) - load_first(mean + ch, count);
            vec z = fma(d, load_first(scale + ch, count), load_first(bias + ch, count));
            if (with_residual) z += load_first(residual + at, count);
            if (activation != Activation::none) z = relu(z);
            if (activation == Activation::capped_relu) z = at_most(splat(cap), z);
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
    float *scale = s.a, *of_x = s.b, *constant = s.c;
    const float *mean = p.mean, *bias = p.bias, cap = p.cap;

    for (int64_t ch = 0; ch < p.channels; ++ch)
        scale[ch] = float(p.weight[ch] / ::sqrt(double(p.var[ch]) + p.eps));
    // dy where the result was positive and below the cap; d is x - mean. With a shortcut the result is looked at, else it
    // follows from x.
    auto through_relu = [=](int64_t at, int64_t ch, auto count, vec d) KNLTRAIN_INLINE {
        const vec gradient = load_first(dy + at, count);
        if (activation == Activation::none) return gradient;
        const vec z = with_residual ? load_first(y + at, count)
                                    : fma(d, load_first(scale + ch, count), load_first(bias + ch, count));
        const vec passed = where_positive(z, gradient);
        return activation == Activation::capped_relu ? where_below(z, splat(cap), passed) : passed;
    };
    const bool streamed = is_streamed(p, dresidual);
    auto sums = [&](int task) {
        sum_rows(p, task, [=](int64_t at, int64_t ch, auto count, vec &first, vec &second) KNLTRAIN_INLINE {
            fetch_ahead(x + at);
            fetch_ahead(dy + at);
            const vec d = load_first(x + at, count) - load_first(mean + ch, count);
            const vec dz = through_relu(at, ch, count, d);
            // Kept for the second pass, which then need not read y and dy again.
            if (with_residual) put(dresidual + at, dz, count, streamed);
            first += dz;
            second = fma(dz, d, second);
        });
        if (with_residual) _mm_sfence();
    };
    each_task(p.tasks, sums);
    for (int64_t ch = 0; ch < p.channels; ++ch) {
        const double sum_dz = total(s.first, ch, p), sum_dz_d = total(s.second, ch, p);
        const double inverse = 1 / ::sqrt(double(p.var[ch]) + p.eps);
        p.dbias[ch] = float(sum_dz);
        p.dweight[ch] = float(sum_dz_d * inverse);
        constant[ch] = float(-p.weight[ch] * inverse * (sum_dz / double(p.rows)));
        of_x[ch] = float(-p.weight[ch] * inverse * inverse * inverse * (sum_dz_d / double(p.rows)));
    }
    const bool training = p.training;
    auto apply = [&](int task) {
        transform_rows(p, task, dx, [=](int64_t at, int64_t ch, auto count) KNLTRAIN_INLINE {
            fetch_ahead(x + at);
            fetch_ahead((with_residual ? dresidual : dy) + at);
            const vec a = load_first(scale + ch, count), b = load_first(of_x + ch, count);
            const vec d = load_first(x + at, count) - load_first(mean + ch, count);
            const vec dz = with_residual ? load_first(dresidual + at, count) : through_relu(at, ch, count, d);
            const vec whole_gradient = fma(a, dz, fma(b, d, load_first(constant + ch, count)));
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
