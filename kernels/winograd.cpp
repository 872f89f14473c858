// Convolutions with fewer multiplications: Winograd's minimal filtering, F(4x4, 3x3) and F(4x4, 5x5).
//
// Outputs are computed in tiles of 4x4. With m points (6 for a kernel of 3x3, 8 for 5x5), a tile's m x m inputs, the
// kernel and the outputs are each transformed, and the convolution becomes m * m matrix products over channels:
//
//     Y = A' [ sum over c of (G w G') * (B' x B) ] A        m * m products for 16 outputs, instead of 16 * 9 or 16 * 25
//
// The gradient of the input is the same with the kernel rotated by 180 degrees and its inputs and outputs exchanged.
// That of the weights is the exact adjoint:
//
//     dw = G' [ sum over tiles of (B' x B) * (A dY A') ] G
//
// The matrices follow from the points, 0, infinity and pairs +-a (Lavin and Gray, arXiv:1509.09308; Cook and Toom's
// construction). Small points of few bits keep rounding errors small: +-3/4 and +-3/2 have nearly half those of +-1 and
// +-2.
//
// Where a map is no multiple of 4, its last tiles are smaller. Fewer outputs need fewer of the points, and the same
// transformed weights: the rows of B' are scaled by what the points left out contribute to the weights' scale.
//
// Tensors are float32 or bf16. Transformed data is float32 either way, since the transforms multiply rounding errors.
//
// The layout of transformed tiles is [point][panel of 16 channels][tile][16], that of weights
// [point][panel][channel][16]: transforms write whole cache lines, and products read both in order.
#include "kernels.h"
#include "matmul.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

constexpr int kTile = 4;  // outputs of a tile, each way
// Second-level cache for a block of tiles and its products, and the panels of outputs that a block has.
constexpr int64_t kMaxBlockBytes = kIsAvx512 ? 1 << 20 : 512 << 10, kBlockPanels = kIsAvx512 ? 4 : 2;
// More weights than this do not stay in that cache. Blocks have more tiles then, so that weights are read less often.
constexpr int64_t kMaxCachedWeightBytes = 3 << 20;
constexpr int64_t kLargeBlockTiles = kIsAvx512 ? 112 : 252, kLargeBlockPanels = 8;
// The most products in one sum. Such sums are then added up, since a longer sum rounds more.
constexpr int64_t kMaxSumLength = 64;
// With fewer tiles a task than this, tasks divide the outputs too: sums of its own cost a task as much as these tiles.
constexpr int64_t kMinTaskTiles = 128;

// B', G and A for the sizes of a kernel and of a tile. Rows are points: 0, +a, -a, +b, -b, ..., and infinity where
// their number is even. A smaller tile's points are the first of a whole one's, and its infinity.
template <int kernel, int outputs = kTile> struct Matrices {
    static constexpr int points = kernel + outputs - 1, all = kernel + kTile - 1;
    float input[points][points] = {}, weights[points][kernel] = {}, output[points][outputs] = {};

    constexpr Matrices() {
        constexpr double pairs[] = {kernel == 3 ? 0.75 : 0.5, kernel == 3 ? 1.5 : 1, 2};
        constexpr int finite = points - 1 + points % 2, all_finite = all - 1 + all % 2;
        double point[all_finite] = {};
        for (int i = 1; i < all_finite; ++i) point[i] = i % 2 ? pairs[i / 2] : -pairs[i / 2 - 1];
        for (int i = 0; i < points; ++i) {
            // The polynomial's roots are the other finite points. Weights are divided by `scale`, the value at this
            // point of a whole tile's polynomial. That of a smaller tile lacks the factors in `left`, which go into B'.
            double polynomial[points + 1] = {1}, scale = 1, left = 1;
            for (int other = 0, degree = 0; other < finite; ++other) {
                if (other == i) continue;
                for (int at = ++degree; at > 0; --at)
                    polynomial[at] = polynomial[at - 1] - point[other] * polynomial[at];
                polynomial[0] *= -point[other];
            }
            for (int other = 0; i < finite && other < all_finite; ++other) {
                if (other == i) continue;
                scale *= point[i] - point[other];
                if (other >= finite) left *= point[i] - point[other];
            }
            for (int j = 0; j < points; ++j) input[i][j] = float(polynomial[j] * left);
            double power = 1;
            for (int j = 0; j < (kernel > outputs ? kernel : outputs); ++j) {
                if (j < kernel) weights[i][j] = float(i < finite ? power / scale : j == kernel - 1);
                if (j < outputs) output[i][j] = float(i < finite ? power : j == outputs - 1);
                if (i < finite) power *= point[i];
            }
        }
    }
};
template <int kernel, int outputs = kTile> constexpr Matrices<kernel, outputs> matrices{};

// The index of the i-th of so many points among those of a whole tile.
inline int point_index(int i, int points, int all) { return points % 2 == 0 && i == points - 1 ? all - 1 : i; }

inline KNLTRAIN_INLINE void add(vec &sum, bool &empty, float factor, vec x) {
    if (factor == 0) return;
    if (empty)
        sum = factor == 1 ? x : splat(factor) * x;
    else
        sum = factor == 1 ? sum + x : fma(splat(factor), x, sum);
    empty = false;
}

// out = m in. The rows of a pair of points differ in the sign of every other factor.
template <int points, int size>
inline KNLTRAIN_INLINE void apply(const float (&m)[points][size], const vec (&in)[size], vec (&out)[points]) {
    out[0] = zero();
    bool no_first = true;
#pragma GCC unroll 8
    for (int j = 0; j < size; ++j) add(out[0], no_first, m[0][j], in[j]);
#pragma GCC unroll 8
    for (int i = 1; i + 1 < points; i += 2) {
        vec same = zero(), other = zero();
        bool no_same = true, no_other = true;
#pragma GCC unroll 8
        for (int j = 0; j < size; ++j) {
            if (m[i][j] == m[i + 1][j])
                add(same, no_same, m[i][j], in[j]);
            else
                add(other, no_other, m[i][j], in[j]);
        }
        out[i] = same + other;
        out[i + 1] = same - other;
    }
    if (points % 2) return;
    out[points - 1] = zero();
    bool no_last = true;
#pragma GCC unroll 8
    for (int j = 0; j < size; ++j) add(out[points - 1], no_last, m[points - 1][j], in[j]);
}

// out = m' in.
template <int points, int size>
inline KNLTRAIN_INLINE void apply_transposed(const float (&m)[points][size], const vec (&in)[points],
                                             vec (&out)[size]) {
    vec sum[points], difference[points];
#pragma GCC unroll 8
    for (int i = 1; i + 1 < points; i += 2) sum[i] = in[i] + in[i + 1], difference[i] = in[i] - in[i + 1];
#pragma GCC unroll 8
    for (int j = 0; j < size; ++j) {
        out[j] = zero();
        bool empty = true;
        add(out[j], empty, m[0][j], in[0]);
#pragma GCC unroll 8
        for (int i = 1; i + 1 < points; i += 2)
            add(out[j], empty, m[i][j], m[i][j] == m[i + 1][j] ? sum[i] : difference[i]);
        if (points % 2 == 0) add(out[j], empty, m[points - 1][j], in[points - 1]);
    }
}

// m in m': in(i, j) returns one of size x size vectors, out(i, j, vector) takes one of points x points.
template <int points, int size, class In, class Out>
inline KNLTRAIN_INLINE void apply_both_sides(const float (&m)[points][size], In in, Out out) {
    vec half[points][size];
#pragma GCC unroll 8
    for (int j = 0; j < size; ++j) {
        vec column[size], transformed[points];
#pragma GCC unroll 8
        for (int i = 0; i < size; ++i) column[i] = in(i, j);
        apply(m, column, transformed);
#pragma GCC unroll 8
        for (int i = 0; i < points; ++i) half[i][j] = transformed[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < points; ++i) {
        vec row[points];
        apply(m, half[i], row);
#pragma GCC unroll 8
        for (int j = 0; j < points; ++j) out(i, j, row[j]);
    }
}

// m' in m: in(i, j) returns one of points x points vectors, out(i, j, vector) takes one of size x size.
template <int points, int size, class In, class Out>
inline KNLTRAIN_INLINE void apply_transposed_both_sides(const float (&m)[points][size], In in, Out out) {
    vec half[size][points];
#pragma GCC unroll 8
    for (int j = 0; j < points; ++j) {
        vec column[points], transformed[size];
#pragma GCC unroll 8
        for (int i = 0; i < points; ++i) column[i] = in(i, j);
        apply_transposed(m, column, transformed);
#pragma GCC unroll 8
        for (int i = 0; i < size; ++i) half[i][j] = transformed[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < size; ++i) {
        vec row[size];
        apply_transposed(m, half[i], row);
#pragma GCC unroll 8
        for (int j = 0; j < size; ++j) out(i, j, row[j]);
    }
}

// The same for a height and a width that are not known when compiling, in two steps.
constexpr int kMaxPoints = 8;
using Half = vec[kMaxPoints][kMaxPoints];

template <int points, int size, class In>
int apply_columns(const float (&m)[points][size], int width, In in, Half &half) {
    for (int j = 0; j < width; ++j) {
        vec column[size], transformed[points];
        for (int i = 0; i < size; ++i) column[i] = in(i, j);
        apply(m, column, transformed);
        for (int i = 0; i < points; ++i) half[i][j] = transformed[i];
    }
    return points;
}
template <int points, int size, class Out>
void apply_rows(const float (&m)[points][size], int height, const Half &half, int all, Out out) {
    for (int i = 0; i < height; ++i) {
        vec row[size], transformed[points];
        for (int j = 0; j < size; ++j) row[j] = half[i][j];
        apply(m, row, transformed);
        for (int j = 0; j < points; ++j) out(point_index(i, height, all), point_index(j, points, all), transformed[j]);
    }
}
template <int points, int size, class In>
void apply_transposed_columns(const float (&m)[points][size], int width, int all, In in, Half &half) {
    for (int j = 0; j < width; ++j) {
        vec column[points], transformed[size];
        for (int i = 0; i < points; ++i) column[i] = in(point_index(i, points, all), point_index(j, width, all));
        apply_transposed(m, column, transformed);
        for (int i = 0; i < size; ++i) half[i][j] = transformed[i];
    }
}
template <int points, int size, class Out>
void apply_transposed_rows(const float (&m)[points][size], int height, const Half &half, Out out) {
    for (int i = 0; i < height; ++i) {
        vec row[points], transformed[size];
        for (int j = 0; j < points; ++j) row[j] = half[i][j];
        apply_transposed(m, row, transformed);
        for (int j = 0; j < size; ++j) out(i, j, transformed[j]);
    }
}

// Calls body with the matrices of a tile of so many outputs one way.
template <int kernel, class Body> void with_matrices(int outputs, Body body) {
    if (outputs == 1) return body(matrices<kernel, 1>);
    if (outputs == 2) return body(matrices<kernel, 2>);
    if (outputs == 3) return body(matrices<kernel, 3>);
    return body(matrices<kernel, 4>);
}

// What transform_tiles() transforms: inputs by B', or gradients of outputs by A.
struct Inputs {
    static constexpr bool summed = false;
    template <class M> static constexpr const auto &of(const M &m) { return m.input; }
    static constexpr int size(int kernel, int outputs) { return kernel + outputs - 1; }
};
struct Outputs {
    static constexpr bool summed = false;
    template <class M> static constexpr const auto &of(const M &m) { return m.output; }
    static constexpr int size(int, int outputs) { return outputs; }
};

// The same, and summed on the way: the gradient of a bias.
struct SummedOutputs : Outputs {
    static constexpr bool summed = true;
};

// The input or the output of a convolution, cut into tiles of `size` x `size` pixels.
struct Map {
    int64_t height, width, channels, pad_h, pad_w, tiles_h, tiles_w;

    // The address of each pixel of a tile, or `outside` for one beyond the map.
    template <int size, class T> void addresses(T *map, int64_t tile, T *outside, T **at) const {
        const int64_t image = tile / (tiles_h * tiles_w), row = tile / tiles_w % tiles_h, column = tile % tiles_w;
        for (int i = 0; i < size; ++i) {
            const int64_t y = row * kTile - pad_h + i;
            for (int j = 0; j < size; ++j) {
                const int64_t x = column * kTile - pad_w + j;
                const bool inside = y >= 0 && y < height && x >= 0 && x < width;
                at[i * size + j] = inside ? map + ((image * height + y) * width + x) * channels : outside;
            }
        }
    }
};

// A task's next tiles, in the order: those with fewer rows, the whole ones, those with fewer columns, those with fewer
// of both. So the tiles that have a point are contiguous, whichever point it is.
struct Block {
    int32_t *tile;
    int last_rows, last_columns;  // outputs of the last tiles of a column, and of a row
    int64_t count[4];

    void fill(const Map &map, int64_t first, int64_t end) {
        int64_t at[4] = {};
        memset(count, 0, sizeof count);
        for (int pass = 0; pass < 2; ++pass) {
            for (int64_t id = first; id < end; ++id) {
                const bool low = last_rows < kTile && id / map.tiles_w % map.tiles_h == map.tiles_h - 1;
                const bool narrow = last_columns < kTile && id % map.tiles_w == map.tiles_w - 1;
                const int kind = low ? (narrow ? 3 : 0) : (narrow ? 2 : 1);
                if (pass == 0)
                    ++count[kind];
                else
                    tile[at[kind]++] = int32_t(id);
            }
            for (int kind = 1; kind < 4; ++kind) at[kind] = at[kind - 1] + count[kind - 1];
        }
    }
    int64_t size() const { return count[0] + count[1] + count[2] + count[3]; }
    int rows(int64_t at) const { return at < count[0] || at >= size() - count[3] ? last_rows : kTile; }
    int columns(int64_t at) const { return at >= count[0] + count[1] ? last_columns : kTile; }
    // The tiles that have a point.
    template <int kernel> Range tiles_with(int point) const {
        constexpr int all = kernel + kTile - 1;
        auto has = [](int outputs, int i) {
            const int points = kernel + outputs - 1;
            return i < points - 1 + points % 2 || (points % 2 == 0 && i == all - 1);
        };
        const bool low = has(last_rows, point / all), narrow = has(last_columns, point % all);
        return {low ? 0 : count[0], count[0] + count[1] + (narrow ? count[2] : 0) + (low && narrow ? count[3] : 0)};
    }
};

// Transformed tiles: [point][panel][tile][16]. There is a cache line of padding between points: at distances of powers
// of two, all would compete for the same lines of the cache.
struct Tiles {
    float *data;
    int64_t capacity, panels;  // tiles, panels of channels
    int64_t panel() const { return capacity * kPanel; }
    int64_t point() const { return panels * panel() + kPanel; }
    Tiles from(int64_t tile) const { return {data + tile * kPanel, capacity, panels}; }
    // Floats that they take.
    static int64_t size(int points, int64_t capacity, int64_t panels) {
        return points * points * (panels * capacity * kPanel + kPanel);
    }
};

// Transforms the tiles of a block in channels [channel, channel + 16 * tiles.panels). Adds SummedOutputs to sums.
template <int kernel, class Side, class T>
void transform_tiles(const Map &map, const T *from, const T *zeros, const Block &block, int64_t channel,
                     const Tiles &tiles, float *sums = nullptr) {
    constexpr int size = Side::size(kernel, kTile), points = Matrices<kernel>::points;
    const T *addresses[2][size * size];
    const int64_t count = block.size();
    if (count) map.addresses<size>(from + channel, block.tile[0], zeros, addresses[0]);
    for (int64_t tile = 0; tile < count; ++tile) {
        const T *const *at = addresses[tile % 2], **next = addresses[(tile + 1) % 2];
        map.addresses<size>(from + channel, block.tile[tile + 1 < count ? tile + 1 : tile], zeros, next);
        const int rows = block.rows(tile), columns = block.columns(tile);
        for (int64_t panel = 0; panel < tiles.panels; ++panel) {
            // The next tile's cache lines. Its first columns are often this one's last.
            for (int i = 0; i < size; ++i)
                for (int j = size - kTile; j < size; ++j) prefetch_l1(next[i * size + j] + panel * kPanel);
            for (int v = 0; v < kPanelVecs; ++v) {
                const int64_t offset = panel * kPanel + v * vec::lanes;
                float *to = tiles.data + panel * tiles.panel() + tile * kPanel + v * vec::lanes;
                vec sum = Side::summed ? load(sums + offset) : zero();
                auto in = [&](int i, int j) KNLTRAIN_INLINE {
                    const vec x = load(at[i * size + j] + offset);
                    if (Side::summed) sum += x;
                    return x;
                };
                auto out = [&](int i, int j, vec x)
                               KNLTRAIN_INLINE { store(to + (i * points + j) * tiles.point(), x); };
                if (rows == kTile && columns == kTile) {
                    apply_both_sides(Side::of(matrices<kernel>), in, out);
                } else {
                    Half half;
                    int height = 0;
                    with_matrices<kernel>(rows, [&](const auto &m) {
                        height = apply_columns(Side::of(m), Side::size(kernel, columns), in, half);
                    });
                    with_matrices<kernel>(columns,
                                          [&](const auto &m) { apply_rows(Side::of(m), height, half, points, out); });
                }
                if (Side::summed) store(sums + offset, sum);
            }
        }
    }
}

// Transforms products back to pixels, and adds the bias.
template <int kernel, class T>
void output_tiles(const Map &map, T *to, T *discard, const Block &block, int64_t channel, const T *bias,
                  const Statistics &statistics, const Tiles &tiles) {
    constexpr int points = Matrices<kernel>::points;
    T *addresses[2][kTile * kTile];
    const int64_t count = block.size();
    if (count) map.addresses<kTile>(to + channel, block.tile[0], discard, addresses[0]);
    for (int64_t tile = 0; tile < count; ++tile) {
        T *const *at = addresses[tile % 2], **next = addresses[(tile + 1) % 2];
        map.addresses<kTile>(to + channel, block.tile[tile + 1 < count ? tile + 1 : tile], discard, next);
        const int rows = block.rows(tile), columns = block.columns(tile);
        for (int64_t panel = 0; panel < tiles.panels; ++panel) {
            for (int i = 0; i < kTile * kTile; ++i) prefetch_write(next[i] + panel * kPanel);
            for (int v = 0; v < kPanelVecs; ++v) {
                const int64_t offset = panel * kPanel + v * vec::lanes;
                const float *from = tiles.data + panel * tiles.panel() + tile * kPanel + v * vec::lanes;
                const vec added = bias == nullptr ? zero() : load(bias + channel + offset);
                auto in = [&](int i, int j) KNLTRAIN_INLINE { return load(from + (i * points + j) * tiles.point()); };
                const bool with_statistics = statistics.shift != nullptr;
                const vec shift = with_statistics ? load(statistics.shift + channel + offset) : zero();
                vec above = zero(), squares = zero();
                auto out = [&](int i, int j, vec y) KNLTRAIN_INLINE {
                    store(at[i * kTile + j] + offset, y + added);
                    if (!with_statistics) return;
                    const vec d = y + added - shift;
                    above += d;
                    squares = fma(d, d, squares);
                };
                if (rows == kTile && columns == kTile) {
                    apply_transposed_both_sides(matrices<kernel>.output, in, out);
                } else {
                    Half half;
                    with_matrices<kernel>(rows, [&](const auto &m) {
                        apply_transposed_columns(m.output, kernel + columns - 1, points, in, half);
                    });
                    with_matrices<kernel>(columns,
                                          [&](const auto &m) { apply_transposed_rows(m.output, rows, half, out); });
                }
                if (with_statistics) statistics.add(channel + offset, above, squares);
            }
        }
    }
}

// c = a b of one point, for `panels` panels of outputs. a is [panel][tile][16], b [panel][depth][16].
template <int panels>
void multiply_point(const float *a, int64_t a_panel, const float *b, int64_t depth, float *c, int64_t c_panel,
                    int64_t tiles) {
    Prefetcher nothing;
    by_rows(tiles, [&](auto rows, int64_t tile) KNLTRAIN_INLINE {
        for (int64_t from = 0; from < depth; from += kMaxSumLength)
            multiply<rows.value, panels>(
                a + tile * kPanel + from / kPanel * a_panel, a_panel, b + from * kPanel, depth * kPanel,
                min(kMaxSumLength, depth - from), nothing, [&](int r, int w, vec sum) KNLTRAIN_INLINE {
                    float *to = c + (w / kPanelVecs) * c_panel + (tile + r) * kPanel + w % kPanelVecs * vec::lanes;
                    store(to, from == 0 ? sum : load(to) + sum);
                });
    });
}

// p = d' v of one point, for `rows` output channels and `panels` panels of input channels, summed over tiles.
template <int rows, int panels>
void multiply_outer(const float *d, const float *v, int64_t v_panel, int64_t tiles, float *p, int64_t p_row) {
    constexpr int width = panels * kPanelVecs;
    vec sum[rows][width];
    for (int r = 0; r < rows; ++r)
        for (int w = 0; w < width; ++w) sum[r][w] = zero();
    for (int64_t tile = 0; tile < tiles; ++tile, d += kPanel, v += kPanel) {
        vec vs[width];
        for (int w = 0; w < width; ++w) vs[w] = load(v + (w / kPanelVecs) * v_panel + w % kPanelVecs * vec::lanes);
        for (int r = 0; r < rows; ++r) {
            const vec ds = splat(d[r]);
            for (int w = 0; w < width; ++w) sum[r][w] = fma(ds, vs[w], sum[r][w]);
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int w = 0; w < width; ++w) store(p + r * p_row + w * vec::lanes, sum[r][w]);
}

// The same for all channels: outputs x inputs.
template <int panels> void multiply_panels(const Tiles &d, const Tiles &v, int point, int64_t tiles, float *p) {
    constexpr int rows = kIsAvx512 ? 8 : 4;
    const int64_t row = v.panels * kPanel;
    for (int64_t j = 0; j < v.panels; j += panels)
        for (int64_t k = 0; k < d.panels * kPanel; k += rows)
            multiply_outer<rows, panels>(d.data + point * d.point() + k / kPanel * d.panel() + k % kPanel,
                                         v.data + point * v.point() + j * v.panel(), v.panel(), tiles,
                                         p + k * row + j * kPanel, row);
}

void multiply_outer_point(const Tiles &d, const Tiles &v, int point, int64_t tiles, float *p) {
    if (kIsAvx512 && v.panels % 3 == 0)
        multiply_panels<3>(d, v, point, tiles, p);
    else if (kIsAvx512 && v.panels % 2 == 0)
        multiply_panels<2>(d, v, point, tiles, p);
    else
        multiply_panels<1>(d, v, point, tiles, p);
}

// G w G' of one group, as [point][panel of 16 outputs][input][16].
template <int kernel, class T> struct Weights {
    const T *from;  // outputs x kernel x kernel x inputs of a group
    int64_t inputs, outputs;
    bool input_grad;  // the kernel is rotated by 180 degrees, its inputs and outputs exchanged
    bool streamed;    // past the caches, which do not hold them
    static constexpr int kTaps = kernel * kernel;
    int64_t point() const { return inputs * outputs + kPanel; }

    // Of a range of blocks of 16 outputs and 16 inputs.
    void transform(Range blocks, float *to) const {
        constexpr int points = Matrices<kernel>::points;
        for (int64_t block = blocks.begin; block < blocks.end; ++block) {
            const int64_t output = block / (inputs / kPanel) * kPanel, input = block % (inputs / kPanel) * kPanel;
            float taps[kPanel][kTaps][kPanel];
            read(output, input, taps);
            for (int i = 0; i < kPanel; ++i)
                for (int v = 0; v < kPanelVecs; ++v) {
                    float *row = to + output * inputs + (input + i) * kPanel + v * vec::lanes;
                    auto in = [&](int r, int s)
                                  KNLTRAIN_INLINE { return load(taps[i][r * kernel + s] + v * vec::lanes); };
                    auto address = [&](int r, int s) KNLTRAIN_INLINE { return row + (r * points + s) * point(); };
                    if (streamed)
                        apply_both_sides(matrices<kernel>.weights, in,
                                    [&](int r, int s, vec x) KNLTRAIN_INLINE { stream(address(r, s), x); });
                    else
                        apply_both_sides(matrices<kernel>.weights, in,
                                    [&](int r, int s, vec x) KNLTRAIN_INLINE { store(address(r, s), x); });
                }
        }
        if (streamed) store_fence();
    }

    // 16 inputs x taps x 16 outputs.
    void read(int64_t output, int64_t input, float (&taps)[kPanel][kTaps][kPanel]) const {
        for (int i = 0; i < kPanel; ++i)
            for (int tap = 0; tap < kTaps; ++tap) {
                const T *line = input_grad ? from + ((input + i) * kTaps + kTaps - 1 - tap) * outputs + output
                                       : from + ((output + i) * kTaps + tap) * inputs + input;
                for (int j = 0; j < kPanel; ++j) (input_grad ? taps[i][tap][j] : taps[j][tap][i]) = to_float(line[j]);
            }
    }
};

Block block_of(const Map &out, float *buffer) {
    auto last = [](int64_t size) { return int(size % kTile ? size % kTile : kTile); };
    return {reinterpret_cast<int32_t *>(buffer), last(out.height), last(out.width), {}};
}

// One group's products and outputs for a block of tiles, whose transformed inputs are in `a`.
template <int kernel, class T>
void multiply_tiles(const Winograd &p, const Map &out, const Tiles &a, const float *weights, int64_t group,
                    Range panels, int64_t block_panels, const Block &block, float *products, float *discard,
                    const Statistics &statistics) {
    constexpr int points = Matrices<kernel>::points;
    const int64_t inputs = p.in_channels / p.groups, outputs = p.out_channels / p.groups;
    for (int64_t panel = panels.begin; panel < panels.end; panel += block_panels) {
        const Tiles c{products, a.capacity, min(block_panels, panels.end - panel)};
        for (int point = 0; point < points * points; ++point) {
            const Range tiles = block.tiles_with<kernel>(point);
            const int64_t count = tiles.end - tiles.begin;
            const float *as = a.data + point * a.point() + tiles.begin * kPanel;
            const float *b = weights + point * (inputs * outputs + kPanel) + panel * inputs * kPanel;
            float *to = c.data + point * c.point() + tiles.begin * kPanel;
            int64_t i = 0;
            for (; i + kMaxPanels <= c.panels; i += kMaxPanels)
                multiply_point<kMaxPanels>(as, a.panel(), b + i * inputs * kPanel, inputs, to + i * c.panel(), c.panel(),
                                           count);
            for (; i < c.panels; ++i)
                multiply_point<1>(as, a.panel(), b + i * inputs * kPanel, inputs, to + i * c.panel(), c.panel(), count);
        }
        output_tiles<kernel>(out, static_cast<T *>(p.y), reinterpret_cast<T *>(discard), block,
                             group * outputs + panel * kPanel, static_cast<const T *>(p.bias), statistics, c);
    }
}

template <int kernel, class T> bool convolve(const Winograd &p) {
    constexpr int points = Matrices<kernel>::points;
    const int64_t inputs = p.in_channels / p.groups, outputs = p.out_channels / p.groups, panels = outputs / kPanel;
    const int64_t tiles_h = ceil_div(p.out_h, kTile), tiles_w = ceil_div(p.out_w, kTile);
    const Map in{p.in_h, p.in_w, p.in_channels, p.pad_h, p.pad_w, tiles_h, tiles_w};
    const Map out{p.out_h, p.out_w, p.out_channels, 0, 0, tiles_h, tiles_w};
    const TaskGrid grid(p.tasks, p.images * tiles_h * tiles_w, panels, 2 * kMaxRows);

    const int64_t weight_size = points * points * (inputs * outputs + kPanel);
    const bool cached = weight_size * int64_t(sizeof(float)) <= kMaxCachedWeightBytes;
    const int64_t block_panels = min(cached ? kBlockPanels : kLargeBlockPanels, ceil_div(panels, grid.by_panel));
    const int64_t fit = kMaxBlockBytes / (points * points * int64_t(sizeof(float)) * (inputs + block_panels * kPanel));
    const int64_t block_tiles = grid.block_items(cached ? max(kMaxRows, fit / kMaxRows * kMaxRows) : kLargeBlockTiles);

    BufferLayout layout;
    const int64_t zeros_at = layout.add(p.in_channels), weights_at = layout.add(p.groups * weight_size);
    const int64_t task_at = layout.size;
    const int64_t a_at = layout.add(Tiles::size(points, block_tiles, inputs / kPanel));
    const int64_t products_at = layout.add(Tiles::size(points, block_tiles, block_panels));
    const int64_t discard_at = layout.add(p.out_channels), block_at = layout.add(block_tiles);
    const int64_t statistics_at = layout.add(Statistics::size(p.out_channels)), task_size = layout.size - task_at;
    const Buffer buffer(task_at + p.tasks * task_size);
    if (buffer.data == nullptr) return false;
    memset(buffer.data + zeros_at, 0, p.in_channels * sizeof(float));
    const T *x = static_cast<const T *>(p.x), *zeros = reinterpret_cast<const T *>(buffer.data + zeros_at);

    auto transform_weights = [&](int task) {
        for (int64_t group = 0; group < p.groups; ++group) {
            const T *weight = static_cast<const T *>(p.weight) + group * inputs * outputs * kernel * kernel;
            const Weights<kernel, T> w{weight, inputs, outputs, p.input_grad, !cached};
            w.transform(task_range(panels * (inputs / kPanel), task, p.tasks),
                        buffer.data + weights_at + group * weight_size);
        }
    };
    each_task(p.tasks, transform_weights);
    auto work = [&](int task) {
        float *own = buffer.data + task * task_size;
        const Range mine = grid.items_of(task);
        const Tiles a{own + a_at, block_tiles, inputs / kPanel};
        const Statistics statistics = Statistics::in(own + statistics_at, p.shift, p.out_channels);
        statistics.clear();
        Block block = block_of(out, own + block_at);
        for (int64_t group = 0; group < p.groups; ++group)
            for (int64_t first = mine.begin; first < mine.end; first += block_tiles) {
                block.fill(out, first, min(first + block_tiles, mine.end));
                transform_tiles<kernel, Inputs>(in, x, zeros, block, group * inputs, a);
                multiply_tiles<kernel, T>(p, out, a, buffer.data + weights_at + group * weight_size, group,
                                          grid.panels_of(task), block_panels, block, own + products_at,
                                          own + discard_at, statistics);
                statistics.end_block();
            }
    };
    each_task(p.tasks, work);
    if (p.shift != nullptr)
        Statistics::in(buffer.data + statistics_at, p.shift, p.out_channels)
            .finish(p.tasks, task_size, p.images * p.out_h * p.out_w, p.mean, p.var);
    return true;
}

// dw of one block of tiles and outputs: the taps of every pair of channels, written for the first block, then added to.
template <int kernel>
void add_weights(const float *products, int64_t point_size, int64_t outputs, int64_t inputs, bool first, float *sums) {
    constexpr int points = Matrices<kernel>::points;
    for (int64_t at = 0; at < outputs * inputs; at += vec::lanes) {
        float *to = sums + at / inputs * kernel * kernel * inputs + at % inputs;
        apply_transposed_both_sides(
            matrices<kernel>.weights,
            [&](int i, int j) KNLTRAIN_INLINE { return load(products + (i * points + j) * point_size + at); },
            [&](int i, int j, vec w) KNLTRAIN_INLINE {
                float *tap = to + (i * kernel + j) * inputs;
                store(tap, first ? w : load(tap) + w);
            });
    }
}

// Transforms a block of dy. With a bias, adds the block's sums to the float64 sums of its gradient.
template <int kernel, class T>
void transform_outputs(const WinogradWeightGrad &p, const Map &map, const T *zeros, const Block &block, int64_t output,
                       const Tiles &d, float *sums, double *totals) {
    const T *dy = static_cast<const T *>(p.dy);
    if (p.dbias == nullptr) return transform_tiles<kernel, Outputs>(map, dy, zeros, block, output, d);
    memset(sums, 0, d.panels * kPanel * sizeof(float));
    transform_tiles<kernel, SummedOutputs>(map, dy, zeros, block, output, d, sums);
    for (int64_t i = 0; i < d.panels * kPanel; ++i) totals[output + i] += sums[i];
}

// Adds up the gradients of the bias of all tasks. The first task's begins at `totals`; those of the others follow at
// distances of `stride` floats.
template <class T> void add_up_bias(const WinogradWeightGrad &p, const float *totals, int64_t stride) {
    for (int64_t output = 0; output < p.out_channels; ++output) {
        double total = 0;
        for (int task = 0; task < p.tasks; ++task)
            total += reinterpret_cast<const double *>(totals + task * stride)[output];
        store(static_cast<T *>(p.dbias) + output, splat(float(total)), 1);
    }
}

template <int kernel, class T> bool weight_gradient(const WinogradWeightGrad &p) {
    constexpr int points = Matrices<kernel>::points, taps = kernel * kernel, in_place = sizeof(T) == sizeof(float);
    const int64_t inputs = p.in_channels / p.groups, outputs = p.out_channels / p.groups, panels = outputs / kPanel;
    const int64_t tiles_h = ceil_div(p.out_h, kTile), tiles_w = ceil_div(p.out_w, kTile);
    const int64_t size = p.out_channels * taps * inputs, max_channels = max(p.in_channels, p.out_channels);
    const Map in{p.in_h, p.in_w, p.in_channels, p.pad_h, p.pad_w, tiles_h, tiles_w};
    const Map out{p.out_h, p.out_w, p.out_channels, 0, 0, tiles_h, tiles_w};
    const TaskGrid grid(p.tasks, p.images * tiles_h * tiles_w, panels, kMinTaskTiles);
    const int64_t block_tiles = grid.block_items(kernel == 3 ? 64 : 48), block_panels = min(2, panels);
    const int64_t point_size = block_panels * kPanel * inputs + kPanel;

    BufferLayout layout;
    const int64_t zeros_at = layout.add(max_channels), sums_at = layout.add((grid.by_item - in_place) * size);
    const int64_t task_at = layout.size;
    const int64_t bias_at = layout.add(2 * p.out_channels), bias_block_at = layout.add(block_panels * kPanel);
    const int64_t v_at = layout.add(Tiles::size(points, block_tiles, inputs / kPanel));
    const int64_t d_at = layout.add(Tiles::size(points, block_tiles, block_panels));
    const int64_t products_at = layout.add(points * points * point_size), block_at = layout.add(block_tiles);
    const int64_t task_size = layout.size - task_at;
    const Buffer buffer(task_at + p.tasks * task_size);
    if (buffer.data == nullptr) return false;
    memset(buffer.data + zeros_at, 0, max_channels * sizeof(float));
    const T *x = static_cast<const T *>(p.x), *zeros = reinterpret_cast<const T *>(buffer.data + zeros_at);

    // Each part of the tiles has sums of its own. Those of the first are dw itself if it is float32.
    auto sums_of = [&](int64_t part) {
        return in_place && part == 0 ? static_cast<float *>(p.dw) : buffer.data + sums_at + (part - in_place) * size;
    };
    auto work = [&](int task) {
        float *own = buffer.data + task * task_size;
        double *bias_totals = reinterpret_cast<double *>(own + bias_at);
        const Range mine = grid.items_of(task), my_panels = grid.panels_of(task);
        const Tiles v{own + v_at, block_tiles, inputs / kPanel};
        Block block = block_of(out, own + block_at);
        if (p.dbias != nullptr) memset(bias_totals, 0, p.out_channels * sizeof(double));
        for (int64_t group = 0; group < p.groups; ++group)
            for (int64_t first = mine.begin; first == mine.begin || first < mine.end; first += block_tiles) {
                block.fill(out, first, min(first + block_tiles, mine.end));
                transform_tiles<kernel, Inputs>(in, x, zeros, block, group * inputs, v);
                for (int64_t panel = my_panels.begin; panel < my_panels.end; panel += block_panels) {
                    const Tiles d{own + d_at, block_tiles, min(block_panels, my_panels.end - panel)};
                    const int64_t output = group * outputs + panel * kPanel;
                    transform_outputs<kernel>(p, out, zeros, block, output, d, own + bias_block_at, bias_totals);
                    for (int point = 0; point < points * points; ++point) {
                        const Range tiles = block.tiles_with<kernel>(point);
                        multiply_outer_point(d.from(tiles.begin), v.from(tiles.begin), point, tiles.end - tiles.begin,
                                             own + products_at + point * point_size);
                    }
                    add_weights<kernel>(own + products_at, point_size, d.panels * kPanel, inputs, first == mine.begin,
                                        sums_of(grid.item_part(task)) + output * taps * inputs);
                }
            }
    };
    each_task(p.tasks, work);
    auto finish = [&](int task) {
        const Range lines = task_range(size / kPanel, task, p.tasks);
        for (int64_t at = lines.begin * kPanel; at < lines.end * kPanel; at += vec::lanes) {
            vec total = load(sums_of(0) + at);
            for (int part = 1; part < grid.by_item; ++part) total += load(sums_of(part) + at);
            store(static_cast<T *>(p.dw) + at, total);
        }
    };
    if (!in_place || grid.by_item > 1) each_task(p.tasks, finish);
    if (p.dbias != nullptr) add_up_bias<T>(p, buffer.data + bias_at, task_size);
    return true;
}

}  // namespace

bool winograd(const Winograd &p) {
    if (p.is_bf16) return p.kernel == 3 ? convolve<3, bf16>(p) : convolve<5, bf16>(p);
    return p.kernel == 3 ? convolve<3, float>(p) : convolve<5, float>(p);
}

bool winograd_weight_grad(const WinogradWeightGrad &p) {
    if (p.is_bf16) return p.kernel == 3 ? weight_gradient<3, bf16>(p) : weight_gradient<5, bf16>(p);
    return p.kernel == 3 ? weight_gradient<3, float>(p) : weight_gradient<5, float>(p);
}

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
