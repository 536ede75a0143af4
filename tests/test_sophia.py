"""SophiaG and SophiaH against a float64 reference, and everything an optimizer of torch.optim is expected to do."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sophia import SophiaG, SophiaH

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}
IMPLEMENTATIONS = [{"foreach": False}, {"foreach": True}]


class Reference:
    """Design and paper, in float64, one Python list entry a parameter; nothing of sophia.py is used."""

    def __init__(self, params, lr=1e-4, betas=(0.965, 0.99), rho=0.04, weight_decay=0.1, eps=None, maximize=False,
                 bias_correction=False, nesterov=False, max_grad_norm=None):  # fmt: skip
        self.p = [p.detach().double().clone() for p in params]
        self.m = [torch.zeros_like(p) for p in self.p]
        self.h = [torch.zeros_like(p) for p in self.p]
        self.lr, (self.b1, self.b2), self.rho, self.wd, self.eps = lr, betas, rho, weight_decay, eps
        self.sign, self.correct, self.max_norm, self.n = -1 if maximize else 1, bias_correction, max_grad_norm, 0
        self.nesterov = nesterov

    def estimate(self, estimates):
        self.n += 1
        self.h = [self.b2 * h + (1 - self.b2) * e.double() for h, e in zip(self.h, estimates, strict=True)]

    def step(self, grads, bs):
        grads = [g.double() for g in grads]
        if self.max_norm is not None:
            norm = math.sqrt(sum(float((g * g).sum()) for g in grads))
            grads = [g * min(1.0, self.max_norm / (norm + 1e-6)) for g in grads]
        for i, grad in enumerate(grads):
            self.m[i] = self.b1 * self.m[i] + (1 - self.b1) * self.sign * grad
            m = self.b1 * self.m[i] + (1 - self.b1) * self.sign * grad if self.nesterov else self.m[i]
            h = self.h[i] / (1 - self.b2**self.n) if self.correct and self.n else self.h[i]
            if self.eps is None:
                update = m.sign() * (m.abs() / (self.rho * bs * h + 1e-15)).clamp(max=1)
            else:
                update = (m / (self.rho * h).clamp(min=self.eps)).clamp(-1, 1)
            self.p[i] = self.p[i] * (1 - self.lr * self.wd) - self.lr * update


SHAPES = ((5, 3), (4,), (2, 3, 2), ())


def make_params(dtype, seed=0, shapes=SHAPES, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [nn.Parameter(t.to(device, dtype)) for t in drawn]


def run_both(cls, dtype, steps=6, bs=32, shapes=SHAPES, device="cpu", **settings_):
    implementation = {k: settings_.pop(k) for k in ("foreach", "fused") if k in settings_}
    params = make_params(dtype, shapes=shapes, device=device)
    optimizer = cls(params, lr=0.01, **settings_, **implementation)
    eps = optimizer.defaults.get("eps")
    reference = Reference(params, lr=0.01, rho=optimizer.defaults["rho"], eps=eps, **settings_)
    generator = torch.Generator().manual_seed(1)

    def random_like(p, scale):
        return (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(device, dtype)

    for t in range(steps):
        if t % 2 == 0:
            estimates = [random_like(p, 0.3) for p in params]
            if cls is SophiaG:
                for p, e in zip(params, estimates, strict=True):
                    p.grad = e
                optimizer.update_hessian(scale=0.5)
                reference.estimate([0.5 * e.double() ** 2 for e in estimates])
            else:
                optimizer.update_hessian(estimates)
                reference.estimate(estimates)
        for p in params:
            p.grad = random_like(p, 1.0)
        optimizer.step(**({"bs": bs} if cls is SophiaG else {}))
        reference.step([p.grad for p in params], bs)
    return params, optimizer, reference


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cls", [SophiaG, SophiaH])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"maximize": True},
        {"bias_correction": True},
        {"max_grad_norm": 0.5},
        {"weight_decay": 0.0},
        {"nesterov": True, "maximize": True, "max_grad_norm": 0.5},
    ],
    ids=lambda o: next(iter(o), "default"),
)
def test_equals_the_float64_reference(cls, dtype, options, implementation):
    params, optimizer, reference = run_both(cls, dtype, **options, **implementation)
    tolerance = TOLERANCE[dtype]
    for i, p in enumerate(params):
        state = optimizer.state[p]
        torch.testing.assert_close(p.double(), reference.p[i], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(state["exp_avg"].double(), reference.m[i], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(state["hessian"].double(), reference.h[i], rtol=tolerance, atol=tolerance)
        assert state["step"].item() == 6
        assert {t.dtype for k, t in state.items() if "step" not in k} == {dtype}


def test_a_step_by_hand():
    p = nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    optimizer = SophiaG([p], lr=0.1, betas=(0.5, 0.5), rho=0.1, weight_decay=1.0)
    p.grad = torch.tensor([2.0, 0.1, 0.0])
    optimizer.update_hessian()  # h = 2, 0.005, 0
    p.grad = torch.tensor([1.0, -1.0, 2.0])
    optimizer.step(bs=10)  # m = 0.5, -0.5, 1; rho bs h = 2, 0.005, 0; ratios 0.25, clipped to -1, clipped to 1
    torch.testing.assert_close(p.data, torch.tensor([0.9 - 0.025, 0.9 + 0.1, 0.9 - 0.1]))


def test_before_any_estimate_every_coordinate_moves_by_lr_and_a_zero_momentum_does_not():
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1e-3, -5.0, 0.0])
    SophiaG([p], lr=0.1).step()
    assert p.tolist() == pytest.approx([-0.1, 0.1, 0.0])


def test_sophia_h_falls_back_to_the_sign_where_curvature_is_negative():
    p = nn.Parameter(torch.zeros(3))
    optimizer = SophiaH([p], lr=0.1, rho=1.0, betas=(0.0, 0.0))
    optimizer.update_hessian([torch.tensor([-4.0, 4.0, 0.0])])
    p.grad = torch.tensor([2.0, 2.0, -2.0])
    optimizer.step()
    assert p.tolist() == pytest.approx([-0.1, -0.05, 0.1])


def test_scale_makes_the_curvature_independent_of_the_estimation_batch():
    """B grad^2 with B labels: with scale = B / bs, bs times the state is the same number for every B."""
    curvatures = []
    for labels in (4, 16, 64):
        p = nn.Parameter(torch.zeros(1))
        optimizer = SophiaG([p])
        p.grad = torch.tensor([3.0 / math.sqrt(labels)])  # a mean of B independent numbers shrinks like this
        optimizer.update_hessian(scale=labels / 64)
        curvatures.append(64 * optimizer.state[p]["hessian"].item())
    assert curvatures == pytest.approx([curvatures[0]] * 3)


def test_the_first_bias_corrected_curvature_is_the_estimate_itself():
    for value in (False, True):
        p = nn.Parameter(torch.zeros(1))
        optimizer = SophiaG([p], lr=1.0, rho=1.0, betas=(0.0, 0.99), weight_decay=0.0, bias_correction=value)
        p.grad = torch.tensor([2.0])
        optimizer.update_hessian()
        p.grad = torch.tensor([0.01])
        optimizer.step(bs=1)
        assert p.item() == pytest.approx(-0.01 / (4.0 if value else 0.04), rel=1e-4)


# --- what a torch optimizer must do ----------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parameters_without_gradients_are_left_alone(implementation):
    params = make_params(torch.float32)
    before = params[1].detach().clone()
    optimizer = SophiaG(params, **implementation)
    for p in (params[0], params[2]):
        p.grad = torch.ones_like(p)
    optimizer.update_hessian()
    optimizer.step()
    assert torch.equal(params[1], before) and params[1] not in optimizer.state
    assert params[0] in optimizer.state
    optimizer.zero_grad()
    optimizer.step()  # nothing has a gradient
    assert optimizer.state[params[0]]["step"].item() == 1


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="SophiaG does not support sparse gradients"):
        SophiaG(embedding.parameters()).step()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_complex_parameters_are_two_real_ones(implementation):
    torch.manual_seed(0)
    z = nn.Parameter(torch.randn(4, dtype=torch.complex64))
    x = nn.Parameter(torch.view_as_real(z.detach()).clone())
    grads = [torch.randn(4, dtype=torch.complex64) for _ in range(3)]
    seen = []
    for p in (z, x):
        optimizer = SophiaG([p], lr=0.1, max_grad_norm=1.0, **implementation)
        for g in grads:
            p.grad = g if p is z else torch.view_as_real(g).clone()
            optimizer.update_hessian()
            optimizer.step(bs=25)
        seen.append(optimizer.statistics(bs=25))
    torch.testing.assert_close(torch.view_as_real(z.detach()), x.detach())
    assert seen[0] == pytest.approx(seen[1]) and 0 < seen[0]["win_rate"] < 1


@pytest.mark.parametrize("stride", ["transposed", "channels_last", "expanded_gradient"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_do_not_matter(stride, implementation):
    base = torch.randn(2, 3, 4, 4)
    if stride == "transposed":
        p = nn.Parameter(base.clone().transpose(1, 3))
    elif stride == "channels_last":
        p = nn.Parameter(base.clone().to(memory_format=torch.channels_last))
    else:
        p = nn.Parameter(base.clone())
    q = nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    for t in (p, q):
        optimizer = SophiaG([t], lr=0.1, **implementation)
        grad = torch.arange(t.numel(), dtype=torch.float32).sin().view(t.shape)
        t.grad = grad if stride != "expanded_gradient" else torch.tensor(0.5).expand(t.shape)
        for _ in range(2):
            optimizer.update_hessian()
            optimizer.step(bs=8)
    torch.testing.assert_close(p.detach(), q.detach())


def test_groups_have_their_own_settings_and_can_be_added():
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = SophiaG([{"params": [a], "lr": 0.5, "weight_decay": 0.0}], lr=0.1, weight_decay=1.0)
    optimizer.add_param_group({"params": [b]})
    for p in (a, b):
        p.grad = torch.ones(2)
    optimizer.step()
    assert a.tolist() == pytest.approx([0.5] * 2) and b.tolist() == pytest.approx([0.8] * 2)
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": -1})


@pytest.mark.parametrize(
    ("settings_", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
        ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -0.1)}, ValueError, "Invalid beta parameter at index 1: -0.1"),
        ({"rho": -0.1}, ValueError, "Invalid rho value: -0.1"),
        ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay value: -0.1"),
        ({"max_grad_norm": 0.0}, ValueError, "Invalid max_grad_norm: 0.0"),
        ({"foreach": True, "fused": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together."),
        ({"fused": True}, RuntimeError, "`fused=True` requires all the params to be floating point Tensors"),
        ({"lr": torch.tensor([1.0, 2.0])}, ValueError, r"Invalid learning rate: tensor\(\[1., 2.\]\)"),
        ({"lr": torch.tensor(1.0), "foreach": True}, ValueError, "lr as a Tensor is not supported for capturable"),
    ],
)
def test_bad_settings_are_named(settings_, error, message, monkeypatch):
    if "fused" in settings_:
        pytest.importorskip("sophia_fused")  # here still in Triton's interpreter, for the tests that follow
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(error, match=message):
        SophiaG([nn.Parameter(torch.ones(1))], **settings_)


def test_bad_calls_are_named():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match="Invalid bs: 0"):
        SophiaG([p]).step(bs=0)
    with pytest.raises(ValueError, match="Invalid epsilon value: -1"):
        SophiaH([p], eps=-1)
    with pytest.raises(ValueError, match="got 2 estimates for 1 parameters"):
        SophiaH([p]).update_hessian([p, p])
    with pytest.raises(ValueError, match=r"got shape \(3,\) for a parameter of shape \(2,\)"):
        SophiaH([p]).update_hessian([torch.ones(3)])


def test_a_closure_runs_with_gradients_and_its_value_comes_back():
    for cls in (SophiaG, SophiaH):
        p = nn.Parameter(torch.tensor([2.0]))
        optimizer = cls([p], lr=0.1, weight_decay=0.0)

        def closure(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (p**2).sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 4.0
        assert p.item() == pytest.approx(1.9)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_tensor_lr_is_a_float_lr_and_schedulers_drive_both(capturable):
    results = []
    for lr in (0.1, torch.tensor(0.1)):
        p = nn.Parameter(torch.ones(3))
        optimizer = SophiaG([p], lr=lr, capturable=capturable)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1))
        for _ in range(3):
            p.grad = torch.full((3,), 0.5)
            optimizer.step()
            scheduler.step()
        results.append(p.detach().clone())
    torch.testing.assert_close(*results)
    assert results[0][0].item() == pytest.approx(((0.99 - 0.1) * 0.995 - 0.05) * (1 - 0.1 / 30) - 0.1 / 3, rel=1e-5)


def test_one_cycle_and_cosine_schedulers_accept_it():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = SophiaG([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for _ in range(4):
        optimizer.step(bs=7)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def trained(cls=SophiaG, steps=3, **settings_):
    params = make_params(torch.float32)
    optimizer = cls([{"params": params[:2], "name": "decay"}, {"params": params[2:], "weight_decay": 0.0}], **settings_)
    train(optimizer, steps)
    return optimizer


def train(optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        if isinstance(optimizer, SophiaG):
            optimizer.update_hessian()
        else:
            optimizer.update_hessian([p.grad for p in params])
        optimizer.step()


def same(a, b):
    for ga, gb in zip(a.param_groups, b.param_groups, strict=True):
        for p, q in zip(ga["params"], gb["params"], strict=True):
            assert torch.equal(p, q)
            assert a.state[p].keys() == b.state[q].keys()
            assert all(torch.equal(a.state[p][k], b.state[q][k]) for k in a.state[p])


@pytest.mark.parametrize("cls", [SophiaG, SophiaH])
@pytest.mark.parametrize("settings_", [{}, {"bias_correction": True, "max_grad_norm": 1.0}, {"foreach": True}])
def test_copies_and_checkpoints_continue_the_same_run(cls, settings_):
    original = trained(cls, **settings_)
    copied, pickled = copy.deepcopy(original), pickle.loads(pickle.dumps(original))
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)
    loaded = trained(cls, steps=0, **settings_)
    for group, other in zip(loaded.param_groups, original.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            p.data.copy_(q.data)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copied, pickled, loaded):
        assert twin.max_grad_norm == original.max_grad_norm and twin.foreach == original.foreach
    for optimizer in (original, copied, pickled, loaded):
        train(optimizer, 2, seed=5)
    for twin in (copied, pickled, loaded):
        same(original, twin)


def official_state_dict(params, capturable=False):
    """What the official class saves: these keys of state and groups, and no others."""
    step = torch.full((1,), 7.0) if capturable else torch.tensor(7.0)
    state = {
        i: {"step": step.clone(), "exp_avg": torch.full_like(p, 0.25), "hessian": torch.full_like(p, 0.5)}
        for i, p in enumerate(params)
    }
    group = {"lr": 3e-4, "betas": (0.9, 0.95), "rho": 0.03, "weight_decay": 0.2, "maximize": False}
    group |= {"capturable": capturable, "params": list(range(len(params)))}
    return {"state": state, "param_groups": [group]}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_an_official_checkpoint_loads_and_goes_on(capturable, bias_correction):
    params = make_params(torch.float32, shapes=((3, 2), (2,)))
    optimizer = SophiaG(params, bias_correction=bias_correction)
    optimizer.load_state_dict(official_state_dict(params, capturable))
    before = params[1].detach().clone()
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(bs=100)
    m = 0.9 * 0.25  # a curvature of unknown age is not corrected
    expected = before * (1 - 3e-4 * 0.2) - 3e-4 * m / (0.03 * 100 * 0.5 + 1e-15)
    torch.testing.assert_close(params[1].detach(), expected)
    assert optimizer.state[params[0]]["step"].item() == 8
    optimizer.update_hessian()
    assert set(optimizer.state_dict()["param_groups"][0]) >= {"lr", "betas", "rho", "weight_decay", "capturable"}


def test_our_checkpoint_has_the_official_keys():
    state = trained().state_dict()["state"]
    assert all(set(s) == {"step", "exp_avg", "hessian"} for s in state.values())


# --- GradScaler ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cls", [SophiaG, SophiaH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_found_inf_leaves_everything_as_it_was(cls, implementation, dtype):
    params = make_params(dtype)
    optimizer = cls(params, lr=0.1, bias_correction=True, max_grad_norm=1.0, **implementation)
    for t in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.update_hessian(*([] if cls is SophiaG else [[p.grad for p in params]]))
        optimizer.step()
        if t == 0:
            before = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
            optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(1024.0)
            for p in params:
                p.grad = torch.full_like(p, float("nan"))
                p.grad.view(-1)[0] = float("inf")
            optimizer.update_hessian(*([] if cls is SophiaG else [[p.grad for p in params]]))
            optimizer.step()
            for p, old in zip(params, before[0], strict=True):
                assert torch.equal(p, old)
            for i, state in optimizer.state_dict()["state"].items():
                assert all(torch.equal(state[k], before[1][i][k]) for k in state)
            del optimizer.found_inf, optimizer.grad_scale
    assert optimizer.state[params[0]]["step"].item() == 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_grad_scale_divides_before_clipping_and_squaring(implementation):
    runs = []
    for scale in (None, 64.0):
        params = make_params(torch.float32)
        optimizer = SophiaG(params, lr=0.1, max_grad_norm=0.5, **implementation)
        if scale:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator) * (scale or 1.0)
            optimizer.update_hessian(scale=0.25)
            optimizer.step(bs=4)
        runs.append((params, optimizer))
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(p, q)
    torch.testing.assert_close(runs[0][1].grad_norm, runs[1][1].grad_norm)


@pytest.mark.parametrize("unscale_first", [False, True])
def test_torchs_grad_scaler(unscale_first):
    """The real scaler: same trajectory as without one, a step with an infinite gradient is skipped."""

    def run(scaled):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = SophiaG(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000, enabled=scaled)
        x = torch.randn(8, 4)
        for t in range(4):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            scaler.scale(loss).backward()
            if t == 2:
                if not scaled:
                    continue  # what the scaler will do
                model.weight.grad[0, 0] = float("inf")
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer, bs=8)
            scaler.update()
        assert optimizer.state[model.weight]["step"].item() == 3
        assert not scaled or scaler.get_scale() == 128.0
        return model.weight.detach().clone()

    torch.testing.assert_close(run(True), run(False))


# --- clipping and statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("max_norm", [0.5, 1000.0])
def test_max_grad_norm_is_clip_grad_norm_then_step(implementation, max_norm):
    inside, outside = make_params(torch.float32), make_params(torch.float32)
    a = SophiaG(inside, lr=0.1, max_grad_norm=max_norm, **implementation)
    b = SophiaG(outside, lr=0.1, **implementation)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for p, q in zip(inside, outside, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        kept = [p.grad.clone() for p in inside]
        norm = torch.nn.utils.clip_grad_norm_(outside, max_norm)
        a.step()
        b.step()
        torch.testing.assert_close(a.grad_norm, norm)
        assert all(torch.equal(p.grad, g) for p, g in zip(inside, kept, strict=True))
    for p, q in zip(inside, outside, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bias_correction", [False, True])
def test_statistics(implementation, bias_correction):
    optimizer = trained(bias_correction=bias_correction, **implementation)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    m = [optimizer.state[p]["exp_avg"].double() for p in params]
    h = [optimizer.state[p]["hessian"].double() for p in params]
    correction, bs = (1 - 0.99**3, 0.5) if bias_correction else (1, 12)
    wins = [int((a.abs() < 0.04 * bs * b / correction).sum()) for a, b in zip(m, h, strict=True)]
    sizes = [p.numel() for p in params]
    stats = optimizer.statistics(bs=bs)
    assert stats["win_rate"] == sum(wins) / sum(sizes)
    assert stats["win_rate/decay"] == sum(wins[:2]) / sum(sizes[:2])
    assert stats["win_rate/1"] == sum(wins[2:]) / sum(sizes[2:])
    assert 0 < stats["win_rate"] < 1
    flat_h, flat_m = torch.cat([t.flatten() for t in h]), torch.cat([t.flatten() for t in m])
    assert stats["hessian_norm"] == pytest.approx(flat_h.abs().sum().item(), rel=1e-5)
    assert stats["hessian_norm2"] == pytest.approx(flat_h.norm().item(), rel=1e-5)
    assert stats["momentum_norm"] == pytest.approx(flat_m.norm().item(), rel=1e-5)


def test_statistics_before_the_first_step_are_zero():
    assert SophiaG([nn.Parameter(torch.ones(2))]).statistics() == {
        "win_rate": 0.0, "win_rate/0": 0.0, "hessian_norm": 0.0, "hessian_norm2": 0.0, "momentum_norm": 0.0
    }  # fmt: skip
    p = nn.Parameter(torch.ones(2))
    optimizer = SophiaH([p], eps=0.5)
    optimizer.update_hessian([torch.tensor([-1.0, 1.0])])
    assert optimizer.statistics()["win_rate"] == 1.0  # |m| = 0 is under eps


# --- properties ------------------------------------------------------------------------------------------------------

shapes = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(
    shapes=shapes,
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    lr=st.floats(0, 1),
    rho=st.floats(0, 10),
    bs=st.integers(1, 10**6),
    gradient_scale=st.sampled_from([0.0, 1e-6, 1.0, 1e6]),
    seed=st.integers(0, 2**16),
    transposed=st.booleans(),
    groups=st.integers(1, 3),
)
def test_properties(shapes, dtype, lr, rho, bs, gradient_scale, seed, transposed, groups):
    """No coordinate moves by more than lr; implementations agree; scaling the gradients alone changes nothing when
    every coordinate is clipped; nothing becomes NaN, whatever the shapes, strides, dtypes and groups."""
    moved = []
    for implementation in IMPLEMENTATIONS:
        torch.manual_seed(seed)
        params = []
        for shape in shapes:
            t = torch.randn(shape, dtype=torch.float64).to(dtype)
            params.append(nn.Parameter(t.transpose(0, -1) if transposed and t.dim() > 1 else t))
        start = [p.detach().clone() for p in params]
        optimizer = SophiaG([{"params": params[i::groups]} for i in range(groups) if params[i::groups]],
                            lr=lr, rho=rho, weight_decay=0.0, **implementation)  # fmt: skip
        for p in params:
            p.grad = torch.randn(p.shape, dtype=torch.float64).to(dtype) * gradient_scale
        optimizer.update_hessian()
        optimizer.step(bs=bs)
        for p, old in zip(params, start, strict=True):
            assert not p.isnan().any()
            step = (p.double() - old.double()).abs()
            ulp = torch.finfo(dtype).eps * (old.double().abs() + lr)
            assert (step <= lr + ulp).all()
            assert p.stride() == old.stride() and optimizer.state[p]["hessian"].shape == p.shape
        moved.append([p.detach().double() for p in params])
    for a, b in zip(*moved, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps * (1 + lr))
