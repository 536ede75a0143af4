"""muon.py against float64 references, torch.optim.Muon, and itself after a round trip."""

import copy
import math
import weakref

import numpy as np
import pytest
import torch

from muon import _ROOT_STEPS, MINIMAX, Muon, WhitenedMuon, _inverse_root, inverse_root, orthogonalize

SHAPES = [(6, 6), (6, 24), (24, 6), (6, 6), (18, 6)]
SPLITS = [1, 1, 1, 1, 3]


def parameters(shapes=SHAPES, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)


def newton_schulz(x):
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def root_of(factor, exponent, ridge):
    """(A / mean + ridge + b / 1024)^-exponent by eigenvectors, b the bound of the largest eigenvalue."""
    values, vectors = torch.linalg.eigh(factor / factor.diagonal().mean())
    values = values.clamp(min=0) + ridge
    bound = 1.01 * (values**4).sum() ** 0.25
    return (vectors * (values + bound / 1024) ** -exponent) @ vectors.T


class Reference:
    """The update of one matrix in plain float64."""

    def __init__(self, p, lr, momentum=0.95, weight_decay=0.1, nesterov=True, cautious=False, whitening=None):
        self.p, self.m, self.left, self.right = p.detach().clone(), torch.zeros_like(p), 0.0, 0.0
        self.lr, self.momentum, self.decay = lr, momentum, weight_decay
        self.nesterov, self.cautious, self.whitening, self.steps = nesterov, cautious, whitening, 0

    def step(self, g):
        self.m = self.momentum * self.m + (1 - self.momentum) * g
        x = self.momentum * self.m + (1 - self.momentum) * g if self.nesterov else self.m
        if self.whitening:
            x = self.whitened(x, g, **self.whitening)
        else:
            x = newton_schulz(x)
        update = 0.2 * math.sqrt(max(g.shape)) * x
        decayed = (update * self.p > 0).to(g.dtype) if self.cautious else 1
        self.p = self.p - self.lr * self.decay * decayed * self.p - self.lr * update

    def whitened(self, x, g, sides, exponent, ridge, decay, interval):
        self.left, self.right = decay * self.left + (1 - decay) * g @ g.T, decay * self.right + (1 - decay) * g.T @ g
        if self.steps % interval == 0:
            self.roots = [
                root_of(f, exponent if side in (sides, "both") or sides == "both" else 0.0, ridge)
                for f, side in ((self.left, "output"), (self.right, "input"))
            ]
        self.steps += 1
        left, right = self.roots
        orthogonal = newton_schulz(left @ x @ right)
        update = left @ orthogonal @ right
        return update * orthogonal.norm() / update.norm()


@pytest.mark.parametrize("settings", [{}, {"nesterov": False}, {"cautious": True}, {"weight_decay": 0.0}])
def test_a_step_is_the_formula(settings):
    params = parameters()
    optimizer = Muon(params, lr=0.1, split=SPLITS, **settings)
    references = [
        [Reference(part, 0.1, **settings) for part in p.chunk(n)] for p, n in zip(params, SPLITS, strict=True)
    ]
    for step in range(6):
        set_gradients(params, step)
        for p, parts in zip(params, references, strict=True):
            for part, g in zip(parts, p.grad.chunk(len(parts)), strict=True):
                part.step(g)
        optimizer.step()
    for p, parts in zip(params, references, strict=True):
        torch.testing.assert_close(p.detach(), torch.cat([part.p for part in parts]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sides", ["input", "output", "both"])
@pytest.mark.parametrize("exponent", [0.125, 0.25, 0.5, 0.3])
def test_a_whitened_step_is_the_formula(sides, exponent):
    whitening = {"sides": sides, "exponent": exponent, "ridge": 0.02, "decay": 0.8, "interval": 2}
    params = parameters()
    optimizer = WhitenedMuon(params, lr=0.1, split=SPLITS, **whitening)
    references = [
        [Reference(part, 0.1, whitening=whitening) for part in p.chunk(n)] for p, n in zip(params, SPLITS, strict=True)
    ]
    for step in range(7):
        set_gradients(params, step)
        for p, parts in zip(params, references, strict=True):
            for part, g in zip(parts, p.grad.chunk(len(parts)), strict=True):
                part.step(g)
        optimizer.step()
    for p, parts in zip(params, references, strict=True):
        torch.testing.assert_close(p.detach(), torch.cat([part.p for part in parts]), rtol=1e-3, atol=1e-3)


def test_exponent_0_is_muon():
    ours, plain = parameters(), parameters()
    whitened, muon = WhitenedMuon(ours, lr=0.1, split=SPLITS, exponent=0.0), Muon(plain, lr=0.1, split=SPLITS)
    for step in range(4):
        for params, optimizer in ((ours, whitened), (plain, muon)):
            set_gradients(params, step)
            optimizer.step()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_to_its_rounding(nesterov):
    """torch.optim.Muon orthogonalizes in bfloat16, this in the parameters' dtype on a CPU."""
    ours, torchs = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    start = [p.detach().clone() for p in ours]
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.2, "nesterov": nesterov}
    optimizers = Muon(ours, **settings), torch.optim.Muon(torchs, adjust_lr_fn="match_rms_adamw", **settings)
    for step in range(5):
        for params, optimizer in zip((ours, torchs), optimizers, strict=True):
            set_gradients(params, step)
            optimizer.step()
    for a, b, p in zip(ours, torchs, start, strict=True):
        assert (a - b).norm() < 0.03 * (a - p).norm()
    buffers = [
        optimizer.state[p]["momentum_buffer"] for optimizer, p in zip(optimizers, (ours[0], torchs[0]), strict=True)
    ]
    torch.testing.assert_close(*buffers)


@pytest.mark.parametrize("exponent", [0.5, 0.25, 0.125, 0.3])
@pytest.mark.parametrize("decades", [0, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_root_is_that_of_the_eigenvalues(exponent, decades, dtype):
    generator = torch.Generator().manual_seed(decades)
    basis = torch.linalg.qr(torch.randn(2, 64, 64, generator=generator, dtype=torch.float64))[0]
    factors = (basis * torch.logspace(0, -decades, 64, dtype=torch.float64) * 1e-7) @ basis.mT
    for root, factor in zip(inverse_root(factors.to(dtype), exponent, 0.01).double(), factors, strict=True):
        expected = root_of(factor, exponent, 0.01)
        assert (root - expected).norm() < 4e-3 * expected.norm()


def hard_factors(width=128):
    """Factors of which float16 rounds more than the smallest eigenvalues: of rank one, and with few large rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, width, width, generator=generator, dtype=torch.float64)
    x[0, :, 1:] = 0
    x[1, 3:] *= 1e-3
    x[2] *= torch.logspace(0, -4, width, dtype=torch.float64)[:, None]
    x[3] = torch.eye(width)
    return x @ x.mT


@pytest.mark.parametrize("power", _ROOT_STEPS)
def test_the_iteration_in_float16_stays_near(power):
    factors = hard_factors()
    norm = torch.linalg.matrix_norm(factors, 2)[:, None, None]
    m = (factors / norm + torch.eye(128) / 1024) / (1 + 1 / 1024)
    values, vectors = torch.linalg.eigh(m)
    expected = (vectors * values[:, None] ** (-1 / power)) @ vectors.mT
    for root, exact in zip(_inverse_root(m.half(), power).double(), expected, strict=True):
        assert (root - exact).norm() < 0.02 * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("exponent", [0.5, 0.25, 0.125])
@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_inverse_root_on_a_gpu_stays_near(exponent, ridge):
    factors = hard_factors()
    for root, factor in zip(inverse_root(factors.float().cuda(), exponent, ridge).cpu().double(), factors, strict=True):
        expected = root_of(factor, exponent, ridge)
        assert (root - expected).norm() < 0.05 * expected.norm()


def test_inverse_root_of_zeros_is_a_multiple_of_the_identity():
    zeros = inverse_root(torch.zeros(1, 5, 5), 0.25, 0.01)[0]
    torch.testing.assert_close(zeros, zeros[0, 0] * torch.eye(5), rtol=1e-3, atol=1e-3)
    assert zeros[0, 0] == pytest.approx(0.01**-0.25, rel=5e-3)
    without_ridge = inverse_root(torch.zeros(1, 5, 5), 0.5, 0.0)[0]
    assert torch.equal(without_ridge, without_ridge[0, 0] * torch.eye(5)) and without_ridge[0, 0].isfinite()


@pytest.mark.parametrize("p, low, steps", [*((p, 9.5e-4, s) for p, s in _ROOT_STEPS.items()), (2, 1e-6, MINIMAX)])
def test_the_steps_are_minimax(p, low, steps):
    """No other (a, b, c) has a smaller largest error: it is reached four times, with alternating signs."""
    low, high = low ** (1 / p), 1.0
    for a, b, c in steps:
        t = torch.logspace(math.log10(low), math.log10(high), 100001, dtype=torch.float64)
        error = 1 - t * (a + b * t**p + c * t ** (2 * p))
        largest = error.abs().max().item()
        runs = torch.tensor_split(error, (error.sign().diff() != 0).nonzero()[:, 0] + 1)
        assert [run.abs().max().item() for run in runs] == pytest.approx([largest] * 4, rel=5e-3, abs=5e-5)
        low, high = 1 - largest, 1 + largest


def test_wide_sides_are_whitened_in_blocks():
    p = parameters([(4, 12)])[0]
    g = torch.randn(4, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    p.grad, start = g, p.detach().clone()
    WhitenedMuon([p], lr=1.0, weight_decay=0.0, nesterov=False, sides="input", exponent=0.3, max_width=5).step()
    root = torch.block_diag(*(root_of(block.T @ block, 0.3, 0.01) for block in g.chunk(3, dim=1)))  # 3 of 4, not of 5
    orthogonal = newton_schulz(g @ root)
    update = orthogonal @ root
    expected = start - 0.2 * math.sqrt(12) * update * orthogonal.norm() / update.norm()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-10)


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        set_gradients(params, step)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [Muon, WhitenedMuon])
def test_a_resumed_optimizer_takes_the_same_steps(cls, dtype):
    whole = parameters(dtype=dtype)
    optimizer = cls(whole, lr=0.05, split=SPLITS)
    train(optimizer, whole, 13)
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in whole]
    resumed = [torch.nn.Parameter(w) for w in weights]
    again = cls(resumed, lr=0.05, split=SPLITS)
    again.load_state_dict(saved)
    twin = copy.deepcopy((resumed, again))
    for params, o in ((whole, optimizer), (resumed, again), twin):
        train(o, params, 12, first=13)
    for a, b, c in zip(whole, resumed, twin[0], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert saved["state"][0]["momentum_buffer"].dtype == dtype


def test_factors_keep_their_dtype_after_the_hooks_of_a_load():
    params = parameters([(4, 4), (4, 4)], torch.bfloat16)
    optimizer = WhitenedMuon(params, lr=0.05)
    train(optimizer, params, 2)
    saved = optimizer.state_dict()
    again = WhitenedMuon(parameters([(4, 4), (4, 4)], torch.bfloat16), lr=0.05)

    def swap(_, state_dict):
        return state_dict | {"state": {0: state_dict["state"][1], 1: state_dict["state"][0]}}

    again.register_load_state_dict_pre_hook(swap)
    again.load_state_dict(saved)
    first = again.state[again.param_groups[0]["params"][0]]
    for key, value in optimizer.state[params[1]].items():
        assert torch.equal(first[key], value) and first[key].dtype == value.dtype
    assert first["left_factor"].dtype == torch.float32


@pytest.mark.parametrize("cls", [Muon, WhitenedMuon])
def test_a_step_with_found_inf_changes_nothing(cls):
    params = parameters(dtype=torch.float32)
    optimizer = cls(params, lr=0.05, split=SPLITS, **({"interval": 1} if cls is WhitenedMuon else {}))
    train(optimizer, params, 3)
    before = copy.deepcopy([p.detach() for p in params]), copy.deepcopy(list(optimizer.state.values()))
    set_gradients(params, 3)
    params[0].grad[0, 0] = math.nan
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    del optimizer.found_inf
    for p, old, state, old_state in zip(params, before[0], optimizer.state.values(), before[1], strict=True):
        assert torch.equal(p, old) and all(torch.equal(state[key], old_state[key]) for key in old_state)


def test_a_first_step_that_is_skipped_leaves_no_trace():
    skipped, plain = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    for params, skips in ((skipped, True), (plain, False)):
        optimizer = WhitenedMuon(params, lr=0.05, interval=1)
        if skips:
            for p in params:
                p.grad = torch.full_like(p, math.inf)
            optimizer.found_inf = torch.ones(())
            optimizer.step()
            optimizer.found_inf = None
        train(optimizer, params, 3)
    assert all(torch.equal(a, b) for a, b in zip(skipped, plain, strict=True))


def test_grad_scale_divides_the_gradients():
    scaled, plain = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    for params, scale in ((scaled, 1024.0), (plain, None)):
        optimizer = WhitenedMuon(params, lr=0.05)
        for step in range(3):
            set_gradients(params, step)
            if scale:
                torch._foreach_mul_([p.grad for p in params], scale)
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.zeros(())
            optimizer.step()
    for a, b in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_factors_can_come_from_other_gradients():
    params = parameters([(5, 7)])
    optimizer = WhitenedMuon(params, lr=0.1, source="update_factors", sides="both", decay=0.5)
    set_gradients(params, 0)
    with pytest.warns(UserWarning, match="update_factors"):
        optimizer.step()
    set_gradients(params, 1)
    optimizer.update_factors()
    g = params[0].grad.clone()
    factor = optimizer.state[params[0]]["right_factor"].clone()
    torch.testing.assert_close(factor[0, 0], 0.5 * g.T @ g)
    set_gradients(params, 2)
    optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["right_factor"], factor)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="no gradients"):
        optimizer.update_factors()
    with pytest.raises(RuntimeError, match="source = 'gradient'"):
        WhitenedMuon(params).update_factors()


def test_a_convolution_is_stepped_as_a_matrix():
    conv = parameters([(4, 2, 3, 3)])[0]
    matrix = torch.nn.Parameter(conv.detach().clone().flatten(1))
    optimizers = Muon([conv], lr=0.1, flatten=True), Muon([matrix], lr=0.1)
    for step in range(3):
        set_gradients([conv], step)
        matrix.grad = conv.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(conv.flatten(1), matrix)


def test_a_matrix_of_zero_gradients_stays():
    p = parameters([(4, 4)], torch.float32)[0]
    start = p.detach().clone()
    for cls, settings in ((Muon, {}), (WhitenedMuon, {}), (WhitenedMuon, {"ridge": 0.0, "exponent": 0.5})):
        p.grad = torch.zeros_like(p)
        cls([p], lr=0.1, weight_decay=0.0, **settings).step()
        assert torch.equal(p, start)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr = -1.0"), ({"momentum": 1.0}, "momentum = 1.0"), ({"weight_decay": -1}, "weight_decay"),
        ({"split": 4}, "split = 4 does not divide the rows of a parameter of shape \\(6, 6\\)"),
        ({"split": [1, 1]}, "split has 2 numbers for the 1 parameters"), ({"exponent": -0.1}, "exponent"),
        ({"sides": "left"}, "sides = 'left'"), ({"source": "labels"}, "source = 'labels'"), ({"decay": 1.0}, "decay"),
        ({"interval": 0}, "interval = 0"), ({"max_width": 0}, "max_width = 0"), ({"ridge": -1.0}, "ridge"),
        ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients"),
        ({"nestrov": True}, "nestrov"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        WhitenedMuon(parameters([(6, 6)]), **settings)
    with pytest.raises(ValueError, match=message):  # of a group as well
        WhitenedMuon([{"params": parameters([(6, 6)]), **settings}])


def test_what_is_not_a_matrix_is_refused():
    for shape in ((4,), (2, 3, 4)):
        with pytest.raises(ValueError, match="steps matrices"):
            Muon(parameters([shape]))
    with pytest.raises(RuntimeError, match="complex"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
    p = parameters([(4, 4)])[0]
    optimizer = Muon([p])
    optimizer.state[p]["momentum_buffer"] = torch.zeros(2, 2)
    p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="does not fit a parameter of shape"):
        optimizer.step()
    p.grad = torch.zeros(4, 4, dtype=torch.float64).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


def test_orthogonalize_brings_singular_values_near_one():
    x = torch.randn(3, 2, 20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalize(x))
    assert values.shape == (3, 2, 20) and values.min() > 0.65 and values.max() < 1.25
    torch.testing.assert_close(orthogonalize(x.mT).mT, orthogonalize(x))


def test_matrices_of_unlike_rows_in_one_parameter_are_stepped_one_by_one():
    """Query, key and value of grouped-query attention, against three parameters."""
    rows = [6, 2, 2]
    for cls, settings in ((Muon, {}), (WhitenedMuon, {"exponent": 0.25})):
        fused, apart = parameters([(10, 6), (6, 6)]), parameters([(10, 6), (6, 6)])
        apart = [torch.nn.Parameter(part.detach().clone()) for part in apart[0].split(rows)] + apart[1:]
        optimizers = [cls(fused, lr=0.1, split=[rows, 1], **settings), cls(apart, lr=0.1, **settings)]
        for step in range(4):
            set_gradients(fused, step)
            for p, g in zip(apart, [*fused[0].grad.split(rows), fused[1].grad], strict=True):
                p.grad = g.clone()
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(fused[0].detach(), torch.cat([p.detach() for p in apart[:3]]), rtol=1e-12, atol=0)
        resumed = cls(parameters([(10, 6), (6, 6)]), lr=0.1, split=[rows, 1], **settings)
        resumed.load_state_dict(optimizers[0].state_dict())
        states = [o.state[o.param_groups[0]["params"][0]] for o in (optimizers[0], resumed)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert states[0]["left_factor_2"].shape == (2, 1, 2, 2)


@pytest.mark.parametrize("rows", [[6, 4, 2], [6, 0], [11], 4, 0])
def test_a_split_that_does_not_fit_is_refused(rows):
    with pytest.raises(ValueError, match="does not divide the rows"):
        Muon(parameters([(10, 6)]), split=[rows])


def changes_of_place(params, optimizer):
    """What moves tensors between two steps without a word to the optimizer."""
    p = params[0]
    yield "the parameter's storage", lambda: setattr(p, "data", p.data.clone())
    yield "the momentum", lambda: optimizer.state[p].update(momentum_buffer=optimizer.state[p]["momentum_buffer"] * 2)
    yield "the parameter", lambda: optimizer.param_groups[0]["params"].__setitem__(0, torch.nn.Parameter(p * 2))
    yield "the order", lambda: optimizer.param_groups[0]["params"].reverse()
    yield "a gradient that is missing", lambda: setattr(p, "grad", None)


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("cls", [Muon, WhitenedMuon])
def test_tensors_that_move_between_steps_are_noticed(cls, which):
    def run(fresh):
        params = parameters([(6, 6), (6, 6)], torch.float32)
        optimizer = cls(params, lr=0.1, split=1)
        set_gradients(params, 0)
        optimizer.step()
        set_gradients(params, 1)
        name, change = list(changes_of_place(params, optimizer))[which]
        change()
        live = optimizer.param_groups[0]["params"]
        if name == "the parameter":
            live[0].grad = torch.ones(6, 6)
        if fresh:  # without what was kept from the first step
            optimizer._plans.clear()
        optimizer.step()
        return [p.detach().clone() for p in live]

    for kept, fresh in zip(run(False), run(True), strict=True):
        assert torch.equal(kept, fresh)


def test_copies_of_an_optimizer_step_their_own_parameters():
    params = parameters(dtype=torch.float32)
    optimizer = WhitenedMuon(params, lr=0.1, split=SPLITS)
    set_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    twins, twin = copy.deepcopy((params, optimizer))
    set_gradients(twins, 1)
    twin.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    set_gradients(params, 1)
    optimizer.step()
    assert all(torch.equal(p, t) for p, t in zip(params, twins, strict=True))


def test_a_channels_last_convolution_is_refused():
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    weight.grad = torch.randn(4, 3, 2, 2)
    with pytest.raises(RuntimeError, match="contiguous_format"):
        Muon([weight], flatten=True).step()


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cls", [Muon, WhitenedMuon])
def test_steps_on_a_gpu_are_those_of_float64_without_a_synchronization(cls, fused):
    """Products in bfloat16 and roots in float16, against the same class in float64 on the CPU."""
    shapes = [(768, 256), (256, 256), (1024, 256), (256, 1024)]
    exact = parameters(shapes)
    ours = [torch.nn.Parameter(p.detach().float().cuda()) for p in exact]
    start = [p.detach().clone() for p in ours]
    optimizers = [cls(params, lr=0.01, split=[3, 1, 1, 1], fused=fused) for params in (exact, ours)]
    for step in range(12):
        set_gradients(exact, step)
        for p, q in zip(ours, exact, strict=True):
            p.grad = q.grad.float().cuda()
        optimizers[0].step()
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        optimizers[1].step()
        torch.cuda.set_sync_debug_mode("default")
    for p, q, s in zip(ours, exact, start, strict=True):
        moved, expected = p.cpu().double() - s.cpu().double(), q.detach() - s.cpu().double()
        assert (moved - expected).norm() < (0.03 if cls is Muon else 0.1) * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", [None, "gradient", "update_factors"])
def test_gradients_are_not_kept_alive_by_the_optimizer(source, dtype):
    params = parameters(dtype=dtype)
    optimizer = WhitenedMuon(params, split=SPLITS, source=source) if source else Muon(params, split=SPLITS)
    set_gradients(params, 0)
    gradients = [weakref.ref(p.grad) for p in params]
    if source == "update_factors":
        optimizer.update_factors()
        optimizer.zero_grad()
        assert not any(gradient() is not None for gradient in gradients)
        set_gradients(params, 0)
        gradients = [weakref.ref(p.grad) for p in params]
    optimizer.step()
    optimizer.zero_grad()
    assert not any(gradient() is not None for gradient in gradients)


# --- what users of other optimizers report ---------------------------------------------------------------------------

classes = pytest.mark.parametrize("cls", [Muon, WhitenedMuon])


@classes
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": "1e-3"}, "lr = '1e-3'"), ({"lr": math.inf}, "lr = inf"), ({"weight_decay": None}, "decay = None"),
        ({"momentum": None}, "momentum = None"), ({"lr": torch.tensor([1.0, 2.0])}, "lr = tensor"),
        ({"eps": 0.0}, "eps = 0.0"), ({"eps": 1e-30}, "eps = 1e-30"),  # 0 / 0 for a gradient of zeros
        ({"ns_coefficients": []}, "ns_coefficients = \\[\\]"), ({"ns_coefficients": None}, "ns_coefficients = None"),
        ({"ns_coefficients": (1.0, math.nan, 1.0)}, "ns_coefficients"), ({"ns_coefficients": 3.0}, "ns_coefficients"),
        ({"ns_coefficients": (1.0, 1.0, 1.0), "ns_steps": 2.5}, "ns_steps = 2.5"), ({"split": 2.0}, "split = 2.0"),
        ({"split": None}, "split = None"), ({"split": [[2.0, 4.0]]}, "split = \\[2.0, 4.0\\]"),
        ({"split": ["3"]}, "split = 3 does not"),
        ({"nesterov": "False"}, "nesterov = 'False'"), ({"cautious": None}, "cautious = None"),
        ({"flatten": "no"}, "flatten = 'no'"), ({"fused": "False"}, "fused = 'False'"),
    ],
)  # fmt: skip
def test_further_impossible_settings_are_named(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(parameters([(6, 6)]), **settings)


@pytest.mark.parametrize("key", ["exponent", "ridge", "decay", "interval", "max_width"])
@pytest.mark.parametrize("value", [math.inf, math.nan, "3", -1, [1]])
def test_impossible_whitening_is_named(key, value):
    with pytest.raises(ValueError, match=f"{key} = "):
        WhitenedMuon(parameters([(6, 6)]), **{key: value})
    for key in ("interval", "max_width"):
        with pytest.raises(ValueError, match=f"{key} = 2.5 is not possible, expected an integer from 1"):
            WhitenedMuon(parameters([(6, 6)]), **{key: 2.5})
    with pytest.raises(ValueError, match="interval = None"):
        WhitenedMuon(parameters([(6, 6)]), interval=None)


def test_a_split_may_be_a_number_of_numpy():
    assert len(Muon(parameters([(6, 6)]), split=np.int64(3)).param_groups) == 1
    assert len(Muon(parameters([(6, 6)]), split=[np.int64(3)]).param_groups) == 1


@classes
@pytest.mark.filterwarnings("ignore:optimizer contains")
def test_a_parameter_that_is_twice_in_a_group_is_refused(cls):
    p = parameters([(6, 6)])[0]
    with pytest.raises(ValueError, match="the same parameter twice"):
        cls([p, p])


@classes
@pytest.mark.parametrize("make", [torch.optim.Muon, torch.optim.AdamW, torch.optim.SGD], ids=lambda m: m.__name__)
def test_the_state_of_another_optimizer_is_refused_and_nothing_is_loaded(cls, make):
    p = parameters([(6, 6)], torch.float32)
    optimizer, other = cls(p, lr=0.1), make(p, lr=3.0)
    train(optimizer, p, 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"has no setting '(adjust_lr_fn|amsgrad|dampening)'"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.load_state_dict(before)  # no hook is left over
    assert torch.equal(optimizer.state_dict()["state"][0]["momentum_buffer"], before["state"][0]["momentum_buffer"])


@classes
def test_settings_that_a_saved_state_lacks_stay_those_of_the_optimizer(cls):
    """K. Jordan's Muon has lr, weight_decay and momentum only."""
    ours, plain = parameters(), parameters()
    settings = {"split": SPLITS, "cautious": True, **({"interval": 3} if cls is WhitenedMuon else {})}
    optimizers = cls(ours, lr=0.1, **settings), cls(plain, lr=0.5, **settings)
    saved = optimizers[0].state_dict()
    saved["param_groups"] = [{key: saved["param_groups"][0][key] for key in ("params", "lr", "momentum")}]
    saved["state"] |= {99: {"momentum_buffer": torch.ones(2)}, "shared": 5}  # of no parameter
    optimizers[1].load_state_dict(saved)
    assert optimizers[1].state.pop(99) and optimizers[1].state.pop("shared") == 5
    for params, optimizer in zip((ours, plain), optimizers, strict=True):
        train(optimizer, params, 4)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert optimizers[1].state_dict()["param_groups"] == optimizers[0].state_dict()["param_groups"]


@classes
def test_a_model_of_another_dtype_goes_on(cls):
    """Momenta, factors and roots follow; the steps in float64 are those of float64."""
    ends = []
    for dtypes in ([torch.float64], [torch.bfloat16, torch.float32, torch.float64]):
        model = torch.nn.Linear(6, 6, bias=False, dtype=dtypes[0])
        torch.nn.init.eye_(model.weight)
        optimizer = cls(model.parameters(), lr=0.01, weight_decay=0.0)
        for dtype in dtypes:
            model.to(dtype)
            train(optimizer, [model.weight], 3 if len(dtypes) > 1 else 9)
        ends.append(model.weight.detach())
    assert ends[1].dtype == torch.float64
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0.05)


@classes
def test_the_momentum_of_float16_is_float32(cls):
    """Of a gradient of 3e-7, 1 - momentum times it is 0 or 6e-8 in float16."""
    half, full = parameters([(6, 6)], torch.float16)[0], parameters([(6, 6)], torch.float16)[0].float()
    full = torch.nn.Parameter(full.detach())
    start, g = full.detach().clone(), (3e-7 * torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).half()
    for p in (half, full):
        p.grad = g.to(p.dtype)
        optimizer = cls([p], lr=0.5, weight_decay=0.0, eps=1e-15)
        optimizer.step()
        assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32
        again = cls([p], lr=0.5)
        again.load_state_dict(optimizer.state_dict())
        assert torch.equal(again.state[p]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])
    assert (half.float() - full).norm() < 0.02 * (full - start).norm()


@classes
@pytest.mark.parametrize("change", ["shape", "device", "dtype", "vector", "rows"])
def test_what_does_not_fit_after_a_change_is_refused(cls, change):
    params = parameters([(6, 6)], torch.float32)
    optimizer = cls(params, split=[3])
    train(optimizer, params, 1)
    state, group = optimizer.state[params[0]], optimizer.param_groups[0]["params"]
    new = {"shape": torch.zeros(6, 3), "device": torch.zeros(6, 6, device="meta"), "dtype": torch.zeros(6, 6).long()}
    if change in new:
        state["momentum_buffer"] = new[change]
    else:
        group[0] = torch.nn.Parameter(torch.ones(6) if change == "vector" else torch.ones(10, 6))
    group[0].grad = torch.ones_like(group[0])
    messages = {"vector": "steps matrices", "rows": "split = 3 does not divide the rows"}
    with pytest.raises(ValueError, match=messages.get(change, "does not fit a parameter of shape")):
        optimizer.step()


@classes
def test_a_step_in_autocast_is_the_same(cls):
    ends = []
    for enabled in (False, True):
        params = parameters(dtype=torch.float32)
        optimizer = cls(params, lr=0.1, split=SPLITS)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            train(optimizer, params, 2)
        ends.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


@classes
def test_a_matrix_that_is_transposed_in_place_is_noticed(cls):
    """The address, the number of elements and, of a square one, the shape stay."""
    ends = []
    for kept in (True, False):
        params = parameters([(6, 6)], torch.float32)
        optimizer = cls(params, lr=0.1)
        train(optimizer, params, 1)
        params[0].data = params[0].data.t()
        if not kept:
            optimizer._plans.clear()
        train(optimizer, params, 2, first=4)
        ends.append(params[0].detach().clone())
    assert torch.equal(*ends)


@classes
@pytest.mark.parametrize("made", [float, torch.tensor, lambda x: torch.full((1,), x)], ids=["float", "scalar", "(1,)"])
def test_a_scalers_numbers_may_be_floats_or_tensors_of_one_element(cls, made):
    params = parameters([(6, 6)], torch.float32)
    optimizer = cls(params, lr=0.1)
    for found_inf in (1.0, 0.0):
        optimizer.grad_scale, optimizer.found_inf = made(2.0), made(found_inf)
        before = params[0].detach().clone()
        train(optimizer, params, 1)
        assert torch.equal(params[0], before) == bool(found_inf)


def test_factors_that_are_not_finite_change_nothing_and_are_counted():
    params = parameters([(6, 6), (6, 6), (4, 8)], torch.float32)
    optimizer = WhitenedMuon(params, source="update_factors")
    set_gradients(params, 0)
    optimizer.update_factors()
    before = copy.deepcopy(list(optimizer.state.values()))
    for value in (math.inf, math.nan):
        set_gradients(params, 1)
        params[2].grad[0, 0] = value
        optimizer.update_factors()
    for state, old in zip(optimizer.state.values(), before, strict=True):
        assert all(torch.equal(state[key], old[key]) for key in old)
    assert optimizer.skipped_estimates.item() == 2
    for scale in (-1.0, math.nan, math.inf, "2"):
        with pytest.raises(ValueError, match="scale = "):
            optimizer.update_factors(scale=scale)


def test_matrices_without_factors_take_muons_step_and_those_beside_them_their_own():
    """An expert that saw no token in the estimate's batch."""
    settings = {"lr": 0.1, "source": "update_factors"}
    together, alone, muons = parameters([(6, 6)] * 2), parameters([(6, 6)] * 2)[:1], parameters([(6, 6)] * 2)[1:]
    optimizers = WhitenedMuon(together, **settings), WhitenedMuon(alone, **settings)
    for params, optimizer in zip((together, alone), optimizers, strict=True):
        set_gradients(params[:1], 0)
        optimizer.update_factors()
        set_gradients(params, 1)
    muons[0].grad = together[1].grad.clone()
    with pytest.warns(UserWarning, match=r"update_factors\(\) had no gradient of some matrices yet"):
        optimizers[0].step()
    optimizers[1].step()
    Muon(muons, lr=0.1).step()
    torch.testing.assert_close(together[0], alone[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together[1], muons[0], rtol=1e-12, atol=1e-12)


def test_roots_of_another_shape_are_refused_between_two_computations_too():
    params = parameters([(8, 8)], torch.float32)
    optimizer = WhitenedMuon(params, max_width=4)
    train(optimizer, params, 2)
    optimizer.param_groups[0]["max_width"] = None
    with pytest.raises(ValueError, match=r"left_factor has the shape \(1, 2, 4, 4\), expected \(1, 1, 8, 8\)"):
        train(optimizer, params, 1)
    sampled = WhitenedMuon(params, source="update_factors")
    sampled.state[params[0]] = optimizer.state[params[0]]
    with pytest.raises(ValueError, match=r"left_root has the shape \(1, 2, 4, 4\)"):
        train(sampled, params, 1)


@classes
def test_schedulers_keys_are_known_to_a_new_optimizer(cls):
    params = parameters([(6, 6)])
    optimizer = cls(params)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
    assert optimizer.param_groups[0]["momentum"] == 0.95
    cls(optimizer.param_groups)


def test_a_momentum_of_other_strides_than_its_convolution_is_refused():
    """Flattened it would be a copy, whose average is lost."""
    conv = parameters([(4, 3, 2, 2)], torch.float32)[0]
    optimizer = Muon([conv], flatten=True)
    train(optimizer, [conv], 1)
    saved = optimizer.state_dict()
    saved["state"][0]["momentum_buffer"] = saved["state"][0]["momentum_buffer"].to(memory_format=torch.channels_last)
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="contiguous_format"):
        train(optimizer, [conv], 1)
