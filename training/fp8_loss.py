"""The output matrix and its cross-entropy in FP8 on Hopper GPUs. The logits exist only inside a matrix product.

if fits_fp8(hidden, weight):
    total, d_hidden, d_weight, rows = fp8_gradients(hidden, weight, targets)
"""

import functools

import torch

LOG2_E = 1.4426950408889634
ELEMENTS = 2**30  # exponentials in a chunk: 2 GiB with their transpose, as much as a chunk of logits in bf16
SAMPLE = 4096  # classes that set a row's reference; byte-pair tokenizers number frequent tokens first
MOST = 1792.0  # 57344, the largest e5m2, over the factor of 2^5 with which exponentials are stored
ROWS = 8192  # hidden states in a chunk, at least
TILE = 128, 256, 128, 8  # rows, columns, depth and warps of a tile of logits; the best of six on an H200


def is_hopper(device):
    """Whether a device of type "cuda" is one; an AMD GPU may have the same capability."""
    return not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


def fits_fp8(hidden, weight):
    """Whether `fp8_gradients` can serve them: bf16 and float32 on a Hopper GPU, dense, sizes of multiples of 16.

    Fewer than ROWS rows stay in bf16, where the kernels were not tried.
    """
    return (
        hidden.is_cuda
        and (hidden.dtype, type(weight.data), weight.dtype) == (torch.bfloat16, torch.Tensor, torch.float32)
        and is_hopper(hidden.device)
        and len(hidden) >= ROWS
        and not any(size % 16 for size in (*hidden.shape, len(weight)))
        and hidden.is_contiguous()
        and weight.is_contiguous()
    )


def fp8_gradients(hidden, weight, targets):
    """The sum of the cross-entropies of hidden (N, C) @ weight.T (C, V) with labels targets (N,), and its gradients.

    Returns total, d_hidden (N, C) bf16, d_weight (V, C) float32, and the rows (int64) that all three leave out because
    e5m2 cannot hold them. The caller adds those rows in bf16.

    hidden and weight are rounded to e4m3 with one scale each. One product computes the logits x and stores
    2^5 exp(x - r) in e5m2, in both layouts that the gradients' products need. r is the log-sum-exp of the label and the
    first SAMPLE classes. The loss has the sum over all classes, in float32. The label's entry, the largest of a row's
    gradient, is added in float32.

    A gradient is a small difference of large sums, so sums of probabilities must not be off by a percent. Three things
    keep them right: Hopper's fast accumulation, which cuts off small terms, is off for the gradients' products; the
    label's logit comes from the same product as the other logits; and its row is rounded as the other rows are.
    """
    kernels, (n_rows, width), n_classes = _kernels(), hidden.shape, len(weight)
    largest = (torch.linalg.vector_norm(x, float("inf")).float() for x in (hidden, weight))
    scale_h, scale_w = (448 / x.clamp(min=1e-12) for x in largest)  # 448 is the largest e4m3
    back_h, back_w, back_e = 1 / scale_h, 1 / scale_w, torch.full_like(scale_h, 2.0**-5)
    h8, w8 = _cast(hidden, scale_h), _cast(weight, scale_w)
    w8_t = _transposed(w8)
    alpha = back_h * back_w * LOG2_E  # logits in base 2
    own, reference, sums, factors = torch.zeros(4, n_rows, device=hidden.device)
    own += torch.nan  # of a label that is no class
    factors += 1
    d_hidden, d_weight = torch.empty_like(hidden), None
    chunks = min(-(-n_rows * n_classes // ELEMENTS), max(n_rows // ROWS, 1))
    most = -(-n_rows // chunks // 128) * 128
    room = torch.empty(2, most * n_classes, dtype=torch.float8_e5m2, device=hidden.device)
    left_out = torch.zeros((), dtype=torch.int64, pin_memory=hidden.is_cuda)
    event = torch.cuda.Event() if hidden.is_cuda else None
    tensors = hidden, h8, targets, d_hidden, own, reference, sums, factors
    for h, q, t, d_h, o, r, s, f in zip(*(x.split(most) for x in tensors), strict=True):
        n = len(h)
        e, e_t = room[0, : n * n_classes].view(n, n_classes), room[1, : n * n_classes].view(n_classes, n)
        sample = _product(q, w8[:SAMPLE].t(), back_h, back_w, torch.bfloat16)
        kernels["reference"][(n,)](
            sample, q, w8, t, alpha, r, sample.shape[1], n_classes, width,
            SAMPLE=_power_of_2(sample.shape[1]), WIDTH=_power_of_2(width), num_warps=8,
        )  # fmt: skip
        _exponentials(q, w8, e, e_t, t, o, r, s, alpha)
        f.copy_(torch.where((s >= 0.5) & (s <= MOST), 1 / s, 0.0))
        left_out.copy_((factors == 0).sum(), non_blocking=True)
        if event:
            event.record()
        h8_t = _transposed(_cast(h, scale_h / 2, f))  # a factor may be 2
        _product(e, w8_t.t(), back_e, back_w, torch.bfloat16, out=d_h)
        product = _product(e_t, h8_t.t(), back_e, back_h * 2, torch.float32)
        d_weight = product if d_weight is None else d_weight.add_(product)
    kernels["label"][(n_rows,)](
        d_hidden, h8, w8, back_h, back_w, targets, factors, own, reference, d_weight, n_classes, width,
        WIDTH=_power_of_2(width), num_warps=4,
    )  # fmt: skip
    losses = torch.where(factors > 0, (sums.log2() + reference - own) / LOG2_E, 0.0)
    if event:
        event.synchronize()  # the device still has the last chunk's products to do, so it does not fall idle
    rows = (factors == 0).nonzero().flatten() if left_out.item() else targets[:0]
    return losses.sum(), d_hidden, d_weight, rows


def gradient_errors(width, n_classes, device, n_rows=ROWS):
    """Errors of the gradients for random numbers: a check of the kernels on this GPU.

    Returns the relative errors of d_hidden and d_weight against bf16, and the mean error of a row's sum of
    probabilities. That sum is 1, so d_weight summed over the classes is 0. The logits have a standard deviation of 3,
    so that the labels' entries do not hide the rest of the gradient.
    """
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n_rows, width, generator=generator, device=device)
    hidden = ((hidden + 1) / 2**0.5).bfloat16()  # with a mean, so that errors of the sums add up
    weight = torch.randn(n_classes, width, generator=generator, device=device) * 3 / width**0.5
    targets = torch.randint(n_classes, (n_rows,), generator=generator, device=device)
    _, d_hidden, d_weight, rows = fp8_gradients(hidden, weight, targets)
    kept = torch.ones(n_rows, device=device).index_fill(0, rows, 0)
    narrow, expected_h, expected_w = weight.bfloat16(), torch.empty_like(hidden), torch.zeros_like(weight)
    for h, t, k, out in zip(*(x.split(1024) for x in (hidden, targets, kept, expected_h)), strict=True):
        gradient = (h @ narrow.t()).float().softmax(1)
        gradient[torch.arange(len(t), device=device), t] -= 1
        gradient = (gradient * k[:, None]).bfloat16()
        out.copy_(gradient @ narrow)
        expected_w += (gradient.t() @ h).float()
    pairs = (d_hidden.float(), expected_h.float()), (d_weight, expected_w)
    errors = [((got - wanted).norm() / wanted.norm()).item() for got, wanted in pairs]
    return *errors, (d_weight.sum(0).norm() / (hidden * kept[:, None]).sum(0, dtype=torch.float32).norm()).item()


def _power_of_2(size):
    return 1 << (size - 1).bit_length()


def _product(a, b, scale_a, scale_b, dtype, out=None):
    """a (row-major) @ b (column-major), both FP8 times their scales."""
    if out is None:
        return torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=dtype, use_fast_accum=False)
    return torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=dtype, use_fast_accum=False, out=out)


def _cast(source, scale, factors=None):
    """source * scale, times a factor for each row, in e4m3."""
    out = torch.empty(source.shape, dtype=torch.float8_e4m3fn, device=source.device)
    grid = tuple(-(-size // 64) for size in source.shape)
    _kernels()["cast"][grid](source, factors, scale, out, *source.shape, BLOCK=64, num_warps=4)
    return out


def _transposed(x):
    """The transpose in memory. By torch: Triton 3.6 left elements of a transposed tile of FP8 unwritten (H200)."""
    return x.view(torch.uint8).t().contiguous().view(x.dtype)


def _exponentials(a, b, out, out_t, targets, own, reference, sums, alpha):
    """out <- 2^5 * 2^(alpha a b^T - reference) in e5m2, 0 for the label; out_t its transpose.

    own <- the label's logit in base 2, sums += the rows' sums of exponentials, the label's included.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    (m, k), n, (rows, columns, depth, warps) = a.shape, len(b), TILE
    programs = -(-m // rows) * -(-n // columns)
    if a.is_cuda:
        programs = min(programs, torch.cuda.get_device_properties(a.device).multi_processor_count)
    shapes = (a, rows, depth), (b, columns, depth), (out, rows, columns), (out_t, columns, rows)
    _kernels()["exponentials"][(programs,)](
        *(TensorDescriptor.from_tensor(x, list(block)) for x, *block in shapes),
        targets, own, reference, sums, alpha, m, n, k,
        ROWS=rows, COLUMNS=columns, DEPTH=depth, GROUP=8, STEP=programs, num_warps=warps, num_stages=3,
    )  # fmt: skip


@functools.cache
def _kernels():
    import triton
    import triton.language as tl

    @triton.jit
    def cast(source, factors, scale, out, rows, columns, BLOCK: tl.constexpr):
        r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        at = r.to(tl.int64)[:, None] * columns + c[None, :]
        x = tl.load(source + at, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
        if factors is not None:
            x = x * tl.load(factors + r, mask=r < rows, other=0.0)[:, None]
        tl.store(out + at, tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv), mask=inside)

    @triton.jit
    def reference(
        sample, hidden, weight, targets, alpha, out, columns, classes, width,
        SAMPLE: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """out <- log-sum-exp of the sample and the label, in base 2."""
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, WIDTH)
        a = tl.load(hidden + row * width + at, mask=at < width, other=0.0).to(tl.float32)
        target = tl.load(targets + row)
        known = (target >= 0) & (target < classes)
        b = tl.load(weight + target * width + at, mask=(at < width) & known, other=0.0).to(tl.float32)
        label = tl.sum(a * b) * tl.load(alpha)
        at = tl.arange(0, SAMPLE)
        x = tl.load(sample + row * columns + at, mask=at < columns, other=-float("inf")).to(tl.float32)
        x *= 1.4426950408889634
        peak = tl.maximum(tl.max(x), label)
        more = tl.where(target < columns, 0.0, tl.exp2(label - peak))
        tl.store(out + row, peak + tl.log2(tl.sum(tl.exp2(x - peak)) + more))

    @triton.jit
    def exponentials(
        a, b, out, out_t, targets, own, reference, sums, alpha, m, n, k, ROWS: tl.constexpr,
        COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
    ):  # fmt: skip
        """A tile after another for each program; GROUP tiles of rows share the columns' tiles in the cache."""
        num_rows, num_columns = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
        scale = tl.load(alpha)
        for tile in tl.range(tl.program_id(0), num_rows * num_columns, STEP, flatten=True):
            first = tile // (GROUP * num_columns) * GROUP
            size = tl.minimum(num_rows - first, GROUP)
            row = (first + tile % (GROUP * num_columns) % size) * ROWS
            column = tile % (GROUP * num_columns) // size * COLUMNS
            logits = tl.zeros((ROWS, COLUMNS), tl.float32)
            for depth in range(0, k, DEPTH):
                logits = tl.dot(a.load([row, depth]), b.load([column, depth]).T, logits)
            r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
            shift = tl.load(reference + r, mask=r < m, other=0.0)
            target = tl.load(targets + r, mask=r < m, other=-1).to(tl.int32)
            labels = c[None, :] == target[:, None]
            here = (target >= column) & (target < tl.minimum(column + COLUMNS, n))
            tl.store(own + r, tl.sum(tl.where(labels, logits, 0.0), axis=1) * scale, mask=here)
            e = tl.exp2(tl.minimum(logits * scale - shift[:, None], 100.0))
            e = tl.where(c[None, :] < n, e, 0.0)
            tl.atomic_add(sums + r, tl.sum(e, axis=1), mask=r < m, sem="relaxed")
            e8 = tl.where(labels, 0.0, tl.minimum(e * 32.0, 57344.0)).to(tl.float8e5)
            out.store([row, column], e8)
            out_t.store([column, row], tl.trans(e8))

    @triton.jit
    def label(
        d_hidden, hidden, weight, back_h, back_w, targets, factors, own, reference, d_weight, classes, width,
        WIDTH: tl.constexpr,
    ):  # fmt: skip
        """d_hidden <- factor * d_hidden + (p - 1) * the label's weight, d_weight += (p - 1) * hidden at the label."""
        row = tl.program_id(0).to(tl.int64)
        target, factor = tl.load(targets + row), tl.load(factors + row)
        known = (target >= 0) & (target < classes)
        target *= width
        excess = tl.exp2(tl.load(own + row) - tl.load(reference + row)) * factor - 1.0  # p - 1
        excess = tl.where(factor > 0, excess, 0.0)
        at = tl.arange(0, WIDTH)
        inside = at < width
        gradient = tl.load(d_hidden + row * width + at, mask=inside).to(tl.float32) * factor
        w = tl.load(weight + target + at, mask=inside & known, other=0.0).to(tl.float32) * tl.load(back_w)
        gradient += excess * w
        tl.store(d_hidden + row * width + at, gradient.to(d_hidden.dtype.element_ty), mask=inside)
        h = tl.load(hidden + row * width + at, mask=inside).to(tl.float32) * tl.load(back_h)
        tl.atomic_add(d_weight + target + at, excess * h, mask=inside & known, sem="relaxed")

    return {"cast": cast, "reference": reference, "exponentials": exponentials, "label": label}
