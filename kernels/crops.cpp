// Boxes of 8-bit images to the network's input, in one pass over the result's rows.
//
// A box of the result's size at a whole pixel is copied. Any other is resampled in float32, down and then across, with
// a triangle filter that is widened by the scale where the box shrinks: antialiased bilinear, as Pillow defines it.
#include <math.h>

#include "common.h"
#include "kernels.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

constexpr int64_t kStripPixels = 320;  // copied at a time: a multiple of 16

// Scales and shifts of three vectors of interleaved channels.
struct Normalizer {
    vec scale[3], shift[3];
    explicit Normalizer(const Crops &p) {
        float scales[3 * vec::lanes], shifts[3 * vec::lanes];
        for (int i = 0; i < 3 * vec::lanes; ++i) scales[i] = p.scale[i % 3], shifts[i] = p.shift[i % 3];
        for (int v = 0; v < 3; ++v) scale[v] = load(scales + v * vec::lanes), shift[v] = load(shifts + v * vec::lanes);
    }
    // `from` begins with a first channel. The result is streamed where alignment permits: the network reads the batch
    // only when all of it is there.
    template <class S, class T> void apply(const S *from, T *to, int64_t count) const {
        const bool streamed = is_aligned(to, vec::lanes * sizeof(T));
        int64_t at = 0;
        for (; at + 3 * vec::lanes <= count; at += 3 * vec::lanes)
            for (int v = 0; v < 3; ++v) {
                const vec value = fma(load(from + at + v * vec::lanes), scale[v], shift[v]);
                if (streamed)
                    stream(to + at + v * vec::lanes, value);
                else
                    store(to + at + v * vec::lanes, value);
            }
        for (int v = 0; at < count; at += vec::lanes, ++v) {
            const int n = int(min(vec::lanes, count - at));
            store(to + at, fma(load(from + at, n), scale[v], shift[v]), n);
        }
    }
};

// Pixels in reverse order.
void reverse(const uint8_t *from, uint8_t *to, int64_t count) {
    // In the order of the source, which the processor prefetches; the target is in the first-level cache.
    for (; count >= 16; count -= 16, from += 48) reverse_16_pixels(from, to + 3 * (count - 16));
    for (; count > 0; --count, from += 3) memcpy(to + 3 * (count - 1), from, 3);
}

// One row of the result: a copy of the image's row from column `left` on. The row is null where there is none.
template <class T>
void copy_row(const Crops &p, const Normalizer &normalizer, const uint8_t *row, int64_t in_w, int64_t left, bool flip,
              T *to) {
    uint8_t buffer[3 * kStripPixels];
    for (int64_t begin = 0; begin < p.out_w; begin += kStripPixels) {
        const int64_t count = min(kStripPixels, p.out_w - begin);
        const int64_t from = flip ? left + p.out_w - begin - count : left + begin;
        const int64_t first = max(from, 0), inside = min(from + count, in_w) - first;
        const uint8_t *pixels = buffer;
        if (row == nullptr || inside < count) memset(buffer, 0, sizeof buffer);
        if (row != nullptr && inside > 0) {
            if (flip)
                reverse(row + 3 * first, buffer + 3 * (from + count - first - inside), inside);
            else if (inside < count)
                memcpy(buffer + 3 * (first - from), row + 3 * first, 3 * inside);
            else
                pixels = row + 3 * first;
        }
        normalizer.apply(pixels, to + 3 * begin, 3 * count);
    }
}

// One side of a box: the weights of each output pixel, and where they begin.
struct Side {
    double begin, length;
    int64_t in, out;

    // Writes an output pixel's weights of source pixels; returns how many pixels, from `first` on, are in the image.
    int64_t weigh(int64_t index, float *weights, int64_t &first) const {
        const double scale = length / double(out), reach = scale > 1 ? scale : 1;
        const double centre = begin + (double(index) + 0.5) * scale;
        // A pixel outside of image and box has no weight, so the others weigh more; inside the box it is black.
        const int64_t low = max(int64_t(floor(centre - reach + 0.5)), min(0, int64_t(floor(begin))));
        const int64_t high = min(int64_t(floor(centre + reach + 0.5)), max(in, int64_t(ceil(begin + length))));
        first = min(max(low, 0), in);
        const int64_t end = max(min(high, in), first);
        double sum = 0;
        for (int64_t i = low; i < high; ++i) sum += weight(i, centre, reach);
        for (int64_t i = first; i < end; ++i) weights[i - first] = float(weight(i, centre, reach) / sum);
        return end - first;
    }

    static double weight(int64_t pixel, double centre, double reach) {
        const double distance = fabs(double(pixel) + 0.5 - centre) / reach;
        return distance < 1 ? 1 - distance : 0;
    }
};

// Across: every output column has the same number of weights; surplus ones are zero.
struct Columns {
    float *weights;
    int32_t *first;
    int64_t taps, begin, end;  // source columns that have a weight: begin to end

    void prepare(const Side &side, int64_t max_taps, bool flip) {
        taps = max_taps, begin = side.in, end = 0;
        for (int64_t col = 0; col < side.out; ++col) {
            float *to = weights + col * taps;
            int64_t from;
            const int64_t count = side.weigh(flip ? side.out - 1 - col : col, to, from);
            const int64_t moved = min(from, side.in - taps);
            memmove(to + (from - moved), to, count * sizeof(float));
            for (int64_t i = 0; i < from - moved; ++i) to[i] = 0;
            for (int64_t i = from - moved + count; i < taps; ++i) to[i] = 0;
            first[col] = int32_t(moved);
            begin = min(begin, moved), end = max(end, moved + taps);
        }
    }
};

// Down: one output row's weighted sum of source rows, in the columns that have a weight.
void down(const uint8_t *image, int64_t in_w, const Columns &columns, const float *weights, int64_t first,
          int64_t count, float *to) {
    const uint8_t *from = image + 3 * (first * in_w + columns.begin);
    each_vector(3 * (columns.end - columns.begin), [&](int64_t at, auto width) {
        vec sum = zero();
        for (int64_t i = 0; i < count; ++i)
            sum = fma(splat(weights[i]), load(from + 3 * i * in_w + at, width), sum);
        store(to + at, sum, width);
    });
}

// Across: four floats at a time, of which three are a pixel. Reads and writes one float beyond the last pixel.
void across(const float *row, const Columns &columns, int64_t out_w, float *to) {
    for (int64_t col = 0; col < out_w; ++col) {
        const float *pixel = row + 3 * (columns.first[col] - columns.begin);
        const float *weights = columns.weights + col * columns.taps;
        vec4 sum = zero4();
        for (int64_t i = 0; i < columns.taps; ++i) sum = fma(splat4(weights[i]), load4(pixel + 3 * i), sum);
        store(to + 3 * col, sum);
    }
}

template <class T> void rows_of_task(const Crops &p, int task) {
    const Normalizer normalizer(p);
    float *scratch = p.scratch + task * crop_scratch(p);
    Columns columns{};
    columns.weights = scratch;
    columns.first = reinterpret_cast<int32_t *>(columns.weights + p.out_w * p.taps_w);
    float *row_weights = columns.weights + p.out_w * (p.taps_w + 1);
    float *source_row = row_weights + p.taps_h, *result_row = source_row + 3 * p.in_w + 1;

    int64_t prepared = -1;
    const Range rows = task_range(p.images * p.out_h, task, p.tasks);
    for (int64_t at = rows.begin; at < rows.end; ++at) {
        const int64_t image = at / p.out_h, row = at % p.out_h;
        const uint8_t *pixels = p.pixels == nullptr ? p.addresses[image] : p.pixels + image * p.in_h * p.in_w * 3;
        const int64_t in_h = p.pixels == nullptr ? p.sizes[2 * image] : p.in_h;
        const int64_t in_w = p.pixels == nullptr ? p.sizes[2 * image + 1] : p.in_w;
        T *to = static_cast<T *>(p.out) + at * p.out_w * 3;
        const bool flip = p.flips != nullptr && p.flips[image];
        const double whole[4] = {0, 0, double(in_h), double(in_w)};
        const double *box = p.boxes == nullptr ? whole : p.boxes + 4 * image;
        const bool copied = box[2] == double(p.out_h) && box[3] == double(p.out_w) && box[0] == floor(box[0]) &&
                            box[1] == floor(box[1]);
        if (copied) {
            const int64_t from = int64_t(box[0]) + row;
            const uint8_t *source = from < 0 || from >= in_h ? nullptr : pixels + 3 * from * in_w;
            copy_row(p, normalizer, source, in_w, int64_t(box[1]), flip, to);
            continue;
        }
        if (image != prepared) {
            columns.prepare({box[1], box[3], in_w, p.out_w}, min(p.taps_w, in_w), flip);
            prepared = image;
        }
        int64_t first;
        const int64_t count = Side{box[0], box[2], in_h, p.out_h}.weigh(row, row_weights, first);
        down(pixels, in_w, columns, row_weights, first, count, source_row);
        across(source_row, columns, p.out_w, result_row);
        normalizer.apply(result_row, to, 3 * p.out_w);
    }
    store_fence();
}

}  // namespace

void crop_flip_normalize(const Crops &p) {
    auto work = [&](int task) { p.is_bf16 ? rows_of_task<bf16>(p, task) : rows_of_task<float>(p, task); };
    each_task(p.tasks, work);
}

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
