"""Muon, and Muon in whitened coordinates, for the hidden matrices of a model. Needs torch only.

    from muon import Muon, WhitenedMuon

    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    optimizer = WhitenedMuon(matrices, lr=8e-3)  # all other parameters need another optimizer, such as AdamW

Muon (K. Jordan, 2024) replaces a matrix's momentum by the nearest orthogonal matrix. WhitenedMuon takes that step in
coordinates that whiten the matrix's gradient: its second moments there are closer to the identity.

Matrices of one shape are stepped together, as one batch of matrix products.
"""

import contextlib
import importlib
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

__all__ = ["JORDAN", "MINIMAX", "Muon", "WhitenedMuon", "inverse_root", "orthogonalize"]

# Newton-Schulz steps (a, b, c): x <- a x + (b x x^T + c (x x^T)^2) x. K. Jordan's (2024) bring singular values above
# 0.0015 into the range 0.68 to 1.21. Each step of MINIMAX, as in Polar Express (arXiv:2505.16932), minimizes the
# largest |1 - value| on the interval that the step before leaves. The first interval is 0.001 to 1. The last step
# leaves 0.113.
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
MINIMAX = ((8.470329, -25.108075, 18.629276), (4.182837, -3.108703, 0.580607), (3.961893, -2.954089, 0.562979),
           (3.286677, -2.464788, 0.507365), (2.273831, -1.644733, 0.416199))  # fmt: skip
_TINY = 1e-30  # keeps quotients of float32 sums finite
_LABELS = {"params", "param_names", "name", "lr_scale"}  # of groups, for others to read
_LABELS |= {"initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"}  # of schedulers


class Muon(Optimizer):
    """Orthogonalized momentum (Muon), with updates as large as AdamW's (arXiv:2502.16982, section 2.2).

        m <- momentum m + (1 - momentum) grad
        p <- p - lr weight_decay p
        p <- p - lr 0.2 sqrt(max(rows, columns)) orthogonalize(momentum m + (1 - momentum) grad)

    The root mean square of an update is about 0.2 lr, as AdamW's is. So start with AdamW's learning rate and weight
    decay. With nesterov=False m itself is orthogonalized.

    Args:
        params: matrices (2-D tensors), or groups of them with their own settings.
        lr: learning rate, a float or a one-element tensor.
        momentum: decay of m.
        weight_decay: decoupled, times lr.
        nesterov: orthogonalize momentum m + (1 - momentum) grad, with the new m.
        cautious: decay only the coordinates that the update moves towards 0 (arXiv:2510.12402).
        split: number of matrices in a parameter, stacked by rows; 3 for a fused query-key-value matrix. One number for
            the complete group, or a list with an entry for each parameter: a number, or the rows of each matrix.
        flatten: reshape a tensor of more dimensions, such as a convolution's weight, to (first dimension, all others).
        ns_coefficients: the Newton-Schulz steps: JORDAN, MINIMAX, another list of (a, b, c), or one such triple.
        ns_steps: number of steps if ns_coefficients is one triple.
        eps: lower bound of the norm by which a momentum is divided.
        fused: use the Triton kernels of muon_fused.py, which needs Triton, for symmetric products and around others.
            Tensors that they cannot take (on a CPU, float64, odd strides) go on without, shared matrices in part.

    State of a parameter: "momentum_buffer" (m), in its shape and dtype (float32 for float16).
    GradScaler: step() reads the attributes `grad_scale` and `found_inf`, as torch's fused optimizers do. Gradients are
    divided by `grad_scale`. If `found_inf` is not 0, nothing changes. The host does not wait for either.

    Raises:
        ValueError: for a setting that is unknown or out of its range, for a parameter that is not a matrix or is there
            twice, and for a state that does not fit.
        RuntimeError: for fused=True without Triton or muon_fused.py, for sparse gradients, for complex parameters, and
            for sharded parameters (DTensor) before `muon_distributed.share(optimizer)`.
    """

    _step_supports_amp_scaling = True
    _share: Any = None  # of muon_distributed.py: the ranks that compute the updates together
    _loaded = False  # whether load_state_dict() has brought states

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, momentum: float = 0.95, weight_decay: float = 0.1, *,
        nesterov: bool = True, cautious: bool = False, split: int | Sequence[int | Sequence[int]] = 1,
        flatten: bool = False, ns_coefficients: Sequence[float] | Sequence[Sequence[float]] = JORDAN,
        ns_steps: int = 5, eps: float = 1e-7, fused: bool = False, _whitening: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "cautious": cautious,
            "split": split, "flatten": flatten, "ns_coefficients": ns_coefficients, "ns_steps": ns_steps, "eps": eps,
            "fused": fused,
        }  # fmt: skip
        self._plans: dict[int, _Plan] = {}
        super().__init__(params, defaults | (_whitening or {}))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the matrices from their gradients. A closure is called first, and step() returns its value."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        if self._share:
            self._share.agree_on_found_inf()
        for group in self.param_groups:
            batches = self._batches(group, fused=group["fused"] and not self._share)
            for batch in batches:
                if not batch.fused:
                    torch._foreach_lerp_(batch.momenta, batch.grads, 1 - group["momentum"])
            for batch, update in (self._share or self)._updates(batches, group):
                self._apply(update, batch, group)
            for batch in batches:
                batch.release()
        return loss

    def _updates(self, batches: "list[_Batch]", group: dict[str, Any]) -> "Iterator[tuple[_Batch, Tensor]]":
        """Yield every batch with its updates, (matrices, rows, columns)."""
        for batch in batches:
            moved, grads = self._moved(batch, group)
            yield batch, self._direction(moved, grads, batch, group)

    def _moved(self, batch: "_Batch", group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the matrices to orthogonalize, and the gradients, (matrices, rows, columns)."""
        if batch.fused:
            return batch.average_momenta(group["momentum"], group["nesterov"], group.get("source") == "gradient")
        moved, grads = _stack(batch.momenta), _stack(batch.grads)
        if group["nesterov"]:
            moved.lerp_(grads, 1 - group["momentum"])
        return moved, grads

    def _apply(self, update: Tensor, batch: "_Batch", group: dict[str, Any]) -> None:
        if batch.fused:
            settings = 0.2 * math.sqrt(batch.longest), batch.lr, group["weight_decay"], group["cautious"]
            return batch.fused.apply(batch.params, update, *settings, batch.found_inf, batch.ratios)
        lr, update = batch.lr, update.to(batch.params[0].dtype)
        scale = 0.2 * math.sqrt(batch.longest) * lr
        updates = list(update * scale if isinstance(scale, Tensor) else update)
        decay = lr * group["weight_decay"]
        if group["cautious"]:
            towards_0 = torch._foreach_mul(updates, batch.params)
            torch._foreach_sign_(towards_0)
            torch._foreach_clamp_min_(towards_0, 0)
            torch._foreach_mul_(towards_0, -decay)
            torch._foreach_add_(towards_0, 1)
            torch._foreach_mul_(batch.params, towards_0)
        else:
            torch._foreach_mul_(batch.params, 1 - decay)
        torch._foreach_add_(batch.params, updates, alpha=-1 if isinstance(scale, Tensor) else -scale)
        batch.write_back()

    def _direction(self, moved: Tensor, grads: Tensor, batch: "_Batch", group: dict[str, Any]) -> Tensor:
        steps = group["ns_coefficients"], group["ns_steps"], group["eps"]
        return orthogonalize(moved, *steps, kernels=_kernels(group, [moved]))

    # ----- plumbing

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._share:
            raise RuntimeError("parameter groups have to be added before muon_distributed.share()")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
        except Exception:
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        if unknown := group.keys() - self.defaults.keys() - _LABELS:
            raise ValueError(f"{type(self).__name__} has no setting {min(unknown)!r}")
        for key in ("lr", "weight_decay"):
            _check_number(key, group[key])
        _check_number("eps", group["eps"], least=1e-18)  # its square is not 0 in float32
        _check_number("momentum", group["momentum"], below=1)
        for key in ("nesterov", "cautious", "flatten", "fused"):
            _check_number(key, group[key], below=2, whole=True)  # "False" would be true
        if group["fused"]:
            _fused()
        _ns_schedule(group["ns_coefficients"], group["ns_steps"])
        _check_once(group["params"])
        for param, split in zip(group["params"], _splits(group), strict=True):
            if param.is_complex():
                raise RuntimeError(f"{type(self).__name__} does not step complex parameters")
            if param.ndim != 2 and not (group["flatten"] and param.ndim > 2):
                raise ValueError(
                    f"{type(self).__name__} steps matrices, and a parameter has the shape {tuple(param.shape)}: leave "
                    "it to another optimizer, or set flatten=True for the weight of a convolution"
                )
            rows: list[int] = []
            with contextlib.suppress(TypeError):
                rows = _rows(split, param)
            if min(rows, default=0) < min(param.shape[0], 1) or sum(rows) != param.shape[0]:
                raise ValueError(f"split = {split} does not divide the rows of a parameter of shape {(*param.shape,)}")

    def __getstate__(self) -> dict[str, Any]:
        if self._share:
            raise RuntimeError("an optimizer after muon_distributed.share() cannot be copied; its state_dict() can")
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it
        for index, group in enumerate(self.param_groups):  # states of before a setting was there lack it
            own = {**self.defaults, **(before[index] if before else group)}  # `fused` is the machine's
            group.update({key: value for key, value in own.items() if key not in group or key == "fused"})
        for param, values in self.state.items():
            for key in [key for key in values if callable(values[key])] if isinstance(param, Tensor) else ():
                move, dtype = values.pop(key), None if _is_whitening(key) else _momentum_dtype(param)
                if not (_is_whitening(key) and self._share and self._share.owner[param] != self._share.rank):
                    values[key] = move(param.device, dtype, copy=True)
        self._plans = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as torch does. Factors and roots keep their dtype, and this optimizer its `fused`.

        Raises ValueError for a setting that no group may have, and loads nothing.
        """

        def hide_from_torch(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            for group, saved in zip(self.param_groups, loaded["param_groups"], strict=False):
                self._check({**group, **saved, "params": group["params"], "fused": group["fused"]})
            states = dict(loaded["state"])
            # __setstate__ calls the methods that take the tensors' places, before the hooks that come after a load
            for number in states.keys() & {n for group in loaded["param_groups"] for n in group["params"]}:
                states[number] = {key: getattr(value, "to", value) for key, value in states[number].items()}
            return {**loaded, "state": states}

        with self.register_load_state_dict_pre_hook(hide_from_torch):  # the last one
            super().load_state_dict(state_dict)
        self._loaded = any(self.state.values())

    def _batches(self, group: dict[str, Any], fused: bool = False) -> list["_Batch"]:
        """Group the parameters that have a gradient by device, dtype and shape of their matrices."""
        members = []
        pairs = list(zip(group["params"], _splits(group), strict=True))
        if self._share:
            if any(param not in self._share.owner for param, _ in pairs):
                raise RuntimeError("a parameter is not the one of muon_distributed.share(); make another optimizer")
            pairs.sort(key=lambda pair: self._share.owner[pair[0]])
        for param, split in pairs:
            if self._share:
                self._share.check_gradient(param)
            if param.grad is None or not param.numel():
                continue
            if param.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            state = self.state[param]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(param, dtype=_momentum_dtype(param))
            momentum = state["momentum_buffer"]
            expected = param.shape, param.device, True
            for name, x in (("gradient", param.grad), ("momentum_buffer", momentum)):
                if (x.shape, x.device, x.is_floating_point()) != expected:
                    raise ValueError(
                        f"a {name} of shape {tuple(x.shape)} ({x.dtype}, {x.device}) does not fit a parameter of shape "
                        f"{tuple(param.shape)} on {param.device}: it is of another model"
                    )
            if hasattr(param, "device_mesh") and not (self._share and hasattr(momentum, "device_mesh")):
                raise RuntimeError(
                    f"{type(self).__name__} steps sharded parameters (DTensor) only after muon_distributed.share(), "
                    "with momenta that are sharded as they are"
                )
            if param.ndim > 2 and not (param.is_contiguous() and momentum.is_contiguous()):
                raise RuntimeError(f"{type(self).__name__} takes convolutions in torch.contiguous_format only")
            members.append((param, param.grad.dtype, state, _rows(split, param)))
        plan = self._plans.get(id(group))
        if plan is None or plan.key != plan.key_of(members):
            self._check(group)  # parameters and settings may have changed
            _check_once([param for other in self.param_groups for param in other["params"]])
            plan = self._plans[id(group)] = _Plan(members)
        for batch in plan.batches:
            batch.begin(self, group, fused)
        return plan.batches


class WhitenedMuon(Muon):
    """Muon's step in coordinates that the gradient's second moments whiten.

        L <- decay L + (1 - decay) grad grad^T          R <- decay R + (1 - decay) grad^T grad
        P_l, P_r = inverse_root(L, exponent, ridge), inverse_root(R, exponent, ridge)
        p <- p - lr c P_l orthogonalize(P_l M P_r) P_r

    L and R are the factors, P_l and P_r the roots. M is Muon's (Nesterov) momentum. c gives the update the norm of
    Muon's. Exponent 0 is Muon. Mousse (arXiv:2603.09697) is a related step that whitens both sides.

    Args (besides Muon's):
        sides: "input" (P_r only), "output" (P_l only) or "both".
        exponent: the roots are the factors to the power -exponent. 1/2, 1/4 and 1/8 need matrix products only; others
            need eigenvectors, in float64.
        ridge: added to the factors, in units of their mean eigenvalue.
        decay: of the factors' averages.
        interval: steps between two computations of the roots. The factors are updated in every step. A matrix that has
            no gradient when its root is due waits for the next computation, as do all matrices if `found_inf` is set.
        source: with "gradient" the factors come from the gradients of step(). With "update_factors" they come from the
            gradients at each call of update_factors(), such as those of Sophia's sampled labels. These calls compute
            the roots too, and interval is not used.
        max_width: a wider side is whitened in diagonal blocks: the fewest blocks of equal width within max_width.

    State of a parameter, besides Muon's, for each side that is whitened:
        "left_factor", "right_factor": (matrices, blocks, width, width), in float32 or float64.
        "left_root", "right_root": of the same shape, on GPUs in bfloat16.
    If the matrices of a parameter have different numbers of rows, each number has its own key, such as "left_root_256".
    A group counts its steps in "step".
    """

    skipped_estimates: Tensor | float = 0.0  # how many calls of update_factors() took no effect, on the device
    skipped_matrices: Tensor | float = 0.0  # how many updates of a matrix were not finite and took no effect

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, momentum: float = 0.95, weight_decay: float = 0.1, *,
        sides: str = "both", exponent: float = 0.125, ridge: float = 0.01, decay: float = 0.95, interval: int = 10,
        source: str = "gradient", max_width: int | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        whitening = {
            "sides": sides, "exponent": exponent, "ridge": ridge, "decay": decay, "interval": interval,
            "source": source, "max_width": max_width, "step": 0,
        }  # fmt: skip
        super().__init__(params, lr, momentum, weight_decay, _whitening=whitening, **settings)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            group["step"] += 1
        return loss

    @torch.no_grad()
    def update_factors(self, scale: float = 1.0) -> None:
        """Add the present gradients to the factors, and compute the roots again. For source="update_factors".

        Args:
            scale: multiplies the gradients' second moments, for estimates on batches of different sizes. With a scaled
                loss (GradScaler) it is scaler.get_scale() ** -2.

        Gradients that are not all finite, or all 0, change nothing. `skipped_estimates` counts them on the device.

        Raises:
            RuntimeError: if no parameter has a gradient, or source is "gradient".
        """
        _check_number("scale", scale, least=_TINY)
        if wrong := [group for group in self.param_groups if group["source"] != "update_factors"]:
            raise RuntimeError(f"source = {wrong[0]['source']!r}: step() updates the factors; set 'update_factors'")
        if self._share:
            self._share.agree_on_found_inf()
        batches = [(batch, group) for group in self.param_groups for batch in self._batches(group)]
        if not batches:
            raise RuntimeError("update_factors() found no gradients: call it after backward() and before zero_grad()")
        if getattr(self, "found_inf", None) is None:
            device = batches[0][0].grads[0].device
            norms = [torch.stack(torch._foreach_norm(batch.grads)).to(device) for batch, _ in batches]
            total = torch.cat(norms).square().sum() * scale
            if self._share:
                self._share.reduce(total, torch.distributed.ReduceOp.SUM)
            found_inf = (~((total > 0) & (total < math.inf))).float()
            self.skipped_estimates = self.skipped_estimates + found_inf
            for batch, _ in batches:
                batch.found_inf = found_inf.to(batch.grads[0].device)
        for batch, group in batches:
            for own, grads in self._share.complete(batch) if self._share else [(batch, _stack(batch.grads))]:
                self._update_factors(grads, own, group, roots=True, scale=scale)
            batch.release()

    def _direction(self, moved: Tensor, grads: Tensor, batch: "_Batch", group: dict[str, Any]) -> Tensor:
        if moved.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("WhitenedMuon does not go into a CUDA graph: the host decides when roots are computed")
        if group["source"] == "gradient":
            self._update_factors(grads, batch, group, roots=group["step"] % group["interval"] == 0)
        sides = _sides(group)
        unknown = [any(f"{side}_root" not in state for side in sides) for state in batch.states]
        if any(unknown):
            warnings.warn("update_factors() had no gradient of some matrices yet; they take Muon's step", stacklevel=4)
        if all(unknown) or not sides:
            return super()._direction(moved, grads, batch, group)
        roots = {side: batch.stacked(f"{side}_root", _factor_shape(moved, side, group), moved.dtype) for side in sides}
        orthogonal = super()._direction(_whiten(moved, roots), grads, batch, group)
        update = _whiten(orthogonal, roots)
        lengths = [torch.linalg.vector_norm(x, 2, (1, 2), True, dtype=batch.dtype) for x in (orthogonal, update)]
        ratio = lengths[0] / (lengths[1] + _TINY)
        self.skipped_matrices = self.skipped_matrices + (~ratio.isfinite()).sum()
        batch.ratios = torch.where(ratio.isfinite(), ratio, 0)
        return update if batch.fused else torch.where(batch.ratios > 0, update * batch.ratios, 0)

    def _update_factors(
        self, grads: Tensor, batch: "_Batch", group: dict[str, Any], roots: bool, scale: float = 1.0
    ) -> None:
        for side in _sides(group):
            shape = _factor_shape(grads, side, group)
            x = (grads if side == "left" else grads.mT).unflatten(1, shape[:2])  # (matrices, blocks, width, others)
            if self._loaded and any(f"{side}_factor" not in state for state in batch.states):
                what = f"the loaded state lacks a {side}_factor, which begins anew. After muon_distributed.share()"
                warnings.warn(f"{what} a rank's state_dict has only its own; give each rank those of all", stacklevel=4)
            factors = batch.collect(f"{side}_factor", shape, batch.dtype)
            if kernels := _kernels(group, factors):
                kernels.average_products(factors, x, 1 - group["decay"], scale, batch.found_inf)
            else:
                moments = batch.for_states(_second_moments(x, batch.dtype, scale), factors)
                torch._foreach_lerp_(factors, moments, 1 - group["decay"])
            if roots or any(f"{side}_root" not in state for state in batch.states):
                old = batch.collect(f"{side}_root", shape, grads.dtype, identity=True)
                inverse = inverse_root(torch.cat(factors), group["exponent"], group["ridge"], kernels)
                torch._foreach_copy_(old, batch.for_states(inverse.to(grads.dtype), old))

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        for key, allowed in (("sides", ("input", "output", "both")), ("source", ("gradient", "update_factors"))):
            if group[key] not in allowed:
                raise ValueError(f"{key} = {group[key]!r} is not possible, expected one of {', '.join(allowed)}")
        for key in ("exponent", "ridge"):
            _check_number(key, group[key])
        _check_number("decay", group["decay"], below=1)
        _check_number("step", group["step"], whole=True)
        for key in ("interval", "max_width")[: 1 if group["max_width"] is None else 2]:
            _check_number(key, group[key], least=1, whole=True)


# ----- The mathematics: batches of matrices in, batches of matrices out


def orthogonalize(
    matrices: Tensor, coefficients: Sequence[float] | Sequence[Sequence[float]] = JORDAN, steps: int = 5,
    eps: float = 1e-7, kernels: Any = None,
) -> Tensor:  # fmt: skip
    """Approximate U V^T of every U S V^T in (..., rows, columns), by Newton-Schulz steps.

    The matrices are first divided by their Frobenius norm, or by eps if that is larger. coefficients, steps: as Muon's
    ns_coefficients, ns_steps. On GPUs the products are in bfloat16, else in float32 or better. The result has the
    matrices' dtype. kernels: the module muon_fused, to use its product for symmetric results.
    """
    x = matrices.flatten(0, -3) if matrices.ndim > 2 else matrices[None]
    x = x.bfloat16() if x.is_cuda else x.to(_opmath_dtype(x))
    tall = x.shape[1] > x.shape[2]
    inverse = torch.linalg.vector_norm(x, 2, (1, 2), True, dtype=_opmath_dtype(x)).clamp(min=eps).reciprocal()
    with torch.autocast(x.device.type, enabled=False):
        for step, (a, b, c) in enumerate(_ns_schedule(coefficients, steps)):
            wide, first = x.mT if tall else x, step == 0  # its products are divided: they are smaller than x
            gram = _symmetric(wide, wide, kernels, scales=inverse**2 if first else None)
            polynomial = _symmetric(gram, gram, kernels, c, gram, b, a, inverse if first else None)
            x = torch.bmm(x, polynomial) if tall else torch.bmm(polynomial, x)
    return x.to(matrices.dtype).view(matrices.shape)


_FLOOR = 2.0**-10  # of the largest eigenvalue; float16 rounds a matrix by at most half of it, so none becomes negative

# (a, b, c) of the steps of _inverse_root, for eigenvalues from 9.5e-4 to 1. With t the p-th root of an eigenvalue, each
# step minimizes the largest |1 - t (a + b t^p + c t^2p)| over the interval left by the one before.
_ROOT_STEPS = {
    2: ((7.335269, -20.636305, 15.075552), (2.897082, -2.166338, 0.473727), (2.037421, -1.42061, 0.392429),
        (1.876189, -1.25132, 0.375132)),
    4: ((3.28389, -8.152679, 6.29362), (1.596296, -0.602372, 0.098418), (1.420137, -0.569501, 0.150184)),
    8: ((1.901023, -3.344746, 2.648522), (1.241832, -0.241608, 0.035318), (1.19734, -0.2653, 0.068066)),
}  # fmt: skip


def inverse_root(factors: Tensor, exponent: float, ridge: float, kernels: Any = None) -> Tensor:
    """(A / mean eigenvalue + ridge + b / 1024)^-exponent of the symmetric semi-definite A in (..., width, width).

    With B = A / mean eigenvalue + ridge, b is an upper bound of B's largest eigenvalue: 1.01 sqrt(norm of B^2).

    The exponents 1/2, 1/4 and 1/8 need matrix products only. On GPUs these are in float16 if A is in float32, which has
    TF32's precision at twice its speed. The relative error is below 4e-3 in float32, and below 2e-2 in float16. Other
    exponents take eigenvectors in float64. A matrix of zeros gives a multiple of the identity. kernels: as above.
    """
    scaled = factors / (factors.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] + _TINY)
    scaled.diagonal(dim1=-2, dim2=-1).add_(ridge)
    norm = torch.linalg.matrix_norm(scaled)[..., None, None].clamp(min=_FLOOR)  # of zeros without a ridge it is 0
    m = (scaled / norm).flatten(0, -3)
    dtype = torch.float16 if m.is_cuda and m.dtype == torch.float32 else m.dtype
    square = _symmetric(m.to(dtype), m.to(dtype), kernels)
    bound = 1.01 * torch.linalg.matrix_norm(square.to(m.dtype))[:, None, None].sqrt().clamp(min=_FLOOR)
    m = m / bound
    m.diagonal(dim1=-2, dim2=-1).add_(_FLOOR)
    if (power := round(1 / exponent) if exponent else 0) in _ROOT_STEPS and power * exponent == 1:
        m = m / (1 + _FLOOR)
        bound = bound * (1 + _FLOOR)
        root = _inverse_root(m.to(dtype), power, kernels).to(m.dtype)
    else:
        values, vectors = torch.linalg.eigh((m.cpu() if m.device.type == "mps" else m).double())  # mps: no float64
        root = ((vectors * (values.clamp(min=_TINY) ** -exponent)[..., None, :]) @ vectors.mT).to(m.dtype).to(m.device)
    return root.view(factors.shape) * (norm * bound.view(norm.shape)) ** -exponent


def _inverse_root(m: Tensor, power: int, kernels: Any = None) -> Tensor:
    """M^(-1/power) of symmetric M in (n, width, width) with eigenvalues from 9.5e-4 to 1.

    The coupled iteration M <- T^power M, X <- X T, T a polynomial of M (N. Higham, Functions of Matrices, 7.3).
    """
    steps, root = _ROOT_STEPS[power], m
    for i, (a, b, c) in enumerate(steps):
        t = _symmetric(m, m, kernels, c, m, b, a)
        root = t if i == 0 else _symmetric(root, t, kernels)
        if i + 1 < len(steps):
            for _ in range(power.bit_length() - 1):
                t = _symmetric(t, t, kernels)
            m = _symmetric(m, t, kernels)
    return root


def _symmetric(
    x: Tensor, y: Tensor, kernels: Any, alpha: float = 1.0, addend: Tensor | None = None, beta: float = 0.0,
    diagonal: float = 0.0, scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """scales (alpha x y^T + beta addend + diagonal I) of (n, width, depth) with symmetric x y^T; scales: (n, 1, 1)."""
    if kernels:
        return kernels.symmetric_product(x, y, alpha, addend, beta, diagonal, scales)
    with torch.autocast(x.device.type, enabled=False):
        out = torch.bmm(x, y.mT) if addend is None else torch.baddbmm(addend, x, y.mT, beta=beta, alpha=alpha)
    out = out if x is y else (out + out.mT) / 2
    if diagonal:
        out.diagonal(dim1=1, dim2=2).add_(diagonal)
    return out if scales is None else out.mul_(scales.to(out.dtype))


def _whiten(x: Tensor, roots: dict[str, Tensor]) -> Tensor:
    """P_l x P_r of (matrices, rows, columns), with roots of (matrices, blocks, width, width)."""
    with torch.autocast(x.device.type, enabled=False):
        for side, root in roots.items():
            if root.shape[1] == 1:
                x = torch.bmm(root[:, 0], x) if side == "left" else torch.bmm(x, root[:, 0])
            elif side == "left":
                x = (root @ x.unflatten(1, (root.shape[1], -1))).flatten(1, 2)
            else:
                x = (x.unflatten(2, (root.shape[1], -1)).transpose(1, 2) @ root).transpose(1, 2).flatten(2)
    return x


def _second_moments(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """scale x x^T of (matrices, blocks, width, depth), summed and returned in `dtype`."""
    with torch.autocast(x.device.type, enabled=False):
        if x.is_cuda and x.dtype != dtype:
            flat = x.flatten(0, 1)
            product = torch.bmm(flat, flat.mT, out_dtype=dtype).unflatten(0, x.shape[:2])
        else:
            product = x.to(dtype) @ x.to(dtype).mT
    return product if scale == 1 else product.mul_(scale)


# ----- Batches

# A parameter, the dtype of its gradient, its state, and the number of rows of each of its matrices.
_Member = tuple[Tensor, torch.dtype, dict[str, Any], list[int]]


class _Plan:
    """The batches of a group, kept while its parameters and momenta are the same tensors at the same places."""

    def __init__(self, members: list[_Member]) -> None:
        self.key = self.key_of(members)
        batches: dict[Any, _Batch] = {}
        for param, grad_dtype, state, rows in members:
            columns = math.prod(param.shape[1:])
            longest = [max(height, columns) for height in rows]
            if hasattr(param, "device_mesh"):  # the owner divides it when it has all rows
                rows = [param.shape[0]]
            for height, side in dict(zip(rows, longest, strict=False)).items():
                key = (param.device, param.dtype, state["momentum_buffer"].dtype, grad_dtype, height, columns, side)
                batch = batches.setdefault(key, _Batch(side))
                batch.add(param, state, rows, height)
        self.batches = list(batches.values())

    @staticmethod
    def key_of(members: list[_Member]) -> list[Any]:
        def place(x: Tensor) -> tuple[Any, ...]:
            return _local(x).data_ptr(), _local(x).stride(), x.shape, x.dtype

        return [(id(p), id(s), place(p), place(s["momentum_buffer"]), dtype, rows) for p, dtype, s, rows in members]


class _Batch:
    """Matrices of one shape, device and dtype: what one batch of products takes.

    params, grads, momenta: lists of (rows, columns), views of the parameters', in float32 or better. Of a parameter
    that is sharded there is one, of this rank's rows.
    states: of every parameter, and counts, its number of matrices here.
    longest: the larger of the matrices' numbers of rows and columns.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.route: Any = None  # of muon_distributed.py
        self.fused: Any = None  # the module muon_fused, if this step uses it
        self.ratios: Tensor | None = None  # (matrices, 1, 1), by which the kernels multiply the updates
        self.members: list[tuple[Tensor, list[int], int]] = []
        self.states: list[_State] = []
        self._params: list[Tensor] = []
        self._momenta: list[Tensor] = []
        self._stacks: dict[str, tuple[list[Any], Tensor]] = {}

    def add(self, param: Tensor, state: dict[str, Any], rows: list[int], height: int) -> None:
        self.members.append((param, rows, height))
        self.states.append(_State(state, rows, height))
        self._params += _matrices(_local(param.detach()), rows, height)
        self._momenta += _matrices(_local(state["momentum_buffer"]), rows, height)

    @property
    def dtype(self) -> torch.dtype:
        return _opmath_dtype(self.params[0])

    @property
    def skip(self) -> Tensor | None:
        """Whether this step changes nothing, on the device; None if it does whatever the gradients are."""
        return None if self.found_inf is None else self.found_inf != 0

    def begin(self, optimizer: Muon, group: dict[str, Any], fused: bool) -> None:
        """Take this step's gradients and learning rate; bring all to float32 or better; apply GradScaler's protocol.

        With `fused`, and if the kernels can take the tensors, they do this later; self.fused is then their module.
        """
        self.params, self.momenta, self.grads, self.ratios = self._params, self._momenta, [], None
        device, dtype = self.params[0].device, self.dtype
        self.grad_scale, self.found_inf = (
            x if x is None else torch.as_tensor(x, dtype=torch.float32).to(device, non_blocking=True).reshape(())
            for x in (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        )
        self.lr = lr = group["lr"]
        if isinstance(lr, Tensor):
            self.lr = lr.item() if lr.device.type == "cpu" else lr.to(device).reshape(())
        for param, rows, height in self.members:
            self.grads += _matrices(_local(param.grad), rows, height)
        self.fused = _kernels({"fused": fused}, self.params, self.momenta, self.grads)
        if self.fused:
            return
        self.params, self.momenta = (
            views if views[0].dtype == dtype else [x.to(dtype) for x in views] for views in (self.params, self.momenta)
        )
        self.grads = [grad.to(dtype) for grad in self.grads]
        if self.grad_scale is not None:
            self.grads = list(torch._foreach_div(self.grads, self.grad_scale.to(dtype)))
        if (skip := self.skip) is not None:
            self.grads = [torch.where(skip, m, g) for m, g in zip(self.momenta, self.grads, strict=True)]
            self.lr = self.lr * (~skip).to(dtype)

    def write_back(self) -> None:
        for views, values in ((self._params, self.params), (self._momenta, self.momenta)):
            if views is not values:
                torch._foreach_copy_(views, values)

    def release(self) -> None:
        """Forget the gradients and float32 copies: batches outlive a step, and zero_grad() must free its memory."""
        self.params, self.momenta, self.grads = self._params, self._momenta, []
        if self.route:
            self.route.release()

    def collect(self, key: str, shape: Sequence[int], dtype: torch.dtype, identity: bool = False) -> list[Tensor]:
        """The states under `key`, each (matrices, *shape); zeros or identities where one is missing."""
        for state in self.states:
            if key not in state:
                state[key] = self.params[0].new_zeros(state.count, *shape, dtype=dtype)
                if identity:
                    state[key].diagonal(dim1=-2, dim2=-1).fill_(1)
            elif state[key].shape != (state.count, *shape):
                raise ValueError(
                    f"{key} has the shape {tuple(state[key].shape)}, expected {(state.count, *shape)}: max_width, "
                    "split or the parameter is not that of the saved state"
                )
            elif state[key].dtype != dtype or state[key].device != self.params[0].device:  # the model was moved
                state[key] = state[key].to(self.params[0].device, dtype)
        return [state[key] for state in self.states]

    def stacked(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """collect()'s states as one tensor, in the dtype of the products; kept until one of them changes."""
        tensors = self.collect(key, shape, dtype, identity=True)
        present = [x for t in tensors for x in (id(t), t._version, t)]  # t stays, so that no other tensor has its id
        if self._stacks.get(key, ([], None))[0] != present:
            stack = torch.cat(tensors)
            self._stacks[key] = present, stack.bfloat16() if stack.is_cuda else stack.to(self.dtype)
        return self._stacks[key][1]

    def average_momenta(self, momentum: float, nesterov: bool, with_grads: bool) -> tuple[Tensor, Tensor]:
        """Average the momenta with the kernels; return Muon._moved's, with an empty tensor in place of unused grads."""
        first = self.params[0]
        shape, dtype = (len(self.params), *first.shape), torch.bfloat16 if first.is_cuda else self.dtype
        moved, grads = (first.new_empty(shape if used else 0, dtype=dtype) for used in (True, with_grads))
        self.fused.average(self.momenta, self.grads, 1 - momentum, self.found_inf, self.grad_scale, nesterov, moved,
                           grads if with_grads else None)  # fmt: skip
        return moved, grads

    def for_states(self, new: Tensor, old: list[Tensor]) -> list[Tensor]:
        """`new` (all matrices, ...) cut into one tensor a state; `old` in its place where found_inf is set."""
        parts, skip = new.split([state.count for state in self.states]), self.skip
        return list(parts) if skip is None else [torch.where(skip, o, n) for o, n in zip(old, parts, strict=True)]


class _State:
    """A batch's view of a parameter's state. Keys have a suffix if the parameter holds matrices of several shapes."""

    def __init__(self, state: dict[str, Any], rows: list[int], height: int) -> None:
        self.state, self.count = state, rows.count(height)
        self.suffix = "" if len(set(rows)) == 1 else f"_{height}"

    def __contains__(self, key: str) -> bool:
        return key + self.suffix in self.state

    def __getitem__(self, key: str) -> Tensor:
        return self.state[key + self.suffix]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.state[key + self.suffix] = value


def _local(tensor: Any) -> Tensor:
    """The rows of a sharded tensor that are on this rank; other tensors as they are."""
    return tensor.to_local() if hasattr(tensor, "device_mesh") else tensor


def _matrices(tensor: Tensor, rows: list[int], height: int) -> list[Tensor]:
    """Views of the matrices of `height` rows that a parameter holds."""
    tensor = tensor if tensor.ndim == 2 else tensor.flatten(1)
    return [tensor] if len(rows) == 1 else [part for part in tensor.split(rows) if part.shape[0] == height]


def _rows(split: Any, param: Tensor) -> list[int]:
    """The rows of each matrix that a parameter holds. TypeError if they are no integers."""
    if isinstance(split, Iterable):
        return [*map(operator.index, split)]
    return [param.shape[0] // max(split, 1)] * operator.index(split)


def _is_whitening(key: str) -> bool:
    return "_factor" in key or "_root" in key


def _momentum_dtype(param: Tensor) -> torch.dtype:
    """Most of a float16 gradient times 1 - momentum is 0 in float16."""
    return torch.float32 if param.dtype == torch.float16 else param.dtype


def _opmath_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _kernels(group: dict[str, Any], *lists: Sequence[Tensor]) -> Any:
    """The module muon_fused, if the group uses it and it can take these lists of tensors."""
    kernels = _fused() if group["fused"] else None
    return kernels if kernels and kernels.fits(*lists) else None


def _fused() -> Any:
    """The module muon_fused, from beside this file."""
    try:
        return importlib.import_module(f"{__package__}.muon_fused" if __package__ else "muon_fused")
    except ModuleNotFoundError as error:
        remedy = "pip install triton" if error.name == "triton" else f"copy {error.name}.py beside muon.py"
        raise RuntimeError(f"`fused=True` needs {error.name}: {remedy}") from error


def _stack(matrices: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one, on GPUs in bfloat16, in which the products are."""
    if not matrices[0].is_cuda:
        return torch.stack(list(matrices))
    stack = matrices[0].new_empty(len(matrices), *matrices[0].shape, dtype=torch.bfloat16)
    torch._foreach_copy_(list(stack), list(matrices))
    return stack


def _sides(group: dict[str, Any]) -> list[str]:
    sides = {"input": ["right"], "output": ["left"], "both": ["left", "right"]}[group["sides"]]
    return sides if group["exponent"] else []


def _blocks(width: int, max_width: int | None) -> int:
    """The fewest diagonal blocks of equal width that are at most max_width wide."""
    least = 1 if max_width is None else -(-width // max_width)
    return next((n for n in range(least, width + 1) if width % n == 0), 1)


def _factor_shape(x: Tensor, side: str, group: dict[str, Any]) -> tuple[int, int, int]:
    """(blocks, width, width) of a factor of each of x (matrices, rows, columns)."""
    width = x.shape[1 if side == "left" else 2]
    blocks = _blocks(width, group["max_width"])
    return blocks, width // blocks, width // blocks


def _splits(group: dict[str, Any]) -> list[Any]:
    split, count = group["split"], len(group["params"])
    splits = list(split) if isinstance(split, Iterable) else [split] * count
    if len(splits) != count:
        raise ValueError(f"split has {len(splits)} numbers for the {count} parameters of its group")
    return splits


def _ns_schedule(coefficients: Sequence[Any], steps: int) -> list[tuple[float, float, float]]:
    with contextlib.suppress(TypeError, ValueError, IndexError):
        triples = [coefficients] * steps if isinstance(coefficients[0], (int, float)) else list(coefficients)
        schedule = [(float(a), float(b), float(c)) for a, b, c in triples]
        if schedule and math.isfinite(sum(map(sum, schedule))):
            return schedule
    what = f"ns_coefficients = {coefficients!r} with ns_steps = {steps!r}"
    raise ValueError(f"{what} is not possible, expected (a, b, c) or a list of these")


def _check_once(params: list[Tensor]) -> None:
    if len({*params}) < len(params):
        raise ValueError("the groups have the same parameter twice; pass tied parameters once")


def _check_number(name: str, value: Any, *, least: float = 0, below: float = math.inf, whole: bool = False) -> None:
    """Raise ValueError unless value is a number (`whole`: an integer) with least <= value < below."""
    with contextlib.suppress(TypeError, RuntimeError):  # not a number, or several
        if least <= value < below and (not whole or hasattr(value, "__index__")):
            return
    kind = "an integer" if whole else "a number"
    raise ValueError(f"{name} = {value!r} is not possible, expected {kind} from {least} to below {below}")
