// The kernels of one instruction set, by name.
#include "kernels.h"

namespace knltrain {
namespace KNLTRAIN_ISA {

void batch_norm_forward(const BatchNorm &);
void batch_norm_backward(const BatchNorm &);
bool conv_weight_grad(const ConvWeightGrad &);
void crop_flip_normalize(const Crops &);
void dropout_forward(const Dropout &);
void dropout_backward(const Dropout &);
void local_response_norm_forward(const ResponseNorm &);
void local_response_norm_backward(const ResponseNorm &);
void max_pool_forward(const MaxPool &);
void max_pool_backward(const MaxPool &);
bool pointwise(const Pointwise &);
void lars_step(const ParameterList &);
void sgd_step(const ParameterList &);
bool winograd(const Winograd &);
bool winograd_weight_grad(const WinogradWeightGrad &);

namespace {

constexpr Kernels by_name() {
    Kernels k{};
    k.batch_norm_forward = batch_norm_forward;
    k.batch_norm_backward = batch_norm_backward;
    k.conv_weight_grad = conv_weight_grad;
    k.crop_flip_normalize = crop_flip_normalize;
    k.dropout_forward = dropout_forward;
    k.dropout_backward = dropout_backward;
    k.local_response_norm_forward = local_response_norm_forward;
    k.local_response_norm_backward = local_response_norm_backward;
    k.max_pool_forward = max_pool_forward;
    k.max_pool_backward = max_pool_backward;
    k.pointwise = pointwise;
    k.lars_step = lars_step;
    k.sgd_step = sgd_step;
    k.winograd = winograd;
    k.winograd_weight_grad = winograd_weight_grad;
    return k;
}

}  // namespace

extern constexpr Kernels kernels = by_name();

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
