"""The optimizers that a run can use, by name, and several optimizers as one.

    optimizer = make_optimizer(config, model.parameter_groups(config.weight_decay), device)

To add one, write a function that builds it and add a line to OPTIMIZERS (CONTRIBUTING.md).
"""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from muon import JORDAN, MINIMAX, Muon, WhitenedMuon
from muon_distributed import share
from sophia import SophiaG, SophiaH

AUX_BETAS = (0.9, 0.95)  # of AdamW beside Sophia: for the groups of adamw_for, and before sophia_start_iter


# ----- building: (config, parameter groups, device) -> optimizer. The run sets the learning rates.


def adamw(config, groups, device):
    return _adamw(groups, (config.beta1, config.beta2), device)


def _adamw(groups, betas, device):
    return torch.optim.AdamW(groups, betas=betas, fused=_can_fuse(device))


def _can_fuse(device):
    return device.type in ("cuda", "cpu")


def nadamw(config, groups, device):
    return torch.optim.NAdam(groups, betas=(config.beta1, config.beta2), decoupled_weight_decay=True)


def sgd(config, groups, device):
    """Nesterov's, with weight decay in the gradient (not decoupled)."""
    momentum, fused = config.momentum, _can_fuse(device) and not config.fsdp  # torch's fused step knows no shards
    optimizer = torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0, fused=fused)
    for p in (p for group in groups for p in group["params"] if momentum):
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)  # torch's is uninitialized after a skipped step
    return optimizer


def lion(config, groups, device):
    from lion_pytorch.foreach import Lion

    return Lion(groups, betas=(config.beta1, config.beta2))


def muon(config, groups, device):
    """Muon for the group "matrices", AdamW for the others."""
    return _beside_adamw(Muon, config, groups, device, (config.beta1, config.beta2), momentum=config.momentum)


def whitened_muon(config, groups, device, cls=WhitenedMuon):
    """The same with Muon's step in coordinates that the training gradient whitens."""
    whitening = {"momentum": config.momentum, "interval": config.whiten_interval, **_whitening(config)}
    return _beside_adamw(cls, config, groups, device, (config.beta1, config.beta2), **whitening)


def sophia_muon(config, groups, device):
    """The same with factors from the gradients of Sophia's sampled labels."""
    whitening = {"momentum": config.beta1, "source": "update_factors", **_whitening(config)}
    return _beside_adamw(WhitenedMuon, config, groups, device, AUX_BETAS, **whitening)


def _whitening(config):
    names = "sides", "exponent", "ridge", "decay", "max_width"
    return {name: getattr(config, f"whiten_{name}") for name in names}


def _beside_adamw(cls, config, groups, device, betas, **settings):
    """An optimizer of matrices for the group "matrices", and AdamW for the others."""
    matrices = [group for group in groups if group["name"] == "matrices"]
    others = [group for group in groups if group["name"] != "matrices"]
    steps = MINIMAX if config.muon_steps == "minimax" else JORDAN
    settings |= {"cautious": config.cautious_decay, "ns_coefficients": steps, "fused": device.type == "cuda"}
    return OptimizerContainer(muon=cls(matrices, **settings), adamw=_aux_adamw(config, others, betas, device))


def _aux_adamw(config, groups, betas, device):
    """AdamW beside another optimizer, at a learning rate of its own where `adamw_lr` gives one."""
    if rate := getattr(config, "adamw_lr", None):
        for group in groups:
            group["lr_scale"] = rate / config.learning_rate
    return _adamw(groups, betas, device)


def soap(config, groups, device):
    from pytorch_optimizer import SOAP

    betas = config.beta1, config.beta2
    return WithAuxAdam(groups, betas, device, soap=partial(SOAP, betas=betas))


def sophia(config, groups, device):
    """SophiaG or SophiaH, and AdamW for the groups that `adamw_for` names."""
    auxiliary = [group for group in groups if group["name"] in config.adamw_for]
    groups = [group for group in groups if group["name"] not in config.adamw_for]
    optimizer = (SophiaG if config.optimizer_name == "sophiag" else SophiaH)(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        rho=config.rho,
        weight_decay=config.weight_decay,
        bias_correction=config.bias_correction,
        nesterov=config.nesterov,
        fused=device.type == "cuda",
    )
    if not auxiliary:
        return optimizer
    return OptimizerContainer(sophia=optimizer, adamw=_aux_adamw(config, auxiliary, AUX_BETAS, device))


def adamw_before_sophia(config, groups, device):
    """The AdamW of the steps before sophia_start_iter."""
    return _adamw(groups, AUX_BETAS, device)


# ----- the registry


@dataclass(frozen=True)
class OptimizerSpec:
    """What a run has to know about an optimizer.

    build: (config, parameter groups, device) -> the optimizer.
    estimate: its curvature pass: None, "labels" (gradient of sampled labels) or "hutchinson" (Hessian-vector product).
    shards: True if it works with parameters that fsdp has split over the ranks, as a test shows; else why it does not.
    state_key: the key by which the states of an imported checkpoint are known as its own.
    """

    build: Callable
    estimate: str | None = None
    shards: bool | str = "no test has shown that it can"
    state_key: str | None = None


OPTIMIZERS = {
    "adamw": OptimizerSpec(adamw, shards=True, state_key="exp_avg_sq"),
    "nadamw": OptimizerSpec(nadamw, shards=True),
    "sgd": OptimizerSpec(sgd, shards=True),
    "lion": OptimizerSpec(lion, shards=True),
    "muon": OptimizerSpec(muon, shards=True),
    "whitened_muon": OptimizerSpec(whitened_muon, shards=True),
    "soap": OptimizerSpec(soap, shards="its package steps complete matrices"),
    "sophiag": OptimizerSpec(sophia, estimate="labels", shards=True, state_key="hessian"),
    "sophiah": OptimizerSpec(
        sophia, estimate="hutchinson", shards="torch cannot take Hessian-vector products of a model split by fsdp"
    ),
    "sophia_muon": OptimizerSpec(sophia_muon, estimate="labels", shards=True),
}
FIRST_ORDER = tuple(name for name, spec in OPTIMIZERS.items() if spec.estimate is None)
SECOND_ORDER = tuple(name for name, spec in OPTIMIZERS.items() if spec.estimate)


def make_optimizer(config, groups, device):
    """The optimizer that `optimizer_name` names, for the parameter groups of the model."""
    return OPTIMIZERS[config.optimizer_name].build(config, groups, device)


def optimizer_of_state(state):
    """The optimizer_name whose states have the keys of `state`; None if it is none of those that can be imported."""
    return next((name for name, spec in OPTIMIZERS.items() if spec.state_key in state), None)


# ----- several optimizers as one


class OptimizerContainer(torch.optim.Optimizer):
    """Several optimizers as one, each for its own parameters.

        optimizer = OptimizerContainer(sophia=SophiaG(matrices), adamw=torch.optim.AdamW(others))

    The first takes the arguments of `step`. The state_dict is {name: state_dict of that optimizer}.
    It knows torch.amp.GradScaler's protocol if all of them do.
    """

    def __init__(self, **optimizers):
        self.optimizers = optimizers
        self._step_supports_amp_scaling = all(map(supports_amp_scaling, optimizers.values()))
        super().__init__(self.param_groups, {})
        params = [p for group in self.param_groups for p in group["params"]]
        if len({*params}) < len(params):
            raise ValueError("two of the optimizers have the same parameter")

    def add_param_group(self, param_group):
        """For the constructor only: RuntimeError for a group of none of the optimizers, which nobody would step."""
        if not any(param_group is group for group in self.param_groups):
            raise RuntimeError("add the group to one of the optimizers")

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_optimizer_")}

    def _groups(self):
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def _states(self):
        return {p: state for optimizer in self.optimizers.values() for p, state in optimizer.state.items()}

    def _keep(self, _):
        """torch.optim.Optimizer's constructor sets groups and state, which are the optimizers' own."""

    param_groups, state = property(lambda self: self._groups(), _keep), property(_states, _keep)

    def step(self, closure=None, **arguments):
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._step(**arguments)
        return loss

    def _step(self, **arguments):
        for optimizer in self.optimizers.values():
            with amp_scaling(optimizer, getattr(self, "grad_scale", None), getattr(self, "found_inf", None)):
                optimizer.step(**arguments)
            arguments = {}

    def state_dict(self):
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state_dict):
        if other := self.optimizers.keys() ^ state_dict.keys():
            has = "has" if min(other) in state_dict else "has no"
            raise ValueError(f"the state is not of these optimizers: it {has} {min(other)!r}")
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict[name])

    def _forwarded(name):
        def register(self, hook, prepend=False):
            """Register the hook with each of the optimizers. It cannot be removed."""
            for optimizer in self.optimizers.values():
                getattr(optimizer, name)(hook, prepend)

        return register

    register_state_dict_pre_hook = _forwarded("register_state_dict_pre_hook")
    register_state_dict_post_hook = _forwarded("register_state_dict_post_hook")
    register_load_state_dict_pre_hook = _forwarded("register_load_state_dict_pre_hook")
    register_load_state_dict_post_hook = _forwarded("register_load_state_dict_post_hook")


class WithAuxAdam(OptimizerContainer):
    """An optimizer for the group "matrices" and AdamW for the other groups.

    The optimizer sees the blocks of the group's `split` as separate matrices: query, key and value, as Muon's author
    advises. The blocks and their gradients are views; nothing is copied.
    """

    def __init__(self, groups, betas, device, **make):
        """make: NAME=function that makes the optimizer of a list of matrices and a weight_decay."""
        ((self._name, make_optimizer),) = make.items()
        self._matrices = next(group for group in groups if group["name"] == "matrices")
        self._blocks = [torch.nn.Parameter(block) for block in self._split(torch.Tensor.detach)]
        optimizer = make_optimizer(self._blocks, weight_decay=self._matrices["weight_decay"])
        self._matrices.setdefault("lr", optimizer.defaults["lr"])
        others = [group for group in groups if group is not self._matrices]
        super().__init__(**{self._name: optimizer}, adamw=_adamw(others, betas, device))

    def _split(self, tensor_of):
        """The blocks of a tensor of each matrix, in their order."""
        split = self._matrices.get("split", 1)
        splits = [split] * len(self._matrices["params"]) if isinstance(split, int) else split
        return [b for p, n in zip(self._matrices["params"], splits, strict=True) for b in split_qkv(tensor_of(p), n)]

    def _groups(self):
        return [self._matrices, *self.optimizers["adamw"].param_groups]

    def _step(self):
        optimizer = self.optimizers[self._name]
        optimizer.param_groups[0]["lr"] = self._matrices["lr"]
        for block, gradient in zip(self._blocks, self._split(lambda p: p.grad), strict=True):
            block.grad = gradient
        super()._step()
        optimizer.zero_grad()


def split_qkv(matrix, split):
    """The matrices that `matrix` holds, as views: query, key and value of a fused one.

    split: how many of equally many rows, or the rows of each.
    """
    return matrix.chunk(split) if isinstance(split, int) else matrix.split(list(split))


# ----- for all optimizers


def supports_amp_scaling(optimizer):
    """Whether the optimizer knows the protocol of torch.amp.GradScaler (`amp_scaling`)."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


@contextlib.contextmanager
def amp_scaling(optimizer, grad_scale, found_inf):
    """torch.amp.GradScaler's protocol: within, the optimizer divides gradients by `grad_scale` and changes nothing if
    `found_inf` is 1. Both are scalars on the device, which the host never reads, or None."""
    optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf
    try:
        yield
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def _parts(optimizer):
    return list(optimizer.optimizers.values()) if isinstance(optimizer, OptimizerContainer) else [optimizer]


def share_matrices(optimizer):
    """Let the ranks compute the updates of Muon and its kin together."""
    for part in _parts(optimizer):
        if isinstance(part, Muon):
            share(part)


def second_order(optimizer):
    """The optimizer, or the part of a container, that takes curvature estimates; and its method for them."""
    for part in _parts(optimizer):
        for name in ("update_hessian", "update_factors"):
            if hasattr(part, name):
                return part, getattr(part, name)
    raise ValueError(f"{type(optimizer).__name__} takes no curvature estimates")


def step_arguments(config, optimizer):
    """What `step` and `statistics` take: for SophiaG the number of labels in a step."""
    return {"bs": config.total_bs * config.block_size} if isinstance(_parts(optimizer)[0], SophiaG) else {}


def statistics(config, optimizer):
    """{metric name: number} that an optimizer reports on itself; {} for most."""
    numbers = {}
    for part in _parts(optimizer):
        if hasattr(part, "statistics"):
            numbers |= part.statistics(**step_arguments(config, optimizer))
    return {f"train/{name}" if name.startswith("win_rate") else name: value for name, value in numbers.items()}


def skipped_matrices(optimizer, world):
    """{metric name: number on the device} of whitened Muon's updates that were not finite; {} for other optimizers."""
    counts = [part.skipped_matrices for part in _parts(optimizer) if isinstance(part, WhitenedMuon)]
    if not counts:
        return {}
    count = torch.as_tensor(sum(counts), dtype=torch.float32, device=world.device)
    return {"train/skipped_matrices": world.sum(count) if has_parts(optimizer) else count}


def take_momentum(optimizer, before):
    """Give `optimizer` the momentum, step counts and learning rates of the AdamW `before`, whose states are freed."""
    momenta = {n: {"step": s["step"], "exp_avg": s["exp_avg"]} for n, s in before.state_dict()["state"].items()}
    optimizer.load_state_dict({"state": momenta, "param_groups": optimizer.state_dict()["param_groups"]})
    for group, group_before in zip(optimizer.param_groups, before.param_groups, strict=True):
        group["lr"] = group_before["lr"]
    before.state.clear()


# ----- states from checkpoints


def has_parts(optimizer):
    """Whether ranks hold states that the others do not, although the parameters are whole: whitened Muon's factors."""
    return any(isinstance(part, WhitenedMuon) and part._share for part in _parts(optimizer))


def owns(optimizer, p):
    """Whether this rank holds the states of `p` that are not sharded as `p` is."""
    shares = [part._share for part in _parts(optimizer) if getattr(part, "_share", None)]
    return all(share.owner.get(p, share.rank) == share.rank for share in shares)


def named_state(optimizer, names):
    """The state_dict with the names {parameter: name} in place of numbers."""
    if isinstance(optimizer, OptimizerContainer):
        return {name: named_state(part, names) for name, part in optimizer.optimizers.items()}
    state, labels = optimizer.state_dict(), _labels(optimizer, names)
    groups = [{**group, "params": [labels[n] for n in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": {labels[n]: s for n, s in state["state"].items()}, "param_groups": groups}


def _labels(optimizer, names):
    """The parameters' names in their order. A block of a matrix, which has none, has its number."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [names.get(p, str(number)) for number, p in enumerate(parameters)]


def load_state(optimizer, state, names, step=0):
    """Load a checkpoint's state, a state_dict or `named_state`. Settings (betas, ...) stay those of `optimizer`.

    step: of the checkpoint. After the first, a state that is missing is a ValueError.
    """
    made = {p: dict(state) for p, state in optimizer.state.items()}
    optimizer.load_state_dict(_with_settings_of(optimizer, state, names))
    for part in _parts(optimizer):
        _check_state(part, step)
    for p, tensors in made.items():  # a checkpoint of momentum = 0 has no buffers
        for key in tensors.keys() - optimizer.state[p].keys():
            optimizer.state[p][key] = tensors[key]


def _check_state(optimizer, step):
    """ValueError where a state is not its parameter's, or is missing.

    A fused step would read memory that is not its own. Other steps would begin a missing average again.
    """
    is_adam = isinstance(optimizer, torch.optim.AdamW | torch.optim.NAdam)
    if step and not optimizer.state and not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(f"the state of {type(optimizer).__name__} is empty after {step} steps")
    found = {p: {_whitened_by(key) or key for key in state} for p, state in optimizer.state.items()}
    expected = set().union(*found.values())
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.state.get(p, {})
        needed = expected if owns(optimizer, p) else {key for key in expected if not _whitened_by(key)}
        if missing := needed - found.get(p, set()):
            raise ValueError(f"{min(missing)} of a parameter of {tuple(p.shape)} is missing, others have it")
        if is_adam and state and not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
            raise ValueError(f"an average is missing, it has {', '.join(state)}")
        for key in {"exp_avg", "exp_avg_sq", "hessian", "momentum_buffer"} & state.keys():
            if state[key] is not None and state[key].shape != p.shape:
                raise ValueError(f"{key} is {tuple(state[key].shape)} for a parameter of {tuple(p.shape)}")


def _whitened_by(key):
    """ "left_root" of WhitenedMuon's key "left_root_256", which only the owner has. None of another key."""
    return (re.match("(left|right)_(factor|root)", key) or [None])[0]


def rescale_curvature(optimizer, ratio):
    """Keep the curvature of a SophiaG whose step has 1 / ratio times as many labels as the one that made its state.

    Its state holds the curvature over the labels of a step.
    """
    for state in (s for part in _parts(optimizer) if isinstance(part, SophiaG) for s in part.state.values()):
        if "hessian" in state:
            state["hessian"].mul_(ratio)


def _with_settings_of(optimizer, state, names):
    """`state` with the optimizer's own groups, except for the state in them: "params", and some optimizers' "step"."""
    if isinstance(optimizer, OptimizerContainer):
        return {name: _with_settings_of(part, state[name], names) for name, part in optimizer.optimizers.items()}
    if isinstance(optimizer, Muon):
        state = _joined_blocks(optimizer, state)
    groups, labels = [], iter(_labels(optimizer, names))
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        own = [next(labels) for _ in group["params"]]
        named = {"params": own} if isinstance(next(iter(saved["params"]), None), str) else {}
        groups.append({**group, **{key: saved[key] for key in ("params", "step") if key in saved}, **named})
    if unknown := state["state"].keys() - {n for group in groups for n in group["params"]}:
        raise ValueError(f"it has a state of {next(iter(unknown))!r:.80}, which is no parameter")
    return {**state, "param_groups": groups}


def _joined_blocks(optimizer, state):
    """A state in which every block of a split matrix has a number of its own, as older checkpoints have it, joined."""
    (saved,), (group,) = state["param_groups"], optimizer.param_groups
    splits = group["split"]
    if len(saved["params"]) == len(splits):
        return state
    if len(saved["params"]) != (count := sum(n if isinstance(n, int) else len(n) for n in splits)):
        raise ValueError(f"it has {len(saved['params'])} matrices, expected {len(splits)} or their {count} blocks")
    numbers, joined = iter(saved["params"]), {}
    for i, split in enumerate(splits):
        blocks = [state["state"][next(numbers)]["momentum_buffer"] for _ in range(split)]
        joined[i] = {"momentum_buffer": torch.cat(blocks)}
    return {"state": joined, "param_groups": [{**saved, "params": list(range(len(splits)))}]}


def state_differences(config, checkpoint):
    """[(setting, its value in the checkpoint, its value now)] where they give the optimizer another state."""
    before, step = checkpoint["config"], checkpoint["step"]

    def is_adamws(start):  # a checkpoint of the very step at which Sophia starts is still AdamW's
        return 0 < start >= step

    defaults = {"optimizer_name": None, "adamw_for": "none", "sophia_start_iter": 0}
    if config.optimizer_name in ("whitened_muon", "sophia_muon"):
        defaults |= {"whiten_max_width": None, "whiten_sides": "both"}
    pairs = [(name, before.get(name, default), getattr(config, name, default)) for name, default in defaults.items()]
    return [
        (name, saved, wanted)
        for name, saved, wanted in pairs
        if saved != wanted and (name != "sophia_start_iter" or is_adamws(saved) != is_adamws(wanted))
    ]
