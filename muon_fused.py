"""The Triton kernels of `muon.py`: matrix products with symmetric results, and what surrounds the products.

The latter take one launch a batch and read every number once. Keep this file beside muon.py and pass `fused=True`.
Needs Triton (`pip install triton`).
"""

import contextlib
import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

LAUNCH = (1024, 4, 4)  # elements a program works on at a time, how many times, warps
TILE = (128, 64, 3, 4)  # of a symmetric product: rows and columns, depth, stages, warps
_DTYPES = torch.float32, torch.bfloat16, torch.float16


def fits(*lists: Sequence[Tensor]) -> bool:
    """Whether the kernels can take lists of tensors of one dtype each. On a CPU they run in Triton's interpreter."""
    device = lists[0][0].device.type
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return False
    if device == "cuda" and torch.cuda.is_current_stream_capturing():  # a replay would copy stale addresses
        return False
    return all(
        tensors[0].dtype in _DTYPES
        and all(map(Tensor.is_contiguous, tensors))
        and all(map(Tensor.data_ptr, tensors))  # zeros without memory and subclasses that wrap tensors have none
        and not any(map(Tensor.is_neg, tensors))
        for tensors in lists
    )


def average(averages: Sequence[Tensor], values: Sequence[Tensor], weight: float, found_inf: Tensor | None = None,
            grad_scale: Tensor | None = None, nesterov: bool = False, moved: Tensor | None = None,
            copies: Tensor | None = None) -> None:  # fmt: skip
    """a <- a + weight (v - a), with v the value divided by grad_scale, or a itself if found_inf is not 0.

    averages, values: tensors of one dtype each, in pairs of as many elements. found_inf, grad_scale: scalars on their
    device. moved, copies: (tensors, ...), take a + weight (v - a) of the new a (a itself without nesterov), and v.
    """
    nothing = (0,) * len(averages)
    columns = [_addresses(averages), _addresses(values)]
    columns += [nothing if stack is None else _addresses(stack) for stack in (moved, copies)]
    out = averages[0].dtype if moved is None else moved.dtype
    _launch(
        _average_kernel, columns, averages, found_inf, grad_scale, float(weight), A=_type(averages[0].dtype),
        V=_type(values[0].dtype), OUT=_type(out), NESTEROV=nesterov, MOVED=moved is not None, COPIES=copies is not None,
    )  # fmt: skip
    increment_version(averages)


def apply(params: Sequence[Tensor], updates: Tensor, scale: float, lr: float | Tensor, weight_decay: float,
          cautious: bool, found_inf: Tensor | None, ratios: Tensor | None = None) -> None:  # fmt: skip
    """p <- (1 - lr weight_decay) p - lr scale ratio update; nothing if found_inf is not 0.

    updates: (params, ...). ratios: one for each, in float32; where it is 0 the update counts as 0, finite or not.
    """
    updates = updates.contiguous()  # a copy has to live until the launch
    columns = [_addresses(params), _addresses(updates)]
    _launch(
        _apply_kernel, columns, params, found_inf, lr if isinstance(lr, Tensor) else float(lr), float(scale),
        float(weight_decay), ratios, P=_type(params[0].dtype), U=_type(updates.dtype), TENSOR_LR=isinstance(lr, Tensor),
        CAUTIOUS=cautious,
    )  # fmt: skip
    increment_version(params)  # so that a backward pass through the old values is an error


def symmetric_product(x: Tensor, y: Tensor, alpha: float = 1.0, addend: Tensor | None = None, beta: float = 0.0,
                      diagonal: float = 0.0, scales: Tensor | None = None) -> Tensor:  # fmt: skip
    """scales (alpha x y^T + beta addend + diagonal I), of which one triangle is computed and mirrored.

    x, y: (matrices, width, depth) with symmetric x y^T, on any strides. addend: (matrices, width, width), contiguous.
    scales: one for each matrix, in float32. Sums are in float32, the result in x's dtype.
    """
    out = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
    left = x[:, None]
    _multiply(left, left if y is x else y[:, None], out, None, addend, scales, None, alpha, beta, diagonal)
    return out


def average_products(averages: Sequence[Tensor], x: Tensor, weight: float, scale: float = 1.0,
                     found_inf: Tensor | None = None) -> None:  # fmt: skip
    """a <- a + weight (scale x x^T - a), unless found_inf is not 0.

    averages: contiguous, (some matrices, blocks, width, width) each, in the order of x's matrices. x: (all matrices,
    blocks, width, depth), on any strides.
    """
    size = x.shape[2] ** 2 * averages[0].itemsize
    starts = [average.data_ptr() for average in averages]
    addresses = (*(a for s, t in zip(starts, averages, strict=True) for a in range(s, s + t.nbytes, size)),)
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    _multiply(
        x, x, averages[0], _places(addresses, x.device, stream), None, None, found_inf, weight * scale, 1 - weight, 0.0
    )
    increment_version(averages)


def _multiply(x, y, out, places, addend, scales, found_inf, alpha, beta, diagonal) -> None:
    """Launch a program for each tile on and below the diagonals. x, y: (matrices, blocks, width, depth)."""
    matrices, blocks, width, depth = x.shape
    tile, step, stages, warps = TILE
    tiles = -(-width // tile)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _symmetric_kernel[(matrices * blocks * (tiles * (tiles + 1) // 2),)](
            x, y, out, places, addend, scales, found_inf, float(alpha), float(beta), float(diagonal), blocks, width,
            depth, *x.stride(), *y.stride(), TWO=y is not x, EVEN=width % tile == 0 and depth % step == 0,
            TILE=tile, STEP=step, num_stages=stages, num_warps=warps,
        )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _places(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    places = torch.tensor(addresses, dtype=torch.int64, device="cpu")
    return places.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else places


def _addresses(tensors: Sequence[Tensor] | Tensor) -> tuple[int, ...]:
    """Those of tensors, or of the parts of one along its first dimension."""
    if isinstance(tensors, Tensor):
        first, size = tensors.data_ptr(), tensors.nbytes
        return (*range(first, first + size, size // tensors.shape[0]),)
    return (*map(Tensor.data_ptr, tensors),)


@functools.cache
def _type(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


def _launch(kernel, columns, tensors, *args, **constants) -> None:
    """Run a kernel whose rows are the columns' addresses and the number of elements of each of `tensors`."""
    device, (block, iterations, warps) = tensors[0].device, LAUNCH
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    columns = (*columns, (*map(Tensor.numel, tensors),))
    rows, chunks, aligned = _table(columns, block * iterations, device, stream)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(chunks.shape[0],)](rows, chunks, *args, **constants, ALIGNMENT=16 if aligned else 1,
                                   VECTOR=8 if aligned else 1, BLOCK=block, ITERATIONS=iterations,
                                   num_warps=warps)  # fmt: skip


@functools.lru_cache(maxsize=256)
def _table(columns: tuple[tuple[int, ...], ...], size: int, device: torch.device, stream: int) -> Any:
    """The columns row by row, int64; the chunks of `size` elements; whether addresses and numbers of elements are even.

    In most steps all tensors are where they were, and then nothing is copied.
    """
    *addresses, numels = columns
    aligned = not any(x % 16 for column in addresses for x in column) and not any(n % 8 for n in numels)
    rows = torch.tensor([*zip(*columns, strict=True)], dtype=torch.int64, device="cpu")
    rows = rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows
    return rows, _chunks(numels, size, device, stream), aligned


@functools.lru_cache(maxsize=64)
def _chunks(numels: tuple[int, ...], size: int, device: torch.device, stream: int) -> Tensor:
    """int32 (programs, 2): the tensor that a program works on, and which part of it.

    Each stream has its own: torch may give the memory of one that is dropped to other tensors of its stream.
    """
    parts = [(i, part) for i, n in enumerate(numels) for part in range(-(-n // size))]
    return torch.tensor(parts, dtype=torch.int32, device=device)


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
def _apply_kernel(rows, chunks, found_inf, lr, scale, weight_decay, ratios, P: tl.constexpr, U: tl.constexpr,
                  TENSOR_LR: tl.constexpr, CAUTIOUS: tl.constexpr, ALIGNMENT: tl.constexpr, VECTOR: tl.constexpr,
                  BLOCK: tl.constexpr, ITERATIONS: tl.constexpr):  # fmt: skip
    index = tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64)
    row = rows + index * 3
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
            if ratios is not None:
                ratio = tl.load(ratios + index)
                u = tl.where(ratio > 0, u * ratio, 0.0)
            decay = rate * weight_decay
            if CAUTIOUS:
                p = p * (1.0 - tl.where(p * u > 0, decay, 0.0)) - rate * scale * u
            else:
                p = p * (1.0 - decay) - rate * scale * u
            tl.store(p_at, p.to(P), mask=inside)


@triton.jit
def _symmetric_kernel(x, y, out, places, addend, scales, found_inf, alpha, beta, diagonal, blocks, width, depth,
                      x_matrix, x_block, x_row, x_column, y_matrix, y_block, y_row, y_column, EVEN: tl.constexpr,
                      TWO: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    tiles = tl.cdiv(width, TILE)
    pairs = tiles * (tiles + 1) // 2
    matrix = (tl.program_id(0) // pairs).to(tl.int64)
    pair = tl.program_id(0) % pairs
    i = ((tl.sqrt(8.0 * pair + 1.0) - 1.0) * 0.5 + 1e-4).to(tl.int32)  # pair = i (i + 1) / 2 + j with j <= i
    j = pair - i * (i + 1) // 2
    rows, columns, inner = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE), tl.arange(0, STEP)
    x += matrix // blocks * x_matrix + matrix % blocks * x_block
    y += matrix // blocks * y_matrix + matrix % blocks * y_block
    x_at = x + rows[:, None] * x_row + inner[None, :] * x_column
    y_at = y + columns[:, None] * y_row + inner[None, :] * y_column
    product = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, depth, STEP):
        if EVEN:
            a, b = tl.load(x_at), tl.load(y_at)
        else:
            deep = start + inner[None, :] < depth
            a = tl.load(x_at, mask=(rows[:, None] < width) & deep, other=0.0)
            b = tl.load(y_at, mask=(columns[:, None] < width) & deep, other=0.0)
        product = tl.dot(a, b.T, product, input_precision="ieee")
        x_at += STEP * x_column
        y_at += STEP * y_column
    if TWO and i == j:  # x y^T is symmetric up to rounding
        product = (product + product.T) * 0.5
    product *= alpha
    end = width
    if found_inf is not None:
        end = tl.where(tl.load(found_inf) == 0, width, 0)
    inside = (rows[:, None] < end) & (columns[None, :] < end)
    at = rows[:, None] * width + columns[None, :]
    if places is not None:  # averages at addresses of their own
        out = tl.load(places + matrix).to(out.dtype)
        product += beta * tl.load(out + at, mask=inside, other=0.0)
    else:
        out += matrix * width * width
        if addend is not None:
            product += beta * tl.load(addend + matrix * width * width + at, mask=inside, other=0.0).to(tl.float32)
        product += tl.where(rows[:, None] == columns[None, :], diagonal, 0.0)
    if scales is not None:
        product *= tl.load(scales + matrix)
    product = product.to(out.dtype.element_ty)
    tl.store(out + at, product, mask=inside)
    if i != j:
        tl.store(out + columns[:, None] * width + rows[None, :], product.T, mask=inside.T)
