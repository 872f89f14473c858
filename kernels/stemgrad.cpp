// Weight gradients of convolutions of few input channels, as of images, in float32.
//
// The numbers of X that an output pixel meets, kernel_h rows of kernel_w * in_channels, fill no whole vectors; output
// channels do. So a vector of sums belongs to one number of the kernel and to as many output channels as it has lanes, and
// adds up vectors of dY times single numbers of X. X is read where it lies, or from a copy with its border of zeros.
//
// A task takes some of the output rows, a block of them at a time, which stays in the caches while it is met by all numbers
// of the kernel. Its sums over a block are added to those over all its blocks; these are added up in a fixed order.
#include "isa.h"
#include "kernels.h"
#include "products.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

constexpr int64_t kBlockBytes = 96 << 10;  // of dY in a block, or one row
constexpr int kAhead = 16;                 // pixels: the first-level cache holds no block

struct Problem {
    const ConvWeightGrad &p;
    int64_t numbers;    // of the kernel
    int64_t line;       // numbers between two rows of X, or of its copy
    int64_t rows;       // output rows in a block, of one image
    int64_t row_blocks, blocks;

    explicit Problem(const ConvWeightGrad &p)
        : p(p),
          numbers(p.kernel_h * p.kernel_w * p.in_channels),
          line((p.in_w + 2 * p.pad_w) * p.in_channels),
          rows(least(p.out_h, most(1, kBlockBytes / (p.out_w * p.out_channels * int64_t(sizeof(float)))))),
          row_blocks(ceil_div(p.out_h, rows)),
          blocks(p.images * row_blocks) {}
    bool is_bordered() const { return p.pad_h > 0 || p.pad_w > 0; }
    int64_t rows_in(int64_t count) const { return (count - 1) * p.stride_h + p.kernel_h; }
    // Where the kernel's numbers lie, seen from the first.
    int64_t offset(int64_t number) const {
        const int64_t row = p.kernel_w * p.in_channels;
        return number / row * line + number % row;
    }
};

// Output rows [row, row + rows) of an image.
struct Block {
    int64_t image, row, rows;
    Block(const Problem &q, int64_t at)
        : image(at / q.row_blocks), row(at % q.row_blocks * q.rows), rows(least(q.rows, q.p.out_h - row)) {}
};

// The rows of X that a block meets, with zeros around the image.
void copy_rows(const Problem &q, const Block &b, float *to) {
    const ConvWeightGrad &p = q.p;
    const int64_t row_numbers = p.in_w * p.in_channels, border = p.pad_w * p.in_channels;
    const float *image = static_cast<const float *>(p.x) + b.image * p.in_h * row_numbers;
    for (int64_t row = 0; row < q.rows_in(b.rows); ++row, to += q.line) {
        const int64_t in_row = b.row * p.stride_h + row - p.pad_h;
        if (in_row < 0 || in_row >= p.in_h) {
            memset(to, 0, q.line * sizeof(float));
            continue;
        }
        memset(to, 0, border * sizeof(float));
        memcpy(to + border, image + in_row * row_numbers, row_numbers * sizeof(float));
        memset(to + border + row_numbers, 0, border * sizeof(float));
    }
}

// Adds to the sums of `count` numbers from the first on, and of `vectors` vectors of output channels.
template <int vectors, int together>
void update(const Problem &q, const Block &b, const float *x, const float *dy, int64_t first, float *sums) {
    const ConvWeightGrad &p = q.p;
    const int64_t count = least(together, q.numbers - first), step = p.stride_w * p.in_channels;
    int64_t offset[together];
    for (int n = 0; n < together; ++n) offset[n] = q.offset(first + least(n, count - 1));
    vec sum[together][vectors];
    for (int n = 0; n < together; ++n)
        for (int v = 0; v < vectors; ++v) sum[n][v] = zero();
    for (int64_t row = 0; row < b.rows; ++row) {
        const float *from = x + row * p.stride_h * q.line;
        for (int64_t column = 0; column < p.out_w; ++column, from += step, dy += p.out_channels) {
            vec gradient[vectors];
            for (int v = 0; v < vectors; ++v) {
                gradient[v] = load(dy + v * vec::lanes);
                _mm_prefetch(reinterpret_cast<const char *>(dy + kAhead * p.out_channels + v * vec::lanes), _MM_HINT_T0);
            }
            for (int n = 0; n < together; ++n) {
                const vec number = splat(from[offset[n]]);
                for (int v = 0; v < vectors; ++v) sum[n][v] = fma(number, gradient[v], sum[n][v]);
            }
        }
    }
    for (int n = 0; n < together; ++n)
        for (int v = 0; n < count && v < vectors; ++v) {
            float *to = sums + n * p.out_channels + v * vec::lanes;
            store(to, load(to) + sum[n][v]);
        }
}

template <int vectors, int together> void update_block(const Problem &q, const Block &b, const float *x, float *sums) {
    const ConvWeightGrad &p = q.p;
    const float *dy = static_cast<const float *>(p.dy) + (b.image * p.out_h + b.row) * p.out_w * p.out_channels;
    for (int64_t output = 0; output < p.out_channels; output += vectors * vec::lanes)
        for (int64_t first = 0; first < q.numbers; first += together)
            update<vectors, together>(q, b, x, dy + output, first, sums + first * p.out_channels + output);
}

void update_block(const Problem &q, const Block &b, const float *x, float *sums) {
    // As many sums as the registers hold beside their factors; nine numbers go into a kernel of 3x3 of an image.
    if (q.p.out_channels % (3 * vec::lanes) == 0)
        update_block<3, kWide ? 8 : 4>(q, b, x, sums);
    else if (q.p.out_channels % (2 * vec::lanes) == 0)
        update_block<2, kWide ? 9 : 6>(q, b, x, sums);
    else
        update_block<1, kWide ? 16 : 12>(q, b, x, sums);
}

}  // namespace

// Output channels: a multiple of 16; one group.
bool stem_weight_grad(const ConvWeightGrad &p) {
    const Problem q(p);
    Memory memory;
    const int64_t size = q.numbers * p.out_channels, sums_at = memory.add(size);
    const int64_t x_at = memory.add(q.is_bordered() ? q.rows_in(q.rows) * q.line : 0);
    float *base = static_cast<float *>(aligned_alloc(kLine, p.tasks * memory.numbers * sizeof(float)));
    if (base == nullptr) return false;

    auto work = [&](int task) {
        float *own = base + task * memory.numbers, *sums = own + sums_at, *copy = own + x_at;
        memset(sums, 0, size * sizeof(float));
        for (int64_t at = q.blocks * task / p.tasks; at < q.blocks * (task + 1) / p.tasks; ++at) {
            const Block b(q, at);
            const float *x = static_cast<const float *>(p.x) + (b.image * p.in_h + b.row * p.stride_h) * q.line;
            if (q.is_bordered()) copy_rows(q, b, copy);
            update_block(q, b, q.is_bordered() ? copy : x, sums);
        }
    };
    each_task(p.tasks, work);

    auto finish = [&](int task) {
        float *dw = static_cast<float *>(p.dw);
        for (int64_t output = p.out_channels * task / p.tasks; output < p.out_channels * (task + 1) / p.tasks; ++output)
            for (int64_t number = 0; number < q.numbers; ++number) {
                float total = 0;
                for (int part = 0; part < p.tasks; ++part)
                    total += base[part * memory.numbers + sums_at + number * p.out_channels + output];
                dw[output * q.numbers + number] = total;
            }
    };
    each_task(p.tasks, finish);
    free(base);
    return true;
}

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
