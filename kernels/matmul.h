// Products of packed float32 matrices, and what the convolutions that use them share.
//
// Channels are packed in panels of 16: a matrix of rows x channels as [panel][row][16], weights as
// [panel of outputs][input][16].
#pragma once

#include "common.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

constexpr int kPanel = 16;
constexpr int kPanelVecs = kPanel / vec::lanes;
// Rows and panels of a product that the registers hold.
constexpr int kMaxRows = kIsAvx512 ? 14 : 6, kMaxPanels = kIsAvx512 ? 2 : 1;

// Prefetches the next block into the second-level cache while this one is computed, `quota` cache lines a call.
struct Prefetcher {
    const char *at[4], *end[4];
    int ranges = 0, range = 0;
    int64_t lines = 0, quota = 0;
    void add(const void *from, int64_t bytes) {
        at[ranges] = static_cast<const char *>(from);
        end[ranges++] = static_cast<const char *>(from) + bytes;
        lines += bytes / kCacheLine;
    }
    // Sets the quota such that so many calls of fetch() prefetch everything.
    void spread_over(int64_t calls) { quota = ceil_div(lines, calls); }
    void fetch() {
        for (int64_t n = 0; n < quota && range < ranges; ++n) {
            prefetch_l2(at[range]);
            if ((at[range] += kCacheLine) >= end[range]) ++range;
        }
    }
};

// Calls out(row, vector, sum) with the product of `rows` rows and `panels` panels of outputs, over `depth` inputs.
template <int rows, int panels, class Out>
inline KNLTRAIN_INLINE void multiply(const float *a, int64_t a_panel, const float *b, int64_t b_panel, int64_t depth,
                                     Prefetcher &prefetcher, Out out) {
    constexpr int width = panels * kPanelVecs;
    vec sum[rows][width];
    for (int r = 0; r < rows; ++r)
        for (int w = 0; w < width; ++w) sum[r][w] = zero();
    for (int64_t from = 0; from < depth; from += kPanel, a += a_panel, b += kPanel * kPanel) {
        prefetcher.fetch();
        for (int d = 0; d < kPanel; ++d) {
            vec bs[width];
            for (int w = 0; w < width; ++w)
                bs[w] = load(b + (w / kPanelVecs) * b_panel + d * kPanel + w % kPanelVecs * vec::lanes);
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

// Calls body(Constant<count>, first) for all of `rows`: as many at once as the registers hold, then fewer.
template <int count = kMaxRows, class Body>
inline KNLTRAIN_INLINE void by_rows(int64_t rows, Body body, int64_t first = 0) {
    for (; rows - first >= count; first += count) body(Constant<count>{}, first);
    if constexpr (count > 1) by_rows<(count > 8 ? 8 : count / 2)>(rows, body, first);
}

// How a product is cut among tasks: by its items, which are rows or tiles, or where those are few, by its items and its
// panels of outputs.
struct TaskGrid {
    int64_t items, panels;
    int by_item, by_panel;

    TaskGrid(int tasks, int64_t items, int64_t panels, int64_t min_items) : items(items), panels(panels), by_panel(1) {
        auto fits = [&](int parts) { return tasks % parts == 0 && parts <= panels; };
        for (int parts = 2; parts <= tasks && items / (tasks / by_panel) < min_items; ++parts)
            if (fits(parts)) by_panel = parts;
        by_item = tasks / by_panel;
    }
    // The index of the task's part of the items.
    int item_part(int task) const { return task / by_panel; }
    Range items_of(int task) const { return task_range(items, item_part(task), by_item); }
    Range panels_of(int task) const { return task_range(panels, task % by_panel, by_panel); }
    // The items of a block, at most so many, such that all blocks are alike.
    int64_t block_items(int64_t max_items) const {
        const int64_t part = ceil_div(items, by_item);
        return ceil_div(part, ceil_div(part, max_items));
    }
};

// A task's sums of a convolution's results and of their squares, by channel: float32 over a block, float64 over blocks.
// The sums are of what exceeds a shift, so that a mean much larger than the deviation costs no digits.
struct Statistics {
    const float *shift;  // null: none are taken
    int64_t channels;
    float *block;   // 2 * channels
    double *total;  // likewise

    // In floats of a buffer.
    static int64_t size(int64_t channels) { return 6 * channels; }
    static Statistics in(float *buffer, const float *shift, int64_t channels) {
        return {shift, channels, buffer, reinterpret_cast<double *>(buffer + 2 * channels)};
    }
    void clear() const {
        if (shift != nullptr) memset(block, 0, size(channels) * sizeof(float));
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
    // Mean and biased variance of each channel's `count` results. These are the first task's sums; those of the others
    // follow at distances of `stride` floats.
    void finish(int tasks, int64_t stride, int64_t count, float *mean, float *var) const {
        for (int64_t channel = 0; channel < channels; ++channel) {
            double sum = 0, squares = 0;
            for (int task = 0; task < tasks; ++task) {
                const float *first = reinterpret_cast<const float *>(total);
                const double *own = reinterpret_cast<const double *>(first + task * stride);
                sum += own[channel], squares += own[channels + channel];
            }
            const double above = sum / double(count), variance = squares / double(count) - above * above;
            mean[channel] = float(shift[channel] + above);
            var[channel] = float(variance < 0 ? 0 : variance);
        }
    }
};

}  // namespace
}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
