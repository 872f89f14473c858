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

extern const Kernels kernels{
    batch_norm_forward, batch_norm_backward, conv_weight_grad,
    crop_flip_normalize,
    dropout_forward, dropout_backward,
    local_response_norm_forward, local_response_norm_backward,
    max_pool_forward, max_pool_backward,
    pointwise,
    lars_step, sgd_step,
    winograd, winograd_weight_grad,
};

}  // namespace KNLTRAIN_ISA
}  // namespace knltrain
