"""Misuse of Muon and WhitenedMuon that users of other optimizers report: right, or refused by name."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from muon import Muon, WhitenedMuon
from tests.test_muon import parameters, set_gradients, train

classes = pytest.mark.parametrize("cls", [Muon, WhitenedMuon])


@classes
@pytest.mark.parametrize("group", [0, 1])
def test_a_parameter_that_is_written_into_groups_twice_is_refused(cls, group):
    p, q = params = parameters([(6, 6), (6, 6)])
    optimizer = cls([{"params": [p]}, {"params": [q]}])
    train(optimizer, params, 1)
    optimizer.param_groups[group]["params"].append(p)
    set_gradients(params, 1)
    with pytest.raises(ValueError, match="the groups have the same parameter twice; pass tied parameters once"):
        optimizer.step()


@classes
def test_a_matrix_without_elements_is_left_alone(cls):
    """A layer may have none, on some ranks or for some settings of a model."""
    params, alone = parameters([(0, 6), (6, 0), (6, 6)]), parameters([(0, 6), (6, 0), (6, 6)])[2:]
    for some in (params, alone):
        optimizer = cls(some, lr=0.1, split=1)
        for step in range(3):
            set_gradients(alone, step)
            for p in some:
                p.grad = alone[0].grad if p.numel() else torch.zeros_like(p)
            optimizer.step()
    assert torch.equal(params[2], alone[0])


@classes
def test_a_post_hook_of_a_load_has_the_last_word(cls):
    params = parameters([(6, 6)], torch.float32)
    optimizer, again = cls(params), cls(parameters([(6, 6)], torch.float32))
    train(optimizer, params, 2)

    def halve(loaded):
        for state in loaded.state.values():
            for key in state:
                state[key] = state[key] / 2

    again.register_load_state_dict_post_hook(halve)
    again.load_state_dict(optimizer.state_dict())
    (saved,), (state,) = optimizer.state.values(), again.state.values()
    assert len(state) == (1 if cls is Muon else 5)
    assert all(torch.equal(state[key], saved[key] / 2) for key in saved)


@classes
def test_a_loaded_state_is_a_copy(cls):
    """Two optimizers that share a state would both move it."""
    params = parameters([(6, 6)], torch.float32)
    optimizer, again = cls(params), cls(parameters([(6, 6)], torch.float32))
    train(optimizer, params, 2)
    again.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(list(again.state.values()))
    train(optimizer, params, 1)
    for state, old in zip(again.state.values(), before, strict=True):
        assert all(torch.equal(state[key], old[key]) for key in old)


def test_a_root_that_is_exchanged_is_seen_although_its_id_may_be_that_of_the_former():
    params = parameters([(6, 6)], torch.float32)
    optimizer = WhitenedMuon(params, interval=100)
    train(optimizer, params, 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = optimizer.state[params[0]]
    for i in range(20):
        train(optimizer, params, 1, first=i)
        del state["right_root"]
        state["right_root"] = torch.diag(torch.arange(1.0 + i, 7.0 + i)).view(1, 1, 6, 6)
        copied, other = copy.deepcopy((params, optimizer))
        train(optimizer, params, 1, first=i)
        train(other, copied, 1, first=i)
        assert torch.equal(params[0], copied[0])


@pytest.mark.parametrize("case", ["zeros", "no estimate", "overflow"])
def test_gradients_that_say_nothing_change_no_factor_and_are_counted(case):
    """zero_grad(set_to_none=False) leaves zeros, which would let the factors decay."""
    params = parameters([(6, 6), (4, 8)], torch.float32)
    optimizer = WhitenedMuon(params, source="update_factors")
    set_gradients(params, 0)
    optimizer.update_factors()
    before = copy.deepcopy(list(optimizer.state.values()))
    if case == "overflow":
        optimizer.update_factors(scale=1e38)
    else:
        optimizer.zero_grad(set_to_none=case == "no estimate")
        if case == "no estimate":
            with pytest.raises(RuntimeError, match="found no gradients"):
                optimizer.update_factors()
            return
        optimizer.update_factors()
    for state, old in zip(optimizer.state.values(), before, strict=True):
        assert all(torch.equal(state[key], old[key]) for key in old)
    assert optimizer.skipped_estimates.item() == 1
    with pytest.raises(ValueError, match="scale = 0"):
        optimizer.update_factors(scale=0)


def test_scale_undoes_that_of_a_loss():
    """GradScaler's scale doubles from time to time; later factors would weigh four times as much."""
    ends = []
    for scales in ((1.0, 1.0, 1.0), (2.0**15, 2.0**16, 2.0**16)):
        params = parameters([(6, 6)], torch.float32)
        optimizer = WhitenedMuon(params, lr=0.1, source="update_factors")
        for step, scale in enumerate(scales):
            set_gradients(params, step)
            params[0].grad *= scale
            optimizer.update_factors(scale=scale**-2)
            set_gradients(params, 10 + step)
            optimizer.step()
        ends.append(params[0].detach())
    torch.testing.assert_close(*ends)


@classes
def test_torchs_default_dtype_changes_nothing(cls):
    """1 / 30011 is off by 0.2% in bfloat16."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters([(6, 6)], torch.float32)
        optimizer = cls(params, lr=0.1)
        set_gradients(params, 0)
        try:
            torch.set_default_dtype(dtype)
            optimizer.grad_scale, optimizer.found_inf = 30011.0, 0.0
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        ends.append((params[0].detach(), optimizer.state[params[0]]["momentum_buffer"]))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# --- the rest of torch -----------------------------------------------------------------------------------------------


def make(cls, **settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(6, 4, bias=False))
    return model, cls([{"params": [p]} for p in model.parameters()], **{"lr": 0.05} | settings)


@classes
@pytest.mark.parametrize("flat", [False, True])
def test_dcp_restores_the_state(cls, flat, tmp_path):
    model, optimizer = make(cls)
    train(optimizer, [*model.parameters()], 3)
    optimizer.zero_grad()
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model_state, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=tmp_path / "0", no_dist=True)
    resumed_model, resumed = make(cls, lr=0.01)
    model_state, state = get_state_dict(resumed_model, resumed, options=options)  # this makes the states
    dcp.load({"model": model_state, "optimizer": state}, checkpoint_id=tmp_path / "0", no_dist=True)
    set_state_dict(resumed_model, resumed, model_state_dict=model_state, optim_state_dict=state, options=options)
    for each, its in ((optimizer, model), (resumed, resumed_model)):
        train(each, [*its.parameters()], 12, first=3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed_model.parameters(), strict=True))


@classes
def test_schedulers_drive_it_as_they_drive_sgd(cls):
    """OneCycleLR moves the momentum too; a resumed run goes on."""
    model, optimizer = make(cls)
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], momentum=0.9)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9) for o in (optimizer, sgd)]

    def run(model, optimizer, schedulers, first):
        for step in range(first, first + 3):
            train(optimizer, [*model.parameters()], 1, first=step)
            for scheduler in schedulers:
                scheduler.step()

    sgd.step()
    run(model, optimizer, schedulers, 0)
    for key in ("lr", "momentum"):
        assert optimizer.param_groups[1][key] == sgd.param_groups[0][key] != {"lr": 0.05, "momentum": 0.95}[key]
    resumed_model, resumed = make(cls)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(resumed, max_lr=0.1, total_steps=9)
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler.load_state_dict(schedulers[0].state_dict())
    run(model, optimizer, schedulers, 3)
    run(resumed_model, resumed, [scheduler], 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed_model.parameters(), strict=True))


@classes
def test_compiled_steps_equal_eager_ones(cls):
    ends = []
    for compiled in (False, True):
        model, optimizer = make(cls, **({"interval": 2} if cls is WhitenedMuon else {}))
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for i in range(3):
            set_gradients([*model.parameters()], i)
            step()
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))
