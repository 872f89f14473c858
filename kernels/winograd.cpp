// Convolutions with fewer multiplications: Winograd's minimal filtering, F(4x4, 3x3) and F(4x4, 5x5).
//
// Outputs are computed in tiles of 4x4. With m points (6 for a kernel of 3x3, 8 for 5x5), a tile's m x m inputs, the
// kernel and the outputs are each transformed, and the convolution becomes m * m matrix products over channels:
//
//     Y = A' [ sum over c of (G w G') * (B' x B) ] A        products: m * m for 16 outputs, where 16 * 9 (or 25) were
//
// The gradient of the input is the same with turned weights, that of the weights is its exact adjoint:
//
//     dw = G' [ sum over tiles of (B' x B) * (A dY A') ] G
//
// The matrices follow from the points, 0, infinity and pairs +-a (Lavin and Gray, arXiv:1509.09308; Cook and Toom's
// construction). Small points of few bits keep rounding down: +-3/4 and +-3/2 nearly halve that of +-1 and +-2.
//
// Where a map is no multiple of 4, its last tiles are smaller: for fewer outputs, fewer of the points do, with the same
// transformed weights. Rows of B' take up that their scale is another.
//
// Tensors are float32 or bf16. What is transformed is float32 either way: the transforms multiply rounding errors.
//
// Transformed data lies as [point][panel of 16 channels][tile][16], weights as [point][panel][channel][16]: transforms
// write whole cache lines, and products read both in order.
#include "isa.h"
#include "kernels.h"
#include "products.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

constexpr int kTile = 4;  // outputs of a tile, each way
// What a block of tiles and its products may take of a second-level cache, and how many panels of outputs it has.
// Weights that are bigger do not stay there: more tiles at a time then, so that they are read less often.
constexpr int64_t kBlockBytes = kWide ? 1 << 20 : 512 << 10, kBlockPanels = kWide ? 4 : 2;
constexpr int64_t kBigWeights = 3 << 20, kBigTiles = kWide ? 112 : 252, kBigPanels = 8;
// Products that are summed one after the other; such sums are then added up. A long sum rounds more.
constexpr int64_t kSum = 64;
// Fewer tiles a task than this, and tasks share out the outputs: sums of its own cost a task as much as these tiles.
constexpr int64_t kEnoughTiles = 128;

// B', G and A of a kernel's and a tile's size. Rows are points: 0, +a, -a, +b, -b, ..., and infinity where they are even
// in number. Those of a smaller tile are the first of a whole one's, and its infinity.
template <int kernel, int outputs = kTile> struct Matrices {
    static constexpr int points = kernel + outputs - 1, all = kernel + kTile - 1;
    float input[points][points] = {}, weights[points][kernel] = {}, output[points][outputs] = {};

    constexpr Matrices() {
        constexpr double pairs[] = {kernel == 3 ? 0.75 : 0.5, kernel == 3 ? 1.5 : 1, 2};
        constexpr int finite = points - 1 + points % 2, all_finite = all - 1 + all % 2;
        double point[all_finite] = {};
        for (int i = 1; i < all_finite; ++i) point[i] = i % 2 ? pairs[i / 2] : -pairs[i / 2 - 1];
        for (int i = 0; i < points; ++i) {
            // The polynomial whose roots are the other finite points; at each point of a whole tile it has the value
            // `scale`, which weights are divided by, and here it is multiplied by what is left of that.
            double polynomial[points + 1] = {1}, scale = 1, left = 1;
            for (int other = 0, degree = 0; other < finite; ++other) {
                if (other == i) continue;
                for (int at = ++degree; at > 0; --at) polynomial[at] = polynomial[at - 1] - point[other] * polynomial[at];
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

// Where the i-th of so many points is among those of a whole tile.
inline int place(int i, int points, int all) { return points % 2 == 0 && i == points - 1 ? all - 1 : i; }

inline KNLTRAIN_INLINE void add(vec &sum, bool &empty, float factor, vec x) {
    if (factor == 0) return;
    if (empty)
        sum = factor == 1 ? x : splat(factor) * x;
    else
        sum = factor == 1 ? sum + x : fma(splat(factor), x, sum);
    empty = false;
}

// out = m in: rows of a pair differ in the sign of every other factor.
template <int points, int size>
inline KNLTRAIN_INLINE void spread(const float (&m)[points][size], const vec (&in)[size], vec (&out)[points]) {
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
inline KNLTRAIN_INLINE void gather(const float (&m)[points][size], const vec (&in)[points], vec (&out)[size]) {
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

// m in m': in(i, j) gives size x size vectors, out(i, j, vector) takes points x points.
template <int points, int size, class In, class Out>
inline KNLTRAIN_INLINE void spread_both(const float (&m)[points][size], In in, Out out) {
    vec half[points][size];
#pragma GCC unroll 8
    for (int j = 0; j < size; ++j) {
        vec column[size], spreaded[points];
#pragma GCC unroll 8
        for (int i = 0; i < size; ++i) column[i] = in(i, j);
        spread(m, column, spreaded);
#pragma GCC unroll 8
        for (int i = 0; i < points; ++i) half[i][j] = spreaded[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < points; ++i) {
        vec row[points];
        spread(m, half[i], row);
#pragma GCC unroll 8
        for (int j = 0; j < points; ++j) out(i, j, row[j]);
    }
}

// m' in m: the other way.
template <int points, int size, class In, class Out>
inline KNLTRAIN_INLINE void gather_both(const float (&m)[points][size], In in, Out out) {
    vec half[size][points];
#pragma GCC unroll 8
    for (int j = 0; j < points; ++j) {
        vec column[points], gathered[size];
#pragma GCC unroll 8
        for (int i = 0; i < points; ++i) column[i] = in(i, j);
        gather(m, column, gathered);
#pragma GCC unroll 8
        for (int i = 0; i < size; ++i) half[i][j] = gathered[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < size; ++i) {
        vec row[size];
        gather(m, half[i], row);
#pragma GCC unroll 8
        for (int j = 0; j < size; ++j) out(i, j, row[j]);
    }
}

// The same where height and width are not known before, by way of memory.
constexpr int kMost = 8;
using Half = vec[kMost][kMost];

template <int points, int size, class In>
int spread_columns(const float (&m)[points][size], int width, In in, Half &half) {
    for (int j = 0; j < width; ++j) {
        vec column[size], spreaded[points];
        for (int i = 0; i < size; ++i) column[i] = in(i, j);
        spread(m, column, spreaded);
        for (int i = 0; i < points; ++i) half[i][j] = spreaded[i];
    }
    return points;
}
template <int points, int size, class Out>
void spread_rows(const float (&m)[points][size], int height, const Half &half, int all, Out out) {
    for (int i = 0; i < height; ++i) {
        vec row[size], spreaded[points];
        for (int j = 0; j < size; ++j) row[j] = half[i][j];
        spread(m, row, spreaded);
        for (int j = 0; j < points; ++j) out(place(i, height, all), place(j, points, all), spreaded[j]);
    }
}
template <int points, int size, class In>
void gather_columns(const float (&m)[points][size], int width, int all, In in, Half &half) {
    for (int j = 0; j < width; ++j) {
        vec column[points], gathered[size];
        for (int i = 0; i < points; ++i) column[i] = in(place(i, points, all), place(j, width, all));
        gather(m, column, gathered);
        for (int i = 0; i < size; ++i) half[i][j] = gathered[i];
    }
}
template <int points, int size, class Out>
void gather_rows(const float (&m)[points][size], int height, const Half &half, Out out) {
    for (int i = 0; i < height; ++i) {
        vec row[points], gathered[size];
        for (int j = 0; j < points; ++j) row[j] = half[i][j];
        gather(m, row, gathered);
        for (int j = 0; j < size; ++j) out(i, j, gathered[j]);
    }
}

// body(the matrices of a tile with so many outputs one way).
template <int kernel, class Body> void with_matrices(int outputs, Body body) {
    if (outputs == 1) return body(matrices<kernel, 1>);
    if (outputs == 2) return body(matrices<kernel, 2>);
    if (outputs == 3) return body(matrices<kernel, 3>);
    return body(matrices<kernel, 4>);
}

// What is transformed: inputs by B', or the output's gradients by A.
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

// The same, and they are added up on the way: the gradient of a bias.
struct SummedOutputs : Outputs {
    static constexpr bool summed = true;
};

// One side of a convolution, cut into tiles: what is read or written at `size` x `size` pixels a tile.
struct Map {
    int64_t height, width, channels, pad_h, pad_w, tiles_h, tiles_w;

    // The place of each pixel of a tile, or `outside` beyond the map.
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

// Tiles that are worked on together, whole and smaller ones: those with fewer rows, the whole ones, those with fewer
// columns, those with both. So the tiles that have a point are next to each other, whichever point it is.
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
    // The tiles that have a point: [begin, end).
    template <int kernel> void range(int point, int64_t &begin, int64_t &end) const {
        constexpr int all = kernel + kTile - 1;
        auto has = [](int outputs, int i) {
            const int points = kernel + outputs - 1;
            return i < points - 1 + points % 2 || (points % 2 == 0 && i == all - 1);
        };
        const bool low = has(last_rows, point / all), narrow = has(last_columns, point % all);
        begin = low ? 0 : count[0];
        end = count[0] + count[1] + (narrow ? count[2] : 0) + (low && narrow ? count[3] : 0);
    }
};

// Transformed tiles: [point][panel][tile][16]. Points lie a line further apart than they need: at powers of two, all
// would fall on the same lines of the cache.
struct Tiles {
    float *data;
    int64_t room, panels;  // tiles that there is room for, panels of channels
    int64_t panel() const { return room * kPanel; }
    int64_t point() const { return panels * panel() + kPanel; }
    Tiles from(int64_t tile) const { return {data + tile * kPanel, room, panels}; }
    static int64_t numbers(int points, int64_t room, int64_t panels) {
        return points * points * (panels * room * kPanel + kPanel);
    }
};

// Transforms the tiles of a block, channels [channel, channel + 16 * tiles.panels), and adds them to sums.
template <int kernel, class Side, class T>
void transform_tiles(const Map &map, const T *from, const T *zeros, const Block &block, int64_t channel,
                     const Tiles &tiles, float *sums = nullptr) {
    constexpr int size = Side::size(kernel, kTile), points = Matrices<kernel>::points;
    const T *places[2][size * size];
    const int64_t count = block.size();
    if (count) map.addresses<size>(from + channel, block.tile[0], zeros, places[0]);
    for (int64_t tile = 0; tile < count; ++tile) {
        const T *const *at = places[tile % 2], **next = places[(tile + 1) % 2];
        map.addresses<size>(from + channel, block.tile[tile + 1 < count ? tile + 1 : tile], zeros, next);
        const int rows = block.rows(tile), columns = block.columns(tile);
        for (int64_t panel = 0; panel < tiles.panels; ++panel) {
            // The next tile's lines; its first columns are often this one's last.
            for (int i = 0; i < size; ++i)
                for (int j = size - kTile; j < size; ++j) _mm_prefetch(next[i * size + j] + panel * kPanel, _MM_HINT_T0);
            for (int v = 0; v < kVectors; ++v) {
                const int64_t offset = panel * kPanel + v * vec::lanes;
                float *to = tiles.data + panel * tiles.panel() + tile * kPanel + v * vec::lanes;
                vec sum = Side::summed ? load(sums + offset) : zero();
                auto in = [&](int i, int j) KNLTRAIN_INLINE {
                    const vec x = load(at[i * size + j] + offset);
                    if (Side::summed) sum += x;
                    return x;
                };
                auto out = [&](int i, int j, vec x) KNLTRAIN_INLINE { store(to + (i * points + j) * tiles.point(), x); };
                if (rows == kTile && columns == kTile) {
                    spread_both(Side::of(matrices<kernel>), in, out);
                } else {
                    Half half;
                    int height = 0;
                    with_matrices<kernel>(rows, [&](const auto &m) {
                        height = spread_columns(Side::of(m), Side::size(kernel, columns), in, half);
                    });
                    with_matrices<kernel>(columns,
                                          [&](const auto &m) { spread_rows(Side::of(m), height, half, points, out); });
                }
                if (Side::summed) store(sums + offset, sum);
            }
        }
    }
}

// Back to pixels, with the bias added.
template <int kernel, class T>
void output_tiles(const Map &map, T *to, T *nowhere, const Block &block, int64_t channel, const T *bias,
                  const Statistics &statistics, const Tiles &tiles) {
    constexpr int points = Matrices<kernel>::points;
    T *places[2][kTile * kTile];
    const int64_t count = block.size();
    if (count) map.addresses<kTile>(to + channel, block.tile[0], nowhere, places[0]);
    for (int64_t tile = 0; tile < count; ++tile) {
        T *const *at = places[tile % 2], **next = places[(tile + 1) % 2];
        map.addresses<kTile>(to + channel, block.tile[tile + 1 < count ? tile + 1 : tile], nowhere, next);
        const int rows = block.rows(tile), columns = block.columns(tile);
        for (int64_t panel = 0; panel < tiles.panels; ++panel) {
            for (int i = 0; i < kTile * kTile; ++i) __builtin_prefetch(next[i] + panel * kPanel, 1);
            for (int v = 0; v < kVectors; ++v) {
                const int64_t offset = panel * kPanel + v * vec::lanes;
                const float *from = tiles.data + panel * tiles.panel() + tile * kPanel + v * vec::lanes;
                const vec shift = bias == nullptr ? zero() : load(bias + channel + offset);
                auto in = [&](int i, int j) KNLTRAIN_INLINE { return load(from + (i * points + j) * tiles.point()); };
                const bool counted = statistics.shift != nullptr;
                const vec usual = counted ? load(statistics.shift + channel + offset) : zero();
                vec above = zero(), squares = zero();
                auto out = [&](int i, int j, vec y) KNLTRAIN_INLINE {
                    store(at[i * kTile + j] + offset, y + shift);
                    if (!counted) return;
                    const vec d = y + shift - usual;
                    above += d;
                    squares = fma(d, d, squares);
                };
                if (rows == kTile && columns == kTile) {
                    gather_both(matrices<kernel>.output, in, out);
                } else {
                    Half half;
                    with_matrices<kernel>(rows, [&](const auto &m) {
                        gather_columns(m.output, kernel + columns - 1, points, in, half);
                    });
                    with_matrices<kernel>(columns, [&](const auto &m) { gather_rows(m.output, rows, half, out); });
                }
                if (counted) statistics.add(channel + offset, above, squares);
            }
        }
    }
}

// c = a b of one point, for `panels` panels of outputs; a: [panel][tile][16], b: [panel][depth][16].
template <int panels>
void multiply_point(const float *a, int64_t a_panel, const float *b, int64_t depth, float *c, int64_t c_panel,
                    int64_t tiles) {
    Ahead nothing;
    by_rows(tiles, [&](auto rows, int64_t tile) KNLTRAIN_INLINE {
        for (int64_t from = 0; from < depth; from += kSum)
            multiply<rows.count, panels>(
                a + tile * kPanel + from / kPanel * a_panel, a_panel, b + from * kPanel, depth * kPanel,
                least(kSum, depth - from), nothing, [&](int r, int w, vec sum) KNLTRAIN_INLINE {
                    float *to = c + (w / kVectors) * c_panel + (tile + r) * kPanel + w % kVectors * vec::lanes;
                    store(to, from == 0 ? sum : load(to) + sum);
                });
    });
}

// p = d' v for `rows` output channels and `panels` panels of input channels, summed over tiles.
template <int rows, int panels>
void multiply_outer(const float *d, const float *v, int64_t v_panel, int64_t tiles, float *p, int64_t p_row) {
    constexpr int width = panels * kVectors;
    vec sum[rows][width];
    for (int r = 0; r < rows; ++r)
        for (int w = 0; w < width; ++w) sum[r][w] = zero();
    for (int64_t tile = 0; tile < tiles; ++tile, d += kPanel, v += kPanel) {
        vec vs[width];
        for (int w = 0; w < width; ++w) vs[w] = load(v + (w / kVectors) * v_panel + w % kVectors * vec::lanes);
        for (int r = 0; r < rows; ++r) {
            const vec ds = splat(d[r]);
            for (int w = 0; w < width; ++w) sum[r][w] = fma(ds, vs[w], sum[r][w]);
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int w = 0; w < width; ++w) store(p + r * p_row + w * vec::lanes, sum[r][w]);
}

// All of one point: outputs x inputs.
template <int panels> void multiply_panels(const Tiles &d, const Tiles &v, int point, int64_t tiles, float *p) {
    constexpr int rows = kWide ? 8 : 4;
    const int64_t row = v.panels * kPanel;
    for (int64_t j = 0; j < v.panels; j += panels)
        for (int64_t k = 0; k < d.panels * kPanel; k += rows)
            multiply_outer<rows, panels>(d.data + point * d.point() + k / kPanel * d.panel() + k % kPanel,
                                         v.data + point * v.point() + j * v.panel(), v.panel(), tiles,
                                         p + k * row + j * kPanel, row);
}

void multiply_outer_point(const Tiles &d, const Tiles &v, int point, int64_t tiles, float *p) {
    if (kWide && v.panels % 3 == 0)
        multiply_panels<3>(d, v, point, tiles, p);
    else if (kWide && v.panels % 2 == 0)
        multiply_panels<2>(d, v, point, tiles, p);
    else
        multiply_panels<1>(d, v, point, tiles, p);
}

// G w G' of one group, as [point][panel of 16 outputs][input][16]. Turned: the kernel by 180 degrees, and what were
// outputs are inputs.
template <int kernel, class T> struct Weights {
    const T *from;  // outputs x kernel x kernel x inputs of a group
    int64_t inputs, outputs;
    bool turned;
    bool big;  // they do not stay in a cache: they are written past it
    static constexpr int kTaps = kernel * kernel;
    int64_t point() const { return inputs * outputs + kPanel; }

    // Blocks of 16 outputs and 16 inputs, [begin, end) of them.
    void transform(int64_t begin, int64_t end, float *to) const {
        constexpr int points = Matrices<kernel>::points;
        for (int64_t block = begin; block < end; ++block) {
            const int64_t output = block / (inputs / kPanel) * kPanel, input = block % (inputs / kPanel) * kPanel;
            float taps[kPanel][kTaps][kPanel];
            read(output, input, taps);
            for (int i = 0; i < kPanel; ++i)
                for (int v = 0; v < kVectors; ++v) {
                    float *row = to + output * inputs + (input + i) * kPanel + v * vec::lanes;
                    auto in = [&](int r, int s) KNLTRAIN_INLINE { return load(taps[i][r * kernel + s] + v * vec::lanes); };
                    auto place = [&](int r, int s) KNLTRAIN_INLINE { return row + (r * points + s) * point(); };
                    if (big)
                        spread_both(matrices<kernel>.weights, in,
                                    [&](int r, int s, vec x) KNLTRAIN_INLINE { stream(place(r, s), x); });
                    else
                        spread_both(matrices<kernel>.weights, in,
                                    [&](int r, int s, vec x) KNLTRAIN_INLINE { store(place(r, s), x); });
                }
        }
        if (big) _mm_sfence();
    }

    // 16 inputs x taps x 16 outputs.
    void read(int64_t output, int64_t input, float (&taps)[kPanel][kTaps][kPanel]) const {
        for (int i = 0; i < kPanel; ++i)
            for (int tap = 0; tap < kTaps; ++tap) {
                const T *line = turned ? from + ((input + i) * kTaps + kTaps - 1 - tap) * outputs + output
                                       : from + ((output + i) * kTaps + tap) * inputs + input;
                for (int j = 0; j < kPanel; ++j) (turned ? taps[i][tap][j] : taps[j][tap][i]) = to_float(line[j]);
            }
    }
};

Block block_of(const Map &out, float *room) {
    auto last = [](int64_t size) { return int(size % kTile ? size % kTile : kTile); };
    return {reinterpret_cast<int32_t *>(room), last(out.height), last(out.width), {}};
}

// One group's products and outputs for a block of tiles, whose transformed inputs are in `a`.
template <int kernel, class T>
void multiply_tiles(const Winograd &p, const Map &out, const Tiles &a, const float *weights, int64_t group,
                    int64_t first_panel, int64_t end_panel, int64_t block_panels, const Block &block, float *products,
                    float *nowhere, const Statistics &statistics) {
    constexpr int points = Matrices<kernel>::points;
    const int64_t inputs = p.in_channels / p.groups, outputs = p.out_channels / p.groups;
    for (int64_t panel = first_panel; panel < end_panel; panel += block_panels) {
        const Tiles c{products, a.room, least(block_panels, end_panel - panel)};
        for (int point = 0; point < points * points; ++point) {
            int64_t begin, end;
            block.range<kernel>(point, begin, end);
            const float *as = a.data + point * a.point() + begin * kPanel;
            const float *b = weights + point * (inputs * outputs + kPanel) + panel * inputs * kPanel;
            float *to = c.data + point * c.point() + begin * kPanel;
            int64_t i = 0;
            for (; i + kPanels <= c.panels; i += kPanels)
                multiply_point<kPanels>(as, a.panel(), b + i * inputs * kPanel, inputs, to + i * c.panel(), c.panel(), end - begin);
            for (; i < c.panels; ++i)
                multiply_point<1>(as, a.panel(), b + i * inputs * kPanel, inputs, to + i * c.panel(), c.panel(), end - begin);
        }
        output_tiles<kernel>(out, static_cast<T *>(p.y), reinterpret_cast<T *>(nowhere), block,
                             group * outputs + panel * kPanel, static_cast<const T *>(p.bias), statistics, c);
    }
}

template <int kernel, class T> bool convolve(const Winograd &p) {
    constexpr int points = Matrices<kernel>::points;
    const int64_t inputs = p.in_channels / p.groups, outputs = p.out_channels / p.groups, panels = outputs / kPanel;
    const int64_t tiles_h = ceil_div(p.out_h, kTile), tiles_w = ceil_div(p.out_w, kTile);
    const Map in{p.in_h, p.in_w, p.in_channels, p.pad_h, p.pad_w, tiles_h, tiles_w};
    const Map out{p.out_h, p.out_w, p.out_channels, 0, 0, tiles_h, tiles_w};
    const Shares shares(p.tasks, p.images * tiles_h * tiles_w, panels, 2 * kRows);

    const int64_t weight_numbers = points * points * (inputs * outputs + kPanel);
    const bool big = weight_numbers * int64_t(sizeof(float)) > kBigWeights;
    const int64_t block_panels = least(big ? kBigPanels : kBlockPanels, ceil_div(panels, shares.by_output));
    const int64_t fit = kBlockBytes / (points * points * int64_t(sizeof(float)) * (inputs + block_panels * kPanel));
    const int64_t block_tiles = shares.block_items(big ? kBigTiles : most(kRows, fit / kRows * kRows));

    Memory memory;
    const int64_t zeros_at = memory.add(p.in_channels), weights_at = memory.add(p.groups * weight_numbers);
    const int64_t own_at = memory.numbers;
    const int64_t a_at = memory.add(Tiles::numbers(points, block_tiles, inputs / kPanel));
    const int64_t products_at = memory.add(Tiles::numbers(points, block_tiles, block_panels));
    const int64_t nowhere_at = memory.add(p.out_channels), block_at = memory.add(block_tiles);
    const int64_t statistics_at = memory.add(Statistics::numbers(p.out_channels)), own = memory.numbers - own_at;
    float *base = static_cast<float *>(aligned_alloc(kLine, (own_at + p.tasks * own) * sizeof(float)));
    if (base == nullptr) return false;
    memset(base + zeros_at, 0, p.in_channels * sizeof(float));

    auto weights = [&](int task) {
        const int64_t blocks = panels * (inputs / kPanel);
        for (int64_t group = 0; group < p.groups; ++group) {
            const T *weight = static_cast<const T *>(p.weight) + group * inputs * outputs * kernel * kernel;
            const Weights<kernel, T> w{weight, inputs, outputs, p.turned, big};
            w.transform(blocks * task / p.tasks, blocks * (task + 1) / p.tasks, base + weights_at + group * weight_numbers);
        }
    };
    each_task(p.tasks, weights);
    auto work = [&](int task) {
        float *mine = base + task * own;
        const Tiles a{mine + a_at, block_tiles, inputs / kPanel};
        const Statistics statistics = Statistics::at(mine + statistics_at, p.shift, p.out_channels);
        Block block = block_of(out, mine + block_at);
        for (int64_t group = 0; group < p.groups; ++group)
            for (int64_t first = shares.first_item(task); first < shares.end_item(task); first += block_tiles) {
                block.fill(out, first, least(first + block_tiles, shares.end_item(task)));
                transform_tiles<kernel, Inputs>(in, static_cast<const T *>(p.x), reinterpret_cast<const T *>(base + zeros_at),
                                                block, group * inputs, a);
                multiply_tiles<kernel, T>(p, out, a, base + weights_at + group * weight_numbers, group,
                                          shares.first_panel(task), shares.end_panel(task), block_panels, block,
                                          mine + products_at, mine + nowhere_at, statistics);
                statistics.end_block();
            }
    };
    each_task(p.tasks, work);
    if (p.shift != nullptr) {
        const Statistics first{p.shift, p.out_channels, nullptr,
                               reinterpret_cast<double *>(base + statistics_at + 2 * p.out_channels)};
        first.finish(p.tasks, own, p.images * p.out_h * p.out_w, p.mean, p.var);
    }
    free(base);
    return true;
}

// dw of one block of tiles and outputs: a number of taps for every pair of channels, written or, later, added to.
template <int kernel>
void add_weights(const float *products, int64_t point_numbers, int64_t outputs, int64_t inputs, bool first, float *sums) {
    constexpr int points = Matrices<kernel>::points;
    for (int64_t at = 0; at < outputs * inputs; at += vec::lanes) {
        float *to = sums + at / inputs * kernel * kernel * inputs + at % inputs;
        gather_both(
            matrices<kernel>.weights,
            [&](int i, int j) KNLTRAIN_INLINE { return load(products + (i * points + j) * point_numbers + at); },
            [&](int i, int j, vec w) KNLTRAIN_INLINE {
                float *tap = to + (i * kernel + j) * inputs;
                store(tap, first ? w : load(tap) + w);
            });
    }
}

// Transforms a block of dy, and adds it to the gradient of the bias, if there is one: to float64 sums, a block at a time.
template <int kernel, class T>
void transform_outputs(const WinogradWeightGrad &p, const Map &map, const T *zeros, const Block &block, int64_t output,
                       const Tiles &d, float *sums, double *totals) {
    const T *dy = static_cast<const T *>(p.dy);
    if (p.dbias == nullptr) return transform_tiles<kernel, Outputs>(map, dy, zeros, block, output, d);
    memset(sums, 0, d.panels * kPanel * sizeof(float));
    transform_tiles<kernel, SummedOutputs>(map, dy, zeros, block, output, d, sums);
    for (int64_t i = 0; i < d.panels * kPanel; ++i) totals[output + i] += sums[i];
}

template <int kernel, class T> bool weight_gradient(const WinogradWeightGrad &p) {
    constexpr int points = Matrices<kernel>::points, taps = kernel * kernel, in_place = sizeof(T) == sizeof(float);
    const int64_t inputs = p.in_channels / p.groups, outputs = p.out_channels / p.groups, panels = outputs / kPanel;
    const int64_t tiles_h = ceil_div(p.out_h, kTile), tiles_w = ceil_div(p.out_w, kTile);
    const int64_t size = p.out_channels * taps * inputs;
    const Map in{p.in_h, p.in_w, p.in_channels, p.pad_h, p.pad_w, tiles_h, tiles_w};
    const Map out{p.out_h, p.out_w, p.out_channels, 0, 0, tiles_h, tiles_w};
    const Shares shares(p.tasks, p.images * tiles_h * tiles_w, panels, kEnoughTiles);
    const int64_t block_tiles = shares.block_items(kernel == 3 ? 64 : 48), block_panels = least(2, panels);
    const int64_t point_numbers = block_panels * kPanel * inputs + kPanel;

    Memory memory;
    const int64_t zeros_at = memory.add(most(p.in_channels, p.out_channels));
    const int64_t sums_at = memory.add((shares.by_item - in_place) * size), own_at = memory.numbers;
    const int64_t bias_at = memory.add(2 * p.out_channels), bias_block_at = memory.add(block_panels * kPanel);
    const int64_t v_at = memory.add(Tiles::numbers(points, block_tiles, inputs / kPanel));
    const int64_t d_at = memory.add(Tiles::numbers(points, block_tiles, block_panels));
    const int64_t products_at = memory.add(points * points * point_numbers), block_at = memory.add(block_tiles);
    const int64_t own = memory.numbers - own_at;
    float *base = static_cast<float *>(aligned_alloc(kLine, (own_at + p.tasks * own) * sizeof(float)));
    if (base == nullptr) return false;
    memset(base + zeros_at, 0, most(p.in_channels, p.out_channels) * sizeof(float));
    const T *zeros = reinterpret_cast<const T *>(base + zeros_at);

    // Each share of the tiles has sums of its own, the first those in dw if it is float32.
    auto sums_of = [&](int64_t part) {
        return in_place && part == 0 ? static_cast<float *>(p.dw) : base + sums_at + (part - in_place) * size;
    };
    auto work = [&](int task) {
        float *mine = base + task * own;
        const int64_t begin = shares.first_item(task), end = shares.end_item(task);
        const Tiles v{mine + v_at, block_tiles, inputs / kPanel};
        Block block = block_of(out, mine + block_at);
        if (p.dbias != nullptr) memset(mine + bias_at, 0, p.out_channels * sizeof(double));
        for (int64_t group = 0; group < p.groups; ++group)
            for (int64_t first = begin; first == begin || first < end; first += block_tiles) {
                block.fill(out, first, least(first + block_tiles, end));
                transform_tiles<kernel, Inputs>(in, static_cast<const T *>(p.x), zeros, block, group * inputs, v);
                for (int64_t panel = shares.first_panel(task); panel < shares.end_panel(task); panel += block_panels) {
                    const Tiles d{mine + d_at, block_tiles, least(block_panels, shares.end_panel(task) - panel)};
                    const int64_t output = group * outputs + panel * kPanel;
                    transform_outputs<kernel>(p, out, zeros, block, output, d, mine + bias_block_at,
                                              reinterpret_cast<double *>(mine + bias_at));
                    for (int point = 0; point < points * points; ++point) {
                        int64_t first_tile, end_tile;
                        block.range<kernel>(point, first_tile, end_tile);
                        multiply_outer_point(d.from(first_tile), v.from(first_tile), point, end_tile - first_tile,
                                       mine + products_at + point * point_numbers);
                    }
                    add_weights<kernel>(mine + products_at, point_numbers, d.panels * kPanel, inputs, first == begin,
                                        sums_of(task / shares.by_output) + output * taps * inputs);
                }
            }
    };
    each_task(p.tasks, work);
    auto finish = [&](int task) {
        const int64_t lines = size / kPanel, begin = lines * task / p.tasks, end = lines * (task + 1) / p.tasks;
        for (int64_t at = begin * kPanel; at < end * kPanel; at += vec::lanes) {
            vec total = load(sums_of(0) + at);
            for (int part = 1; part < shares.by_item; ++part) total += load(sums_of(part) + at);
            store(static_cast<T *>(p.dw) + at, total);
        }
    };
    if (!in_place || shares.by_item > 1) each_task(p.tasks, finish);
    for (int64_t output = 0; p.dbias != nullptr && output < p.out_channels; ++output) {
        double total = 0;
        for (int task = 0; task < p.tasks; ++task)
            total += reinterpret_cast<const double *>(base + task * own + bias_at)[output];
        store_first(static_cast<T *>(p.dbias) + output, splat(float(total)), 1);
    }
    free(base);
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
