"""Misuse of SophiaG, SophiaH and the estimators that users of other optimizers report: right, or refused by name."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import SophiaG, SophiaH, hutchinson, sampled_label_loss, sampled_target_loss
from tests.test_sophia_misuse import classes, estimate, give_gradients, implementations, matrix, train, triton

__all__ = ["triton"]  # a fixture


def only(optimizer):
    (p,) = optimizer.param_groups[0]["params"]
    return p, optimizer.state[p]


# --- states ----------------------------------------------------------------------------------------------------------


@implementations
@pytest.mark.parametrize("key", ["step", "hessian_step"])
@pytest.mark.parametrize("count", [torch.zeros(3), torch.zeros(0), [1.0, 2.0]], ids=["three", "none", "list"])
def test_a_count_that_is_not_one_number_is_refused(implementation, key, count):
    """The kernels would read and write beside it."""
    optimizer = train(SophiaG([matrix()], bias_correction=True, **implementation))
    only(optimizer)[1][key] = count
    with pytest.raises(ValueError, match=rf"{key} of a parameter of \(6, 6\) is .*expected a number"):
        optimizer.step()


@implementations
def test_counts_of_one_element_are_numbers(implementation):
    optimizer = SophiaG([matrix(shape=())], bias_correction=True, **implementation)
    p, state = only(train(optimizer))
    state.update(step=torch.tensor([2.0]), hessian_step=torch.tensor([[2]]))
    train(optimizer, 1)
    assert (state["step"].item(), state["hessian_step"].item(), p.shape, state["step"].shape) == (3, 3, (), ())


@implementations
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_an_average_of_another_kind_of_number_is_refused(implementation, dtype):
    """h <- beta2 h + (1 - beta2) estimate, in whole numbers, is 0."""
    optimizer = train(SophiaG([matrix()], **implementation))
    p, state = only(optimizer)
    state["hessian"] = torch.ones(6, 6, dtype=dtype)
    give_gradients([p])
    with pytest.raises(ValueError, match=rf"hessian of parameter 0 of group 0: .*{dtype} for torch.float32"):
        optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, SophiaH], ids=lambda cls: cls.__name__)
def test_the_state_of_another_optimizer_is_refused_and_nothing_is_loaded(make):
    """AdamW's settings would replace the learning rate and betas, and eps would turn SophiaG's step into SophiaH's."""
    p = matrix()
    other, optimizer = make([p], lr=3.0), train(SophiaG([p], lr=0.1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"'(amsgrad|dampening|eps)' is a setting of no group"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert torch.equal(optimizer.state_dict()["state"][0]["hessian"], before["state"][0]["hessian"])
    optimizer.load_state_dict(before)  # no hook is left over


@pytest.mark.parametrize(
    ("bad", "message"), [({"bs": 0}, "Invalid bs"), ({"betas": (0.9,)}, "Invalid betas"), ({"lr": math.nan}, "rate")]
)
def test_a_bad_setting_is_refused_wherever_it_comes_from(bad, message):
    optimizer = train(SophiaG([matrix()]))
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(bad)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    if "bs" in bad:  # written into the group, rho bs h would be 0 and the step that of the sign
        optimizer.param_groups[0].update(bad)
        with pytest.raises(ValueError, match=message):
            optimizer.step()


def test_entries_of_a_state_that_are_of_no_parameter_are_kept_as_torch_keeps_them():
    optimizer = train(SophiaG([matrix()]))
    saved = optimizer.state_dict()
    saved["state"] |= {7: {"exp_avg": torch.ones(2)}, "shared": 5}
    optimizer.load_state_dict(saved)
    assert optimizer.state[7]["exp_avg"].tolist() == [1, 1] and optimizer.state["shared"] == 5


# --- fused: what changes in place, at the same address ---------------------------------------------------------------


@implementations
def test_a_parameter_that_is_transposed_in_place_meets_its_own_gradient(implementation):
    p = matrix()
    optimizer = train(SophiaG([p], lr=0.1, weight_decay=0.0, **implementation))
    p.data = p.data.t()
    p.grad = torch.zeros(6, 6)
    p.grad[0] = 1e3
    optimizer.state[p]["exp_avg"].zero_()
    before = p.detach().clone()
    optimizer.step()
    assert (p - before).abs().sum(1).tolist() == pytest.approx([0.6, 0, 0, 0, 0, 0], abs=1e-6)


@implementations
def test_a_parameter_that_is_viewed_in_another_shape_is_refused(implementation):
    p = matrix()
    optimizer = train(SophiaG([p], **implementation))
    p.grad, p.data = None, p.data.view(3, 12)
    give_gradients([p])
    with pytest.raises(ValueError, match=r"exp_avg .*got shape \(6, 6\) for a parameter of shape \(3, 12\)"):
        optimizer.step()


@implementations
def test_a_state_that_goes_to_other_memory_and_back_counts_on(implementation):
    """As offloading between steps does with `value.data = ...`."""
    optimizer = train(SophiaG([matrix()], bias_correction=True, **implementation))
    _, state = only(optimizer)
    before = {key: value.data for key, value in state.items()}
    for key, value in state.items():
        value.data = before[key].clone()
    train(optimizer, 1)
    assert (state["step"].item(), state["hessian_step"].item()) == (3, 3)
    assert (before["step"].item(), before["hessian_step"].item()) == (2, 2)


@implementations
def test_a_lazily_negated_gradient_has_its_sign(implementation):
    p = matrix()
    before, optimizer = p.detach().clone(), SophiaG([p], lr=0.1, betas=(0.5, 0.99), weight_decay=0.0, **implementation)
    negated = torch._neg_view(torch.ones(6, 6))
    for gradient in (negated, torch.full((6, 6), 1.5), negated):  # the last one meets a plan
        p.grad = gradient
        optimizer.step()
        before -= 0.1 * gradient.sign()
        torch.testing.assert_close(p.detach(), before)


@implementations
def test_a_gradient_of_zeros_without_memory_leaves_the_momentum_to_decay(implementation):
    p = matrix()
    optimizer = SophiaG([p], betas=(0.5, 0.99), **implementation)
    for gradient in (torch.ones(6, 6), torch.ones(6, 6), torch._efficientzerotensor((6, 6))):
        p.grad = gradient
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((6, 6), 0.375))


@implementations
def test_a_backward_pass_through_values_before_a_step_is_an_error(implementation):
    p = matrix()
    optimizer = SophiaG([p], **implementation)
    for _ in range(3):  # the later ones use the plan of the first
        output = torch.ones(1, 6, requires_grad=True) @ p
        p.grad = torch.ones(6, 6)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_a_model_of_another_dtype_goes_on():
    ends = []
    for implementation in ({"fused": True}, {"foreach": False}):
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        optimizer = train(SophiaG(model.parameters(), lr=0.01, **implementation))
        for dtype in (torch.float64, torch.float16, torch.float32):
            train(optimizer, 2)
            model.to(dtype)
        train(optimizer, 1)
        ends.append((model.weight, optimizer.state[model.weight]))
    torch.testing.assert_close(ends[0][0], ends[1][0])
    assert all(state["hessian"].dtype == torch.float32 for _, state in ends)


def test_frozen_quantized_parameters_stay_out_of_the_kernels_way():
    pytest.importorskip("triton")
    frozen = nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)
    p = matrix()
    optimizer = SophiaG([frozen, p], fused=True)
    give_gradients([p])
    optimizer.update_hessian()
    optimizer.step()
    assert optimizer.state[p]["step"] == 1 and frozen.tolist() == [1] * 4


# --- estimates that take no effect -----------------------------------------------------------------------------------


@implementations
def test_an_estimate_of_zeros_takes_no_effect(implementation):
    """After zero_grad(set_to_none=False), or of a batch that is all padding, h would only decay."""
    optimizer = train(SophiaG([matrix(), matrix(1, (5,))], bias_correction=True, **implementation))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad(set_to_none=False)
    optimizer.update_hessian()
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[key], before[number][key]) for key in state)
    assert optimizer.skipped_estimates.item() == 1
    train(optimizer, 1)
    assert optimizer.skipped_estimates.item() == 1


@implementations
def test_a_hessian_of_zeros_is_an_estimate_of_sophia_h(implementation):
    optimizer = train(SophiaH([matrix()], **implementation))
    p, state = only(optimizer)
    before = state["hessian"].clone()
    optimizer.update_hessian({p: torch.zeros(6, 6)})
    torch.testing.assert_close(state["hessian"], 0.99 * before)


@implementations
@classes
def test_a_first_step_after_estimates_that_took_no_effect_warns(cls, implementation):
    optimizer = cls([matrix()], **implementation)
    p, _ = only(optimizer)
    p.grad = torch.full((6, 6), math.inf)
    estimate(optimizer)
    give_gradients([p])
    with pytest.warns(UserWarning, match="without a curvature"):
        optimizer.step()


@implementations
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_scalers_numbers_may_be_tensors_of_one_element(implementation, shape):
    optimizer = train(SophiaG([matrix()], max_grad_norm=1.0, **implementation))
    p, state = only(optimizer)
    before = p.detach().clone()
    optimizer.grad_scale, optimizer.found_inf = torch.full(shape, 2.0), torch.ones(shape)
    optimizer.step()
    assert torch.equal(p, before) and state["step"] == 2
    optimizer.found_inf.zero_()
    optimizer.step()
    assert not torch.equal(p, before) and state["step"] == 3
    optimizer.update_hessian(grad_scale=torch.full(shape, 2.0))
    assert state["hessian"].shape == (6, 6)
    with pytest.raises(ValueError, match="Invalid grad_scale"):
        optimizer.update_hessian(grad_scale=torch.tensor([1.0, 2.0]))


# --- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:optimizer contains")
def test_a_parameter_that_is_twice_in_a_group_is_refused():
    """It would be stepped twice, by the kernels at the same time."""
    p = matrix()
    for cls in (SophiaG, SophiaH):
        with pytest.raises(ValueError, match="the same parameter twice; pass tied parameters once"):
            cls([p, p])


@implementations
@pytest.mark.parametrize("group", [0, 1])
def test_a_parameter_that_is_written_into_groups_twice_is_refused(group, implementation):
    p, q = matrix(0), matrix(1)
    optimizer = train(SophiaG([{"params": [p]}, {"params": [q]}], **implementation))
    optimizer.param_groups[group]["params"].append(p)
    before = p.detach().clone()
    for call in (optimizer.step, optimizer.update_hessian):
        with pytest.raises(ValueError, match="the same parameter twice"):
            call()
    assert torch.equal(p, before)


def test_groups_of_one_name_share_a_win_rate():
    a, b, c = matrix(0), matrix(1, (3,)), matrix(2)
    groups = [{"params": [a], "name": "x", "rho": 1e9}, {"params": [b], "name": "x", "rho": 0.0}, {"params": [c]}]
    rates = train(SophiaG(groups, rho=0.0)).statistics()
    assert rates["win_rate/x"] == pytest.approx(36 / 39) and rates["win_rate/2"] == 0
    assert rates["win_rate"] == pytest.approx(36 / 75)


@pytest.mark.parametrize("value", ["1", [1.0], math.nan, -1.0])
def test_a_bad_max_grad_norm_is_named(value):
    with pytest.raises(ValueError, match="Invalid max_grad_norm"):
        SophiaG([matrix()], max_grad_norm=value)
    assert SophiaG([matrix()], max_grad_norm=math.inf).max_grad_norm == math.inf  # only measures


@pytest.mark.parametrize("name", ["maximize", "capturable", "bias_correction", "nesterov", "foreach", "fused"])
@pytest.mark.parametrize("value", ["False", None, 2])
def test_a_switch_that_is_no_truth_value_is_named(name, value):
    """As a configuration file may give it: "False" would be true."""
    if value is None and name in ("foreach", "fused"):
        pytest.skip("the default")
    for cls in (SophiaG, SophiaH):
        with pytest.raises(ValueError, match=f"Invalid {name}: {value!r}"):
            cls([matrix()], **{name: value})


@implementations
def test_torchs_default_dtype_changes_nothing(implementation):
    """In bfloat16 a count stops at 256, and 1 / 30011 is off by 0.2%."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(torch.float32)
        p = matrix()
        optimizer = SophiaG([p], lr=0.1, rho=0.5, bs=2, max_grad_norm=1.0, **implementation)
        give_gradients([p], scale=30011.0)
        try:
            torch.set_default_dtype(dtype)
            optimizer.update_hessian(grad_scale=30011.0)
            optimizer.grad_scale, optimizer.found_inf = 30011.0, 0.0
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
            p.grad.fill_(math.nan)
            for _ in range(258 if implementation == {"foreach": False} else 2):
                optimizer.update_hessian()
        finally:
            torch.set_default_dtype(torch.float32)
        ends.append((p.tolist(), optimizer.state[p]["hessian"].tolist(), float(optimizer.skipped_estimates)))
    assert ends[0] == ends[1]


@implementations
def test_parameters_that_come_after_the_estimates_are_warned_of_once(implementation):
    """A layer that is unfrozen moves by lr until the next estimate; one whose curvature is 0 was estimated."""
    p, q, late = matrix(0), matrix(1), matrix(2)
    optimizer = SophiaG([p, q, late], **implementation)
    give_gradients([p, q])
    q.grad.zero_()
    estimate(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    give_gradients([p, q, late])
    with pytest.warns(
        UserWarning, match=r"before any update_hessian\(\) that took effect on 1 parameters: without a cur"
    ):
        optimizer.step()
    optimizer.add_param_group({"params": [matrix(3)]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        train(optimizer)


# --- hutchinson ------------------------------------------------------------------------------------------------------


def test_a_tied_parameter_has_one_random_vector():
    """Two would add a second vector's noise to the estimate, which is 3 u^2 here."""
    p = nn.Parameter(torch.ones(5))
    first, second = hutchinson(lambda: 1.5 * (p * p).sum(), [p, p], torch.Generator().manual_seed(0))
    u = torch.randn(5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first, 3 * u * u)
    assert torch.equal(first, second)


@pytest.mark.parametrize("case", ["copy", "no_grad", "single tensor", "reentrant checkpoint"])
def test_a_loss_that_does_not_reach_the_parameters_is_refused(case):
    """Its estimates would all be 0, and the steps that of the sign."""
    from torch.utils.checkpoint import checkpoint

    model, x = nn.Linear(3, 3), torch.ones(3, requires_grad=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        without_graph = model(x).square().sum()
    losses = {
        "copy": lambda: other(x).square().sum(),
        "no_grad": without_graph,
        "single tensor": lambda: model(x).square().sum(),
        "reentrant checkpoint": lambda: checkpoint(model, x, use_reentrant=True).square().sum(),
    }
    params = model.weight if case == "single tensor" else model.parameters()
    with pytest.raises(RuntimeError, match=r"the loss does not depend on (\d) of \1 parameters"):
        hutchinson(losses[case], params)


@pytest.mark.parametrize(
    "made", [lambda x: x, lambda x: (x.sum(), x), lambda x: x.sum().item(), lambda x: x.sum() * 1j]
)
def test_a_loss_that_is_not_one_real_number_is_named(made):
    """The output of a model of the Hugging Face world is its loss and more."""
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="hutchinson needs the loss, a tensor of one real number, and got"):
        hutchinson(lambda: made(model(torch.ones(3))), model.parameters())


def test_a_parameter_that_the_loss_does_not_use_is_warned_of_and_has_the_estimate_0():
    used, unused = nn.Linear(3, 3, bias=False), nn.Linear(2, 2, bias=False)
    with pytest.warns(UserWarning, match="does not depend on 1 of 2 parameters"):
        found = hutchinson(lambda: used(torch.ones(3)).square().sum(), [used.weight, unused.weight])
    assert found[0].count_nonzero() == 9 and torch.equal(found[1], torch.zeros(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hutchinson(lambda: used.weight.sum(), [used.weight])[0].any()  # linear: its Hessian is 0


def test_parameters_that_hutchinson_cannot_take_are_refused():
    model = nn.Linear(3, 3)
    for params in (model.named_parameters(), SophiaH(model.parameters()).param_groups):
        with pytest.raises(RuntimeError, match=r"does not work on .*no tensors"):
            hutchinson(lambda: model(torch.ones(3)).sum(), params)
    z = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(RuntimeError, match="complex"):
        hutchinson(lambda: z.abs().square().sum(), [z])


@pytest.mark.parametrize("value", [0.5, [1.0] * 6, "x"])
def test_estimates_that_are_no_tensors_are_refused(value):
    p = matrix()
    with pytest.raises(
        ValueError, match="1 estimates of what is no parameter of this optimizer, or that are no tensors"
    ):
        SophiaH([p]).update_hessian({p: value})


# --- sampled losses --------------------------------------------------------------------------------------------------


def test_an_ignored_index_without_targets_is_refused():
    with pytest.raises(ValueError, match="ignore_index says which targets are padding, so it needs targets"):
        sampled_label_loss(torch.randn(3, 4), ignore_index=0)


@pytest.mark.parametrize("logits", [(torch.ones(3, 4), None), torch.ones(3, 4).long(), torch.ones(()), None])
def test_what_is_no_logits_is_named(logits):
    """A model may return its logits and more."""
    with pytest.raises(ValueError, match=r"expected floating-point logits \(..., classes\), got"):
        sampled_label_loss(logits)


def test_torch_func_takes_the_gradient_of_every_sequence():
    """As many backward passes of one sequence each give."""
    model, x, uniform = nn.Linear(4, 7), torch.randn(5, 3, 4), torch.rand(5, 3)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, x, uniform):
        return sampled_label_loss(torch.func.functional_call(model, params, (x,)), uniform=uniform)

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, uniform)
    for i in range(5):
        model.zero_grad()
        sampled_label_loss(model(x[i]), uniform=uniform[i]).backward()
        torch.testing.assert_close(found["weight"][i], model.weight.grad)
        torch.testing.assert_close(found["bias"][i], model.bias.grad)


def test_a_batch_of_padding_alone_does_not_change_the_curvature():
    head = nn.Linear(4, 7)
    optimizer = train(SophiaG(head.parameters()))
    before = optimizer.state[head.weight]["hessian"].clone()
    optimizer.zero_grad()
    sampled_label_loss(head(torch.randn(5, 4)), targets=torch.full((5,), -100)).backward()
    optimizer.update_hessian()
    assert torch.equal(optimizer.state[head.weight]["hessian"], before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_regression_in_half_precision_neither_overflows_nor_rounds_the_noise(dtype):
    """At 1000 bfloat16 numbers are 4 apart, and so would be the noise of variance 1; float16's sum would be inf."""
    outputs = torch.full((50_000, 4), 1000.0, dtype=dtype, requires_grad=True)
    loss = sampled_target_loss(outputs, torch.Generator().manual_seed(0))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(2.0, rel=0.02)
    exact = sampled_target_loss(outputs.detach().float(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss.detach(), exact)


def test_a_tied_embedding_trains():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    optimizer = SophiaG(model.parameters(), lr=0.05)
    x = torch.arange(7)
    losses = []
    for _ in range(20):
        sampled_label_loss(model(x)).backward()
        optimizer.update_hessian()
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(x), (x + 1) % 7))
        losses[-1].backward()
        optimizer.step(bs=7)
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.filterwarnings("error")
def test_steps_on_the_meta_device_have_no_numbers_to_look_at():
    p = nn.Parameter(torch.empty(3, 3, device="meta"))
    p.grad = torch.empty(3, 3, device="meta")
    optimizer = SophiaG([p])
    optimizer.update_hessian()
    optimizer.step()
    assert {key: value.is_meta for key, value in optimizer.state[p].items()} == dict.fromkeys(optimizer.state[p], True)


@implementations
def test_a_bias_correction_that_was_off_for_a_while_corrects_no_more(implementation):
    """Its count stood still meanwhile: with it h would be divided by 1 - beta2^2 after five estimates."""
    optimizer = train(SophiaG([matrix()], lr=0.1, weight_decay=0.0, bias_correction=True, **implementation))
    (group,) = optimizer.param_groups
    group["bias_correction"] = False
    train(optimizer, steps=3, seed=2)
    group["bias_correction"] = True
    p, state = only(optimizer)
    give_gradients([p], 5)
    before, m = p.detach().double(), state["exp_avg"].double().lerp(p.grad.double(), 1 - group["betas"][0])
    optimizer.step(bs=3)
    ratios = m.abs() / (group["rho"] * 3 * state["hessian"].double() + 1e-15)
    torch.testing.assert_close(p.detach().double(), before - 0.1 * m.sign() * ratios.clamp(max=1), rtol=1e-5, atol=1e-6)
    assert (ratios < 1).any()
