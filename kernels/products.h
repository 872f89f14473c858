// Products of float32 matrices whose operands were laid out for it, and what convolutions made of them share.
//
// Channels lie in panels of 16: a matrix of rows x channels as [panel][row][16], one of weights as
// [panel of outputs][input][16]. Each source that includes this has a copy of its own.
#pragma once

#include <cstdlib>

#include "isa.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

constexpr int kPanel = 16;
constexpr int kVectors = kPanel / vec::lanes;
constexpr int64_t kLine = 64, kLineNumbers = kLine / sizeof(float);

constexpr bool kWide = vec::lanes == 16;
// Rows and panels of a product that the registers hold.
constexpr int kRows = kWide ? 14 : 6, kPanels = kWide ? 2 : 1;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Fetches what is needed next into the second-level cache while something else is computed, a quota of lines at a time.
struct Ahead {
    const char *at[4], *end[4];
    int ranges = 0, range = 0;
    int64_t lines = 0, quota = 0;
    void add(const void *from, int64_t bytes) {
        at[ranges] = static_cast<const char *>(from);
        end[ranges++] = static_cast<const char *>(from) + bytes;
        lines += bytes / kLine;
    }
    void fetch() {
        for (int64_t n = 0; n < quota && range < ranges; ++n) {
            _mm_prefetch(at[range], _MM_HINT_T1);
            if ((at[range] += kLine) >= end[range]) ++range;
        }
    }
};

// out(row, vector, sum) takes the product of `rows` rows and `panels` panels of outputs, over `depth` inputs.
template <int rows, int panels, class Out>
inline KNLTRAIN_INLINE void multiply(const float *a, int64_t a_panel, const float *b, int64_t b_panel, int64_t depth,
                                     Ahead &ahead, Out out) {
    constexpr int width = panels * kVectors;
    vec sum[rows][width];
    for (int r = 0; r < rows; ++r)
        for (int w = 0; w < width; ++w) sum[r][w] = zero();
    for (int64_t from = 0; from < depth; from += kPanel, a += a_panel, b += kPanel * kPanel) {
        ahead.fetch();
        for (int d = 0; d < kPanel; ++d) {
            vec bs[width];
            for (int w = 0; w < width; ++w)
                bs[w] = load(b + (w / kVectors) * b_panel + d * kPanel + w % kVectors * vec::lanes);
            for (int r = 0; r < rows; ++r) {
                const vec as = splat(a[r * kPanel + d]);
                for (int w = 0; w < width; ++w) sum[r][w] = fma(as, bs[w], sum[r][w]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < width; ++w) out(r, w, sum[r][w]);
}

template <int n> struct Rows {
    static constexpr int count = n;
};

// body(Rows<count>, first) for all of `rows`: as many at once as the registers hold, then fewer.
template <int count = kRows, class Body> inline KNLTRAIN_INLINE void by_rows(int64_t rows, Body body, int64_t first = 0) {
    for (; rows - first >= count; first += count) body(Rows<count>{}, first);
    if constexpr (count > 1) by_rows<(count > 8 ? 8 : count / 2)>(rows, body, first);
}

// How tasks share the work: each takes some of the items, rows or tiles of them, or where those are few, some of them and
// some of the outputs.
struct Shares {
    int64_t items, panels;
    int by_item, by_output;

    Shares(int tasks, int64_t items, int64_t panels, int64_t enough) : items(items), panels(panels), by_output(1) {
        auto fits = [&](int parts) { return tasks % parts == 0 && parts <= panels; };
        for (int parts = 2; parts <= tasks && items / (tasks / by_output) < enough; ++parts)
            if (fits(parts)) by_output = parts;
        by_item = tasks / by_output;
    }
    int64_t first_item(int task) const { return items * (task / by_output) / by_item; }
    int64_t end_item(int task) const { return items * (task / by_output + 1) / by_item; }
    int64_t first_panel(int task) const { return panels * (task % by_output) / by_output; }
    int64_t end_panel(int task) const { return panels * (task % by_output + 1) / by_output; }
    // Blocks of at most so many items, all alike.
    int64_t block_items(int64_t most_items) const {
        const int64_t share = ceil_div(items, by_item);
        return ceil_div(share, ceil_div(share, most_items));
    }
};

// Sums of a task's results and of their squares, by channel: float32 over a block, float64 over blocks. They are of what
// exceeds a shift, so that a mean much larger than the deviation costs no digits.
struct Statistics {
    const float *shift;  // null: none are taken
    int64_t channels;
    float *block;   // 2 * channels
    double *total;  // likewise

    static int64_t numbers(int64_t channels) { return 6 * channels; }
    static Statistics at(float *place, const float *shift, int64_t channels) {
        const Statistics s{shift, channels, place, reinterpret_cast<double *>(place + 2 * channels)};
        if (shift != nullptr) memset(place, 0, numbers(channels) * sizeof(float));
        return s;
    }
    void add(int64_t channel, vec sum, vec squares) const {
        store(block + channel, load(block + channel) + sum);
        store(block + channels + channel, load(block + channels + channel) + squares);
    }
    void end_block() const {
        if (shift == nullptr) return;
        for (int64_t i = 0; i < 2 * channels; ++i) total[i] += block[i];
        memset(block, 0, 2 * channels * sizeof(float));
    }
    // Mean and biased variance of `count` results a channel, from those of all tasks; `stride` numbers lie between them.
    void finish(int tasks, int64_t stride, int64_t count, float *mean, float *var) const {
        for (int64_t channel = 0; channel < channels; ++channel) {
            double sum = 0, squares = 0;
            for (int task = 0; task < tasks; ++task) {
                const double *own = reinterpret_cast<const double *>(reinterpret_cast<const float *>(total) + task * stride);
                sum += own[channel], squares += own[channels + channel];
            }
            const double above = sum / double(count), variance = squares / double(count) - above * above;
            mean[channel] = float(shift[channel] + above);
            var[channel] = float(variance < 0 ? 0 : variance);
        }
    }
};

// Numbers in a row, each part at the beginning of a line.
struct Memory {
    int64_t numbers = 0;
    int64_t add(int64_t count) {
        const int64_t at = numbers;
        numbers += ceil_div(count, kLineNumbers) * kLineNumbers;
        return at;
    }
};

}  // namespace
}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
