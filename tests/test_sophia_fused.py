"""The fused kernels: in Triton's interpreter where there is no GPU, and on the GPU with

python -m pytest -m gpu tests/test_sophia_fused.py
"""

import copy

import pytest
import torch
from torch import nn

GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="the fused implementation needs Triton")

import sophia  # noqa: E402
import sophia_fused  # noqa: E402
from sophia import SophiaG, SophiaH, sample_labels, sampled_label_loss  # noqa: E402
from tests.test_sophia import make_params, run_both  # noqa: E402

gpu = pytest.mark.gpu
interpreted = pytest.mark.skipif(GPU, reason="the kernels run on the GPU instead")
devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=gpu)]
)  # fmt: skip
SHAPES = ((70, 50), (33, 21), (40,), (5000,), (3,), (), (0, 4), (8, 4, 4))  # more than a program, odd ends, none
OPTIONS = [{}, {"maximize": True, "bias_correction": True, "max_grad_norm": 0.5}]
OPTIONS.append({"nesterov": True, "maximize": True, "max_grad_norm": 0.5})
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.05}
BF16_IN_INTERPRETER = 0.03  # it cuts off where a GPU rounds

option_ids = {"ids": lambda option: next(iter(option), "default")}


@devices
@pytest.mark.parametrize("cls", [SophiaG, SophiaH])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", OPTIONS, **option_ids)
def test_equals_the_float64_reference(device, cls, dtype, options):
    params, optimizer, reference = run_both(cls, dtype, shapes=SHAPES, device=device, fused=True, steps=4, **options)
    assert all(b.alignment for b in optimizer._collect())  # nothing went through foreach
    tolerance = TOLERANCE[dtype] + (BF16_IN_INTERPRETER if dtype == torch.bfloat16 and device == "cpu" else 0.0)
    for i, p in enumerate(params):
        state = optimizer.state[p]
        close = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(p.double(), reference.p[i], **close)
        torch.testing.assert_close(state["exp_avg"].double(), reference.m[i], **close)
        torch.testing.assert_close(state["hessian"].double(), reference.h[i], **close)
        assert state["step"].item() == 4


def train(optimizer, steps=4, seed=0, scale=1.0, **kwargs):
    """Random gradients in new memory at every step."""
    generator = torch.Generator().manual_seed(seed)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in range(steps):
        for p in params:
            p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p)
        if t % 2 == 0:
            if isinstance(optimizer, SophiaG):
                optimizer.update_hessian(scale=0.5)
            else:
                optimizer.update_hessian([p.grad.clone() for p in params])
        optimizer.step(**kwargs)
        optimizer.zero_grad()


def assert_same(a, b, rtol, atol):
    for ga, gb in zip(a.param_groups, b.param_groups, strict=True):
        for p, q in zip(ga["params"], gb["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
            for key, value in a.state[p].items():
                torch.testing.assert_close(value, b.state[q][key], rtol=rtol, atol=atol, check_device=False)


@devices
@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 0.5, "bias_correction": True}, {"nesterov": True, "max_grad_norm": 0.5}],
    **option_ids,
)
def test_fused_foreach_and_single_tensor_are_equal(device, options):
    runs = []
    for implementation in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        params = make_params(torch.float32, shapes=SHAPES, device=device)
        params += make_params(torch.bfloat16, shapes=((64, 8),), device=device)  # dtypes mixed in one group
        groups = [{"params": params[::2], "name": "even"}, {"params": params[1::2], "weight_decay": 0.0, "lr": 0.02}]
        runs.append(SophiaG(groups, lr=0.1, rho=0.5, **options, **implementation))
        train(runs[-1], bs=4)
    for other in runs[1:]:
        assert_same(runs[0], other, rtol=1e-5 if device == "cuda" else 0.03, atol=1e-6 if device == "cuda" else 0.03)
        assert runs[0].statistics(bs=4) == pytest.approx(other.statistics(bs=4), rel=1e-3, abs=1e-3)
        if options:
            torch.testing.assert_close(runs[0].grad_norm, other.grad_norm, rtol=1e-5, atol=0)


@devices
def test_mixed_states_of_one_parameter(device):
    """bf16 parameter and gradient, float32 averages: computed in float32 by every implementation."""
    results = []
    for implementation in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        (p,) = make_params(torch.bfloat16, shapes=((40, 8),), device=device)
        optimizer = SophiaG([p], lr=0.1, **implementation)
        zeros = torch.zeros(p.shape, device=device)
        optimizer.state[p] = {"step": torch.zeros((), device=device), "exp_avg": zeros, "hessian": zeros.clone()}
        train(optimizer, bs=8)
        state = optimizer.state[p]
        assert state["exp_avg"].dtype == state["hessian"].dtype == torch.float32
        results.append((p.detach().float(), state["exp_avg"], state["hessian"]))
    for other in results[1:]:
        torch.testing.assert_close(results[0][1:], other[1:])
        torch.testing.assert_close(results[0][0], other[0], rtol=0.01, atol=0.01 if device == "cuda" else 0.05)


@devices
@pytest.mark.parametrize("layout", ["offset", "odd", "transposed", "strided", "gradient", "float64"])
def test_any_layout(device, layout):
    """Addresses not of 16 bytes, odd sizes, dense and other strides, a gradient with strides of its own, float64."""
    runs = []
    for implementation in ({"fused": True}, {"foreach": False}):
        base = torch.arange(48 * 64, dtype=torch.float32, device=device).cos()
        if layout == "offset":
            p = base[1:1025].view(32, 32)
        elif layout == "odd":
            p = base[:1023].view(31, 33)
        elif layout == "transposed":
            p = base.view(48, 64).t()
        elif layout == "strided":
            p = base.view(48, 64)[:, ::2]
        else:
            p = base.view(48, 64).to(torch.float64 if layout == "float64" else torch.float32)
        q = nn.Parameter(torch.ones(16, device=device))
        optimizer = SophiaG([nn.Parameter(p), q], lr=0.1, rho=0.5, max_grad_norm=1.0, **implementation)
        p = optimizer.param_groups[0]["params"][0]
        for t in range(3):
            grad = (torch.arange(p.numel(), device=device).view(p.shape) * (t + 1)).to(p.dtype).sin()
            p.grad = grad.t().contiguous().t() if layout == "gradient" else grad
            q.grad = torch.full_like(q, 0.01 * t)
            optimizer.update_hessian()
            optimizer.step(bs=3)
        runs.append(optimizer)
        if "fused" in implementation:
            alignment = {"offset": 1, "odd": 1, "transposed": 0, "strided": 0, "gradient": 0, "float64": 0}[layout]
            assert sorted(b.alignment for b in optimizer._collect()) == sorted([alignment, 16])
    assert_same(*runs, rtol=1e-5, atol=1e-6)
    assert runs[0].statistics(bs=3) == pytest.approx(runs[1].statistics(bs=3), rel=1e-4)


@devices
def test_a_dense_transposed_parameter_with_matching_gradients_stays_fused(device):
    p = nn.Parameter(torch.ones(16, 8, device=device).t())
    optimizer = SophiaG([p], fused=True)
    p.grad = torch.ones(16, 8, device=device).t()
    assert optimizer._collect()[0].alignment == 16


@devices
def test_what_changes_between_steps_is_seen(device):
    """A parameter whose gradient comes and goes, memory that moves, a replaced state, a new group, a loaded state."""
    runs = []
    for implementation in ({"fused": True}, {"foreach": False}):
        params = make_params(torch.float32, shapes=((16, 8), (24,), (40,)), device=device)
        optimizer = SophiaG(params[:2], lr=0.1, **implementation)
        train(optimizer, 2)
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()  # params[1] has none
        train(optimizer, 2, seed=1)
        params[0].data = params[0].data.clone()
        train(optimizer, 2, seed=2)
        optimizer.state[params[1]]["hessian"] = torch.full_like(params[1], 0.1)
        optimizer.state[params[1]]["step"] = torch.tensor(100.0)  # on the CPU
        train(optimizer, 2, seed=3)
        optimizer.add_param_group({"params": [params[2]], "lr": 0.01, "maximize": True})
        train(optimizer, 2, seed=4)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.param_groups[0]["bias_correction"] = True
        train(optimizer, 2, seed=5)
        optimizer = copy.deepcopy(optimizer)
        train(optimizer, 2, seed=6)
        runs.append(optimizer)
    assert_same(*runs, rtol=1e-5, atol=1e-6)
    assert runs[0].state[runs[0].param_groups[0]["params"][1]]["step"].item() == 108


@devices
def test_gradients_are_not_kept_alive_by_the_optimizer(device):
    import weakref

    p = nn.Parameter(torch.ones(16, device=device))
    optimizer = SophiaG([p], fused=True)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        alive = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert alive() is None


@devices
@pytest.mark.parametrize("cls", [SophiaG, SophiaH])
def test_found_inf_and_grad_scale(device, cls):
    runs = []
    for fused in (True, False):
        params = make_params(torch.float32, shapes=SHAPES, device=device)
        optimizer = cls(params, lr=0.1, bias_correction=True, max_grad_norm=1.0, fused=fused)
        optimizer.grad_scale, optimizer.found_inf = (torch.tensor(v, device=device) for v in (128.0, 0.0))
        train(optimizer, 3, scale=128.0)
        before = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
        optimizer.found_inf.fill_(1.0)
        train(optimizer, 3, scale=float("nan"))
        for p, old in zip(params, before[0], strict=True):
            assert torch.equal(p, old)
        for i, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(state[k], before[1][i][k]) for k in state)
        del optimizer.found_inf, optimizer.grad_scale
        train(optimizer, 1)
        runs.append(optimizer)
    assert_same(*runs, rtol=1e-5, atol=1e-6)


@devices
def test_nan_without_a_scaler_is_not_hidden(device):
    p = nn.Parameter(torch.ones(16, device=device))
    optimizer = SophiaG([p], fused=True)
    p.grad = torch.ones_like(p)
    p.grad[3] = float("nan")
    optimizer.step()
    assert p.isnan().tolist() == [i == 3 for i in range(16)]


@devices
def test_tensor_lr(device):
    runs = []
    for lr in (0.1, torch.tensor(0.1), torch.tensor(0.1, device=device)):
        optimizer = SophiaG(make_params(torch.float32, shapes=SHAPES, device=device), lr=lr, fused=True)
        train(optimizer)
        runs.append(optimizer)
    for other in runs[1:]:
        assert_same(runs[0], other, rtol=1e-6, atol=1e-7)


@devices
def test_a_fused_checkpoint_loads_into_a_single_tensor_optimizer_and_back(device):
    a = SophiaG(make_params(torch.float32, device=device), fused=True)
    train(a)
    b = SophiaG(make_params(torch.float32, device="cpu"), foreach=False)
    b.load_state_dict(copy.deepcopy(a.state_dict()))  # torch shares tensors that fit as they are
    c = SophiaG(make_params(torch.float32, device=device), fused=True)
    c.load_state_dict(copy.deepcopy(b.state_dict()))
    for optimizer in (a, b, c):
        train(optimizer, seed=1)
    assert (a.fused, b.fused, c.fused) == (True, None, True)
    for p, q, r in zip(*(o.param_groups[0]["params"] for o in (a, b, c)), strict=True):
        torch.testing.assert_close(a.state[p]["hessian"].cpu(), b.state[q]["hessian"], rtol=1e-5, atol=1e-7)
        assert torch.equal(a.state[p]["exp_avg"], c.state[r]["exp_avg"]) and c.state[r]["step"].item() == 8


# --- on the GPU only -------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_no_host_sync(implementation):
    """Nor when lr changes, gradients move, the norm is clipped, or a scaler's tensors are set."""
    params = make_params(torch.float32, shapes=((300, 40), (1000,)), device="cuda")
    optimizer = SophiaG(params, lr=0.1, max_grad_norm=1.0, bias_correction=True, **implementation)
    grads = [[torch.randn_like(p) for p in params] for _ in range(6)]
    scale, found = torch.tensor(2.0, device="cuda"), torch.tensor(0.0, device="cuda")
    logits = torch.randn(100, 1000, device="cuda", requires_grad=True)

    def one(t):
        for p, g in zip(params, grads[t], strict=True):
            p.grad = g
        optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
        optimizer.grad_scale, optimizer.found_inf = (scale, found) if t % 2 else (None, None)
        sampled_label_loss(logits, targets=torch.zeros(100, device="cuda")).backward()
        optimizer.update_hessian(scale=0.5 + t)
        optimizer.step(bs=100 + t)

    for t in range(4):
        one(t)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(6):
            one(t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.grad_norm.is_cuda and all(p.isfinite().all() for p in params)


@gpu
def test_no_recompilation():
    def variants():
        return [
            sum(len(cache[0] if isinstance(cache, tuple) else cache) for cache in kernel.device_caches.values())
            for kernel in (*sophia_fused._KERNELS.values(), sophia_fused._clip_kernel)
        ]

    params = make_params(torch.float32, shapes=((64, 64), (64,)), device="cuda")
    optimizer = SophiaG(params, lr=0.1, max_grad_norm=1.0, fused=True)
    train(optimizer, 3)
    optimizer.statistics()
    before = variants()
    for t in range(4):
        changed = {"lr": (0.0, 1.0, 2.0, 1e-4)[t], "rho": float(t), "weight_decay": t / 2, "betas": (0.5, 0.6)}
        optimizer.param_groups[0].update(changed)
        optimizer.max_grad_norm = 1.0 + t
        train(optimizer, 2, bs=1 + t)
        optimizer.statistics(bs=16 * t + 1)
    assert variants() == before


@gpu
def test_gradients_that_move_while_the_gpu_is_behind():
    """Hundreds of steps are queued behind a slow kernel; every step must still see its own addresses."""
    runs = []
    for fused in (True, False):
        params = make_params(torch.float32, shapes=((100, 10),) * 20, device="cuda")
        optimizer = SophiaG(params, lr=0.01, fused=fused)
        generator = torch.Generator("cuda").manual_seed(0)
        train(optimizer, 1)  # a first step looks for a curvature, which waits for the GPU
        if fused:
            torch.cuda._sleep(200_000_000)
        keep = []
        for t in range(300):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            keep.append([p.grad for p in params])
            if t % 10 == 0:
                optimizer.update_hessian()
            optimizer.step(bs=100)
        runs.append(optimizer)
    assert_same(*runs, rtol=1e-4, atol=1e-5)


@gpu
@pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_cuda_graph(implementation, set_to_none):
    """A captured backward, curvature update and step, replayed with another lr, equals the eager one; eager steps
    between and after the replays do not disturb the graph."""

    def build(lr):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).cuda()
        settings = {"capturable": True, "max_grad_norm": 0.05, **implementation}
        return model, SophiaG(model.parameters(), lr=lr, **settings)

    x = torch.randn(16, 32, device="cuda", generator=torch.Generator("cuda").manual_seed(1))

    def one(model, optimizer):
        optimizer.zero_grad(set_to_none)
        model(x).square().mean().backward()
        optimizer.update_hessian()
        optimizer.step(bs=16)

    model, optimizer = build(torch.tensor(0.1, device="cuda"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            one(model, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad(set_to_none)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one(model, optimizer)
    static = [p.grad for p in model.parameters()]
    for lr in (0.1, 0.05):
        optimizer.param_groups[0]["lr"].fill_(lr)
        graph.replay()
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.01)
        optimizer.step(bs=16)  # eager, elsewhere in memory
        for p, g in zip(model.parameters(), static, strict=True):
            p.grad = g
        graph.replay()
    eager, reference = build(torch.tensor(0.1, device="cuda"))
    for _ in range(3):
        one(eager, reference)
    for lr in (0.1, 0.05):
        reference.param_groups[0]["lr"].fill_(lr)
        for t in range(3):
            if t == 1:
                for p in eager.parameters():
                    p.grad = torch.full_like(p, 0.01)
                reference.step(bs=16)
            else:
                one(eager, reference)
    assert_same(optimizer, reference, rtol=1e-4, atol=1e-6)
    assert optimizer.state[model[0].weight]["step"].item() == 9


@gpu
def test_capture_needs_capturable_and_an_eager_step():
    for settings, warm, message in (({}, True, "capturable=False"), ({"capturable": True}, False, "once outside of")):
        p = nn.Parameter(torch.ones(8, device="cuda"))
        p.grad = torch.ones_like(p)
        optimizer = SophiaG([p], fused=True, **settings)
        optimizer.state[p] = {k: torch.zeros_like(p) for k in ("exp_avg", "hessian")}
        optimizer.state[p]["step"] = torch.zeros((), device="cuda")
        if warm:
            optimizer.step()
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()


@gpu
def test_no_extra_memory():
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    params = [nn.Parameter(torch.randn(1024, 1024, device="cuda")) for _ in range(50)]
    optimizer = SophiaG(params, fused=True, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        optimizer.update_hessian()
        optimizer.step()
        optimizer.statistics()
    assert torch.cuda.max_memory_allocated() - start < 1.02 * 4 * sum(p.nbytes for p in params)


@gpu
def test_torchs_grad_scaler():
    torch.manual_seed(0)
    model = nn.Linear(64, 64).cuda()
    optimizer = SophiaG(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for t in range(4):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = model(torch.randn(8, 64, device="cuda")).float().square().mean()
        scaler.scale(loss).backward()
        if t == 2:
            model.bias.grad[0] = float("inf")
        scaler.step(optimizer, bs=8)
        scaler.update()
    assert optimizer.state[model.weight]["step"].item() == 3 and scaler.get_scale() == 2.0**9
    assert all(p.isfinite().all() for p in model.parameters())


@gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_the_sampled_loss_on_the_gpu(compiled):
    """bf16 logits of a GPT-2 vocabulary: labels as on the CPU, and no second copy of the logits beside the gradient."""
    rows, classes = 4096, 50304
    logits = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16).requires_grad_()
    uniform = torch.rand(rows, device="cuda")

    def loss_of(logits, uniform):
        return sampled_label_loss(logits, uniform=uniform)

    function = torch.compile(loss_of) if compiled else loss_of
    function(logits, uniform).backward()
    logits.grad = None
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = function(logits, uniform)
    loss.backward()
    extra = torch.cuda.max_memory_allocated() - start
    print(f"compiled={compiled}: peak {extra / logits.nbytes:.2f} times the logits, of which 1 is the gradient")
    assert extra < logits.nbytes + (0.3 * logits.nbytes if compiled else 4 * 4 * sophia._CHUNK_ELEMENTS)
    few = logits[:32].detach()
    labels = sample_labels(few, uniform=uniform[:32])
    # A class is 2e-5 of a row here, sums in float32 differ by 1e-6 of it: a few rows round over to the next class.
    moved = (labels.cpu() - sample_labels(few.cpu(), uniform=uniform[:32].cpu())).abs()
    assert moved.max() <= 1 and moved.sum() <= 8
    expected = nn.functional.cross_entropy(logits.float(), sample_labels(logits, uniform=uniform))
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
