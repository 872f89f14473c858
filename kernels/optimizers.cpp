// LARS and SGD over a whole list of parameters: float32 weights and momentum, bf16 or float32 gradients, and a bf16
// copy of the new weights, written on the way.
//
// Parameters are cut into chunks of fixed size. A sum of squares is the sum of its chunks' sums, in order and in
// float64: the same for any number of tasks. The sum over the weights just written is bit for bit what a pass over them
// would find at the next step, so that pass is not made.
#include <float.h>
#include <math.h>

#include "common.h"
#include "kernels.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

// Gradients of a batch of parameters: what the caches still hold when it is needed again. Smaller batches would fit the
// second-level caches, and start threads so often that small layers cost more than they save.
constexpr int64_t kMaxBatchBytesPerTask = 2 << 20;

// A sum of squares in float64, which no float32 overflows.
struct SquareSum {
    dvec lanes = zero_f64();
    void add(vec a) {
        const dvec wide = widen(a);
        lanes = fma(wide, wide, lanes);
    }
    double total() const { return sum(lanes); }
};

template <class T> double square_sum(const T *values, int64_t count) {
    SquareSum squares;
    each_vector(count, [&](int64_t at, auto n) { squares.add(load(values + at, n)); });
    return squares.total();
}

// Updates elements of a parameter and returns the new ones' sum of squares. momentum_is_step: LARS, whose rate acts
// before the momentum buffer; SGD's acts after it.
template <class G, bool momentum_is_step, bool nesterov>
double update(const Parameter &p, const G *gradient, int64_t begin, int64_t count, float rate) {
    float *weight = p.weight + begin, *buffer = p.buffer + begin;
    bf16 *copy = p.copy == nullptr ? nullptr : static_cast<bf16 *>(p.copy) + begin;
    const bool streamed = is_aligned(copy);
    const vec momentum = splat(p.momentum), decay = splat(p.weight_decay), scale = splat(rate);
    SquareSum squares;
    each_vector(count, [&](int64_t at, auto n) {
        const vec w = load(weight + at, n);
        const vec g = fma(decay, w, load(gradient + at, n));
        vec v = momentum * load(buffer + at, n);
        v = momentum_is_step ? fma(scale, g, v) : v + g;
        const vec ahead = nesterov ? fma(momentum, v, momentum_is_step ? scale * g : g) : v;
        const vec step = momentum_is_step ? ahead : scale * ahead;
        const vec moved = w - step;
        store(buffer + at, v, n);
        store(weight + at, moved, n);
        if (copy != nullptr) {
            if (sizeof(n) == sizeof(whole) && streamed)
                stream(copy + at, moved);
            else
                store(copy + at, moved, n);
        }
        squares.add(moved);
    });
    return squares.total();
}

template <bool momentum_is_step>
double update_chunk(const Parameter &p, int64_t begin, int64_t count, float rate) {
    if (p.gradient_is_bf16) {
        const bf16 *gradient = static_cast<const bf16 *>(p.gradient) + begin;
        return p.nesterov ? update<bf16, momentum_is_step, true>(p, gradient, begin, count, rate)
                          : update<bf16, momentum_is_step, false>(p, gradient, begin, count, rate);
    }
    const float *gradient = static_cast<const float *>(p.gradient) + begin;
    return p.nesterov ? update<float, momentum_is_step, true>(p, gradient, begin, count, rate)
                      : update<float, momentum_is_step, false>(p, gradient, begin, count, rate);
}

// Chunks of a batch that are a task's.
Range chunks_of_task(Range chunks, int task, int tasks) {
    const Range mine = task_range(chunks.end - chunks.begin, task, tasks);
    return {chunks.begin + mine.begin, chunks.begin + mine.end};
}

float rate_of(const Parameter &p, double weight_squares, double gradient_squares) {
    const double weight = ::sqrt(weight_squares), gradient = ::sqrt(gradient_squares);
    // These comparisons are such that a NaN norm gives a NaN rate.
    if (!p.adapt || weight == 0 || gradient == 0) return p.lr;
    const double decay = p.clip ? 0 : double(p.weight_decay) * weight;
    const double ratio = double(p.trust_coefficient) * weight / (gradient + decay + double(p.eps));
    const double rate = p.clip ? (ratio > p.lr ? p.lr : ratio) : p.lr * ratio;
    // A gradient near zero would ask for more than float32 holds.
    return rate > double(FLT_MAX) ? FLT_MAX : float(rate);
}

}  // namespace

void lars_step(const ParameterList &list) {
    for (int64_t first = 0, last; first < list.count; first = last) {
        int64_t bytes = 0;
        for (last = first; last < list.count; ++last) {
            const Parameter &p = list.parameters[last];
            bytes += p.size * (p.gradient_is_bf16 ? 2 : 4);
            if (last > first && bytes > kMaxBatchBytesPerTask * list.tasks) break;
        }
        const Range chunks{list.parameters[first].first_chunk,
                           list.parameters[last - 1].first_chunk + list.parameters[last - 1].chunks};
        auto norms = [&](int task) {
            const Range mine = chunks_of_task(chunks, task, list.tasks);
            for (int64_t at = mine.begin; at < mine.end; ++at) {
                const Chunk &chunk = list.chunks[at];
                const Parameter &p = list.parameters[chunk.parameter];
                if (!p.adapt) continue;
                list.gradient_squares[at] =
                    p.gradient_is_bf16 ? square_sum(static_cast<const bf16 *>(p.gradient) + chunk.begin, chunk.count)
                                       : square_sum(static_cast<const float *>(p.gradient) + chunk.begin, chunk.count);
                if (*p.squares != *p.squares) list.weight_squares[at] = square_sum(p.weight + chunk.begin, chunk.count);
            }
        };
        each_task(list.tasks, norms);
        for (int64_t index = first; index < last; ++index) {
            Parameter &p = list.parameters[index];
            double weight = 0, gradient = 0;
            for (int64_t at = p.first_chunk; p.adapt && at < p.first_chunk + p.chunks; ++at) {
                weight += list.weight_squares[at];
                gradient += list.gradient_squares[at];
            }
            p.rate = rate_of(p, *p.squares == *p.squares ? *p.squares : weight, gradient);
        }
        auto updates = [&](int task) {
            const Range mine = chunks_of_task(chunks, task, list.tasks);
            for (int64_t at = mine.begin; at < mine.end; ++at) {
                const Chunk &chunk = list.chunks[at];
                const Parameter &p = list.parameters[chunk.parameter];
                list.weight_squares[at] = update_chunk<true>(p, chunk.begin, chunk.count, p.rate);
            }
            store_fence();
        };
        each_task(list.tasks, updates);
        for (int64_t index = first; index < last; ++index) {
            const Parameter &p = list.parameters[index];
            double weight = 0;
            for (int64_t at = p.first_chunk; at < p.first_chunk + p.chunks; ++at) weight += list.weight_squares[at];
            *p.squares = weight;
        }
    }
}

void sgd_step(const ParameterList &list) {
    const int64_t chunks = list.parameters[list.count - 1].first_chunk + list.parameters[list.count - 1].chunks;
    auto updates = [&](int task) {
        const Range mine = task_range(chunks, task, list.tasks);
        for (int64_t at = mine.begin; at < mine.end; ++at) {
            const Chunk &chunk = list.chunks[at];
            const Parameter &p = list.parameters[chunk.parameter];
            update_chunk<false>(p, chunk.begin, chunk.count, p.lr);
        }
        store_fence();
    };
    each_task(list.tasks, updates);
}

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
