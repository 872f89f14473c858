// Max pooling of channels-last images.
//
// The backward pass goes over the pixels of x and sums the gradients of the windows in which each was the largest. So
// nothing has to be zeroed before, and the order of addition is always the same.
#include "common.h"
#include "kernels.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

constexpr int kMaxElements = 255;
constexpr float kNoWinner = 255;  // where ReLU stops the gradient

// The elements of a window that are inside an image of `size` pixels, where pixel `origin` is the window's first.
Range elements_inside(int64_t origin, int64_t kernel, int64_t size) {
    return {origin < 0 ? -origin : 0, origin + kernel > size ? size - origin : kernel};
}

// The windows, of `count`, that contain a pixel; `at` is counted from the first window's first element.
Range windows_around(int64_t at, int64_t kernel, int64_t stride, int64_t count) {
    const int64_t end = at / stride + 1;
    return {at < kernel ? 0 : (at - kernel) / stride + 1, end < count ? end : count};
}

// Forward, an element of a window: its offset and index. Backward, a window around the pixel: its offset, and the index
// that the pixel has in it.
struct Candidate {
    int64_t offset;
    float element;
};

// Calls body(channel, Constant<vectors>, width) for all channels, four vectors at a time and then one. Four hide the
// latency of instructions and share the loop over the window.
template <class Body> inline KNLTRAIN_INLINE void each_block(int64_t channels, Body &&body) {
    int64_t ch = 0;
    for (; ch + 4 * vec::lanes <= channels; ch += 4 * vec::lanes) body(ch, Constant<4>{}, whole{});
    each_vector(channels - ch, [&](int64_t more, auto width) { body(ch + more, Constant<1>{}, width); });
}

template <class T> void forward(const MaxPool &p) {
    const T *x = static_cast<const T *>(p.x);
    T *y = static_cast<T *>(p.y);
    auto work = [&](int task) {
        Candidate candidates[kMaxElements];
        int count = 0;
        Range listed_h{}, listed_w{};  // of `candidates`
        const Range rows = task_range(p.images * p.out_h, task, p.tasks);
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            const int64_t image = row / p.out_h, top = row % p.out_h * p.stride_h - p.pad_h;
            const Range h = elements_inside(top, p.kernel_h, p.in_h);
            for (int64_t col = 0; col < p.out_w; ++col) {
                const int64_t left = col * p.stride_w - p.pad_w;
                const Range w = elements_inside(left, p.kernel_w, p.in_w);
                if (!(h == listed_h && w == listed_w)) {
                    listed_h = h, listed_w = w, count = 0;
                    for (int64_t i = h.begin; i < h.end; ++i)
                        for (int64_t j = w.begin; j < w.end; ++j)
                            candidates[count++] = {(i * p.in_w + j) * p.channels, float(i * p.kernel_w + j)};
                }
                const int64_t origin = ((image * p.in_h + top) * p.in_w + left) * p.channels;
                const int64_t to = (row * p.out_w + col) * p.channels;
                each_block(p.channels, [&](int64_t ch, auto vectors, auto width) {
                    constexpr int kVectors = decltype(vectors)::value;
                    vec largest[kVectors], winner[kVectors];
                    for (int v = 0; v < kVectors; ++v) {
                        largest[v] = load(x + (origin + candidates[0].offset + ch) + v * vec::lanes, width);
                        winner[v] = splat(candidates[0].element);
                    }
                    for (int n = 1; n < count; ++n) {
                        const T *values = x + (origin + candidates[n].offset + ch);
                        const vec element = splat(candidates[n].element);
                        for (int v = 0; v < kVectors; ++v) {
                            const vec value = load(values + v * vec::lanes, width);
                            // The first of equal elements wins, and the last NaN, as in torch.
                            const lane_mask larger = gt_or_nan(value, largest[v]);
                            largest[v] = select(larger, value, largest[v]);
                            winner[v] = select(larger, element, winner[v]);
                        }
                    }
                    for (int v = 0; v < kVectors; ++v) {
                        if (p.relu) {
                            winner[v] = select(gt_or_nan(largest[v], zero()), winner[v], splat(kNoWinner));
                            largest[v] = relu(largest[v]);
                        }
                        store_exact(y + to + ch + v * vec::lanes, largest[v], width);
                        store(p.winner + to + ch + v * vec::lanes, winner[v], width);
                    }
                });
            }
        }
    };
    each_task(p.tasks, work);
}

template <class T> void backward(const MaxPool &p) {
    const T *dy = static_cast<const T *>(p.dy);
    T *dx = static_cast<T *>(p.dx);
    auto work = [&](int task) {
        Candidate candidates[kMaxElements];
        const Range rows = task_range(p.images * p.in_h, task, p.tasks);
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            const int64_t image = row / p.in_h, from_top = row % p.in_h + p.pad_h;
            const Range h = windows_around(from_top, p.kernel_h, p.stride_h, p.out_h);
            for (int64_t col = 0; col < p.in_w; ++col) {
                const int64_t from_left = col + p.pad_w;
                const Range w = windows_around(from_left, p.kernel_w, p.stride_w, p.out_w);
                int count = 0;
                for (int64_t i = h.begin; i < h.end; ++i)
                    for (int64_t j = w.begin; j < w.end; ++j)
                        candidates[count++] = {
                            ((image * p.out_h + i) * p.out_w + j) * p.channels,
                            float((from_top - i * p.stride_h) * p.kernel_w + from_left - j * p.stride_w),
                        };
                const int64_t to = (row * p.in_w + col) * p.channels;
                each_block(p.channels, [&](int64_t ch, auto vectors, auto width) {
                    constexpr int kVectors = decltype(vectors)::value;
                    vec sum[kVectors];
                    for (int v = 0; v < kVectors; ++v) sum[v] = zero();
                    for (int n = 0; n < count; ++n) {
                        const int64_t from = candidates[n].offset + ch;
                        const vec element = splat(candidates[n].element);
                        for (int v = 0; v < kVectors; ++v) {
                            const vec gradient = load(dy + from + v * vec::lanes, width);
                            const vec winner = load(p.winner + from + v * vec::lanes, width);
                            sum[v] += select_or_zero(eq(winner, element), gradient);
                        }
                    }
                    for (int v = 0; v < kVectors; ++v) store(dx + to + ch + v * vec::lanes, sum[v], width);
                });
            }
        }
    };
    each_task(p.tasks, work);
}

}  // namespace

void max_pool_forward(const MaxPool &p) { p.is_bf16 ? forward<bf16>(p) : forward<float>(p); }
void max_pool_backward(const MaxPool &p) { p.is_bf16 ? backward<bf16>(p) : backward<float>(p); }

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
