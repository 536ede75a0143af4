"""Sophia: a second-order optimizer that clips each coordinate's step, for language-model pre-training.

    from sophia import SophiaG, sampled_label_loss

Liu et al. (arXiv:2305.14342): Hutchinson's estimator (Algorithm 1) is `hutchinson`. The Gauss-Newton-Bartlett estimator
(Algorithm 2) is `sampled_label_loss` and `sampled_target_loss`. `SophiaH` and `SophiaG` are Algorithm 3 with either.
The paper's gamma is `rho`, as in the official code. Needs torch; `fused=True` also needs Triton and sophia_fused.py.
"""

import contextlib
import functools
import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.optim.optimizer import Optimizer, ParamsT

__all__ = ["SophiaG", "SophiaH", "hutchinson", "sample_labels", "sampled_label_loss", "sampled_target_loss"]

_TOGETHER = 2**16  # elements of tensors that are stepped together without foreach
_EPS = 1e-15  # added to rho * bs * hessian, as in the official code


# ----- The update and the estimate, in place, for lists of tensors: parameters p, gradients g, averages m, curvatures h
def _update(p, g, m, h, *, lr, beta1, rho, eps, weight_decay, nesterov):
    """Algorithm 3. p moves by -lr sign(m) min(|m| / (rho h + 1e-15), 1) in SophiaG, whose rho is rho * bs and eps None,
    and by -lr clamp(m / max(rho h, eps), -1, 1) in SophiaH."""
    torch._foreach_lerp_(m, g, 1 - beta1)  # m <- beta1 m + (1 - beta1) g
    numerators = torch._foreach_lerp(m, g, 1 - beta1) if nesterov else m
    denominators = torch._foreach_mul(h, rho)
    if eps is None:
        torch._foreach_add_(denominators, _EPS)
    else:
        torch._foreach_clamp_min_(denominators, eps)
    updates = torch._foreach_div(numerators, denominators)
    torch._foreach_clamp_min_(updates, -1)
    torch._foreach_clamp_max_(updates, 1)
    torch._foreach_mul_(p, 1 - lr * weight_decay)
    if isinstance(lr, Tensor):
        torch._foreach_sub_(p, torch._foreach_mul(updates, lr))
    else:
        torch._foreach_sub_(p, updates, alpha=lr)


def _estimate(h, estimates, *, beta2, scale, squared, skip):
    """h <- beta2 h + (1 - beta2) scale estimate^2, or of the estimate itself. Nothing changes where skip is True."""
    if skip is not None:
        estimates = [torch.where(skip, a, b * b * scale if squared else b) for a, b in zip(h, estimates, strict=True)]
    if squared and skip is None:
        torch._foreach_mul_(h, beta2)
        torch._foreach_addcmul_(h, estimates, estimates, value=(1 - beta2) * scale)
    else:
        torch._foreach_lerp_(h, estimates, 1 - beta2)


# ----- Estimators of the curvature's diagonal

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

    A label is the inverse of the cumulative distribution at one uniform number, searched in blocks of classes, then in
    a block. It depends on that number and the logits of its position. A class of probability 0 is never drawn.

    logits: (..., classes). generator: on the logits' device; None is the default generator. uniform: (...), numbers in
    [0, 1) to use instead of random ones. Returns int64 (...). Raises ValueError for other logits or shapes.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or not logits.ndim:
        raise ValueError(f"expected floating-point logits (..., classes), got {getattr(logits, 'dtype', type(logits))}")
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
    def forward(ctx, logits, labels):
        kept = labels >= 0
        safe = torch.where(kept, labels, 0)
        picked = logits.gather(-1, safe[:, None])[:, 0].float()
        normalizer = torch.cat([torch.logsumexp(logits[rows].float(), -1) for rows in _row_chunks(logits)])
        count = kept.sum()
        ctx.save_for_backward(logits, safe, kept, normalizer, count)
        return torch.where(kept, normalizer - picked, 0.0).sum() / count

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():
            raise RuntimeError("sampled_label_loss can be differentiated once; give hutchinson the training loss")
        logits, labels, kept, normalizer, count = ctx.saved_tensors
        weight = torch.where(kept, grad_output / count, 0.0)[:, None]
        grad = torch.empty_like(logits)
        for rows in _row_chunks(logits):
            chunk = (logits[rows] - normalizer[rows, None]).exp_()  # in float32
            chunk.scatter_add_(-1, labels[rows, None], chunk.new_full((chunk.shape[0], 1), -1.0))
            grad[rows] = chunk.mul_(weight[rows])
        return grad, None


def sampled_label_loss(
    logits: Tensor, generator: Generator | None = None, ignore_index: int = -100, *,
    uniform: Tensor | None = None, targets: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mean cross-entropy against labels drawn from the model itself: Algorithm 2 (Gauss-Newton-Bartlett).

    logits, generator, uniform: as in `sample_labels`. targets: (...), the real labels. Where they are ignore_index, the
    position is left out of the mean. Returns a float32 scalar, whose gradient SophiaG.update_hessian() squares.
    """
    if targets is None and ignore_index != -100:
        raise ValueError("ignore_index says which targets are padding, so it needs targets=...")
    labels = sample_labels(logits, generator, uniform=uniform)
    if targets is not None:
        if targets.shape != labels.shape:
            raise ValueError(f"targets has shape {tuple(targets.shape)}, expected {tuple(labels.shape)}")
        labels = torch.where(targets == ignore_index, -100, labels)  # a drawn label may be ignore_index
    flat, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():  # they differentiate by themselves
        return F.cross_entropy(flat.float(), labels)
    return _ChunkedCrossEntropy.apply(flat, labels)


def sampled_target_loss(outputs: Tensor, generator: Generator | None = None, *, variance: float = 1.0) -> Tensor:
    """Mean over rows of ||outputs - y||^2 / (2 variance) with y ~ N(outputs, variance): Algorithm 2 for regression.

    The mean of B grad^2 over draws is the diagonal of the Gauss-Newton matrix J^T J / variance. J is the Jacobian of
    the outputs (..., D), and B the number of rows; set `bs` to it. Use variance 1 if the training loss is half the sum
    of squared errors over the D outputs, and D / 2 for torch's mse_loss.
    """
    _check_number("variance", variance, above=0.0)
    outputs = outputs.to(_opmath_dtype(outputs))  # squares of float16 overflow
    noise = torch.randn(outputs.shape, generator=generator, device=outputs.device, dtype=outputs.dtype)
    target = outputs.detach() + noise * variance**0.5
    return (outputs - target).square().sum() / (2 * variance * outputs[..., 0].numel())


class _Estimates(list):
    params: list[Tensor]  # of the estimates, so that no order has to be kept


def hutchinson(
    loss: Tensor | Callable[[], Tensor], params: Iterable[Tensor], generator: Generator | None = None
) -> list[Tensor | None]:
    """Hutchinson's estimate of the Hessian's diagonal, u * (Hessian @ u) with u ~ N(0, I): Algorithm 1.

    It costs about two backward passes. The loss is differentiated twice, which compiled models do not support. So let
    `loss` be a function that calls the uncompiled model; in it attention runs in its plain form. `.grad` is left alone.

    loss: a function without arguments that returns the scalar loss, or the loss itself. params: any iterable.
    Returns a list in the order and shapes of params: None for parameters that require no gradient, 0 where the
    gradient does not depend on the parameters. Warns if the loss does not depend on some. Raises RuntimeError if on
    none, and for sharded (DTensor) or complex parameters; ValueError if the loss is not one number.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    result, params = _Estimates(), list(params)
    if any(not isinstance(p, Tensor) or hasattr(p, "device_mesh") or p.is_complex() for p in params):
        raise RuntimeError("hutchinson does not work on sharded parameters (DTensor), complex ones, or no tensors")
    result.params, active = params, [*dict.fromkeys(p for p in params if p.requires_grad)]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        value = loss() if callable(loss) else loss
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
            raise ValueError(f"hutchinson needs the loss, a tensor of one real number, and got {value!r:.60}")
        has_graph = active and value.requires_grad
        grads = torch.autograd.grad(value, active, create_graph=True, allow_unused=True) if has_graph else ()
        if unused := len(active) - sum(g is not None for g in grads):
            message = f"hutchinson: the loss does not depend on {unused} of {len(active)} parameters; compute it with"
            message += " gradients enabled, by the module that holds them, without reentrant checkpointing"
            if unused == len(active):
                raise RuntimeError(message)
            warnings.warn(message, stacklevel=2)
        noise = [torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype) for p in active]
        used = [(g, u) for g, u in zip(grads, noise, strict=True) if g is not None and g.requires_grad]
        products: Iterable[Tensor] = [torch.zeros_like(p) for p in active]
        if used:
            outputs, vectors = zip(*used, strict=True)
            products = torch.autograd.grad(outputs, active, vectors, materialize_grads=True)
    estimates = {p: u.to(_state_dtype(u)) * v for p, u, v in zip(active, noise, products, strict=True)}
    result += [estimates.get(p) for p in params]
    return result


# ----- The optimizers
class _Sophia(Optimizer):
    """Base of SophiaG and SophiaH. GradScaler: while the attributes `grad_scale` and `found_inf` are set, gradients are
    divided by `grad_scale`, and where `found_inf` is not 0 a call changes nothing. The host never reads either."""

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then calls step() itself, with the attributes above
    grad_norm: Tensor | None = None  # the last step's gradient norm before clipping, on the device
    skipped_estimates: Tensor | float = 0.0  # how many estimates took no effect, on the device
    _estimated = False  # a step has looked whether there is a curvature
    _made = 0  # curvatures that began at 0 since an estimate, or since a step looked

    def __init__(self, params, defaults, *, maximize=False, capturable=False, bias_correction=False, nesterov=False,
                 foreach=None, fused=None, max_grad_norm=None):  # fmt: skip
        for name, value in (("foreach", foreach), ("fused", fused)):
            _check_number(name, value or 0, below=2)
        if foreach and fused:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if max_grad_norm not in (None, math.inf):
            _check_number("max_grad_norm", max_grad_norm, above=0.0)
        self.foreach, self.fused, self.max_grad_norm = foreach, fused, max_grad_norm
        self._cache = {}  # what is derived from the state
        defaults |= {"maximize": maximize, "capturable": capturable, "bias_correction": bias_correction}
        super().__init__(params, {**defaults, "nesterov": nesterov})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (RuntimeError, ValueError):
            del self.param_groups[-1]
            raise

    def _check_group(self, group):
        """Raise ValueError for a setting that is out of its range, or that nobody reads."""
        own = self._process_settings()  # ZeroRedundancyOptimizer gives them to the groups too
        for key in sorted(k for k in group.keys() - self.defaults.keys() - _LABELS if own.get(k, own) != group[k]):
            whose = "the constructor, not of a group" if key in own else "no group"
            raise ValueError(f"{key!r} is a setting of {whose}; a group may have {', '.join(self.defaults)}")
        _check_once(group["params"])
        lr, betas = group["lr"], group["betas"]
        if isinstance(lr, Tensor) and self.foreach and not group["capturable"]:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"Invalid betas: {betas!r}, expected two numbers (beta1, beta2)")
        for i, beta in enumerate(betas):
            _check_number(f"beta parameter at index {i}", beta, below=1.0)
        for key in ("lr", "rho", "weight_decay"):
            _check_number({"lr": "learning rate"}.get(key, f"{key} value"), group[key])
        for key in ("maximize", "capturable", "bias_correction", "nesterov"):
            _check_number(key, group[key], below=2)  # "False" would be true
        _check_number("epsilon value", group.get("eps", 1.0), above=0.0)
        _check_number("bs", group.get("bs", 1.0), above=0.0)
        if self.fused:
            _fused().check(group["params"])

    def _process_settings(self):  # state_dict() has them; loading leaves foreach and fused as they are
        return {"foreach": self.foreach, "fused": self.fused, "max_grad_norm": self.max_grad_norm}

    def __repr__(self) -> str:
        return super().__repr__()[:-1] + "".join(f"{k}: {v}\n" for k, v in self._process_settings().items()) + ")"

    def __getstate__(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in ("skipped_estimates", "_estimated", "_made")}
        return {**super().__getstate__(), **self._process_settings(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it
        self._cache = {}
        for index, group in enumerate(self.param_groups):
            *_, self.max_grad_norm = [group.pop(key, now) for key, now in self._process_settings().items()]
            for key, value in {**self.defaults, **(before[index] if before else {})}.items():
                group.setdefault(key, value)  # a checkpoint of the official code lacks most
        for param, values in self.state.items():
            for key in [k for k in values if callable(values[k])] if isinstance(param, Tensor) else ():  # hidden ones
                dtype = _state_dtype(param) if key in _AVERAGES else None
                values[key] = values[key](param.device, dtype, copy=True)  # two optimizers would move one tensor

    def state_dict(self) -> dict[str, Any]:
        state_dict = super().state_dict()
        groups = [{**group, **self._process_settings()} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of a state; cast only m and h. Raise ValueError for a setting that no group may have."""

        def hide_from_torch(_, loaded):  # __setstate__ calls the methods that take the tensors' places
            for group, saved in zip(self.param_groups, loaded["param_groups"], strict=False):
                saved = {key: value for key, value in saved.items() if key not in self._process_settings()}
                self._check_group({**group, **saved, "params": group["params"]})
            state = dict(loaded["state"])
            for n in state.keys() & {n for group in loaded["param_groups"] for n in group["params"]}:
                if "left_basis" in state[n]:
                    raise RuntimeError("this is a state of EigenbasisSophiaG, which only commit efa612d still has")
                tensors = {k: torch.as_tensor(v) if k.startswith(_AVERAGES) else v for k, v in state[n].items()}
                state[n] = {key: getattr(value, "to", value) for key, value in tensors.items()}
            return {**loaded, "state": state}

        with self.register_load_state_dict_pre_hook(hide_from_torch):  # last: it sees what the other hooks return
            super().load_state_dict(state_dict)

    def _param_state(self, param, group):
        """The parameter's state; missing entries are added, as after loading a checkpoint of the official code."""
        state, corrects, expected = self.state[param], group["bias_correction"], (param.device, torch.float32, 0)
        # The age of a curvature from a run without bias correction is taken as infinite: nothing is corrected.
        for key, new in (("step", 0.0), ("hessian_step", math.inf if "hessian" in state else 0.0))[: 1 + corrects]:
            count = state.setdefault(key, new)
            if not isinstance(count, Tensor) or (count.device, count.dtype, count.ndim) != expected:
                if torch.as_tensor(count).numel() != 1:
                    raise ValueError(f"{key} of a parameter of {tuple(param.shape)} is {count}, expected a number")
                state[key] = torch.as_tensor(count, dtype=torch.float32, device=param.device).reshape(())
        for key in _AVERAGES:
            if key not in state:
                state[key] = torch.zeros_like(param, dtype=_state_dtype(param), memory_format=torch.preserve_format)
                self._made += key == "hessian"
        return state

    def _collect(self, gradients=None):
        """Buckets of all parameters that have a gradient. gradients: by parameter, instead of each `.grad`."""
        buckets = _fused().buckets(self, gradients) if self.fused else self._group_tensors(gradients)
        for bucket in buckets:
            cuda = bucket.device.type == "cuda"
            if cuda and not bucket.group["capturable"] and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("Attempting CUDA graph capture of an optimizer with capturable=False.")
            if bucket.pointers is not None:
                bucket.table = bucket.pointers.upload(bucket)
        return buckets

    def _group_tensors(self, gradients):
        buckets = {}
        _check_once([param for group in self.param_groups for param in group["params"]])
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                grad = param.grad if gradients is None else gradients.get(param)
                if grad is None:
                    continue
                if grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
                state = self._param_state(param, group)
                tensors, shards = (param, grad, *(state[key] for key in _AVERAGES)), ()
                if hasattr(param, "device_mesh"):  # a DTensor: every rank steps its own shard
                    tensors, shards = _local_shards(tensors)
                self._check_fit(index, position, tensors)
                if param.is_complex():
                    tensors = tuple(torch.view_as_real(t) for t in tensors)
                key = (index, param.device, tuple(t.dtype for t in tensors), shards)
                buckets.setdefault(key, []).append((state, *tensors))
        return [_Bucket(key, self.param_groups[key[0]], entries) for key, entries in buckets.items()]

    def _check_fit(self, index, position, tensors):
        p, *others = tensors
        for kind, t in zip(("gradient", *_AVERAGES), others, strict=True):
            alike = t.is_floating_point() == p.is_floating_point() and t.is_complex() == p.is_complex()
            if not (alike and t.shape == p.shape and t.device == p.device):
                names = self.param_groups[index].get("param_names")
                message = f"{kind} of parameter {names[position] if names else f'{position} of group {index}'}: got "
                message += f"shape {tuple(t.shape)} for a parameter of shape {tuple(p.shape)}, {t.dtype} for {p.dtype}"
                raise ValueError(f"{message}, {t.device} for {p.device}; load a fitting state")

    def _implementation(self, bucket):
        if bucket.table is not None:
            return _fused()
        by_default = self.foreach is None and bucket.device.type in ("cuda", "xpu")  # torch's rule
        return _FOREACH if self.fused or self.foreach or by_default else _SINGLE_TENSOR

    def _amp(self, device):
        return [_scalar(getattr(self, name, None), device) for name in ("grad_scale", "found_inf")]

    def _all_fused(self, buckets):
        return buckets and all(b.table and not b.shards and b.device == buckets[0].device for b in buckets)

    def _clip(self, buckets):
        """Set `grad_norm`; return the multiplier of clip_grad_norm_, min(1, max_grad_norm / (grad_norm + 1e-6))."""
        grad_scale = self._amp(buckets[0].device)[0] if buckets else None
        if self._all_fused(buckets):
            self.grad_norm, multiplier = _fused().clip(buckets, self.max_grad_norm, grad_scale)
            return multiplier
        norm = _total(buckets, lambda bucket: self._implementation(bucket).square(bucket)).sqrt()
        self.grad_norm = norm if grad_scale is None else norm / grad_scale
        return (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from their gradients. closure: as in SophiaG.step."""
        return self._step(closure)

    @torch.no_grad()
    def _step(self, closure=None, bs=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        buckets = self._collect()
        if self._made or not self._estimated:
            self._warn_without_curvature(buckets)
        clip = None if self.max_grad_norm is None else self._clip(buckets)
        for bucket in buckets:
            group, device, (beta1, beta2) = bucket.group, bucket.device, bucket.group["betas"]
            multiplier, (grad_scale, skip) = _scalar(clip, device), self._amp(device)
            if grad_scale is not None:
                multiplier = (1.0 if multiplier is None else multiplier) / grad_scale
            lr = group["lr"]
            if isinstance(lr, Tensor):
                lr = lr.item() if lr.device.type == "cpu" else _scalar(lr, device)
            settings = {key: group[key] for key in ("weight_decay", "maximize", "nesterov")} | {"eps": group.get("eps")}
            settings |= {"lr": lr, "beta1": beta1, "beta2": beta2, "rho": self._rho(group, bs)}
            self._implementation(bucket).step(bucket, multiplier=multiplier, skip=skip, **settings)
        return loss

    _rho = staticmethod(lambda group, bs: group["rho"])

    def _warn_without_curvature(self, buckets):
        """Look for a curvature, with a sync: in the first step with an lr that is not 0, and if states were made."""
        made, self._made = self._made, 0
        hessians = [h for b in buckets if self._rho(b.group, None) and b.group["lr"] not in {0} for h in b.hessians]
        self._estimated = any(h.numel() for h in hessians)
        if n := self._estimated and (made if any(h.is_meta or h.any() for h in hessians) else len(hessians)):
            message = f"{type(self).__name__}.step() before any update_hessian() that took effect on {n} parameters"
            warnings.warn(f"{message}: without a curvature all coordinates move by lr", stacklevel=6)

    def _update_hessian(self, gradients, scale, squared, grad_scale):
        _check_number("scale", scale, above=0.0)
        buckets, self._made = self._collect(gradients), 0
        if not buckets:
            raise RuntimeError("update_hessian() found no gradient; call it after the backward pass before zero_grad()")
        _check_number("grad_scale", 1.0 if grad_scale is None else grad_scale, above=0.0)
        grad_scale = getattr(self, "grad_scale", None) if grad_scale is None else grad_scale
        if (found_inf := getattr(self, "found_inf", None)) is None:
            self.skipped_estimates = _scalar(self.skipped_estimates, buckets[0].device)
            if self._all_fused(buckets):
                found_inf = _fused().check_estimate(buckets, scale, squared, self.skipped_estimates)
            else:
                total = _total(buckets, lambda bucket: self._implementation(bucket).square(bucket)) * scale
                found_inf = (~((total > 0 if squared else total >= 0) & (total < math.inf))).float()
                self.skipped_estimates += found_inf
            if found_inf.device.type == "cpu":  # where the host can look without a sync
                if found_inf:
                    return
                found_inf = None
        for bucket in buckets:
            multiplier = None if grad_scale is None else 1.0 / _scalar(grad_scale, bucket.device)
            settings = {"beta2": bucket.group["betas"][1], "scale": float(scale), "squared": squared}
            settings["skip"] = _scalar(found_inf, bucket.device)
            self._implementation(bucket).hessian(bucket, multiplier=multiplier, **settings)
            for state in () if bucket.hessian_steps else bucket.states:
                state.pop("hessian_step", None)  # of a bias correction that is off now

    @torch.no_grad()
    def _statistics(self, bs=None):
        momenta, counts = {}, {}  # counts: of coordinates, by the name of groups; some may share one
        for index, group in enumerate(self.param_groups):
            name, params = group.get("name", index), [p for p in group["params"] if "hessian" in self.state.get(p, ())]
            momenta |= {p: self.state[p]["exp_avg"] for p in params}
            counts[name] = counts.get(name, 0) + sum(p.numel() * (2 if p.is_complex() else 1) for p in params)

        def row_of_group(bucket):
            settings = {"beta2": bucket.group["betas"][1], "eps": bucket.group.get("eps")}
            sums = self._implementation(bucket).sums(bucket, rho=self._rho(bucket.group, bs), **settings)
            rows = sums.new_zeros(len(counts), 4)
            rows[[*counts].index(bucket.group.get("name", bucket.index))] = sums
            return rows

        buckets = self._collect(momenta)
        rows = _total(buckets, row_of_group).tolist() if buckets else [[0.0] * 4] * len(counts)
        wins, h1, h2, m2 = (sum(column) for column in zip(*rows, strict=True))
        result = {"win_rate": wins / max(1, sum(counts.values()))}
        result |= {f"win_rate/{k}": row[0] / max(1, counts[k]) for k, row in zip(counts, rows, strict=True)}
        return {**result, "hessian_norm": h1, "hessian_norm2": h2**0.5, "momentum_norm": m2**0.5}


class SophiaG(_Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimator (Algorithm 3 with Algorithm 2 of arXiv:2305.14342).

    With m the moving average of the gradient and h that of the squared sampled-label gradient, a step is

        m <- beta1 m + (1 - beta1) grad
        p <- p - lr weight_decay p
        p <- p - lr sign(m) min(|m| / (rho bs h + 1e-15), 1)

    The update moves a coordinate by at most lr, and by less where the curvature bs h is large. Before every k-th step
    (k = 10 in the paper) a backward pass of `sampled_label_loss` updates h:

        optimizer = SophiaG(model.parameters(), lr=3e-4, rho=0.05, bs=batch_size * block_size)
        for step, (x, y) in enumerate(batches):
            if step % 10 == 0:
                sampled_label_loss(model(x)).backward()
                optimizer.update_hessian()
                optimizer.zero_grad()
            F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        params: tensors, or dicts of them with their own settings. A group's "name" names it in statistics().
        lr: float, or a one-element tensor. With capturable=True put it on the device, to change it between replays.
        betas: decay of m at every step, and of h at every estimate.
        rho: the paper's gamma. A larger rho clips fewer coordinates. Keep statistics()["win_rate"] from 0.1 to 0.5.
        weight_decay: decoupled, times lr.
        bs: labels (for a language model, tokens) of a step, over all ranks and micro-batches.
        maximize, foreach: as in torch.optim.
        capturable: allow step() and update_hessian() in a CUDA graph, after one eager call of each.
        bias_correction: divide h by 1 - beta2^n after n estimates, because h starts from 0.
        nesterov: use beta1 m + (1 - beta1) grad with the new m in place of m, as NAdam does.
        fused: use one Triton launch for all tensors of a kind. It needs CUDA, Triton and sophia_fused.py. Tensors that
            the kernels cannot take (float64, odd strides) go through foreach.
        max_grad_norm: clip the global gradient norm to this within step(). `grad_norm` holds the norm before clipping.

    State: "step" (float32 scalar), "exp_avg" (m) and "hessian" (h) in the parameter's shape and dtype (float32 for
    float16), with bias_correction "hessian_step" (n). The official code's state dicts load. Sharded parameters
    (DTensor, as fully_shard makes them) take the same step as complete ones.
    Raises ValueError for a bad setting and a state that does not fit, RuntimeError where fused=True cannot work.
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04, weight_decay: float = 1e-1, *, bs: float = 5120, maximize: bool = False,
        capturable: bool = False, bias_correction: bool = False, nesterov: bool = False, foreach: bool | None = None,
        fused: bool | None = None, max_grad_norm: float | None = None,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay, "bs": bs}
        super().__init__(params, defaults, maximize=maximize, capturable=capturable, bias_correction=bias_correction,
                         nesterov=nesterov, foreach=foreach, fused=fused, max_grad_norm=max_grad_norm)  # fmt: skip

    def step(self, closure: Callable[[], Any] | None = None, bs: float | None = None) -> Any:
        """Update the parameters from their gradients. bs: labels (tokens) of this step; None takes the groups' setting.
        closure evaluates the model again. It is called first, with gradients enabled. step() returns its value."""
        return self._step(closure, bs)

    @torch.no_grad()
    def update_hessian(self, scale: float = 1.0, *, grad_scale: float | Tensor | None = None) -> None:
        """h <- beta2 h + (1 - beta2) scale grad^2, from the gradients of `sampled_label_loss` (Algorithm 2).

        scale: labels of this estimate / bs of the steps. rho then means the same for every size of estimation batch.
        grad_scale: the number that the loss was multiplied by: scaler.get_scale() with a GradScaler.
        An estimate that is not finite, or 0 everywhere, changes nothing. `skipped_estimates` counts it on the device.
        Raises RuntimeError if there is no gradient.
        """
        self._update_hessian(None, scale, True, grad_scale)

    def statistics(self, bs: float | None = None) -> dict[str, float]:
        """Return the share of coordinates that are not clipped, and norms of h and m. Takes one host sync.

        win_rate: share of coordinates whose update is not clipped, |m| < rho bs h. win_rate/NAME: that of a group.
        hessian_norm: 1-norm of h. hessian_norm2, momentum_norm: 2-norms. Shards (FSDP2): call it on every rank.
        """
        return self._statistics(bs)

    def _rho(self, group, bs):
        bs = group["bs"] if bs is None else bs
        _check_number("bs", bs, above=0.0)
        return group["rho"] * float(bs)


class SophiaH(_Sophia):
    """Sophia with Hutchinson's estimator (Algorithm 3 with Algorithm 1 of arXiv:2305.14342).

        p <- p - lr clamp(m / max(rho h, eps), -1, 1)

    h is the moving average of `hutchinson`'s estimates. A coordinate of h may be negative. It then moves by lr sign(m).
    eps is the smallest denominator. There is no bs. All other arguments, m and weight decay are as in SophiaG. With
    maximize=True give `hutchinson` the negated loss.

        optimizer = SophiaH(model.parameters(), lr=3e-4)
        for step, (x, y) in enumerate(batches):
            if step % 10 == 0:
                optimizer.update_hessian(hutchinson(lambda: loss_fn(model(x), y), model.parameters()))
            loss_fn(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.965, 0.99), rho: float = 0.01,
        eps: float = 1e-12, weight_decay: float = 1e-1, **settings: Any,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "rho": rho, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, **settings)

    @torch.no_grad()
    def update_hessian(
        self, estimates: Iterable[Tensor | None] | Mapping[Tensor, Tensor | None], *,
        grad_scale: float | Tensor | None = None, average: bool = True,
    ) -> None:  # fmt: skip
        """h <- beta2 h + (1 - beta2) estimate.

        estimates: `hutchinson`'s list; or a dict, parameter -> tensor or None; or any list in the optimizer's order.
        grad_scale: the number that the loss was multiplied by, as in SophiaG.update_hessian.
        average: take the mean over the ranks of the default process group, if there is one. Each rank has its own u and
            batch. Pass False if all ranks have the same estimate already.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        if not isinstance(estimates, Mapping):
            owners, estimates = getattr(estimates, "params", params), list(estimates)
            if len(estimates) != len(owners):
                raise ValueError(f"update_hessian got {len(estimates)} estimates for {len(owners)} parameters")
            estimates = dict(zip(owners, estimates, strict=True))
        given = {param: estimate for param, estimate in estimates.items() if estimate is not None}
        if bad := given.keys() - set(params) or {p for p, e in given.items() if not isinstance(e, Tensor)}:
            raise ValueError(f"{len(bad)} estimates of what is no parameter of this optimizer, or that are no tensors")
        if average and torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks, own = torch.distributed.get_world_size(), [(tuple(p.shape), p in given) for p in params]
            torch.distributed.all_gather_object(everyones := [own] * ranks, own)
            if any(other != own for other in everyones):
                raise RuntimeError("the ranks have estimates of different parameters; pass zeros where a rank has none")
            for p in (p for p in params if p in given and not hasattr(given[p], "device_mesh")):
                given[p] = given[p] / ranks
                torch.distributed.all_reduce(given[p])
        self._update_hessian(given, 1.0, False, grad_scale)

    def statistics(self) -> dict[str, float]:
        """Return what SophiaG.statistics does. A coordinate is not clipped where |m| < max(rho h, eps)."""
        return self._statistics()


# ----- Plumbing: buckets of tensors, and each operation for a bucket. Arithmetic is in float32 or better.
# multiplier: a scalar tensor times the gradients, or None. skip: the same; where it is not 0 nothing changes.

_AVERAGES = ("exp_avg", "hessian")
_LABELS = {"params", "param_names", "name", "split", "lr_scale"}  # of groups, for others to read
_LABELS |= {"initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"}  # of schedulers


class _Bucket:
    """Tensors of one parameter group that share device, dtypes and shards: one foreach call, or one kernel launch."""

    pointers = table = None  # of the fused kernels, see sophia_fused

    def __init__(self, key, group, entries):
        self.key, self.group = key, group
        self.index, self.device, self.dtypes, self.shards = key
        columns = map(list, zip(*entries, strict=True))
        self.states, self.params, self.grads, self.exp_avgs, self.hessians = columns  # local, real tensors
        self.steps = [state["step"] for state in self.states]  # float32 scalars on `device`
        self.hessian_steps = [state["hessian_step"] for state in self.states] if group["bias_correction"] else []

    def parts(self, together):
        """The lists that one call takes: all, or to save memory one large tensor or a run of small ones."""
        lists, ends, elements = (self.params, self.grads, self.exp_avgs, self.hessians, self.hessian_steps), [0], 0
        for i, param in enumerate(self.params):
            elements += param.numel()
            if i and not together and elements > _TOGETHER:
                ends.append(i)
                elements = param.numel()
        return [[tensors[i:j] for tensors in lists] for i, j in pairwise([*ends, len(self.params)])]


@functools.cache
def _fused() -> Any:
    """The module sophia_fused, from beside this file."""
    try:
        return importlib.import_module(f"{__package__}.sophia_fused" if __package__ else "sophia_fused")
    except ModuleNotFoundError as error:
        remedy = "copy sophia_fused.py beside sophia.py" if "sophia_fused" in str(error.name) else "pip install triton"
        raise RuntimeError(f"`fused=True` needs {error.name}: {remedy}") from error


def _opmath_dtype(tensor):
    return torch.promote_types(tensor.dtype, torch.float32)


def _corrected(rho, beta2, hessian_steps, dtype):
    """rho / (1 - beta2^n), the bias correction of the curvature: a list with n of every tensor, or rho without n."""
    log = math.log(beta2) if beta2 else -math.inf
    return [-rho / torch.expm1(n.to(dtype).clamp(min=1) * log) for n in hessian_steps] or rho


def _step(bucket, together, *, lr, beta2, rho, maximize, multiplier, skip, **settings):
    dtype = _opmath_dtype(bucket.params[0])
    if skip is not None:
        skip = skip != 0
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
    torch._foreach_add_(bucket.steps, 1.0 if skip is None else [(~skip).float()] * len(bucket.steps))  # without a sync


def _hessian(bucket, together, *, multiplier, skip, **settings):
    dtype, skip = _opmath_dtype(bucket.hessians[0]), None if skip is None else skip != 0
    for _, grads, _, hessians, _ in bucket.parts(together):
        h, estimates = [t.to(dtype) for t in hessians], [t.to(dtype) for t in grads]
        if multiplier is not None:
            estimates = torch._foreach_mul(estimates, multiplier.to(dtype))
        _estimate(h, estimates, skip=skip, **settings)
        if h[0] is not hessians[0]:
            torch._foreach_copy_(hessians, h)
    if counts := bucket.hessian_steps:
        torch._foreach_add_(counts, 1.0 if skip is None else [(~skip).float()] * len(counts))


def _square(bucket):
    """The sum of squares of the gradients, a scalar tensor."""
    return torch.stack(torch._foreach_norm(bucket.grads, 2, dtype=_opmath_dtype(bucket.grads[0]))).square().sum()


def _sums(bucket, *, beta2, rho, eps):
    """(4,): coordinates that are not clipped, sum of |h|, of h^2, of m^2."""
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
    SimpleNamespace(step=functools.partial(_step, together=together), square=_square, sums=_sums,
                    hessian=functools.partial(_hessian, together=together))
    for together in (True, False)
)  # fmt: skip


def _check_once(params):
    if len({*params}) < len(params):
        raise ValueError("the groups have the same parameter twice; pass tied parameters once")


def _check_number(name, value, *, above=None, below=math.inf):
    """Raise ValueError unless value is in [0, below), or in (above, below) if above is given."""
    with contextlib.suppress(TypeError, RuntimeError):  # not a number, or several
        if (value >= 0.0 if above is None else value > above) and value < below:
            return
    raise ValueError(f"Invalid {name}: {value!r}, expected a number from {above or 0} to {below}")


def _state_dtype(param):
    """Of m and h: squares of float16 gradients are 0 in float16."""
    return {torch.float16: torch.float32, torch.complex32: torch.complex64}.get(param.dtype, param.dtype)


def _local_shards(tensors):
    """This rank's parts of DTensors sharded as the first one is, and the process groups over which it is split."""
    param, grad, *averages = tensors
    if hasattr(grad, "placements") and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    if any(getattr(t, "placements", None) != param.placements for t in (grad, *averages)):
        raise ValueError("gradient or state is not sharded as its parameter is; distribute or load it accordingly")
    groups = tuple(param.device_mesh.get_group(i) for i, p in enumerate(param.placements) if not p.is_replicate())
    return tuple(t.to_local() for t in (param, grad, *averages)), groups


def _scalar(value, device):
    """A float or a one-element tensor as a scalar on the device, without a sync for a tensor. None stays."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True).reshape(()) if value.device != device or value.ndim else value
    return None if value is None else torch.full((), value, dtype=torch.float32, device=device)


def _total(buckets, number):
    """The tensor number(bucket) summed over the buckets and, where they are shards, over the ranks."""
    totals = {}  # shards -> sum over the local parts
    for bucket in buckets:
        value = number(bucket).to(buckets[0].device, non_blocking=True)
        totals[bucket.shards] = totals[bucket.shards].add_(value) if bucket.shards in totals else value
    for shards, total in totals.items():
        for process_group in shards:
            torch.distributed.all_reduce(total, group=process_group)
    return functools.reduce(torch.add, totals.values()) if totals else torch.zeros(())
