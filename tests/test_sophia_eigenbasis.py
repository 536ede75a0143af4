"""EigenbasisSophiaG against a float64 reference that decomposes by QR, and its bases against exact eigenvectors."""

import contextlib
import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sophia import SophiaG
from sophia_eigenbasis import EigenbasisSophiaG, _BasisUpdater, _orthogonal_iteration

SHAPES = ((6, 6), (12, 4), (4, 9), (5,))


def make(params, **settings):
    """(12, 4) is split in three, as query, key and value are."""
    return EigenbasisSophiaG(params, split=[3 if p.shape == (12, 4) else 1 for p in params], **settings)


class Reference:
    """One parameter in float64."""

    def __init__(self, p, lr, betas, rho, weight_decay, maximize=False, bias_correction=False, nesterov=False):
        self.p, self.m = p.detach().double().clone(), torch.zeros(p.shape, dtype=torch.float64)
        self.h, self.n = torch.zeros(p.shape, dtype=torch.float64), 0
        self.lr, self.betas, self.rho, self.decay, self.nesterov = lr, betas, rho, weight_decay, nesterov
        self.sign, self.correct = -1 if maximize else 1, bias_correction
        self.factors = [torch.zeros(n, n).double() for n in p.shape]
        self.bases = [torch.eye(n).double() for n in p.shape]

    def rotate(self, x):
        return self.bases[0].T @ x @ self.bases[1] if x.ndim == 2 else x

    def rotate_back(self, x):
        return self.bases[0] @ x @ self.bases[1].T if x.ndim == 2 else x

    def estimate(self, g, scale):
        g = g.double()
        for side, product in enumerate((g @ g.T, g.T @ g) if g.ndim == 2 else ()):
            decay = min(self.betas[1], 0.95)
            factor = self.factors[side] = decay * self.factors[side] + (1 - decay) * product
            padded = factor + 1e-3 * factor.trace() / len(factor) * torch.eye(len(factor)).double()
            self.bases[side] = torch.linalg.qr(padded @ self.bases[side])[0]
        rotated = self.rotate(g)
        self.h = self.betas[1] * self.h + (1 - self.betas[1]) * scale * rotated**2
        self.n += 1

    def step(self, g, bs):
        g, beta1 = self.sign * g.double(), self.betas[0]
        self.m = beta1 * self.m + (1 - beta1) * g
        m = beta1 * self.m + (1 - beta1) * g if self.nesterov else self.m
        m = self.rotate(m)
        h = self.h / (1 - self.betas[1] ** self.n) if self.correct and self.n else self.h
        update = (m / (self.rho * bs * h + 1e-15)).clamp(-1, 1)
        self.p = self.p * (1 - self.lr * self.decay) - self.lr * self.rotate_back(update)


class Thirds(Reference):
    """Query, key and value, each with bases of its own."""

    def __init__(self, p, **common):
        self.three = [Reference(part, **common) for part in p.split(p.shape[1])]

    def __getattr__(self, name):
        values = [getattr(one, name) for one in self.three]
        return torch.cat(values) if isinstance(values[0], torch.Tensor) else values[0]

    def rotate(self, x):
        return torch.cat([one.rotate(part) for one, part in zip(self.three, x.split(x.shape[1]), strict=True)])

    def estimate(self, g, scale):
        for one, part in zip(self.three, g.split(g.shape[1]), strict=True):
            one.estimate(part, scale)

    def step(self, g, bs):
        for one, part in zip(self.three, g.split(g.shape[1]), strict=True):
            one.step(part, bs)


def draw(shape, generator, dtype=torch.float64):
    """Gradients whose coordinates differ in size and go together, so that the eigenvectors are no axes."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if len(shape) == 2:
        sizes = [torch.logspace(0, -1, n, dtype=torch.float64) for n in shape]
        drawn = [torch.randn(n, n, generator=torch.Generator().manual_seed(n)) for n in shape]
        mix = [torch.linalg.qr(each.double())[0] for each in drawn]
        x = mix[0] @ (sizes[0][:, None] * x * sizes[1]) @ mix[1]
    return x.to(dtype)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"bias_correction": True}, {"nesterov": True, "maximize": True}, {"betas": (0.9, 0.98)}], ids=str
)
def test_equals_the_float64_reference(options, dtype, foreach):
    generator = torch.Generator().manual_seed(0)
    exact = dtype == torch.float64  # else rounding decides on the null space of a side longer than the other
    shapes = [shape for shape in SHAPES if exact or shape != (4, 9)]
    params = [nn.Parameter(draw(shape, generator, dtype)) for shape in shapes]
    common = {"lr": 0.01, "betas": (0.9, 0.8), "rho": 0.2, "weight_decay": 0.1} | options
    optimizer = make(params, foreach=foreach, **common)
    references = [Thirds(p, **common) if len(p) == 12 else Reference(p, **common) for p in params]
    for t in range(9):
        if t % 3 == 0:
            for p, reference in zip(params, references, strict=True):
                p.grad = draw(p.shape, generator, dtype)
                reference.estimate(p.grad, 0.5)
            optimizer.update_hessian(scale=0.5)
        for p, reference in zip(params, references, strict=True):
            p.grad = draw(p.shape, generator, dtype)
            reference.step(p.grad, 32)
        optimizer.step(bs=32)
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.1}[dtype]
    clipped = []
    for p, reference in zip(params, references, strict=True):
        state = optimizer.state[p]
        torch.testing.assert_close(p.double(), reference.p, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(state["exp_avg"].double(), reference.m, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(state["hessian"].double(), reference.h, rtol=tolerance, atol=tolerance)
        assert ("left_basis" in state) == (p.ndim == 2)
        h = reference.h / (1 - common["betas"][1] ** reference.n if reference.correct else 1)
        clipped.append((reference.rotate(reference.m).abs() < 0.2 * 32 * h).double().flatten())
    if exact:
        win_rate = optimizer.statistics(bs=32)["win_rate"]
        assert win_rate == pytest.approx(torch.cat(clipped).mean().item()) and 0 < win_rate < 1


def test_without_an_estimate_it_is_plain_sophia():
    steps = []
    for eigenbasis in (False, True):
        p = nn.Parameter(torch.ones(4, 4))
        p.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
        EigenbasisSophiaG([p], lr=0.1, eigenbasis=eigenbasis).step()
        steps.append(p.detach().clone())
    torch.testing.assert_close(*steps)


def test_the_bases_become_the_eigenvectors_largest_first():
    p = nn.Parameter(torch.zeros(8, 8))
    optimizer, generator = EigenbasisSophiaG([p]), torch.Generator().manual_seed(1)
    gradients = [draw(p.shape, generator) for _ in range(4)]
    for _ in range(200):
        for g in gradients:
            p.grad = g.float()
            optimizer.update_hessian()
    optimizer.statistics()  # until then they are being updated
    state = optimizer.state[p]
    factors, bases = (torch.cat([state[f"left_{kind}"], state[f"right_{kind}"]]) for kind in ("factor", "basis"))
    inside = bases.mT @ factors @ bases
    sizes = inside.diagonal(dim1=-2, dim2=-1)
    assert (sizes.diff(dim=-1) < 0).all()
    torch.testing.assert_close(sizes, torch.linalg.eigvalsh(factors).flip(-1), rtol=1e-2, atol=1e-4)
    related = inside / (sizes[..., None, :] * sizes[..., None]).sqrt()  # 1 on the diagonal
    torch.testing.assert_close(related, torch.eye(8).expand_as(related), rtol=0, atol=0.05)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(0, 24), st.floats(0, 14), st.integers(0, 999))
def test_updated_bases_are_orthonormal_whatever_the_factors(width, rank, decades, seed):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(width, max(rank, 1), generator=generator).double()
    g = torch.logspace(0, -decades / 2, width, dtype=torch.float64)[:, None] * g
    factors = (g @ g.T * (rank > 0)).float()[None]
    bases = torch.eye(width)[None]
    for _ in range(3):
        bases = _orthogonal_iteration(factors, bases)
    torch.testing.assert_close(bases.mT @ bases, torch.eye(width)[None], rtol=0, atol=1e-5)
    if rank == 0:
        assert torch.equal(bases, torch.eye(width)[None])


def test_factors_that_are_not_finite_leave_the_basis():
    basis = torch.eye(3)[None]
    assert torch.equal(_orthogonal_iteration(torch.full((1, 3, 3), torch.nan), basis), basis)


def test_a_decomposition_that_fails_leaves_the_basis(monkeypatch):
    failed, basis = torch.linalg.cholesky_ex, torch.eye(3)[None]
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda gram: (failed(gram)[0], torch.ones(1, dtype=torch.int32)))
    assert torch.equal(_orthogonal_iteration(torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None] + 0.1, basis), basis)


def test_small_half_precision_gradients_are_unscaled_in_float32():
    norms, g = [], torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) * 1e-8
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 2.0**16)):
        p = nn.Parameter(torch.zeros(8, 8, dtype=dtype))
        optimizer = EigenbasisSophiaG([p])
        optimizer.grad_scale, p.grad = torch.full((), scale), (g * scale).to(dtype)
        optimizer.update_hessian(scale=1e16)
        norms.append(optimizer.statistics()["hessian_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_one_width_in_two_precisions():
    params = [nn.Parameter(torch.ones(4, 4, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    optimizer, g = EigenbasisSophiaG(params), torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for p in params:
        p.grad = g.to(p.dtype)
    optimizer.update_hessian()
    optimizer.step()
    bases = [optimizer.state[p]["left_basis"] for p in params]
    assert [basis.dtype for basis in bases] == [p.dtype for p in params]
    torch.testing.assert_close(bases[0].double(), bases[1], rtol=1e-4, atol=1e-5)


def test_many_squares_are_worked_on_in_pieces(monkeypatch):
    ends = []
    for elements in (2**25, 32):
        monkeypatch.setattr("sophia_eigenbasis._SQUARES_ELEMENTS", elements)
        ends.append(trained(4)[0].detach())
    torch.testing.assert_close(*ends)


def trained(steps, optimizer=None, p=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(steps)
    p = nn.Parameter(torch.ones(12, 4, dtype=dtype)) if p is None else p
    optimizer = optimizer or make([p], lr=0.01, bias_correction=True)
    for _ in range(steps):
        for call in (optimizer.update_hessian, optimizer.step):
            p.grad = draw(p.shape, generator, p.dtype)
            call()
    return p, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_as_if_never_stopped(dtype):
    p, optimizer = trained(259, dtype=dtype)  # a count that bfloat16 cannot hold
    q = nn.Parameter(p.detach().clone())
    resumed = make([q], lr=0.01, bias_correction=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(2, optimizer, p)
    trained(2, resumed, q)
    assert torch.equal(p, q)
    for key, value in optimizer.state[p].items():
        assert torch.equal(value, resumed.state[q][key]), key
        assert "step" in key or key in ("exp_avg", "hessian") or value.dtype == torch.float32
    assert resumed.state[q]["hessian_step"] == 261


def test_autocast_does_not_reach_the_rotations():
    ends = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            ends.append(trained(3)[0].detach())
    assert torch.equal(*ends)


def test_a_state_without_bases_loads_and_starts_from_the_axes():
    p, q = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    plain, optimizer = SophiaG([p]), EigenbasisSophiaG([q])
    p.grad = q.grad = torch.arange(16.0).view(4, 4)
    plain.update_hessian()
    plain.step()
    optimizer.load_state_dict({**plain.state_dict(), "param_groups": optimizer.state_dict()["param_groups"]})
    optimizer.step()
    plain.step()
    torch.testing.assert_close(p - 1, (q - 1) + (p - q))
    assert torch.equal(optimizer.state[q]["left_basis"][0], torch.eye(4))


def test_a_state_with_bases_is_refused_without_the_setting():
    p, optimizer = trained(1)
    plain = SophiaG([p])
    plain.load_state_dict({**optimizer.state_dict(), "param_groups": plain.state_dict()["param_groups"]})
    with pytest.raises(RuntimeError, match="made with eigenbasis=True"):
        plain.step()


def test_an_estimate_that_has_just_begun_is_in_every_copy():
    """state_dict(), deepcopy, pickle and a second estimate each wait for it; a state loaded since replaces it."""
    ends = []
    for how in ("none", "state_dict", "deepcopy", "pickle", "loaded"):
        p, optimizer = trained(2)
        before = copy.deepcopy(optimizer.state_dict())
        p.grad = draw(p.shape, torch.Generator().manual_seed(9), torch.float32)
        optimizer.update_hessian()
        if how == "state_dict":
            state, optimizer = optimizer.state_dict(), make([p], lr=0.01, bias_correction=True)
            optimizer.load_state_dict(state)
        elif how == "loaded":
            optimizer.load_state_dict(before)
            optimizer.update_hessian()
        elif how != "none":
            p.grad = None
            optimizer = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
            (p,) = optimizer.param_groups[0]["params"]
            p.grad = draw(p.shape, torch.Generator().manual_seed(9), torch.float32)
        optimizer.step()
        ends.append((p.detach(), optimizer.state_dict()["state"][0]["hessian"]))
    for end in ends[1:]:
        assert torch.equal(end[0], ends[0][0]) and torch.equal(end[1], ends[0][1])


@pytest.mark.parametrize("foreach", [False, True])
def test_found_inf_changes_nothing_and_grad_scale_divides(foreach):
    p, optimizer = trained(2)
    optimizer.foreach = foreach
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state[p])
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.full((), 4.0)
    p.grad = torch.full_like(p, math.nan)
    optimizer.update_hessian()
    optimizer.step()
    assert torch.equal(p, before)
    for key, value in state.items():
        assert torch.equal(value, optimizer.state[p][key]), key

    q = nn.Parameter(p.detach().clone())
    other = make([q], lr=0.01, bias_correction=True, foreach=foreach)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.found_inf = torch.zeros(())
    for call in ("update_hessian", "step"):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(5))
        p.grad, q.grad = 4 * g, g.clone()
        getattr(optimizer, call)()
        getattr(other, call)()
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(optimizer.state[p]["left_factor"], other.state[q]["left_factor"])


@pytest.mark.parametrize(
    ("shape", "dtype", "settings", "message"),
    [
        ((4, 4), torch.complex64, {}, "eigenbasis=True is for real matrices"),
        ((4, 4), torch.float32, {"capturable": True}, "eigenbasis=True cannot be captured in a CUDA graph"),
        ((4, 4), torch.float32, {"split": 3}, "split = 3 does not divide the 4 rows of parameter 0"),
        ((4, 4), torch.float32, {"split": 0}, "split = 0 does not divide"),
        ((4, 4), torch.float32, {"split": [1, 1]}, "split has 2 numbers for 1 parameters"),
    ],
)
def test_a_matrix_that_it_cannot_step_is_refused(shape, dtype, settings, message):
    with pytest.raises(ValueError, match=message):
        EigenbasisSophiaG([nn.Parameter(torch.ones(shape, dtype=dtype))], **settings)
    EigenbasisSophiaG([{"params": [nn.Parameter(torch.ones(shape, dtype=dtype))], "eigenbasis": False}], **settings)


def test_a_group_can_be_left_to_the_plain_step():
    a, b = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    optimizer = EigenbasisSophiaG([{"params": [a]}, {"params": [b], "eigenbasis": False}])
    for p in (a, b):
        p.grad = torch.arange(16.0).view(4, 4)
    optimizer.update_hessian()
    optimizer.step()
    assert "left_basis" in optimizer.state[a] and "left_basis" not in optimizer.state[b]


def test_only_split_decides_into_how_many_blocks_a_matrix_is_taken():
    """Three times as many rows as columns mean nothing; the state's shapes follow split; blocks do not mix."""
    for split, blocks in ((1, 1), (3, 3), ([3], 3), ([6], 6)):
        p = nn.Parameter(torch.ones(12, 4))
        p.grad = draw(p.shape, torch.Generator().manual_seed(0), torch.float32)
        optimizer = EigenbasisSophiaG([{"params": [p], "split": split}])
        optimizer.update_hessian()
        optimizer.step()
        state = optimizer.state[p]
        assert state["left_basis"].shape == (blocks, 12 // blocks, 12 // blocks)
        assert state["right_factor"].shape == (blocks, 4, 4)
        for i, g in enumerate(p.grad.chunk(blocks)):
            torch.testing.assert_close(state["left_factor"][i], 0.05 * g @ g.T, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_without_the_split_keeps_that_of_the_constructor():
    p, optimizer = trained(2)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["split"]
        group["spectral"] = False
    resumed = make([nn.Parameter(p.detach().clone())], lr=0.01, bias_correction=True)
    resumed.load_state_dict(old)
    assert resumed.param_groups[0]["split"] == [3]
    (q,) = resumed.param_groups[0]["params"]
    trained(2, optimizer, p)
    trained(2, resumed, q)
    assert torch.equal(p, q)


@pytest.mark.gpu
@pytest.mark.parametrize("stopped", [False, True])
def test_on_a_gpu_as_on_the_cpu(stopped, monkeypatch):
    """Bases are updated on a stream of their own. Both streams are slow, so that one that does not wait is seen."""

    def slow(factors, bases):
        if factors.is_cuda:
            torch.cuda._sleep(10**7)
        return _orthogonal_iteration(factors, bases)

    monkeypatch.setattr("sophia_eigenbasis._orthogonal_iteration", slow)
    generator, ends = torch.Generator().manual_seed(3), []
    gradients = [[draw(shape, generator) for shape in SHAPES] for _ in range(24)]
    for device in ("cpu", "cuda"):
        params = [nn.Parameter(torch.ones(shape, dtype=torch.float64, device=device)) for shape in SHAPES]
        optimizer = make(params, lr=0.01, betas=(0.9, 0.8), rho=0.2)
        for t, step in enumerate(gradients):
            for p, g in zip(params, step, strict=True):
                p.grad = g.to(device)
            if device == "cuda":
                torch.cuda._sleep(10**7)
                for p in params:
                    p.grad = p.grad + 0.0  # ready after that only
            (optimizer.step if t % 3 else optimizer.update_hessian)()
            if stopped and t % 6 in (0, 4):  # some right after an estimate
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = make(params, lr=0.01, betas=(0.9, 0.8), rho=0.2)
                optimizer.load_state_dict(state)
        ends.append([p.detach().cpu() for p in params])
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-8)


@pytest.mark.gpu
def test_a_recorded_update_has_the_bits_of_a_plain_one():
    generator = torch.Generator("cuda").manual_seed(0)
    updater, sides = _BasisUpdater(torch.device("cuda")), []
    for count, width in ((5, 384), (12, 1536), (3, 384), (1, 3072)):
        g = torch.randn(count, width, width, generator=generator, device="cuda")
        sides.append((g @ g.mT, torch.eye(width, device="cuda").repeat(count, 1, 1)))
    updates = []
    for _ in range(3):  # plain, recorded, replayed
        updated, done = updater.start(sides)
        done.synchronize()
        updates.append([basis.clone() for basis in updated])
    assert updater.graph is not None
    for update in updates[1:]:
        assert all(torch.equal(*pair) for pair in zip(updates[0], update, strict=True))
    alone = [basis for factors, bases in sides for basis in _orthogonal_iteration(factors, bases)]
    torch.testing.assert_close(updates[0], alone)


@pytest.mark.gpu
def test_what_cannot_be_recorded_updates_all_the_same(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    updater, updates = _BasisUpdater(torch.device("cuda")), []
    g = torch.randn(2, 64, 64, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    sides = [(g @ g.mT, torch.eye(64, device="cuda").repeat(2, 1, 1))]
    for warned in (False, True, False):
        with pytest.warns(UserWarning, match="without a CUDA graph") if warned else contextlib.nullcontext():
            updated, done = updater.start(sides)
        done.synchronize()
        updates.append([basis.clone() for basis in updated])
    assert updater.graph is None and all(torch.equal(*pair) for pair in zip(updates[0], updates[2], strict=True))
