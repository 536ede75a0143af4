"""The output matrix in FP8 against float64: value and gradients, rows that e5m2 cannot hold, and where it is used."""

import functools

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig, cross_entropy
from tests.conftest import read_lines
from train_sophiag import main
from training import fp8_loss as module
from training import run as run_module
from training import step
from training.curvature import label_loss
from training.fp8_loss import fits_fp8, fp8_gradients
from training.loss import LinearLoss

FLOATS = {"fp8e5": torch.float8_e5m2, "fp8e4nv": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16}


def rounded(data, source, target, mode):
    """`data` of one type of Triton's in another, rounded to nearest: the interpreter's own conversion truncates."""
    integers = {1: np.int8, 2: np.int16, 4: np.int32}
    data = torch.from_numpy(np.ascontiguousarray(data).view(integers[data.itemsize]))
    result = data.view(FLOATS.get(str(source), torch.float32)).to(FLOATS.get(str(target), torch.float32))
    return result.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[result.itemsize]).numpy()


def product(a, b, scale_a, scale_b, dtype, out=None):
    result = ((a.float() @ b.float()) * scale_a * scale_b).to(dtype)
    return result if out is None else out.copy_(result)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])  # on the CPU by Triton's interpreter
def device(request, monkeypatch):
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if request.param == "cpu":
        if torch.cuda.is_available():
            pytest.skip("Triton compiles for the GPU here")
        monkeypatch.setattr(interpreter, "_convert_float", rounded)
        monkeypatch.setattr(module, "_product", product)
        monkeypatch.setattr(module, "TILE", (64, 128, 64, 4))
        monkeypatch.setattr(module, "SAMPLE", 96)
        monkeypatch.setattr(module, "ROWS", 128)
    elif torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper")
    return request.param


def case(device):
    """hidden, weight, labels, of which half are the model's own; GPT-2's sizes, or tiny ones on a CPU."""
    rows, width, classes = (16384, 768, 50304) if device == "cuda" else (176, 32, 304)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, device=device).bfloat16()
    weight = torch.randn(classes, width, generator=generator, device=device) * 2.5 / width**0.5
    targets = torch.randint(classes, (rows,), generator=generator, device=device)
    probabilities = torch.softmax(hidden[: rows // 2].float() @ weight.t(), 1)
    targets[: rows // 2] = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def results(loss, hidden, weight):
    """The loss and its gradients, in float64."""
    return [x.double() for x in (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))]


def reference(hidden, weight, targets):
    wide, narrow = hidden.detach().double().requires_grad_(), weight.detach().bfloat16().double().requires_grad_()
    value, d_hidden, d_weight = torch.zeros((), device=hidden.device).double(), [], torch.zeros_like(narrow)
    for h, t in zip(wide.detach().split(2048), targets.split(2048), strict=True):
        h.requires_grad_()
        part = cross_entropy(h @ narrow.t(), t) * (len(h) / len(hidden))
        part_value, part_hidden, part_weight = results(part, h, narrow)
        value, d_weight = value + part_value, d_weight + part_weight
        d_hidden.append(part_hidden)
    return value, torch.cat(d_hidden), d_weight


def assert_close(got, wanted, error=0.06, value=3e-3):
    assert got[0].item() == pytest.approx(wanted[0].item(), rel=value)
    for a, b in zip(got[1:], wanted[1:], strict=True):
        assert torch.isfinite(a).all()
        assert ((a - b).norm() / b.norm()).item() < error
        assert ((a * b).sum() / b.square().sum()).item() == pytest.approx(1, abs=0.02)


def test_loss_and_gradients_are_those_of_float64_up_to_the_rounding_of_fp8(device, monkeypatch):
    hidden, weight, targets = case(device)
    monkeypatch.setattr(module, "ROWS", 64)
    monkeypatch.setattr(module, "ELEMENTS", len(hidden) * len(weight) // 2)
    assert not len(fp8_gradients(hidden.detach(), weight.detach(), targets)[3])
    loss = LinearLoss.apply(hidden, weight, targets, cross_entropy, True)
    assert_close(results(loss, hidden, weight), reference(hidden, weight, targets))


def test_the_check_of_the_kernels_finds_what_is_wrong(device, monkeypatch):
    width, classes, rows = (768, 50304, 8192) if device == "cuda" else (32, 304, 176)
    *errors, bias = module.gradient_errors(width, classes, device, rows)
    assert max(errors) < 0.06 and bias < 0.01
    transposed = module._transposed
    monkeypatch.setattr(module, "_transposed", lambda x: transposed(x).view(torch.uint8).flip(0).view(x.dtype))
    *errors, _ = module.gradient_errors(width, classes, device, rows)
    assert max(errors) > 0.2


def test_the_check_of_the_kernels_finds_sums_that_lose_their_small_terms(device, monkeypatch):
    width, classes, rows = (768, 50304, 8192) if device == "cuda" else (32, 304, 176)
    scaled = torch._scaled_mm
    if device == "cuda":
        monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kw: scaled(*args, **kw | {"use_fast_accum": True}))
    else:
        monkeypatch.setattr(module, "_product", lambda *args, **kw: product(*args, **kw).mul_(0.97))
    *_, bias = module.gradient_errors(width, classes, device, rows)
    assert bias > 0.01


def test_an_error_of_the_logits_product_is_in_the_labels_logit_too(device, monkeypatch):
    """Else a row's probabilities would not sum to 1: the loss and the gradients of frequent labels were off by it."""
    if device == "cuda":
        pytest.skip("tests the program in the interpreter")
    hidden, weight, targets = (x.detach() for x in case(device))
    expected = cross_entropy(0.98 * hidden.double() @ weight.bfloat16().double().t(), targets).item()
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    exact = InterpreterBuilder.create_dot

    def smaller(self, a, b, d, *args):
        result = exact(self, a, b, d, *args)
        return TensorHandle(d.data + np.float32(0.98) * (result.data - d.data), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", smaller)
    assert fp8_gradients(hidden, weight, targets)[0].item() / len(hidden) == pytest.approx(expected, rel=3e-3)


def hard(device):
    """Rows whose likeliest class is neither in the sample nor their label, rows of huge logits, one label for many."""
    hidden, weight, targets = (x.detach() for x in case(device))
    last, n = len(weight) - 1, len(hidden) // 16
    targets[: 4 * n] = 5
    weight[last] = weight[:, 0] = weight[5] = 0
    weight[last, 0] = 2.0
    hidden[:n, 0] = 15.0  # 30 nats above the label
    hidden[n : 2 * n, 0] = 90.0  # 180 nats: beyond 2^100
    targets[2 * n : 3 * n] = last
    hidden[2 * n : 3 * n, 0] = 90.0  # a probability of 1
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def test_rows_that_e5m2_cannot_hold_are_left_to_bf16(device):
    hidden, weight, targets = hard(device)
    n = len(hidden) // 16
    _, d_hidden, d_weight, rows = fp8_gradients(hidden.detach(), weight.detach(), targets)
    assert set(range(2 * n)) <= set(rows.tolist()) and len(rows) < 4 * n
    assert not d_hidden[rows].any() and torch.isfinite(d_hidden).all() and torch.isfinite(d_weight).all()
    got = results(LinearLoss.apply(hidden, weight, targets, cross_entropy, True), hidden, weight)
    wanted = reference(hidden, weight, targets)
    assert_close(got, wanted, error=0.05)
    torch.testing.assert_close(got[1][: 2 * n], wanted[1][: 2 * n], rtol=0.02, atol=1e-7)


def test_logits_that_are_not_finite_make_a_loss_that_is_not_finite(device):
    hidden, weight, targets = case(device)
    hidden.data[3, 1] = float("nan")
    assert not torch.isfinite(LinearLoss.apply(hidden, weight, targets, cross_entropy, True))


def test_gradients_are_those_of_rounded_hidden_states_and_weights(device):
    """With the label's row not rounded as the others are, they were 3% off: an error that is the same in every step."""
    if device == "cuda":
        pytest.skip("tests the program in the interpreter")
    hidden, weight, targets = (x.detach() for x in case(device))
    _, d_hidden, d_weight, _ = fp8_gradients(hidden, weight, targets)
    scales = [448 / x.abs().max().float() for x in (hidden, weight)]
    h, w = (
        ((x.float() * s).to(torch.float8_e4m3fn).double() / s).requires_grad_()
        for x, s in zip((hidden, weight), scales, strict=True)
    )
    expected = torch.autograd.grad(cross_entropy(h @ w.t(), targets) * len(h), (h, w))
    for got, wanted in zip((d_hidden, d_weight), expected, strict=True):
        assert (got.double() - wanted).norm() < 0.025 * wanted.norm()


@pytest.mark.parametrize("label", [-1, -100, "one more", 60000])
def test_a_label_that_is_no_class_makes_the_loss_nan(device, label):
    """One more than the last class is inside the kernel's last tile."""
    hidden, weight, targets = (x.detach() for x in case(device))
    label = len(weight) if label == "one more" else label
    clean = fp8_gradients(hidden, weight, targets)[2]
    targets[5] = label
    total, d_hidden, d_weight, _ = fp8_gradients(hidden, weight, targets)
    assert total.isnan() and d_hidden[5].isnan().all() and (d_weight - clean).norm() < 0.2 * clean.norm()


def test_a_run_with_accumulation_learns_as_in_bf16(device, tiny, tmp_path, monkeypatch):
    if device == "cuda":
        pytest.skip("its batches are too small")
    monkeypatch.setattr(run_module, "check_fp8_loss", lambda *_: None)
    monkeypatch.setattr(step, "fits_fp8", lambda hidden, weight: True)
    curves, argv = (
        [],
        [*tiny, "--dtype=bfloat16", "--max_iters=2", "--warmup_iters=1", "--total_bs=8", "--batch_size=4"],
    )
    for fp8 in (False, True):
        main([*argv, f"--fp8_loss={fp8}", f"--out_dir={tmp_path / str(fp8)}"])
        lines = [line for line in read_lines(tmp_path / str(fp8)) if "train/loss" in line]
        curves.append([line[key] for line in lines for key in ("train/loss", "grad_norm")])
    assert curves[0] != curves[1]
    assert curves[1] == pytest.approx(curves[0], rel=0.01)


def test_where_it_is_used(monkeypatch):
    """For the training loss alone: an evaluation, drawn labels and a run without fp8 stay as they are."""
    seen = []
    monkeypatch.setattr(step, "fits_fp8", lambda hidden, weight: True)
    monkeypatch.setattr(step.LinearLoss, "apply", lambda *args: seen.append(args[4]) or args[0].sum())
    model, idx = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=32)), torch.zeros(2, 8).long()
    for fp8 in (False, True):
        loss = step.ModelLoss(model, False, False, fp8)
        loss(idx, idx)
        loss(idx, idx.float(), label_loss)
        with torch.no_grad():
            loss(idx, idx)
    assert seen == [False, False, True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 1024, 1280, 1600])
def test_gradients_are_finite_at_the_smallest_batch(width):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper")
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(8192, width, generator=generator, device="cuda").bfloat16()
    weight = torch.randn(50304, width, generator=generator, device="cuda") * 0.02
    assert fits_fp8(hidden, weight)
    _, d_hidden, d_weight, rows = fp8_gradients(hidden, weight, torch.arange(8192, device="cuda") % 100)
    assert torch.isfinite(d_hidden).all() and torch.isfinite(d_weight).all() and not len(rows)


@pytest.mark.gpu
def test_what_it_serves():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper")
    zeros = functools.partial(torch.zeros, device="cuda")
    weight = zeros(50304, 768)
    assert fits_fp8(zeros(8192, 768, dtype=torch.bfloat16), weight)
    assert not fits_fp8(zeros(4096, 768, dtype=torch.bfloat16), weight)
    assert not fits_fp8(zeros(8192, 768), weight)
    assert not fits_fp8(zeros(8192, 768, dtype=torch.bfloat16), weight[:50257])
