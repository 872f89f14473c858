// Convolutions of float32 with a kernel of 1x1, as matrix products: pixels x inputs times inputs x outputs.
//
// A task takes some of the pixels. It packs a block of them, then multiplies it with two panels of outputs (one with AVX2)
// after the other. Inputs are summed in parts of at most kDepth: their weights stay in the first-level cache while all
// pixels of the block pass.
//
// With a stride, only every other pixel of the image is met. The gradient of the input is the same product with turned
// weights; there what is not met is zero.
#include "isa.h"
#include "kernels.h"
#include "products.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

constexpr int64_t kDepth = 256;
constexpr int64_t kBlockBytes = (kWide ? 640 : 320) << 10;  // of a block of pixels: most of a second-level cache
// What a task writes beyond this leaves its share of the caches before it is needed: it goes around them, which saves the
// read that a store to an uncached line begins with.
constexpr int64_t kStreamBytes = 8 << 20;
constexpr int64_t kMostRows = kRows * (kWide ? 30 : 60), kEnoughRows = 8 * kRows;

// The pixels that a kernel meets in a map, one after the other.
struct Pixels {
    int64_t rows, columns;  // that it meets in an image
    int64_t height, width, channels, stride_h, stride_w;
    int64_t place(int64_t pixel) const {
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
                    lines[i * kPanel + j] = p.turned ? p.weight[(from + i) * outputs + panel * kPanel + j]
                                                     : p.weight[(panel * kPanel + j) * inputs + from + i];
        }
}

// A block of pixels, as many together as are multiplied together: [panel][pixel][16] of each such tile.
void pack_pixels(const Pointwise &p, const int64_t *places, int64_t rows, float *to) {
    by_rows(rows, [&](auto count, int64_t row) {
        for (int64_t at = 0; at < p.in_channels; at += kPanel)
            for (int r = 0; r < count.count; ++r)
                for (int v = 0; v < kPanel; v += vec::lanes, to += vec::lanes)
                    store(to, load(p.x + places[row + r] + at + v));
    });
}

// What is multiplied: a block of packed pixels.
struct Block {
    const float *a;
    int64_t rows;
    const int64_t *places;  // of their outputs
};

// Outputs of `panels` panels, from `panel` on. Streamed, they go around the caches.
template <int panels, bool streamed>
void multiply_block(const Pointwise &p, const Block &block, const float *weights, int64_t panel, float *sums,
                    const Statistics &statistics, Ahead &ahead) {
    const int64_t inputs = p.in_channels;
    for (int64_t from = 0; from < inputs; from += kDepth) {
        const int64_t depth = least(kDepth, inputs - from);
        const float *b = weights + (panel * inputs + from) * kPanel;
        const bool first = from == 0, last = from + depth == inputs;
        const bool counted = last && statistics.shift != nullptr;
        by_rows(block.rows, [&](auto count, int64_t row) KNLTRAIN_INLINE {
            vec above[panels * kVectors], squares[panels * kVectors];
            for (int w = 0; w < panels * kVectors; ++w) above[w] = squares[w] = zero();
            auto put = [&](int r, int w, vec sum) KNLTRAIN_INLINE {
                float *own = sums + ((row + r) * panels * kVectors + w) * vec::lanes;
                const int64_t output = panel * kPanel + w * vec::lanes;
                if (!first) sum += load(own);
                if (!last) return store(own, sum);
                if (p.bias != nullptr) sum += load(p.bias + output);
                float *to = p.y + block.places[row + r] + output;
                streamed ? stream(to, sum) : store(to, sum);
                if (!counted) return;
                const vec d = sum - load(statistics.shift + output);
                above[w] += d;
                squares[w] = fma(d, d, squares[w]);
            };
            multiply<count.count, panels>(block.a + row * inputs + from * count.count, count.count * kPanel, b,
                                          inputs * kPanel, depth, ahead, put);
            for (int w = 0; counted && w < panels * kVectors; ++w)
                statistics.add(panel * kPanel + w * vec::lanes, above[w], squares[w]);
        });
    }
}

// All panels of outputs [begin, end).
template <bool streamed>
void multiply_panels(const Pointwise &p, const Block &block, const float *weights, int64_t begin, int64_t end,
                     float *sums, const Statistics &statistics, Ahead &ahead) {
    for (; begin + kPanels <= end; begin += kPanels)
        multiply_block<kPanels, streamed>(p, block, weights, begin, sums, statistics, ahead);
    for (; begin < end; ++begin) multiply_block<1, streamed>(p, block, weights, begin, sums, statistics, ahead);
}

}  // namespace

bool pointwise(const Pointwise &p) {
    const int64_t inputs = p.in_channels, panels = p.out_channels / kPanel;
    const int64_t met_h = p.turned ? p.in_h : p.out_h, met_w = p.turned ? p.in_w : p.out_w;
    const int64_t pixels = p.images * met_h * met_w, stride_h = p.stride_h, stride_w = p.stride_w;
    const Pixels in{met_h, met_w, p.in_h, p.in_w, inputs, p.turned ? 1 : stride_h, p.turned ? 1 : stride_w};
    const Pixels out{met_h, met_w, p.out_h, p.out_w, p.out_channels, p.turned ? stride_h : 1, p.turned ? stride_w : 1};
    const Shares shares(p.tasks, pixels, panels, kEnoughRows);
    const int64_t fit = kBlockBytes / (int64_t(sizeof(float)) * (inputs + kPanels * kPanel));
    const int64_t room = shares.block_items(least(kMostRows, most(kRows, fit / kRows * kRows)));

    Memory memory;
    const int64_t weights_at = memory.add(inputs * p.out_channels), own_at = memory.numbers;
    const int64_t a_at = memory.add(inputs * room), sums_at = memory.add(room * kPanels * kPanel);
    const int64_t statistics_at = memory.add(Statistics::numbers(p.out_channels));
    const int64_t places_at = memory.add(4 * room), own = memory.numbers - own_at;
    float *base = static_cast<float *>(aligned_alloc(kLine, (own_at + p.tasks * own) * sizeof(float)));
    if (base == nullptr) return false;

    const int64_t size = p.images * p.out_h * p.out_w * p.out_channels;
    const bool aligned = reinterpret_cast<uintptr_t>(p.y) % kLine == 0;
    const bool streamed = aligned && size * int64_t(sizeof(float)) > p.tasks * kStreamBytes;
    auto prepare = [&](int task) {
        pack_weights(p, panels * task / p.tasks, panels * (task + 1) / p.tasks, base + weights_at);
        const int64_t begin = size * task / p.tasks, end = size * (task + 1) / p.tasks;
        if (p.turned && stride_h * stride_w > 1) memset(p.y + begin, 0, (end - begin) * sizeof(float));
    };
    each_task(p.tasks, prepare);
    auto work = [&](int task) {
        float *mine = base + task * own, *a = mine + a_at;
        int64_t *from = reinterpret_cast<int64_t *>(mine + places_at), *to = from + room;
        const Statistics statistics = Statistics::at(mine + statistics_at, p.shift, p.out_channels);
        for (int64_t first = shares.first_item(task); first < shares.end_item(task); first += room) {
            const int64_t rows = least(room, shares.end_item(task) - first);
            for (int64_t row = 0; row < rows; ++row)
                from[row] = in.place(first + row), to[row] = out.place(first + row);
            pack_pixels(p, from, rows, a);
            Ahead ahead;
            const int64_t next = least(room, shares.end_item(task) - first - rows), panel = shares.first_panel(task);
            if (next > 0 && (p.turned || stride_h * stride_w == 1)) {
                ahead.add(p.x + in.place(first + rows), next * inputs * sizeof(float));
                const int64_t looks = ceil_div(rows, kRows) * ceil_div(shares.end_panel(task) - panel, kPanels) * (inputs / kPanel);
                ahead.quota = ceil_div(ahead.lines, looks);
            }
            const Block block{a, rows, to};
            if (streamed)
                multiply_panels<true>(p, block, base + weights_at, panel, shares.end_panel(task), mine + sums_at, statistics, ahead);
            else
                multiply_panels<false>(p, block, base + weights_at, panel, shares.end_panel(task), mine + sums_at, statistics, ahead);
            statistics.end_block();
        }
        if (streamed) _mm_sfence();
    };
    each_task(p.tasks, work);
    if (p.shift != nullptr) {
        const Statistics first{p.shift, p.out_channels, nullptr,
                               reinterpret_cast<double *>(base + statistics_at + 2 * p.out_channels)};
        first.finish(p.tasks, own, pixels, p.mean, p.var);
    }
    free(base);
    return true;
}

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
