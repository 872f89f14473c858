// Weight gradients of bf16 convolutions as matrix products, with the dot products of AVX512_BF16.
//
// dW[k][r][s][c] = sum over images and output pixels of dY[pixel][k] * X[pixel moved by (r, s)][c]. The instruction
// multiplies pairs and adds both products to a float32, so the sum runs over pairs: here the same pixel of two images.
// A shift by (r, s) then moves both alike, and one packed copy of a block of X serves every position of the kernel.
//
// A task takes some output channels and some of the pixels. For a block of pixels it packs dY, then for each panel of
// input channels packs X and updates its float32 sums tile by tile: kTile output channels times one panel, in registers.
// The tasks that share output channels have sums of their own, added up in a fixed order at the end.
#include <cstdlib>

#include "isa.h"
#include "kernels.h"

namespace knltrain {
namespace KNLTRAIN_ISA {

#if defined(__AVX512BF16__)

namespace {

constexpr int kTile = 8;                 // output channels of a tile
constexpr int64_t kPixels = 384;         // pairs of pixels in a block, at most
constexpr int64_t kBlockBytes = 640 << 10;  // of X and dY in a block: what a second-level cache holds beside the rest
constexpr int64_t kOwnSums = 320 << 10;  // bytes of sums up to which every task has its own
constexpr int64_t kChunk = 32;           // pixels between two looks ahead

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sixteen channels of two images, a pair to each lane.
inline __m512i pair_up(const bf16 *first, const bf16 *second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(first));
    const __m256i high = second == nullptr ? _mm256_setzero_si256()
                                           : _mm256_loadu_si256(reinterpret_cast<const __m256i *>(second));
    return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

// Fetches the next block's lines while this one is computed: packing then finds them in the cache.
struct Ahead {
    const char *at[4], *end[4];
    int ranges = 0, range = 0;
    int64_t lines = 0, quota = 0;
    void add(const void *from, int64_t bytes) {
        at[ranges] = static_cast<const char *>(from);
        end[ranges++] = static_cast<const char *>(from) + bytes;
        lines += bytes / 64;
    }
    void fetch() {
        for (int64_t n = 0; n < quota && range < ranges; ++n) {
            _mm_prefetch(at[range], _MM_HINT_T1);
            if ((at[range] += 64) >= end[range]) ++range;
        }
    }
};

// Output rows [row, row + rows) of the image pairs [pair, pair + pairs).
struct Block {
    int64_t pair, pairs, row, rows;
};

struct Problem {
    const ConvWeightGrad &p;
    int64_t group_in, group_out;  // channels of a group
    bool pointwise;               // a 1x1 kernel: X is sampled while it is packed, and has no border
    int64_t image_pairs;
    int64_t rows_in(int64_t rows) const { return pointwise ? rows : (rows - 1) * p.stride_h + p.kernel_h; }
    int64_t width_in() const { return pointwise ? p.out_w : (p.out_w - 1) * p.stride_w + p.kernel_w; }
};

// dY of a block: [tile][pair of images][row][column][kTile] pairs.
void pack_dy(const Problem &q, const Block &b, int64_t first_out, int64_t count, bf16 *packed) {
    const ConvWeightGrad &p = q.p;
    const bf16 *dy = static_cast<const bf16 *>(p.dy);
    const int64_t image = p.out_h * p.out_w * p.out_channels, pixels = b.rows * p.out_w;
    const int64_t panel = b.pairs * pixels * kTile * 2;
    for (int64_t pair = 0; pair < b.pairs; ++pair) {
        const int64_t n = 2 * (b.pair + pair);
        const bf16 *one = dy + n * image + b.row * p.out_w * p.out_channels + first_out;
        const bf16 *two = n + 1 < p.images ? one + image : nullptr;
        bf16 *to = packed + pair * pixels * kTile * 2;
        for (int64_t pixel = 0; pixel < pixels; ++pixel) {
            const int64_t at = pixel * p.out_channels;
            int64_t k = 0;
            for (; k + 16 <= count; k += 16) {
                const __m512i pairs = pair_up(one + at + k, two == nullptr ? nullptr : two + at + k);
                bf16 *tile = to + k / kTile * panel + pixel * kTile * 2;
                _mm256_storeu_si256(reinterpret_cast<__m256i *>(tile), _mm512_castsi512_si256(pairs));
                _mm256_storeu_si256(reinterpret_cast<__m256i *>(tile + panel), _mm512_extracti64x4_epi64(pairs, 1));
            }
            for (; k < count; ++k) {
                bf16 *tile = to + k / kTile * panel + (pixel * kTile + k % kTile) * 2;
                tile[0] = one[at + k];
                tile[1] = two == nullptr ? bf16{0} : two[at + k];
            }
        }
    }
}

// One panel of X of a block, with the border that its kernel reaches: [pair of images][row][column][width] pairs.
template <int vectors> void pack_x(const Problem &q, const Block &b, int64_t first_in, bf16 *packed) {
    const ConvWeightGrad &p = q.p;
    const bf16 *x = static_cast<const bf16 *>(p.x);
    const int64_t image = p.in_h * p.in_w * p.in_channels;
    const int64_t step_h = q.pointwise ? p.stride_h : 1, step_w = q.pointwise ? p.stride_w : 1;
    __m512i *to = reinterpret_cast<__m512i *>(packed);
    for (int64_t pair = 0; pair < b.pairs; ++pair) {
        const int64_t n = 2 * (b.pair + pair);
        const bf16 *one = x + n * image + first_in;
        const bf16 *two = n + 1 < p.images ? one + image : nullptr;
        for (int64_t row = 0; row < q.rows_in(b.rows); ++row) {
            const int64_t in_row = (q.pointwise ? b.row + row : b.row * p.stride_h + row) * step_h - p.pad_h;
            for (int64_t column = 0; column < q.width_in(); ++column, to += vectors) {
                const int64_t in_column = column * step_w - p.pad_w;
                const bool outside = in_row < 0 || in_row >= p.in_h || in_column < 0 || in_column >= p.in_w;
                const int64_t at = (in_row * p.in_w + in_column) * p.in_channels;
                for (int v = 0; v < vectors; ++v)
                    _mm512_storeu_si512(to + v, outside ? _mm512_setzero_si512()
                                                        : pair_up(one + at + 16 * v,
                                                                  two == nullptr ? nullptr : two + at + 16 * v));
            }
        }
    }
}

// Adds one block's products to a tile of sums: kTile rows, `vectors` vectors of a row.
template <int vectors>
void update_tile(const Problem &q, const Block &b, const bf16 *x, const bf16 *dy, float *sums, int64_t sums_row,
                 Ahead &ahead) {
    const ConvWeightGrad &p = q.p;
    const int64_t step = (q.pointwise ? 1 : p.stride_w) * vectors * 32;
    const int64_t row_step = (q.pointwise ? 1 : p.stride_h) * q.width_in() * vectors * 32;
    const int64_t pair_step = q.rows_in(b.rows) * q.width_in() * vectors * 32;
    __m512 acc[kTile][vectors];
    for (int k = 0; k < kTile; ++k)
        for (int v = 0; v < vectors; ++v) acc[k][v] = _mm512_loadu_ps(sums + k * sums_row + 16 * v);
    for (int64_t pair = 0; pair < b.pairs; ++pair) {
        for (int64_t row = 0; row < b.rows; ++row) {
            const bf16 *from = x + pair * pair_step + row * row_step;
            for (int64_t chunk = 0; chunk < p.out_w; chunk += kChunk) {
                ahead.fetch();
                for (int64_t left = least(kChunk, p.out_w - chunk); left > 0; --left, from += step, dy += kTile * 2) {
                    __m512bh xs[vectors];
                    for (int v = 0; v < vectors; ++v) xs[v] = (__m512bh)_mm512_loadu_si512(from + 32 * v);
                    for (int k = 0; k < kTile; ++k) {
                        int both;
                        memcpy(&both, dy + 2 * k, sizeof both);
                        const __m512bh gradient = (__m512bh)_mm512_set1_epi32(both);
                        for (int v = 0; v < vectors; ++v) acc[k][v] = _mm512_dpbf16_ps(acc[k][v], xs[v], gradient);
                    }
                }
            }
        }
    }
    for (int k = 0; k < kTile; ++k)
        for (int v = 0; v < vectors; ++v) _mm512_storeu_ps(sums + k * sums_row + 16 * v, acc[k][v]);
}

// All panels of one width of a block, for the output channels [first_out, first_out + count) of a group.
template <int vectors>
void update_panel(const Problem &q, const Block &b, int64_t group, int64_t from, int64_t count, const bf16 *dy, bf16 *x,
                  float *sums, Ahead &ahead) {
    const ConvWeightGrad &p = q.p;
    const int64_t positions = p.kernel_h * p.kernel_w, sums_row = positions * q.group_in;
    const int64_t dy_panel = b.pairs * b.rows * p.out_w * kTile * 2;
    pack_x<vectors>(q, b, group * q.group_in + from, x);
    for (int64_t position = 0; position < positions; ++position) {
        const int64_t r = position / p.kernel_w, s = position % p.kernel_w;
        const bf16 *moved = x + (r * q.width_in() + s) * vectors * 32;
        for (int64_t tile = 0; tile < count / kTile; ++tile)
            update_tile<vectors>(q, b, moved, dy + tile * dy_panel,
                                 sums + tile * kTile * sums_row + position * q.group_in + from, sums_row, ahead);
    }
}

// The next block of a task, in lines of the cache. X of one group among several is not contiguous: it is left to the
// processor's own prefetching, and so is dY where tasks share it.
Ahead look_ahead(const Problem &q, const Block &next, bool own_dy) {
    const ConvWeightGrad &p = q.p;
    Ahead ahead;
    const int64_t x_row = p.in_w * p.in_channels * 2, dy_row = p.out_w * p.out_channels * 2;
    const int64_t first = next.row * p.stride_h > p.pad_h ? next.row * p.stride_h - p.pad_h : 0;
    const int64_t rows = least(p.in_h - first, next.rows * p.stride_h);
    const bool whole = next.rows == p.out_h;
    for (int64_t n = 2 * next.pair; n < least(2 * (next.pair + next.pairs), p.images); n += whole ? p.images : 1) {
        const int64_t images = whole ? least(2 * next.pairs, p.images - n) : 1;
        const int64_t x_image = whole ? p.in_h * x_row : rows * x_row, dy_image = next.rows * dy_row;
        ahead.add(static_cast<const char *>(p.x) + (n * p.in_h + first) * x_row, images * x_image);
        if (own_dy) ahead.add(static_cast<const char *>(p.dy) + (n * p.out_h + next.row) * dy_row, images * dy_image);
    }
    return ahead;
}

}  // namespace

bool conv_weight_grad(const ConvWeightGrad &shape) {
    ConvWeightGrad p = shape;
    const int64_t group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
    const int64_t row = p.kernel_h * p.kernel_w * group_in, size = p.out_channels * row;

    // Tasks share the pixels while sums are small, else the output channels.
    int by_channel = 1;
    if (size * int64_t(sizeof(float)) > kOwnSums)
        for (by_channel = p.tasks; by_channel > 1; --by_channel)
            if (p.tasks % by_channel == 0 && group_out % (by_channel * kTile) == 0 && group_out / by_channel >= 64) break;
    const int by_pixel = p.tasks / by_channel;
    const int64_t count = group_out / by_channel;

    const int64_t fit = kBlockBytes / (4 * (group_in * p.stride_h * p.stride_w + count));
    const int64_t pixels = fit < kPixels ? fit > 256 ? fit : 256 : kPixels;
    if (p.kernel_h == 1 && p.kernel_w == 1 && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0) {
        // Rows mean nothing to such a kernel: they are made as long as a block.
        const int64_t area = p.in_h * p.in_w;
        p.in_w = least(area, pixels);
        while (area % p.in_w) --p.in_w;
        p.in_h = area / p.in_w;
        p.out_w = p.in_w, p.out_h = p.in_h;
    }
    const Problem q{p, group_in, group_out, p.kernel_h == 1 && p.kernel_w == 1, ceil_div(p.images, 2)};
    const int64_t block_rows = least(p.out_h, pixels / p.out_w > 1 ? pixels / p.out_w : 1);
    const int64_t fitting = block_rows < p.out_h ? 1 : pixels / (p.out_h * p.out_w);
    const int64_t pairs = least(q.image_pairs, fitting > 1 ? fitting : 1);
    const int64_t row_blocks = ceil_div(p.out_h, block_rows), blocks = ceil_div(q.image_pairs, pairs) * row_blocks;
    auto block = [&](int64_t at) {
        Block b{at / row_blocks * pairs, pairs, at % row_blocks * block_rows, block_rows};
        b.pairs = least(pairs, q.image_pairs - b.pair);
        b.rows = least(block_rows, p.out_h - b.row);
        return b;
    };

    const int64_t dy_bytes = ceil_div(pairs * block_rows * p.out_w * count * 4, 64) * 64;
    const int64_t x_bytes = pairs * q.rows_in(block_rows) * q.width_in() * 48 * 4;
    const int64_t sum_bytes = ceil_div(size * by_pixel * 4, 64) * 64;
    char *memory = static_cast<char *>(aligned_alloc(64, sum_bytes + p.tasks * (dy_bytes + x_bytes)));
    if (memory == nullptr) return false;

    auto work = [&](int task) {
        const int64_t channel_part = task % by_channel, pixel_part = task / by_channel;
        float *sums = reinterpret_cast<float *>(memory) + pixel_part * size;
        bf16 *dy = reinterpret_cast<bf16 *>(memory + sum_bytes + task * (dy_bytes + x_bytes));
        bf16 *x = dy + dy_bytes / 2;
        const int64_t begin = blocks * pixel_part / by_pixel, end = blocks * (pixel_part + 1) / by_pixel;
        for (int64_t group = 0; group < p.groups; ++group) {
            const int64_t first_out = group * group_out + channel_part * count;
            float *own = sums + first_out * row;
            memset(own, 0, count * row * sizeof(float));
            for (int64_t at = begin; at < end; ++at) {
                const Block b = block(at);
                const int vectors = group_in % 48 == 0 ? 3 : group_in % 32 == 0 ? 2 : 1;
                Ahead ahead;
                if (p.groups == 1 && at + 1 < end) {
                    ahead = look_ahead(q, block(at + 1), by_channel == 1);
                    const int64_t looks = row / (16 * vectors) * (count / kTile) * b.pairs * b.rows *
                                          ceil_div(p.out_w, kChunk);
                    ahead.quota = ceil_div(ahead.lines, looks);
                }
                pack_dy(q, b, first_out, count, dy);
                for (int64_t from = 0; from < group_in; from += 16 * vectors) {
                    if (vectors == 3) update_panel<3>(q, b, group, from, count, dy, x, own, ahead);
                    if (vectors == 2) update_panel<2>(q, b, group, from, count, dy, x, own, ahead);
                    if (vectors == 1) update_panel<1>(q, b, group, from, count, dy, x, own, ahead);
                }
            }
        }
    };
    each_task(p.tasks, work);

    auto finish = [&](int task) {
        const float *sums = reinterpret_cast<float *>(memory);
        const int64_t begin = size / 16 * task / p.tasks * 16, end = size / 16 * (task + 1) / p.tasks * 16;
        for (int64_t at = begin; at < end; at += 16) {
            vec total = load(sums + at);
            for (int part = 1; part < by_pixel; ++part) total += load(sums + part * size + at);
            if (p.to_bf16)
                store(static_cast<bf16 *>(p.dw) + at, total);
            else
                store(static_cast<float *>(p.dw) + at, total);
        }
    };
    each_task(p.tasks, finish);
    free(memory);
    return true;
}

#else

bool conv_weight_grad(const ConvWeightGrad &) { return false; }

#endif

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
