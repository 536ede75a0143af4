"""Sophia: a second-order clipped optimizer for language model pre-training, in one file that stands alone.

    from sophia import SophiaG, sampled_label_loss

Algorithms are numbered as in Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
Pre-training" (arXiv:2305.14342): Algorithm 1 is Hutchinson's estimator (`hutchinson`), Algorithm 2 is
Gauss-Newton-Bartlett (`sampled_label_loss`, `sampled_target_loss`), Algorithm 3 is the optimizer (`SophiaG` with
Algorithm 2, `SophiaH` with Algorithm 1). The parametrization is the official code's: the paper's gamma is `rho` here.

The only import is torch. `fused=True` also imports Triton, at the first step.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import Optimizer

__all__ = ["SophiaG", "SophiaH", "hutchinson", "sample_labels", "sampled_label_loss", "sampled_target_loss"]

_EPS = 1e-15  # added to rho * bs * hessian, as in the official code


# --------------------------------------------------------------------------------------------------------------------
# The optimizers
# --------------------------------------------------------------------------------------------------------------------


class _Bucket:
    """Tensors of one parameter group that share a device, dtypes and shards: what one foreach call or launch takes."""

    def __init__(self, index, group, device, shards):
        self.index, self.group, self.device, self.shards = index, group, device, shards
        self.params, self.grads, self.exp_avgs, self.hessians = [], [], [], []  # local, real tensors, all alike
        self.steps, self.hessian_steps = [], []  # float32 scalars on `device`; the second only with bias_correction


class _Sophia(Optimizer):
    """What SophiaG and SophiaH share: state, gathering, clipping, and the GradScaler protocol.

    The protocol is torch's for fused optimizers: while the attributes `grad_scale` and `found_inf` (float32 scalars
    on the device, or None) are set, gradients are divided by `grad_scale`, and where `found_inf` is not 0 the call
    changes nothing: neither parameters, nor states, nor step counts. The host never reads either.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then calls step() itself, with the attributes above

    def __init__(self, params, defaults, foreach, fused, max_grad_norm):
        if foreach and fused:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"Invalid max_grad_norm: {max_grad_norm}, expected None or a number above 0")
        if fused:
            raise RuntimeError("`fused=True` is not there yet")
        # How a step is computed is a property of this process, not of the training state: these are not saved in
        # state_dict(), so that a checkpoint of a fused run on a GPU loads into an optimizer on the CPU.
        self.foreach, self.fused, self.max_grad_norm = foreach, fused, max_grad_norm
        self.grad_norm = None  # the last step's global gradient norm before clipping, a scalar tensor on the device
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if self.foreach and not group["capturable"]:
                raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
            if lr.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i, beta in enumerate(group["betas"]):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        for key, name in (("rho", "rho"), ("eps", "epsilon"), ("weight_decay", "weight_decay")):
            if not group.get(key, 0.0) >= 0.0:
                raise ValueError(f"Invalid {name} value: {group[key]}")

    def __getstate__(self):
        own = {"foreach": self.foreach, "fused": self.fused, "max_grad_norm": self.max_grad_norm}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__.setdefault("grad_norm", None)
        for group in self.param_groups:  # an official checkpoint's groups lack our keys
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def _param_state(self, param, group):
        """The parameter's state, made or completed (loaded from another device or an official checkpoint)."""
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        if "hessian" not in state:
            state["hessian"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            if group["bias_correction"]:
                state["hessian_step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        if group["bias_correction"] and "hessian_step" not in state:
            # A curvature of unknown age (its run had no bias correction): taken as old, which corrects nothing.
            state["hessian_step"] = torch.full((), torch.inf, dtype=torch.float32, device=param.device)
        for key in ("step", "hessian_step") if group["bias_correction"] else ("step",):
            count = state[key]
            if not isinstance(count, Tensor) or count.device != param.device or count.dtype != torch.float32:
                state[key] = torch.as_tensor(count, dtype=torch.float32, device=param.device)
        return state

    def _gather(self, gradients=None):
        """Buckets of everything that has a gradient. gradients: by parameter, instead of each `.grad`.

        Raises:
            RuntimeError: for sparse gradients.
        """
        buckets = {}
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                grad = param.grad if gradients is None else gradients.get(param)
                if grad is None:
                    continue
                if grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
                state = self._param_state(param, group)
                tensors, shards = (param, grad, state["exp_avg"], state["hessian"]), ()
                if hasattr(param, "device_mesh"):  # a DTensor: every rank steps its own shard
                    tensors, shards = _local_shards(*tensors)
                if param.is_complex():
                    tensors = tuple(torch.view_as_real(t) for t in tensors)
                key = (index, param.device, *(t.dtype for t in tensors), shards)
                bucket = buckets.get(key)
                if bucket is None:
                    bucket = buckets[key] = _Bucket(index, group, param.device, shards)
                bucket.params.append(tensors[0])
                bucket.grads.append(tensors[1])
                bucket.exp_avgs.append(tensors[2])
                bucket.hessians.append(tensors[3])
                bucket.steps.append(state["step"])
                if group["bias_correction"]:
                    bucket.hessian_steps.append(state["hessian_step"])
        return list(buckets.values())

    def _use_foreach(self, bucket):
        """torch's rule: as asked, else foreach on accelerators and one tensor after the other on the CPU."""
        return bucket.device.type in ("cuda", "xpu") if self.foreach is None else self.foreach

    def _amp(self, device):
        """(grad_scale, skip) on the device: a float scalar or None, a boolean scalar or None."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if grad_scale is not None:
            grad_scale = grad_scale.to(device, non_blocking=True)
        return grad_scale, None if found_inf is None else found_inf.to(device, non_blocking=True) != 0

    def _clip(self, buckets):
        """Set `grad_norm` and return the factor of clip_grad_norm_, min(1, max_grad_norm / (grad_norm + 1e-6))."""
        squares = {}  # shards -> sum of squares over the local parts
        for bucket in buckets:
            norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in bucket.grads])
            square = norms.double().square().sum()
            squares[bucket.shards] = squares.get(bucket.shards, 0.0) + _to(square, buckets[0].device)
        total = _sum([_reduce(square, shards) for shards, square in squares.items()] or [torch.zeros(())])
        grad_scale, _ = self._amp(total.device)
        self.grad_norm = (total.sqrt() if grad_scale is None else total.sqrt() / grad_scale).float()
        return (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)

    @torch.no_grad()
    def _step(self, rho_scale):
        buckets = self._gather()
        clip = None if self.max_grad_norm is None else self._clip(buckets)
        for bucket in buckets:
            group, device = bucket.group, bucket.device
            grad_scale, skip = self._amp(device)
            factor = None if clip is None else _to(clip, device)
            if grad_scale is not None:
                factor = (1.0 if factor is None else factor) / grad_scale
            lr = group["lr"]
            if isinstance(lr, Tensor):
                lr = lr.item() if lr.device.type == "cpu" else lr.to(device)
            if skip is not None:
                lr = torch.where(skip, 0.0, lr)
            rhos = group["rho"] * rho_scale
            if group["bias_correction"]:
                rhos = [rhos / (1 - group["betas"][1] ** n.clamp(min=1)) for n in bucket.hessian_steps]
            step = _foreach_step if self._use_foreach(bucket) else _single_tensor_step
            step(
                bucket.params, bucket.grads, bucket.exp_avgs, bucket.hessians,
                lr=lr, beta1=group["betas"][0], weight_decay=group["weight_decay"], rhos=rhos, eps=group.get("eps"),
                maximize=group["maximize"], factor=factor, skip=skip,
            )  # fmt: skip
            torch._foreach_add_(bucket.steps, 1.0 if skip is None else (~skip).float())

    def _update_hessian(self, buckets, scale, squared):
        for bucket in buckets:
            beta2 = bucket.group["betas"][1]
            grad_scale, skip = self._amp(bucket.device)
            factor = scale
            if grad_scale is not None:
                factor = factor / (grad_scale * grad_scale if squared else grad_scale)
            update = _foreach_hessian if self._use_foreach(bucket) else _single_tensor_hessian
            update(bucket.hessians, bucket.grads, beta2=beta2, factor=factor, squared=squared, skip=skip)
            if bucket.hessian_steps:
                torch._foreach_add_(bucket.hessian_steps, 1.0 if skip is None else (~skip).float())

    @torch.no_grad()
    def _statistics(self, rho_scale):
        momenta, counts, totals = {}, [0] * len(self.param_groups), {}
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                if "hessian" in self.state.get(param, ()):
                    momenta[param] = self.state[param]["exp_avg"]
                    counts[index] += param.numel() * (2 if param.is_complex() else 1)
        for bucket in self._gather(momenta):
            group, beta2 = bucket.group, bucket.group["betas"][1]
            sums = torch.zeros(4, dtype=torch.double, device=bucket.device)
            for i, (m, h) in enumerate(zip(bucket.exp_avgs, bucket.hessians, strict=True)):
                bound = h * (group["rho"] * rho_scale)
                if bucket.hessian_steps:
                    bound = bound / (1 - beta2 ** bucket.hessian_steps[i].clamp(min=1))
                wins = (m.abs() < bound.clamp(min=group.get("eps", 0.0))).sum()
                h1, h2, m2 = (torch.linalg.vector_norm(t, n, dtype=torch.float32) for t, n in ((h, 1), (h, 2), (m, 2)))
                sums += torch.stack([wins.double(), h1.double(), h2.double().square(), m2.double().square()])
            if bucket.shards not in totals:
                totals[bucket.shards] = sums.new_zeros(len(counts), 4)
            totals[bucket.shards][bucket.index] += _to(sums, totals[bucket.shards].device)
        rows = _sum([_reduce(total, shards) for shards, total in totals.items()]).tolist() if totals else [[0.0] * 4]
        wins, h1, h2, m2 = (sum(column) for column in zip(*rows, strict=True))
        result = {"win_rate": wins / max(1, sum(counts))}
        for index, (count, row) in enumerate(zip(counts, rows, strict=False)):
            result[f"win_rate/{self.param_groups[index].get('name', index)}"] = row[0] / max(1, count)
        return {**result, "hessian_norm": h1, "hessian_norm2": h2**0.5, "momentum_norm": m2**0.5}


class SophiaG(_Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimator (Algorithm 3 with Algorithm 2 of arXiv:2305.14342)."""

    def __init__(self, params, lr=1e-4, betas=(0.965, 0.99), rho=0.04, weight_decay=1e-1, *, maximize=False,
                 capturable=False, bias_correction=False, foreach=None, fused=None, max_grad_norm=None):  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay, "maximize": maximize,
                    "capturable": capturable, "bias_correction": bias_correction}  # fmt: skip
        super().__init__(params, defaults, foreach, fused, max_grad_norm)

    def step(self, closure=None, bs=5120):
        """Update the parameters from their gradients. bs: tokens (labels) in a step's batch."""
        if not bs > 0:
            raise ValueError(f"Invalid bs: {bs}, expected the number of tokens in a step's batch")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step(bs)
        return loss

    @torch.no_grad()
    def update_hessian(self, scale=1.0):
        """Average scale * grad**2 into the curvature. scale: tokens of this estimate / bs of the steps."""
        self._update_hessian(self._gather(), scale, squared=True)

    def statistics(self, bs=5120):
        return self._statistics(bs)


class SophiaH(_Sophia):
    """Sophia with Hutchinson's estimator (Algorithm 3 with Algorithm 1 of arXiv:2305.14342)."""

    def __init__(self, params, lr=1e-4, betas=(0.965, 0.99), rho=0.01, eps=1e-12, weight_decay=1e-1, *, maximize=False,
                 capturable=False, bias_correction=False, foreach=None, fused=None, max_grad_norm=None):  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "rho": rho, "eps": eps, "weight_decay": weight_decay,
                    "maximize": maximize, "capturable": capturable, "bias_correction": bias_correction}  # fmt: skip
        super().__init__(params, defaults, foreach, fused, max_grad_norm)

    def step(self, closure=None):
        """Update the parameters from their gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step(1.0)
        return loss

    @torch.no_grad()
    def update_hessian(self, estimates):
        """Average the list that `hutchinson` returned, in the order of the parameters, into the curvature."""
        params = [p for group in self.param_groups for p in group["params"]]
        if len(estimates) != len(params):
            raise ValueError(f"update_hessian got {len(estimates)} estimates for {len(params)} parameters")
        self._update_hessian(self._gather(dict(zip(params, estimates, strict=True))), 1.0, squared=False)

    def statistics(self):
        return self._statistics(1.0)


# --------------------------------------------------------------------------------------------------------------------
# One step, written twice: tensor by tensor (the reference) and for lists. Arithmetic is at least float32.
# --------------------------------------------------------------------------------------------------------------------


def _single_tensor_step(params, grads, exp_avgs, hessians, *, lr, beta1, weight_decay, rhos, eps, maximize,
                        factor, skip):  # fmt: skip
    for i, (param, grad, exp_avg, hessian) in enumerate(zip(params, grads, exp_avgs, hessians, strict=True)):
        dtype = torch.promote_types(param.dtype, torch.float32)
        p, g, m, h = param.to(dtype), grad.to(dtype), exp_avg.to(dtype), hessian.to(dtype)
        if factor is not None:
            g = g * factor
        if maximize:
            g = -g
        if skip is not None:
            g = torch.where(skip, m, g)  # leaves m as it is, whatever was in g; lr is 0 then
        m.lerp_(g, 1 - beta1)
        denominator = h * (rhos[i] if isinstance(rhos, list) else rhos)
        denominator = denominator.add_(_EPS) if eps is None else denominator.clamp_(min=eps)
        update = torch.div(m, denominator, out=denominator).clamp_(-1, 1)
        p.mul_(1 - lr * weight_decay)
        if isinstance(lr, Tensor):
            p.sub_(update.mul_(lr))
        else:
            p.sub_(update, alpha=lr)
        if p is not param:
            param.copy_(p)
        if m is not exp_avg:
            exp_avg.copy_(m)


def _foreach_step(params, grads, exp_avgs, hessians, *, lr, beta1, weight_decay, rhos, eps, maximize,
                  factor, skip):  # fmt: skip
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    p, g, m, h = ([t.to(dtype) for t in ts] for ts in (params, grads, exp_avgs, hessians))
    if factor is not None:
        g = torch._foreach_mul(g, factor.to(dtype))
    if maximize:
        g = torch._foreach_neg(g)
    if skip is not None:
        g = [torch.where(skip, a, b) for a, b in zip(m, g, strict=True)]
    torch._foreach_lerp_(m, g, 1 - beta1)
    update = torch._foreach_mul(h, rhos)
    if eps is None:
        torch._foreach_add_(update, _EPS)
    else:
        torch._foreach_clamp_min_(update, eps)
    update = torch._foreach_div(m, update)
    torch._foreach_clamp_min_(update, -1)
    torch._foreach_clamp_max_(update, 1)
    if isinstance(lr, Tensor):
        lr = lr.to(dtype)
        torch._foreach_mul_(update, lr)
        torch._foreach_mul_(p, 1 - lr * weight_decay)
        torch._foreach_sub_(p, update)
    else:
        torch._foreach_mul_(p, 1 - lr * weight_decay)
        torch._foreach_sub_(p, update, alpha=lr)
    if params[0].dtype != dtype:
        torch._foreach_copy_(params, p)
    if exp_avgs[0].dtype != dtype:
        torch._foreach_copy_(exp_avgs, m)


def _single_tensor_hessian(hessians, grads, *, beta2, factor, squared, skip):
    for hessian, grad in zip(hessians, grads, strict=True):
        dtype = torch.promote_types(hessian.dtype, torch.float32)
        h, estimate = hessian.to(dtype), grad.to(dtype)
        if squared:
            estimate = estimate * estimate
        estimate = estimate * factor
        if skip is not None:
            estimate = torch.where(skip, h, estimate)
        h.lerp_(estimate, 1 - beta2)
        if h is not hessian:
            hessian.copy_(h)


def _foreach_hessian(hessians, grads, *, beta2, factor, squared, skip):
    dtype = torch.promote_types(hessians[0].dtype, torch.float32)
    h, estimates = [t.to(dtype) for t in hessians], [t.to(dtype) for t in grads]
    if squared:
        estimates = torch._foreach_mul(estimates, estimates)
    estimates = torch._foreach_mul(estimates, factor)
    if skip is not None:
        estimates = [torch.where(skip, a, b) for a, b in zip(h, estimates, strict=True)]
    torch._foreach_lerp_(h, estimates, 1 - beta2)
    if hessians[0].dtype != dtype:
        torch._foreach_copy_(hessians, h)


def _to(tensor, device):
    return tensor if tensor.device == device else tensor.to(device, non_blocking=True)


def _sum(tensors):
    return functools.reduce(torch.add, [_to(t, tensors[0].device) for t in tensors])


def _local_shards(param, grad, exp_avg, hessian):
    """This rank's parts of four DTensors, and the process groups over which the parameter is split."""
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    groups = tuple(param.device_mesh.get_group(i) for i, p in enumerate(param.placements) if not p.is_replicate())
    return tuple(t.to_local() for t in (param, grad, exp_avg, hessian)), groups


def _reduce(value, shards):
    """value summed over the process groups."""
    for group in shards:
        torch.distributed.all_reduce(value, group=group)
    return value


# --------------------------------------------------------------------------------------------------------------------
# Estimators of the curvature's diagonal
# --------------------------------------------------------------------------------------------------------------------

_CHUNK_ELEMENTS = 2**26  # logits worked on at a time, in float32: 256 MiB
_BLOCK = 128  # classes whose probabilities are summed together when a label is drawn


def _row_chunks(logits):
    """Slices over the rows of (rows, classes). A compiler fuses the whole instead, and needs none."""
    rows = max(1, logits.shape[0])
    size = rows if torch.compiler.is_compiling() else min(rows, max(1, _CHUNK_ELEMENTS // logits.shape[1]))
    return [slice(start, start + size) for start in range(0, rows, size)]


def _first(cumulative, weight, target):
    """Along the last dimension, the first index of positive weight where cumulative > target, else the last one."""
    index = torch.arange(weight.shape[-1], device=weight.device)
    positive = weight > 0
    last = torch.where(positive, index, 0).amax(-1)
    hit = torch.where(positive & (cumulative > target.unsqueeze(-1)), index, weight.shape[-1]).amin(-1)
    return torch.minimum(hit, last)


@torch.no_grad()
def sample_labels(logits, generator=None, *, uniform=None):
    """Draw a label from softmax(logits) for every position. No host sync, no second copy of the logits.

    The inverse of the cumulative distribution at one uniform number per position, so a position's label depends on
    its own logits and number only, however positions are batched. The distribution is walked in two levels, blocks
    of classes and then classes. A class of probability 0 (a logit of -inf) is never drawn.

    Args:
        logits: (..., classes), floating point.
        generator: torch.Generator on the logits' device for the uniform numbers; None is the default generator.
        uniform: (...), in [0, 1), instead of drawing them here.

    Returns:
        int64 tensor (...).

    Raises:
        ValueError: when uniform does not have the shape logits.shape[:-1].
    """
    if uniform is None:
        uniform = torch.rand(logits.shape[:-1], generator=generator, device=logits.device)
    elif uniform.shape != logits.shape[:-1]:
        raise ValueError(f"uniform has shape {tuple(uniform.shape)}, expected {tuple(logits.shape[:-1])}")
    classes = logits.shape[-1]
    flat, uniform = logits.reshape(-1, classes), uniform.reshape(-1).float()
    labels = []
    for rows in _row_chunks(flat):
        chunk, u = flat[rows], uniform[rows]
        peak = chunk.amax(-1, keepdim=True).float()
        weights = F.pad((chunk.float() - peak).exp(), (0, -classes % _BLOCK))
        block_sums = weights.unflatten(-1, (-1, _BLOCK)).sum(-1)  # (rows, blocks)
        block_ends = block_sums.cumsum(-1)
        target = u * block_ends[:, -1]
        block = _first(block_ends, block_sums, target)
        target = target - (block_ends - block_sums).gather(-1, block[:, None])[:, 0]
        index = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)  # (rows, _BLOCK)
        weight = (chunk.gather(-1, index.clamp(max=classes - 1)).float() - peak).exp() * (index < classes)
        labels.append(block * _BLOCK + _first(weight.cumsum(-1), weight, target))
    return torch.cat(labels).view(logits.shape[:-1])


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy whose only tensor of the logits' size is the gradient that backward returns."""

    @staticmethod
    def forward(ctx, logits, labels, ignore_index):
        kept = labels != ignore_index
        safe = torch.where(kept, labels, 0)
        picked = logits.gather(-1, safe[:, None])[:, 0].float()
        normalizer = torch.cat([torch.logsumexp(logits[rows].float(), -1) for rows in _row_chunks(logits)])
        count = kept.sum()
        ctx.save_for_backward(logits, safe, kept, normalizer, count)
        return torch.where(kept, normalizer - picked, 0.0).sum() / count

    @staticmethod
    def backward(ctx, grad_output):
        logits, labels, kept, normalizer, count = ctx.saved_tensors
        weight = torch.where(kept, grad_output / count, 0.0)[:, None]
        grad = torch.empty_like(logits)
        for rows in _row_chunks(logits):
            chunk = (logits[rows].float() - normalizer[rows, None]).exp_()
            chunk.scatter_add_(-1, labels[rows, None], chunk.new_full((chunk.shape[0], 1), -1.0))
            grad[rows] = chunk.mul_(weight[rows])
        return grad, None, None


def sampled_label_loss(logits, generator=None, ignore_index=-1, *, uniform=None, targets=None):
    """Mean cross-entropy against labels drawn from the model itself: Algorithm 2 of arXiv:2305.14342 (GNB).

    Args:
        logits: (..., classes), floating point.
        generator, uniform: the source of the labels, as in `sample_labels`.
        ignore_index: positions whose entry in `targets` is this are left out of the mean (padding).
        targets: (...), integer, the batch's real labels; only compared with ignore_index. None keeps all.

    Returns:
        scalar float32 tensor; its gradient is what SophiaG.update_hessian() squares.
    """
    labels = sample_labels(logits, generator, uniform=uniform)
    if targets is not None:
        labels = torch.where(targets == ignore_index, ignore_index, labels)
    flat, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if torch.compiler.is_compiling():  # the compiler fuses this into the same, and differentiates it itself
        return F.cross_entropy(flat.float(), labels, ignore_index=ignore_index)
    return _ChunkedCrossEntropy.apply(flat, labels, ignore_index)


def sampled_target_loss(outputs, generator=None, *, variance=1.0):
    """The same for a Gaussian head N(outputs, variance): ||outputs - y||^2 / (2 variance), y drawn from it."""
    noise = torch.randn(outputs.shape, generator=generator, device=outputs.device, dtype=outputs.dtype)
    target = outputs.detach() + noise * variance**0.5
    rows = outputs[..., 0].numel()
    return (outputs - target).square().sum() / (2 * variance * rows)


def hutchinson(loss, params, generator=None):
    """Hutchinson's estimate u * (Hessian @ u), u ~ N(0, I), for every parameter: Algorithm 1 of arXiv:2305.14342."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    params = list(params)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        loss = loss() if callable(loss) else loss
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        noise = [torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype) for p in params]
        used = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        products = torch.autograd.grad([grads[i] for i in used], params, [noise[i] for i in used], allow_unused=True)
    return [torch.zeros_like(u) if v is None else u * v for u, v in zip(noise, products, strict=True)]
