"""The curvature estimators against the exact diagonals, and the labels against the distribution they come from.

The statistical tests compare a mean over n seeded draws with the exact value, coordinate by coordinate, and allow 5
standard errors: over 100 coordinates a correct estimator fails such a test with probability below 1e-4.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian, jacrev

import sophia
from sophia import SophiaG, hutchinson, sample_labels, sampled_label_loss, sampled_target_loss


def within_five_standard_errors(draws, exact):
    """draws: (n, coordinates)."""
    error = draws.std(0) / draws.shape[0] ** 0.5
    z = (draws.mean(0) - exact) / error.clamp(min=1e-12)
    return z.abs().max().item() < 5


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def small_model(outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def exact_gauss_newton_diagonal(model, x, output_hessian):
    """diag of mean over rows of J^T S J, S the Hessian of the row's loss in the outputs: (parameters,)."""
    named = dict(model.named_parameters())
    jacobians = jacrev(lambda p: functional_call(model, p, (x,)))(named)
    rows, outputs = x.shape[0], output_hessian.shape[-1]
    j = torch.cat([jacobians[k].reshape(rows, outputs, -1) for k in named], dim=-1)
    return torch.einsum("rip,rij,rjp->p", j, output_hessian, j).detach() / rows


def sampled_squares(model, x, loss, n):
    """B grad^2 for n draws of the labels: (n, parameters)."""
    draws = []
    for _ in range(n):
        grads = torch.autograd.grad(loss(model(x)), list(model.parameters()))
        draws.append(x.shape[0] * flat(grads) ** 2)
    return torch.stack(draws)


def test_gnb_is_unbiased_for_the_gauss_newton_diagonal_of_a_softmax_model():
    model, x = small_model(5), torch.randn(6, 3, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    p = model(x).detach().softmax(-1)
    exact = exact_gauss_newton_diagonal(model, x, torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    generator = torch.Generator().manual_seed(2)
    draws = sampled_squares(model, x, lambda logits: sampled_label_loss(logits, generator), 3000)
    assert within_five_standard_errors(draws, exact)
    assert not within_five_standard_errors(draws, 1.25 * exact)  # the test can tell a wrong factor
    labels = torch.randint(5, (6,), generator=generator)  # what users of the official code did by mistake:
    real = sampled_squares(model, x, lambda logits: F.cross_entropy(logits, labels), 2)
    assert (real.mean(0) - exact).abs().max() > 5 * draws.std(0).max() / 3000**0.5


def test_gnb_does_not_depend_on_the_size_of_the_estimation_batch():
    """Through update_hessian: rho bs h has the same mean whether an estimate saw 4 rows or 24."""
    model = small_model(5)
    x = torch.randn(4, 3, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    p, bs = model(x).detach().softmax(-1), 96
    exact = exact_gauss_newton_diagonal(model, x, torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    generator = torch.Generator().manual_seed(3)
    for copies in (1, 6):
        batch, draws = x.repeat(copies, 1), []
        for _ in range(800):
            optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0))  # h is the last estimate alone
            optimizer.zero_grad()
            sampled_label_loss(model(batch), generator).backward()
            optimizer.update_hessian(scale=len(batch) / bs)
            draws.append(bs * flat(optimizer.state[q]["hessian"] for q in model.parameters()))
        assert within_five_standard_errors(torch.stack(draws), exact)


@pytest.mark.parametrize("variance", [1.0, 2.5])
def test_gnb_is_unbiased_for_a_gaussian_head(variance):
    model, x = small_model(2), torch.randn(5, 3, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    exact = exact_gauss_newton_diagonal(model, x, (torch.eye(2, dtype=torch.double) / variance).expand(5, 2, 2))
    generator = torch.Generator().manual_seed(4)
    draws = sampled_squares(model, x, lambda out: sampled_target_loss(out, generator, variance=variance), 2000)
    assert within_five_standard_errors(draws, exact)


def test_a_gaussian_head_of_variance_d_over_2_is_mse_loss():
    """The Gauss-Newton matrix of mse_loss, mean over D = 2 outputs, is 2 / D J^T J: here exactly, by torch.func."""
    model = nn.Linear(3, 2).double()  # linear, so that Gauss-Newton is the Hessian
    x, y = torch.randn(5, 3, dtype=torch.double), torch.randn(5, 2, dtype=torch.double)
    named = dict(model.named_parameters())
    blocks = hessian(lambda p: F.mse_loss(functional_call(model, p, (x,)), y))(named)
    exact = torch.cat([blocks[k][k].reshape(v.numel(), v.numel()).diagonal() for k, v in named.items()])
    ours = exact_gauss_newton_diagonal(model, x, torch.eye(2, dtype=torch.double).expand(5, 2, 2))  # variance D / 2 = 1
    torch.testing.assert_close(exact.detach(), ours)


def test_hutchinson_is_unbiased_for_the_hessian_diagonal():
    model, x = small_model(5), torch.randn(6, 3, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 4, 2, 1, 1, 3])
    named = dict(model.named_parameters())
    blocks = hessian(lambda p: F.cross_entropy(functional_call(model, p, (x,)), labels))(named)
    exact = torch.cat([blocks[k][k].reshape(v.numel(), v.numel()).diagonal() for k, v in named.items()]).detach()
    assert exact.min() < 0  # where the paper falls back to the sign
    generator = torch.Generator().manual_seed(5)
    draws = []
    for _ in range(2000):
        loss = F.cross_entropy(model(x), labels)
        draws.append(flat(hutchinson(loss, model.parameters(), generator)))
    draws = torch.stack(draws)
    assert within_five_standard_errors(draws, exact)
    assert not within_five_standard_errors(draws, exact.abs())
    assert all(p.grad is None for p in model.parameters())


def test_hutchinson_through_attention():
    """A function's fused attention runs in its plain form; for a quadratic in one coordinate the estimate is exact."""
    q = nn.Parameter(torch.randn(1, 1, 4, 8))
    unused, linear = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1))

    def loss():
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).square().sum() + linear.sum()

    estimates = hutchinson(loss, iter([q, unused, linear]), torch.Generator().manual_seed(0))
    again = hutchinson(loss, [q, unused, linear], torch.Generator().manual_seed(0))
    assert torch.equal(estimates[0], again[0]) and estimates[0].abs().min() > 0
    assert estimates[1].tolist() == [0, 0, 0] and estimates[2].tolist() == [0]
    assert hutchinson(lambda: linear.sum(), [linear])[0].item() == 0
    w = nn.Parameter(torch.ones(2))
    (estimate,) = hutchinson(lambda: (w**2).sum(), [w], torch.Generator().manual_seed(1))
    u = torch.randn(2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(estimate, 2 * u * u)


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 127, 128, 129, 1000])
def test_labels_are_the_inverse_of_the_cumulative_distribution(classes):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(7, 50, classes, generator=generator)
    uniform = torch.rand(7, 50, generator=generator)
    labels = sample_labels(logits, uniform=uniform)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    above = cumulative.gather(-1, labels[..., None])[..., 0]
    below = torch.where(labels > 0, cumulative.gather(-1, (labels[..., None] - 1).clamp(min=0))[..., 0], 0.0)
    assert labels.dtype == torch.int64 and labels.shape == (7, 50)
    assert (uniform < above + 1e-6).all() and (uniform > below - 1e-6).all()


def test_frequencies_are_the_softmax():
    """Pearson's chi-squared over 100000 draws of 300 classes, against its 1 - 1e-5 quantile by Wilson and Hilferty."""
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0))
    labels = sample_labels(logits.expand(100_000, 300), torch.Generator().manual_seed(1))
    expected = 100_000 * logits.double().softmax(-1)
    statistic = ((labels.bincount(minlength=300) - expected) ** 2 / expected).sum().item()
    degrees = 299
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 4.265 * (2 / (9 * degrees)) ** 0.5) ** 3


def test_impossible_classes_are_never_drawn_even_at_the_edges():
    inf = float("inf")
    for classes in (4, 130, 300):
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.full((6, classes), -inf)
            logits[:, 1], logits[:, -2] = 0.0, 1.0  # the first and the last class have probability 0
            logits[4:, 1] = -inf  # ... and here the first block too
            uniform = torch.tensor([0.0, 1e-9, 1 - 2**-24, 0.99999999, 0.0, 1 - 2**-24], dtype=torch.float64)
            labels = sample_labels(logits.to(dtype), uniform=uniform)
            assert labels.tolist() == [1, 1, classes - 2, classes - 2, classes - 2, classes - 2]
    tiny = torch.cat([torch.zeros(1), torch.full((999,), -200.0)]).expand(3, 1000)  # exp underflows to 0
    assert sample_labels(tiny, uniform=torch.tensor([0.0, 0.5, 1 - 2**-24])).tolist() == [0, 0, 0]


def test_labels_do_not_depend_on_chunks_or_batches(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, uniform = torch.randn(40, 300, generator=generator), torch.rand(40, generator=generator)
    whole = sample_labels(logits, uniform=uniform)
    parts = torch.cat([sample_labels(a, uniform=b) for a, b in zip(logits.split(7), uniform.split(7), strict=True)])
    loss = sampled_label_loss(logits, uniform=uniform)
    monkeypatch.setattr(sophia, "_CHUNK_ELEMENTS", 900)  # 3 rows at a time
    assert torch.equal(whole, parts) and torch.equal(whole, sample_labels(logits, uniform=uniform))
    torch.testing.assert_close(sampled_label_loss(logits, uniform=uniform), loss)
    assert sample_labels(torch.empty(0, 5)).shape == (0,)


def test_labels_are_reproducible_from_a_generator():
    logits = torch.randn(100, 50)
    draws = [sample_labels(logits, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_uniform_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"uniform has shape \(3,\), expected \(2,\)"):
        sample_labels(torch.zeros(2, 5), uniform=torch.zeros(3))


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_is_the_cross_entropy_of_those_labels(monkeypatch, dtype, padded):
    monkeypatch.setattr(sophia, "_CHUNK_ELEMENTS", 700)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 200, generator=generator).to(dtype).requires_grad_()
    uniform = torch.rand(4, 6, generator=generator)
    targets = torch.randint(200, (4, 6), generator=generator)
    targets[1:3, 2:] = -100
    labels = sample_labels(logits, uniform=uniform)
    if padded:
        labels = torch.where(targets == -100, -100, labels)
    expected = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten())
    expected_grad = torch.autograd.grad(expected, logits)[0]
    loss = sampled_label_loss(logits, uniform=uniform, **({"targets": targets, "ignore_index": -100} if padded else {}))
    (grad,) = torch.autograd.grad(3 * loss, logits)
    assert grad.dtype == dtype
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double() / 3, expected_grad.double(), rtol=tolerance, atol=1e-7)


def test_the_gradient_is_the_only_tensor_of_the_logits_size(monkeypatch):
    """Largest tensors allocated, by the storage that autograd saves and by torch's own record of operations."""
    monkeypatch.setattr(sophia, "_CHUNK_ELEMENTS", 4096)
    logits = torch.randn(512, 256, requires_grad=True)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                is_view = isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() == logits.data_ptr()
                if isinstance(t, torch.Tensor) and not is_view and t.untyped_storage().size() >= logits.nbytes:
                    sizes.append((func.__name__, t.untyped_storage().data_ptr()))
            return out

    with Watch():
        sampled_label_loss(logits).backward()
    assert len({pointer for _, pointer in sizes}) == 1 and sizes[0][0].startswith("empty_like")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_inside_a_model_under_bf16_autocast(backend):
    torch.manual_seed(0)
    table = nn.Embedding(7, 16)
    head = nn.Linear(16, 150)

    def forward(x, uniform, loss):
        return loss(head(table(x)), uniform)

    x, uniform = torch.randint(7, (3, 5)), torch.rand(3, 5)
    compiled = torch.compile(forward, backend=backend, fullgraph=True)
    grads = []
    for function in (forward, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(x, uniform, lambda logits, u: sampled_label_loss(logits, uniform=u))
        grads.append(torch.autograd.grad(loss, [table.weight, head.weight]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-3)
