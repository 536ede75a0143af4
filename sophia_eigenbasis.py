"""Sophia-G for matrices in the eigenbasis of their curvature, and the spectral step in whitened coordinates.

    from sophia_eigenbasis import EigenbasisSophiaG, SpectralSophiaG

Keep this file beside sophia.py. Both classes are used as SophiaG is. They are for hidden matrices: leave embeddings,
norms and biases to groups with `"eigenbasis": False` or to another optimizer.
"""

import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sophia import _EPS, _FOREACH, SophiaG, _check_number, _clipped, _opmath_dtype

__all__ = ["EigenbasisSophiaG", "SpectralSophiaG"]

_SIDES = ("left_factor", "left_basis"), ("right_factor", "right_basis")  # in a parameter's state
_FACTOR_DECAY = 0.95  # at an estimate, at most: the factors' averages are at least this short
_TINY = 1e-30  # keeps divisors off 0 in float32 and wider
_SQUARES_ELEMENTS = 2**25  # worked on at a time in float64: 256 MiB, and a few times that for temporaries


class EigenbasisSophiaG(SophiaG):
    """SophiaG whose matrices take their step in the eigenbasis of their curvature.

    From the sampled-label gradients G of a matrix, update_hessian() keeps the Kronecker factors E[G G^T] and E[G^T G],
    and two bases that approach their eigenvectors. h is the curvature of the rotated gradients. A step rotates m,
    divides and clips it there as SophiaG does, and rotates the update back. For h see EKFAC (arXiv:1806.03884), for
    the bases SOAP (arXiv:2409.11321). The factors' averages decay by beta2 as h does, or by 0.95 if that is less.

    update_hessian() only starts the work, so that a GPU does it beside the next forward and backward pass. The next
    step(), statistics() or state_dict() waits for it.

    Args, besides SophiaG's; both are also settings of a group:
        eigenbasis: False leaves a group's matrices to SophiaG's step. Tensors that are no matrices always take that.
        split: into how many equal blocks of rows a matrix is split, each with factors and bases of its own: 3 for a
            fused query-key-value matrix (3C, C). An int for all matrices of the group, or a list with an entry for
            each parameter of the group, in order: an int, or a tuple of the rows of each block.

    More state of a matrix (split = n): "left_factor" and "left_basis" (n, rows / n, rows / n), "right_factor" and
    "right_basis" (n, columns, columns), in float32 or the parameter's wider dtype. Blocks of unequal rows take the
    first rows and columns of squares as wide as the largest. On a GPU a third square is needed for each side while the
    bases are updated. The factors of embeddings would be too large.

    Raises:
        ValueError: for capturable or complex matrices, and for a split that does not fit.
        RuntimeError: for sharded matrices, and for a state of this class in a group with eigenbasis=False.
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04, weight_decay: float = 1e-1, *, eigenbasis: bool = True, split: int | list[Any] = 1,
        **settings: Any,
    ) -> None:  # fmt: skip
        self._more_defaults = {"eigenbasis": eigenbasis, "split": split, **getattr(self, "_more_defaults", {})}
        super().__init__(params, lr, betas, rho, weight_decay, **settings)

    def _check_group(self, group):
        super()._check_group(group)
        for position, param in enumerate(group["params"] if group["eigenbasis"] else ()):
            if group["capturable"]:
                raise ValueError("eigenbasis=True cannot be captured in a CUDA graph, leave capturable=False")
            if param.is_complex():
                raise ValueError("eigenbasis=True is for real matrices, leave complex ones to another group")
            self._matrix(group, position)

    def __getstate__(self) -> dict[str, Any]:
        self._finish_updates()
        return super().__getstate__()

    def state_dict(self) -> dict[str, Any]:
        """As SophiaG's. Factors and bases are copies: in the state they are views of a tensor for many matrices."""
        self._finish_updates()
        state_dict = super().state_dict()
        names = [name for names in _SIDES for name in names]
        copies = {n: {k: state[k].clone() for k in names if k in state} for n, state in state_dict["state"].items()}
        return {**state_dict, "state": {n: {**state, **copies[n]} for n, state in state_dict["state"].items()}}

    def _matrix(self, group, position):
        """(shape, number of blocks or the rows of each) of a matrix that is stepped in its eigenbasis, else None."""
        param, split = group["params"][position], group["split"]
        if not (group["eigenbasis"] and param.ndim == 2 and param.numel()):
            return None
        if isinstance(split, tuple | list) and len(split) != len(group["params"]):
            raise ValueError(f"split has {len(split)} numbers for {len(group['params'])} parameters of its group")
        blocks = split[position] if isinstance(split, tuple | list) else split
        if isinstance(blocks, tuple | list):
            blocks = tuple(blocks)
            fits = all(isinstance(rows, int) and rows > 0 for rows in blocks) and sum(blocks) == len(param)
        else:
            fits = isinstance(blocks, int) and blocks > 0 and len(param) % blocks == 0
        if not fits:
            raise ValueError(f"split = {blocks!r} does not divide the {len(param)} rows of parameter {position}")
        return param.shape, blocks

    def _param_state(self, param, group, position):
        state, matrix = super()._param_state(param, group, position), self._matrix(group, position)
        if matrix is None:
            return state
        if hasattr(param, "device_mesh"):
            raise RuntimeError("eigenbasis=True needs whole matrices, and this one is sharded over ranks")
        (rows, columns), blocks = matrix
        count, rows = (blocks, rows // blocks) if isinstance(blocks, int) else (len(blocks), max(blocks))
        placed = {"dtype": _opmath_dtype(param), "device": param.device}
        for (factor, basis), width in zip(_SIDES, (rows, columns), strict=True):
            if basis not in state:
                state[factor] = torch.zeros(count, width, width, **placed)
                state[basis] = torch.eye(width, **placed).repeat(count, 1, 1)
            for key in (factor, basis):
                state[key] = state[key].to(**placed)
                if state[key].shape != (count, width, width):
                    shapes = f"has shape {tuple(state[key].shape)}, {tuple(param.shape)} in {count} blocks needs"
                    raise ValueError(f"{key} of parameter {position} {shapes} {(count, width, width)}; check `split`")
        return state

    def _collect(self, gradients=None):
        self._finish_updates()
        return super()._collect(gradients)

    def _group_tensors(self, gradients):
        buckets = super()._group_tensors(gradients)
        for bucket in buckets:
            if bucket.matrix:
                left, right = [[self._stack(bucket, name) for name in names] for names in _SIDES]
                split, bucket.sides = bucket.matrix[1], [(left, right)]
                if not isinstance(split, int):
                    views = [(slice(i, None, len(split)), rows) for i, rows in enumerate(split)]
                    bucket.sides = [([s[i, :n, :n] for s in left], [s[i] for s in right]) for i, n in views]
        return buckets

    def _stack(self, bucket, name):
        """(n, width, width): that tensor of all states of the bucket as one. The states hold views of it."""
        stack, tensors = self._cache.get((bucket.key, name)), [state[name] for state in bucket.states]
        count = len(tensors[0])
        if stack is None or [v.data_ptr() for v in stack.split(count)] != [t.data_ptr() for t in tensors]:
            stack = self._cache[bucket.key, name] = torch.cat(tensors)
            for state, view in zip(bucket.states, stack.split(count), strict=True):
                state[name] = view
        return stack

    def _implementation(self, bucket):
        if not bucket.matrix:
            return super()._implementation(bucket)
        step = partial(_FOREACH.step, direction=partial(self._direction, bucket))
        return SimpleNamespace(step=step, hessian=self._update_factors, square=_FOREACH.square, sums=_rotated_sums)

    def _direction(self, bucket, numerators, h, rho, eps):
        """The step of `numerators`: rotated, divided and clipped, rotated back."""
        return _rotate_back(bucket, _clipped(_rotate(bucket, numerators), h, rho, eps))

    def _update_hessian(self, *args):
        super()._update_hessian(*args)
        estimates = self._cache.pop("estimates", [])
        for device in dict.fromkeys(bucket.device for bucket, *_ in estimates):
            own = [estimate for estimate in estimates if estimate[0].device == device]
            sides = [side for bucket, *_ in own for pair in bucket.sides for side in pair]
            if ("updater", device) not in self._cache:
                self._cache["updater", device] = _BasisUpdater(device)
            self._cache.setdefault("pending", []).append((own, *self._cache["updater", device].start(sides)))

    def _update_factors(self, bucket, *, beta2, multiplier, skip, **settings):
        """Average G G^T and G^T G into the factors, and keep what _finish_updates needs to renew h."""
        stacks = _blocks(bucket, bucket.grads)  # a copy: DistributedDataParallel overwrites its gradients
        if multiplier is not None:
            stacks = [blocks.to(bucket.sides[0][0][1].dtype) * multiplier for blocks in stacks]
        bucket.grads = []
        exact = torch.float32 if bucket.device.type == "mps" else torch.float64  # mps has no float64
        for blocks, side in ((b, i) for b in range(len(stacks)) for i in (0, 1)):
            factors, _ = bucket.sides[blocks][side]
            for mean, g in zip(_chunks(factors), stacks[blocks].split(len(_chunks(factors)[0])), strict=True):
                g = g.to(exact)
                product = (g.mT @ g if side else g @ g.mT).to(mean.dtype)
                mean.lerp_(product if skip is None else torch.where(skip, mean, product), 1 - min(beta2, _FACTOR_DECAY))
        settings |= {"beta2": beta2, "multiplier": None, "skip": skip}
        self._cache.setdefault("estimates", []).append((bucket, stacks, settings))

    @torch.no_grad()
    def _finish_updates(self):
        """Wait for pending eigenbasis updates, then update h in the new basis."""
        for estimates, bases, done in self._cache.pop("pending", ()):
            if done is not None:
                torch.cuda.current_stream(estimates[0][0].device).wait_event(done)
            new_bases = iter(bases)
            for bucket, stacks, settings in estimates:
                for old in (basis for sides in bucket.sides for _, side in sides for basis in side):
                    new, skip = next(new_bases), settings["skip"]
                    old.copy_(new if skip is None else torch.where(skip, old, new))
                bucket.grads = _rotate(bucket, stacks, bucket.hessians)
                _FOREACH.hessian(bucket, **settings)


class SpectralSophiaG(EigenbasisSophiaG):
    """The steepest step under the spectral norm, in coordinates that the curvature whitens.

    In the eigenbasis, in place of the divided and clipped m, a matrix moves by

        D_l^-e O(D_l^-e M D_r^-e) D_r^-e

    with M the rotated m, O(X) the nearest orthogonal matrix to X, and D_l and D_r the eigenvalues of the two sides
    (the means of h over columns and rows). This is the step of Mousse (arXiv:2603.09697) with the gradients of sampled
    labels for the curvature. Its length is Muon's scaled to AdamW (arXiv:2502.16982), about 0.2 lr a coordinate, so
    use Muon's lr. Other parameters move by up to lr: give them a group with an lr of their own, or AdamW. rho has no
    effect on matrices, and win_rate says nothing about them.

    Args, besides EigenbasisSophiaG's; also a setting of a group:
        exponent: e, the power of the curvature by which each side is whitened. 0 is Muon's step, the control. Before
            the first estimate the step is Muon's too.

    Raises:
        ValueError: also for an exponent that is not a number of at least 0.
    """

    def __init__(self, params: ParamsT, *args: Any, exponent: float = 0.125, **settings: Any) -> None:
        self._more_defaults = {"exponent": exponent}
        super().__init__(params, *args, **settings)

    def _check_group(self, group):
        super()._check_group(group)
        _check_number("exponent", group["exponent"])

    def _warn_without_curvature(self):
        if any(group["exponent"] or not group["eigenbasis"] for group in self.param_groups):
            super()._warn_without_curvature()

    def _direction(self, bucket, numerators, h, rho, eps):
        exponent = bucket.group["exponent"]
        if not exponent:
            return _unblock(bucket, [_muon(blocks) for blocks in _blocks(bucket, numerators)], numerators)
        rotated = zip(_blocks(bucket, _rotate(bucket, numerators)), _blocks(bucket, h), strict=True)
        steps = [_spectral(blocks, curvature, exponent) for blocks, curvature in rotated]
        return _rotate_back(bucket, _unblock(bucket, steps, numerators))


# --------------------------------------------------------------------------------------------------------------------
# Matrices of one shape, together. Blocks of one shape are a stack (n, rows, columns): all blocks of an equal split are
# one, else query, key and value are one each. bucket.sides has for each stack ((factors, bases), (factors, bases)): on
# the left (n, rows, rows), on the right (n, columns, columns).
# --------------------------------------------------------------------------------------------------------------------


def _blocks(bucket, matrices):
    """The stacks of the blocks of all matrices of the bucket."""
    split = bucket.matrix[1]
    if isinstance(split, int):
        return [torch.cat([m.unflatten(0, (split, -1)) for m in matrices])]
    return [torch.stack(alike) for alike in zip(*(m.split(split) for m in matrices), strict=True)]


def _unblock(bucket, stacks, like):
    """The reverse of _blocks, in the shapes of `like`."""
    if isinstance(split := bucket.matrix[1], int):
        return [part.reshape(m.shape) for part, m in zip(stacks[0].split(split), like, strict=True)]
    return [torch.cat(blocks) for blocks in zip(*stacks, strict=True)]


def _rotate(bucket, matrices, like=None):
    """Left^T X Right, in which the eigenvectors are the axes. With `like`, matrices are stacks already."""
    stacks = _blocks(bucket, matrices) if like is None else matrices
    return _turn(bucket, stacks, matrices if like is None else like, lambda left, x, right: left.mT @ x @ right)


def _rotate_back(bucket, matrices):
    return _turn(bucket, _blocks(bucket, matrices), matrices, lambda left, x, right: left @ x @ right.mT)


def _turn(bucket, stacks, like, product):
    with torch.autocast(bucket.device.type, enabled=False):
        pairs = zip(bucket.sides, stacks, strict=True)
        turned = [product(left, x.to(left.dtype), right) for ((_, left), (_, right)), x in pairs]
        return _unblock(bucket, turned, like)


def _rotated_sums(bucket, **settings):
    bucket.exp_avgs = _rotate(bucket, bucket.exp_avgs)
    return _FOREACH.sums(bucket, **settings)


def _spectral(blocks: Tensor, curvature: Tensor, exponent: float) -> Tensor:
    """SpectralSophiaG's step of rotated matrices (n, rows, columns) with their curvature h."""
    with torch.autocast(blocks.device.type, enabled=False):
        left, right = curvature.mean(-1, keepdim=True), curvature.mean(-2, keepdim=True)
        left, right = left / (left.mean(-2, keepdim=True) + _TINY), right / (right.mean(-1, keepdim=True) + _TINY)
        whitening = (left * right).clamp(min=1e-8) ** -exponent  # the same for all before the first estimate
        orthogonal = _orthogonalize(whitening * blocks)
        step = whitening * orthogonal
        length, present = (torch.linalg.vector_norm(t, dim=(-2, -1), keepdim=True) for t in (orthogonal, step))
        return step * (0.2 * max(blocks.shape[-2:]) ** 0.5 * length / (present + _TINY))


def _muon(blocks: Tensor) -> Tensor:
    """Muon's step of matrices (n, rows, columns): what _spectral is for exponent 0."""
    with torch.autocast(blocks.device.type, enabled=False):
        return _orthogonalize(blocks) * (0.2 * max(blocks.shape[-2:]) ** 0.5)


def _orthogonalize(matrices: Tensor) -> Tensor:
    """About the nearest orthogonal matrices: U f(S) V^T of U S V^T, f in 0.68 to 1.21 for S over 0.0015 of its norm.

    Five steps of Muon's quintic Newton-Schulz iteration (K. Jordan, 2024), on GPUs in bfloat16 as there. Matrices with
    a norm below 1e-15 come out smaller, down to 0.
    """
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + _EPS)
    x = x.bfloat16() if x.device.type == "cuda" else x
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    x = x.to(matrices.dtype)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


def _chunks(squares):
    """(n, width, width) in parts that are small enough to be worked on in float64."""
    return squares.split(max(1, _SQUARES_ELEMENTS // squares[0].numel()))


class _BasisUpdater:
    """Updates all bases of one device by one step of orthogonal iteration. Many steps give the eigenvectors.

    Squares of one width are updated together. A GPU does it on a stream of its own, with priority. An update is many
    small kernels, slow to start one by one, so from the second update of the same stacks on it is a CUDA graph.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream: Any = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.stacks: Any = None
        self.graph: Any = None  # the graph of an update of these stacks
        self.updated: Any = None  # the bases that the graph writes
        self.records = True

    def start(self, sides):
        """(every new basis, for the pairs of stacks `sides`; the event after which they are there, or None)."""
        if self.stream is None:
            return self.update(sides), None
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        stacks = [(stack.data_ptr(), stack.shape) for side in sides for stack in side]
        with torch.cuda.stream(self.stream):
            if stacks == self.stacks and self.graph is None and self.records:
                self.record(sides)
            if stacks == self.stacks and self.graph is not None:
                self.graph.replay()
                return self.updated, self.stream.record_event()
            self.stacks, self.graph, updated = stacks, None, self.update(sides)
            for basis in updated:
                basis.record_stream(current)
            return updated, self.stream.record_event()

    def record(self, sides):
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self.stream.device, priority=-1)  # a new one: its workspaces belong to the graph
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                updated = self.update(sides)
        except RuntimeError as error:
            warnings.warn(f"bases are updated without a CUDA graph, more slowly: {error}", stacklevel=2)
            self.records = False
        else:
            self.graph, self.updated = graph, updated

    def update(self, sides):
        squares, alike, updated = [pair for side in sides for pair in zip(*side, strict=True)], {}, {}
        for i, (factor, _) in enumerate(squares):
            alike.setdefault((factor.shape, factor.dtype), []).append(i)
        for (shape, _), indices in alike.items():
            count = max(1, _SQUARES_ELEMENTS // shape.numel())
            for some in (indices[i : i + count] for i in range(0, len(indices), count)):
                factors, bases = (torch.stack(each) for each in zip(*(squares[i] for i in some), strict=True))
                updated |= zip(some, _orthogonal_iteration(factors, bases), strict=True)
        return [updated[i] for i in range(len(squares))]


def _orthogonal_iteration(factors: Tensor, bases: Tensor) -> Tensor:
    """An orthonormal basis of the columns of `factors @ bases`, first to last: what a QR decomposition gives.

    Computed by a Cholesky decomposition in float64, which is faster than QR for a batch of matrices on a GPU. Cholesky
    squares the condition number. So the columns are scaled to one length, and the factors get a thousandth of their
    mean eigenvalue times the identity, which moves no eigenvector and slows the small ones a little. The result is
    orthonormal to 3e-5 in width 512, except in the first updates of factors of rank 1 (to 6e-3). A basis that cannot
    be computed, as of factors 0, stays as it is.
    """
    if factors.device.type == "mps":  # has no float64
        return _orthogonal_iteration(factors.cpu(), bases.cpu()).to(factors.device)
    exact, q = factors.double(), bases.double()
    q = exact @ q + 1e-3 * exact.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * q
    q = q / torch.linalg.vector_norm(q, dim=-2, keepdim=True)
    lower, failed = torch.linalg.cholesky_ex(q.mT @ q)
    q = torch.linalg.solve_triangular(lower.mT, q, upper=True, left=False)
    ok = (failed == 0) & torch.isfinite(q).all(-1).all(-1)
    return torch.where(ok[:, None, None], q.to(bases.dtype), bases)
