// LARS and SGD over a whole list of parameters: float32 weights and momentum, bf16 or float32 gradients, and a bf16 copy
// of the new weights, written on the way.
//
// Parameters are cut into chunks of fixed size. A sum of squares is the sum of its chunks' sums, in order and in
// float64, so it is the same for any number of tasks; and the sum over the weights just written is what a pass over them
// would find at the next step, bit for bit, which is why that pass is not made.
#include <float.h>
#include <math.h>

#include "isa.h"
#include "kernels.h"

namespace knltrain {
namespace KNLTRAIN_ISA {
namespace {

// Gradients of a batch of parameters: what the caches still hold when it is needed again. Smaller batches would fit the
// second-level caches, and start threads so often that small layers cost more than they save.
constexpr int64_t kBatchBytesPerTask = 2 << 20;

struct Range {
    int64_t begin, end;
};
Range part(Range chunks, int task, int tasks) {
    const int64_t count = chunks.end - chunks.begin;
    return {chunks.begin + count * task / tasks, chunks.begin + count * (task + 1) / tasks};
}

// A sum of squares in float64, which no float32 overflows.
struct Squares {
#if defined(__AVX512F__)
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    void add(vec a) {
        const __m512d one = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
        const __m512d two = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)));
        low = _mm512_fmadd_pd(one, one, low);
        high = _mm512_fmadd_pd(two, two, high);
    }
    double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
#else
    __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
    void add(vec a) {
        const __m256d one = _mm256_cvtps_pd(_mm256_castps256_ps128(a.v));
        const __m256d two = _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1));
        low = _mm256_fmadd_pd(one, one, low);
        high = _mm256_fmadd_pd(two, two, high);
    }
    double total() const {
        double lane[4];
        _mm256_storeu_pd(lane, _mm256_add_pd(low, high));
        return (lane[0] + lane[1]) + (lane[2] + lane[3]);
    }
#endif
};

template <class T> double squares(const T *values, int64_t count) {
    Squares sum;
    each_vector(count, [&](int64_t at, auto n) { sum.add(load_first(values + at, n)); });
    return sum.total();
}

template <class G, bool momentum_is_step, bool nesterov>
double update(const Parameter &p, const G *gradient, int64_t begin, int64_t count, float rate) {
    float *weight = p.weight + begin, *buffer = p.buffer + begin;
    bf16 *copy = p.copy == nullptr ? nullptr : static_cast<bf16 *>(p.copy) + begin;
    const bool around = reinterpret_cast<uintptr_t>(copy) % 64 == 0;
    const vec momentum = splat(p.momentum), decay = splat(p.weight_decay), scale = splat(rate);
    Squares sum;
    each_vector(count, [&](int64_t at, auto n) {
        const vec w = load_first(weight + at, n);
        const vec g = fma(decay, w, load_first(gradient + at, n));
        vec v = momentum * load_first(buffer + at, n);
        v = momentum_is_step ? fma(scale, g, v) : v + g;
        const vec ahead = nesterov ? fma(momentum, v, momentum_is_step ? scale * g : g) : v;
        const vec step = momentum_is_step ? ahead : scale * ahead;
        const vec moved = w - step;
        store_first(buffer + at, v, n);
        store_first(weight + at, moved, n);
        if (copy != nullptr) {
            if (sizeof(n) == 1 && around)  // a whole vector
                stream(copy + at, moved);
            else
                store_first(copy + at, moved, n);
        }
        sum.add(moved);
    });
    return sum.total();
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

float rate_of(const Parameter &p, double weight_squares, double gradient_squares) {
    const double weight = ::sqrt(weight_squares), gradient = ::sqrt(gradient_squares);
    // Written so that a norm that is no number makes the rate no number either.
    if (!p.adapt || weight == 0 || gradient == 0) return p.lr;
    const double decay = p.clip ? 0 : double(p.weight_decay) * weight;
    const double ratio = double(p.trust_coefficient) * weight / (gradient + decay + double(p.eps));
    const double rate = p.clip ? (ratio > p.lr ? p.lr : ratio) : p.lr * ratio;
    // A gradient that is nearly nothing would ask for more than float32 holds.
    return rate > double(FLT_MAX) ? FLT_MAX : float(rate);
}

}  // namespace

void lars_step(const ParameterList &list) {
    for (int64_t first = 0, last; first < list.count; first = last) {
        int64_t bytes = 0;
        for (last = first; last < list.count; ++last) {
            const Parameter &p = list.parameters[last];
            bytes += p.size * (p.gradient_is_bf16 ? 2 : 4);
            if (last > first && bytes > kBatchBytesPerTask * list.tasks) break;
        }
        const Range chunks{list.parameters[first].first_chunk,
                           list.parameters[last - 1].first_chunk + list.parameters[last - 1].chunks};
        auto norms = [&](int task) {
            const Range mine = part(chunks, task, list.tasks);
            for (int64_t at = mine.begin; at < mine.end; ++at) {
                const Chunk &chunk = list.chunks[at];
                const Parameter &p = list.parameters[chunk.parameter];
                if (!p.adapt) continue;
                list.gradient_squares[at] =
                    p.gradient_is_bf16 ? squares(static_cast<const bf16 *>(p.gradient) + chunk.begin, chunk.count)
                                       : squares(static_cast<const float *>(p.gradient) + chunk.begin, chunk.count);
                if (*p.squares != *p.squares) list.weight_squares[at] = squares(p.weight + chunk.begin, chunk.count);
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
            const Range mine = part(chunks, task, list.tasks);
            for (int64_t at = mine.begin; at < mine.end; ++at) {
                const Chunk &chunk = list.chunks[at];
                const Parameter &p = list.parameters[chunk.parameter];
                list.weight_squares[at] = update_chunk<true>(p, chunk.begin, chunk.count, p.rate);
            }
            _mm_sfence();
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
        const Range mine = part({0, chunks}, task, list.tasks);
        for (int64_t at = mine.begin; at < mine.end; ++at) {
            const Chunk &chunk = list.chunks[at];
            const Parameter &p = list.parameters[chunk.parameter];
            update_chunk<false>(p, chunk.begin, chunk.count, p.lr);
        }
        _mm_sfence();
    };
    each_task(list.tasks, updates);
}

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
