"""The Hessian of a model's loss times a vector, by operations that torch.compile can make one graph of.

products = hessian_vector_product(model, inputs, targets, {"transformer.wte.weight": vector, ...})
"""

import torch
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel


@torch.no_grad()
def hessian_vector_product(model, inputs, targets, vectors):
    """{name: H @ vectors}, H the Hessian of `model(inputs, targets)[1]` by the parameters named in `vectors` alone.

    It is the derivative of the gradient along the vectors, forward over reverse (Pearlmutter, Neural Computation 6(1),
    1994). Backward over backward, which `sophia.hutchinson` does in anyone's loop, cannot be compiled. Attention runs
    in its plain form: what is fused has no forward derivative.
    """

    def loss(parameters):
        return functional_call(model, parameters, (inputs, targets))[1]

    parameters = {name: model.get_parameter(name) for name in vectors}
    with sdpa_kernel(SDPBackend.MATH):
        return jvp(grad(loss), (parameters,), (vectors,))[1]
