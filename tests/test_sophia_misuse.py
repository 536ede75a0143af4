"""What would silently train another thing: states that do not fit, calls out of order, settings that nobody reads."""

import copy
import math
import pickle
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import sophia
from sophia import SophiaG, SophiaH, hutchinson, sampled_label_loss, sampled_target_loss
from tests.conftest import ROOT

IMPLEMENTATIONS = [{"foreach": False}, {"foreach": True}, {"fused": True}]
CLASSES = [SophiaG, SophiaH]
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda value: next(iter(value)))
classes = pytest.mark.parametrize("cls", CLASSES)


@pytest.fixture(autouse=True)
def triton(request):
    if "fused" in str(request.node.name):
        pytest.importorskip("triton", reason="the fused implementation needs Triton")


def matrix(seed=0, shape=(6, 6), dtype=torch.float32):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def give_gradients(params, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def estimate(optimizer, **settings):
    if isinstance(optimizer, SophiaH):
        gradients = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
        optimizer.update_hessian(gradients, **settings)
    else:
        optimizer.update_hessian(**settings)


def train(optimizer, steps=2, seed=0):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in range(steps):
        give_gradients(params, seed + t)
        estimate(optimizer)
        optimizer.step()
    return optimizer


# --- a state that does not fit its parameter -------------------------------------------------------------------------


@implementations
@pytest.mark.parametrize("cls", [SophiaG, SophiaH])
@pytest.mark.parametrize("call", ["step", "update_hessian", "statistics"])
def test_a_state_of_another_shape_is_refused(cls, implementation, call):
    """The vocabulary grew: nothing outside of the state is read or written."""
    old = train(cls([matrix(shape=(8,)), matrix(shape=(3, 2))], **implementation))
    new = cls([("bias", matrix(shape=(16,))), ("weight", matrix(shape=(3, 2)))], **implementation)
    new.load_state_dict(old.state_dict())
    params = new.param_groups[0]["params"]
    give_gradients(params)
    before = [p.detach().clone() for p in params]
    calls = {"step": new.step, "update_hessian": lambda: estimate(new), "statistics": new.statistics}
    with pytest.raises(ValueError, match=r"parameter bias: got shape \(8,\) for a parameter of shape \(16,\)"):
        calls[call]()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@implementations
@pytest.mark.parametrize("key", ["exp_avg", "hessian"])
def test_a_state_tensor_that_is_exchanged_for_a_wrong_one_is_refused(implementation, key):
    optimizer = train(SophiaG([matrix()], **implementation))
    (p,) = optimizer.param_groups[0]["params"]
    optimizer.state[p][key] = optimizer.state[p][key][:3].clone()
    give_gradients([p])
    with pytest.raises(ValueError, match=rf"{key} of parameter 0 of group 0: got shape \(3, 6\)"):
        optimizer.step()


@implementations
def test_a_parameter_that_shrinks_in_place_is_refused(implementation):
    optimizer = train(SophiaG([matrix(shape=(16,))], **implementation))
    (p,) = optimizer.param_groups[0]["params"]
    p.grad, p.data = None, p.data[:8]
    give_gradients([p])
    with pytest.raises(ValueError, match=r"exp_avg .* got shape \(16,\) for a parameter of shape \(8,\)"):
        optimizer.step()


def test_a_hessian_of_rotated_gradients_is_refused():
    saved = train(SophiaG([matrix()])).state_dict()
    saved["state"][0]["left_basis"] = torch.eye(6)[None]
    with pytest.raises(RuntimeError, match="a state of EigenbasisSophiaG, which only commit efa612d still has"):
        SophiaG([matrix()]).load_state_dict(saved)


# --- what changes between two calls of a fused optimizer -------------------------------------------------------------


def replace_the_parameter(optimizer):
    group = optimizer.param_groups[0]
    group["params"][0] = matrix(seed=7)


def exchange_between_groups(optimizer):
    first, second = (group["params"] for group in optimizer.param_groups)
    first[0], second[0] = second[0], first[0]


def exchange_within_a_group(optimizer):
    params = optimizer.param_groups[0]["params"]
    params[0], params[1] = params[1], params[0]


def clear_the_state(optimizer):
    optimizer.state.clear()


def drop_one_state(optimizer):
    del optimizer.state[optimizer.param_groups[0]["params"][0]]


def exchange_states(optimizer):
    p, q = optimizer.param_groups[0]["params"]
    optimizer.state[p], optimizer.state[q] = optimizer.state[q], optimizer.state[p]


def move_the_state(optimizer):
    for state in optimizer.state.values():
        for key in ("exp_avg", "hessian"):
            state[key].data = state[key].data.clone()


def replace_a_group(optimizer):
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.5}


def replace_the_count(optimizer):
    for state in optimizer.state.values():
        state["hessian_step"] = torch.tensor(50.0)


def forget_a_parameter(optimizer):
    del optimizer.param_groups[1]


CHANGES = [replace_the_parameter, exchange_between_groups, exchange_within_a_group, clear_the_state, drop_one_state,
           exchange_states, move_the_state, replace_a_group, replace_the_count, forget_a_parameter]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("warm", [False, True], ids=["", "after_a_step_without_gradients"])
def test_a_fused_optimizer_sees_every_change(change, warm):
    runs = []
    pytest.importorskip("triton")
    for implementation in ({"fused": True}, {"foreach": False}):
        groups = [{"params": [matrix(0), matrix(1)], "lr": 0.1}, {"params": [matrix(2)], "lr": 0.01}]
        optimizer = train(SophiaG(groups, rho=0.5, bias_correction=True, bs=2, **implementation), 3)
        every = [p for group in optimizer.param_groups for p in group["params"]]
        if warm:
            optimizer.zero_grad()
            optimizer.step()
        change(optimizer)
        every += [p for group in optimizer.param_groups for p in group["params"] if all(p is not q for q in every)]
        train(optimizer, 2, seed=5)
        runs.append((every, [optimizer.state.get(p, {}) for p in every]))
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        assert set(a) == set(b)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-6)


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.parametrize("registered", ["early", "late"])
def test_a_load_hook_moves_every_key_of_a_state(returns, registered):
    """A pre-hook exchanges the states of two parameters and drops that of a third."""
    settings = {"bias_correction": True}
    old = train(SophiaG([matrix(i) for i in range(3)], **settings), 3)
    params = old.param_groups[0]["params"]
    old.state[params[1]]["hessian_step"] += 5
    saved = copy.deepcopy(old.state_dict())

    def hook(optimizer, state_dict):
        state = {0: state_dict["state"][1], 1: state_dict["state"][0]}
        if returns:
            return {**state_dict, "state": state}
        state_dict["state"] = state

    new = SophiaG([matrix(i) for i in range(3)], **settings)
    if registered == "early":
        new.register_load_state_dict_pre_hook(hook)
    else:
        new.register_load_state_dict_post_hook(lambda optimizer: None)
        new.register_load_state_dict_pre_hook(hook, prepend=True)
    new.load_state_dict(saved)
    loaded = new.param_groups[0]["params"]
    for p, number in zip(loaded, (1, 0), strict=False):
        assert set(new.state[p]) == set(saved["state"][number])
        for key, value in saved["state"][number].items():
            assert torch.equal(new.state[p][key], value), key
    assert loaded[2] not in new.state


def test_a_post_hook_has_the_last_word():
    old, new = (SophiaG([matrix()], bias_correction=True) for _ in range(2))
    train(old)

    def forget_the_count(optimizer):
        for state in optimizer.state.values():
            assert isinstance(state["hessian_step"], torch.Tensor)
            state["hessian_step"] = torch.tensor(0.0)

    new.register_load_state_dict_post_hook(forget_the_count)
    new.load_state_dict(old.state_dict())
    assert new.state[new.param_groups[0]["params"][0]]["hessian_step"] == 0


@implementations
def test_a_loaded_state_is_a_copy(implementation):
    """Two optimizers that share a state would both move it."""
    old = train(SophiaG([matrix()], bias_correction=True, **implementation))
    new = SophiaG([matrix()], bias_correction=True, **implementation)
    new.load_state_dict(old.state_dict())
    before = copy.deepcopy(list(new.state.values()))
    train(old, 1)
    for state, kept in zip(new.state.values(), before, strict=True):
        assert len(state) == 4 and all(torch.equal(state[key], kept[key]) for key in kept)


@classes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_keep_their_precision(cls, dtype):
    old = cls([matrix(dtype=dtype)], bias_correction=True)
    train(old)
    for state in old.state.values():
        state["hessian_step"].fill_(259)  # bfloat16 would make it 260
    new = cls([matrix(dtype=dtype)], bias_correction=True)
    new.load_state_dict(copy.deepcopy(old.state_dict()))
    (a,), (b,) = old.state.values(), new.state.values()
    assert {key: (t.dtype, t.tolist()) for key, t in a.items()} == {key: (t.dtype, t.tolist()) for key, t in b.items()}


def test_a_state_dict_says_how_the_steps_were_computed_and_restores_max_grad_norm():
    old = SophiaG([matrix()], max_grad_norm=0.5, foreach=True)
    (group,) = old.state_dict()["param_groups"]
    assert (group["max_grad_norm"], group["foreach"], group["fused"]) == (0.5, True, None)
    new = SophiaG([matrix()], foreach=False)
    new.load_state_dict(old.state_dict())
    assert (new.max_grad_norm, new.foreach, new.fused) == (0.5, False, None)
    assert "max_grad_norm" not in new.param_groups[0]
    new.load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})  # of the official code
    assert new.max_grad_norm == 0.5 and new.param_groups[0]["bs"] == 5120
    for name in ("foreach: True", "fused: None", "max_grad_norm: 0.5"):
        assert name in repr(old)


def test_a_loaded_state_dict_keeps_settings_of_groups_that_it_lacks():
    new = SophiaG([{"params": [matrix()], "bs": 64, "name": "matrices"}])
    new.load_state_dict({"state": {}, "param_groups": [{"params": [0], "lr": 0.5}]})
    assert {key: new.param_groups[0][key] for key in ("bs", "name", "lr")} == {"bs": 64, "name": "matrices", "lr": 0.5}


@classes
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_original(cls, how):
    settings = {"bias_correction": True, "max_grad_norm": 0.5, "foreach": True}
    optimizer = train(cls([matrix(0), matrix(1, (5,))], **settings), 3)
    other = how(optimizer)
    for each in (optimizer, other):
        give_gradients(each.param_groups[0]["params"], 8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            each.step()
        train(each, 2, seed=9)
    for p, q in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q) and p is not q
    assert repr(optimizer) == repr(other)


# --- calls out of order ----------------------------------------------------------------------------------------------


@implementations
@classes
def test_an_estimate_without_a_gradient_is_refused(cls, implementation):
    optimizer = cls([matrix()], **implementation)
    with pytest.raises(RuntimeError, match=r"update_hessian\(\) found no gradient; call it after the backward pass"):
        estimate(optimizer)
    train(optimizer)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="found no gradient"):
        estimate(optimizer)


@classes
def test_a_first_step_without_a_curvature_warns_once(cls):
    optimizer = cls([matrix()])
    give_gradients(optimizer.param_groups[0]["params"])
    with pytest.warns(UserWarning, match=rf"{cls.__name__}.step\(\) before any update_hessian\(\)") as seen:
        for _ in range(3):
            optimizer.step()
    assert len(seen) == 1
    assert len(cls([matrix()]).state) == 0


def loaded(optimizer):
    new = type(optimizer)([matrix()])
    new.load_state_dict(train(optimizer).state_dict())
    return new


def official(optimizer):
    new = type(optimizer)([matrix()])
    state = {"step": torch.tensor(4.0), "exp_avg": torch.zeros(6, 6), "hessian": torch.full((6, 6), 0.1)}
    new.load_state_dict({"state": {0: state}, "param_groups": [{"params": [0], "lr": 0.1, "betas": (0.9, 0.99)}]})
    return new


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("cls", [SophiaG, SophiaH])
@pytest.mark.parametrize("known", [train, loaded, official, copy.deepcopy])
def test_a_first_step_with_a_curvature_does_not_warn(cls, known):
    optimizer = known(train(cls([matrix()])) if known is copy.deepcopy else cls([matrix()]))
    give_gradients(optimizer.param_groups[0]["params"])
    optimizer.step()


@pytest.mark.filterwarnings("error")
def test_a_step_that_needs_no_curvature_does_not_warn():
    optimizer = SophiaG([matrix()], rho=0.0)
    give_gradients(optimizer.param_groups[0]["params"])
    optimizer.step()


def test_a_step_that_moves_nothing_does_not_spend_the_warning():
    """torch.distributed.checkpoint makes states by a step with a learning rate of 0."""
    optimizer = SophiaG([matrix()], lr=0.0)
    give_gradients(optimizer.param_groups[0]["params"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.warns(UserWarning, match="without a curvature"):
        optimizer.step()


# --- estimates that are not finite -----------------------------------------------------------------------------------


@implementations
@classes
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_nonfinite_estimate_changes_nothing_and_is_counted(cls, implementation, value):
    """Not even the parameters whose own estimate is finite."""
    optimizer = train(cls([matrix(0), matrix(1), matrix(2, (3,))], bias_correction=True, **implementation))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    params = optimizer.param_groups[0]["params"]
    give_gradients(params)
    params[0].grad[1, 2] = value
    estimate(optimizer)
    after = optimizer.state_dict()["state"]
    for number, state in before.items():
        for key, tensor in state.items():
            assert torch.equal(tensor, after[number][key]), key
    assert float(optimizer.skipped_estimates) == 1
    train(optimizer)
    assert all(p.isfinite().all() for p in params) and float(optimizer.skipped_estimates) == 1
    assert optimizer.state[params[0]]["hessian_step"] == 4
    assert float(copy.deepcopy(optimizer).skipped_estimates) == 1


@implementations
def test_a_square_that_overflows_is_not_finite(implementation):
    optimizer = train(SophiaG([matrix()], **implementation))
    (state,) = optimizer.state.values()
    before = state["hessian"].clone()
    give_gradients(optimizer.param_groups[0]["params"], scale=1e20)
    optimizer.update_hessian()
    assert torch.equal(state["hessian"], before) and float(optimizer.skipped_estimates) == 1


# --- float16 ---------------------------------------------------------------------------------------------------------


@implementations
@classes
def test_the_state_of_float16_parameters_is_float32(cls, implementation):
    """Gradients of 1e-4: their squares are 0 in float16."""
    half, full = (cls([matrix(dtype=dtype)], bs=10**4, **implementation) if cls is not SophiaH else
                  cls([matrix(dtype=dtype)], **implementation) for dtype in (torch.float16, torch.float32))  # fmt: skip
    for optimizer in (half, full):
        give_gradients(optimizer.param_groups[0]["params"], scale=1e-4)
        estimate(optimizer)
        give_gradients(optimizer.param_groups[0]["params"], seed=1, scale=1e-4)
        optimizer.step()
        optimizer.statistics()
    (a,), (b,) = half.state.values(), full.state.values()
    for key in ("exp_avg", "hessian"):
        assert a[key].dtype == torch.float32 and a[key].count_nonzero() > 30
        torch.testing.assert_close(a[key], b[key], rtol=0.05, atol=0.01 * b[key].abs().max().item())
    resumed = cls([matrix(dtype=torch.float16)], **implementation)
    resumed.load_state_dict(half.state_dict())
    (c,) = resumed.state.values()
    assert all(torch.equal(a[key], c[key]) and a[key].dtype == c[key].dtype for key in a)


def test_hutchinson_of_float16_parameters_does_not_underflow():
    p = nn.Parameter(torch.full((64,), 1e-3, dtype=torch.float16))
    (found,) = hutchinson(lambda: (p * p).sum() * 1e-4, [p])
    assert found.dtype == torch.float32 and found.count_nonzero() > 50


# --- the batch size --------------------------------------------------------------------------------------------------


@implementations
def test_bs_is_a_setting_of_the_constructor_of_groups_and_of_a_step(implementation):
    ends = []
    for how in ("step", "constructor", "group", "group before step"):
        settings = {"bs": 7} if how == "constructor" else {}
        group = {"bs": 7} if how == "group" else {"bs": 1000} if how == "group before step" else {}
        optimizer = SophiaG([{"params": [matrix()], **group}], lr=0.1, rho=0.5, **settings, **implementation)
        argument = {} if how in ("constructor", "group") else {"bs": 7}
        for t in range(3):
            give_gradients(optimizer.param_groups[0]["params"], t)
            optimizer.update_hessian()
            optimizer.step(**argument)
        statistics = optimizer.statistics(**argument)
        ends.append((optimizer.param_groups[0]["params"][0], statistics["win_rate"]))
    assert 0 < ends[0][1] < 1
    for p, win_rate in ends[1:]:
        assert torch.equal(p, ends[0][0]) and win_rate == ends[0][1]


def test_bs_of_two_groups_may_differ():
    a, b = matrix(0), matrix(0)
    optimizer = SophiaG([{"params": [a], "bs": 1}, {"params": [b], "bs": 10**6}], lr=0.1, weight_decay=0.0)
    train(optimizer)
    assert (a - matrix(0)).abs().sum() > 100 * (b - matrix(0)).abs().sum() > 0
    assert SophiaG([a]).defaults["bs"] == 5120


# --- GradScaler ------------------------------------------------------------------------------------------------------


@implementations
@classes
@pytest.mark.parametrize("as_tensor", [False, True])
def test_grad_scale_undoes_the_scalers_multiplication(cls, implementation, as_tensor):
    ends = []
    for scale in (1.0, 2.0**16):
        optimizer = cls([matrix()], lr=0.1, **implementation)
        for t in range(3):
            give_gradients(optimizer.param_groups[0]["params"], t, scale)
            estimate(optimizer, grad_scale=torch.tensor(scale) if as_tensor else scale)
            give_gradients(optimizer.param_groups[0]["params"], t + 9)
            optimizer.step()
        ends.append((optimizer.param_groups[0]["params"][0], optimizer.state_dict()["state"][0]))
    torch.testing.assert_close(*(p for p, _ in ends))
    for key, value in ends[0][1].items():
        torch.testing.assert_close(value, ends[1][1][key])


def test_a_scaled_estimate_that_overflows_is_skipped_and_the_training_step_is_not():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = SophiaG(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    x = torch.randn(8, 4)
    for t in range(3):
        scaler.scale(sampled_label_loss(model(x))).backward()
        if t == 1:
            model.weight.grad[0, 0] = math.inf
        optimizer.update_hessian(grad_scale=scaler.get_scale())
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert float(optimizer.skipped_estimates) == 1 and optimizer.state[model.weight]["step"] == 3
    assert scaler.get_scale() == 256.0


# --- hutchinson and its estimates ------------------------------------------------------------------------------------


def quadratic(scales):
    """Parameters with the loss sum_i scale_i |p_i|^2 / 2, whose Hessian's diagonal Hutchinson's u gives exactly up to
    u^2: estimates are scale_i u^2."""
    params = [nn.Parameter(torch.ones(4)) for _ in scales]
    return params, lambda: sum(s * (p * p).sum() / 2 for s, p in zip(scales, params, strict=True) if p.requires_grad)


def test_estimates_go_to_their_parameters_in_whatever_order_the_groups_are():
    params, loss = quadratic([1.0, 100.0, 10000.0])
    groups = [{"params": [params[2]]}, {"params": [params[0], params[1]]}]
    estimates = hutchinson(loss, params)
    assert isinstance(estimates, list)
    for given in (estimates, dict(zip(params, estimates, strict=True)), [estimates[2], *estimates[:2]]):
        optimizer = SophiaH(groups, betas=(0.9, 0.0))
        optimizer.update_hessian(given)
        for p, own in zip(params, estimates, strict=True):
            torch.testing.assert_close(optimizer.state[p]["hessian"], own)


def test_frozen_parameters_have_no_estimate():
    params, loss = quadratic([1.0, 2.0, 3.0])
    params[1].requires_grad_(False)
    estimates = hutchinson(loss, params, torch.Generator().manual_seed(0))
    assert estimates[1] is None and estimates[0] is not None
    for optimizer in (SophiaH(params), SophiaH([params[0], params[2]])):
        optimizer.update_hessian(estimates)
        assert params[1] not in optimizer.state and optimizer.state[params[2]]["hessian"].abs().sum() > 0
    for p in params:
        p.requires_grad_(False)
    assert hutchinson(lambda: torch.zeros(()), params) == [None] * 3


def test_an_estimate_of_an_unknown_parameter_is_refused():
    params, loss = quadratic([1.0, 2.0])
    with pytest.raises(ValueError, match="1 estimates of what is no parameter of this optimizer"):
        SophiaH(params[:1]).update_hessian(hutchinson(loss, params))
    with pytest.raises(ValueError, match="no parameter of this optimizer"):
        SophiaH(params).update_hessian({"weight": torch.ones(4)})
    with pytest.raises(ValueError, match=r"got shape \(2,\) for a parameter of shape \(4,\)"):
        SophiaH(params).update_hessian({params[0]: torch.ones(2)})


def test_hutchinson_of_a_sampled_label_loss_says_what_to_do():
    head = nn.Linear(3, 5)
    for loss in (lambda: sampled_label_loss(head(torch.ones(2, 3))), sampled_label_loss(head(torch.ones(2, 3)))):
        with pytest.raises(RuntimeError, match="differentiated once; give hutchinson the training loss"):
            hutchinson(loss, head.parameters())
    assert hutchinson(lambda: sampled_target_loss(head(torch.ones(2, 3))), head.parameters())[0].shape == (5, 3)


# --- padding ---------------------------------------------------------------------------------------------------------


def test_padding_of_the_hugging_face_world_does_not_count():
    logits = torch.randn(2, 5, 7, requires_grad=True)
    uniform, targets = torch.rand(2, 5), torch.tensor([[1, 2, 3, -100, -100], [4, -1, 6, 0, -100]])
    loss = sampled_label_loss(logits, uniform=uniform, targets=targets)
    kept = targets != -100
    expected = sampled_label_loss(logits[kept], uniform=uniform[kept])
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad[~kept].abs().sum() == 0 and (grad[kept].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_drawn_label_that_is_the_ignored_index_counts(compiled, monkeypatch):
    """Padding by a token of the vocabulary: only the batch's own labels say what is padding."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    logits = torch.tensor([[9.0, 0.0, 0.0]] * 3)  # draws 0
    targets, uniform = torch.tensor([1, 2, 0]), torch.tensor([0.1, 0.1, 0.1])
    loss = sampled_label_loss(logits, ignore_index=0, uniform=uniform, targets=targets)
    torch.testing.assert_close(loss, sampled_label_loss(logits[:1], uniform=uniform[:1]))
    assert loss.isfinite()


def test_targets_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"targets has shape \(2, 5\), expected \(2, 4\)"):
        sampled_label_loss(torch.randn(2, 4, 7), targets=torch.zeros(2, 5, dtype=torch.int64))


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (0.9,)}, r"Invalid betas: \(0.9,\), expected two numbers"),
        ({"betas": (0.9, 0.95, 0.99)}, "Invalid betas"),
        ({"betas": 0.9}, "Invalid betas: 0.9"),
        ({"betas": (0.9, math.nan)}, "Invalid beta parameter at index 1: nan"),
        ({"betas": ("0.9", 0.9)}, "Invalid beta parameter at index 0: '0.9'"),
        ({"lr": "1e-3"}, "Invalid learning rate: '1e-3'"),
        ({"lr": math.inf}, "Invalid learning rate: inf"),
        ({"rho": math.nan}, "Invalid rho value: nan"),
        ({"rho": math.inf}, "Invalid rho value: inf"),
        ({"weight_decay": None}, "Invalid weight_decay value: None"),
        ({"bs": 0}, "Invalid bs: 0"),
        ({"bs": math.nan}, "Invalid bs: nan"),
        ({"bs": -1}, "Invalid bs: -1"),
        ({"foreach": True}, "'foreach' is a setting of the constructor, not of a group"),
        ({"fused": False}, "'fused' is a setting of the constructor"),
        ({"max_grad_norm": 1.0}, "'max_grad_norm' is a setting of the constructor"),
        ({"weight_decya": 0.0}, "'weight_decya' is a setting of no group; a group may have .*weight_decay"),
        ({"momentum": 0.9}, "'momentum' is a setting of no group"),
        ({"eigenbasis": True}, "'eigenbasis' is a setting of no group"),
        ({"exponent": 0.5}, "'exponent' is a setting of no group"),
    ],
)
def test_a_bad_setting_of_a_group_is_named_and_the_group_not_added(settings, message):
    with pytest.raises(ValueError, match=message):
        SophiaG([{"params": [matrix()], **settings}])
    optimizer = SophiaG([matrix()])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [matrix()], **settings})
    assert len(optimizer.param_groups) == 1
    if not settings.keys() & {"bs", "foreach", "fused", "eigenbasis"}:
        with pytest.raises(ValueError, match=message.partition("; a group")[0]):
            SophiaH([{"params": [matrix()], **settings}])


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (SophiaH, {"bs": 5}, "'bs' is a setting of no group"),
        (SophiaH, {"eps": 0.0}, "Invalid epsilon value: 0.0"),
        (SophiaG, {"eps": 1e-8}, "'eps' is a setting of no group"),
    ],
)
def test_each_class_knows_its_own_settings(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls([{"params": [matrix()], **settings}])


def test_labels_of_a_group_that_others_read_are_taken():
    labels = {"name": "matrices", "lr_scale": 0.5, "initial_lr": 0.1, "split": 1}
    for cls in CLASSES:
        cls([{"params": [("weight", matrix())], **labels}])


@pytest.mark.parametrize("value", [-1, 0, math.nan, math.inf, "2"])
def test_bad_arguments_of_calls_are_named(value):
    p = matrix()
    p.grad = torch.ones_like(p)
    for optimizer, name, call in (
        (SophiaG([p]), "scale", lambda o: o.update_hessian(scale=value)),
        (SophiaG([p]), "grad_scale", lambda o: o.update_hessian(grad_scale=value)),
        (SophiaH([p]), "grad_scale", lambda o: o.update_hessian({p: p.grad}, grad_scale=value)),
        (SophiaG([p]), "bs", lambda o: o.step(bs=value)),
        (train(SophiaG([matrix()])), "bs", lambda o: o.statistics(bs=value)),
        (None, "variance", lambda _: sampled_target_loss(torch.ones(2, 2), variance=value)),
    ):
        with pytest.raises(ValueError, match=re.escape(f"Invalid {name}: {value!r}")):
            call(optimizer)
    assert torch.equal(p, matrix())


def test_sophia_stands_alone_and_names_the_file_that_fused_needs(tmp_path):
    """Beside the script, and in a package, without sophia_fused.py and with it."""
    (tmp_path / "package").mkdir()
    for folder in (tmp_path, tmp_path / "package"):
        shutil.copy(ROOT / "sophia.py", folder)
    code = f"""
import importlib, shutil, torch, sophia
from package import sophia as packaged
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
def fused(module):
    optimizer = module.SophiaG([p])
    optimizer.update_hessian()
    optimizer.step()
    try:
        module.SophiaG([p], fused=True)
    except RuntimeError as error:
        print(error)
fused(sophia)
fused(packaged)
shutil.copy({str(ROOT / "sophia_fused.py")!r}, "package")
importlib.invalidate_caches()
fused(packaged)
"""
    command, environment = [sys.executable, "-c", code], {"PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    first, second, third = done.stdout.splitlines()
    for line, module in ((first, "sophia_fused"), (second, "package.sophia_fused")):
        assert line == f"`fused=True` needs {module}: copy sophia_fused.py beside sophia.py"
    assert third.startswith("`fused=True` requires all the params to be floating point Tensors")


def test_a_missing_triton_is_named_by_the_constructor(monkeypatch):
    sophia._fused.cache_clear()
    monkeypatch.delitem(sys.modules, "sophia_fused", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="`fused=True` needs triton: pip install triton"):
        SophiaG([matrix()], fused=True)
