"""The kernels of muon_fused.py: in Triton's interpreter where there is no GPU, and on the GPU with

python -m pytest -m gpu tests/test_muon_fused.py
"""

import copy
import sys

import pytest
import torch

pytest.importorskip("triton", reason="the fused steps need Triton")

import muon
import muon_fused
from muon import Muon, WhitenedMuon
from tests.test_muon import parameters, set_gradients
from tests.test_sophia_fused import devices

SHAPES = [(8, 8), (70, 50), (50, 70), (64, 96), (21, 7), (8, 8)]  # more than a program, odd ends
SPLITS = [1, 1, 1, 2, [7, 7, 7], 1]
SETTINGS = [{}, {"nesterov": False, "cautious": True}, {"momentum": 0.3, "weight_decay": 0.0}]


def run(cls, dtype, device, steps=5, lr=0.1, **settings):
    """The parameters after steps of which the third finds an infinity; all gradients come scaled by 8."""
    params = [torch.nn.Parameter(p.detach().to(device, dtype)) for p in parameters(SHAPES)]
    optimizer = cls([{"params": params, "split": SPLITS}], lr=lr, **settings)
    for step in range(steps):
        set_gradients(params, step)
        for p in params:
            p.grad *= 8
        optimizer.grad_scale, optimizer.found_inf = (torch.tensor(x, device=device) for x in (8.0, float(step == 2)))
        if step == 2:
            params[1].grad[0, 0], params[2].grad[3, 3] = torch.inf, torch.nan
        optimizer.step()
    return params, optimizer


@devices
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("cls", [Muon, WhitenedMuon])
def test_fused_steps_are_those_of_float64(device, cls, settings, monkeypatch):
    exact, _ = run(cls, torch.float64, "cpu", **settings)
    launched = []
    monkeypatch.setattr(muon_fused, "_launch", lambda kernel, *args, launch=muon_fused._launch, **others: (
        launched.append(kernel), launch(kernel, *args, **others)))  # fmt: skip
    ours, _ = run(cls, torch.float32, device, fused=True, **settings)
    assert launched.count(muon_fused._apply_kernel) == 5 * 5, "a launch for each of five shapes in each step"
    start = parameters(SHAPES)
    tight = 2e-3 if "cautious" in settings else 2e-5  # an update near 0 may have the other sign, and decays or not
    tolerance = tight if device == "cpu" else 0.1  # bfloat16 changes small matrices by 2 to 7%
    for p, q, s in zip(ours, exact, start, strict=True):
        moved = p.detach().cpu().double() - s
        assert (moved - (q.detach() - s)).norm() < tolerance * (q.detach() - s).norm()


@devices
@pytest.mark.parametrize("cls", [Muon, WhitenedMuon])
def test_a_skipped_fused_step_changes_nothing(device, cls):
    params, optimizer = run(cls, torch.float32, device, steps=2, fused=True)
    before = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
    set_gradients(params, 9)
    params[0].grad[1, 1] = torch.nan
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before[0], strict=True))
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[1][number][key]) for key, value in state.items())


@devices
@pytest.mark.parametrize("fused", [False, True])
def test_an_update_that_is_not_finite_is_skipped_for_its_matrix_until_its_root_is_finite_again(device, fused):
    settings = {"interval": 3, "weight_decay": 0.0, "fused": fused}
    start = [p.detach().to(device) for p in parameters([(8, 16)] * 3, torch.float32)]
    params, expected = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizer, undisturbed = (WhitenedMuon(of, lr=0.1, **settings) for of in (params, expected))
    for step in range(4):
        for of in (params, expected):
            set_gradients(of, step)
        if step == 1:
            optimizer.state[params[1]]["left_root"][0, 0, 0, 0] = torch.nan
            before = params[1].detach().clone()
        optimizer.step()
        undisturbed.step()
        assert torch.equal(params[0], expected[0]) and torch.equal(params[2], expected[2])
        assert torch.equal(params[1], before) if step in (1, 2) else params[1].isfinite().all()
        assert int(optimizer.skipped_matrices) == min(step, 2) and int(undisturbed.skipped_matrices) == 0
    assert not torch.equal(params[1], before) and torch.equal(
        optimizer.state[params[1]]["left_root"], undisturbed.state[expected[1]]["left_root"]
    )


@devices
def test_learning_rates_are_floats_or_tensors(device):
    params = [run(Muon, torch.float32, device, fused=True, lr=lr)[0] for lr in (0.1, torch.tensor(0.1, device=device))]
    assert all(torch.equal(p, q) for p, q in zip(*params, strict=True))


@devices
def test_bfloat16_is_rounded_once_a_step(device):
    exact, _ = run(Muon, torch.float64, "cpu")
    ours, _ = run(Muon, torch.bfloat16, device, fused=True)
    for p, q in zip(ours, exact, strict=True):
        assert (p.detach().cpu().double() - q).norm() < 0.02 * q.norm()


@devices
def test_what_the_kernels_cannot_take_is_stepped_without_them(device):
    """A parameter that is a transpose, and one in float64."""
    for dtype, tolerance in ((torch.float32, 1e-5 if device == "cpu" else 0.03), (torch.float64, 1e-12)):
        if device == "cuda" and dtype == torch.float64:
            continue
        weights = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        params = [torch.nn.Parameter(weights.to(device, dtype).T), torch.nn.Parameter(weights.T.contiguous())]
        for p, fused in zip(params, (True, False), strict=True):
            p.grad = torch.ones_like(p) * torch.arange(6, device=p.device)
            Muon([p], lr=0.1, fused=fused).step()
        assert (params[0].detach().cpu().double() - params[1].detach()).norm() < tolerance


def test_a_state_from_before_the_setting_loads():
    params, optimizer = run(Muon, torch.float32, "cpu")
    state = optimizer.state_dict()
    del state["param_groups"][0]["fused"]
    optimizer.load_state_dict(state)
    set_gradients(params, 7)
    optimizer.step()


def test_a_fused_state_goes_on_where_there_is_no_triton_and_back(monkeypatch):
    params, fused = run(Muon, torch.float32, "cpu", fused=True)
    saved = copy.deepcopy(fused.state_dict())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "muon_fused", None)
        plain = Muon([{"params": params, "split": SPLITS}])
        plain.load_state_dict(saved)
    assert [group["fused"] for group in plain.param_groups] == [False]
    assert plain.param_groups[0]["lr"] == fused.param_groups[0]["lr"]
    fused.load_state_dict(plain.state_dict())
    assert fused.param_groups[0]["fused"]


def test_fused_without_its_file_says_what_to_copy(monkeypatch):
    monkeypatch.setitem(sys.modules, "muon_fused", None)
    with pytest.raises(RuntimeError, match=r"copy muon_fused\.py beside muon\.py"):
        Muon(parameters(SHAPES, torch.float32), fused=True)


@devices
@pytest.mark.parametrize("change", ["negated gradient", "gradient without memory", "transposed in place", "float16"])
def test_tensors_that_the_kernels_cannot_take_as_they_are_take_the_same_steps(device, change):
    ends = []
    for fused in (True, False):
        dtype = torch.float16 if change == "float16" else torch.float32
        params = [torch.nn.Parameter(p.detach().to(device, dtype)) for p in parameters([(8, 8), (8, 8)])]
        optimizer = Muon(params, lr=0.1, fused=fused)
        for step in range(3):
            set_gradients(params, step)
            if change == "negated gradient":
                params[0].grad = torch._neg_view(params[0].grad)
            if change == "gradient without memory" and step == 2:
                params[0].grad = torch._efficientzerotensor((8, 8), device=device)
            if change == "transposed in place" and step == 1:
                params[0].data = params[0].data.t()
            optimizer.step()
        ends.append(params)
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(
            p, q, rtol=1e-2 if device == "cuda" else 1e-5, atol=1e-2 if device == "cuda" else 1e-5
        )


@devices
def test_updates_of_blocks_of_width_1_are_those_of_float64(device):
    """Their strides are a transpose's."""
    exact, _ = run(WhitenedMuon, torch.float64, "cpu", max_width=1)
    ours, _ = run(WhitenedMuon, torch.float32, device, fused=True, max_width=1)
    for p, q, s in zip(ours, exact, parameters(SHAPES), strict=True):
        moved, expected = p.detach().cpu().double() - s, q.detach() - s
        assert (moved - expected).norm() < (2e-5 if device == "cpu" else 0.1) * expected.norm()


@devices
@pytest.mark.parametrize("cls", [Muon, WhitenedMuon])
def test_a_backward_pass_through_values_before_a_fused_step_is_an_error(device, cls):
    p = torch.nn.Parameter(torch.ones(8, 8, device=device))
    output = torch.ones(1, 8, device=device, requires_grad=True) @ p
    p.grad = torch.eye(8, device=device)
    cls([p], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def operand(device, matrices, width, depth, tall, seed=0):
    """Float64 numbers that bfloat16 has, and the same on the device: rows, or columns of a tall matrix."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(matrices, *((depth, width) if tall else (width, depth)), generator=generator).bfloat16()
    on_device = x.to(device) if device == "cuda" else x.float()
    return (x.mT.double(), on_device.mT) if tall else (x.double(), on_device)


@devices
@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("width,depth", [(8, 3), (70, 200), (128, 64), (257, 64)])
def test_symmetric_products_are_those_of_float64_and_symmetric(device, width, depth, tall):
    exact, x = operand(device, 2, width, depth, tall)
    other, addend = operand(device, 2, width, width, False, seed=1)
    scales = torch.tensor([0.5, 3.0], device=device)[:, None, None]
    bare = muon_fused.symmetric_product(x, x)
    full = muon_fused.symmetric_product(x, x, 0.7, addend, -0.3, 1.5, scales)
    gram = exact @ exact.mT
    expected = scales.cpu().double() * (0.7 * gram - 0.3 * other + 1.5 * torch.eye(width, dtype=torch.float64))
    tolerance = 1e-6 if device == "cpu" else 4e-3
    assert torch.equal(bare, bare.mT)
    assert (bare.cpu().double() - gram).norm() < tolerance * gram.norm()
    lower = torch.ones(width, width, dtype=torch.bool).tril()  # the addend is not symmetric, and its mirror is not read
    error = (full.cpu().double() - expected)[:, lower]
    assert error.norm() < tolerance * expected[:, lower].norm()


@devices
def test_the_product_of_two_symmetric_matrices_that_commute_is_theirs(device):
    exact, x = operand(device, 3, 150, 150, False)
    exact, x = exact + exact.mT, x + x.mT
    exact, x = (x.cpu().double(), x) if device == "cuda" else (exact, x)  # the sum is rounded
    square = muon_fused.symmetric_product(x, x)
    cube = muon_fused.symmetric_product(square, x)
    expected = torch.linalg.matrix_power(exact, 3)
    assert (cube.cpu().double() - expected).norm() < (1e-6 if device == "cpu" else 1e-2) * expected.norm()
    assert torch.equal(cube, cube.mT)


@devices
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_averages_of_products_are_those_of_float64(device, found_inf):
    """Of the blocks of columns of 3 matrices, whose factors lie apart in memory."""
    exact, grads = operand(device, 3, 40, 60, False)
    x, exact = (m.mT.unflatten(1, (2, 30)) for m in (grads, exact))
    averages = [torch.ones(n, 2, 30, 30, device=device) for n in (1, 2)]
    found_inf = torch.tensor(found_inf, device=device)
    muon_fused.average_products(averages, x, 0.25, 2.0, found_inf)
    assert [a._version for a in averages] == [1, 1]
    expected = torch.ones(3, 2, 30, 30) if found_inf else 0.75 + 0.25 * 2 * (exact @ exact.mT)
    torch.testing.assert_close(torch.cat(averages).cpu().double(), expected.double(), rtol=1e-5, atol=1e-5)


@devices
def test_roots_and_orthogonal_matrices_with_the_kernels_are_those_without(device):
    _, x = operand(device, 3, 40, 24, False)
    factors = (x.mT @ x).float()[:, None]
    for exponent in (0.5, 0.25, 0.125):
        ours, plain = (muon.inverse_root(factors, exponent, 0.01, k) for k in (muon_fused, None))
        assert (ours - plain).norm() < (1e-4 if device == "cpu" else 2e-2) * plain.norm()
    ours, plain = (muon.orthogonalize(x, kernels=k) for k in (muon_fused, None))
    assert (ours - plain).norm() < (1e-5 if device == "cpu" else 3e-2) * plain.norm()


@devices
def test_update_factors_takes_the_kernels_with_the_same_factors(device, monkeypatch):
    ends, launched = [], []
    original = muon_fused.average_products
    monkeypatch.setattr(muon_fused, "average_products", lambda *args: launched.append(1) or original(*args))
    for fused in (True, False):
        params = [torch.nn.Parameter(p.detach().to(device)) for p in parameters([(12, 8), (8, 8)], torch.float32)]
        optimizer = WhitenedMuon(params, source="update_factors", fused=fused)
        for step in range(2):
            set_gradients(params, step)
            optimizer.update_factors(scale=0.5)
        ends.append([optimizer.state[p][key] for p in params for key in ("left_factor", "right_factor", "left_root")])
    assert len(launched) == 2 * 2 * 2, "in each update, for each shape and side"
    for ours, plain in zip(*ends, strict=True):
        torch.testing.assert_close(ours.float(), plain.float(), rtol=1e-4 if device == "cpu" else 0.05, atol=1e-4)


def test_torchs_default_device_does_not_matter():
    ends = []
    for default in ("cpu", "meta"):
        muon_fused._table.cache_clear()
        muon_fused._chunks.cache_clear()
        params = [torch.nn.Parameter(p.detach().float()) for p in parameters(SHAPES)]
        set_gradients(params, 0)
        with torch.device(default):
            Muon(params, lr=0.1, fused=True).step()
        ends.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_from_before_its_parameter_grew_is_refused(fused):
    """The kernels would read beside it."""
    (p,) = parameters([(8, 8)], torch.float32)
    p.grad = torch.ones_like(p)
    p.data = torch.ones(16, 8)
    with pytest.raises(ValueError, match=r"a gradient of shape \(8, 8\) .* does not fit"):
        Muon([p], fused=fused).step()


@pytest.mark.parametrize("fused", [False, True])
def test_a_matrix_that_loses_columns_in_place_is_noticed(fused):
    """Addresses, strides and numbers of rows stay."""
    (p,), (q,) = parameters([(8, 8)], torch.float32), parameters([(8, 8)], torch.float32)
    optimizer, other = Muon([p], fused=fused), Muon([q])
    for step in range(3):
        for x, of in ((p, optimizer), (q, other)):
            if step == 1:
                momentum = of.state[x]["momentum_buffer"]
                x.grad, x.data = None, x.data[:, :4] if of is optimizer else x.data[:, :4].contiguous()
                of.state[x]["momentum_buffer"] = momentum[:, :4] if of is optimizer else momentum[:, :4].contiguous()
            set_gradients([x], step)
            of.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_cuda_graph_of_whitened_steps_is_refused():
    """It would never compute new roots."""
    (p,) = (torch.nn.Parameter(p.detach().float().cuda()) for p in parameters([(8, 8)]))
    p.grad, optimizer = torch.ones_like(p), WhitenedMuon([p])
    optimizer.step()
    with pytest.raises(RuntimeError, match="does not go into a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
