"""The Triton kernels of `muon.py`: what surrounds the matrix products, one launch a batch that reads every number once.

Keep this file beside muon.py and pass `fused=True`. Needs Triton (`pip install triton`).
"""

import contextlib
import functools
import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

LAUNCH = (1024, 4, 4)  # elements a program works on at a time, how many times, warps
_DTYPES = torch.float32, torch.bfloat16, torch.float16


def fits(*lists: Sequence[Tensor]) -> bool:
    """Whether the kernels can take these tensors. On a CPU they run in Triton's interpreter."""
    device = lists[0][0].device.type
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return False
    if device == "cuda" and torch.cuda.is_current_stream_capturing():  # a replay would copy stale addresses
        return False
    return all(t.dtype in _DTYPES and t.is_contiguous() and not t.is_neg() for tensors in lists for t in tensors)


def average(averages: Sequence[Tensor], values: Sequence[Tensor], weight: float, found_inf: Tensor | None = None,
            grad_scale: Tensor | None = None, nesterov: bool = False, moved: Tensor | None = None,
            copies: Tensor | None = None) -> None:  # fmt: skip
    """a <- a + weight (v - a), with v the value divided by grad_scale, or a itself if found_inf is not 0.

    averages, values: tensors of one dtype each, in pairs of as many elements. found_inf, grad_scale: scalars on their
    device. moved, copies: (tensors, ...), take a + weight (v - a) of the new a (a itself without nesterov), and v.
    """
    nothing = [0] * len(averages)
    columns = [
        _addresses(averages),
        _addresses(values),
        nothing if moved is None else _addresses(list(moved)),
        nothing if copies is None else _addresses(list(copies)),
    ]
    out = averages[0].dtype if moved is None else moved.dtype
    _launch(
        _average_kernel, columns, averages, found_inf, grad_scale, float(weight), A=averages[0].dtype,
        V=values[0].dtype, OUT=out, NESTEROV=nesterov, MOVED=moved is not None, COPIES=copies is not None,
    )  # fmt: skip


def apply(params: Sequence[Tensor], updates: Tensor, scale: float, lr: float | Tensor, weight_decay: float,
          cautious: bool, found_inf: Tensor | None) -> None:  # fmt: skip
    """p <- (1 - lr weight_decay) p - lr scale update; nothing if found_inf is not 0. updates: (params, ...)."""
    columns = [_addresses(params), _addresses(list(updates.contiguous()))]
    _launch(
        _apply_kernel, columns, params, found_inf, lr if isinstance(lr, Tensor) else float(lr), float(scale),
        float(weight_decay), P=params[0].dtype, U=updates.dtype, TENSOR_LR=isinstance(lr, Tensor), CAUTIOUS=cautious,
    )  # fmt: skip


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [*map(Tensor.data_ptr, tensors)]


def _launch(kernel, columns, tensors, *args, **constants) -> None:
    """Run a kernel whose rows are the columns' addresses and the number of elements of each of `tensors`."""
    device, block, iterations = tensors[0].device, *LAUNCH[:2]
    numels = tuple(map(Tensor.numel, tensors))
    aligned = not any(address % 16 for column in columns for address in column) and not any(n % 8 for n in numels)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    rows = _rows(tuple(x for row in zip(*columns, numels, strict=True) for x in row), device, stream)
    chunks = _chunks(numels, block * iterations, device)
    constants = {k: getattr(tl, str(v).removeprefix("torch.")) if isinstance(v, torch.dtype) else v
                 for k, v in constants.items()}  # fmt: skip
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(len(chunks),)](rows, chunks, *args, **constants, ALIGNMENT=16 if aligned else 1,
                               VECTOR=8 if aligned else 1, BLOCK=block, ITERATIONS=iterations,
                               num_warps=LAUNCH[2])  # fmt: skip


@functools.lru_cache(maxsize=256)
def _rows(numbers: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """int64 (rows x columns,). In most steps all tensors are where they were, and then nothing is copied."""
    rows = torch.tensor(numbers, dtype=torch.int64)
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows


@functools.lru_cache(maxsize=64)
def _chunks(numels: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """int32 (programs, 2): the tensor that a program works on, and which part of it."""
    parts = [(i, part) for i, n in enumerate(numels) for part in range(-(-n // size))]
    return torch.tensor(parts, dtype=torch.int32).to(device)


@triton.jit
def _average_kernel(rows, chunks, found_inf, grad_scale, weight, A: tl.constexpr, V: tl.constexpr, OUT: tl.constexpr,
                    NESTEROV: tl.constexpr, MOVED: tl.constexpr, COPIES: tl.constexpr, ALIGNMENT: tl.constexpr,
                    VECTOR: tl.constexpr, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr):  # fmt: skip
    row = rows + tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64) * 5
    part = tl.load(chunks + 2 * tl.program_id(0) + 1)
    averages = tl.load(row).to(tl.pointer_type(A))
    values = tl.load(row + 1).to(tl.pointer_type(V))
    moved = tl.load(row + 2).to(tl.pointer_type(OUT))
    copies = tl.load(row + 3).to(tl.pointer_type(OUT))
    numel = tl.load(row + 4)
    divisor = 1.0
    if grad_scale is not None:
        divisor = tl.load(grad_scale).to(tl.float32)
    go = True
    if found_inf is not None:
        go = tl.load(found_inf) == 0
    for i in range(ITERATIONS):
        at = part.to(tl.int64) * (BLOCK * ITERATIONS) + i * BLOCK + tl.arange(0, BLOCK)
        inside = tl.max_constancy(at < numel, VECTOR)
        a_at = tl.multiple_of(averages + at, ALIGNMENT)
        a = tl.load(a_at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(tl.multiple_of(values + at, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
        v = tl.where(go, v / divisor, a)
        a += weight * (v - a)
        tl.store(a_at, a.to(A), mask=inside)
        if MOVED:
            x = a + weight * (v - a) if NESTEROV else a
            tl.store(tl.multiple_of(moved + at, ALIGNMENT), x.to(OUT), mask=inside)
        if COPIES:
            tl.store(tl.multiple_of(copies + at, ALIGNMENT), v.to(OUT), mask=inside)


@triton.jit
def _apply_kernel(rows, chunks, found_inf, lr, scale, weight_decay, P: tl.constexpr, U: tl.constexpr,
                  TENSOR_LR: tl.constexpr, CAUTIOUS: tl.constexpr, ALIGNMENT: tl.constexpr, VECTOR: tl.constexpr,
                  BLOCK: tl.constexpr, ITERATIONS: tl.constexpr):  # fmt: skip
    row = rows + tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64) * 3
    part = tl.load(chunks + 2 * tl.program_id(0) + 1)
    params = tl.load(row).to(tl.pointer_type(P))
    updates = tl.load(row + 1).to(tl.pointer_type(U))
    numel = tl.load(row + 2)
    rate = lr
    if TENSOR_LR:
        rate = tl.load(lr).to(tl.float32)
    go = True
    if found_inf is not None:
        go = tl.load(found_inf) == 0
    if go:
        for i in range(ITERATIONS):
            at = part.to(tl.int64) * (BLOCK * ITERATIONS) + i * BLOCK + tl.arange(0, BLOCK)
            inside = tl.max_constancy(at < numel, VECTOR)
            p_at = tl.multiple_of(params + at, ALIGNMENT)
            p = tl.load(p_at, mask=inside, other=0.0).to(tl.float32)
            u = tl.load(tl.multiple_of(updates + at, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
            decay = rate * weight_decay
            if CAUTIOUS:
                p = p * (1.0 - tl.where(p * u > 0, decay, 0.0)) - rate * scale * u
            else:
                p = p * (1.0 - decay) - rate * scale * u
            tl.store(p_at, p.to(P), mask=inside)
