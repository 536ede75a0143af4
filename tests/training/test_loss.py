"""The loss in pieces against the model's own in float64: value and gradients, given and drawn labels, its kernel."""

import pytest
import torch

from model import cross_entropy
from sophia import sample_labels
from training import loss as module
from training.curvature import label_loss
from training.loss import LinearLoss, fused_cross_entropy, loss_and_gradient


def case(rows=37, width=16, classes=203, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, width, generator=generator), torch.randn(classes, width, generator=generator)
    targets, uniforms = torch.randint(classes, (rows,), generator=generator), torch.rand(rows, generator=generator)
    hidden, weight = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, targets.to(device), uniforms.to(device)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("loss", [cross_entropy, label_loss])
def test_as_with_all_logits(monkeypatch, pieces, loss):
    hidden, weight, targets, uniforms = case()
    monkeypatch.setattr(LinearLoss, "ELEMENTS", -(-hidden.shape[0] * weight.shape[0] // pieces))
    numbers = targets if loss is cross_entropy else uniforms
    expected = loss(hidden @ weight.t(), numbers)
    gradients = torch.autograd.grad(expected * 3, (hidden, weight))
    ours = LinearLoss.apply(hidden, weight, numbers, loss)
    torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-6, atol=0)
    for got, wanted in zip(torch.autograd.grad(ours * 3, (hidden, weight)), gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-12)


def test_a_second_derivative_is_refused():
    """It would lack the curvature of the loss."""
    hidden, weight, targets, _ = case()
    loss = LinearLoss.apply(hidden, weight, targets, cross_entropy)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_pieces_hold_the_limit(monkeypatch):
    hidden, weight, targets, _ = case()
    monkeypatch.setattr(LinearLoss, "ELEMENTS", 1000)
    seen = []

    def loss(logits, targets):
        seen.append(logits.numel())
        return cross_entropy(logits, targets)

    LinearLoss.apply(hidden, weight, targets, loss)
    assert max(seen) <= 1000 + weight.shape[0] and sum(seen) == hidden.shape[0] * weight.shape[0]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])  # on the CPU by Triton's interpreter
def device(request, monkeypatch):
    pytest.importorskip("triton")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here")
    monkeypatch.setattr(module, "LAUNCH", (16, 8, 4))  # three tiles a row, the last one not full
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel(device, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(19, 300, generator=generator) * 5).to(device, dtype)
    logits[3, 7] = 300.0  # a softmax that is all one class
    targets = torch.randint(300, (19,), generator=generator).to(device)
    targets[:2] = torch.tensor([0, 299])
    expected, gradient = loss_and_gradient(logits.double(), targets, cross_entropy)
    place = logits.clone()
    value, got = fused_cross_entropy(place, targets)
    assert got is place
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(got.double(), gradient, rtol=8e-3 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)
    for unknown in (-1, -100, 300):
        targets[4] = unknown
        assert fused_cross_entropy(logits.clone(), targets)[0].isnan(), "and not a loss of what lies beside the row"


def test_kernel_draws_labels(device):
    """Those that `sample_labels` draws with the same numbers, also at the ends; never a class of probability 0."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(64, 300, generator=generator) * 3).to(device)
    logits[:, :5] = logits[:, 290:] = logits[::2, 100:150] = -float("inf")
    uniforms = torch.rand(64, generator=generator).to(device)
    uniforms[:4] = torch.tensor([0.0, 0.0, 1 - 2**-24, 1 - 2**-24])
    labels = sample_labels(logits, uniform=uniforms)
    assert labels[0] == 5 and len(labels.unique()) > 20
    expected, gradient = loss_and_gradient(logits.double(), labels, cross_entropy)
    value, got = fused_cross_entropy(logits.clone(), uniforms)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(got.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_on_the_gpu_in_bf16():
    """The rounding of bf16 and no more, at GPT-2's vocabulary; the weight's gradient is summed in float32."""
    hidden, weight, targets, _ = case(4096, 64, 50304, torch.float32, "cuda")
    weight.data *= 0.02
    narrow = hidden.detach().bfloat16().requires_grad_()
    reference = cross_entropy(narrow.double() @ weight.bfloat16().double().t(), targets)
    wanted = torch.autograd.grad(reference, (narrow, weight))
    ours = LinearLoss.apply(narrow, weight, targets, cross_entropy)
    assert ours.item() == pytest.approx(reference.item(), rel=1e-4)
    for got, expected in zip(torch.autograd.grad(ours, (narrow, weight)), wanted, strict=True):
        assert (got.double() - expected.double()).norm() < 1e-2 * expected.double().norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_gradients_of_hidden_and_weight_have_one_scale(device):
    """A mean over 96 rows times 1/40 is no power of 2; rounded to bf16 it would be off by 0.4%, for `hidden` alone."""
    hidden, weight, targets, _ = case(96, 64, 203, torch.float32, device)
    narrow = hidden.detach().bfloat16().requires_grad_()
    (LinearLoss.apply(narrow, weight, targets, cross_entropy) / 40).backward()
    wide, reference = (x.detach().bfloat16().double().requires_grad_() for x in (narrow, weight))
    (cross_entropy(wide @ reference.t(), targets) / 40).backward()
    for got, expected in ((narrow.grad.double(), wide.grad), (weight.grad.double(), reference.grad)):
        assert ((got * expected).sum() / expected.square().sum()).item() == pytest.approx(1, abs=1e-3)
