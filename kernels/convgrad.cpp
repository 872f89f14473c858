// Weight gradients of convolutions as matrix products, in float32 and in bf16.
//
// dW[k][r][s][c] = sum over images and output pixels of dY[pixel][k] * X[pixel moved by (r, s)][c]. Packed, X and dY are
// made of cells of four bytes: a float32, or two bf16, the same pixel of two images, for the instruction of AVX512_BF16
// that multiplies pairs and adds both products to a float32. A shift by (r, s) moves both alike, and one packed copy of a
// block of X serves every position of the kernel.
//
// A task takes some output channels and some of the pixels. For a block of pixels it packs dY, then for each panel of
// input channels packs X and updates its float32 sums tile by tile: kTile output channels times one panel, in registers.
// The tasks that share output channels have sums of their own, added up in a fixed order at the end.
//
// Where channels are no multiple of 16 (an image has three), a position is a whole row of the kernel: its numbers lie
// next to each other in X. They are packed once for each output column, padded to whole vectors.
#include "isa.h"
#include "kernels.h"
#include "products.h"

namespace knltrain {
namespace KNLTRAIN_ISA {

bool stem_weight_grad(const ConvWeightGrad &);

namespace {

constexpr int kTile = vec::lanes / 2;    // output channels of a tile
constexpr int kMostVectors = 3;          // of a panel
constexpr int64_t kPixels = 384;         // in a block, at most; in bf16, of a pair of images
constexpr int64_t kBlockBytes = (kWide ? 640 : 320) << 10;  // of X and dY in a block: most of a second-level cache
constexpr int64_t kOwnSums = 320 << 10;  // bytes of sums up to which every task has its own
constexpr int64_t kChunk = 32;           // pixels between two looks ahead

// How numbers of a type become cells, of one image or of two, and what is done with these.
template <class T> struct Cells;

template <> struct Cells<float> {
    static constexpr int images = 1;
    static vec make(const float *one, const float *) { return load(one); }
    static vec multiply_add(vec x, float dy, vec sum) { return fma(x, splat(dy), sum); }
    // Each block has a sum of its own: one sum over all of them would round more.
    static vec begin(const float *) { return zero(); }
    static vec end(const float *sums, vec sum) { return load(sums) + sum; }
};

#if defined(__AVX512BF16__)
template <> struct Cells<bf16> {
    static constexpr int images = 2;
    static vec make(const bf16 *one, const bf16 *two) {
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(one));
        const __m256i high = two == nullptr ? _mm256_setzero_si256()
                                            : _mm256_loadu_si256(reinterpret_cast<const __m256i *>(two));
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
        return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both))};
    }
    static vec multiply_add(vec x, float dy, vec sum) {
        const __m512bh pairs = (__m512bh)_mm512_castps_si512(x.v), pair = (__m512bh)_mm512_castps_si512(splat(dy).v);
        return {_mm512_dpbf16_ps(sum.v, pairs, pair)};
    }
    // One sum over all blocks: rounding to bf16 takes more than that does.
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
    bool pointwise;               // a 1x1 kernel: only the rows and columns of X that it meets are packed
    int64_t units;                // images, or pairs of them
    // Numbers of X at a position, and those with padding to whole vectors.
    int64_t numbers() const { return by_row ? p.kernel_w * group_in : group_in; }
    int64_t padded() const { return ceil_div(numbers(), vec::lanes) * vec::lanes; }
    int64_t positions_w() const { return by_row ? 1 : p.kernel_w; }
    int64_t sums_row() const { return p.kernel_h * positions_w() * padded(); }
    // X of a block, and how far apart in it the pixels are that neighbouring outputs meet.
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

// One panel of X of a block, with the border that its kernel reaches: [unit][row][column][panel] cells.
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

// The same where a position is a row of the kernel: of its numbers, those from `first_in` on.
template <class T, int vectors> void pack_x_by_row(const Problem &q, const Block &b, int64_t first_in, float *to) {
    const ConvWeightGrad &p = q.p;
    const int64_t line = p.in_w * p.in_channels, image = p.in_h * line;
    for (int64_t unit = 0; unit < b.units; ++unit) {
        const int64_t n = Cells<T>::images * (b.unit + unit);
        const T *one = static_cast<const T *>(p.x) + n * image;
        const T *two = n + 1 < p.images ? one + image : nullptr;
        const int64_t readable = (p.images - n - (two != nullptr)) * image;  // numbers from these pointers on
        for (int64_t row = 0; row < q.rows_in(b.rows); ++row) {
            const int64_t in_row = b.row * p.stride_h + row - p.pad_h;
            const bool outside = in_row < 0 || in_row >= p.in_h;
            for (int64_t column = 0; column < p.out_w; ++column)
                for (int v = 0; v < vectors; ++v, to += vec::lanes) {
                    // In the row of the image, and in the vector, of which numbers [begin, end) are in that row. What is
                    // beyond the kernel's row goes to sums that nobody reads.
                    const int64_t at = (column * p.stride_w - p.pad_w) * p.in_channels + first_in + v * vec::lanes;
                    const int64_t wanted = least(vec::lanes, q.numbers() - first_in - v * vec::lanes);
                    const int64_t begin = most(0, -at), end = least(wanted, line - at), from = in_row * line + at;
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
                 Ahead &ahead) {
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
            for (int64_t chunk = 0; chunk < p.out_w; chunk += kChunk) {
                ahead.fetch();
                for (int64_t left = least(kChunk, p.out_w - chunk); left > 0; --left, from += step, dy += kTile) {
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
                  float *x, float *sums, Ahead &ahead) {
    const int64_t sums_row = q.sums_row(), dy_panel = b.units * b.rows * q.p.out_w * kTile;
    if (q.by_row)
        pack_x_by_row<T, vectors>(q, b, from, x);
    else
        pack_x<T, vectors>(q, b, group * q.group_in + from, x);
    for (int64_t position = 0; position < q.p.kernel_h * q.positions_w(); ++position) {
        const int64_t r = position / q.positions_w(), s = position % q.positions_w();
        const float *moved = x + (r * q.width_in() + s) * vectors * vec::lanes;
        for (int64_t tile = 0; tile < count / kTile; ++tile)
            update_tile<T, vectors>(q, b, moved, dy + tile * dy_panel,
                                    sums + tile * kTile * sums_row + position * q.padded() + from, sums_row, ahead);
    }
}

// Vectors of the next panel, where so many are left: three at a time, and no single one after them.
int vectors_of(int64_t left) { return left % 3 == 0 ? 3 : left == 1 ? 1 : 2; }

// How often update_tile looks ahead in a block.
int64_t looks(const Problem &q, const Block &b, int64_t count) {
    int64_t panels = 0;
    for (int64_t left = q.padded() / vec::lanes; left > 0; left -= vectors_of(left)) ++panels;
    return panels * q.p.kernel_h * q.positions_w() * (count / kTile) * b.units * b.rows * ceil_div(q.p.out_w, kChunk);
}

// The next block of a task, in lines of the cache. X of one group among several is not contiguous: it is left to the
// processor's own prefetching, and so is dY where tasks share it.
template <class T> Ahead look_ahead(const Problem &q, const Block &next, bool own_dy) {
    constexpr int together = Cells<T>::images;
    const ConvWeightGrad &p = q.p;
    Ahead ahead;
    const int64_t x_row = p.in_w * p.in_channels * sizeof(T), dy_row = p.out_w * p.out_channels * sizeof(T);
    const int64_t first = most(0, next.row * p.stride_h - p.pad_h);
    const int64_t rows = least(p.in_h - first, next.rows * p.stride_h);
    const bool whole = next.rows == p.out_h;
    for (int64_t n = together * next.unit; n < least(together * (next.unit + next.units), p.images);
         n += whole ? p.images : 1) {
        const int64_t images = whole ? least(together * next.units, p.images - n) : 1;
        const int64_t x_image = whole ? p.in_h * x_row : rows * x_row, dy_image = next.rows * dy_row;
        ahead.add(static_cast<const char *>(p.x) + (n * p.in_h + first) * x_row, images * x_image);
        if (own_dy) ahead.add(static_cast<const char *>(p.dy) + (n * p.out_h + next.row) * dy_row, images * dy_image);
    }
    return ahead;
}

// Tasks share the pixels while sums are small, else the output channels: into how many parts those go.
int channel_parts(const Problem &q) {
    const ConvWeightGrad &p = q.p;
    int parts = 1;
    if (p.out_channels * q.sums_row() * int64_t(sizeof(float)) > kOwnSums)
        for (parts = p.tasks; parts > 1; --parts)
            if (p.tasks % parts == 0 && q.group_out % (parts * kTile) == 0 && q.group_out / parts >= 64) break;
    return parts;
}

// How the work is cut: into blocks of at most so many pixels, or one row, and among tasks.
struct Cut {
    int by_channel, by_pixel;
    int64_t count;  // output channels of a task
    int64_t units, rows, row_blocks, blocks;

    Cut(const Problem &q, int by_channel, int64_t pixels)
        : by_channel(by_channel), by_pixel(q.p.tasks / by_channel), count(q.group_out / by_channel) {
        const ConvWeightGrad &p = q.p;
        rows = least(p.out_h, most(1, pixels / p.out_w));
        units = least(q.units, rows < p.out_h ? 1 : most(1, pixels / (p.out_h * p.out_w)));
        row_blocks = ceil_div(p.out_h, rows);
        blocks = ceil_div(q.units, units) * row_blocks;
    }
    Block block(const Problem &q, int64_t at) const {
        Block b{at / row_blocks * units, units, at % row_blocks * rows, rows};
        b.units = least(units, q.units - b.unit);
        b.rows = least(rows, q.p.out_h - b.row);
        return b;
    }
};

// Sums of the output channels from first_out on, over a task's blocks [begin, end).
template <class T>
void update_blocks(const Problem &q, const Cut &cut, int64_t group, int64_t first_out, int64_t begin, int64_t end,
                   float *dy, float *x, float *sums) {
    memset(sums, 0, cut.count * q.sums_row() * sizeof(float));
    for (int64_t at = begin; at < end; ++at) {
        const Block b = cut.block(q, at);
        Ahead ahead;
        if (q.p.groups == 1 && at + 1 < end) {
            ahead = look_ahead<T>(q, cut.block(q, at + 1), cut.by_channel == 1);
            ahead.quota = ceil_div(ahead.lines, looks(q, b, cut.count));
        }
        pack_dy<T>(q, b, first_out, cut.count, dy);
        int vectors = 0;
        for (int64_t from = 0; from < q.padded(); from += vectors * vec::lanes) {
            vectors = vectors_of((q.padded() - from) / vec::lanes);
            if (vectors == 3) update_panel<T, 3>(q, b, group, from, cut.count, dy, x, sums, ahead);
            if (vectors == 2) update_panel<T, 2>(q, b, group, from, cut.count, dy, x, sums, ahead);
            if (vectors == 1) update_panel<T, 1>(q, b, group, from, cut.count, dy, x, sums, ahead);
        }
    }
}

// A 1x1 kernel knows no rows: they are made as long as a block.
void lengthen_rows(ConvWeightGrad &p, int64_t pixels) {
    const int64_t area = p.in_h * p.in_w;
    p.in_w = least(area, pixels);
    while (area % p.in_w) --p.in_w;
    p.in_h = area / p.in_w;
    p.out_w = p.in_w, p.out_h = p.in_h;
}

template <class T> bool weight_gradient(const ConvWeightGrad &shape) {
    ConvWeightGrad p = shape;
    const int64_t group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
    const bool by_row = group_in % 16 != 0, pointwise = p.kernel_h == 1 && p.kernel_w == 1 && !by_row;
    const Problem q{p, group_in, group_out, by_row, pointwise, ceil_div(p.images, Cells<T>::images)};
    const int64_t x_numbers = by_row ? q.padded() * p.stride_h : group_in * p.stride_h * p.stride_w;
    const int parts = channel_parts(q);
    const int64_t fit = kBlockBytes / (int64_t(sizeof(float)) * (x_numbers + group_out / parts));
    const int64_t pixels = fit < kPixels ? most(fit, 256) : kPixels;
    if (pointwise && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0) lengthen_rows(p, pixels);
    const Cut cut(q, parts, pixels);

    const int64_t sums_row = q.sums_row(), size = p.out_channels * sums_row;
    const int64_t dy_numbers = ceil_div(cut.units * cut.rows * p.out_w * cut.count, 16) * 16;
    const int64_t x_block = cut.units * q.rows_in(cut.rows) * q.width_in() * kMostVectors * vec::lanes;
    const int64_t own = dy_numbers + ceil_div(x_block, 16) * 16, sums = ceil_div(size * cut.by_pixel, 16) * 16;
    float *memory = static_cast<float *>(aligned_alloc(64, (sums + p.tasks * own) * sizeof(float)));
    if (memory == nullptr) return false;

    auto work = [&](int task) {
        const int64_t channel_part = task % cut.by_channel, pixel_part = task / cut.by_channel;
        float *dy = memory + sums + task * own;
        for (int64_t group = 0; group < p.groups; ++group) {
            const int64_t first_out = group * group_out + channel_part * cut.count;
            update_blocks<T>(q, cut, group, first_out, cut.blocks * pixel_part / cut.by_pixel,
                             cut.blocks * (pixel_part + 1) / cut.by_pixel, dy, dy + dy_numbers,
                             memory + pixel_part * size + first_out * sums_row);
        }
    };
    each_task(p.tasks, work);

    // Rows of sums lose their padding on the way out.
    const int64_t line = by_row ? q.numbers() : sums_row, from_line = by_row ? q.padded() : sums_row;
    auto finish = [&](int task) {
        const int64_t lines = size / from_line;
        for (int64_t at = lines * task / p.tasks; at < lines * (task + 1) / p.tasks; ++at)
            each_vector(line, [&](int64_t offset, auto n) {
                const float *from = memory + at * from_line + offset;
                vec total = load(from);
                for (int part = 1; part < cut.by_pixel; ++part) total += load(from + part * size);
                store_first(static_cast<T *>(p.dw) + at * line + offset, total, n);
            });
    };
    each_task(p.tasks, finish);
    free(memory);
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
