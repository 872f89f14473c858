// Convolutions of float32 with a kernel of 1x1, as matrix products: pixels x inputs times inputs x outputs.
//
// A task takes some of the pixels. It packs a block of them, then multiplies it by two panels of outputs at a time, one
// with AVX2. Inputs are summed in parts of at most kMaxDepth, whose weights stay in the first-level cache for all
// pixels of the block.
//
// With a stride, only some pixels of the image are read. The gradient of the input is the same product with transposed
// weights, and zero in the other pixels.
#include "kernels.h"
#include "matmul.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

constexpr int64_t kMaxDepth = 256;
constexpr int64_t kMaxBlockRows = kMaxRows * (kIsAvx512 ? 30 : 60);
// With fewer rows a task than this, tasks divide the outputs too.
constexpr int64_t kMinTaskRows = 8 * kMaxRows;

// The pixels of x or y that take part, one after the other.
struct Pixels {
    int64_t rows, columns;  // of an image
    int64_t height, width, channels, stride_h, stride_w;
    int64_t offset(int64_t pixel) const {
        const int64_t image = pixel / (rows * columns), row = pixel / columns % rows, column = pixel % columns;
        return ((image * height + row * stride_h) * width + column * stride_w) * channels;
    }
};

// Weights as [panel of outputs][input][16], panels [begin, end).
void pack_weights(const Pointwise &p, int64_t begin, int64_t end, float *to) {
    const int64_t inputs = p.in_channels, outputs = p.out_channels;
    for (int64_t panel = begin; panel < end; ++panel)
        for (int64_t from = 0; from < inputs; from += kPanel) {
            float *lines = to + (panel * inputs + from) * kPanel;
            for (int i = 0; i < kPanel; ++i)
                for (int j = 0; j < kPanel; ++j)
                    lines[i * kPanel + j] = p.input_grad ? p.weight[(from + i) * outputs + panel * kPanel + j]
                                                         : p.weight[(panel * kPanel + j) * inputs + from + i];
        }
}

// A block of pixels, in tiles of as many as multiply() takes: [tile][panel][pixel][16].
void pack_pixels(const Pointwise &p, const int64_t *offsets, int64_t rows, float *to) {
    by_rows(rows, [&](auto count, int64_t row) {
        for (int64_t at = 0; at < p.in_channels; at += kPanel)
            for (int r = 0; r < count.value; ++r)
                for (int v = 0; v < kPanel; v += vec::lanes, to += vec::lanes)
                    store(to, load(p.x + offsets[row + r] + at + v));
    });
}

// A block of packed pixels.
struct Block {
    const float *a;
    int64_t rows;
    const int64_t *out_offsets;
};

// `panels` panels of outputs, from `panel` on, streamed past the caches or not.
template <int panels, bool streamed>
void multiply_block(const Pointwise &p, const Block &block, const float *weights, int64_t panel, float *sums,
                    const Statistics &statistics, Prefetcher &prefetcher) {
    const int64_t inputs = p.in_channels;
    for (int64_t from = 0; from < inputs; from += kMaxDepth) {
        const int64_t depth = min(kMaxDepth, inputs - from);
        const float *b = weights + (panel * inputs + from) * kPanel;
        const bool first = from == 0, last = from + depth == inputs;
        const bool with_statistics = last && statistics.shift != nullptr;
        by_rows(block.rows, [&](auto count, int64_t row) KNLTRAIN_INLINE {
            vec above[panels * kPanelVecs], squares[panels * kPanelVecs];
            for (int w = 0; w < panels * kPanelVecs; ++w) above[w] = squares[w] = zero();
            auto put = [&](int r, int w, vec sum) KNLTRAIN_INLINE {
                float *own = sums + ((row + r) * panels * kPanelVecs + w) * vec::lanes;
                const int64_t output = panel * kPanel + w * vec::lanes;
                if (!first) sum += load(own);
                if (!last) return store(own, sum);
                if (p.bias != nullptr) sum += load(p.bias + output);
                float *to = p.y + block.out_offsets[row + r] + output;
                streamed ? stream(to, sum) : store(to, sum);
                if (!with_statistics) return;
                const vec d = sum - load(statistics.shift + output);
                above[w] += d;
                squares[w] = fma(d, d, squares[w]);
            };
            multiply<count.value, panels>(block.a + row * inputs + from * count.value, count.value * kPanel, b,
                                          inputs * kPanel, depth, prefetcher, put);
            for (int w = 0; with_statistics && w < panels * kPanelVecs; ++w)
                statistics.add(panel * kPanel + w * vec::lanes, above[w], squares[w]);
        });
    }
}

template <bool streamed>
void multiply_panels(const Pointwise &p, const Block &block, const float *weights, Range outputs, float *sums,
                     const Statistics &statistics, Prefetcher &prefetcher) {
    int64_t panel = outputs.begin;
    for (; panel + kMaxPanels <= outputs.end; panel += kMaxPanels)
        multiply_block<kMaxPanels, streamed>(p, block, weights, panel, sums, statistics, prefetcher);
    for (; panel < outputs.end; ++panel)
        multiply_block<1, streamed>(p, block, weights, panel, sums, statistics, prefetcher);
}

}  // namespace

bool pointwise(const Pointwise &p) {
    const int64_t inputs = p.in_channels, panels = p.out_channels / kPanel;
    const int64_t stride_h = p.stride_h, stride_w = p.stride_w;
    const int64_t rows = p.input_grad ? p.in_h : p.out_h, columns = p.input_grad ? p.in_w : p.out_w;
    const int64_t pixels = p.images * rows * columns;
    const Pixels dense{rows, columns, rows, columns, p.input_grad ? inputs : p.out_channels, 1, 1};
    const Pixels strided = p.input_grad ? Pixels{rows, columns, p.out_h, p.out_w, p.out_channels, stride_h, stride_w}
                                        : Pixels{rows, columns, p.in_h, p.in_w, inputs, stride_h, stride_w};
    const Pixels &in = p.input_grad ? dense : strided, &out = p.input_grad ? strided : dense;
    const TaskGrid grid(p.tasks, pixels, panels, kMinTaskRows);
    const int64_t fit = kMaxOperandBytes / (int64_t(sizeof(float)) * (inputs + kMaxPanels * kPanel));
    const int64_t block_rows = grid.block_items(min(kMaxBlockRows, max(kMaxRows, fit / kMaxRows * kMaxRows)));

    BufferLayout layout;
    const int64_t weights_at = layout.add(inputs * p.out_channels), task_at = layout.size;
    const int64_t a_at = layout.add(inputs * block_rows), sums_at = layout.add(block_rows * kMaxPanels * kPanel);
    const int64_t statistics_at = layout.add(Statistics::size(p.out_channels));
    const int64_t offsets_at = layout.add(4 * block_rows), task_size = layout.size - task_at;
    const Buffer buffer(task_at + p.tasks * task_size);
    if (buffer.data == nullptr) return false;

    const int64_t size = p.images * p.out_h * p.out_w * p.out_channels;
    const bool streamed = is_aligned(p.y) && size * int64_t(sizeof(float)) > p.tasks * kStreamBytes;
    auto prepare = [&](int task) {
        const Range mine = task_range(panels, task, p.tasks), results = task_range(size, task, p.tasks);
        pack_weights(p, mine.begin, mine.end, buffer.data + weights_at);
        if (p.input_grad && stride_h * stride_w > 1)
            memset(p.y + results.begin, 0, (results.end - results.begin) * sizeof(float));
    };
    each_task(p.tasks, prepare);
    auto work = [&](int task) {
        float *own = buffer.data + task * task_size, *a = own + a_at;
        int64_t *from = reinterpret_cast<int64_t *>(own + offsets_at), *to = from + block_rows;
        const Range mine = grid.items_of(task), outputs = grid.panels_of(task);
        const Statistics statistics = Statistics::in(own + statistics_at, p.shift, p.out_channels);
        statistics.clear();
        for (int64_t first = mine.begin; first < mine.end; first += block_rows) {
            const int64_t count = min(block_rows, mine.end - first);
            for (int64_t row = 0; row < count; ++row)
                from[row] = in.offset(first + row), to[row] = out.offset(first + row);
            pack_pixels(p, from, count, a);
            Prefetcher prefetcher;
            const int64_t next = min(block_rows, mine.end - first - count);
            if (next > 0 && (p.input_grad || stride_h * stride_w == 1)) {
                prefetcher.add(p.x + in.offset(first + count), next * inputs * sizeof(float));
                prefetcher.spread_over(ceil_div(count, kMaxRows) * ceil_div(outputs.end - outputs.begin, kMaxPanels) *
                                       (inputs / kPanel));
            }
            const Block block{a, count, to};
            const auto multiply_all = streamed ? multiply_panels<true> : multiply_panels<false>;
            multiply_all(p, block, buffer.data + weights_at, outputs, own + sums_at, statistics, prefetcher);
            statistics.end_block();
        }
        if (streamed) store_fence();
    };
    each_task(p.tasks, work);
    if (p.shift != nullptr)
        Statistics::in(buffer.data + statistics_at, p.shift, p.out_channels)
            .finish(p.tasks, task_size, pixels, p.mean, p.var);
    return true;
}

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
