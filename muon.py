"""Muon, and Muon in whitened coordinates, for the hidden matrices of a model. Stands alone: the only import is torch.

    from muon import Muon, WhitenedMuon

    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    optimizer = WhitenedMuon(matrices, lr=8e-3)  # embeddings, norms and biases need another optimizer, such as AdamW

Muon (K. Jordan, 2024) replaces a matrix's momentum by the nearest orthogonal matrix. WhitenedMuon takes that step in
coordinates in which the second moments of the matrix's gradient are closer to the identity.

Matrices of one shape are stepped together, as one batch of matrix products.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

__all__ = ["Muon", "WhitenedMuon", "inverse_root", "orthogonalize"]

_TINY = 1e-30  # keeps quotients of float32 sums finite


class Muon(Optimizer):
    """Orthogonalized momentum (Muon), with updates as large as AdamW's (arXiv:2502.16982, section 2.2).

        m <- momentum m + (1 - momentum) grad
        p <- p - lr weight_decay p
        p <- p - lr 0.2 sqrt(max(rows, columns)) orthogonalize(momentum m + (1 - momentum) grad)

    The root mean square of an update is about 0.2 lr, as AdamW's is. So AdamW's learning rate and weight decay are a
    good start. With nesterov=False m itself is orthogonalized.

    Args:
        params: matrices (2-D tensors), or groups of them with their own settings.
        lr: learning rate, a float or a one-element tensor.
        momentum: decay of m.
        weight_decay: decoupled, times lr.
        nesterov: orthogonalize momentum m + (1 - momentum) grad, with the new m.
        cautious: decay only the coordinates that the update moves towards 0 (arXiv:2510.12402).
        split: how many matrices a parameter holds, one below the other; 3 for a fused query-key-value matrix. A number
            for the whole group, or a list with one for each parameter.
        flatten: take a tensor of more dimensions, such as a convolution's weight, as (first dimension, all others).
        ns_coefficients: (a, b, c) of the Newton-Schulz steps, or a list of such triples, one a step.
        ns_steps: number of steps where ns_coefficients is one triple.
        eps: smallest norm by which a momentum is divided.

    State of a parameter: "momentum_buffer" (m), in its shape and dtype.
    GradScaler: step() honours the attributes `grad_scale` and `found_inf`, as torch's fused optimizers do. It divides
    gradients by the first. Where the second is not 0, nothing changes. The host reads neither.

    Raises:
        ValueError: for a setting out of its range, and for a parameter that is not a matrix.
        RuntimeError: for sparse gradients and complex parameters, and for sharded ones (DTensor) that
            `muon_distributed.share` does not know of.
    """

    _step_supports_amp_scaling = True
    _share: Any = None  # of muon_distributed.py: the ranks among which the matrices are shared out

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        *,
        nesterov: bool = True,
        cautious: bool = False,
        split: int | Sequence[int] = 1,
        flatten: bool = False,
        ns_coefficients: Sequence[float] | Sequence[Sequence[float]] = (3.4445, -4.7750, 2.0315),
        ns_steps: int = 5,
        eps: float = 1e-7,
        _whitening: dict[str, Any] | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "cautious": cautious,
            "split": split, "flatten": flatten, "ns_coefficients": ns_coefficients, "ns_steps": ns_steps, "eps": eps,
        }  # fmt: skip
        super().__init__(params, defaults | (_whitening or {}))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the matrices from their gradients. A closure is called first, and its value returned."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            batches = self._batches(group)
            updates = self._share.updates(batches, group) if self._share else self._updates(batches, group)
            for batch, update in updates:
                self._apply(update, batch, group)
        return loss

    def _updates(self, batches: "list[_Batch]", group: dict[str, Any]) -> Iterator[tuple["_Batch", Tensor]]:
        for batch in batches:
            yield batch, self._direction(_stack(self._moved(batch, group)), batch, group)

    def _moved(self, batch: "_Batch", group: dict[str, Any]) -> list[Tensor]:
        weight = 1 - group["momentum"]
        torch._foreach_lerp_(batch.momenta, batch.grads, weight)
        return list(torch._foreach_lerp(batch.momenta, batch.grads, weight)) if group["nesterov"] else batch.momenta

    def _apply(self, update: Tensor, batch: "_Batch", group: dict[str, Any]) -> None:
        updates = list(update.to(batch.dtype) * (batch.lr * 0.2 * math.sqrt(max(batch.shape))))
        decay = batch.lr * group["weight_decay"]
        if group["cautious"]:
            decays = [(u * p > 0).to(p.dtype) * decay for u, p in zip(updates, batch.params, strict=True)]
            torch._foreach_mul_(batch.params, [1 - d for d in decays])
        else:
            torch._foreach_mul_(batch.params, 1 - decay)
        torch._foreach_sub_(batch.params, updates)
        batch.write_back()

    def _direction(self, moved: Tensor, batch: "_Batch", group: dict[str, Any]) -> Tensor:
        return orthogonalize(moved, group["ns_coefficients"], group["ns_steps"], group["eps"])

    # ----- plumbing

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
        except Exception:
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError("lr as a tensor must have one element")
        for key in ("lr", "weight_decay", "eps"):
            if not group[key] >= 0:
                raise ValueError(f"{key} = {group[key]} is not possible, expected 0 or more")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum = {group['momentum']} is not possible, expected 0 <= momentum < 1")
        if unknown := group.keys() - self.defaults.keys() - {"params", "name", "param_names", "initial_lr", "lr_scale"}:
            raise ValueError(f"{type(self).__name__} has no setting {min(unknown)!r}")
        _ns_schedule(group["ns_coefficients"], group["ns_steps"])
        for param, split in zip(group["params"], _splits(group), strict=True):
            if param.is_complex():
                raise RuntimeError(f"{type(self).__name__} does not step complex parameters")
            if param.ndim != 2 and not (group["flatten"] and param.ndim > 2):
                raise ValueError(
                    f"{type(self).__name__} steps matrices, and a parameter has the shape {tuple(param.shape)}: leave "
                    "it to another optimizer, or set flatten=True for the weight of a convolution"
                )
            if split < 1 or param.shape[0] % split:
                raise ValueError(
                    f"split = {split} does not divide the rows of a parameter of shape {tuple(param.shape)}"
                )

    def _batches(self, group: dict[str, Any]) -> list["_Batch"]:
        """Everything in the group that has a gradient, by device, dtype and shape of its matrices."""
        batches: dict[Any, _Batch] = {}
        pairs = list(zip(group["params"], _splits(group), strict=True))
        if self._share:
            pairs.sort(key=lambda pair: self._share.owner[pair[0]])
        for param, split in pairs:
            if param.grad is None or not param.numel():
                continue
            if param.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            state = self.state[param]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            momentum = state["momentum_buffer"]
            if momentum.shape != param.shape:
                raise ValueError(
                    f"a momentum_buffer of shape {tuple(momentum.shape)} does not fit a parameter of shape "
                    f"{tuple(param.shape)}: the state is of another model"
                )
            tensors, sharded = [param, param.grad, momentum], hasattr(param, "device_mesh")
            if sharded:  # this rank's rows
                if not self._share:
                    raise RuntimeError(f"{type(self).__name__} steps sharded parameters after muon_distributed.share()")
                if not hasattr(momentum, "device_mesh"):
                    raise ValueError("momentum_buffer is not sharded as its parameter is")
                tensors = [t.to_local() for t in tensors]
            shape = (param.shape[0] // split, math.prod(param.shape[1:]))
            key = (param.device, param.dtype, param.grad.dtype, shape, sharded and split)
            batch = batches.setdefault(key, _Batch(self, group, param.device, shape, sharded))
            batch.states.append((state, split))
            batch.owners.append(self._share.owner[param] if self._share else 0)
            for tensor, views in zip(tensors, (batch.params, batch.grads, batch.momenta), strict=True):
                views += tensor.flatten(1).chunk(1 if sharded else split)
        for batch in batches.values():
            batch.widen()
        return list(batches.values())


class WhitenedMuon(Muon):
    """Muon's step in coordinates that the gradient's second moments whiten.

        L <- decay L + (1 - decay) grad grad^T          R <- decay R + (1 - decay) grad^T grad
        P_l = (L / mean eigenvalue + ridge)^-exponent   P_r = (R / mean eigenvalue + ridge)^-exponent
        p <- p - lr c P_l orthogonalize(P_l M P_r) P_r

    with M the (Nesterov) momentum and c such that the update is as long as Muon's. Exponent 0 is Muon. Mousse
    (arXiv:2603.09697) is a related step that whitens both sides.

    Args (beside Muon's):
        sides: "input" (P_r only), "output" (P_l only) or "both".
        exponent: of the factors. 1/2, 1/4 and 1/8 take matrix products alone; others take eigenvectors, in float64.
        ridge: added to the factors, in units of their mean eigenvalue. Below 1e-3 the roots take eigenvectors.
        decay: of the factors' averages.
        interval: steps between two computations of P_l and P_r. The factors are updated in every step.
        source: "gradient" takes the factors from the gradients of step(). With "update_factors" they come from the
            gradients at the calls of update_factors(), such as those of Sophia's sampled labels; these calls compute
            P_l and P_r too, and interval has no meaning.
        max_width: a side that is wider is whitened in diagonal blocks, the fewest of equal width that are not wider.

    State of a parameter, beside Muon's: "left_factor", "left_root", "right_factor", "right_root", float32 or float64 of
    the shape (split, blocks, width, width), for the sides that are whitened. A group counts its steps in "step".
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        *,
        sides: str = "both",
        exponent: float = 0.125,
        ridge: float = 0.01,
        decay: float = 0.95,
        interval: int = 10,
        source: str = "gradient",
        max_width: int | None = None,
        **settings: Any,
    ) -> None:
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
        """Take the present gradients into the factors, and compute P_l and P_r anew. For source="update_factors".

        Args:
            scale: of the gradients' second moments, where estimates are taken on batches of different sizes.

        Raises:
            RuntimeError: where no parameter has a gradient, or source is "gradient".
        """
        if wrong := [group for group in self.param_groups if group["source"] != "update_factors"]:
            raise RuntimeError(f"source = {wrong[0]['source']!r}: step() updates the factors; set 'update_factors'")
        batches = [(batch, group) for group in self.param_groups for batch in self._batches(group)]
        if not batches:
            raise RuntimeError("update_factors() found no gradients: call it after backward() and before zero_grad()")
        for batch, group in batches:
            if complete := self._share.complete(batch) if self._share else batch:
                self._update_factors(complete, group, roots=True, scale=scale)

    def _direction(self, moved: Tensor, batch: "_Batch", group: dict[str, Any]) -> Tensor:
        if group["source"] == "gradient":
            self._update_factors(batch, group, roots=group["step"] % group["interval"] == 0)
        keys = [f"{side}_root" for side in _sides(group)]
        if any(key not in state for key in keys for state, _ in batch.states):
            warnings.warn("update_factors() was not called yet, so this step is Muon's", stacklevel=4)
            return super()._direction(moved, batch, group)
        roots = [_stack([root for state, _ in batch.states for root in state[key]]) for key in keys]
        orthogonal = super()._direction(self._whiten(moved, roots, group), batch, group)
        update = self._whiten(orthogonal, roots, group)
        length, new = (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (orthogonal, update))
        return update * (length / (new + _TINY))

    def _whiten(self, x: Tensor, roots: list[Any], group: dict[str, Any]) -> Tensor:
        for side, root in zip(_sides(group), roots, strict=True):
            root = root.to(x.dtype)
            if side == "left":
                x = (root @ x.unflatten(1, (root.shape[1], -1))).flatten(1, 2)
            else:
                x = (x.unflatten(2, (root.shape[1], -1)).transpose(1, 2) @ root).transpose(1, 2).flatten(2)
        return x

    def _update_factors(self, batch: "_Batch", group: dict[str, Any], roots: bool, scale: float = 1.0) -> None:
        grads = _stack(batch.grads)
        for side in _sides(group):
            x = grads if side == "left" else grads.mT
            blocks = _blocks(x.shape[1], group["max_width"])
            x = x.unflatten(1, (blocks, -1))  # (matrices, blocks, width, others)
            factors = batch.collect(f"{side}_factor", (*x.shape[1:3], x.shape[2]))
            moments = _product(x, x.mT, batch.dtype) * scale
            torch._foreach_lerp_(factors, batch.for_states(moments, factors), 1 - group["decay"])
            known = all(f"{side}_root" in state for state, _ in batch.states)
            if roots or not known:
                old = batch.collect(f"{side}_root", (*x.shape[1:3], x.shape[2]), identity=not known)
                inverse = inverse_root(torch.cat(factors), group["exponent"], group["ridge"])
                torch._foreach_copy_(old, batch.for_states(inverse, old))

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        for key, allowed in (("sides", ("input", "output", "both")), ("source", ("gradient", "update_factors"))):
            if group[key] not in allowed:
                raise ValueError(f"{key} = {group[key]!r} is not possible, expected one of {', '.join(allowed)}")
        for key in ("exponent", "ridge"):
            if not group[key] >= 0:
                raise ValueError(f"{key} = {group[key]} is not possible, expected 0 or more")
        if not 0 <= group["decay"] < 1:
            raise ValueError(f"decay = {group['decay']} is not possible, expected 0 <= decay < 1")
        for key in ("interval", "max_width"):
            if group[key] is not None and not group[key] >= 1:
                raise ValueError(f"{key} = {group[key]} is not possible, expected 1 or more")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which casts states to the parameter's dtype; factors and roots keep theirs."""
        factors: dict[int, dict[str, Tensor]] = {}

        def take_out(_: Optimizer, after_hooks: dict[str, Any]) -> dict[str, Any]:
            states = {}
            for number, state in after_hooks["state"].items():
                factors[number] = {k: v for k, v in state.items() if k.endswith(("_factor", "_root"))}
                states[number] = {k: v for k, v in state.items() if k not in factors[number]}
            numbers.extend(number for group in after_hooks["param_groups"] for number in group["params"])
            return {**after_hooks, "state": states}

        numbers: list[int] = []
        handle = self.register_load_state_dict_pre_hook(take_out)  # the last one
        super().load_state_dict(state_dict)
        handle.remove()
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            if not self._share or self._share.owner[param] == self._share.rank:
                self.state[param] |= {k: v.to(param.device, copy=True) for k, v in factors.get(number, {}).items()}


# --------------------------------------------------------------------------------------------------------------------
# The mathematics: batches of matrices in, batches of matrices out
# --------------------------------------------------------------------------------------------------------------------


def orthogonalize(
    matrices: Tensor,
    coefficients: Sequence[float] | Sequence[Sequence[float]] = (3.4445, -4.7750, 2.0315),
    steps: int = 5,
    eps: float = 1e-7,
) -> Tensor:
    """Approximate U V^T of every U S V^T in (..., rows, columns), by Newton-Schulz steps.

    The default coefficients bring singular values above 0.0015 of the Frobenius norm to 0.68 to 1.21 (K. Jordan, 2024).
    On GPUs the products are in bfloat16, else in the matrices' dtype; the result has the matrices' dtype.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).reshape(-1, *sorted(matrices.shape[-2:]))
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=_opmath_dtype(x)).clamp(min=eps)
    x = x.bfloat16() if x.is_cuda else x
    with torch.autocast(x.device.type, enabled=False):
        for a, b, c in _ns_schedule(coefficients, steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(matrices.dtype).unflatten(0, matrices.shape[:-2]) if matrices.ndim > 2 else x.to(matrices.dtype)[0]
    return x.mT if tall else x


# (a, b, c) of the steps of the coupled iteration below, for eigenvalues from 1e-4 to 1. With t the p-th root of an
# eigenvalue, each step minimizes the largest |1 - t (a + b t^p + c t^2p)| over the interval left by the one before.
_ROOT_STEPS = {
    2: ((8.093369, -23.62043, 17.446152), (3.636586, -2.721927, 0.536546), (2.6613, -1.977155, 0.452616),
        (1.956172, -1.337508, 0.383853), (1.875166, -1.250184, 0.375018)),
    4: ((3.850032, -10.85386, 8.618934), (1.809921, -0.587778, 0.064785), (1.50394, -0.594516, 0.121161),
        (1.408623, -0.563777, 0.155179)),
    8: ((2.145429, -4.688327, 3.864602), (1.299996, -0.193069, 0.015548), (1.212705, -0.259989, 0.053781),
        (1.195448, -0.265607, 0.070159)),
}  # fmt: skip


def inverse_root(factors: Tensor, exponent: float, ridge: float) -> Tensor:
    """(A / mean eigenvalue + ridge)^-exponent of every symmetric positive semi-definite A in (..., width, width).

    For 1/2, 1/4 and 1/8 and a ridge of at least 1e-3 it takes matrix products alone: the coupled iteration
    M <- T^p M, X <- X T with T a polynomial of M (N. Higham, Functions of Matrices, section 7.3). On GPUs set
    torch.set_float32_matmul_precision("high") to run these in TF32. In float32 the relative error is below 1e-3 where
    the largest eigenvalue is at most 1e4 times the ridge; in TF32 it was 3e-3 to 2e-2 (one H200, widths 384 to 3072).
    Otherwise it takes an eigendecomposition in float64. A matrix of zeros gives ridge^-exponent times the identity.
    """
    width = factors.shape[-1]
    mean = factors.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    scaled = factors / (mean + _TINY)
    power = round(1 / exponent) if exponent else 0
    if power not in _ROOT_STEPS or power * exponent != 1 or ridge < 1e-3:
        values, vectors = torch.linalg.eigh(scaled.double())
        values = (values.clamp(min=0) + ridge).clamp(min=_TINY) ** -exponent
        return ((vectors * values[..., None, :]) @ vectors.mT).to(factors.dtype)
    identity = torch.eye(width, dtype=factors.dtype, device=factors.device)
    shifted = scaled + ridge * identity
    bound = torch.linalg.matrix_norm(shifted @ shifted)[..., None, None].sqrt()  # >= its largest eigenvalue
    m, root = shifted / bound, None
    steps = _ROOT_STEPS[power]
    for i, (a, b, c) in enumerate(steps):
        t = b * m + c * (m @ m) + a * identity
        root = t if root is None else root @ t
        if i + 1 < len(steps):
            for _ in range(power.bit_length() - 1):
                t = t @ t
            m = m @ t
            m = (m + m.mT) / 2
    assert root is not None
    return (root + root.mT) / 2 * bound**-exponent


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b of (matrices, blocks, ., .), summed and returned in `dtype`."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=dtype).unflatten(0, a.shape[:2])
    return a.to(dtype) @ b.to(dtype)


# --------------------------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------------------------


class _Batch:
    """Matrices of one shape, device and dtype: what one batch of products takes.

    params, grads, momenta: lists of (rows, columns), views of the parameters', in float32 or better. Of parameters that
    are sharded, the rows of this rank.
    states: (state, number of matrices) of every parameter. owners: the ranks that compute their updates.
    shape: (rows, columns) of a matrix. sharded: whether the parameters are.
    """

    def __init__(
        self, optimizer: Muon, group: dict[str, Any], device: torch.device, shape: tuple[int, int], sharded: bool
    ) -> None:
        self.shape, self.sharded, self.owners = shape, sharded, list[int]()
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.momenta: list[Tensor] = []
        self.states: list[tuple[dict[str, Any], int]] = []
        self._narrow: list[tuple[list[Tensor], list[Tensor]]] = []
        grad_scale, found_inf = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        self._grad_scale = None if grad_scale is None else grad_scale.to(device, non_blocking=True)
        self.skip = None if found_inf is None else found_inf.to(device, non_blocking=True) != 0
        lr = group["lr"]
        self.lr = lr if not isinstance(lr, Tensor) else lr.item() if lr.device.type == "cpu" else lr.to(device)

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    def widen(self) -> None:
        """Bring params, grads and momenta to float32 or better, and apply grad_scale and found_inf."""
        narrow = self.params[0].dtype
        dtype = _opmath_dtype(self.params[0])
        if dtype != narrow:
            for name in ("params", "momenta"):
                views = getattr(self, name)
                setattr(self, name, [view.to(dtype) for view in views])
                self._narrow.append((views, getattr(self, name)))
        self.grads = [grad.to(dtype) for grad in self.grads]
        if self._grad_scale is not None:
            self.grads = list(torch._foreach_div(self.grads, self._grad_scale.to(dtype)))
        if self.skip is not None:
            self.grads = [torch.where(self.skip, m, g) for m, g in zip(self.momenta, self.grads, strict=True)]
            self.lr = self.lr * (~self.skip).to(dtype)

    def write_back(self) -> None:
        for views, wide in self._narrow:
            torch._foreach_copy_(views, wide)

    def collect(self, key: str, shape: Sequence[int], identity: bool = False) -> list[Tensor]:
        """The states under `key`, each (matrices, *shape); zeros or identities where one is missing."""
        for state, count in self.states:
            if key not in state:
                state[key] = self.params[0].new_zeros(count, *shape)
                if identity:
                    state[key].diagonal(dim1=-2, dim2=-1).fill_(1)
            elif state[key].shape != (count, *shape):
                raise ValueError(
                    f"{key} has the shape {tuple(state[key].shape)}, expected {(count, *shape)}: max_width, "
                    "split or the parameter is not that of the saved state"
                )
        return [state[key] for state, _ in self.states]

    def for_states(self, new: Tensor, old: list[Tensor]) -> list[Tensor]:
        """`new` (all matrices, ...) cut into one tensor a state; `old` in its place where found_inf is set."""
        parts = new.split([count for _, count in self.states])
        return (
            list(parts)
            if self.skip is None
            else [torch.where(self.skip, o, n) for o, n in zip(old, parts, strict=True)]
        )


def _opmath_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _stack(matrices: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one, on GPUs in bfloat16, in which the products are."""
    first = matrices[0]
    if not first.is_cuda:
        return torch.stack(list(matrices))
    stack = first.new_empty(len(matrices), *first.shape, dtype=torch.bfloat16)
    torch._foreach_copy_(list(stack), list(matrices))
    return stack


def _sides(group: dict[str, Any]) -> list[str]:
    return {"input": ["right"], "output": ["left"], "both": ["left", "right"]}[group["sides"]]


def _blocks(width: int, max_width: int | None) -> int:
    """The fewest diagonal blocks of equal width that are at most max_width wide."""
    least = 1 if max_width is None else -(-width // max_width)
    return next(n for n in range(least, width + 1) if width % n == 0)


def _splits(group: dict[str, Any]) -> list[int]:
    split = group["split"]
    splits = [split] * len(group["params"]) if isinstance(split, int) else list(split)
    if len(splits) != len(group["params"]):
        raise ValueError(f"split has {len(splits)} numbers for the {len(group['params'])} parameters of its group")
    return splits


def _ns_schedule(coefficients: Sequence[Any], steps: int) -> list[tuple[float, float, float]]:
    triples = [coefficients] * steps if isinstance(coefficients[0], (int, float)) else list(coefficients)
    if not triples or any(len(triple) != 3 for triple in triples):
        raise ValueError(f"ns_coefficients = {coefficients!r} is not possible, expected (a, b, c) or a list of these")
    return [(float(a), float(b), float(c)) for a, b, c in triples]
