// The Python module knltrain._kernels.
//
// Addresses are integers: knltrain/ops has checked what they point to. A kernel takes its arguments by keyword alone,
// and each keyword is given here beside the member that it fills, so that two exchanged addresses are seen where they
// are written.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
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

// In order of speed: the last one that runs is the default.
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

// An argument: its keyword, and the member of a kernel's struct that it fills. Pointers are passed as addresses.
template <class Arguments, class Member> struct Field {
    using Value = std::conditional_t<std::is_pointer_v<Member>, Address, Member>;
    const char *keyword;
    Member Arguments::*member;
    void set(Arguments &arguments, Value &&value) const {
        if constexpr (std::is_pointer_v<Member>)
            arguments.*member = reinterpret_cast<Member>(value);
        else
            arguments.*member = std::move(value);
    }
};

// The same for an array, passed as a sequence.
template <class Arguments, class Element, size_t n> struct Field<Arguments, Element[n]> {
    using Value = std::array<Element, n>;
    const char *keyword;
    Element (Arguments::*member)[n];
    void set(Arguments &arguments, Value &&value) const {
        std::copy(value.begin(), value.end(), arguments.*member);
    }
};

// Several members that are passed as one sequence, such as a tensor's shape.
template <class Arguments, size_t n> struct Sizes {
    using Value = std::array<int64_t, n>;
    const char *keyword;
    int64_t Arguments::*members[n];
    void set(Arguments &arguments, Value &&value) const {
        for (size_t i = 0; i < n; ++i) arguments.*members[i] = value[i];
    }
};

template <class Arguments, class Member> Field<Arguments, Member> arg(const char *keyword, Member Arguments::*member) {
    return {keyword, member};
}
template <class Arguments, class... Member>
Sizes<Arguments, sizeof...(Member)> sizes(const char *keyword, Member Arguments::*...members) {
    return {keyword, {members...}};
}

// Makes run(arguments) a function of the module.
template <class Arguments, class Result, class... Fields>
void bind(nb::module_ &m, const char *name, Result (*run)(Arguments &), Fields... fields) {
    m.def(
        name,
        [=](typename Fields::Value... values) {
            Arguments arguments{};
            (fields.set(arguments, std::move(values)), ...);
            return run(arguments);
        },
        nb::call_guard<nb::gil_scoped_release>(), nb::kw_only(), nb::arg(fields.keyword)...);
}

void bind_batch_norm(nb::module_ &m) {
    using P = BatchNorm;
    const auto forward = [](P &p) {
        std::vector<double> scratch(batch_norm_scratch(p));
        p.scratch = scratch.data();
        chosen->batch_norm_forward(p);
    };
    const auto backward = [](P &p) {
        std::vector<double> scratch(batch_norm_scratch(p));
        p.scratch = scratch.data();
        chosen->batch_norm_backward(p);
    };
    bind<P, void>(m, "batch_norm_forward", forward, arg("x", &P::x), arg("residual", &P::residual),
                  arg("weight", &P::weight), arg("bias", &P::bias), arg("mean", &P::mean), arg("var", &P::var),
                  arg("y", &P::y), arg("rows", &P::rows), arg("channels", &P::channels), arg("is_bf16", &P::is_bf16),
                  arg("training", &P::training), arg("relu", &P::relu), arg("cap", &P::cap), arg("eps", &P::eps),
                  arg("tasks", &P::tasks));
    bind<P, void>(m, "batch_norm_backward", backward, arg("dy", &P::dy), arg("x", &P::x), arg("y", &P::y),
                  arg("weight", &P::weight), arg("bias", &P::bias), arg("mean", &P::mean), arg("var", &P::var),
                  arg("dx", &P::dx), arg("dresidual", &P::dresidual), arg("dweight", &P::dweight),
                  arg("dbias", &P::dbias), arg("rows", &P::rows), arg("channels", &P::channels),
                  arg("is_bf16", &P::is_bf16), arg("training", &P::training), arg("relu", &P::relu),
                  arg("cap", &P::cap), arg("eps", &P::eps), arg("tasks", &P::tasks));
}

template <class P> auto x_shape() { return sizes("x_shape", &P::images, &P::in_channels, &P::in_h, &P::in_w); }

// Its number of images is x's too.
template <class P> auto y_shape(const char *keyword) {
    return sizes(keyword, &P::images, &P::out_channels, &P::out_h, &P::out_w);
}

void bind_convolutions(nb::module_ &m) {
    using G = ConvWeightGrad;
    bind<G, bool>(m, "conv_weight_grad", [](G &p) { return chosen->conv_weight_grad(p); }, arg("x", &G::x),
                  arg("dy", &G::dy), arg("dw", &G::dw), x_shape<G>(), y_shape<G>("dy_shape"),
                  sizes("kernel", &G::kernel_h, &G::kernel_w), sizes("stride", &G::stride_h, &G::stride_w),
                  sizes("padding", &G::pad_h, &G::pad_w), arg("groups", &G::groups), arg("is_bf16", &G::is_bf16),
                  arg("tasks", &G::tasks));
    using P = Pointwise;
    bind<P, bool>(m, "pointwise", [](P &p) { return chosen->pointwise(p); }, arg("x", &P::x),
                  arg("weight", &P::weight), arg("bias", &P::bias), arg("shift", &P::shift), arg("y", &P::y),
                  arg("mean", &P::mean), arg("var", &P::var), x_shape<P>(), y_shape<P>("y_shape"),
                  sizes("stride", &P::stride_h, &P::stride_w), arg("input_grad", &P::input_grad),
                  arg("tasks", &P::tasks));
    using W = Winograd;
    bind<W, bool>(m, "winograd", [](W &p) { return chosen->winograd(p); }, arg("x", &W::x),
                  arg("weight", &W::weight), arg("bias", &W::bias), arg("shift", &W::shift), arg("y", &W::y),
                  arg("mean", &W::mean), arg("var", &W::var), x_shape<W>(), y_shape<W>("y_shape"),
                  arg("kernel", &W::kernel), sizes("padding", &W::pad_h, &W::pad_w), arg("groups", &W::groups),
                  arg("input_grad", &W::input_grad), arg("is_bf16", &W::is_bf16), arg("tasks", &W::tasks));
    using D = WinogradWeightGrad;
    bind<D, bool>(m, "winograd_weight_grad", [](D &p) { return chosen->winograd_weight_grad(p); }, arg("x", &D::x),
                  arg("dy", &D::dy), arg("dw", &D::dw), arg("dbias", &D::dbias), x_shape<D>(),
                  y_shape<D>("dy_shape"), arg("kernel", &D::kernel), sizes("padding", &D::pad_h, &D::pad_w),
                  arg("groups", &D::groups), arg("is_bf16", &D::is_bf16), arg("tasks", &D::tasks));
}

// The most source pixels of one output pixel, where `length` of `in` pixels become `out`.
int64_t max_taps(double length, int64_t out, int64_t in) {
    return std::min(in, 2 * int64_t(std::ceil(std::max(1.0, length / double(out)))) + 1);
}

void bind_crops(nb::module_ &m) {
    using P = Crops;
    const auto run = [](P &p) {
        for (int64_t i = 0; p.boxes != nullptr && i < p.images; ++i) {
            p.taps_h = std::max(p.taps_h, max_taps(p.boxes[4 * i + 2], p.out_h, p.in_h));
            p.taps_w = std::max(p.taps_w, max_taps(p.boxes[4 * i + 3], p.out_w, p.in_w));
        }
        std::vector<float> scratch(p.tasks * crop_scratch(p));
        p.scratch = scratch.data();
        chosen->crop_flip_normalize(p);
    };
    bind<P, void>(m, "crop_flip_normalize", run, arg("pixels", &P::pixels), arg("addresses", &P::addresses),
                  arg("sizes", &P::sizes), arg("boxes", &P::boxes), arg("flips", &P::flips), arg("out", &P::out),
                  arg("images", &P::images), sizes("in_size", &P::in_h, &P::in_w),
                  sizes("out_size", &P::out_h, &P::out_w), arg("scale", &P::scale), arg("shift", &P::shift),
                  arg("is_bf16", &P::is_bf16), arg("tasks", &P::tasks));
}

void bind_dropout(nb::module_ &m) {
    using P = Dropout;
    bind<P, void>(m, "dropout_forward", [](P &p) { chosen->dropout_forward(p); }, arg("x", &P::x), arg("y", &P::y),
                  arg("count", &P::count), arg("key", &P::key), arg("threshold", &P::threshold),
                  arg("scale", &P::scale), arg("is_bf16", &P::is_bf16), arg("relu", &P::relu),
                  arg("tasks", &P::tasks));
    bind<P, void>(m, "dropout_backward", [](P &p) { chosen->dropout_backward(p); }, arg("dy", &P::dy),
                  arg("y", &P::y), arg("dx", &P::dx), arg("count", &P::count), arg("key", &P::key),
                  arg("threshold", &P::threshold), arg("scale", &P::scale), arg("is_bf16", &P::is_bf16),
                  arg("relu", &P::relu), arg("tasks", &P::tasks));
}

void bind_response_norm(nb::module_ &m) {
    using P = ResponseNorm;
    const auto forward = [](P &p) {
        std::vector<float> scratch(response_norm_scratch(p));
        p.scratch = scratch.data();
        chosen->local_response_norm_forward(p);
    };
    const auto backward = [](P &p) {
        std::vector<float> scratch(response_norm_scratch(p));
        p.scratch = scratch.data();
        chosen->local_response_norm_backward(p);
    };
    bind<P, void>(m, "local_response_norm_forward", forward, arg("x", &P::x), arg("y", &P::y), arg("rows", &P::rows),
                  arg("channels", &P::channels), arg("size", &P::size), arg("alpha", &P::alpha),
                  arg("is_bf16", &P::is_bf16), arg("tasks", &P::tasks));
    bind<P, void>(m, "local_response_norm_backward", backward, arg("dy", &P::dy), arg("x", &P::x), arg("dx", &P::dx),
                  arg("rows", &P::rows), arg("channels", &P::channels), arg("size", &P::size),
                  arg("alpha", &P::alpha), arg("is_bf16", &P::is_bf16), arg("tasks", &P::tasks));
}

void bind_max_pool(nb::module_ &m) {
    using P = MaxPool;
    const auto x_shape = sizes("x_shape", &P::images, &P::channels, &P::in_h, &P::in_w);
    const auto kernel = sizes("kernel", &P::kernel_h, &P::kernel_w);
    const auto stride = sizes("stride", &P::stride_h, &P::stride_w);
    const auto padding = sizes("padding", &P::pad_h, &P::pad_w);
    bind<P, void>(m, "max_pool_forward", [](P &p) { chosen->max_pool_forward(p); }, arg("x", &P::x),
                  arg("y", &P::y), arg("winner", &P::winner), x_shape,
                  sizes("y_shape", &P::images, &P::channels, &P::out_h, &P::out_w), kernel, stride, padding,
                  arg("is_bf16", &P::is_bf16), arg("relu", &P::relu), arg("tasks", &P::tasks));
    bind<P, void>(m, "max_pool_backward", [](P &p) { chosen->max_pool_backward(p); }, arg("dy", &P::dy),
                  arg("winner", &P::winner), arg("dx", &P::dx), x_shape,
                  sizes("dy_shape", &P::images, &P::channels, &P::out_h, &P::out_w), kernel, stride, padding,
                  arg("is_bf16", &P::is_bf16), arg("tasks", &P::tasks));
}

// A parameter list as lists with one element a parameter. SGD leaves some of them empty.
struct StepLists {
    std::vector<Address> weights, gradients, buffers, copies;
    double *squares;
    std::vector<int64_t> sizes;
    std::vector<bool> gradient_is_bf16, adapt, clip, nesterov;
    std::vector<float> lr, momentum, weight_decay, trust_coefficient, eps;
    int tasks;
};

// 64 KiB of float32: long enough to stream, short enough to divide small networks over many threads.
constexpr int64_t kChunkSize = 16384;

// The memory of a ParameterList.
struct OwnedList {
    std::vector<Parameter> parameters;
    std::vector<Chunk> chunks;
    void add(Parameter p) {
        p.first_chunk = int64_t(chunks.size());
        for (int64_t begin = 0; begin < p.size; begin += kChunkSize)
            chunks.push_back({int64_t(parameters.size()), begin, std::min(kChunkSize, p.size - begin)});
        p.chunks = int64_t(chunks.size()) - p.first_chunk;
        parameters.push_back(p);
    }
    void run(void (*step)(const ParameterList &), int tasks) {
        if (parameters.empty()) return;
        std::vector<double> gradient_squares(chunks.size()), weight_squares(chunks.size());
        ParameterList list{};
        list.parameters = parameters.data(), list.count = int64_t(parameters.size());
        list.chunks = chunks.data();
        list.gradient_squares = gradient_squares.data(), list.weight_squares = weight_squares.data();
        list.tasks = std::max(1, std::min(tasks, int(chunks.size())));
        step(list);
    }
};

// What LARS and SGD have in common.
Parameter parameter(const StepLists &lists, size_t i) {
    Parameter p{};
    p.weight = reinterpret_cast<float *>(lists.weights[i]), p.buffer = reinterpret_cast<float *>(lists.buffers[i]);
    p.gradient = reinterpret_cast<void *>(lists.gradients[i]), p.copy = reinterpret_cast<void *>(lists.copies[i]);
    p.size = lists.sizes[i], p.gradient_is_bf16 = lists.gradient_is_bf16[i];
    p.lr = lists.lr[i], p.momentum = lists.momentum[i], p.weight_decay = lists.weight_decay[i];
    p.nesterov = lists.nesterov[i];
    return p;
}

void bind_optimizers(nb::module_ &m) {
    using P = StepLists;
    const auto lars = [](P &lists) {
        OwnedList list;
        for (size_t i = 0; i < lists.weights.size(); ++i) {
            Parameter p = parameter(lists, i);
            p.squares = lists.squares + i;
            p.trust_coefficient = lists.trust_coefficient[i], p.eps = lists.eps[i];
            p.adapt = lists.adapt[i], p.clip = lists.clip[i];
            list.add(p);
        }
        list.run(chosen->lars_step, lists.tasks);
    };
    const auto sgd = [](P &lists) {
        OwnedList list;
        for (size_t i = 0; i < lists.weights.size(); ++i) list.add(parameter(lists, i));
        list.run(chosen->sgd_step, lists.tasks);
    };
    bind<P, void>(m, "lars_step", lars, arg("weights", &P::weights), arg("gradients", &P::gradients),
                  arg("buffers", &P::buffers), arg("copies", &P::copies), arg("squares", &P::squares),
                  arg("sizes", &P::sizes), arg("gradient_is_bf16", &P::gradient_is_bf16), arg("lr", &P::lr),
                  arg("momentum", &P::momentum), arg("weight_decay", &P::weight_decay),
                  arg("trust_coefficient", &P::trust_coefficient), arg("eps", &P::eps), arg("adapt", &P::adapt),
                  arg("clip", &P::clip), arg("nesterov", &P::nesterov), arg("tasks", &P::tasks));
    bind<P, void>(m, "sgd_step", sgd, arg("weights", &P::weights), arg("gradients", &P::gradients),
                  arg("buffers", &P::buffers), arg("copies", &P::copies), arg("sizes", &P::sizes),
                  arg("gradient_is_bf16", &P::gradient_is_bf16), arg("lr", &P::lr), arg("momentum", &P::momentum),
                  arg("weight_decay", &P::weight_decay), arg("nesterov", &P::nesterov), arg("tasks", &P::tasks));
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
        use_openmp(reinterpret_cast<void *>(parallel), reinterpret_cast<void *>(thread_num),
                   reinterpret_cast<void *>(num_threads));
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
        .def_prop_ro("becomes_rgb", &Jpeg::becomes_rgb)
        .def("begin",
             [](Jpeg &self, int64_t top, int64_t left, int64_t height, int64_t width, int denominator) {
                 nb::gil_scoped_release others_run;
                 const Jpeg::Window window = self.begin({top, left, height, width}, denominator);
                 return std::array<int64_t, 4>{window.top, window.left, window.height, window.width};
             })
        .def("read", [](Jpeg &self, Address pixels) { self.read(reinterpret_cast<uint8_t *>(pixels)); },
             nb::call_guard<nb::gil_scoped_release>());

    bind_batch_norm(m);
    bind_convolutions(m);
    bind_crops(m);
    bind_dropout(m);
    bind_response_norm(m);
    bind_max_pool(m);
    bind_optimizers(m);
}
