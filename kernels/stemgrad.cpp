// Weight gradients of convolutions of few input channels, as of images, in float32.
//
// The elements of X under a kernel, kernel_h rows of kernel_w * in_channels, fill no whole vectors; output channels do.
// So a vector of sums is of one element of the kernel and of as many output channels as it has lanes, and sums vectors
// of dY times single elements of X. X is read in place, or from a copy with its border of zeros.
//
// A task takes some of the output rows, a block of them at a time, which stays in the caches for all elements of the
// kernel. Its sums over a block are added to those over its other blocks; those of all tasks are added up in a fixed
// order.
#include "common.h"
#include "kernels.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

constexpr int64_t kMaxBlockBytes = 96 << 10;  // of dY in a block, unless one row is more
constexpr int kPrefetchDistance = 16;         // pixels; a block is larger than the first-level cache

struct Problem {
    const ConvWeightGrad &p;
    int64_t elements;   // of the kernel, for one output channel
    int64_t line;       // elements between two rows of X, or of its copy
    int64_t rows;       // output rows in a block, of one image
    int64_t row_blocks, blocks;

    explicit Problem(const ConvWeightGrad &p)
        : p(p),
          elements(p.kernel_h * p.kernel_w * p.in_channels),
          line((p.in_w + 2 * p.pad_w) * p.in_channels),
          rows(min(p.out_h, max(1, kMaxBlockBytes / (p.out_w * p.out_channels * int64_t(sizeof(float)))))),
          row_blocks(ceil_div(p.out_h, rows)),
          blocks(p.images * row_blocks) {}
    bool is_bordered() const { return p.pad_h > 0 || p.pad_w > 0; }
    int64_t rows_in(int64_t count) const { return (count - 1) * p.stride_h + p.kernel_h; }
    // From the kernel's first element in X to another.
    int64_t offset(int64_t element) const {
        const int64_t row = p.kernel_w * p.in_channels;
        return element / row * line + element % row;
    }
};

// Output rows [row, row + rows) of an image.
struct Block {
    int64_t image, row, rows;
    Block(const Problem &q, int64_t at)
        : image(at / q.row_blocks), row(at % q.row_blocks * q.rows), rows(min(q.rows, q.p.out_h - row)) {}
};

// The rows of X that a block reads, with zeros around the image.
void copy_rows(const Problem &q, const Block &b, float *to) {
    const ConvWeightGrad &p = q.p;
    const int64_t row_elements = p.in_w * p.in_channels, border = p.pad_w * p.in_channels;
    const float *image = static_cast<const float *>(p.x) + b.image * p.in_h * row_elements;
    for (int64_t row = 0; row < q.rows_in(b.rows); ++row, to += q.line) {
        const int64_t in_row = b.row * p.stride_h + row - p.pad_h;
        if (in_row < 0 || in_row >= p.in_h) {
            memset(to, 0, q.line * sizeof(float));
            continue;
        }
        memset(to, 0, border * sizeof(float));
        memcpy(to + border, image + in_row * row_elements, row_elements * sizeof(float));
        memset(to + border + row_elements, 0, border * sizeof(float));
    }
}

// Adds to the sums of up to `together` elements from the first on, and of `vectors` vectors of output channels.
template <int vectors, int together>
void update(const Problem &q, const Block &b, const float *x, const float *dy, int64_t first, float *sums) {
    const ConvWeightGrad &p = q.p;
    const int64_t count = min(together, q.elements - first), step = p.stride_w * p.in_channels;
    int64_t offset[together];
    for (int n = 0; n < together; ++n) offset[n] = q.offset(first + min(n, count - 1));
    vec sum[together][vectors];
    for (int n = 0; n < together; ++n)
        for (int v = 0; v < vectors; ++v) sum[n][v] = zero();
    for (int64_t row = 0; row < b.rows; ++row) {
        const float *from = x + row * p.stride_h * q.line;
        for (int64_t column = 0; column < p.out_w; ++column, from += step, dy += p.out_channels) {
            vec gradient[vectors];
            for (int v = 0; v < vectors; ++v) {
                gradient[v] = load(dy + v * vec::lanes);
                prefetch_l1(dy + kPrefetchDistance * p.out_channels + v * vec::lanes);
            }
            for (int n = 0; n < together; ++n) {
                const vec element = splat(from[offset[n]]);
                for (int v = 0; v < vectors; ++v) sum[n][v] = fma(element, gradient[v], sum[n][v]);
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
        for (int64_t first = 0; first < q.elements; first += together)
            update<vectors, together>(q, b, x, dy + output, first, sums + first * p.out_channels + output);
}

void update_block(const Problem &q, const Block &b, const float *x, float *sums) {
    // As many sums as the registers hold beside their factors. Nine divide a kernel of 3x3 of an image.
    if (q.p.out_channels % (3 * vec::lanes) == 0)
        update_block<3, kIsAvx512 ? 8 : 4>(q, b, x, sums);
    else if (q.p.out_channels % (2 * vec::lanes) == 0)
        update_block<2, kIsAvx512 ? 9 : 6>(q, b, x, sums);
    else
        update_block<1, kIsAvx512 ? 16 : 12>(q, b, x, sums);
}

}  // namespace

// Output channels: a multiple of 16; one group.
bool stem_weight_grad(const ConvWeightGrad &p) {
    const Problem q(p);
    BufferLayout layout;
    const int64_t size = q.elements * p.out_channels, sums_at = layout.add(size);
    const int64_t x_at = layout.add(q.is_bordered() ? q.rows_in(q.rows) * q.line : 0);
    const Buffer buffer(p.tasks * layout.size);
    if (buffer.data == nullptr) return false;

    auto work = [&](int task) {
        float *own = buffer.data + task * layout.size, *sums = own + sums_at, *copy = own + x_at;
        memset(sums, 0, size * sizeof(float));
        const Range mine = task_range(q.blocks, task, p.tasks);
        for (int64_t at = mine.begin; at < mine.end; ++at) {
            const Block b(q, at);
            const float *x = static_cast<const float *>(p.x) + (b.image * p.in_h + b.row * p.stride_h) * q.line;
            if (q.is_bordered()) copy_rows(q, b, copy);
            update_block(q, b, q.is_bordered() ? copy : x, sums);
        }
    };
    each_task(p.tasks, work);

    auto finish = [&](int task) {
        float *dw = static_cast<float *>(p.dw);
        const Range mine = task_range(p.out_channels, task, p.tasks);
        for (int64_t output = mine.begin; output < mine.end; ++output)
            for (int64_t element = 0; element < q.elements; ++element) {
                float total = 0;
                for (int part = 0; part < p.tasks; ++part)
                    total += buffer.data[part * layout.size + sums_at + element * p.out_channels + output];
                dw[output * q.elements + element] = total;
            }
    };
    each_task(p.tasks, finish);
    return true;
}

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
