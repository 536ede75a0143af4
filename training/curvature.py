"""Curvature estimates of a model's loss: the loss of sampled labels, and Hessian-vector products that compile.

loss = label_loss(logits, uniforms)
products = hessian_vector_product(model, inputs, targets, {"transformer.wte.weight": vector, ...})
"""

import torch
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia import sampled_label_loss


def label_loss(logits, uniforms):
    """Mean cross-entropy against labels that `uniforms`, numbers in [0, 1), draw from the model's softmax."""
    return sampled_label_loss(logits, uniform=uniforms)


@torch.no_grad()
def hessian_vector_product(model, inputs, targets, vectors):
    """{name: H @ vectors}, H the Hessian of `model(inputs, targets)[1]` with respect to the parameters in `vectors`.

    The product is the derivative of the gradient along the vectors, forward over reverse (Pearlmutter, Neural
    Computation 6(1), 1994). `sophia.hutchinson` works backward over backward, which torch.compile cannot compile.
    Attention runs in its plain form, since the fused kernels have no forward derivative.
    """

    def loss(parameters):
        return functional_call(model, parameters, (inputs, targets))[1]

    parameters = {name: model.get_parameter(name) for name in vectors}
    with sdpa_kernel(SDPBackend.MATH):
        return jvp(grad(loss), (parameters,), (vectors,))[1]
