// The Python module knltrain._kernels. Addresses come in as integers: what is behind them has been checked in Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "ccl.h"
#include "cpu.h"
#include "jpeg.h"
#include "kernels.h"
#include "parallel.h"

namespace nb = nanobind;
using namespace knltrain;
using Address = uintptr_t;

namespace {

struct Variant {
    const char *name;
    bool runs;
    const Kernels *kernels;
};

// From the plainest to the fastest.
const std::vector<Variant> &variants() {
    static const CpuFeatures cpu = cpu_features();
    static const std::vector<Variant> all = {{"avx2", cpu.avx2, &avx2::kernels},
                                             {"avx512f", cpu.avx512f, &avx512f::kernels},
                                             {"avx512", cpu.avx512, &avx512::kernels},
                                             {"avx512_bf16", cpu.avx512_bf16, &avx512_bf16::kernels}};
    return all;
}

const Kernels *chosen = nullptr;

void use_isa(const std::string &name) {
    for (const Variant &variant : variants())
        if (variant.name == name && variant.runs) {
            chosen = variant.kernels;
            return;
        }
    throw std::invalid_argument("this processor does not run " + name);
}

// 64 KiB of float32: long enough to stream, short enough to divide small networks over many threads.
constexpr int64_t kChunk = 16384;

// The parts of a ParameterList that a call owns.
struct OwnedList {
    std::vector<Parameter> parameters;
    std::vector<Chunk> chunks;
    std::vector<double> gradient_squares, weight_squares;
    void add(Parameter p) {
        p.first_chunk = int64_t(chunks.size());
        for (int64_t begin = 0; begin < p.size; begin += kChunk)
            chunks.push_back({int64_t(parameters.size()), begin, std::min(kChunk, p.size - begin)});
        p.chunks = int64_t(chunks.size()) - p.first_chunk;
        parameters.push_back(p);
    }
    void run(void (*step)(const ParameterList &), int tasks) {
        if (parameters.empty()) return;
        gradient_squares.resize(chunks.size());
        weight_squares.resize(chunks.size());
        step({parameters.data(), int64_t(parameters.size()), chunks.data(), gradient_squares.data(),
              weight_squares.data(), std::max(1, std::min(tasks, int(chunks.size())))});
    }
};

using Sizes = std::vector<int64_t>;
using Addresses = std::vector<Address>;
using Numbers = std::vector<float>;

template <class T> T *at(Address address) { return reinterpret_cast<T *>(address); }

// The most source pixels that one output pixel is made of, where `length` pixels become `out` and there are `in`.
int64_t taps(double length, int64_t out, int64_t in) {
    return std::min(in, 2 * int64_t(std::ceil(std::max(1.0, length / double(out)))) + 1);
}

MaxPool max_pool(const Sizes &x_shape, const Sizes &y_shape, const Sizes &kernel, const Sizes &stride,
                 const Sizes &padding, bool is_bf16) {
    MaxPool p{};
    p.images = x_shape[0], p.channels = x_shape[1], p.in_h = x_shape[2], p.in_w = x_shape[3];
    p.out_h = y_shape[2], p.out_w = y_shape[3], p.kernel_h = kernel[0], p.kernel_w = kernel[1];
    p.stride_h = stride[0], p.stride_w = stride[1], p.pad_h = padding[0], p.pad_w = padding[1], p.is_bf16 = is_bf16;
    return p;
}

}  // namespace

NB_MODULE(_kernels, m) {
    m.def("supported_isas", [] {
        std::vector<std::string> names;
        for (const Variant &variant : variants())
            if (variant.runs) names.push_back(variant.name);
        return names;
    });
    nb::set_leak_warnings(false);  // a process that ends with an error keeps what oneCCL may still use
    bind_ccl(m);
    m.def("use_isa", use_isa);
    m.def("use_openmp", [](Address parallel, Address thread_num, Address num_threads) {
        use_openmp(at<void>(parallel), at<void>(thread_num), at<void>(num_threads));
    });

    m.def("use_libjpeg", use_libjpeg);
    nb::class_<Jpeg>(m, "Jpeg")
        .def("__init__",
             [](Jpeg *self, nb::bytes data) {
                 new (self) Jpeg(reinterpret_cast<const uint8_t *>(data.c_str()), data.size());
             },
             nb::keep_alive<1, 2>())
        .def_prop_ro("height", &Jpeg::height)
        .def_prop_ro("width", &Jpeg::width)
        .def_prop_ro("header", &Jpeg::header)
        .def_prop_ro("becomes_rgb", &Jpeg::becomes_rgb)
        .def("begin",
             [](Jpeg &self, int64_t top, int64_t left, int64_t height, int64_t width, int denominator) {
                 nb::gil_scoped_release others_run;
                 const Jpeg::Window window = self.begin({top, left, height, width}, denominator);
                 return std::array<int64_t, 4>{window.top, window.left, window.height, window.width};
             })
        .def("read", [](Jpeg &self, Address pixels) { self.read(at<uint8_t>(pixels)); },
             nb::call_guard<nb::gil_scoped_release>());

    m.def(
        "batch_norm_forward",
        [](Address x, Address residual, Address weight, Address bias, Address mean, Address var, Address y, int64_t rows,
           int64_t channels, bool is_bf16, bool training, bool relu, float cap, float eps, int tasks) {
            std::vector<double> scratch((2 * tasks + 2) * channels);
            BatchNorm p{};
            p.rows = rows, p.channels = channels, p.is_bf16 = is_bf16, p.training = training, p.relu = relu;
            p.cap = cap, p.eps = eps, p.tasks = tasks, p.scratch = scratch.data();
            p.x = at<void>(x), p.residual = at<void>(residual), p.y = at<void>(y);
            p.weight = at<float>(weight), p.bias = at<float>(bias), p.mean = at<float>(mean), p.var = at<float>(var);
            chosen->batch_norm_forward(p);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "batch_norm_backward",
        [](Address dy, Address x, Address y, Address weight, Address bias, Address mean, Address var, Address dx,
           Address dresidual, Address dweight, Address dbias, int64_t rows, int64_t channels, bool is_bf16,
           bool training, bool relu, float cap, float eps, int tasks) {
            std::vector<double> scratch((2 * tasks + 2) * channels);
            BatchNorm p{};
            p.rows = rows, p.channels = channels, p.is_bf16 = is_bf16, p.training = training, p.relu = relu;
            p.cap = cap, p.eps = eps, p.tasks = tasks, p.scratch = scratch.data();
            p.dy = at<void>(dy), p.x = at<void>(x), p.y = at<void>(y);
            p.weight = at<float>(weight), p.bias = at<float>(bias), p.mean = at<float>(mean), p.var = at<float>(var);
            p.dx = at<void>(dx), p.dresidual = at<void>(dresidual);
            p.dweight = at<float>(dweight), p.dbias = at<float>(dbias);
            chosen->batch_norm_backward(p);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "conv_weight_grad",
        [](Address x, Address dy, Address dw, const std::vector<int64_t> &x_shape, const std::vector<int64_t> &dy_shape,
           const std::vector<int64_t> &kernel, const std::vector<int64_t> &stride, const std::vector<int64_t> &padding,
           int64_t groups, bool is_bf16, int tasks) {
            ConvWeightGrad p{};
            p.images = x_shape[0], p.in_channels = x_shape[1], p.in_h = x_shape[2], p.in_w = x_shape[3];
            p.out_channels = dy_shape[1], p.out_h = dy_shape[2], p.out_w = dy_shape[3];
            p.kernel_h = kernel[0], p.kernel_w = kernel[1], p.stride_h = stride[0], p.stride_w = stride[1];
            p.pad_h = padding[0], p.pad_w = padding[1], p.groups = groups;
            p.x = at<void>(x), p.dy = at<void>(dy), p.dw = at<void>(dw), p.is_bf16 = is_bf16, p.tasks = tasks;
            return chosen->conv_weight_grad(p);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "pointwise",
        [](Address x, Address weight, Address bias, Address shift, Address y, Address mean, Address var,
           const std::vector<int64_t> &x_shape, const std::vector<int64_t> &y_shape, const std::vector<int64_t> &stride,
           bool turned, int tasks) {
            Pointwise p{};
            p.images = x_shape[0], p.in_channels = x_shape[1], p.in_h = x_shape[2], p.in_w = x_shape[3];
            p.out_channels = y_shape[1], p.out_h = y_shape[2], p.out_w = y_shape[3];
            p.stride_h = stride[0], p.stride_w = stride[1], p.turned = turned;
            p.x = at<float>(x), p.weight = at<float>(weight), p.bias = at<float>(bias), p.y = at<float>(y);
            p.shift = at<float>(shift), p.mean = at<float>(mean), p.var = at<float>(var), p.tasks = tasks;
            return chosen->pointwise(p);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "winograd",
        [](Address x, Address weight, Address bias, Address shift, Address y, Address mean, Address var,
           const std::vector<int64_t> &x_shape, const std::vector<int64_t> &y_shape, int64_t kernel,
           const std::vector<int64_t> &padding, int64_t groups, bool turned, bool is_bf16, int tasks) {
            Winograd p{};
            p.images = x_shape[0], p.in_channels = x_shape[1], p.in_h = x_shape[2], p.in_w = x_shape[3];
            p.out_channels = y_shape[1], p.out_h = y_shape[2], p.out_w = y_shape[3];
            p.kernel = kernel, p.pad_h = padding[0], p.pad_w = padding[1], p.groups = groups, p.turned = turned;
            p.x = at<void>(x), p.weight = at<void>(weight), p.bias = at<void>(bias), p.y = at<void>(y);
            p.is_bf16 = is_bf16;
            p.shift = at<float>(shift), p.mean = at<float>(mean), p.var = at<float>(var), p.tasks = tasks;
            return chosen->winograd(p);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "winograd_weight_grad",
        [](Address x, Address dy, Address dw, Address dbias, const std::vector<int64_t> &x_shape,
           const std::vector<int64_t> &dy_shape, int64_t kernel, const std::vector<int64_t> &padding, int64_t groups,
           bool is_bf16, int tasks) {
            WinogradWeightGrad p{};
            p.images = x_shape[0], p.in_channels = x_shape[1], p.in_h = x_shape[2], p.in_w = x_shape[3];
            p.out_channels = dy_shape[1], p.out_h = dy_shape[2], p.out_w = dy_shape[3];
            p.kernel = kernel, p.pad_h = padding[0], p.pad_w = padding[1], p.groups = groups;
            p.x = at<void>(x), p.dy = at<void>(dy), p.dw = at<void>(dw), p.dbias = at<void>(dbias);
            p.is_bf16 = is_bf16, p.tasks = tasks;
            return chosen->winograd_weight_grad(p);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "crop_flip_normalize",
        [](Address pixels, Address each, Address sizes, Address boxes, Address flips, Address out, int64_t images,
           int64_t in_h, int64_t in_w, int64_t out_h, int64_t out_w, const Numbers &scale, const Numbers &shift,
           bool is_bf16, int tasks) {
            Crops p{};
            p.pixels = at<uint8_t>(pixels), p.image = at<const uint8_t *>(each), p.sizes = at<int64_t>(sizes);
            p.boxes = at<double>(boxes), p.flips = at<bool>(flips);
            p.out = at<void>(out);
            p.images = images, p.in_h = in_h, p.in_w = in_w, p.out_h = out_h, p.out_w = out_w;
            p.scale = scale.data(), p.shift = shift.data(), p.is_bf16 = is_bf16, p.tasks = tasks;
            for (int64_t i = 0; p.boxes != nullptr && i < images; ++i) {
                p.taps_h = std::max(p.taps_h, taps(p.boxes[4 * i + 2], out_h, in_h));
                p.taps_w = std::max(p.taps_w, taps(p.boxes[4 * i + 3], out_w, in_w));
            }
            std::vector<float> scratch(tasks * crop_scratch(p));
            p.scratch = scratch.data();
            chosen->crop_flip_normalize(p);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "dropout_forward",
        [](Address x, Address y, int64_t count, uint32_t key0, uint32_t key1, float threshold, float scale,
           bool is_bf16, bool relu, int tasks) {
            Dropout p{count, {key0, key1}, threshold, scale, is_bf16, relu, tasks, at<void>(x), at<void>(y), {}, {}};
            chosen->dropout_forward(p);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "dropout_backward",
        [](Address dy, Address y, Address dx, int64_t count, uint32_t key0, uint32_t key1, float threshold, float scale,
           bool is_bf16, bool relu, int tasks) {
            Dropout p{count, {key0, key1}, threshold, scale, is_bf16, relu, tasks, {}, at<void>(y), at<void>(dy),
                      at<void>(dx)};
            chosen->dropout_backward(p);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "local_response_norm_forward",
        [](Address x, Address y, int64_t rows, int64_t channels, int64_t size, float alpha, bool is_bf16, int tasks) {
            std::vector<float> scratch(tasks * kResponseNormRows * 3 * (channels + size));
            ResponseNorm p{};
            p.rows = rows, p.channels = channels, p.size = size, p.alpha = alpha, p.is_bf16 = is_bf16;
            p.x = at<void>(x), p.y = at<void>(y), p.scratch = scratch.data(), p.tasks = tasks;
            chosen->local_response_norm_forward(p);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "local_response_norm_backward",
        [](Address dy, Address x, Address dx, int64_t rows, int64_t channels, int64_t size, float alpha, bool is_bf16,
           int tasks) {
            std::vector<float> scratch(tasks * kResponseNormRows * 3 * (channels + size));
            ResponseNorm p{};
            p.rows = rows, p.channels = channels, p.size = size, p.alpha = alpha, p.is_bf16 = is_bf16;
            p.dy = at<void>(dy), p.x = at<void>(x), p.dx = at<void>(dx);
            p.scratch = scratch.data(), p.tasks = tasks;
            chosen->local_response_norm_backward(p);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "max_pool_forward",
        [](Address x, Address y, Address winner, const Sizes &x_shape, const Sizes &y_shape, const Sizes &kernel,
           const Sizes &stride, const Sizes &padding, bool is_bf16, bool relu, int tasks) {
            MaxPool p = max_pool(x_shape, y_shape, kernel, stride, padding, is_bf16);
            p.x = at<void>(x), p.y = at<void>(y), p.winner = at<uint8_t>(winner), p.relu = relu, p.tasks = tasks;
            chosen->max_pool_forward(p);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "max_pool_backward",
        [](Address dy, Address winner, Address dx, const Sizes &x_shape, const Sizes &y_shape, const Sizes &kernel,
           const Sizes &stride, const Sizes &padding, bool is_bf16, int tasks) {
            MaxPool p = max_pool(x_shape, y_shape, kernel, stride, padding, is_bf16);
            p.dy = at<void>(dy), p.winner = at<uint8_t>(winner), p.dx = at<void>(dx), p.tasks = tasks;
            chosen->max_pool_backward(p);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "lars_step",
        [](const Addresses &weights, const Addresses &gradients, const Addresses &buffers, const Addresses &copies,
           Address squares, const std::vector<int64_t> &sizes, const std::vector<bool> &gradient_is_bf16,
           const Numbers &lr, const Numbers &momentum, const Numbers &weight_decay, const Numbers &trust_coefficient,
           const Numbers &eps, const std::vector<bool> &adapt, const std::vector<bool> &clip,
           const std::vector<bool> &nesterov, int tasks) {
            OwnedList list;
            for (size_t i = 0; i < weights.size(); ++i) {
                Parameter p{};
                p.weight = at<float>(weights[i]), p.buffer = at<float>(buffers[i]);
                p.gradient = at<void>(gradients[i]), p.copy = at<void>(copies[i]);
                p.squares = at<double>(squares) + i;
                p.size = sizes[i], p.gradient_is_bf16 = gradient_is_bf16[i];
                p.lr = lr[i], p.momentum = momentum[i], p.weight_decay = weight_decay[i];
                p.trust_coefficient = trust_coefficient[i], p.eps = eps[i];
                p.adapt = adapt[i], p.clip = clip[i], p.nesterov = nesterov[i];
                list.add(p);
            }
            list.run(chosen->lars_step, tasks);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "sgd_step",
        [](const Addresses &weights, const Addresses &gradients, const Addresses &buffers, const Addresses &copies,
           const std::vector<int64_t> &sizes, const std::vector<bool> &gradient_is_bf16, const Numbers &lr,
           const Numbers &momentum, const Numbers &weight_decay, const std::vector<bool> &nesterov, int tasks) {
            OwnedList list;
            for (size_t i = 0; i < weights.size(); ++i) {
                Parameter p{};
                p.weight = at<float>(weights[i]), p.buffer = at<float>(buffers[i]);
                p.gradient = at<void>(gradients[i]), p.copy = at<void>(copies[i]);
                p.size = sizes[i], p.gradient_is_bf16 = gradient_is_bf16[i];
                p.lr = lr[i], p.momentum = momentum[i], p.weight_decay = weight_decay[i];
                p.nesterov = nesterov[i];
                list.add(p);
            }
            list.run(chosen->sgd_step, tasks);
        },
        nb::call_guard<nb::gil_scoped_release>());
}
