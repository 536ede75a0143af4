"""Sophia: a second-order optimizer that clips each coordinate's step, for language-model pre-training.

    from sophia import SophiaG, sampled_label_loss

Algorithms are numbered as in Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
Pre-training" (arXiv:2305.14342): Algorithm 1 is Hutchinson's estimator (`hutchinson`), Algorithm 2 is
Gauss-Newton-Bartlett (`sampled_label_loss`, `sampled_target_loss`), Algorithm 3 is the optimizer (`SophiaG` with
Algorithm 2, `SophiaH` with Algorithm 1). The parametrization is the official code's: the paper's gamma is `rho` here.

The file reads from the top: the update of one tensor, the curvature estimators, the two optimizers, then the plumbing:
lists of tensors, shards. Copy it into any project; it imports torch only. `fused=True` also needs sophia_fused.py.
"""

import functools
import importlib
import math
import os
from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.optim.optimizer import Optimizer, ParamsT

__all__ = ["SophiaG", "SophiaH", "hutchinson", "sample_labels", "sampled_label_loss", "sampled_target_loss"]

_EPS = 1e-15  # added to rho * bs * hessian, as in the official code


# --------------------------------------------------------------------------------------------------------------------
# The update and the estimate, in place, for lists of tensors: parameters p, gradients g, their averages m, curvatures h
# --------------------------------------------------------------------------------------------------------------------


def _update(p, g, m, h, *, lr, beta1, rho, eps, weight_decay, nesterov, direction=None):
    """Algorithm 3. For SophiaG rho stands for rho * bs, and eps is None."""
    torch._foreach_lerp_(m, g, 1 - beta1)  # m <- beta1 m + (1 - beta1) g
    numerators = torch._foreach_lerp(m, g, 1 - beta1) if nesterov else m
    updates = (direction or _clipped)(numerators, h, rho, eps)
    if isinstance(lr, Tensor):
        torch._foreach_mul_(updates, lr)
        torch._foreach_mul_(p, 1 - lr * weight_decay)
        torch._foreach_sub_(p, updates)
    else:
        torch._foreach_mul_(p, 1 - lr * weight_decay)
        torch._foreach_sub_(p, updates, alpha=lr)


def _clipped(numerators, h, rho, eps):
    """SophiaG: sign(m) min(|m| / (rho bs h + 1e-15), 1). SophiaH: clamp(m / max(rho h, eps), -1, 1)."""
    denominators = torch._foreach_mul(h, rho)
    if eps is None:
        torch._foreach_add_(denominators, _EPS)
    else:
        torch._foreach_clamp_min_(denominators, eps)
    updates = torch._foreach_div(numerators, denominators)
    torch._foreach_clamp_min_(updates, -1)
    torch._foreach_clamp_max_(updates, 1)
    return updates


def _estimate(h, estimates, *, beta2, scale, squared, skip):
    """h <- beta2 h + (1 - beta2) scale estimate^2, or of the estimate itself. Nothing changes where skip is True."""
    if skip is not None:
        estimates = [torch.where(skip, a, b * b * scale if squared else b) for a, b in zip(h, estimates, strict=True)]
    if squared and skip is None:
        torch._foreach_mul_(h, beta2)
        torch._foreach_addcmul_(h, estimates, estimates, value=(1 - beta2) * scale)
    else:
        torch._foreach_lerp_(h, estimates, 1 - beta2)


# --------------------------------------------------------------------------------------------------------------------
# Estimators of the curvature's diagonal
# --------------------------------------------------------------------------------------------------------------------

_CHUNK_ELEMENTS = 2**26  # logits worked on at a time, in float32: 256 MiB
_BLOCK = 128  # classes whose probabilities are summed together when a label is drawn


def _row_chunks(logits):
    """Slices over the rows of (rows, classes); one slice under torch.compile, which fuses the operations instead."""
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
def sample_labels(logits: Tensor, generator: Generator | None = None, *, uniform: Tensor | None = None) -> Tensor:
    """Draw a label from softmax(logits) for every position. No host sync, no second copy of the logits.

    The label is the inverse of the cumulative distribution at one uniform number. It depends on that number and the
    position's own logits only, not on how positions are batched. The search has two levels: blocks of classes, then
    classes. A class of probability 0 (a logit of -inf) is never drawn.

    Args:
        logits: (..., classes), floating point.
        generator: torch.Generator on the logits' device for the uniform numbers; None is the default generator.
        uniform: (...), in [0, 1): the uniform numbers, instead of drawing them here.

    Returns:
        int64 tensor (...).

    Raises:
        ValueError: if uniform does not have the shape logits.shape[:-1].
    """
    if uniform is None:
        uniform = torch.rand(logits.shape[:-1], generator=generator, device=logits.device, dtype=torch.float32)
    elif uniform.shape != logits.shape[:-1]:
        raise ValueError(f"uniform has shape {tuple(uniform.shape)}, expected {tuple(logits.shape[:-1])}")
    classes = logits.shape[-1]
    flat, uniform = logits.reshape(-1, classes), uniform.reshape(-1).float()
    labels = []
    for rows in _row_chunks(flat):
        chunk, u = flat[rows], uniform[rows]
        peak = chunk.amax(-1, keepdim=True).float()
        weights = (chunk - peak).exp_()  # in float32
        if classes % _BLOCK:
            weights = F.pad(weights, (0, -classes % _BLOCK))
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
            chunk = (logits[rows] - normalizer[rows, None]).exp_()  # in float32
            chunk.scatter_add_(-1, labels[rows, None], chunk.new_full((chunk.shape[0], 1), -1.0))
            grad[rows] = chunk.mul_(weight[rows])
        return grad, None, None


def sampled_label_loss(
    logits: Tensor, generator: Generator | None = None, ignore_index: int = -1, *,
    uniform: Tensor | None = None, targets: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mean cross-entropy against labels drawn from the model itself: Algorithm 2 (Gauss-Newton-Bartlett).

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
    if torch.compiler.is_compiling():  # the compiler fuses and differentiates this by itself
        return F.cross_entropy(flat.float(), labels, ignore_index=ignore_index)
    return _ChunkedCrossEntropy.apply(flat, labels, ignore_index)


def sampled_target_loss(outputs: Tensor, generator: Generator | None = None, *, variance: float = 1.0) -> Tensor:
    """Mean over rows of ||outputs - y||^2 / (2 variance) with y ~ N(outputs, variance): Algorithm 2 for regression.

    The Gauss-Newton matrix is J^T J / variance, averaged over rows, with J the Jacobian of the outputs. The mean of
    B grad^2 over draws is exactly its diagonal, with B the number of rows; `bs` counts rows then. Use variance 1 if
    the training loss is the halved sum of squared errors over the D outputs, and D / 2 for torch's mse_loss.

    Args:
        outputs: (..., D), floating point; a row is one prediction.
        generator: torch.Generator on the outputs' device; None is the default generator.
        variance: the variance of the likelihood, above 0.

    Returns:
        scalar tensor; its gradient is what SophiaG.update_hessian() squares.
    """
    noise = torch.randn(outputs.shape, generator=generator, device=outputs.device, dtype=outputs.dtype)
    target = outputs.detach() + noise * variance**0.5
    return (outputs - target).square().sum() / (2 * variance * outputs[..., 0].numel())


def hutchinson(
    loss: Tensor | Callable[[], Tensor], params: Iterable[Tensor], generator: Generator | None = None
) -> list[Tensor]:
    """Hutchinson's estimate of the Hessian's diagonal, u * (Hessian @ u) with u ~ N(0, I): Algorithm 1.

    One Hessian-vector product, which costs about two backward passes. It differentiates twice. Compiled models and
    fused attention cannot do that: pass a function that computes the loss with the uncompiled model, and attention
    runs in its plain form within. `.grad` is left alone. Sharded parameters are not supported.

    Args:
        loss: a function without arguments that returns the scalar loss, or the loss itself if its operations can be
            differentiated twice.
        params: parameters (any iterable of tensors that require gradients).
        generator: torch.Generator on the parameters' device; None is the default generator.

    Returns:
        list of tensors in the order and shapes of params; 0 where the gradient depends on none of them.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    params = list(params)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        value = loss() if callable(loss) else loss
        grads = torch.autograd.grad(value, params, create_graph=True, allow_unused=True)
        noise = [torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype) for p in params]
        used = [(g, u) for g, u in zip(grads, noise, strict=True) if g is not None and g.requires_grad]
        if not used:
            return [torch.zeros_like(p) for p in params]
        outputs, vectors = zip(*used, strict=True)
        products = torch.autograd.grad(outputs, params, vectors, allow_unused=True)
    return [torch.zeros_like(u) if v is None else u * v for u, v in zip(noise, products, strict=True)]


# --------------------------------------------------------------------------------------------------------------------
# The optimizers
# --------------------------------------------------------------------------------------------------------------------


class _Sophia(Optimizer):
    """What SophiaG and SophiaH share: settings, state, clipping, and the GradScaler protocol.

    The protocol is torch's for fused optimizers. While the attributes `grad_scale` and `found_inf` (float32 scalars on
    the device, or None) are set, gradients are divided by `grad_scale`, and where `found_inf` is not 0 a call changes
    nothing: neither parameters, nor states, nor step counts. The host never reads either.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then calls step() itself, with the attributes above

    def __init__(self, params, defaults, foreach, fused, max_grad_norm):
        if foreach and fused:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"Invalid max_grad_norm: {max_grad_norm}, expected None or a number above 0")
        # How a step is computed belongs to this process, not to the training state. These are not in state_dict(), so
        # that a checkpoint of a fused run on a GPU loads into an optimizer on the CPU.
        self.foreach, self.fused, self.max_grad_norm = foreach, fused, max_grad_norm
        self.grad_norm = None  # the last step's gradient norm before clipping, on the device
        self._reset()
        super().__init__(params, defaults)

    def _reset(self):
        """Forget everything that was derived from the state."""
        self._tables = {}  # bucket key -> sophia_fused.PointerTable
        self._plan = None  # sophia_fused.Plan: the buckets of the last call

    def add_param_group(self, param_group: dict[str, Any]) -> None:
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
        if self.fused:
            _check_fused(group["params"])

    def __getstate__(self) -> dict[str, Any]:
        own = {"foreach": self.foreach, "fused": self.fused, "max_grad_norm": self.max_grad_norm}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        self._reset()
        self.__dict__.setdefault("grad_norm", None)
        for index, group in enumerate(self.param_groups):  # a checkpoint of the official code lacks our settings
            for key, value in {**self.defaults, **(before[index] if before else {})}.items():
                group.setdefault(key, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which casts everything but "step" to the parameter's dtype. Counts of estimates keep theirs."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if self._keeps_dtype(key):
                    self.state[param][key] = torch.as_tensor(value).to(param.device, copy=True)

    def _keeps_dtype(self, key):
        return key == "hessian_step"

    def _param_state(self, param, group, position):
        """The parameter's state; missing entries are added, as after loading a checkpoint of the official code."""
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        if "hessian" not in state:
            state["hessian"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            if group["bias_correction"]:
                state["hessian_step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        if "left_basis" in state and not self._matrix(group, position):
            raise RuntimeError(
                "the state was made with eigenbasis=True and its hessian is of no use without; use EigenbasisSophiaG"
            )
        if group["bias_correction"] and "hessian_step" not in state:
            # The age of this curvature is not known (it comes from a run without bias correction). Taking it as old
            # means that nothing is corrected.
            state["hessian_step"] = torch.full((), torch.inf, dtype=torch.float32, device=param.device)
        for key in ("step", "hessian_step") if group["bias_correction"] else ("step",):
            count = state[key]
            if not isinstance(count, Tensor) or count.device != param.device or count.dtype != torch.float32:
                state[key] = torch.as_tensor(count, dtype=torch.float32, device=param.device)
        return state

    def _collect(self, gradients=None):
        """Buckets of all parameters that have a gradient. gradients: by parameter, instead of each `.grad`."""
        buckets = self._plan.refresh(self) if self._plan is not None and gradients is None else None
        if buckets is None:
            buckets, idle = self._group_tensors(gradients)
            if gradients is None and buckets and all(b.alignment and not b.shards for b in buckets):
                self._plan = _fused().Plan(self, buckets, idle)
        for bucket in buckets:
            capturing = bucket.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            if capturing and not bucket.group["capturable"]:
                raise RuntimeError("Attempting CUDA graph capture of an optimizer with capturable=False.")
            if bucket.alignment:
                table = self._tables.get(bucket.key)
                if table is None:
                    table = self._tables[bucket.key] = _fused().PointerTable()
                bucket.table = table.upload(bucket)
        return buckets

    def _group_tensors(self, gradients):
        """The buckets, and the parameters without a gradient."""
        buckets, idle = {}, []
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                grad = param.grad if gradients is None else gradients.get(param)
                if grad is None:
                    idle.append(param)
                    continue
                if grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
                if grad.shape != param.shape:
                    raise ValueError(f"got shape {tuple(grad.shape)} for a parameter of shape {tuple(param.shape)}")
                state = self._param_state(param, group, position)
                tensors, shards = (param, grad, state["exp_avg"], state["hessian"]), ()
                matrix = self._matrix(group, position)
                if hasattr(param, "device_mesh"):  # a DTensor: every rank steps its own shard
                    tensors, shards = _local_shards(*tensors)
                if param.is_complex():
                    tensors = tuple(torch.view_as_real(t) for t in tensors)
                counts = (state["step"], state["hessian_step"] if group["bias_correction"] else state["step"])
                row, alignment = _fused().pointers(tensors, counts) if self.fused and not matrix else ([], 0)
                dtypes = tuple(t.dtype for t in tensors)
                key = (index, param.device, dtypes, shards, alignment, matrix)
                bucket = buckets.get(key)
                if bucket is None:
                    bucket = buckets[key] = _Bucket(key, index, group, *key[1:])
                if alignment:
                    bucket.rows += row
                    bucket.origins.append((param, state, *tensors[2:], counts[0]))
                    continue
                bucket.states.append(state)
                bucket.params.append(tensors[0])
                bucket.grads.append(tensors[1])
                bucket.exp_avgs.append(tensors[2])
                bucket.hessians.append(tensors[3])
                bucket.steps.append(counts[0])
                if group["bias_correction"]:
                    bucket.hessian_steps.append(counts[1])
        return list(buckets.values()), idle

    def _matrix(self, group, position):
        """For a subclass that steps matrices in its own way: what matrices of one bucket share, else None."""
        return None

    def _implementation(self, bucket):
        """torch's rule: as asked, else foreach on accelerators and one tensor after the other on the CPU."""
        if bucket.table is not None:
            return _fused()
        by_default = self.foreach is None and bucket.device.type in ("cuda", "xpu")
        return _FOREACH if self.fused or self.foreach or by_default else _SINGLE_TENSOR

    def _amp(self, device):
        """(grad_scale, skip) on the device: a float scalar or None, a boolean scalar or None."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if grad_scale is not None:
            grad_scale = grad_scale.to(device, non_blocking=True)
        return grad_scale, None if found_inf is None else found_inf.to(device, non_blocking=True) != 0

    def _clip(self, buckets):
        """Set `grad_norm`; return the multiplier of clip_grad_norm_, min(1, max_grad_norm / (grad_norm + 1e-6))."""
        grad_scale = self._amp(buckets[0].device)[0] if buckets else None
        if buckets and all(b.table and not b.shards and b.device == buckets[0].device for b in buckets):
            self.grad_norm, multiplier = _fused().clip(buckets, self.max_grad_norm, grad_scale)
            return multiplier
        squares = {}  # shards -> sum of squares over the local parts
        for bucket in buckets:
            square = self._implementation(bucket).square(bucket)
            squares[bucket.shards] = squares.get(bucket.shards, 0.0) + square.to(buckets[0].device, non_blocking=True)
        reduced = [_reduce(square, shards) for shards, square in squares.items()]
        total = _sum(reduced or [torch.zeros((), dtype=torch.float32)])
        self.grad_norm = total.sqrt() if grad_scale is None else total.sqrt() / grad_scale
        return (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)

    @torch.no_grad()
    def _step(self, rho_scale):
        buckets = self._collect()
        clip = None if self.max_grad_norm is None else self._clip(buckets)
        for bucket in buckets:
            group, device = bucket.group, bucket.device
            grad_scale, skip = self._amp(device)
            multiplier = None if clip is None else clip.to(device, non_blocking=True)
            if grad_scale is not None:
                multiplier = (1.0 if multiplier is None else multiplier) / grad_scale
            lr = group["lr"]
            if isinstance(lr, Tensor):
                lr = lr.item() if lr.device.type == "cpu" else lr.to(device)
            beta1, beta2 = group["betas"]
            settings = {key: group[key] for key in ("weight_decay", "maximize", "nesterov")} | {"eps": group.get("eps")}
            settings |= {"lr": lr, "beta1": beta1, "beta2": beta2, "rho": group["rho"] * rho_scale}
            self._implementation(bucket).step(bucket, multiplier=multiplier, skip=skip, **settings)

    def _update_hessian(self, buckets, scale, squared):
        for bucket in buckets:
            grad_scale, skip = self._amp(bucket.device)
            settings = {"beta2": bucket.group["betas"][1], "scale": scale, "squared": squared, "skip": skip}
            multiplier = None if grad_scale is None else 1.0 / grad_scale
            self._implementation(bucket).hessian(bucket, multiplier=multiplier, **settings)

    @torch.no_grad()
    def _statistics(self, rho_scale):
        momenta, counts, totals = {}, [0] * len(self.param_groups), {}
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                if "hessian" in self.state.get(param, ()):
                    momenta[param] = self.state[param]["exp_avg"]
                    counts[index] += param.numel() * (2 if param.is_complex() else 1)
        for bucket in self._collect(momenta):
            group = bucket.group
            settings = {"beta2": group["betas"][1], "rho": group["rho"] * rho_scale, "eps": group.get("eps")}
            sums = self._implementation(bucket).sums(bucket, **settings)
            if bucket.shards not in totals:
                totals[bucket.shards] = sums.new_zeros(len(counts), 4)
            totals[bucket.shards][bucket.index] += sums.to(totals[bucket.shards].device, non_blocking=True)
        reduced = [_reduce(total, shards) for shards, total in totals.items()]
        rows = _sum(reduced).tolist() if reduced else [[0.0] * 4] * len(counts)
        wins, h1, h2, m2 = (sum(column) for column in zip(*rows, strict=True))
        result = {"win_rate": wins / max(1, sum(counts))}
        for index, (count, row) in enumerate(zip(counts, rows, strict=True)):
            result[f"win_rate/{self.param_groups[index].get('name', index)}"] = row[0] / max(1, count)
        return {**result, "hessian_norm": h1, "hessian_norm2": h2**0.5, "momentum_norm": m2**0.5}


class SophiaG(_Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimator (Algorithm 3 with Algorithm 2 of arXiv:2305.14342).

    With m the moving average of the gradient and h that of the squared sampled-label gradient, a step is

        m <- beta1 m + (1 - beta1) grad
        p <- p - lr weight_decay p
        p <- p - lr sign(m) min(|m| / (rho bs h + 1e-15), 1)

    A coordinate moves by at most lr, and by less where the curvature bs h is large. Every k-th step (10 in the paper),
    before the step, a backward pass of `sampled_label_loss` renews h:

        optimizer = SophiaG(model.parameters(), lr=3e-4, rho=0.05)
        for step, (x, y) in enumerate(batches):
            if step % 10 == 0:
                sampled_label_loss(model(x)).backward()
                optimizer.update_hessian()
                optimizer.zero_grad()
            F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
            optimizer.step(bs=y.numel())
            optimizer.zero_grad()

    docs/optimizers.md has recipes for gradient accumulation, DDP, GradScaler and the Hugging Face Trainer.

    Args:
        params: tensors, or dicts of them with their own settings. A group's "name" names it in statistics().
        lr: float, or a one-element tensor (on the device with capturable=True, to change it between graph replays).
        betas: decay of m at every step, and of h at every estimate.
        rho: the paper's gamma. A larger rho clips fewer coordinates; keep statistics()["win_rate"] between 0.1 and
            0.5.
        weight_decay: decoupled, times lr.
        maximize: ascend instead.
        capturable: allow step() and update_hessian() in a CUDA graph, after one eager call of each.
        bias_correction: divide h by 1 - beta2^n after n estimates, because h starts from 0.
        nesterov: the step uses beta1 m + (1 - beta1) grad, with m already renewed, in place of m, as in NAdam
            (Dozat, 2016).
        foreach, fused: as in torch.optim. None, None: foreach on accelerators, one tensor after the other on the CPU.
            fused=True is the fastest: one Triton launch for all tensors alike. It needs CUDA, Triton and
            sophia_fused.py. Tensors it cannot take (float64, strides that differ or overlap) go through foreach.
        max_grad_norm: clip the global gradient norm to this within step(), as torch.nn.utils.clip_grad_norm_ before
            it would. `.grad` stays as it is, and `grad_norm` holds the norm, a scalar tensor on the device. The
            sampled-label gradient is never clipped.

    State of a parameter: "step" (float32 scalar), "exp_avg" (m) and "hessian" (h), both in the parameter's shape and
    dtype; with bias_correction also "hessian_step" (n). State dicts of the official implementation load.
    Sharded parameters (DTensor, as fully_shard makes them) take the same step as complete ones.
    GradScaler: step() and update_hessian() honour the attributes `grad_scale` and `found_inf` without a host sync.

    Raises:
        ValueError: for a setting out of its range.
        RuntimeError: for fused and foreach together, for fused on parameters that are not CUDA floats or without
            sophia_fused.py or Triton, and for sparse gradients.
    """

    _more_defaults: dict[str, Any] = {}  # settings that a subclass adds, set before __init__  # noqa: RUF012

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04, weight_decay: float = 1e-1, *, maximize: bool = False, capturable: bool = False,
        bias_correction: bool = False, nesterov: bool = False, foreach: bool | None = None, fused: bool | None = None,
        max_grad_norm: float | None = None,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay, "maximize": maximize,
                    "capturable": capturable, "bias_correction": bias_correction, "nesterov": nesterov}  # fmt: skip
        super().__init__(params, defaults | self._more_defaults, foreach, fused, max_grad_norm)

    def step(self, closure: Callable[[], Any] | None = None, bs: float = 5120) -> Any:
        """Update the parameters from their gradients.

        Args:
            closure: evaluates the model again. It is called first, with gradients enabled; its value is returned.
            bs: labels (for a language model, tokens) that the estimates in h count for: the step's global batch.
        """
        loss = _call(closure)
        self._step(_checked(bs))
        return loss

    @torch.no_grad()
    def update_hessian(self, scale: float = 1.0) -> None:
        """h <- beta2 h + (1 - beta2) scale grad^2, from the gradients of `sampled_label_loss` (Algorithm 2).

        Args:
            scale: labels of this estimate / bs of the steps, so that rho means the same at every estimation batch.
        """
        self._update_hessian(self._collect(), float(scale), squared=True)

    def statistics(self, bs: float = 5120) -> dict[str, float]:
        """How the optimizer is doing, in one pass over the state and with one sync.

        Returns:
            win_rate: share of coordinates whose update is not clipped, |m| < rho bs h; win_rate/NAME for each group
                (with nesterov also of m, not of what the step uses in its place);
            hessian_norm: 1-norm of h; hessian_norm2 and momentum_norm: 2-norms of h and m.
        """
        return self._statistics(_checked(bs))


class SophiaH(_Sophia):
    """Sophia with Hutchinson's estimator (Algorithm 3 with Algorithm 1 of arXiv:2305.14342).

        p <- p - lr clamp(m / max(rho h, eps), -1, 1)

    h is the moving average of `hutchinson`'s estimates. It may be negative; such coordinates move by lr sign(m).
    m, weight decay and all other arguments are as in SophiaG; eps bounds the denominator.

        optimizer = SophiaH(model.parameters(), lr=3e-4)
        for step, (x, y) in enumerate(batches):
            if step % 10 == 0:
                optimizer.update_hessian(hutchinson(lambda: loss_fn(model(x), y), model.parameters()))
            loss_fn(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.01, eps: float = 1e-12, weight_decay: float = 1e-1, *, maximize: bool = False,
        capturable: bool = False, bias_correction: bool = False, nesterov: bool = False, foreach: bool | None = None,
        fused: bool | None = None, max_grad_norm: float | None = None,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "rho": rho, "eps": eps, "weight_decay": weight_decay,
                    "maximize": maximize, "capturable": capturable, "bias_correction": bias_correction,
                    "nesterov": nesterov}  # fmt: skip
        super().__init__(params, defaults, foreach, fused, max_grad_norm)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from their gradients. closure: as in SophiaG.step."""
        loss = _call(closure)
        self._step(1.0)
        return loss

    @torch.no_grad()
    def update_hessian(self, estimates: Iterable[Tensor | None]) -> None:
        """h <- beta2 h + (1 - beta2) estimate.

        Args:
            estimates: a tensor or None for each parameter, in the optimizer's order: what `hutchinson` returns.

        Raises:
            ValueError: if their number or a shape does not fit the parameters.
        """
        estimates = list(estimates)
        params = [p for group in self.param_groups for p in group["params"]]
        if len(estimates) != len(params):
            raise ValueError(f"update_hessian got {len(estimates)} estimates for {len(params)} parameters")
        self._update_hessian(self._collect(dict(zip(params, estimates, strict=True))), 1.0, squared=False)

    def statistics(self) -> dict[str, float]:
        """As SophiaG.statistics; a coordinate is not clipped where |m| < max(rho h, eps)."""
        return self._statistics(1.0)


# --------------------------------------------------------------------------------------------------------------------
# Plumbing: buckets of tensors, and each operation for a bucket. Arithmetic is in float32 or better.
# multiplier: scalar tensor that multiplies the gradients, or None. skip: boolean scalar tensor, or None; where it is
# True nothing changes, whatever the gradients hold, because averages move towards themselves and lr is 0.
# --------------------------------------------------------------------------------------------------------------------


class _Bucket:
    """Tensors of one parameter group that share device, dtypes and shards: one foreach call, or one kernel launch."""

    def __init__(self, key, index, group, device, dtypes, shards, alignment, matrix):
        self.key, self.index, self.group, self.device, self.shards = key, index, group, device, shards
        self.matrix = matrix  # see _Sophia._matrix
        self.dtypes = dtypes  # of params, grads, exp_avgs, hessians
        self.params, self.grads, self.exp_avgs, self.hessians = [], [], [], []  # local, real tensors
        self.steps, self.hessian_steps = [], []  # float32 scalars on `device`; the second only with bias_correction
        self.states = []
        # For the fused kernels, which need addresses only and must not keep the last step's gradients alive:
        self.alignment = alignment  # bytes that the kernels read at once; 0: the bucket is not theirs
        self.table = None
        self.rows = []  # 8 integers a tensor, see sophia_fused.PointerTable
        self.origins = []  # (parameter, its state, exp_avg, hessian, step), to see if the rows still hold

    def parts(self, together):
        """The lists that one call takes: everything together, or tensor by tensor, which needs less memory."""
        size = len(self.params) if together else 1
        lists = (self.params, self.grads, self.exp_avgs, self.hessians, self.hessian_steps)
        return [[tensors[i : i + size] for tensors in lists] for i in range(0, len(self.params), size)]


@functools.cache
def _fused() -> Any:
    """The module sophia_fused, from beside this file."""
    try:
        return importlib.import_module(f"{__package__}.sophia_fused" if __package__ else "sophia_fused")
    except ModuleNotFoundError as error:
        if error.name and error.name.endswith("sophia_fused"):
            remedy = "copy sophia_fused.py beside sophia.py"
        else:
            remedy = f"`{error.name}` is missing: pip install triton"
        raise RuntimeError(f"`fused=True` needs the kernels in sophia_fused.py; {remedy}") from error


def _check_fused(params):
    """RuntimeError if the kernels cannot run here, or not on these parameters."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # for tests
    devices = ["cuda", "cpu"] if interpreted else ["cuda"]
    for param in params:
        if param.device.type not in devices or not param.is_floating_point():
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point Tensors of supported devices: "
                f"{devices} but {param.dtype} and {param.device.type}"
            )
    _fused()


def _opmath_dtype(tensor):
    return torch.promote_types(tensor.dtype, torch.float32)


def _corrected(rho, beta2, hessian_steps, dtype):
    """rho / (1 - beta2^n), the bias correction of the curvature: a list with n of every tensor, or rho without n."""
    log = math.log(beta2) if beta2 else -math.inf
    return [-rho / torch.expm1(n.to(dtype).clamp(min=1) * log) for n in hessian_steps] or rho


def _count(steps, skip):
    torch._foreach_add_(steps, 1.0 if skip is None else [(~skip).float()] * len(steps))  # a tensor alone would sync


def _step(bucket, together, *, lr, beta2, rho, maximize, multiplier, skip, **settings):
    dtype = _opmath_dtype(bucket.params[0])
    if skip is not None:
        lr = lr * (~skip).to(dtype)
    elif isinstance(lr, Tensor):
        lr = lr.to(dtype)
    for params, grads, exp_avgs, hessians, estimates in bucket.parts(together):
        p, g, m, h = ([t.to(dtype) for t in tensors] for tensors in (params, grads, exp_avgs, hessians))
        if multiplier is not None:
            g = torch._foreach_mul(g, multiplier.to(dtype))
        if maximize:
            g = torch._foreach_neg(g)
        if skip is not None:
            g = [torch.where(skip, a, b) for a, b in zip(m, g, strict=True)]
        _update(p, g, m, h, lr=lr, rho=_corrected(rho, beta2, estimates, dtype), **settings)
        if p[0] is not params[0]:
            torch._foreach_copy_(params, p)
        if m[0] is not exp_avgs[0]:
            torch._foreach_copy_(exp_avgs, m)
    _count(bucket.steps, skip)


def _hessian(bucket, together, *, multiplier, skip, **settings):
    dtype = _opmath_dtype(bucket.hessians[0])
    for _, grads, _, hessians, _ in bucket.parts(together):
        h, estimates = [t.to(dtype) for t in hessians], [t.to(dtype) for t in grads]
        if multiplier is not None:
            estimates = torch._foreach_mul(estimates, multiplier.to(dtype))
        _estimate(h, estimates, skip=skip, **settings)
        if h[0] is not hessians[0]:
            torch._foreach_copy_(hessians, h)
    if bucket.hessian_steps:
        _count(bucket.hessian_steps, skip)


def _square(bucket):
    """The sum of squares of the gradients, a scalar tensor."""
    return torch.stack(torch._foreach_norm(bucket.grads, 2, dtype=_opmath_dtype(bucket.grads[0]))).square().sum()


def _sums(bucket, *, beta2, rho, eps):
    """(4,): coordinates that are not clipped, sums of |h|, of h^2, of m^2."""
    dtype = _opmath_dtype(bucket.hessians[0])
    rhos, sums = _corrected(rho, beta2, bucket.hessian_steps, dtype), 0.0
    for i, (m, h) in enumerate(zip(bucket.exp_avgs, bucket.hessians, strict=True)):
        bound = h.to(dtype) * (rhos[i] if isinstance(rhos, list) else rhos)
        wins = (m.abs() < (bound if eps is None else bound.clamp_(min=eps))).sum(dtype=dtype)
        h1, h2, m2 = (torch.linalg.vector_norm(t, n, dtype=dtype) for t, n in ((h, 1), (h, 2), (m, 2)))
        sums = sums + torch.stack([wins, h1, h2.square(), m2.square()])
    return sums


# The implementations are namespaces of four operations. The module sophia_fused is another one.
_FOREACH, _SINGLE_TENSOR = (
    SimpleNamespace(step=partial(_step, together=t), hessian=partial(_hessian, together=t), square=_square, sums=_sums)
    for t in (True, False)
)


def _call(closure):
    with torch.enable_grad():
        return None if closure is None else closure()


def _checked(bs):
    if not bs > 0:
        raise ValueError(f"Invalid bs: {bs}, expected the number of labels (tokens) in a step's batch")
    return float(bs)


def _sum(tensors):
    return functools.reduce(torch.add, [t.to(tensors[0].device, non_blocking=True) for t in tensors])


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
