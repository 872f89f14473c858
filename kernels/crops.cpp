// Boxes of 8-bit images to what the network takes, in one pass over the result's rows.
//
// A box of the result's size at a whole pixel is copied. Any other is resampled, down and then across, with a triangle
// filter that is widened by the scale where the box shrinks (antialiased bilinear, as Pillow defines it), in float32.
#include <math.h>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

constexpr int64_t kPanel = 320;  // pixels put in order at a time: a multiple of 16

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Scales and shifts of three vectors of interleaved channels.
struct Normal {
    vec scale[3], shift[3];
    explicit Normal(const Crops &p) {
        float scales[3 * vec::lanes], shifts[3 * vec::lanes];
        for (int i = 0; i < 3 * vec::lanes; ++i) scales[i] = p.scale[i % 3], shifts[i] = p.shift[i % 3];
        for (int v = 0; v < 3; ++v) scale[v] = load(scales + v * vec::lanes), shift[v] = load(shifts + v * vec::lanes);
    }
    // `numbers` begin with a first channel.
    // Around the caches where that is possible: the network reads the batch when all of it is there.
    template <class S, class T> void apply(const S *from, T *to, int64_t numbers) const {
        const bool around = reinterpret_cast<uintptr_t>(to) % (vec::lanes * sizeof(T)) == 0;
        int64_t at = 0;
        for (; at + 3 * vec::lanes <= numbers; at += 3 * vec::lanes)
            for (int v = 0; v < 3; ++v) {
                const vec value = fma(load(from + at + v * vec::lanes), scale[v], shift[v]);
                if (around)
                    stream(to + at + v * vec::lanes, value);
                else
                    store(to + at + v * vec::lanes, value);
            }
        for (int v = 0; at < numbers; at += vec::lanes, ++v) {
            const int count = int(smaller(vec::lanes, numbers - at));
            store_first(to + at, fma(load_first(from + at, count), scale[v], shift[v]), count);
        }
    }
};

// Pixels in reverse order.
void reverse(const uint8_t *from, uint8_t *to, int64_t count) {
    // Sixteen pixels are three registers. Which byte of which goes where in the three that they become: -1 where none.
    const __m128i a2 = _mm_setr_epi8(13, 14, 15, 10, 11, 12, 7, 8, 9, 4, 5, 6, 1, 2, 3, -1);
    const __m128i a1 = _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 14);
    const __m128i b2 = _mm_setr_epi8(-1, 0, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i b1 = _mm_setr_epi8(15, -1, 11, 12, 13, 8, 9, 10, 5, 6, 7, 2, 3, 4, -1, 0);
    const __m128i b0 = _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 15, -1);
    const __m128i c1 = _mm_setr_epi8(1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i c0 = _mm_setr_epi8(-1, 12, 13, 14, 9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2);
    // In the order of the source, which processors foresee; the target is in the first cache.
    for (; count >= 16; count -= 16, from += 48) {
        const __m128i *three = reinterpret_cast<const __m128i *>(from);
        const __m128i x0 = _mm_loadu_si128(three), x1 = _mm_loadu_si128(three + 1), x2 = _mm_loadu_si128(three + 2);
        const __m128i a = _mm_or_si128(_mm_shuffle_epi8(x2, a2), _mm_shuffle_epi8(x1, a1));
        const __m128i b = _mm_or_si128(_mm_shuffle_epi8(x2, b2), _mm_shuffle_epi8(x1, b1));
        const __m128i c = _mm_or_si128(_mm_shuffle_epi8(x1, c1), _mm_shuffle_epi8(x0, c0));
        __m128i *reversed = reinterpret_cast<__m128i *>(to + 3 * (count - 16));
        _mm_storeu_si128(reversed, a);
        _mm_storeu_si128(reversed + 1, _mm_or_si128(b, _mm_shuffle_epi8(x0, b0)));
        _mm_storeu_si128(reversed + 2, c);
    }
    for (; count > 0; --count, from += 3) memcpy(to + 3 * (count - 1), from, 3);
}

// One row of the result from the row of the image that it is, from column `left` on; null where there is none.
template <class T>
void copy_row(const Crops &p, const Normal &normal, const uint8_t *row, int64_t in_w, int64_t left, bool flip, T *to) {
    uint8_t buffer[3 * kPanel];
    for (int64_t begin = 0; begin < p.out_w; begin += kPanel) {
        const int64_t count = smaller(kPanel, p.out_w - begin);
        const int64_t from = flip ? left + p.out_w - begin - count : left + begin;
        const int64_t first = larger(from, 0), inside = smaller(from + count, in_w) - first;
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
        normal.apply(pixels, to + 3 * begin, 3 * count);
    }
}

// One side of a box: where each output pixel's weights begin, and what they are.
struct Side {
    double begin, length;
    int64_t in, out;

    // Weighs source pixels for an output pixel; returns how many of them, from `first` on, lie inside the image.
    int64_t weigh(int64_t index, float *weights, int64_t &first) const {
        const double scale = length / double(out), reach = scale > 1 ? scale : 1;
        const double centre = begin + (double(index) + 0.5) * scale;
        // Outside of image and box there is nothing, and the others weigh more; inside the box it is black.
        const int64_t low = larger(int64_t(floor(centre - reach + 0.5)), smaller(0, int64_t(floor(begin))));
        const int64_t high = smaller(int64_t(floor(centre + reach + 0.5)), larger(in, int64_t(ceil(begin + length))));
        first = smaller(larger(low, 0), in);
        const int64_t end = larger(smaller(high, in), first);
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

// Across: every output column with the same number of weights, of which those too many are zero.
struct Columns {
    float *weights;
    int32_t *first;
    int64_t taps, begin, end;  // begin to end: the source columns that have a weight

    void prepare(const Side &side, int64_t room, bool flip) {
        taps = room, begin = side.in, end = 0;
        for (int64_t col = 0; col < side.out; ++col) {
            float *to = weights + col * taps;
            int64_t from;
            const int64_t count = side.weigh(flip ? side.out - 1 - col : col, to, from);
            const int64_t moved = smaller(from, side.in - taps);
            memmove(to + (from - moved), to, count * sizeof(float));
            for (int64_t i = 0; i < from - moved; ++i) to[i] = 0;
            for (int64_t i = from - moved + count; i < taps; ++i) to[i] = 0;
            first[col] = int32_t(moved);
            begin = smaller(begin, moved), end = larger(end, moved + taps);
        }
    }
};

// Down: one output row's weighted sum of source rows, between the columns that are asked for.
void down(const uint8_t *image, int64_t in_w, const Columns &columns, const float *weights, int64_t first,
          int64_t count, float *to) {
    const uint8_t *from = image + 3 * (first * in_w + columns.begin);
    each_vector(3 * (columns.end - columns.begin), [&](int64_t at, auto width) {
        vec sum = zero();
        for (int64_t i = 0; i < count; ++i)
            sum = fma(splat(weights[i]), load_first(from + 3 * i * in_w + at, width), sum);
        store_first(to + at, sum, width);
    });
}

// Across: four numbers at a time, of which three are a pixel; writes, and reads, one too many at the end.
void across(const float *row, const Columns &columns, int64_t out_w, float *to) {
    for (int64_t col = 0; col < out_w; ++col) {
        const float *pixel = row + 3 * (columns.first[col] - columns.begin);
        const float *weights = columns.weights + col * columns.taps;
        __m128 sum = _mm_setzero_ps();
        for (int64_t i = 0; i < columns.taps; ++i)
            sum = _mm_fmadd_ps(_mm_set1_ps(weights[i]), _mm_loadu_ps(pixel + 3 * i), sum);
        _mm_storeu_ps(to + 3 * col, sum);
    }
}

template <class T> void rows_of_task(const Crops &p, int task) {
    const Normal normal(p);
    float *scratch = p.scratch + task * crop_scratch(p);
    Columns columns{};
    columns.weights = scratch;
    columns.first = reinterpret_cast<int32_t *>(columns.weights + p.out_w * p.taps_w);
    float *row_weights = columns.weights + p.out_w * (p.taps_w + 1);
    float *source_row = row_weights + p.taps_h, *result_row = source_row + 3 * p.in_w + 1;

    int64_t prepared = -1;
    const int64_t end = p.images * p.out_h * (task + 1) / p.tasks;
    for (int64_t at = p.images * p.out_h * task / p.tasks; at < end; ++at) {
        const int64_t image = at / p.out_h, row = at % p.out_h;
        const uint8_t *pixels = p.pixels == nullptr ? p.image[image] : p.pixels + image * p.in_h * p.in_w * 3;
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
            copy_row(p, normal, source, in_w, int64_t(box[1]), flip, to);
            continue;
        }
        if (image != prepared) {
            columns.prepare({box[1], box[3], in_w, p.out_w}, smaller(p.taps_w, in_w), flip);
            prepared = image;
        }
        int64_t first;
        const int64_t count = Side{box[0], box[2], in_h, p.out_h}.weigh(row, row_weights, first);
        down(pixels, in_w, columns, row_weights, first, count, source_row);
        across(source_row, columns, p.out_w, result_row);
        normal.apply(result_row, to, 3 * p.out_w);
    }
    _mm_sfence();
}

}  // namespace

void crop_flip_normalize(const Crops &p) {
    auto rows = [&](int task) { p.is_bf16 ? rows_of_task<bf16>(p, task) : rows_of_task<float>(p, task); };
    each_task(p.tasks, rows);
}

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
