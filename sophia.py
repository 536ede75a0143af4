"""Sophia: a second-order clipped optimizer for language model pre-training, in one file that stands alone.

    from sophia import SophiaG, sampled_label_loss

Algorithms are numbered as in Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
Pre-training" (arXiv:2305.14342): Algorithm 1 is Hutchinson's estimator (`hutchinson`), Algorithm 2 is
Gauss-Newton-Bartlett (`sampled_label_loss`, `sampled_target_loss`), Algorithm 3 is the optimizer (`SophiaG` with
Algorithm 2, `SophiaH` with Algorithm 1). The parametrization is the official code's: the paper's gamma is `rho` here.

The only import is torch. `fused=True` also imports Triton, at the first step.
"""

import contextlib
import functools
import math
import os
import warnings

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

    def __init__(self, key, index, group, device, dtypes, shards, alignment):
        self.key, self.index, self.group, self.device, self.shards = key, index, group, device, shards
        self.states, self.sides = [], ()  # of matrices to rotate: their states, in stacks left and right
        self.dtypes = dtypes  # of params, grads, exp_avgs, hessians
        self.params, self.grads, self.exp_avgs, self.hessians = [], [], [], []  # local, real tensors, all alike
        self.steps, self.hessian_steps = [], []  # float32 scalars on `device`; the second only with bias_correction
        self.alignment = alignment  # bytes that the fused kernels read at once, 0: not theirs, and no table
        self.table = None
        # For the fused kernels, which need addresses only and must not keep last step's gradients alive:
        self.rows = []  # 8 integers a tensor, see _PointerTable
        self.origins = []  # (parameter, its state, exp_avg, hessian, step), to see whether the rows still hold


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
        # How a step is computed is a property of this process, not of the training state: these are not saved in
        # state_dict(), so that a checkpoint of a fused run on a GPU loads into an optimizer on the CPU.
        self.foreach, self.fused, self.max_grad_norm = foreach, fused, max_grad_norm
        self._tables = {}  # bucket key -> _PointerTable
        self._stacks = {}  # (bucket key, name in the state) -> see _stack
        self._turning, self._turners = [], {}  # what _start_turning has begun; device -> its _Turner
        self._plan = None  # see _refresh
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
        for param in group["params"] if self.fused else ():
            if param.device.type not in _fused_devices() or not param.is_floating_point():
                raise RuntimeError(
                    "`fused=True` requires all the params to be floating point Tensors of supported devices: "
                    f"{_fused_devices()} but {param.dtype} and {param.device.type}"
                )
        for param in group["params"] if group.get("eigenbasis") else ():
            if "eigenbasis" not in self.defaults:
                raise ValueError("eigenbasis=True needs the gradients of SophiaG's estimate, leave it to that")
            if group["capturable"]:
                raise ValueError("eigenbasis=True cannot be captured in a CUDA graph, leave capturable=False")
            if param.is_complex():
                raise ValueError("eigenbasis=True is for real matrices, leave complex ones to another group")
        if group.get("spectral") and not group.get("eigenbasis"):
            raise ValueError("spectral=True needs the curvature's eigenvectors, set eigenbasis=True too")
        for i, beta in enumerate(group["betas"]):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        for key, name in (("rho", "rho"), ("eps", "epsilon"), ("weight_decay", "weight_decay")):
            if not group.get(key, 0.0) >= 0.0:
                raise ValueError(f"Invalid {name} value: {group[key]}")

    def __getstate__(self):
        self._finish_turning()
        own = {"foreach": self.foreach, "fused": self.fused, "max_grad_norm": self.max_grad_norm}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._tables, self._stacks, self._turning, self._turners, self._plan = {}, {}, [], {}, None
        self.__dict__.setdefault("grad_norm", None)
        for group in self.param_groups:  # an official checkpoint's groups lack our keys
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def state_dict(self):
        self._finish_turning()
        return super().state_dict()

    def load_state_dict(self, state_dict):
        """As torch's, which casts all but "step" to the parameter's dtype; factors, bases and counts keep theirs."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if key == "hessian_step" or key.startswith(("left_", "right_")):
                    self.state[param][key] = torch.as_tensor(value).to(param.device, copy=True)

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
        if _rotates(param, group):
            placed = {"dtype": _wide(param), "device": param.device}
            count, *shape = _parts(param).shape
            for side, width in zip(("left", "right"), shape, strict=True):
                factor, basis = (f"{side}_{name}" for name in _SIDE)
                if basis not in state:
                    state[factor] = torch.zeros(count, width, width, **placed)
                    state[basis] = torch.eye(width, **placed).repeat(count, 1, 1)
                state[factor], state[basis] = state[factor].to(**placed), state[basis].to(**placed)
        elif "left_basis" in state:
            raise RuntimeError("the state was made with eigenbasis=True, its hessian is of no use without")
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
        self._finish_turning()
        buckets = self._refresh() if gradients is None else None
        if buckets is None:
            buckets, idle = self._sort(gradients)
            if gradients is None and buckets and all(b.alignment and not b.shards for b in buckets):
                self._plan = self._plan_key(), buckets, idle
        for bucket in buckets:
            capturing = bucket.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            if capturing and not bucket.group["capturable"]:
                raise RuntimeError("Attempting CUDA graph capture of an optimizer with capturable=False.")
            if bucket.alignment:
                bucket.table = self._tables.setdefault(bucket.key, _PointerTable()).upload(bucket)
        return buckets

    def _sort(self, gradients):
        """The buckets, and the parameters without a gradient."""
        buckets, idle = {}, []
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                grad = param.grad if gradients is None else gradients.get(param)
                if grad is None:
                    idle.append(param)
                    continue
                if grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
                if grad.shape != param.shape:
                    raise ValueError(f"got shape {tuple(grad.shape)} for a parameter of shape {tuple(param.shape)}")
                state = self._param_state(param, group)
                tensors, shards, rotated = (param, grad, state["exp_avg"], state["hessian"]), (), _rotates(param, group)
                if hasattr(param, "device_mesh"):  # a DTensor: every rank steps its own shard
                    if rotated:
                        raise RuntimeError("eigenbasis=True needs whole matrices, and this one is sharded over ranks")
                    tensors, shards = _local_shards(*tensors)
                if param.is_complex():
                    tensors = tuple(torch.view_as_real(t) for t in tensors)
                counts = (state["step"], state["hessian_step"] if group["bias_correction"] else state["step"])
                row, alignment = _pointers(tensors, counts) if self.fused and not rotated else (None, 0)
                dtypes = tuple(t.dtype for t in tensors)
                key = (index, param.device, dtypes, shards, alignment, param.shape if rotated else None)
                bucket = buckets.get(key)
                if bucket is None:
                    bucket = buckets[key] = _Bucket(key, index, group, param.device, dtypes, shards, alignment)
                if alignment:
                    bucket.rows += row
                    bucket.origins.append((param, state, *tensors[2:], counts[0]))
                    continue
                bucket.params.append(tensors[0])
                bucket.grads.append(tensors[1])
                bucket.exp_avgs.append(tensors[2])
                bucket.hessians.append(tensors[3])
                bucket.steps.append(counts[0])
                if rotated:
                    bucket.states.append(state)
                if group["bias_correction"]:
                    bucket.hessian_steps.append(counts[1])
        for bucket in buckets.values():
            if bucket.states:
                bucket.sides = [[self._stack(bucket, f"{side}_{name}") for name in _SIDE] for side in ("left", "right")]
        return list(buckets.values()), idle

    def _stack(self, bucket, name):
        """(n, width, width): that tensor of all states of the bucket in one, of which theirs become views."""
        stack, own = self._stacks.get((bucket.key, name)), [state[name] for state in bucket.states]
        count = len(own[0])
        if stack is None or [view.data_ptr() for view in stack.split(count)] != [tensor.data_ptr() for tensor in own]:
            stack = self._stacks[bucket.key, name] = torch.cat(own)
            for state, view in zip(bucket.states, stack.split(count), strict=True):
                state[name] = view
        return stack

    def _plan_key(self):
        groups = [(id(g), len(g["params"]), g["bias_correction"], g.get("eigenbasis")) for g in self.param_groups]
        return id(self.state), groups

    def _refresh(self):
        """The buckets of the last call, with new addresses: what keeps the host ahead of the GPU with many tensors.

        None where anything but addresses has changed since, or there is something that the fused kernels cannot take.
        """
        if self._plan is None or self._plan[0] != self._plan_key():
            return None
        _, buckets, idle = self._plan
        for param in idle:
            if param.grad is not None:
                return None
        for bucket in buckets:
            dtype, mask = bucket.dtypes[1], bucket.alignment - 1
            rows, at = bucket.rows.copy(), 0
            for param, state, exp_avg, hessian, step in bucket.origins:
                grad = param.grad
                if (
                    grad is None
                    or grad.dtype is not dtype
                    or grad.is_sparse
                    or not grad.is_contiguous()
                    or state.get("exp_avg") is not exp_avg
                    or state.get("hessian") is not hessian
                    or state.get("step") is not step
                    or param.data_ptr() != rows[at]
                ):
                    return None
                rows[at + 1] = address = grad.data_ptr()
                if address & mask:
                    return None
                at += 8
            bucket.rows = rows
        return buckets

    def _implementation(self, bucket, fused, foreach, single_tensor):
        """torch's rule: as asked, else foreach on accelerators and one tensor after the other on the CPU."""
        if bucket.table is not None:
            return fused
        by_default = bucket.device.type in ("cuda", "xpu")
        if bucket.sides:  # matrices of one shape are rotated together
            return foreach
        return foreach if self.fused or self.foreach or (self.foreach is None and by_default) else single_tensor

    def _amp(self, device):
        """(grad_scale, skip) on the device: a float scalar or None, a boolean scalar or None."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if grad_scale is not None:
            grad_scale = grad_scale.to(device, non_blocking=True)
        return grad_scale, None if found_inf is None else found_inf.to(device, non_blocking=True) != 0

    def _clip(self, buckets):
        """Set `grad_norm` and return the factor of clip_grad_norm_, min(1, max_grad_norm / (grad_norm + 1e-6))."""
        grad_scale = self._amp(buckets[0].device)[0] if buckets else None
        if buckets and all(b.table and not b.shards and b.device == buckets[0].device for b in buckets):
            self.grad_norm, factor = _fused_clip(buckets, self.max_grad_norm, grad_scale)
            return factor
        squares = {}  # shards -> sum of squares over the local parts
        for bucket in buckets:
            square = self._implementation(bucket, _fused_square, _foreach_square, _foreach_square)(bucket)
            squares[bucket.shards] = squares.get(bucket.shards, 0.0) + _to(square, buckets[0].device)
        reduced = [_reduce(square, shards) for shards, square in squares.items()]
        total = _sum(reduced or [torch.zeros((), dtype=torch.float32)])
        self.grad_norm = total.sqrt() if grad_scale is None else total.sqrt() / grad_scale
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
            self._implementation(bucket, _fused_step, _foreach_step, _single_tensor_step)(
                bucket,
                lr=lr,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                rho=group["rho"] * rho_scale,
                eps=group.get("eps"),
                weight_decay=group["weight_decay"],
                maximize=group["maximize"],
                nesterov=group["nesterov"],
                factor=factor,
                skip=skip,
            )

    def _update_hessian(self, buckets, scale, squared):
        estimates = []
        for bucket in buckets:
            beta2 = bucket.group["betas"][1]
            grad_scale, skip = self._amp(bucket.device)
            factor = None if grad_scale is None else 1.0 / grad_scale
            if bucket.sides:
                estimates.append(self._take_estimate(bucket, factor, skip, beta2=beta2, scale=scale, squared=squared))
                continue
            update = self._implementation(bucket, _fused_hessian, _foreach_hessian, _single_tensor_hessian)
            update(bucket, beta2=beta2, scale=scale, factor=factor, squared=squared, skip=skip)
        self._start_turning(estimates)

    def _take_estimate(self, bucket, factor, skip, **settings):
        """Take the gradients into the factors, E[G G^T] and E[G^T G], whose bases are to be turned then."""
        parts = _all_parts(bucket.grads)  # a copy: DistributedDataParallel's are overwritten
        if factor is not None:
            parts = parts.to(bucket.sides[0][1].dtype) * factor
        bucket.grads = []
        decay = min(settings["beta2"], _FACTOR_DECAY)
        for side, (factors, _) in enumerate(bucket.sides):
            for mean, g in zip(_pieces(factors), parts.split(len(_pieces(factors)[0])), strict=True):
                g = g.to(_exact(bucket.device))
                product = (g.mT @ g if side else g @ g.mT).to(mean.dtype)
                mean.lerp_(product if skip is None else torch.where(skip, mean, product), 1 - decay)
        return bucket, parts, skip, settings

    def _start_turning(self, estimates):
        """Start to turn the bases of these estimates, which a GPU does beside the step's forward and backward pass."""
        for device in dict.fromkeys(bucket.device for bucket, *_ in estimates):
            own = [estimate for estimate in estimates if estimate[0].device == device]
            sides = [side for bucket, *_ in own for side in bucket.sides]
            if device not in self._turners:
                self._turners[device] = _Turner(device)
            self._turning.append((own, *self._turners[device].start(sides)))

    @torch.no_grad()
    def _finish_turning(self):
        """The bases that were started, and the curvature in them."""
        for estimates, turned, done in self._turning:
            if done is not None:
                torch.cuda.current_stream(estimates[0][0].device).wait_event(done)
            turned = iter(turned)
            for bucket, parts, skip, settings in estimates:
                for old in (basis for _, bases in bucket.sides for basis in bases):
                    new = next(turned)
                    old.copy_(new if skip is None else torch.where(skip, old, new))
                bucket.grads = _rotate(parts, bucket.sides, bucket.hessians)
                _foreach_hessian(bucket, factor=None, skip=skip, **settings)
        self._turning = []

    @torch.no_grad()
    def _statistics(self, rho_scale):
        momenta, counts, totals = {}, [0] * len(self.param_groups), {}
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                if "hessian" in self.state.get(param, ()):
                    momenta[param] = self.state[param]["exp_avg"]
                    counts[index] += param.numel() * (2 if param.is_complex() else 1)
        for bucket in self._gather(momenta):
            group = bucket.group
            if bucket.sides:
                bucket.exp_avgs = _rotate(_all_parts(bucket.exp_avgs), bucket.sides, bucket.exp_avgs)
            sums = self._implementation(bucket, _fused_sums, _single_tensor_sums, _single_tensor_sums)(
                bucket, beta2=group["betas"][1], rho=group["rho"] * rho_scale, eps=group.get("eps")
            )
            if bucket.shards not in totals:
                totals[bucket.shards] = sums.new_zeros(len(counts), 4)
            totals[bucket.shards][bucket.index] += _to(sums, totals[bucket.shards].device)
        reduced = [_reduce(total, shards) for shards, total in totals.items()]
        rows = _sum(reduced).tolist() if reduced else [[0.0] * 4] * len(counts)
        wins, h1, h2, m2 = (sum(column) for column in zip(*rows, strict=True))
        result = {"win_rate": wins / max(1, sum(counts))}
        for index, (count, row) in enumerate(zip(counts, rows, strict=True)):
            result[f"win_rate/{self.param_groups[index].get('name', index)}"] = row[0] / max(1, count)
        return {**result, "hessian_norm": h1, "hessian_norm2": h2**0.5, "momentum_norm": m2**0.5}


class SophiaG(_Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimator (Algorithm 3 with Algorithm 2 of arXiv:2305.14342).

    With m the gradient's moving average and h that of the squared sampled-label gradient, a step is

        m <- beta1 m + (1 - beta1) grad
        p <- p - lr weight_decay p
        p <- p - lr sign(m) min(|m| / (rho bs h + 1e-15), 1)

    so a coordinate moves by at most lr, and by less where the curvature bs h is large. Every k-th step (10 in the
    paper), before the step, h is renewed from a backward pass of `sampled_label_loss`:

        optimizer = SophiaG(model.parameters(), lr=3e-4, rho=0.05)
        for step, (x, y) in enumerate(batches):
            if step % 10 == 0:
                sampled_label_loss(model(x)).backward()
                optimizer.update_hessian()
                optimizer.zero_grad()
            F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
            optimizer.step(bs=y.numel())
            optimizer.zero_grad()

    In a Hugging Face Trainer (in bf16 or float32), which calls step() with no arguments, rho carries the batch size
    of a step, bs. An estimate is taken every k steps on the first micro-batch, of `tokens` over all processes:

        class SophiaTrainer(transformers.Trainer):
            def training_step(self, model, inputs, num_items_in_batch=None):
                first_micro_batch = all(p.grad is None for p in model.parameters())
                if self.state.global_step % k == 0 and first_micro_batch:
                    inputs = self._prepare_inputs(inputs)
                    sampled_label_loss(model(**inputs).logits).backward()
                    optimizer.update_hessian(scale=tokens / bs)
                    optimizer.zero_grad()
                return super().training_step(model, inputs, num_items_in_batch)

        optimizer = SophiaG(model.parameters(), lr=3e-4, rho=0.05 * bs / 5120)
        SophiaTrainer(model, args, train_dataset=dataset, optimizers=(optimizer, None)).train()

    Args:
        params: tensors, or dicts of them with their own settings. A group's "name" names it in statistics().
        lr: float, or a one-element tensor (on the device with capturable=True, to change it between graph replays).
        betas: decay of m and, an estimate at a time, of h.
        rho: the paper's gamma. More of it clips less; statistics()["win_rate"] is best kept between 0.1 and 0.5.
        weight_decay: decoupled, times lr.
        maximize: ascend instead.
        capturable: allow step() and update_hessian() in a CUDA graph, after one eager call of each.
        bias_correction: divide h by 1 - beta2^n after n estimates, since it starts from 0.
        nesterov: p moves by beta1 m + (1 - beta1) grad, m renewed, in the place of m, as in NAdam (Dozat, 2016).
        eigenbasis: matrices (2-D parameters) take the step in the eigenbasis of their curvature. From the estimates'
            gradients G it keeps the Kronecker factors E[G G^T] and E[G^T G] and turns two bases towards their
            eigenvectors; h is of the rotated gradients, m is rotated, divided and clipped, and the update rotated back
            (for h as in EKFAC, arXiv:1806.03884, for the bases as in SOAP, arXiv:2409.11321). The factors' averages
            decay by beta2 as h does, or by 0.95 where that is less. For the group of the hidden matrices: two squares
            more are kept for either side, on a GPU three, which embeddings make too large. A matrix of three squares,
            query, key and value in GPT-2, is taken as three. update_hessian() only begins it: bases and h are new in
            the next step(), statistics() or state_dict().
        spectral: these matrices take, in place of the divided and clipped m, the steepest step under the spectral norm
            of coordinates that the curvature has whitened, D_l^-1/8 O(D_l^-1/8 M D_r^-1/8) D_r^-1/8 with M the rotated
            m, D_l and D_r the eigenvalues of its sides (the means of h over columns and rows) and O(X) the nearest
            orthogonal matrix to X, as in Mousse (arXiv:2603.09697), with sampled labels' gradients for its own. Where
            no curvature is known, that is Muon's step (of query, key and value one by one). It is as long as Muon's
            scaled to AdamW (arXiv:2502.16982), about 0.2 lr a coordinate, so lr is Muon's too; other parameters, which
            move by up to lr, want a group and an lr of their own. rho is without effect, and win_rate says nothing.
        foreach, fused: as in torch.optim. None, None: foreach on accelerators, one tensor at a time on the CPU.
            fused=True (CUDA, needs Triton) is one launch for all tensors alike, and the fastest; tensors that it
            cannot take (float64, strides that differ or overlap) go through foreach.
        max_grad_norm: clip the global gradient norm to this within step(), as torch.nn.utils.clip_grad_norm_ before
            it would. Gradients stay as they are, and the norm is in `grad_norm`, a scalar tensor on the device. The
            sampled-label gradient is never clipped.

    State of a parameter: "step" (float32 scalar), "exp_avg" (m), "hessian" (h), both in the parameter's shape and
    dtype; with bias_correction "hessian_step" (n); with eigenbasis "left_factor", "left_basis" (1, rows, rows) and
    "right_factor", "right_basis" (1, columns, columns), or 3 of them. The official implementation's state_dict loads.
    Sharded parameters (DTensor, as fully_shard makes them) take the same step as whole ones.
    GradScaler: step() and update_hessian() honour the attributes `grad_scale` and `found_inf` without a host sync.

    Raises:
        ValueError: for a setting out of its range, naming it, and for eigenbasis with capturable or complex
            matrices.
        RuntimeError: for fused and foreach together, fused on parameters that are not CUDA floats, sparse gradients,
            eigenbasis on sharded matrices, or a state of it without the setting.
    """

    def __init__(self, params, lr=1e-4, betas=(0.965, 0.99), rho=0.04, weight_decay=1e-1, *, maximize=False,
                 capturable=False, bias_correction=False, nesterov=False, eigenbasis=False, spectral=False,
                 foreach=None, fused=None, max_grad_norm=None):  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay, "maximize": maximize,
                    "capturable": capturable, "bias_correction": bias_correction, "nesterov": nesterov,
                    "eigenbasis": eigenbasis, "spectral": spectral}  # fmt: skip
        super().__init__(params, defaults, foreach, fused, max_grad_norm)

    def step(self, closure=None, bs=5120):
        """Update the parameters from their gradients.

        Args:
            closure: called first, with gradients enabled, to evaluate the model again; its value is returned.
            bs: labels (for a language model, tokens) that the estimates in h count for: the step's global batch.
        """
        loss = _call(closure)
        self._step(self._checked(bs))
        return loss

    @torch.no_grad()
    def update_hessian(self, scale=1.0):
        """h <- beta2 h + (1 - beta2) scale grad^2, from the gradients of `sampled_label_loss` (Algorithm 2).

        Args:
            scale: labels of this estimate / bs of the steps, so that rho means the same at every estimation batch.
        """
        self._update_hessian(self._gather(), float(scale), squared=True)

    def statistics(self, bs=5120):
        """How the optimizer is doing, as floats, in one pass and with one sync.

        Returns:
            win_rate: share of coordinates whose update is not clipped, |m| < rho bs h; win_rate/NAME of every group
                (with nesterov the same, of m and not of what the step took for it);
            hessian_norm: 1-norm of h; hessian_norm2 and momentum_norm: 2-norms of h and m.
        """
        return self._statistics(self._checked(bs))

    @staticmethod
    def _checked(bs):
        if not bs > 0:
            raise ValueError(f"Invalid bs: {bs}, expected the number of labels (tokens) in a step's batch")
        return float(bs)


class SophiaH(_Sophia):
    """Sophia with Hutchinson's estimator (Algorithm 3 with Algorithm 1 of arXiv:2305.14342).

        p <- p - lr clamp(m / max(rho h, eps), -1, 1)

    with h the moving average of `hutchinson`'s estimates, which may be negative: such coordinates move by
    lr sign(m). m, weight decay and all arguments are as in SophiaG; eps bounds the denominator.

        optimizer = SophiaH(model.parameters(), lr=3e-4)
        for step, (x, y) in enumerate(batches):
            if step % 10 == 0:
                optimizer.update_hessian(hutchinson(lambda: loss_fn(model(x), y), model.parameters()))
            loss_fn(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    """

    def __init__(self, params, lr=1e-4, betas=(0.965, 0.99), rho=0.01, eps=1e-12, weight_decay=1e-1, *, maximize=False,
                 capturable=False, bias_correction=False, nesterov=False, foreach=None, fused=None,
                 max_grad_norm=None):  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "rho": rho, "eps": eps, "weight_decay": weight_decay,
                    "maximize": maximize, "capturable": capturable, "bias_correction": bias_correction,
                    "nesterov": nesterov}  # fmt: skip
        super().__init__(params, defaults, foreach, fused, max_grad_norm)

    def step(self, closure=None):
        """Update the parameters from their gradients. closure: as in SophiaG.step."""
        loss = _call(closure)
        self._step(1.0)
        return loss

    @torch.no_grad()
    def update_hessian(self, estimates):
        """h <- beta2 h + (1 - beta2) estimate.

        Args:
            estimates: a tensor or None for each parameter, in the optimizer's order: what `hutchinson` returns.

        Raises:
            ValueError: when their number or a shape does not fit the parameters.
        """
        estimates = list(estimates)
        params = [p for group in self.param_groups for p in group["params"]]
        if len(estimates) != len(params):
            raise ValueError(f"update_hessian got {len(estimates)} estimates for {len(params)} parameters")
        self._update_hessian(self._gather(dict(zip(params, estimates, strict=True))), 1.0, squared=False)

    def statistics(self):
        """As SophiaG.statistics; a coordinate is not clipped where |m| < max(rho h, eps)."""
        return self._statistics(1.0)


# --------------------------------------------------------------------------------------------------------------------
# Each operation tensor by tensor (the reference) and for lists of tensors. Arithmetic is in float32 or better.
# factor: scalar tensor on the gradients, or None. skip: boolean scalar tensor, or None; where True nothing changes,
# whatever the gradients hold, because the averages are pulled towards themselves and lr is 0.
# --------------------------------------------------------------------------------------------------------------------


def _wide(tensor):
    return torch.promote_types(tensor.dtype, torch.float32)


def _corrected(rho, beta2, hessian_steps, dtype):
    """rho over the bias correction of the curvature, 1 - beta2^n: per tensor where n is kept, else rho itself."""
    return [-rho / torch.expm1(n.to(dtype).clamp(min=1) * _log(beta2)) for n in hessian_steps] or rho


def _log(beta2):
    return math.log(beta2) if beta2 else -math.inf


def _count(steps, skip):
    torch._foreach_add_(steps, 1.0 if skip is None else [(~skip).float()] * len(steps))  # a tensor alone would sync


def _single_tensor_step(bucket, *, lr, beta1, beta2, rho, eps, weight_decay, maximize, nesterov, factor, skip):
    dtype = _wide(bucket.params[0])
    rhos = _corrected(rho, beta2, bucket.hessian_steps, dtype)
    if skip is not None:
        lr = lr * (~skip).to(dtype)
    tensors = zip(bucket.params, bucket.grads, bucket.exp_avgs, bucket.hessians, strict=True)
    for i, (param, grad, exp_avg, hessian) in enumerate(tensors):
        p, g, m, h = param.to(dtype), grad.to(dtype), exp_avg.to(dtype), hessian.to(dtype)
        if factor is not None:
            g = g * factor.to(dtype)
        if maximize:
            g = -g
        if skip is not None:
            g = torch.where(skip, m, g)
        m.lerp_(g, 1 - beta1)
        moved = torch.lerp(m, g, 1 - beta1) if nesterov else m
        scratch = None if g is grad else g
        denominator = torch.mul(h, rhos[i] if isinstance(rhos, list) else rhos, out=scratch)
        denominator = denominator.add_(_EPS) if eps is None else denominator.clamp_(min=eps)
        update = torch.div(moved, denominator, out=denominator).clamp_(-1, 1)
        p.mul_(1 - lr * weight_decay)
        if isinstance(lr, Tensor):
            p.sub_(update.mul_(lr))
        else:
            p.sub_(update, alpha=lr)
        if p is not param:
            param.copy_(p)
        if m is not exp_avg:
            exp_avg.copy_(m)
    _count(bucket.steps, skip)


def _foreach_step(bucket, *, lr, beta1, beta2, rho, eps, weight_decay, maximize, nesterov, factor, skip):
    dtype = _wide(bucket.params[0])
    lists = (bucket.params, bucket.grads, bucket.exp_avgs, bucket.hessians)
    p, g, m, h = ([t.to(dtype) for t in tensors] for tensors in lists)
    if factor is not None:
        g = torch._foreach_mul(g, factor.to(dtype))
    if maximize:
        g = torch._foreach_neg(g)
    if skip is not None:
        g = [torch.where(skip, a, b) for a, b in zip(m, g, strict=True)]
        lr = lr * (~skip).to(dtype)
    torch._foreach_lerp_(m, g, 1 - beta1)
    moved = torch._foreach_lerp(m, g, 1 - beta1) if nesterov else m
    if bucket.sides:
        moved = _rotate(_all_parts(moved), bucket.sides, moved)
    if bucket.sides and bucket.group["spectral"]:
        update = _matrices(_spectral(_all_parts(moved), _all_parts(h)), moved)
    else:
        denominator = torch._foreach_mul(h, _corrected(rho, beta2, bucket.hessian_steps, dtype))
        if eps is None:
            torch._foreach_add_(denominator, _EPS)
        else:
            torch._foreach_clamp_min_(denominator, eps)
        update = torch._foreach_div(moved, denominator)
        torch._foreach_clamp_min_(update, -1)
        torch._foreach_clamp_max_(update, 1)
    if bucket.sides:
        update = _rotate_back(update, bucket.sides)
    if isinstance(lr, Tensor):
        lr = lr.to(dtype)
        torch._foreach_mul_(update, lr)
        torch._foreach_mul_(p, 1 - lr * weight_decay)
        torch._foreach_sub_(p, update)
    else:
        torch._foreach_mul_(p, 1 - lr * weight_decay)
        torch._foreach_sub_(p, update, alpha=lr)
    if p[0] is not bucket.params[0]:
        torch._foreach_copy_(bucket.params, p)
    if m[0] is not bucket.exp_avgs[0]:
        torch._foreach_copy_(bucket.exp_avgs, m)
    _count(bucket.steps, skip)


def _single_tensor_hessian(bucket, *, beta2, scale, factor, squared, skip):
    for hessian, estimate in zip(bucket.hessians, bucket.grads, strict=True):
        dtype = _wide(hessian)
        h, estimate = hessian.to(dtype), estimate.to(dtype)
        if factor is not None:
            estimate = estimate * factor.to(dtype)
        if skip is not None:
            h.lerp_(torch.where(skip, h, estimate * estimate * scale if squared else estimate), 1 - beta2)
        elif squared:
            h.mul_(beta2).addcmul_(estimate, estimate, value=(1 - beta2) * scale)
        else:
            h.lerp_(estimate, 1 - beta2)
        if h is not hessian:
            hessian.copy_(h)
    if bucket.hessian_steps:
        _count(bucket.hessian_steps, skip)


def _foreach_hessian(bucket, *, beta2, scale, factor, squared, skip):
    dtype = _wide(bucket.hessians[0])
    h, estimates = [t.to(dtype) for t in bucket.hessians], [t.to(dtype) for t in bucket.grads]
    if factor is not None:
        estimates = torch._foreach_mul(estimates, factor.to(dtype))
    if skip is not None:
        estimates = [torch.where(skip, a, b * b * scale if squared else b) for a, b in zip(h, estimates, strict=True)]
    if squared and skip is None:
        torch._foreach_mul_(h, beta2)
        torch._foreach_addcmul_(h, estimates, estimates, value=(1 - beta2) * scale)
    else:
        torch._foreach_lerp_(h, estimates, 1 - beta2)
    if h[0] is not bucket.hessians[0]:
        torch._foreach_copy_(bucket.hessians, h)
    if bucket.hessian_steps:
        _count(bucket.hessian_steps, skip)


def _foreach_square(bucket):
    """The gradients' sum of squares, a scalar tensor."""
    return torch.stack(torch._foreach_norm(bucket.grads, 2, dtype=_wide(bucket.grads[0]))).square().sum()


def _single_tensor_sums(bucket, *, beta2, rho, eps):
    """(4,): coordinates that are not clipped, sum of |h|, of h^2, of m^2."""
    dtype = _wide(bucket.hessians[0])
    rhos, sums = _corrected(rho, beta2, bucket.hessian_steps, dtype), 0.0
    for i, (m, h) in enumerate(zip(bucket.exp_avgs, bucket.hessians, strict=True)):
        bound = h.to(dtype) * (rhos[i] if isinstance(rhos, list) else rhos)
        wins = (m.abs() < (bound if eps is None else bound.clamp_(min=eps))).sum(dtype=dtype)
        h1, h2, m2 = (torch.linalg.vector_norm(t, n, dtype=dtype) for t, n in ((h, 1), (h, 2), (m, 2)))
        sums = sums + torch.stack([wins, h1, h2.square(), m2.square()])
    return sums


# --------------------------------------------------------------------------------------------------------------------
# The eigenbasis of the curvature (eigenbasis=True). A matrix is n parts of (rows, columns); on the left it has factors
# and bases (n, rows, rows), on the right (n, columns, columns). `sides` are those of matrices of one shape, together:
# [[factors, bases], [factors, bases]], left and right.
# --------------------------------------------------------------------------------------------------------------------

_SIDE = "factor", "basis"
_FACTOR_DECAY = 0.95  # an estimate at a time, at most: the factors forget no slower, and no slower than h
_TINY = 1e-30  # kept off 0 in float32 and wider
_SQUARES_ELEMENTS = 2**25  # worked on at a time, in float64: 256 MiB, and a few times that in between


def _rotates(param, group):
    return bool(group.get("eigenbasis") and param.ndim == 2 and param.numel())


def _parts(matrix):
    """(rows, columns) -> (n, rows / n, columns): three parts where they are square, as GPT-2's query, key and value."""
    rows, columns = matrix.shape
    return matrix.unflatten(0, (3 if rows == 3 * columns else 1, -1))


def _all_parts(matrices):
    return torch.cat([_parts(m) for m in matrices])


def _matrices(parts, like):
    return [part.reshape(m.shape) for part, m in zip(parts.split(len(parts) // len(like)), like, strict=True)]


def _rotate(parts, sides, like):
    """Left^T X Right, in which the eigenvectors are the axes; matrices as those of `like`."""
    left, right = (bases for _, bases in sides)
    with torch.autocast(left.device.type, enabled=False):
        return _matrices(left.mT @ parts.to(left.dtype) @ right, like)


def _rotate_back(matrices, sides):
    left, right = (bases for _, bases in sides)
    with torch.autocast(left.device.type, enabled=False):
        return _matrices(left @ _all_parts(matrices) @ right.mT, matrices)


def _spectral(parts, curvature):
    """The step of spectral=True: of rotated matrices (n, rows, columns) and their h."""
    with torch.autocast(parts.device.type, enabled=False):
        left, right = curvature.mean(-1, keepdim=True), curvature.mean(-2, keepdim=True)
        left, right = left / (left.mean(-2, keepdim=True) + _TINY), right / (right.mean(-1, keepdim=True) + _TINY)
        whitening = (left * right).clamp(min=1e-8) ** -0.125  # 0 before the first estimate
        orthogonal = _orthogonalize(whitening * parts)
        step = whitening * orthogonal
        length, own = (torch.linalg.vector_norm(t, dim=(-2, -1), keepdim=True) for t in (orthogonal, step))
        return step * (0.2 * max(parts.shape[-2:]) ** 0.5 * length / (own + _TINY))


def _orthogonalize(matrices):
    """About the nearest orthogonal matrices: U f(S) V^T of U S V^T, f in 0.68 to 1.21 for S over 0.0015 of its norm.

    Five steps of the quintic Newton-Schulz iteration of Muon (K. Jordan, 2024), on GPUs in bfloat16, as there. Matrices
    below 1e-15 come out smaller, down to 0, as a coordinate's step does.
    """
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + _EPS)
    x = x.bfloat16() if x.device.type == "cuda" else x
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    x = x.to(matrices.dtype)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


def _pieces(squares):
    """(n, width, width) in parts that are small enough to be worked on in float64."""
    return squares.split(max(1, _SQUARES_ELEMENTS // squares[0].numel()))


class _Turner:
    """Turns all bases of one device: one step of orthogonal iteration, of which many make the eigenvectors.

    Squares of one width are turned together. A GPU does it on a stream of its own, ahead of what waits beside it, and
    in a CUDA graph, recorded at the second turn of the same stacks: a turn is many small kernels, slow to start one by
    one.
    """

    def __init__(self, device):
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.stacks, self.graph, self.turned = None, None, None  # graph: of the turn of these stacks
        self.records = True

    def start(self, sides):
        """(every new basis, of the pairs of stacks `sides`; the event after which they are there, or None)."""
        if self.stream is None:
            return self.turn(sides), None
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        stacks = [(stack.data_ptr(), stack.shape) for side in sides for stack in side]
        with torch.cuda.stream(self.stream):
            if stacks == self.stacks and self.graph is None and self.records:
                self.record(sides)
            if stacks == self.stacks and self.graph is not None:
                self.graph.replay()
                return self.turned, self.stream.record_event()
            self.stacks, self.graph, turned = stacks, None, self.turn(sides)
            for basis in turned:
                basis.record_stream(current)
            return turned, self.stream.record_event()

    def record(self, sides):
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self.stream.device, priority=-1)  # a new one: its workspaces belong to the graph
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                turned = self.turn(sides)
        except RuntimeError as error:
            warnings.warn(f"the bases turn without a CUDA graph, more slowly: {error}", stacklevel=2)
            self.records = False
        else:
            self.graph, self.turned = graph, turned

    def turn(self, sides):
        squares, alike, turned = [pair for side in sides for pair in zip(*side, strict=True)], {}, {}
        for i, (factor, _) in enumerate(squares):
            alike.setdefault((factor.shape, factor.dtype), []).append(i)
        for (shape, _), own in alike.items():
            count = max(1, _SQUARES_ELEMENTS // shape.numel())
            for some in (own[i : i + count] for i in range(0, len(own), count)):
                factors, bases = (torch.stack(each) for each in zip(*(squares[i] for i in some), strict=True))
                turned |= zip(some, _turn(factors, bases), strict=True)
        return [turned[i] for i in range(len(squares))]


def _turn(factors, bases):
    """An orthonormal basis of the columns of `factors @ bases`, first to last: what a QR decomposition gives.

    By a Cholesky decomposition in float64, which on a GPU is faster for a batch of matrices. It squares the condition,
    so the columns are made of one length, and a thousandth of their mean eigenvalue times the identity is added to the
    factors: that moves no eigenvector, and turns those of smaller eigenvalues hardly. Orthonormal to 3e-5 in width
    512, but for the first turns of factors of rank 1 (to 6e-3). A basis that cannot be had, of factors 0, stays as it
    is.
    """
    if factors.device.type == "mps":  # has no float64
        return _turn(factors.cpu(), bases.cpu()).to(factors.device)
    exact, q = factors.double(), bases.double()
    q = exact @ q + 1e-3 * exact.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * q
    q = q / torch.linalg.vector_norm(q, dim=-2, keepdim=True)
    lower, failed = torch.linalg.cholesky_ex(q.mT @ q)
    q = torch.linalg.solve_triangular(lower.mT, q, upper=True, left=False)
    ok = (failed == 0) & torch.isfinite(q).all(-1).all(-1)
    return torch.where(ok[:, None, None], q.to(bases.dtype), bases)


def _exact(device):
    return torch.float32 if device.type == "mps" else torch.float64  # mps has no float64


def _call(closure):
    with torch.enable_grad():
        return None if closure is None else closure()


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
# The same, fused: one Triton launch for all tensors of a bucket, that reads and writes each number once
# --------------------------------------------------------------------------------------------------------------------

# (elements a program works on at a time, how many times, warps), measured with `bench.py optimizer --tune`
_LAUNCH = {"step": (1024, 1, 4), "hessian": (2048, 1, 4), "square": (1024, 8, 4), "sums": (4096, 2, 8)}
_CAPTURES = 16  # CUDA graphs that can be captured after one eager call


def _fused_devices():
    return ["cuda", "cpu"] if os.environ.get("TRITON_INTERPRET") == "1" else ["cuda"]  # the interpreter: for tests


def _pointers(tensors, counts):
    """A tensor's row in the _PointerTable, and its alignment: 16 or 1, or 0 where the kernels cannot take it."""
    param = tensors[0]
    if not all(t.is_contiguous() for t in tensors):
        strides = torch.empty_like(param, device="meta").stride()  # param's own, when it is dense
        if any(t.stride() != strides for t in tensors):
            return None, 0
    if any(t.dtype not in (torch.float32, torch.bfloat16, torch.float16) for t in tensors):
        return None, 0
    p, g, m, h = [t.data_ptr() for t in tensors]
    numel = param.numel()
    aligned = not (p | g | m | h) % 16 and not numel % 8
    return (p, g, m, h, counts[0].data_ptr(), counts[1].data_ptr(), numel, 0), 16 if aligned else 1


class _PointerTable:
    """Where a bucket's tensors are, on its device.

    rows: int64 (tensors, 8): addresses of parameter, gradient, exp_avg, hessian, step, hessian_step; elements; unused.
    chunks: for each kernel, int32 (programs, 2): the tensor a program works on, and which part of it.
    Gradients move from step to step. New addresses travel in pinned memory without a sync; torch's allocator does
    not hand that memory out again before the copy is done.
    """

    def __init__(self):
        self.host_rows = self.stream = self.numels = self.rows = self.spares = None
        self.chunks, self.captured = {}, []

    def upload(self, bucket):
        cuda = bucket.device.type == "cuda"
        if cuda and torch.cuda.is_current_stream_capturing():
            return self._capture(bucket)
        stream = torch.cuda.current_stream(bucket.device).cuda_stream if cuda else None
        if bucket.rows == self.host_rows and stream == self.stream:
            return self
        staging = torch.tensor(bucket.rows, dtype=torch.int64, pin_memory=cuda)
        if self.rows is None or self.rows.numel() != staging.numel() or stream != self.stream:
            self.rows = torch.empty(staging.shape, dtype=torch.int64, device=bucket.device)
        self.rows.copy_(staging, non_blocking=True)
        self.host_rows, self.stream = bucket.rows, stream
        if self.numels != bucket.rows[6::8]:
            self.numels = bucket.rows[6::8]
            self.chunks = {_LAUNCH[name]: self._chunks(*_LAUNCH[name][:2], bucket.device) for name in _LAUNCH}
        if cuda and bucket.group["capturable"] and (not self.spares or self.spares[0].shape != staging.shape):
            self.spares = list(torch.empty(_CAPTURES, staging.numel(), dtype=torch.int64, pin_memory=True))
        return self

    def _capture(self, bucket):
        """A table of its own for a CUDA graph: the graph copies its addresses anew at every replay."""
        if self.numels != bucket.rows[6::8] or not self.spares:
            raise RuntimeError("call step() and update_hessian() once outside of the CUDA graph before capturing them")
        staging = self.spares.pop()
        staging.copy_(torch.tensor(bucket.rows, dtype=torch.int64))
        table = _PointerTable()
        table.rows, table.chunks = torch.empty(staging.shape, dtype=torch.int64, device=bucket.device), self.chunks
        table.rows.copy_(staging, non_blocking=True)
        self.captured.append((staging, table))  # the graph needs both for as long as it lives
        return table

    def _chunks(self, block, iterations, device):
        parts = torch.tensor([max(1, -(-n // (block * iterations))) for n in self.numels])
        tensor = torch.arange(len(parts)).repeat_interleave(parts)
        part = torch.arange(len(tensor)) - (parts.cumsum(0) - parts)[tensor]
        return torch.stack([tensor, part], dim=1).to(device, torch.int32)

    def launch(self, name, bucket, *args, outputs=0, **constants):
        """Run the kernel; with outputs, float32 (outputs, programs): what each program has put out."""
        kernel = _kernels()[name]
        block, iterations, warps = _LAUNCH[name]
        chunks = self.chunks[_LAUNCH[name]]
        partials = [torch.empty(outputs, len(chunks), dtype=torch.float32, device=bucket.device)] if outputs else []
        types = [getattr(tl, str(dtype).removeprefix("torch.")) for dtype in bucket.dtypes]
        with _on(bucket.device):
            kernel[(len(chunks),)](
                self.rows, chunks, *partials, *args, **constants,
                P=types[0], G=types[1], M=types[2], H=types[3],
                ALIGNMENT=bucket.alignment, VECTOR=8 if bucket.alignment > 1 else 1,
                BLOCK=block, ITERATIONS=iterations, num_warps=warps,
            )  # fmt: skip
        return partials[0] if outputs else None


def _on(device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _fused_step(bucket, *, lr, beta1, beta2, rho, eps, weight_decay, maximize, nesterov, factor, skip):
    correct = bucket.group["bias_correction"]
    bucket.table.launch(
        "step", bucket, factor, skip, lr if isinstance(lr, Tensor) else float(lr), float(1 - beta1),
        float(weight_decay), float(rho), float(_EPS if eps is None else eps), _log(beta2) / math.log(2),
        TENSOR_LR=isinstance(lr, Tensor), FLOOR=eps is not None, MAXIMIZE=bool(maximize), CORRECT=bool(correct),
        NESTEROV=bool(nesterov),
    )  # fmt: skip


def _fused_hessian(bucket, *, beta2, scale, factor, squared, skip):
    correct = bucket.group["bias_correction"]
    args = (factor, skip, float(1 - beta2), float(scale))
    bucket.table.launch("hessian", bucket, *args, SQUARED=squared, CORRECT=correct)


def _fused_square(bucket):
    return bucket.table.launch("square", bucket, outputs=1).sum()


def _fused_clip(buckets, max_grad_norm, grad_scale):
    """(global norm, factor that clips it) in one launch after those that square: small kernels cost as much as it."""
    squares = [bucket.table.launch("square", bucket, outputs=1)[0] for bucket in buckets]
    squares = squares[0] if len(squares) == 1 else torch.cat(squares)
    norm, factor = squares.new_empty(()), squares.new_empty(())
    with _on(squares.device):
        _kernels()["clip"][(1,)](
            squares, squares.numel(), grad_scale, norm, factor, float(max_grad_norm), BLOCK=8192, num_warps=16
        )
    return norm, factor


def _fused_sums(bucket, *, beta2, rho, eps):
    args = (float(rho), float(eps or 0.0), _log(beta2) / math.log(2))
    partials = bucket.table.launch("sums", bucket, *args, outputs=4, CORRECT=bucket.group["bias_correction"])
    return partials.sum(1, dtype=torch.float64)


@functools.cache
def _kernels():
    """The kernels by name. Triton is imported here, and as globals because kernels look names up there."""
    global tl, triton
    import triton
    import triton.language as tl

    @triton.jit
    def step(rows, chunks, factor, skip, lr, weight, weight_decay, rho, eps, log2_beta2,
             TENSOR_LR: tl.constexpr, FLOOR: tl.constexpr, MAXIMIZE: tl.constexpr, CORRECT: tl.constexpr,
             NESTEROV: tl.constexpr,
             P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, H: tl.constexpr, ALIGNMENT: tl.constexpr,
             VECTOR: tl.constexpr, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr):  # fmt: skip
        row = rows + tl.load(chunks + 2 * tl.program_id(0)) * 8
        part = tl.load(chunks + 2 * tl.program_id(0) + 1)
        numel = tl.load(row + 6)
        go = True
        if skip is not None:
            go = tl.load(skip) == 0
        if go:
            if part == 0:
                count = tl.load(row + 4).to(tl.pointer_type(tl.float32))
                tl.store(count, tl.load(count) + 1.0)
            params = tl.load(row).to(tl.pointer_type(P))
            grads = tl.load(row + 1).to(tl.pointer_type(G))
            exp_avgs = tl.load(row + 2).to(tl.pointer_type(M))
            hessians = tl.load(row + 3).to(tl.pointer_type(H))
            rate = lr
            if TENSOR_LR:
                rate = tl.load(lr).to(tl.float32)
            scale = rho
            if CORRECT:
                estimates = tl.maximum(tl.load(tl.load(row + 5).to(tl.pointer_type(tl.float32))), 1.0)
                scale = rho / (1.0 - tl.exp2(estimates * log2_beta2))
            multiplier = 1.0
            if factor is not None:
                multiplier = tl.load(factor)
            if MAXIMIZE:
                multiplier = -multiplier
            for i in range(ITERATIONS):
                at = part.to(tl.int64) * (BLOCK * ITERATIONS) + i * BLOCK + tl.arange(0, BLOCK)
                inside = tl.max_constancy(at < numel, VECTOR)
                p_at = tl.multiple_of(params + at, ALIGNMENT)
                m_at = tl.multiple_of(exp_avgs + at, ALIGNMENT)
                g = tl.load(tl.multiple_of(grads + at, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
                m = tl.load(m_at, mask=inside, other=0.0).to(tl.float32)
                h = tl.load(tl.multiple_of(hessians + at, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
                p = tl.load(p_at, mask=inside, other=0.0).to(tl.float32)
                g *= multiplier
                m += weight * (g - m)
                denominator = h * scale
                if FLOOR:
                    denominator = tl.where(denominator < eps, eps, denominator)
                else:
                    denominator += eps
                update = (m + weight * (g - m) if NESTEROV else m) / denominator
                update = tl.where(update > 1.0, 1.0, tl.where(update < -1.0, -1.0, update))  # NaN stays NaN
                p = p * (1.0 - rate * weight_decay) - rate * update
                tl.store(m_at, m.to(M), mask=inside)
                tl.store(p_at, p.to(P), mask=inside)

    @triton.jit
    def hessian(rows, chunks, factor, skip, weight, scale, SQUARED: tl.constexpr, CORRECT: tl.constexpr,
                P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, H: tl.constexpr, ALIGNMENT: tl.constexpr,
                VECTOR: tl.constexpr, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr):  # fmt: skip
        row = rows + tl.load(chunks + 2 * tl.program_id(0)) * 8
        part = tl.load(chunks + 2 * tl.program_id(0) + 1)
        numel = tl.load(row + 6)
        go = True
        if skip is not None:
            go = tl.load(skip) == 0
        if go:
            if CORRECT and part == 0:
                count = tl.load(row + 5).to(tl.pointer_type(tl.float32))
                tl.store(count, tl.load(count) + 1.0)
            grads = tl.load(row + 1).to(tl.pointer_type(G))
            hessians = tl.load(row + 3).to(tl.pointer_type(H))
            multiplier = 1.0
            if factor is not None:
                multiplier = tl.load(factor)
            for i in range(ITERATIONS):
                at = part.to(tl.int64) * (BLOCK * ITERATIONS) + i * BLOCK + tl.arange(0, BLOCK)
                inside = tl.max_constancy(at < numel, VECTOR)
                h_at = tl.multiple_of(hessians + at, ALIGNMENT)
                g = tl.load(tl.multiple_of(grads + at, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
                h = tl.load(h_at, mask=inside, other=0.0).to(tl.float32)
                g *= multiplier
                if SQUARED:
                    g *= g
                h += weight * (g * scale - h)
                tl.store(h_at, h.to(H), mask=inside)

    @triton.jit
    def square(rows, chunks, partials,
               P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, H: tl.constexpr, ALIGNMENT: tl.constexpr,
               VECTOR: tl.constexpr, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr):  # fmt: skip
        row = rows + tl.load(chunks + 2 * tl.program_id(0)) * 8
        part = tl.load(chunks + 2 * tl.program_id(0) + 1)
        numel = tl.load(row + 6)
        grads = tl.load(row + 1).to(tl.pointer_type(G))
        squares = tl.zeros((BLOCK,), tl.float32)
        for i in range(ITERATIONS):
            at = part.to(tl.int64) * (BLOCK * ITERATIONS) + i * BLOCK + tl.arange(0, BLOCK)
            inside = tl.max_constancy(at < numel, VECTOR)
            g = tl.load(tl.multiple_of(grads + at, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
            squares += g * g
        tl.store(partials + tl.program_id(0), tl.sum(squares, 0))

    @triton.jit
    def clip(squares, count, grad_scale, norm, factor, max_grad_norm, BLOCK: tl.constexpr):
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(0, count, BLOCK):
            at = i + tl.arange(0, BLOCK)
            total += tl.load(squares + at, mask=at < count, other=0.0)
        root = tl.sqrt(tl.sum(total, 0))
        if grad_scale is not None:
            root /= tl.load(grad_scale)
        tl.store(norm, root)
        tl.store(factor, tl.minimum(max_grad_norm / (root + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL))

    @triton.jit
    def sums(rows, chunks, partials, rho, eps, log2_beta2, CORRECT: tl.constexpr,
             P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, H: tl.constexpr, ALIGNMENT: tl.constexpr,
             VECTOR: tl.constexpr, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr):  # fmt: skip
        row = rows + tl.load(chunks + 2 * tl.program_id(0)) * 8
        part = tl.load(chunks + 2 * tl.program_id(0) + 1)
        numel = tl.load(row + 6)
        exp_avgs = tl.load(row + 2).to(tl.pointer_type(M))
        hessians = tl.load(row + 3).to(tl.pointer_type(H))
        scale = rho
        if CORRECT:
            estimates = tl.maximum(tl.load(tl.load(row + 5).to(tl.pointer_type(tl.float32))), 1.0)
            scale = rho / (1.0 - tl.exp2(estimates * log2_beta2))
        wins = tl.zeros((BLOCK,), tl.float32)
        h1 = tl.zeros((BLOCK,), tl.float32)
        h2 = tl.zeros((BLOCK,), tl.float32)
        m2 = tl.zeros((BLOCK,), tl.float32)
        for i in range(ITERATIONS):
            at = part.to(tl.int64) * (BLOCK * ITERATIONS) + i * BLOCK + tl.arange(0, BLOCK)
            inside = tl.max_constancy(at < numel, VECTOR)
            m = tl.load(tl.multiple_of(exp_avgs + at, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
            h = tl.load(tl.multiple_of(hessians + at, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
            wins += tl.where(inside & (tl.abs(m) < tl.maximum(h * scale, eps)), 1.0, 0.0)
            h1 += tl.abs(h)
            h2 += h * h
            m2 += m * m
        at = partials + tl.program_id(0)
        programs = tl.num_programs(0)
        tl.store(at, tl.sum(wins, 0))
        tl.store(at + programs, tl.sum(h1, 0))
        tl.store(at + 2 * programs, tl.sum(h2, 0))
        tl.store(at + 3 * programs, tl.sum(m2, 0))

    return {"step": step, "hessian": hessian, "square": square, "clip": clip, "sums": sums}


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
    """The same for a Gaussian head: the mean over rows of ||outputs - y||^2 / (2 variance), y ~ N(outputs, variance).

    Gauss-Newton-Bartlett holds for any likelihood whose labels can be drawn. For this one the Gauss-Newton matrix is
    exactly J^T J / variance, averaged over rows, with J the outputs' Jacobian, and the mean of B grad^2 over draws is
    exactly its diagonal, B being the number of rows (what `bs` counts then). For training on squared errors summed
    over the D outputs and halved, variance is 1; for torch's mse_loss, the mean over rows and outputs, it is D / 2.

    Args:
        outputs: (..., D), floating point; a row is one prediction.
        generator: torch.Generator on the outputs' device; None is the default generator.
        variance: of the likelihood, above 0.

    Returns:
        scalar tensor; its gradient is what SophiaG.update_hessian() squares.
    """
    noise = torch.randn(outputs.shape, generator=generator, device=outputs.device, dtype=outputs.dtype)
    target = outputs.detach() + noise * variance**0.5
    return (outputs - target).square().sum() / (2 * variance * outputs[..., 0].numel())


def hutchinson(loss, params, generator=None):
    """Hutchinson's estimate of the Hessian's diagonal, u * (Hessian @ u) with u ~ N(0, I): Algorithm 1.

    One Hessian-vector product, about the cost of two more backward passes. It differentiates twice, which
    torch.compile's backward and fused attention cannot do: give the loss as a function, of the uncompiled model, and
    attention runs in its plain form within. Gradients in `.grad` are left alone. Parameters must be whole.

    Args:
        loss: a function without arguments that returns the scalar loss, or the loss itself, built from operations
            that can be differentiated twice.
        params: parameters (any iterable of tensors that require gradients).
        generator: torch.Generator on the parameters' device; None is the default generator.

    Returns:
        list of tensors in the order and shapes of params; 0 where the gradient does not depend on any of them.
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
