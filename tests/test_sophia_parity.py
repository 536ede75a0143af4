"""What the rest of torch does with an optimizer: docs/frameworks.md lists it."""

import copy
import math
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import lr_scheduler, swa_utils

from sophia import SophiaG, SophiaH

CLASSES = [SophiaG, SophiaH]


def make(cls=SophiaG, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "name": "matrices"}, {"params": others, "weight_decay": 0.0}]
    return model, cls(groups, **{"lr": 0.05, "bias_correction": True} | settings)


def train(model, optimizer, steps=3, update=None, step=None, each=lambda: None):
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        model(torch.randn(8, 4, generator=generator)).square().mean().backward()
        if isinstance(optimizer, SophiaH):
            optimizer.update_hessian({p: p.grad for p in model.parameters()})
        else:
            (update or optimizer.update_hessian)()
        (step or optimizer.step)()
        optimizer.zero_grad()
        each()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.filterwarnings("error:.*curvature")
def test_dcp_restores_the_state(cls, flat, tmp_path):
    model, optimizer = make(cls, max_grad_norm=0.7)
    train(model, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model_state, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=tmp_path / "0", no_dist=True)
    resumed_model, resumed = make(cls, max_grad_norm=0.7, lr=0.01)
    model_state, state = get_state_dict(resumed_model, resumed, options=options)  # this makes the states
    dcp.load({"model": model_state, "optimizer": state}, checkpoint_id=tmp_path / "0", no_dist=True)
    set_state_dict(resumed_model, resumed, model_state_dict=model_state, optim_state_dict=state, options=options)
    assert resumed.param_groups[0]["lr"] == 0.05 and resumed.max_grad_norm == 0.7
    ends = train(model, optimizer), train(resumed_model, resumed)
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_swa_averages_it():
    model, optimizer = make()
    averaged, scheduler = swa_utils.AveragedModel(model), swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=3)
    seen = []

    def each():
        averaged.update_parameters(model)
        scheduler.step()
        seen.append([p.detach().clone() for p in model.parameters()])

    train(model, optimizer, 5, each=each)
    for i, p in enumerate(averaged.module.parameters()):
        torch.testing.assert_close(p, torch.stack([parameters[i] for parameters in seen]).mean(0))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    SophiaG(optimizer.param_groups).load_state_dict(optimizer.state_dict())


SCHEDULERS = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=6),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "sequential": lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o), lr_scheduler.StepLR(o, 2)], [2]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it(name):
    """As they drive torch's AdamW; and a resumed scheduler goes on."""
    model, optimizer = make()
    adamw = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.05)
    schedulers = SCHEDULERS[name](optimizer), SCHEDULERS[name](adamw)
    rates = []

    def each():
        adamw.step()
        for scheduler in schedulers:
            scheduler.step()
        rates.append((optimizer.param_groups[1]["lr"], adamw.param_groups[0]["lr"]))
        assert optimizer.param_groups[0]["betas"][0] == pytest.approx(
            adamw.param_groups[0]["betas"][0] if name in ("one cycle", "cyclic") else 0.965
        )

    train(model, optimizer, 3, each=each)
    _, resumed = make()
    scheduler = SCHEDULERS[name](resumed)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler.load_state_dict(schedulers[0].state_dict())
    train(model, optimizer, 2, each=each)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the scheduler did not see the optimizer's steps
        for _ in range(2):
            scheduler.step()
    assert resumed.param_groups[1]["lr"] == pytest.approx(optimizer.param_groups[1]["lr"])
    assert all(math.isclose(a, b) for a, b in rates) and len(set(rates)) > 2
    SophiaG(optimizer.param_groups)  # what schedulers write into groups is no unknown setting


def test_step_hooks_run():
    model, optimizer = make()
    calls = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(kwargs))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("after"))
    train(model, optimizer, 1, step=lambda: optimizer.step(bs=7))
    assert calls == [{"bs": 7}, "after"]


def test_named_parameters_are_kept_and_named_in_errors():
    model, _ = make()
    optimizer = SophiaG(model.named_parameters())
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    train(model, optimizer, 1)
    optimizer.state[model[2].weight]["hessian"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"hessian of parameter 2.weight: got shape \(2, 2\)"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("foreach", [False, True])
def test_compiled_calls_equal_eager_ones(foreach):
    ends = []
    for compiled in (False, True):
        model, optimizer = make(foreach=foreach)
        calls = {"update": lambda o=optimizer: o.update_hessian(), "step": lambda o=optimizer: o.step(bs=8)}
        if compiled:
            calls = {name: torch.compile(call, backend="aot_eager") for name, call in calls.items()}
        ends.append(train(model, optimizer, 4, **calls))
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q)
