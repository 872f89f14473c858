// Max pooling of channels-last images. Backward, every pixel of x asks the windows it is in whether it was the largest:
// nothing is added to memory, so nothing needs to be zeroed before, and the order of addition is always the same.
#include "isa.h"
#include "kernels.h"
#include "parallel.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

constexpr int kMaxElements = 255;
constexpr float kNobody = 255;  // the winner where ReLU stops the gradient

struct Range {
    int64_t begin, end;
};
bool operator==(Range a, Range b) { return a.begin == b.begin && a.end == b.end; }

// The elements of a window that are inside an image of `size` pixels, where the window's first is pixel `origin`.
Range inside(int64_t origin, int64_t kernel, int64_t size) {
    return {origin < 0 ? -origin : 0, origin + kernel > size ? size - origin : kernel};
}

// The windows, of `count`, that a pixel is in; `at` is counted from the first window's first element.
Range covering(int64_t at, int64_t kernel, int64_t stride, int64_t count) {
    const int64_t end = at / stride + 1;
    return {at < kernel ? 0 : (at - kernel) / stride + 1, end < count ? end : count};
}

// A number somewhere around the current pixel, and which element of its window it belongs to or is.
struct Place {
    int64_t offset;
    float element;
};

// Calls body(channel, vectors, width) for all channels, four vectors at a time and then one: four hide instructions'
// latency, and share the walk over the window. Both are constants, but for the width of a shorter last vector.
struct one {
    constexpr operator int() const { return 1; }
};
struct four {
    constexpr operator int() const { return 4; }
};
template <class Body> inline __attribute__((always_inline)) void each_block(int64_t channels, Body &&body) {
    int64_t ch = 0;
    for (; ch + 4 * vec::lanes <= channels; ch += 4 * vec::lanes) body(ch, four{}, whole{});
    each_vector(channels - ch, [&](int64_t more, auto width) { body(ch + more, one{}, width); });
}

template <class T> void forward(const MaxPool &p) {
    const T *x = static_cast<const T *>(p.x);
    T *y = static_cast<T *>(p.y);
    auto rows = [&](int task) {
        Place places[kMaxElements];
        int count = 0;
        Range listed_h{}, listed_w{};  // what `places` holds
        const int64_t end = p.images * p.out_h * (task + 1) / p.tasks;
        for (int64_t row = p.images * p.out_h * task / p.tasks; row < end; ++row) {
            const int64_t image = row / p.out_h, top = row % p.out_h * p.stride_h - p.pad_h;
            const Range h = inside(top, p.kernel_h, p.in_h);
            for (int64_t col = 0; col < p.out_w; ++col) {
                const int64_t left = col * p.stride_w - p.pad_w;
                const Range w = inside(left, p.kernel_w, p.in_w);
                if (!(h == listed_h && w == listed_w)) {
                    listed_h = h, listed_w = w, count = 0;
                    for (int64_t i = h.begin; i < h.end; ++i)
                        for (int64_t j = w.begin; j < w.end; ++j)
                            places[count++] = {(i * p.in_w + j) * p.channels, float(i * p.kernel_w + j)};
                }
                const int64_t origin = ((image * p.in_h + top) * p.in_w + left) * p.channels;
                const int64_t to = (row * p.out_w + col) * p.channels;
                each_block(p.channels, [&](int64_t ch, auto vectors, auto width) {
                    constexpr int kVectors = decltype(vectors){};
                    vec largest[kVectors], winner[kVectors];
                    for (int v = 0; v < kVectors; ++v) {
                        largest[v] = load_first(x + (origin + places[0].offset + ch) + v * vec::lanes, width);
                        winner[v] = splat(places[0].element);
                    }
                    for (int n = 1; n < count; ++n) {
                        const T *values = x + (origin + places[n].offset + ch);
                        const vec element = splat(places[n].element);
                        for (int v = 0; v < kVectors; ++v) {
                            const vec value = load_first(values + v * vec::lanes, width);
                            // The first of equal ones wins, and the last NaN, as in torch.
                            const lane_mask larger = beats(value, largest[v]);
                            largest[v] = select(larger, value, largest[v]);
                            winner[v] = select(larger, element, winner[v]);
                        }
                    }
                    for (int v = 0; v < kVectors; ++v) {
                        if (p.relu) {
                            winner[v] = select(beats(largest[v], zero()), winner[v], splat(kNobody));
                            largest[v] = relu(largest[v]);
                        }
                        store_exact(y + to + ch + v * vec::lanes, largest[v], width);
                        store_first(p.winner + to + ch + v * vec::lanes, winner[v], width);
                    }
                });
            }
        }
    };
    each_task(p.tasks, rows);
}

template <class T> void backward(const MaxPool &p) {
    const T *dy = static_cast<const T *>(p.dy);
    T *dx = static_cast<T *>(p.dx);
    auto rows = [&](int task) {
        Place places[kMaxElements];
        const int64_t end = p.images * p.in_h * (task + 1) / p.tasks;
        for (int64_t row = p.images * p.in_h * task / p.tasks; row < end; ++row) {
            const int64_t image = row / p.in_h, from_top = row % p.in_h + p.pad_h;
            const Range h = covering(from_top, p.kernel_h, p.stride_h, p.out_h);
            for (int64_t col = 0; col < p.in_w; ++col) {
                const int64_t from_left = col + p.pad_w;
                const Range w = covering(from_left, p.kernel_w, p.stride_w, p.out_w);
                int count = 0;
                for (int64_t i = h.begin; i < h.end; ++i)
                    for (int64_t j = w.begin; j < w.end; ++j)
                        places[count++] = {
                            ((image * p.out_h + i) * p.out_w + j) * p.channels,
                            float((from_top - i * p.stride_h) * p.kernel_w + from_left - j * p.stride_w),
                        };
                const int64_t to = (row * p.in_w + col) * p.channels;
                each_block(p.channels, [&](int64_t ch, auto vectors, auto width) {
                    constexpr int kVectors = decltype(vectors){};
                    vec sum[kVectors];
                    for (int v = 0; v < kVectors; ++v) sum[v] = zero();
                    for (int n = 0; n < count; ++n) {
                        const int64_t from = places[n].offset + ch;
                        const vec element = splat(places[n].element);
                        for (int v = 0; v < kVectors; ++v) {
                            const vec gradient = load_first(dy + from + v * vec::lanes, width);
                            const vec winner = load_first(p.winner + from + v * vec::lanes, width);
                            sum[v] += select(equal(winner, element), gradient, zero());
                        }
                    }
                    for (int v = 0; v < kVectors; ++v) store_first(dx + to + ch + v * vec::lanes, sum[v], width);
                });
            }
        }
    };
    each_task(p.tasks, rows);
}

}  // namespace

void max_pool_forward(const MaxPool &p) { p.is_bf16 ? forward<bf16>(p) : forward<float>(p); }
void max_pool_backward(const MaxPool &p) { p.is_bf16 ? backward<bf16>(p) : backward<float>(p); }

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
