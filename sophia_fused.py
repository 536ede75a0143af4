"""The Triton kernels of `sophia.py`: one launch for all tensors alike, which reads and writes every number once.

Keep this file beside sophia.py and pass `fused=True`. Needs Triton (`pip install triton`).
"""

import array
import contextlib
import functools
import math
import operator
import os
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements a program works on at a time, how many times, warps: by `bench.py optimizer --tune` of commit 2d97060.
LAUNCH = {"step": (1024, 1, 4), "hessian": (2048, 1, 4), "square": (1024, 8, 4), "sums": (4096, 2, 8)}
_CAPTURES = 16  # CUDA graphs that can be captured after one eager call
_ROW = 8  # integers a tensor, see PointerTable
_dtype = operator.attrgetter("dtype")
_EPS = 1e-15  # sophia.py's


def check(params: list[Tensor]) -> None:
    """Raise RuntimeError if the kernels cannot run on these parameters. On a CPU they run in Triton's interpreter."""
    devices = ["cuda", "cpu"] if os.environ.get("TRITON_INTERPRET") == "1" else ["cuda"]
    for param in params:
        if param.device.type not in devices or not param.is_floating_point():
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
            planned = bool(result) and all(b.pointers and not b.shards for b in result)
            optimizer._cache["plan"] = Plan(optimizer, result) if planned else None
    return result


def _split(bucket: Any, cache: dict[Any, Any]) -> list[Any]:
    """The bucket in parts of one alignment each. The kernels' parts keep addresses and no tensor of this step."""
    parts: dict[int, Any] = {}
    count_key = "hessian_step" if bucket.group["bias_correction"] else "step"
    entries = list(zip(bucket.states, bucket.params, bucket.grads, bucket.exp_avgs, bucket.hessians, strict=True))
    for state, *tensors in entries:
        step, count = state["step"], state[count_key]
        row, alignment = _row((*tensors, step, count))
        part = parts.setdefault(alignment, SimpleNamespace(rows=[], origins=[], entries=[]))
        part.rows += row
        part.origins.append((tensors[0], state, *tensors[2:], step, count, count_key))
        part.entries.append((state, *tensors))
    result = []
    for alignment, part in parts.items():
        made = type(bucket)(bucket.key, bucket.group, part.entries)
        made.alignment, made.rows, made.origins = alignment, part.rows, part.origins
        if alignment:
            made.pointers = cache.setdefault((bucket.key, alignment), PointerTable())
            made.params, made.grads, made.exp_avgs, made.hessians = [], [], [], []
        result.append(made)
    return result


def _row(tensors: tuple[Tensor, ...]) -> tuple[list[int], int]:
    """A row of the PointerTable and its alignment: 16 or 1, or 0 if the kernels cannot take the tensors.

    tensors: parameter, gradient, exp_avg, hessian, step, hessian_step.
    """
    param = tensors[0]
    if not all(t.is_contiguous() for t in tensors):
        strides = torch.empty_like(param, device="meta").stride()  # param's own if it is dense
        if any(t.stride() != strides for t in tensors[:4]):
            return [], 0
    if any(t.dtype not in (torch.float32, torch.bfloat16, torch.float16) for t in tensors):
        return [], 0
    p, g, m, h, *counts = [t.data_ptr() for t in tensors]
    numel = param.numel()
    return [p, g, m, h, *counts, numel, 0], 16 if not (p | g | m | h) % 16 and not numel % 8 else 1


class PointerTable:
    """The addresses of a bucket's tensors, on its device.

    rows: int64 (tensors, 8): addresses of parameter, gradient, exp_avg, hessian, step, hessian_step; elements; unused.
    chunks: for each kernel, int32 (programs, 2): the tensor that a program works on, and which part of it.
    Gradients move from step to step. New addresses travel in pinned memory without a sync. torch's allocator does not
    reuse that memory before the copy is done.
    """

    def __init__(self) -> None:
        self.host_rows: list[int] | None = None
        self.numels: list[int] | None = None
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
        staging = torch.frombuffer(
            array.array("q", bucket.rows), dtype=torch.int64
        )  # torch.tensor takes 5 times longer
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
        staging.copy_(torch.tensor(bucket.rows, dtype=torch.int64))
        table = PointerTable()
        table.rows, table.chunks = torch.empty(staging.shape, dtype=torch.int64, device=bucket.device), self.chunks
        table.rows.copy_(staging, non_blocking=True)
        self.captured.append((staging, table))  # the graph needs both for as long as it lives
        return table

    def _chunks(self, block: int, iterations: int, device: torch.device) -> Tensor:
        assert self.numels is not None
        parts = torch.tensor([max(1, -(-n // (block * iterations))) for n in self.numels])
        tensor = torch.arange(len(parts)).repeat_interleave(parts)
        part = torch.arange(len(tensor)) - (parts.cumsum(0) - parts)[tensor]
        return torch.stack([tensor, part], dim=1).to(device, torch.int32)

    def launch(self, name: str, bucket: Any, *args: Any, outputs: int = 0, **constants: bool) -> Tensor | None:
        """Run the kernel. With outputs, returns float32 (outputs, programs): the numbers that each program puts out."""
        block, iterations, warps = LAUNCH[name]
        chunks = self.chunks[LAUNCH[name]]
        partials = torch.empty(outputs, len(chunks), dtype=torch.float32, device=bucket.device) if outputs else None
        types = [getattr(tl, str(dtype).removeprefix("torch.")) for dtype in bucket.dtypes]
        with _on(bucket.device):
            _KERNELS[name][(len(chunks),)](
                self.rows, chunks, *([] if partials is None else [partials]), *args, **constants,
                P=types[0], G=types[1], M=types[2], H=types[3],
                ALIGNMENT=bucket.alignment, VECTOR=8 if bucket.alignment > 1 else 1,
                BLOCK=block, ITERATIONS=iterations, num_warps=warps,
            )  # fmt: skip
        return partials


class Plan:
    """The buckets of one call, to be used again with new gradients: this keeps the host ahead of the GPU.

    It holds while groups, parameters, states and their addresses are the same objects and numbers as then.
    """

    def __init__(self, optimizer: Any, buckets: list[Any]) -> None:
        self.buckets = buckets
        origins = [origin for bucket in buckets for origin in bucket.origins]
        self.tensors = [t for param, _, exp_avg, hessian, *_ in origins for t in (param, exp_avg, hessian)]
        self.addresses = [t.data_ptr() for t in self.tensors]
        used = {id(origin[0]) for origin in origins}
        self.idle = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in used]
        self.key = self._key(optimizer)
        self.alive = optimizer.state, dict(optimizer.state)  # as long as they live no other object has their ids

    @staticmethod
    def _key(optimizer: Any) -> Any:
        groups = [(id(g), g["bias_correction"], *map(id, g["params"])) for g in optimizer.param_groups]
        return id(optimizer.state), groups, [*map(id, optimizer.state)], [*map(id, optimizer.state.values())]

    def refresh(self, optimizer: Any) -> list[Any] | None:
        """The buckets with the gradients' new addresses, or None if anything else has changed."""
        if self.key != self._key(optimizer) or self.addresses != [*map(Tensor.data_ptr, self.tensors)]:
            return None
        if any(param.grad is not None for param in self.idle):
            return None
        return self.buckets if all(map(self._refresh, self.buckets)) else None

    @staticmethod
    def _refresh(bucket: Any) -> bool:
        for _, state, exp_avg, hessian, step, count, key in bucket.origins:
            if (
                state.get("exp_avg") is not exp_avg
                or state.get("hessian") is not hessian
                or state.get("step") is not step
                or state.get(key) is not count
            ):
                return False
        rows = bucket.rows.copy()
        try:
            grads = [origin[0].grad for origin in bucket.origins]
            rows[1::_ROW] = addresses = [*map(Tensor.data_ptr, grads)]
            alike = set(map(_dtype, grads)) == {bucket.dtypes[1]} and all(map(Tensor.is_contiguous, grads))
            fits = alike and [*map(Tensor.numel, grads)] == rows[6::_ROW]
        except (RuntimeError, TypeError):  # a sparse gradient has no address, None even less
            return False
        if not fits or functools.reduce(operator.or_, addresses) & (bucket.alignment - 1):
            return False
        bucket.rows = rows
        return True


def step(bucket: Any, *, lr: Any, beta1: float, beta2: float, rho: float, eps: float | None, weight_decay: float,
         maximize: bool, nesterov: bool, multiplier: Tensor | None, skip: Tensor | None) -> None:  # fmt: skip
    """As sophia._step."""
    bucket.table.launch(
        "step", bucket, multiplier, skip, lr if isinstance(lr, Tensor) else float(lr), float(1 - beta1),
        float(weight_decay), float(rho), float(_EPS if eps is None else eps), _log2(beta2),
        TENSOR_LR=isinstance(lr, Tensor), FLOOR=eps is not None, MAXIMIZE=bool(maximize),
        CORRECT=bool(bucket.group["bias_correction"]), NESTEROV=bool(nesterov),
    )  # fmt: skip


def hessian(bucket: Any, *, beta2: float, scale: float, multiplier: Tensor | None, squared: bool,
            skip: Tensor | None) -> None:  # fmt: skip
    """As sophia._hessian."""
    args = (multiplier, skip, float(1 - beta2), float(scale))
    bucket.table.launch("hessian", bucket, *args, SQUARED=squared, CORRECT=bool(bucket.group["bias_correction"]))


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
    partials = [bucket.table.launch("square", bucket, outputs=1)[0] for bucket in buckets]
    squares = partials[0] if len(partials) == 1 else torch.cat(partials)
    norm, multiplier = squares.new_empty(()), squares.new_empty(())
    with _on(squares.device):
        _clip_kernel[(1,)](
            squares, squares.numel(), grad_scale, norm, multiplier, float(max_grad_norm), BLOCK=8192, num_warps=16
        )
    return norm, multiplier


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


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
def _clip_kernel(squares, count, grad_scale, norm, multiplier, max_grad_norm, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, count, BLOCK):
        at = i + tl.arange(0, BLOCK)
        total += tl.load(squares + at, mask=at < count, other=0.0)
    root = tl.sqrt(tl.sum(total, 0))
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
