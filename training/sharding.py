"""A model too large for one GPU: parameters, gradients and optimizer state split over the ranks (PyTorch's FSDP2).

    shard(model, world.mesh(), torch.bfloat16, compile=True)             # instead of DistributedDataParallel
    optimizer.register_load_state_dict_pre_hook(shard_state)             # complete tensors in, each rank keeps its part
    norm = total_norm(gradients, world)

Every parameter becomes a DTensor. A rank holds its share of the rows; `numel()` and `shape` are those of all rows.
FSDP and DTensor are imported where they are used, because importing them takes a second.
"""

import torch

from training.errors import UserError
from training.optimizers import OPTIMIZERS, owns
from training.shards import read_part


def check_sharding(config, world):
    """UserError if a run with `config` cannot be sharded."""
    if not world.distributed:
        raise UserError("fsdp = True splits the model over ranks and there is one process; start it with torchrun.")
    shards = OPTIMIZERS[config.optimizer_name].shards
    if shards is not True:
        able = ", ".join(name for name, spec in OPTIMIZERS.items() if spec.shards is True)
        why = f"does not work with fsdp = True: {shards}"
        raise UserError(f"optimizer_name = {config.optimizer_name!r} {why}; use one of {able}, or --fsdp=False.")
    if config.fsdp_shard and world.size % config.fsdp_shard:
        sizes = ", ".join(str(n) for n in range(1, world.size + 1) if world.size % n == 0)
        why = f"does not divide the {world.size} ranks"
        raise UserError(f"fsdp_shard = {config.fsdp_shard} {why}; it can be one of {sizes}.")
    sequences = getattr(config, "hess_bs", 0)
    if sequences % world.size:  # all ranks must take the same number of passes, or they wait for each other for ever
        why = f"is not divisible by the {world.size} ranks, and fsdp = True needs that"
        fit = max(1, sequences // world.size) * world.size
        raise UserError(f"hess_bs = {sequences} {why}; use --hess_bs={fit}.")


def shard(model, mesh, dtype, compile):
    """Split a GPT that is on the meta device over the last dimension of `mesh`, block by block.

    No device ever holds all of it.

    Every number is computed as autocast alone computes it. A block's Linear layers are gathered in `dtype`, to which
    autocast rounds them anyway, and their gradients are summed in float32. Embeddings, an output matrix of its own and
    all norms are one group, gathered in float32. With `compile` each block is a graph.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = model.transformer.h
    layers = [module for module in blocks.modules() if isinstance(module, torch.nn.Linear)]
    inner = {p for layer in layers for p in layer.parameters()}
    fully_shard(model, mesh=mesh, ignored_params=inner)  # before the blocks, whose parameters it would ignore later
    for block in blocks:
        if compile:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=set(block.parameters()) - inner)


def set_weights(model, checkpoint, device):
    """Give a sharded model on the meta device the weights of a checkpoint; without one, those that a new GPT has.

    Each rank takes its part. It has one complete parameter at most in host memory.
    """
    model.to_empty(device=device)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    if manifest := getattr(checkpoint, "manifest", None):

        def target(path, meta):
            p, shape = parameters[path.removeprefix("model/")], manifest["tensors"][path]["shape"]
            return p if list(p.shape) == shape else torch.empty(shape, dtype=meta.dtype)

        read_part(checkpoint, "model", target)
    for name, p in parameters.items():
        if not checkpoint:
            model.init_weight(name, complete := torch.empty(p.shape))
            _take_part(p, complete)
        elif (complete := checkpoint["model"][name]) is not p:
            _take_part(p, complete[: len(p)])  # a smaller block_size takes the first positions


def read_state(checkpoint, optimizer, names):
    """Read what this rank has of the optimizer's state in a folder. names: {parameter: name}."""
    parameters = {name: p for p, name in names.items()}

    def target(path, meta):
        p = parameters.get(path.split("/")[-2])
        if p is not None and meta.shape == p.shape:  # as `shard_state` has it, however it was stored
            return torch.empty_like(p.detach(), dtype=meta.dtype)
        return torch.empty_like(meta, device="cpu") if owns(optimizer, p) else None

    read_part(checkpoint, "optimizer", target)


def _take_part(tensor, complete):
    """Copy this rank's part of a complete tensor into a DTensor."""
    (chunk,) = tensor.__create_chunk_list__()
    for dimension, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
        complete = complete.narrow(dimension, offset, size)
    tensor.to_local().copy_(complete)
    return tensor


def shard_state(optimizer, state_dict):
    """A load_state_dict pre-hook: `state_dict` with this rank's part of every tensor that has its parameter's shape."""
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parameter = dict(zip(numbers, parameters, strict=True))

    def part(value, p):
        if not isinstance(value, torch.Tensor) or hasattr(value, "to_local"):
            return value
        if value.shape != p.shape:
            return value.clone()  # it may be in a file, which would stay open
        return _take_part(torch.empty_like(p.detach(), dtype=value.dtype), value)

    state = {n: {key: part(v, parameter[n]) for key, v in s.items()} for n, s in state_dict["state"].items()}
    return {**state_dict, "state": state}


def total_norm(tensors, world):
    """The 2-norm of all `tensors` together, sharded or not, as a scalar tensor that is the same on every rank."""
    if not tensors or not hasattr(tensors[0], "to_local"):
        return torch.nn.utils.get_total_norm(tensors, foreach=True)
    parts = torch.nn.utils.get_total_norm([t.to_local() for t in tensors], foreach=True)
    copies = world.size // tensors[0].device_mesh.size(-1)
    return world.sum(parts.double().square() / copies).sqrt().float()
