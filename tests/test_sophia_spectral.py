"""SpectralSophiaG against exact singular vectors, and with exponent 0 against torch's Muon."""

import copy
import inspect
import itertools

import pytest
import torch
from torch import nn

from sophia_eigenbasis import EigenbasisSophiaG, SpectralSophiaG, _orthogonalize
from tests.test_sophia_eigenbasis import draw

SHAPES = ((16, 16), (36, 12), (8, 24), (20, 8), (5,))
SETTINGS = {"lr": 0.1, "betas": (0.9, 0.8), "weight_decay": 0.1, "nesterov": True}


def make(params, cls=SpectralSophiaG, **settings):
    """(36, 12) is split in three, as query, key and value are."""
    return cls(params, split=[3 if p.shape == (36, 12) else 1 for p in params], **SETTINGS | settings)


def trained(params, steps=8, dtype=torch.float64, optimizer=None):
    """What trained them; the curvature is renewed every other step. p.before: the parameter before the last step."""
    optimizer, generator = optimizer or make(params), torch.Generator().manual_seed(0)
    for step in range(steps):
        for renews in (True, False) if step % 2 == 0 else (False,):
            for p in params:
                p.grad = draw(p.shape, generator, dtype).to(p.device)
            if renews:
                optimizer.update_hessian()
        for p in params:
            p.before = p.detach().clone()
        optimizer.step()
    return optimizer


def moved(p):
    return (p.before * (1 - 0.1 * 0.1) - p.detach()) / 0.1


@pytest.mark.parametrize("exponent", [0.125, 0.25])
def test_it_is_a_polar_factor_in_whitened_coordinates(exponent):
    """U f(S) V^T with the singular vectors of the whitened momentum, whitened again, and Muon's length."""
    params = [nn.Parameter(draw(shape, torch.Generator().manual_seed(1))) for shape in SHAPES]
    optimizer = trained(params, optimizer=make(params, exponent=exponent))
    for p in params[:-1]:
        state = optimizer.state[p]
        m = 0.9 * state["exp_avg"] + 0.1 * p.grad
        pieces = (x.chunk(3 if p.shape == (36, 12) else 1) for x in (m, state["hessian"], moved(p)))
        for i, (momentum, h, step) in enumerate(zip(*pieces, strict=True)):
            left, right = state["left_basis"][i], state["right_basis"][i]
            eigenvalues = torch.outer(h.mean(1) / h.mean(), h.mean(0) / h.mean())
            assert eigenvalues.max() / eigenvalues.min() > 10, "nothing to whiten"
            whitening = eigenvalues**-exponent
            u, s, vt = torch.linalg.svd(whitening * (left.T @ momentum @ right), full_matrices=False)
            orthogonal = (left.T @ step @ right) / whitening
            s = s / s.norm()
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            assert s.median() > 0.65, "nothing is orthogonalized"
            expected = u @ s.diag() @ vt
            length = 0.2 * max(step.shape) ** 0.5 * s.norm()
            expected = expected * (length / (whitening * expected).norm())
            torch.testing.assert_close(orthogonal, expected, rtol=1e-6, atol=1e-6)


def muon(params, steps, gradients):
    """torch's Muon with its Newton-Schulz in the parameters' precision instead of bfloat16."""
    source = inspect.getsource(torch.optim._muon._zeropower_via_newtonschulz).replace(".bfloat16()", ".clone()")
    names = dict(vars(torch.optim._muon))
    exec(source, names)
    settings = {"lr": 0.1, "weight_decay": 0.1, "nesterov": True, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    optimizer = torch.optim.Muon(params, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", names["_zeropower_via_newtonschulz"])
        for t in range(steps):
            for p, g in zip(params, gradients[t], strict=True):
                p.grad = g.clone()
            optimizer.step()


@pytest.mark.parametrize("settings", [{"exponent": 0.0}, {}], ids=["exponent 0", "no estimate"])
def test_without_whitening_it_is_torchs_muon(settings):
    """Both average the gradients as m <- 0.9 m + 0.1 g. A matrix that is split is as many matrices to Muon."""
    shapes, generator = [shape for shape in SHAPES if len(shape) == 2], torch.Generator().manual_seed(0)
    gradients = [[draw(shape, generator) for shape in shapes] for _ in range(12)]
    ours = [nn.Parameter(draw(shape, torch.Generator().manual_seed(1))) for shape in shapes]
    blocks = [3 if shape == (36, 12) else 1 for shape in shapes]
    theirs = [nn.Parameter(part.clone()) for p, n in zip(ours, blocks, strict=True) for part in p.detach().chunk(n)]
    optimizer = make(ours, **settings)
    for step, own in enumerate(gradients):
        for p, g in zip(ours, own, strict=True):
            p.grad = g.clone()
        if settings and step % 4 == 0:
            optimizer.update_hessian()  # a curvature that must not matter
        optimizer.step()
    muon(theirs, 12, [[part for g, n in zip(own, blocks, strict=True) for part in g.chunk(n)] for own in gradients])
    got = [part for p, n in zip(ours, blocks, strict=True) for part in p.detach().chunk(n)]
    for p, q in zip(got, theirs, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("foreach", [False, True])
def test_vectors_are_stepped_as_without(foreach):
    ends = []
    for cls in (EigenbasisSophiaG, SpectralSophiaG):
        params = [nn.Parameter(draw(shape, torch.Generator().manual_seed(1))) for shape in SHAPES]
        trained(params, optimizer=make(params, cls, foreach=foreach))
        ends.append(params)
    assert torch.equal(ends[0][-1], ends[1][-1])
    assert not any(torch.equal(a, b) for a, b in zip(ends[0][:-1], ends[1][:-1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_as_if_never_stopped(dtype):
    whole, parts = ([nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES] for _ in range(2))
    optimizer, stopped = trained(whole, dtype=dtype), trained(parts, dtype=dtype)
    state, resumed = copy.deepcopy(stopped.state_dict()), make(parts)
    resumed.load_state_dict(state)
    trained(whole, dtype=dtype, optimizer=optimizer)
    trained(parts, dtype=dtype, optimizer=resumed)
    assert all(torch.equal(p, q) for p, q in zip(whole, parts, strict=True))
    assert all(torch.isfinite(p).all() for p in whole)


def test_found_inf_and_a_gradient_of_zeros_are_harmless():
    params = [nn.Parameter(draw(shape, torch.Generator().manual_seed(1))) for shape in SHAPES]
    optimizer = trained(params)
    optimizer.found_inf = torch.ones(())
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad.fill_(float("nan"))
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    zero = nn.Parameter(torch.ones(6, 6))
    zero.grad, optimizer = torch.zeros(6, 6), make([zero])
    optimizer.update_hessian()
    optimizer.step()
    torch.testing.assert_close(zero.detach(), torch.full((6, 6), 0.99))


def test_orthogonalized():
    """Tall and wide; a factor makes no difference, a gradient of 1e-12 a coordinate neither; below that it fades."""
    for shape in ((3, 20, 7), (3, 7, 20), (1, 64, 64)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        o, norm = _orthogonalize(x), torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        ours, theirs = torch.linalg.svdvals(o), torch.linalg.svdvals(x) / norm[..., 0]
        assert ours.max() < 1.21 and (ours[theirs > 0.0015] > 0.68).all() and (theirs > 0.0015).double().mean() > 0.9
        torch.testing.assert_close(_orthogonalize(1e-12 * x), o, rtol=0.02, atol=0.02)
        sizes = [_orthogonalize(10.0**-n * x).abs().max() for n in range(12, 45)]
        assert all(later <= 1.2 * size for size, later in itertools.pairwise(sizes)) and 0 <= sizes[-1] < 1e-10


def test_a_matrix_out_of_use_comes_to_rest():
    """Its momentum fades to nothing that float32 can square; what moves it then is not noise, nor NaN."""
    p = nn.Parameter(torch.ones(8, 8))
    optimizer = make([p], betas=(0.8, 0.8), weight_decay=0.0)
    for step in range(600):
        p.grad = (1e-3 if step == 0 else 0.0) * torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        if step < 2:
            optimizer.update_hessian()
        if step == 400:
            before = p.detach().clone()
        optimizer.step()
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=1e-6)


def test_autocast_does_not_reach_it():
    ends = []
    for enabled in (False, True):
        params = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            trained(params, dtype=torch.float32)
        ends.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


@pytest.mark.parametrize("exponent", [-0.1, float("nan")])
def test_a_bad_exponent_is_named(exponent):
    with pytest.raises(ValueError, match=f"Invalid exponent: {exponent}"):
        make([nn.Parameter(torch.ones(4, 4))], exponent=exponent)


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    """But for bfloat16, in which a GPU orthogonalizes."""
    ends = []
    for device in ("cpu", "cuda"):
        params = [nn.Parameter(torch.ones(shape, device=device)) for shape in SHAPES]
        trained(params, steps=2, dtype=torch.float32)
        ends.append([moved(p).cpu() for p in params])
    for one, other in zip(*ends, strict=True):
        assert torch.linalg.vector_norm(one - other) < 0.05 * torch.linalg.vector_norm(one)


@pytest.mark.parametrize("cls", [EigenbasisSophiaG, SpectralSophiaG])
def test_blocks_of_unequal_rows_are_as_many_matrices(cls):
    """Query, key and value with fewer heads of keys: a resumed run of the fused matrices against three each."""
    rows, generator = (8, 4, 4), torch.Generator().manual_seed(0)
    drawn = [[draw((16, 8), generator) for _ in range(2)] for _ in range(9)]
    fused = [nn.Parameter(p.clone()) for p in drawn[0]]
    parts = [nn.Parameter(part.clone()) for p in fused for part in p.detach().split(rows)]
    optimizers = [cls(fused, split=[rows, list(rows)], **SETTINGS), cls(parts, **SETTINGS)]
    for step, gradients in enumerate(drawn[1:]):
        for p, g in zip(fused, gradients, strict=True):
            p.grad = g.clone()
        for p, part in zip(parts, [part for g in gradients for part in g.split(rows)], strict=True):
            p.grad = part.clone()
        for optimizer in optimizers:
            if step % 2 == 0:
                optimizer.update_hessian()
            optimizer.step()
        if step == 3:
            state = copy.deepcopy(optimizers[0].state_dict())
            optimizers[0] = cls(fused, split=[rows, rows], **SETTINGS)
            optimizers[0].load_state_dict(state)
    got = [part for p in fused for part in p.detach().split(rows)]
    for p, q in zip(got, parts, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-9, atol=1e-9)
    assert optimizers[0].state[fused[0]]["left_basis"].shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"split = \(8, 4\) does not divide the 16 rows"):
        cls(fused, split=[(8, 4), 1])
