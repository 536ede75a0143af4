"""The Triton kernels of `sophia.py`: one launch for all tensors alike, which reads and writes every number once.

Keep this file beside sophia.py and pass `fused=True`. Needs Triton (`pip install triton`).
"""

import array
import contextlib
import functools
import itertools
import math
import operator
import os
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

# Elements a program works on at a time, how many times, warps: by `bench.py optimizer --tune` of commit 2d97060.
LAUNCH = {"step": (1024, 1, 4), "hessian": (2048, 1, 4), "square": (1024, 8, 4), "sums": (4096, 2, 8)}
_CAPTURES = 16  # CUDA graphs that can be captured after one eager call
_ROW = 8  # integers a tensor, see PointerTable
_dtype, _shape, _grad = map(operator.attrgetter, ("dtype", "shape", "grad"))
_chain = itertools.chain.from_iterable
_EPS = 1e-15  # sophia.py's


def check(params: list[Tensor]) -> None:
    """Raise RuntimeError if the kernels cannot run on these parameters. On a CPU they run in Triton's interpreter.

    Parameters that are frozen, such as quantized ones beside adapters, may be what they like.
    """
    devices = ["cuda", "cpu"] if os.environ.get("TRITON_INTERPRET") == "1" else ["cuda"]
    for param in params:
        if param.requires_grad and (param.device.type not in devices or not param.is_floating_point()):
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point Tensors of supported devices: "
                f"{devices} but {param.dtype} and {param.device.type}"
            )


def buckets(optimizer: Any, gradients: dict[Tensor, Tensor] | None) -> list[Any]:
    """The optimizer's buckets, each with a PointerTable in `pointers` or for foreach. See _Sophia._collect."""
    plan = optimizer._cache.get("plan") if gradients is None else None
    result = plan.refresh(optimizer) if plan else None
    if result is None:
        result = [part for bucket in optimizer._group_tensors(gradients) for part in _split(bucket, optimizer._cache)]
        if gradients is None:
            planned = bool(result) and all(b.pointers and b.contiguous and _owns_gradients(b) for b in result)
            optimizer._cache["plan"] = Plan(optimizer, result) if planned else None
    return result


def _owns_gradients(bucket: Any) -> bool:
    """Whether the parameters keep the gradients alive: those of DTensors may be temporary tensors."""
    return all(param.grad is grad for param, grad in zip(bucket.params, bucket.grads, strict=True))


def _split(bucket: Any, cache: dict[Any, Any]) -> list[Any]:
    """The bucket in parts of one alignment each."""
    check(bucket.params)  # they may have moved since the constructor
    parts: dict[int, Any] = {}
    counts = bucket.hessian_steps or bucket.steps
    columns = bucket.states, bucket.params, bucket.grads, bucket.exp_avgs, bucket.hessians, bucket.steps, counts
    for state, *tensors in zip(*columns, strict=True):
        row, alignment = _row(tensors)
        part = parts.setdefault(alignment, SimpleNamespace(rows=array.array("q"), entries=[]))
        part.rows.extend(row)
        part.entries.append((state, *tensors[:4]))
    result = []
    for alignment, part in parts.items():
        made = type(bucket)(bucket.key, bucket.group, part.entries)
        made.alignment, made.rows, made.contiguous = alignment, part.rows, all(p.is_contiguous() for p in made.params)
        keys = ["exp_avg", "hessian", "step", *["hessian_step"] * bool(made.hessian_steps)]
        made.tensors_of = operator.itemgetter(*keys)
        if alignment:
            made.pointers = cache.setdefault((bucket.key, alignment), PointerTable())
        result.append(made)
    return result


def _row(tensors: list[Tensor]) -> tuple[list[int], int]:
    """A row of the PointerTable and its alignment: 16 or 1, or 0 if the kernels cannot take the tensors.

    tensors: parameter, gradient, exp_avg, hessian, step, hessian_step.
    """
    param = tensors[0]
    if not all(t.is_contiguous() for t in tensors):
        strides = torch.empty_like(param, device="meta").stride()  # param's own if it is dense
        if any(t.stride() != strides for t in tensors[:4]):
            return [], 0
    if any(t.dtype not in (torch.float32, torch.bfloat16, torch.float16) or t.is_neg() for t in tensors):
        return [], 0
    p, g, m, h, *counts = addresses = [t.data_ptr() for t in tensors]
    numel = param.numel()
    if numel and 0 in addresses:  # of zeros without memory, and of subclasses that wrap tensors
        return [], 0
    return [p, g, m, h, *counts, numel, 0], 16 if not (p | g | m | h) % 16 and not numel % 8 else 1


class PointerTable:
    """The addresses of a bucket's tensors, on its device.

    rows: int64 (tensors, 8): addresses of parameter, gradient, exp_avg, hessian, step, hessian_step; elements; unused.
    chunks: for each kernel, int32 (programs, 2): the tensor that a program works on, and which part of it.
    Gradients move from step to step. New addresses travel in pinned memory without a sync. torch's allocator does not
    reuse that memory before the copy is done.
    """

    def __init__(self) -> None:
        self.host_rows: array.array[int] | None = None
        self.numels: array.array[int] | None = None
        self.stream: int | None = None
        self.rows: Tensor | None = None
        self.spares: list[Tensor] = []
        self.chunks: dict[tuple[int, int, int], Tensor] = {}
        self.captured: list[tuple[Tensor, PointerTable]] = []

    def upload(self, bucket: Any) -> "PointerTable":
        """The table with the bucket's present addresses; under CUDA graph capture, one of the graph's own."""
        cuda = bucket.device.type == "cuda"
        if cuda and torch.cuda.is_current_stream_capturing():
            return self._capture(bucket)
        stream = torch.cuda.current_stream(bucket.device).cuda_stream if cuda else None
        if bucket.rows == self.host_rows and stream == self.stream:
            return self
        staging = torch.frombuffer(bucket.rows, dtype=torch.int64)
        staging = staging.pin_memory() if cuda else staging
        if self.rows is None or self.rows.numel() != staging.numel() or stream != self.stream:
            self.rows = torch.empty(staging.shape, dtype=torch.int64, device=bucket.device)
        self.rows.copy_(staging, non_blocking=True)
        self.host_rows, self.stream = bucket.rows, stream
        if self.numels != bucket.rows[6::_ROW]:
            self.numels = bucket.rows[6::_ROW]
            self.chunks = {LAUNCH[name]: self._chunks(*LAUNCH[name][:2], bucket.device) for name in LAUNCH}
        if cuda and bucket.group["capturable"] and (not self.spares or self.spares[0].shape != staging.shape):
            self.spares = list(torch.empty(_CAPTURES, staging.numel(), dtype=torch.int64, pin_memory=True))
        return self

    def _capture(self, bucket: Any) -> "PointerTable":
        """A table of its own for a CUDA graph: the graph copies its addresses again at every replay."""
        if self.numels != bucket.rows[6::_ROW] or not self.spares:
            raise RuntimeError("call step() and update_hessian() once outside of the CUDA graph before capturing them")
        staging = self.spares.pop()
        staging.copy_(torch.frombuffer(bucket.rows, dtype=torch.int64))
        table = PointerTable()
        table.rows, table.chunks = torch.empty(staging.shape, dtype=torch.int64, device=bucket.device), self.chunks
        table.rows.copy_(staging, non_blocking=True)
        self.captured.append((staging, table))  # the graph needs both for as long as it lives
        return table

    def _chunks(self, block: int, iterations: int, device: torch.device) -> Tensor:
        assert self.numels is not None
        parts = torch.tensor([max(1, -(-n // (block * iterations))) for n in self.numels], device="cpu")
        tensor = torch.arange(len(parts), device="cpu").repeat_interleave(parts)
        part = torch.arange(len(tensor), device="cpu") - (parts.cumsum(0) - parts)[tensor]
        return torch.stack([tensor, part], dim=1).to(device, torch.int32)

    def launch(self, name: str, bucket: Any, *args: Any, outputs: int = 0, **constants: bool) -> Tensor | None:
        """Run the kernel. With outputs, returns float32 (outputs, programs): the numbers that each program puts out."""
        block, iterations, warps = LAUNCH[name]
        chunks = self.chunks[LAUNCH[name]]
        programs = chunks.shape[0]
        partials = torch.empty(outputs, programs, dtype=torch.float32, device=bucket.device) if outputs else None
        types = _types(bucket.dtypes)
        with _on(bucket.device):
            _KERNELS[name][(programs,)](
                self.rows, chunks, *([] if partials is None else [partials]), *args, **constants,
                P=types[0], G=types[1], M=types[2], H=types[3],
                ALIGNMENT=bucket.alignment, VECTOR=8 if bucket.alignment > 1 else 1,
                BLOCK=block, ITERATIONS=iterations, num_warps=warps,
            )  # fmt: skip
        return partials


@functools.cache
def _types(dtypes: tuple[torch.dtype, ...]) -> list[Any]:
    return [getattr(tl, str(dtype).removeprefix("torch.")) for dtype in dtypes]


class Plan:
    """The buckets of one call, to be used again with new gradients: this keeps the host ahead of the GPU.

    It holds while groups, parameters and states are the same objects, at the same addresses, and gradients and
    parameters are contiguous. It keeps no gradient.
    """

    def __init__(self, optimizer: Any, buckets: list[Any]) -> None:
        self.buckets = buckets
        self.params = [param for bucket in buckets for param in bucket.params]
        self.settings, self.objects, self.tensors = self._look(optimizer)
        self.addresses, self.numels = [*map(Tensor.data_ptr, self.tensors)], [*map(Tensor.numel, self.params)]
        self.shapes, self.dtypes = [*map(_shape, self.params)], [b.dtypes[1] for b in buckets for _ in b.params]
        used = set(map(id, self.params))
        self.idle = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in used]
        for bucket in buckets:
            bucket.grads = []

    def _look(self, optimizer: Any) -> tuple[list[Any], list[Any], list[Tensor]]:
        """What has to stay equal, what has to stay the same objects, and the tensors that must not move."""
        groups, state = optimizer.param_groups, optimizer.state
        settings = [group["bias_correction"] for group in groups]
        objects = [*groups, *_chain(group["params"] for group in groups), state, *state, *state.values()]
        return settings, objects, [*self.params, *_chain(_chain(map(b.tensors_of, b.states)) for b in self.buckets)]

    def refresh(self, optimizer: Any) -> list[Any] | None:
        """The buckets with the gradients' new addresses, or None if anything else has changed."""
        params = self.params
        try:
            settings, objects, tensors = self._look(optimizer)
        except KeyError:  # a state has lost a tensor
            return None
        if settings != self.settings or not _same(objects, self.objects) or not _same(tensors, self.tensors):
            return None
        if self.addresses != [*map(Tensor.data_ptr, tensors)]:
            return None
        if self.numels != [*map(Tensor.numel, params)] or not all(map(Tensor.is_contiguous, params)):
            return None
        if any(param.grad is not None for param in self.idle):
            return None
        try:
            grads = [*map(_grad, params)]
            addresses = array.array("q", map(Tensor.data_ptr, grads))
            alike = self.dtypes == [*map(_dtype, grads)] and self.shapes == [*map(_shape, grads)]
            dense = all(map(Tensor.is_contiguous, grads)) and not any(map(Tensor.is_neg, grads))
        except (RuntimeError, TypeError):  # a sparse gradient has no address, None even less
            return None
        if not alike or not dense or 0 in addresses:
            return None
        first = 0
        for bucket in self.buckets:
            rows, new = bucket.rows[:], addresses[first : first + len(bucket.states)]
            if functools.reduce(operator.or_, new) & (bucket.alignment - 1):
                return None
            rows[1::_ROW] = new
            bucket.rows, first = rows, first + len(new)
        return self.buckets


def _same(objects: list[Any], others: list[Any]) -> bool:
    return len(objects) == len(others) and all(map(operator.is_, objects, others))


def step(bucket: Any, *, lr: Any, beta1: float, beta2: float, rho: float, eps: float | None, weight_decay: float,
         maximize: bool, nesterov: bool, multiplier: Tensor | None, skip: Tensor | None) -> None:  # fmt: skip
    """As sophia._step."""
    bucket.table.launch(
        "step", bucket, multiplier, skip, lr if isinstance(lr, Tensor) else float(lr), float(1 - beta1),
        float(weight_decay), float(rho), float(_EPS if eps is None else eps), _log2(beta2),
        TENSOR_LR=isinstance(lr, Tensor), FLOOR=eps is not None, MAXIMIZE=bool(maximize),
        CORRECT=bool(bucket.group["bias_correction"]), NESTEROV=bool(nesterov),
    )  # fmt: skip
    increment_version([*bucket.params, *bucket.exp_avgs])  # a backward pass through the old values is an error


def hessian(bucket: Any, *, beta2: float, scale: float, multiplier: Tensor | None, squared: bool,
            skip: Tensor | None) -> None:  # fmt: skip
    """As sophia._hessian."""
    args = (multiplier, skip, float(1 - beta2), float(scale))
    bucket.table.launch("hessian", bucket, *args, SQUARED=squared, CORRECT=bool(bucket.group["bias_correction"]))
    increment_version(bucket.hessians)


def square(bucket: Any) -> Tensor:
    """The sum of squares of the gradients, a scalar tensor."""
    return bucket.table.launch("square", bucket, outputs=1).sum()


def sums(bucket: Any, *, beta2: float, rho: float, eps: float | None) -> Tensor:
    """As sophia._sums."""
    args = (float(rho), float(eps or 0.0), _log2(beta2))
    partials = bucket.table.launch("sums", bucket, *args, outputs=4, CORRECT=bucket.group["bias_correction"])
    return partials.sum(1, dtype=torch.float64)


def clip(buckets: list[Any], max_grad_norm: float, grad_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(global gradient norm, the multiplier that clips it), in one launch after those that square.

    As separate small operations this would take as long as the squares.
    """
    squares = _squares(buckets)
    norm, multiplier = squares.new_empty(()), squares.new_empty(())
    with _on(squares.device):
        _clip_kernel[(1,)](
            squares, squares.numel(), grad_scale, norm, multiplier, float(max_grad_norm), BLOCK=8192, num_warps=16
        )
    return norm, multiplier


def check_estimate(buckets: list[Any], scale: float, squared: bool, skipped: Tensor) -> Tensor:
    """1.0 if the gradients' squares are not finite, or 0 everywhere although `squared`; else 0.0. `skipped` counts."""
    squares = _squares(buckets)
    found_inf = squares.new_empty(())
    with _on(squares.device):
        _check_kernel[(1,)](
            squares, squares.numel(), float(scale), found_inf, skipped, SQUARED=squared, BLOCK=8192, num_warps=16
        )
    return found_inf


def _squares(buckets: list[Any]) -> Tensor:
    """The sum of squares of the gradients of every program that took part, (1, programs)."""
    partials = [bucket.table.launch("square", bucket, outputs=1) for bucket in buckets]
    return partials[0] if len(partials) == 1 else torch.cat(partials, dim=1)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else contextlib.nullcontext()


def _log2(beta2: float) -> float:
    return math.log(beta2) / math.log(2) if beta2 else -math.inf


@triton.jit
def _step_kernel(rows, chunks, multiplier, skip, lr, weight, weight_decay, rho, eps, log2_beta2,
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
        gradient_scale = 1.0
        if multiplier is not None:
            gradient_scale = tl.load(multiplier)
        if MAXIMIZE:
            gradient_scale = -gradient_scale
        for i in range(ITERATIONS):
            at = part.to(tl.int64) * (BLOCK * ITERATIONS) + i * BLOCK + tl.arange(0, BLOCK)
            inside = tl.max_constancy(at < numel, VECTOR)
            p_at = tl.multiple_of(params + at, ALIGNMENT)
            m_at = tl.multiple_of(exp_avgs + at, ALIGNMENT)
            g = tl.load(tl.multiple_of(grads + at, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
            m = tl.load(m_at, mask=inside, other=0.0).to(tl.float32)
            h = tl.load(tl.multiple_of(hessians + at, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
            p = tl.load(p_at, mask=inside, other=0.0).to(tl.float32)
            g *= gradient_scale
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
def _hessian_kernel(rows, chunks, multiplier, skip, weight, scale, SQUARED: tl.constexpr, CORRECT: tl.constexpr,
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
        gradient_scale = 1.0
        if multiplier is not None:
            gradient_scale = tl.load(multiplier)
        for i in range(ITERATIONS):
            at = part.to(tl.int64) * (BLOCK * ITERATIONS) + i * BLOCK + tl.arange(0, BLOCK)
            inside = tl.max_constancy(at < numel, VECTOR)
            h_at = tl.multiple_of(hessians + at, ALIGNMENT)
            g = tl.load(tl.multiple_of(grads + at, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
            h = tl.load(h_at, mask=inside, other=0.0).to(tl.float32)
            g *= gradient_scale
            if SQUARED:
                g *= g
            h += weight * (g * scale - h)
            tl.store(h_at, h.to(H), mask=inside)


@triton.jit
def _square_kernel(rows, chunks, partials,
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
def _sum(squares, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, count, BLOCK):
        at = i + tl.arange(0, BLOCK)
        total += tl.load(squares + at, mask=at < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _check_kernel(squares, count, scale, found_inf, skipped, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    total = _sum(squares, count, BLOCK) * scale
    least = 0.0 if SQUARED else -1.0
    bad = tl.where((total > least) & (total < float("inf")), 0.0, 1.0)
    tl.store(found_inf, bad)
    tl.store(skipped, tl.load(skipped) + bad)


@triton.jit
def _clip_kernel(squares, count, grad_scale, norm, multiplier, max_grad_norm, BLOCK: tl.constexpr):
    root = tl.sqrt(_sum(squares, count, BLOCK))
    if grad_scale is not None:
        root /= tl.load(grad_scale)
    tl.store(norm, root)
    tl.store(multiplier, tl.minimum(max_grad_norm / (root + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _sums_kernel(rows, chunks, partials, rho, eps, log2_beta2, CORRECT: tl.constexpr,
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


_KERNELS = {"step": _step_kernel, "hessian": _hessian_kernel, "square": _square_kernel, "sums": _sums_kernel}
