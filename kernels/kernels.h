// The kernels of one instruction set, and what they take.
//
// Tensors are pointers to contiguous memory; knltrain/ops has checked types, layouts and sizes before. `tasks` is the
// number of parts that the work is cut into, one thread each. Some pointers may be null, as said beside them.
#pragma once

#include <cstdint>

namespace knltrain {

// Batch normalisation over the rows of a rows x channels matrix (N, H and W of a channels-last image are its rows),
// then an optional residual, then an optional ReLU, which may have an upper bound.
struct BatchNorm {
    int64_t rows, channels;
    bool is_bf16;   // x, residual, y, dy, dx and dresidual: bf16, else float32; everything else is float32
    bool training;  // statistics of x are computed (forward) and part of the gradient (backward)
    bool relu;
    float cap;  // of the ReLU; infinity: none
    float eps;
    int tasks;
    const void *x, *residual;  // residual may be null
    const float *weight, *bias;
    float *mean, *var;  // biased; written by the forward pass in training
    void *y;            // backward: read where there are a dresidual and a ReLU, else may be null
    const void *dy;
    void *dx, *dresidual;  // dresidual may be null
    float *dweight, *dbias;
    double *scratch;  // batch_norm_scratch() elements
};
static inline int64_t batch_norm_scratch(const BatchNorm &p) { return (2 * p.tasks + 2) * p.channels; }

// The gradient of a convolution's weights, without dilation. A group has a multiple of 8 channels out and, where there
// are several groups, of 16 in.
struct ConvWeightGrad {
    int64_t images, in_channels, out_channels, groups;
    int64_t in_h, in_w, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
    const void *x, *dy;  // N x H x W x C
    void *dw;            // out_channels x kernel_h x kernel_w x in_channels / groups
    bool is_bf16;        // x, dy and dw: bf16, else float32
    int tasks;
};

// A float32 convolution with a kernel of 1x1, without padding, dilation or groups. Channels: multiples of 16.
struct Pointwise {
    int64_t images, in_channels, out_channels;
    int64_t in_h, in_w, out_h, out_w, stride_h, stride_w;
    bool input_grad;      // computes the gradient of such a convolution's input: x is dy, and y is dx, the larger one
    const float *x;       // N x H x W x C
    const float *weight;  // out_channels x in_channels; input_grad: in_channels x out_channels
    const float *bias;    // or null
    const float *shift;   // estimates of y's means; or null: mean and var are not wanted
    float *y, *mean, *var;
    int tasks;
};

// A convolution of stride 1 without dilation, by Winograd's algorithm. Channels of a group: multiples of 16.
struct Winograd {
    int64_t images, in_channels, out_channels, groups;
    int64_t in_h, in_w, out_h, out_w, kernel, pad_h, pad_w;  // kernel: 3 or 5, each way
    bool input_grad;     // computes the gradient of such a convolution's input: x is dy, and y is dx
    bool is_bf16;        // x, weight, bias and y: bf16, else float32
    const void *x;       // N x H x W x C
    const void *weight;  // out_channels x kernel x kernel x in_channels / groups; input_grad: in and out exchanged
    const void *bias;    // or null
    const float *shift;  // estimates of y's means; or null: mean and var are not wanted
    void *y;
    float *mean, *var;
    int tasks;
};

// The gradient of such a convolution's weights.
struct WinogradWeightGrad {
    int64_t images, in_channels, out_channels, groups;
    int64_t in_h, in_w, out_h, out_w, kernel, pad_h, pad_w;
    bool is_bf16;        // x, dy, dw and dbias: bf16, else float32
    const void *x, *dy;  // N x H x W x C
    void *dw;            // out_channels x kernel x kernel x in_channels / groups
    void *dbias;         // out_channels, or null
    int tasks;
};

// The maximum of each window, then an optional ReLU. Every window has an element inside the image.
struct MaxPool {
    int64_t images, channels, in_h, in_w, out_h, out_w;
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;  // kernel_h * kernel_w <= 255
    bool is_bf16;  // x, y, dy and dx: bf16, else float32
    bool relu;
    int tasks;
    const void *x;  // N x H x W x C, as all the others
    void *y;
    uint8_t *winner;  // of y's shape: the index of y in its window, row by row; 255 where ReLU stops the gradient
    const void *dy;
    void *dx;
};

// Local response normalisation: every row divided by (1 + alpha / size * the squares of `size` channels around)^(3/4).
struct ResponseNorm {
    int64_t rows, channels;
    int64_t size;  // odd
    float alpha;
    bool is_bf16;  // x, y, dy and dx: bf16, else float32
    int tasks;
    const void *x;
    void *y;
    const void *dy;
    void *dx;
    float *scratch;  // response_norm_scratch() elements, zero
};
constexpr int kResponseNormRows = 8;
static inline int64_t response_norm_scratch(const ResponseNorm &p) {
    return p.tasks * kResponseNormRows * 3 * (p.channels + p.size);
}

// A box of each image, resampled to one size with a triangle filter, and normalised: pixel * scale + shift.
struct Crops {
    int64_t images, in_h, in_w, out_h, out_w;
    const uint8_t *pixels;            // N x in_h x in_w x 3; or null, and then
    const uint8_t *const *addresses;  // N: where height x width x 3 begin,
    const int64_t *sizes;             // N x 2: height and width, none above in_h and in_w
    const double *boxes;        // N: top, left, height and width in pixels; null: whole images, of the output's size
    const bool *flips;          // N; null: none
    float scale[3], shift[3];
    void *out;                  // N x out_h x out_w x 3
    bool is_bf16;               // out: bf16, else float32
    int64_t taps_h, taps_w;     // the most weights of an output row or column
    int tasks;
    float *scratch;  // tasks * crop_scratch() elements
};
static inline int64_t crop_scratch(const Crops &p) {
    return p.out_w * (p.taps_w + 1) + p.taps_h + 3 * p.in_w + 3 * p.out_w + 2;
}

// An optional ReLU; then each element is zeroed or scaled, by random bits that follow from key and position.
struct Dropout {
    int64_t count;
    uint32_t key[2];
    float threshold, scale;  // the fraction dropped, times 2^24; the factor of the others
    bool is_bf16;            // x, y, dy and dx: bf16, else float32
    bool relu;
    int tasks;
    const void *x;
    void *y;  // backward: read with ReLU
    const void *dy;
    void *dx;
};

// The parameters of an optimizer, and the chunks they are cut into, in order.
struct Parameter {
    float *weight, *buffer;
    const void *gradient;
    void *copy;       // bf16 copy of the weights, or null
    double *squares;  // LARS: the weights' sum of squares, NaN for unknown; overwritten with the new one
    int64_t size, first_chunk, chunks;
    float lr, momentum, weight_decay, trust_coefficient, eps;
    bool gradient_is_bf16, adapt, clip, nesterov;
    float rate;  // LARS: lr times the trust ratio; written by the kernel
};
struct Chunk {
    int64_t parameter, begin, count;
};
struct ParameterList {
    Parameter *parameters;
    int64_t count;
    const Chunk *chunks;
    double *gradient_squares, *weight_squares;  // scratch, one element a chunk
    int tasks;
};

struct Kernels {
    void (*batch_norm_forward)(const BatchNorm &);
    void (*batch_norm_backward)(const BatchNorm &);
    bool (*conv_weight_grad)(const ConvWeightGrad &);  // false: not in this instruction set, or no memory
    void (*crop_flip_normalize)(const Crops &);
    void (*dropout_forward)(const Dropout &);
    void (*dropout_backward)(const Dropout &);
    void (*local_response_norm_forward)(const ResponseNorm &);
    void (*local_response_norm_backward)(const ResponseNorm &);
    void (*max_pool_forward)(const MaxPool &);
    void (*max_pool_backward)(const MaxPool &);
    bool (*pointwise)(const Pointwise &);  // false: no memory
    void (*lars_step)(const ParameterList &);
    void (*sgd_step)(const ParameterList &);
    bool (*winograd)(const Winograd &);  // false: no memory
    bool (*winograd_weight_grad)(const WinogradWeightGrad &);
};

namespace avx2 {
extern const Kernels kernels;
}
namespace avx512f {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}

}  // namespace knltrain
