"""The output matrix and the loss, computed in chunks of rows, so that the complete logits are never in memory.

loss = LinearLoss.apply(hidden, weight, targets, cross_entropy)       # (N, C), (V, C), (N,)
loss.backward()
"""

import functools

import torch

from model import cross_entropy
from training.curvature import label_loss
from training.fp8_loss import fp8_gradients


class LinearLoss(torch.autograd.Function):
    """loss(hidden @ weight.T, targets), a scalar, for a `loss` that is a mean over all rows of the logits.

    Every row has a target; there is no ignore_index. The forward pass computes the gradients too, chunk by chunk,
    while a chunk's logits exist. So it can be differentiated once. The gradient of the weight is summed in the weight's
    precision. fp8: the products of cross_entropy are those of `fp8_gradients`.
    """

    ELEMENTS = 2**30  # logits in a chunk, at most

    @staticmethod
    def forward(ctx, hidden, weight, targets, loss, fp8=False):
        if fp8:
            total, d_hidden, d_weight, rows = fp8_gradients(hidden, weight, targets)
            if len(rows):
                more, d_hidden[rows], _ = chunked_gradients(hidden[rows], weight, targets[rows], loss, d_weight)
                total += more
        else:
            total, d_hidden, d_weight = chunked_gradients(hidden, weight, targets, loss)
        ctx.save_for_backward(d_hidden, d_weight)
        return total / len(hidden)

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():
            raise RuntimeError("LinearLoss can be differentiated once; use the model's own loss for create_graph=True")
        d_hidden, d_weight = ctx.saved_tensors
        scale = (grad_output / len(d_hidden)).view(1, 1)  # CUDA would round a 0-dimensional tensor to hidden's dtype
        return torch.mul(d_hidden, scale, out=torch.empty_like(d_hidden)), d_weight * scale, None, None, None


def chunked_gradients(hidden, weight, targets, loss, d_weight=None):
    """The sum of the rows' losses and its gradients for hidden (N, C) and weight (V, C), added to d_weight if given."""
    narrow, chunks = weight.to(hidden.dtype), -(-len(hidden) * len(weight) // LinearLoss.ELEMENTS)
    total, d_hidden = 0.0, torch.empty_like(hidden)
    d_weight = torch.zeros_like(weight) if d_weight is None else d_weight
    room = hidden.new_empty(-(-len(hidden) // chunks), len(weight))
    for h, t, d_h in zip(*(x.tensor_split(chunks) for x in (hidden, targets, d_hidden)), strict=True):
        logits = torch.mm(h, narrow.t(), out=room[: len(h)])
        if has_kernel(loss, logits.device):
            value, gradient = fused_cross_entropy(logits, t)
        else:
            value, gradient = loss_and_gradient(logits, t, loss)
        total += value
        torch.mm(gradient, narrow, out=d_h)
        if weight.is_cuda and weight.dtype != h.dtype:
            torch.addmm(d_weight, gradient.t(), h, out_dtype=weight.dtype, out=d_weight)
        else:
            d_weight.addmm_(gradient.t().to(weight.dtype), h.to(weight.dtype))
    return total, d_hidden, d_weight


def has_kernel(loss, device):
    return device.type == "cuda" and loss in (cross_entropy, label_loss)


def loss_and_gradient(logits, targets, loss):
    """The sum over the rows of a loss that is a mean, and its gradient with respect to the logits."""
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        total = loss(logits, targets) * len(logits)
        return total.detach(), *torch.autograd.grad(total, logits)


def fused_cross_entropy(logits, targets):
    """The sum of the cross-entropies, and its gradient with respect to the logits (N, V), written over the logits.

    targets (N,): int64 labels, or floats in [0, 1) that draw the row's label from the softmax.
    """
    losses = torch.empty(len(logits), device=logits.device)
    lanes, each, warps = LAUNCH
    _kernel()[(len(logits),)](
        logits, targets, losses, logits.shape[1], logits.stride(0),
        DRAWN=targets.is_floating_point(), LANES=lanes, EACH=each, num_warps=warps,
    )  # fmt: skip
    return losses.sum(), logits


LAUNCH = 1024, 8, 32  # lanes, columns in a row of each, warps; measured on an H200 at GPT-2's V


@functools.cache
def _kernel():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(logits, targets, losses, columns, stride, DRAWN: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr):
        """One row for each program: a pass for its log-sum-exp, one to draw a label, one for its gradient.

        Each lane keeps its own running peak and sum, so that lanes are reduced once a row and not once a tile.
        """
        LOG2_E: tl.constexpr = 1.4426950408889634
        row = tl.program_id(0).to(tl.int64)
        base = logits + row * stride
        tile = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
        peak, total = tl.full((LANES,), -1e38, tl.float32), tl.zeros((LANES,), tl.float32)
        for first in range(0, columns, LANES * EACH):
            at = first + tile
            x = tl.load(base + at, mask=at < columns, other=-float("inf")).to(tl.float32) * LOG2_E
            higher = tl.maximum(peak, tl.max(x, axis=1))
            total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(x - higher[:, None]), axis=1)
            peak = higher
        highest = tl.max(peak)
        whole = tl.sum(total * tl.exp2(peak - highest))
        log_total = highest + tl.log2(whole)  # in base 2
        target = tl.load(targets + row)
        if DRAWN:  # the first class of positive weight at which the cumulative weight exceeds this share of the total
            share = target * whole
            below, label, likely = 0.0, columns, 0
            for first in range(0, columns, LANES * EACH):
                at = first + tile
                x = tl.load(base + at, mask=at < columns, other=-float("inf")).to(tl.float32) * LOG2_E
                weights = tl.exp2(x - highest)
                sums = tl.sum(weights, axis=1)
                ends = below + tl.cumsum(sums, axis=0)
                cumulative = (ends - sums)[:, None] + tl.cumsum(weights, axis=1)
                label = tl.minimum(label, tl.min(tl.where((weights > 0) & (cumulative > share), at, columns)))
                likely = tl.maximum(likely, tl.max(tl.where(weights > 0, at, 0)))
                below += tl.sum(sums)
            target = tl.minimum(label, likely)  # by rounding, the sums may end below the total
        known = (target >= 0) & (target < columns)  # another label makes the loss NaN
        own = tl.load(base + target, mask=known, other=float("nan")).to(tl.float32)
        tl.store(losses + row, log_total / LOG2_E - own)
        tl.debug_barrier()  # the target's logit is read before its gradient overwrites it
        for first in range(0, columns, LANES * EACH):
            at = first + tile
            x = tl.load(base + at, mask=at < columns, other=-float("inf")).to(tl.float32) * LOG2_E
            gradient = tl.exp2(x - log_total) - tl.where(at == target, 1.0, 0.0)
            tl.store(base + at, gradient.to(logits.dtype.element_ty), mask=at < columns)

    return kernel
