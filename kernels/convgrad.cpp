// Weight gradients of convolutions as matrix products, in float32 and in bf16.
//
// dW[k][r][s][c] = sum over images and output pixels of dY[pixel][k] * X[pixel shifted by (r, s)][c]. X and dY are
// packed into cells of four bytes: one float32, or two bf16, the same pixel of two images, for the instruction of
// AVX512_BF16 that multiplies pairs and adds both products to a float32. A shift by (r, s) is the same for both images,
// so one packed copy of a block of X serves every position of the kernel.
//
// A task takes some output channels and some of the pixels. For a block of pixels it packs dY, then for each panel of
// input channels packs X and updates its float32 sums tile by tile: kTile output channels times one panel, in
// registers. Tasks with the same output channels have sums of their own, added up in a fixed order at the end.
//
// Where channels are no multiple of 16 (an image has three), a position is a whole row of the kernel, whose elements
// are contiguous in X. They are packed once for each output column, padded to whole vectors.
#include "kernels.h"
#include "matmul.h"

namespace knltrain {
namespace KNLTRAIN_ISA {

bool stem_weight_grad(const ConvWeightGrad &);

namespace {

constexpr int kTile = vec::lanes / 2;    // output channels of a tile
constexpr int kMaxPanelVectors = 3;
constexpr int64_t kMinBlockPixels = 256, kMaxBlockPixels = 384;  // in bf16, of a pair of images
constexpr int64_t kMaxOwnSumBytes = 320 << 10;                   // with more, tasks share the output channels out
constexpr int64_t kPrefetchPixels = 32;                          // between two calls of the prefetcher

// Cells of a type's elements, of one image or of two, and their products.
template <class T> struct Cells;

template <> struct Cells<float> {
    static constexpr int images = 1;
    static vec make(const float *one, const float *) { return load(one); }
    static vec multiply_add(vec x, float dy, vec sum) { return fma(x, splat(dy), sum); }
    // Each block has a sum of its own: one long sum over all of them would round more.
    static vec begin(const float *) { return zero(); }
    static vec end(const float *sums, vec sum) { return load(sums) + sum; }
};

#if defined(__AVX512BF16__)
template <> struct Cells<bf16> {
    static constexpr int images = 2;
    static vec make(const bf16 *one, const bf16 *two) { return load_pairs(one, two); }
    static vec multiply_add(vec x, float dy, vec sum) { return dot_pairs(x, dy, sum); }
    // One sum over all blocks: rounding to bf16 loses more than that does.
    static vec begin(const float *sums) { return load(sums); }
    static vec end(const float *, vec sum) { return sum; }
};
#endif

// Cells [begin, end) of a vector; the others are zero.
template <class T> vec make_some(const T *one, const T *two, int64_t begin, int64_t end) {
    T copy[2][vec::lanes] = {};
    if (begin < end) memcpy(copy[0] + begin, one + begin, (end - begin) * sizeof(T));
    if (begin < end && two != nullptr) memcpy(copy[1] + begin, two + begin, (end - begin) * sizeof(T));
    return Cells<T>::make(copy[0], two == nullptr ? nullptr : copy[1]);
}

// Output rows [row, row + rows) of images, or pairs of them, [unit, unit + units).
struct Block {
    int64_t unit, units, row, rows;
};

struct Problem {
    const ConvWeightGrad &p;
    int64_t group_in, group_out;  // channels of a group
    bool by_row;                  // a position is a row of the kernel
    bool pointwise;               // a 1x1 kernel: only the rows and columns of X that it reads are packed
    int64_t units;                // images, or pairs of them
    // Elements of X at a position, and those with padding to whole vectors.
    int64_t elements() const { return by_row ? p.kernel_w * group_in : group_in; }
    int64_t padded() const { return ceil_div(elements(), vec::lanes) * vec::lanes; }
    int64_t positions_w() const { return by_row ? 1 : p.kernel_w; }
    int64_t sums_row() const { return p.kernel_h * positions_w() * padded(); }
    // Rows and columns of X in a block, and the distance in it of the pixels of neighbouring outputs.
    int64_t rows_in(int64_t rows) const { return pointwise ? rows : (rows - 1) * p.stride_h + p.kernel_h; }
    int64_t width_in() const { return pointwise || by_row ? p.out_w : (p.out_w - 1) * p.stride_w + p.kernel_w; }
    int64_t step_h() const { return pointwise ? 1 : p.stride_h; }
    int64_t step_w() const { return pointwise || by_row ? 1 : p.stride_w; }
};

// dY of a block: [tile][unit][row][column][kTile] cells.
template <class T>
void pack_dy(const Problem &q, const Block &b, int64_t first_out, int64_t count, float *packed) {
    const ConvWeightGrad &p = q.p;
    const T *dy = static_cast<const T *>(p.dy);
    const int64_t image = p.out_h * p.out_w * p.out_channels, pixels = b.rows * p.out_w;
    const int64_t panel = b.units * pixels * kTile;
    for (int64_t unit = 0; unit < b.units; ++unit) {
        const int64_t n = Cells<T>::images * (b.unit + unit);
        const T *image_dy = dy + n * image + b.row * p.out_w * p.out_channels + first_out;
        const bool second = n + 1 < p.images;
        for (int64_t pixel = 0; pixel < pixels; ++pixel) {
            const T *one = image_dy + pixel * p.out_channels;
            float *to = packed + (unit * pixels + pixel) * kTile;
            for (int64_t k = 0; k < count; k += vec::lanes) {
                const T *two = second ? one + image + k : nullptr;
                const bool whole = k + vec::lanes <= count;
                float cells[vec::lanes];
                store(cells, whole ? Cells<T>::make(one + k, two) : make_some(one + k, two, 0, kTile));
                memcpy(to + k / kTile * panel, cells, kTile * sizeof(float));
                if (whole) memcpy(to + (k / kTile + 1) * panel, cells + kTile, kTile * sizeof(float));
            }
        }
    }
}

// One panel of X of a block, with the border that the kernel reads: [unit][row][column][panel] cells.
template <class T, int vectors> void pack_x(const Problem &q, const Block &b, int64_t first_in, float *to) {
    const ConvWeightGrad &p = q.p;
    const int64_t image = p.in_h * p.in_w * p.in_channels;
    const int64_t step_h = q.pointwise ? p.stride_h : 1, step_w = q.pointwise ? p.stride_w : 1;
    for (int64_t unit = 0; unit < b.units; ++unit) {
        const int64_t n = Cells<T>::images * (b.unit + unit);
        const T *one = static_cast<const T *>(p.x) + n * image + first_in;
        const T *two = n + 1 < p.images ? one + image : nullptr;
        for (int64_t row = 0; row < q.rows_in(b.rows); ++row) {
            const int64_t in_row = (q.pointwise ? b.row + row : b.row * p.stride_h + row) * step_h - p.pad_h;
            for (int64_t column = 0; column < q.width_in(); ++column, to += vectors * vec::lanes) {
                const int64_t in_column = column * step_w - p.pad_w;
                const bool outside = in_row < 0 || in_row >= p.in_h || in_column < 0 || in_column >= p.in_w;
                const int64_t at = (in_row * p.in_w + in_column) * p.in_channels;
                for (int v = 0; v < vectors; ++v) {
                    const int64_t from = at + v * vec::lanes;
                    store(to + v * vec::lanes,
                          outside ? zero() : Cells<T>::make(one + from, two == nullptr ? nullptr : two + from));
                }
            }
        }
    }
}

// The same where a position is a row of the kernel: its elements from `first_in` on.
template <class T, int vectors> void pack_x_by_row(const Problem &q, const Block &b, int64_t first_in, float *to) {
    const ConvWeightGrad &p = q.p;
    const int64_t line = p.in_w * p.in_channels, image = p.in_h * line;
    for (int64_t unit = 0; unit < b.units; ++unit) {
        const int64_t n = Cells<T>::images * (b.unit + unit);
        const T *one = static_cast<const T *>(p.x) + n * image;
        const T *two = n + 1 < p.images ? one + image : nullptr;
        const int64_t readable = (p.images - n - (two != nullptr)) * image;  // elements from these pointers on
        for (int64_t row = 0; row < q.rows_in(b.rows); ++row) {
            const int64_t in_row = b.row * p.stride_h + row - p.pad_h;
            const bool outside = in_row < 0 || in_row >= p.in_h;
            for (int64_t column = 0; column < p.out_w; ++column)
                for (int v = 0; v < vectors; ++v, to += vec::lanes) {
                    // Where the vector begins in the image's row, and its elements [begin, end) that are in that row.
                    // What is beyond the kernel's row goes to sums that are not read.
                    const int64_t at = (column * p.stride_w - p.pad_w) * p.in_channels + first_in + v * vec::lanes;
                    const int64_t wanted = min(vec::lanes, q.elements() - first_in - v * vec::lanes);
                    const int64_t begin = max(0, -at), end = min(wanted, line - at), from = in_row * line + at;
                    const T *next = two == nullptr ? nullptr : two + from;
                    if (outside)
                        store(to, zero());
                    else if (begin == 0 && end == wanted && from + vec::lanes <= readable)
                        store(to, Cells<T>::make(one + from, next));
                    else
                        store(to, make_some(one + from, next, begin, end));
                }
        }
    }
}

// Adds one block's products to a tile of sums: kTile rows, `vectors` vectors of a row.
template <class T, int vectors>
void update_tile(const Problem &q, const Block &b, const float *x, const float *dy, float *sums, int64_t sums_row,
                 Prefetcher &prefetcher) {
    const ConvWeightGrad &p = q.p;
    const int64_t step = q.step_w() * vectors * vec::lanes;
    const int64_t row_step = q.step_h() * q.width_in() * vectors * vec::lanes;
    const int64_t unit_step = q.rows_in(b.rows) * q.width_in() * vectors * vec::lanes;
    vec acc[kTile][vectors];
    for (int k = 0; k < kTile; ++k)
        for (int v = 0; v < vectors; ++v) acc[k][v] = Cells<T>::begin(sums + k * sums_row + v * vec::lanes);
    for (int64_t unit = 0; unit < b.units; ++unit) {
        for (int64_t row = 0; row < b.rows; ++row) {
            const float *from = x + unit * unit_step + row * row_step;
            for (int64_t column = 0; column < p.out_w; column += kPrefetchPixels) {
                prefetcher.fetch();
                const int64_t end = min(column + kPrefetchPixels, p.out_w);
                for (int64_t at = column; at < end; ++at, from += step, dy += kTile) {
                    vec xs[vectors];
                    for (int v = 0; v < vectors; ++v) xs[v] = load(from + v * vec::lanes);
                    for (int k = 0; k < kTile; ++k)
                        for (int v = 0; v < vectors; ++v) acc[k][v] = Cells<T>::multiply_add(xs[v], dy[k], acc[k][v]);
                }
            }
        }
    }
    for (int k = 0; k < kTile; ++k)
        for (int v = 0; v < vectors; ++v) {
            float *to = sums + k * sums_row + v * vec::lanes;
            store(to, Cells<T>::end(to, acc[k][v]));
        }
}

// All tiles of one panel of a block, for the output channels [first_out, first_out + count) of a group.
template <class T, int vectors>
void update_panel(const Problem &q, const Block &b, int64_t group, int64_t from, int64_t count, const float *dy,
                  float *x, float *sums, Prefetcher &prefetcher) {
    const int64_t sums_row = q.sums_row(), dy_panel = b.units * b.rows * q.p.out_w * kTile;
    if (q.by_row)
        pack_x_by_row<T, vectors>(q, b, from, x);
    else
        pack_x<T, vectors>(q, b, group * q.group_in + from, x);
    for (int64_t position = 0; position < q.p.kernel_h * q.positions_w(); ++position) {
        const int64_t r = position / q.positions_w(), s = position % q.positions_w();
        const float *shifted = x + (r * q.width_in() + s) * vectors * vec::lanes;
        for (int64_t tile = 0; tile < count / kTile; ++tile)
            update_tile<T, vectors>(q, b, shifted, dy + tile * dy_panel,
                                    sums + tile * kTile * sums_row + position * q.padded() + from, sums_row,
                                    prefetcher);
    }
}

// The vectors of the next panel, where `left` are left: 3 or 2, so that 1 does not remain.
int panel_vectors(int64_t left) { return left % 3 == 0 ? 3 : left == 1 ? 1 : 2; }

// Calls of the prefetcher in a block.
int64_t prefetcher_calls(const Problem &q, const Block &b, int64_t count) {
    int64_t panels = 0;
    for (int64_t left = q.padded() / vec::lanes; left > 0; left -= panel_vectors(left)) ++panels;
    const int64_t tiles = panels * q.p.kernel_h * q.positions_w() * (count / kTile);
    return tiles * b.units * b.rows * ceil_div(q.p.out_w, kPrefetchPixels);
}

// Prefetches a task's next block. The processor's own prefetching has to do for X of one group among several, which is
// not contiguous, and for dY where tasks share it.
template <class T> Prefetcher prefetcher_of(const Problem &q, const Block &next, bool own_dy) {
    constexpr int together = Cells<T>::images;
    const ConvWeightGrad &p = q.p;
    Prefetcher prefetcher;
    const int64_t x_row = p.in_w * p.in_channels * sizeof(T), dy_row = p.out_w * p.out_channels * sizeof(T);
    const int64_t first = max(0, next.row * p.stride_h - p.pad_h);
    const int64_t rows = min(p.in_h - first, next.rows * p.stride_h);
    const bool whole = next.rows == p.out_h;
    for (int64_t n = together * next.unit; n < min(together * (next.unit + next.units), p.images);
         n += whole ? p.images : 1) {
        const int64_t images = whole ? min(together * next.units, p.images - n) : 1;
        const int64_t x_image = whole ? p.in_h * x_row : rows * x_row, dy_image = next.rows * dy_row;
        prefetcher.add(static_cast<const char *>(p.x) + (n * p.in_h + first) * x_row, images * x_image);
        if (own_dy)
            prefetcher.add(static_cast<const char *>(p.dy) + (n * p.out_h + next.row) * dy_row, images * dy_image);
    }
    return prefetcher;
}

// The number of parts that tasks share the output channels in. It is 1 while sums are small: tasks share the pixels
// then.
int channel_parts(const Problem &q) {
    const ConvWeightGrad &p = q.p;
    int parts = 1;
    if (p.out_channels * q.sums_row() * int64_t(sizeof(float)) > kMaxOwnSumBytes)
        for (parts = p.tasks; parts > 1; --parts)
            if (p.tasks % parts == 0 && q.group_out % (parts * kTile) == 0 && q.group_out / parts >= 64) break;
    return parts;
}

// How the work is cut into blocks, of at most so many pixels or of one row, and among tasks.
struct Partition {
    int by_channel, by_pixel;
    int64_t count;  // output channels of a task
    int64_t units, rows, row_blocks, blocks;

    Partition(const Problem &q, int by_channel, int64_t pixels)
        : by_channel(by_channel), by_pixel(q.p.tasks / by_channel), count(q.group_out / by_channel) {
        const ConvWeightGrad &p = q.p;
        rows = min(p.out_h, max(1, pixels / p.out_w));
        units = min(q.units, rows < p.out_h ? 1 : max(1, pixels / (p.out_h * p.out_w)));
        row_blocks = ceil_div(p.out_h, rows);
        blocks = ceil_div(q.units, units) * row_blocks;
    }
    Block block(const Problem &q, int64_t at) const {
        Block b{at / row_blocks * units, units, at % row_blocks * rows, rows};
        b.units = min(units, q.units - b.unit);
        b.rows = min(rows, q.p.out_h - b.row);
        return b;
    }
};

// Sums of the output channels from first_out on, over a task's blocks [begin, end).
template <class T>
void update_blocks(const Problem &q, const Partition &partition, int64_t group, int64_t first_out, int64_t begin,
                   int64_t end, float *dy, float *x, float *sums) {
    memset(sums, 0, partition.count * q.sums_row() * sizeof(float));
    for (int64_t at = begin; at < end; ++at) {
        const Block b = partition.block(q, at);
        Prefetcher prefetcher;
        if (q.p.groups == 1 && at + 1 < end) {
            prefetcher = prefetcher_of<T>(q, partition.block(q, at + 1), partition.by_channel == 1);
            prefetcher.spread_over(prefetcher_calls(q, b, partition.count));
        }
        pack_dy<T>(q, b, first_out, partition.count, dy);
        int vectors = 0;
        for (int64_t from = 0; from < q.padded(); from += vectors * vec::lanes) {
            vectors = panel_vectors((q.padded() - from) / vec::lanes);
            if (vectors == 3) update_panel<T, 3>(q, b, group, from, partition.count, dy, x, sums, prefetcher);
            if (vectors == 2) update_panel<T, 2>(q, b, group, from, partition.count, dy, x, sums, prefetcher);
            if (vectors == 1) update_panel<T, 1>(q, b, group, from, partition.count, dy, x, sums, prefetcher);
        }
    }
}

// To a 1x1 kernel, an image is one row: rows are made as long as a block.
void lengthen_rows(ConvWeightGrad &p, int64_t pixels) {
    const int64_t area = p.in_h * p.in_w;
    p.in_w = min(area, pixels);
    while (area % p.in_w) --p.in_w;
    p.in_h = area / p.in_w;
    p.out_w = p.in_w, p.out_h = p.in_h;
}

template <class T> bool weight_gradient(const ConvWeightGrad &shape) {
    ConvWeightGrad p = shape;
    const int64_t group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
    const bool by_row = group_in % 16 != 0, pointwise = p.kernel_h == 1 && p.kernel_w == 1 && !by_row;
    const Problem q{p, group_in, group_out, by_row, pointwise, ceil_div(p.images, Cells<T>::images)};
    const int64_t x_elements = by_row ? q.padded() * p.stride_h : group_in * p.stride_h * p.stride_w;
    const int parts = channel_parts(q);
    const int64_t fit = kMaxOperandBytes / (int64_t(sizeof(float)) * (x_elements + group_out / parts));
    const int64_t pixels = min(max(fit, kMinBlockPixels), kMaxBlockPixels);
    if (pointwise && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0) lengthen_rows(p, pixels);
    const Partition partition(q, parts, pixels);

    const int64_t sums_row = q.sums_row(), size = p.out_channels * sums_row;
    BufferLayout layout;
    const int64_t sums_at = layout.add(size * partition.by_pixel), task_at = layout.size;
    const int64_t dy_at = layout.add(partition.units * partition.rows * p.out_w * partition.count);
    const int64_t x_pixels = partition.units * q.rows_in(partition.rows) * q.width_in();
    const int64_t x_at = layout.add(x_pixels * kMaxPanelVectors * vec::lanes);
    const int64_t task_size = layout.size - task_at;
    const Buffer buffer(task_at + p.tasks * task_size);
    if (buffer.data == nullptr) return false;
    float *all_sums = buffer.data + sums_at;

    auto work = [&](int task) {
        const int64_t channel_part = task % partition.by_channel;
        const int pixel_part = task / partition.by_channel;
        const Range mine = task_range(partition.blocks, pixel_part, partition.by_pixel);
        float *own = buffer.data + task * task_size;
        for (int64_t group = 0; group < p.groups; ++group) {
            const int64_t first_out = group * group_out + channel_part * partition.count;
            update_blocks<T>(q, partition, group, first_out, mine.begin, mine.end, own + dy_at, own + x_at,
                             all_sums + pixel_part * size + first_out * sums_row);
        }
    };
    each_task(p.tasks, work);

    // The padding of sums by row is left out of the result.
    const int64_t line = by_row ? q.elements() : sums_row, padded_line = by_row ? q.padded() : sums_row;
    auto finish = [&](int task) {
        const Range lines = task_range(size / padded_line, task, p.tasks);
        for (int64_t at = lines.begin; at < lines.end; ++at)
            each_vector(line, [&](int64_t offset, auto n) {
                const float *from = all_sums + at * padded_line + offset;
                vec total = load(from);
                for (int part = 1; part < partition.by_pixel; ++part) total += load(from + part * size);
                store(static_cast<T *>(p.dw) + at * line + offset, total, n);
            });
    };
    each_task(p.tasks, finish);
    return true;
}

}  // namespace

bool conv_weight_grad(const ConvWeightGrad &p) {
#if defined(__AVX512BF16__)
    if (p.is_bf16) return weight_gradient<bf16>(p);
#endif
    if (p.is_bf16) return false;
    if (p.in_channels / p.groups % 16 != 0 && p.groups == 1 && p.out_channels % 16 == 0) return stem_weight_grad(p);
    return weight_gradient<float>(p);
}

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
