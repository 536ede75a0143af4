"""Split the work of Muon or WhitenedMuon over ranks. Needs torch, and muon.py beside it.

    optimizer = WhitenedMuon(matrices)     # of a model in DistributedDataParallel, or after fully_shard
    share(optimizer)                       # on every rank, after all parameter groups are added

Every matrix has an owner, the rank that computes its update. Only the owner holds its factors and roots.

- Copies (DDP): every rank has the gradients. An all-gather distributes the owners' updates, so all ranks have the same
  bits.
- Shards (FSDP2): an all-to-all sends the rows of a momentum, and of WhitenedMuon's gradient, to the owner. Another
  all-to-all sends the rows of the update back. Momenta are sharded as their parameters.

On GPUs everything is sent in bfloat16. While the update of one batch is sent, that of the next is computed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muon import Muon, _Batch, _blocks, _is_whitening, _matrices, _ns_schedule, _rows, _sides, _splits, _stack, _State

__all__ = ["share", "update_flops"]

_ROOT_PRODUCTS = 14  # matrix products that an inverse root takes, at most


def share(optimizer: Muon, process_group: Any = None) -> None:
    """Let each rank compute the updates of its share of the matrices. Call this once, on every rank.

    From then on every parameter needs a gradient in each step, on every rank. Freeze others before.

    Args:
        optimizer: a Muon or WhitenedMuon with all its parameter groups.
        process_group: the ranks that hold copies of the parameters, by default all ranks. Sharded parameters use the
            ranks over which they are sharded instead.

    Raises:
        TypeError: for another optimizer.
        RuntimeError: for a second call, on a rank outside the process group, if the ranks have different parameters,
            and for parameters that are sharded in another way than fully_shard's on dimension 0.
    """
    if not isinstance(optimizer, Muon):
        raise TypeError(f"share() takes a Muon or WhitenedMuon, not {type(optimizer).__name__}")
    if optimizer._share:
        raise RuntimeError("share() was already called for this optimizer; make another one")
    optimizer._share = _Share(optimizer, process_group)
    for param, state in optimizer.state.items():
        if optimizer._share.owner[param] != optimizer._share.rank:
            for key in [key for key in state if _is_whitening(key)]:
                del state[key]


def update_flops(shape: Sequence[int], rows: Sequence[int], group: dict[str, Any]) -> float:
    """FLOPs a step of a parameter with matrices of these numbers of rows. They decide which rank owns which matrix."""
    columns, flops = math.prod(shape[1:]), 0.0
    for height in rows:
        size, least = height * columns, min(height, columns)
        flops += len(_ns_schedule(group["ns_coefficients"], group["ns_steps"])) * (4.0 * size * least + 2.0 * least**3)
        for side in _sides(group) if "sides" in group else ():
            blocks = _blocks(height if side == "left" else columns, group["max_width"])
            width = (height if side == "left" else columns) // blocks
            flops += 6.0 * size * width + 2.0 * _ROOT_PRODUCTS * blocks * width**3 / group["interval"]
    return flops


class _Share:
    """Which rank computes what. owner: {parameter: rank}, equal on all ranks. rows: {parameter: its matrices' rows}."""

    def __init__(self, optimizer: Muon, process_group: Any) -> None:
        self.optimizer, self.process_group = optimizer, process_group
        self.rows: dict[Tensor, list[int]] = {}
        self.owner: dict[Tensor, int] = {}
        self._frozen: set[Tensor] = set()
        costs, meshes = [], set()
        for group in optimizer.param_groups:
            for param, split in zip(group["params"], _splits(group), strict=True):
                self.rows[param] = _rows(split, param)
                costs.append((update_flops(param.shape, self.rows[param], group), param))
                if hasattr(param, "device_mesh"):
                    self.process_group = _process_group(param)
                meshes.add(getattr(param, "device_mesh", None))
                if not param.requires_grad:
                    self._frozen.add(param)
        if len(meshes) > 1:
            raise RuntimeError("share() takes parameters that are all sharded over the same ranks, or all copies")
        self.rank, self.size = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
        if self.rank < 0:
            raise RuntimeError("this rank is not in the process group: give share() the ranks that hold these copies")
        self._check_same()
        loads = [0.0] * self.size
        for cost, param in sorted(costs, key=lambda pair: -pair[0]):  # each to the rank that has the least so far
            self.owner[param] = loads.index(min(loads))
            loads[self.owner[param]] += cost

    def _check_same(self) -> None:
        """RuntimeError if another rank has other parameters: it would wait for ever, or take wrong numbers."""
        own = [(tuple(param.shape), rows, param.requires_grad) for param, rows in self.rows.items()]
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, own, self.process_group)
        for rank, other in enumerate(everyones):
            if other != own:
                at = next((i for i, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1]), None)
                here, there = (f"{len(own)} parameters", len(other)) if at is None else (own[at], other[at])
                number = "" if at is None else f"as number {at} (shape, rows of its matrices, requires_grad) "
                raise RuntimeError(f"share(): rank {self.rank} has {number}{here}, and rank {rank} {there}")

    def check_gradient(self, param: Tensor) -> None:
        """RuntimeError if a gradient is missing, as perhaps on this rank only; or there, and none was expected."""
        if (param.grad is None) != (param in self._frozen):
            what = "no gradient" if param.grad is None else "a gradient, and was frozen at share()"
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} has {what}. After share() the same parameters need "
                "gradients in each step on every rank; freeze or unfreeze before it"
            )

    def agree_on_found_inf(self) -> None:
        """Skip the step on all ranks if one of them does."""
        optimizer: Any = self.optimizer
        if getattr(optimizer, "found_inf", None) is not None:
            device = next(iter(self.owner)).device
            optimizer.found_inf = torch.as_tensor(optimizer.found_inf, dtype=torch.float32, device=device)
            self.reduce(optimizer.found_inf, dist.ReduceOp.MAX)

    def reduce(self, number: Tensor, operation: Any) -> None:
        """Give all ranks the sum, or another operation, of their numbers."""
        dist.all_reduce(number, operation, self.process_group)

    def _updates(self, batches: list[_Batch], group: dict[str, Any]) -> Iterator[tuple[_Batch, Tensor]]:
        """Yield every batch with its updates: (matrices, rows, columns), of shards (parameters, own rows, columns)."""

        def needed(batch: _Batch) -> tuple[Tensor, ...]:
            return self.optimizer._moved(batch, group)[: 2 if group.get("source") == "gradient" else 1]

        sent = [(batch, self._route(batch).to_owners(needed)) for batch in batches]
        before: list[tuple[_Batch, Callable[[], Tensor]]] = []
        for batch, received in sent:
            updates = [self.optimizer._direction(of[0], of[-1], own, group) for own, of in received()]
            before.append((batch, self._route(batch).to_all(updates)))
            if len(before) > 1:
                done, arrived = before.pop(0)
                yield done, arrived()
        for done, arrived in before:
            yield done, arrived()

    def complete(self, batch: _Batch) -> list[tuple[_Batch, Tensor]]:
        """The batches of matrices in `batch` that this rank owns, with complete gradients."""
        received = self._route(batch).to_owners(lambda batch: (_stack(batch.grads),))
        return [(own, grads) for own, (grads,) in received()]

    def _route(self, batch: _Batch) -> "_Copies | _Shards":
        if batch.route is None:
            sharded = hasattr(batch.members[0][0], "device_mesh")
            batch.route = _Shards(self, batch) if sharded else _Copies(self, batch)
        return batch.route


_Needed = Callable[[_Batch], tuple[Tensor, ...]]
_Received = Callable[[], list[tuple[_Batch, tuple[Tensor, ...]]]]


class _Copies:
    """The exchange for a batch whose matrices are complete on every rank, in the order of their owners."""

    def __init__(self, share: _Share, batch: _Batch) -> None:
        self._share, self._batch, self._own = share, batch, _Batch(batch.longest)
        self._counts = [0] * share.size  # of matrices
        for (param, *_), state in zip(batch.members, batch.states, strict=True):
            self._counts[share.owner[param]] += state.count
            if share.owner[param] == share.rank:
                self._own.states.append(state)

    def to_owners(self, needed: _Needed) -> _Received:
        first, own = sum(self._counts[: self._share.rank]), self._own
        mine = slice(first, first + self._counts[self._share.rank])
        own.params, own.momenta, own.grads = (getattr(self._batch, k)[mine] for k in ("params", "momenta", "grads"))
        own.found_inf = self._batch.found_inf
        return lambda: [(own, needed(own))] if own.states else []

    def release(self) -> None:
        self._own.params, self._own.momenta, self._own.grads = [], [], []

    def to_all(self, updates: list[Tensor]) -> Callable[[], Tensor]:
        like = _stack(self._batch.params[:1])
        mine = like.new_empty(max(self._counts), *like.shape[1:])  # an all-gather wants as much from every rank
        for update in updates:
            mine[: len(update)] = update
        everyones = like.new_empty(self._share.size * len(mine), *like.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch before 2.13
        work = gather(everyones, mine, self._share.process_group, async_op=True)

        def arrived() -> Tensor:
            work.wait()
            parts = everyones.chunk(self._share.size)
            return torch.cat([part[:count] for part, count in zip(parts, self._counts, strict=True)])

        return arrived


class _Shards:
    """The exchange for a batch of which every rank has some rows of every parameter, as after `fully_shard`."""

    def __init__(self, share: _Share, batch: _Batch) -> None:
        self._share, self._batch = share, batch
        params = [param for param, *_ in batch.members]
        self._height, self._columns = params[0].shape[0], math.prod(params[0].shape[1:])
        most = -(-self._height // share.size)
        self._rows = [min(most, max(0, self._height - rank * most)) for rank in range(share.size)]
        self._here, owners = self._rows[share.rank], [share.owner[param] for param in params]
        self._own = owners.count(share.rank)
        self._at_owners = [self._own * rows for rows in self._rows]  # rows of this rank's parameters, by holder
        self._at_holders = [owners.count(rank) * self._here for rank in range(share.size)]
        self._batches: dict[int, _Batch] = {}  # of what this rank owns, by the matrices' numbers of rows
        self._places: dict[int, list[tuple[int, list[int]]]] = {}
        for i, param in enumerate(param for param, owner in zip(params, owners, strict=True) if owner == share.rank):
            rows = share.rows[param]
            for height in dict.fromkeys(rows):
                own = self._batches.setdefault(height, _Batch(max(height, self._columns)))
                own.states.append(_State(share.optimizer.state[param], rows, height))
                self._places.setdefault(height, []).append((i, rows))

    def release(self) -> None:
        """Gradients are received anew in every step and kept nowhere."""

    def _matrices(self, stack: Tensor, height: int) -> list[Tensor]:
        """Views of the matrices of `height` rows in (this rank's parameters, rows, columns)."""
        return [matrix for i, rows in self._places[height] for matrix in _matrices(stack[i], rows, height)]

    def to_owners(self, needed: _Needed) -> _Received:
        sent = [self._exchange(stack, self._at_holders, self._at_owners) for stack in needed(self._batch)]

        def received() -> list[tuple[_Batch, tuple[Tensor, ...]]]:
            complete = []
            for finish in sent:
                parts = zip(finish(), self._rows, strict=True)
                complete.append(torch.cat([part.view(self._own, rows, self._columns) for part, rows in parts], dim=1))
            for own in self._batches.values():
                own.params, own.found_inf = self._batch.params, self._batch.found_inf
            return [
                (own, tuple(_stack(self._matrices(stack, height)) for stack in complete))
                for height, own in self._batches.items()
            ]

        return received

    def to_all(self, updates: list[Tensor]) -> Callable[[], Tensor]:
        complete = _stack(self._batch.params[:1]).new_empty(self._own, self._height, self._columns)
        for (height, own), update in zip(self._batches.items(), updates, strict=True):
            if own.longest != self._batch.longest:
                update = update * math.sqrt(own.longest / self._batch.longest)
            torch._foreach_copy_(self._matrices(complete, height), list(update))
        flat = torch.cat([part.flatten() for part in complete.split(self._rows, dim=1)])
        finish = self._exchange(flat, self._at_owners, self._at_holders)
        return lambda: torch.cat(finish()).view(len(self._batch.params), self._here, self._columns)

    def _exchange(self, tensor: Tensor, give: list[int], take: list[int]) -> Callable[[], tuple[Tensor, ...]]:
        """Start an all-to-all of these numbers of rows; the result waits and returns the flat part of each rank."""
        give, take = ([rows * self._columns for rows in counts] for counts in (give, take))
        received, group = tensor.new_empty(sum(take)), self._share.process_group
        work = dist.all_to_all_single(received, tensor.flatten(), take, give, group, async_op=True)

        def finish() -> tuple[Tensor, ...]:
            work.wait()
            return received.split(take)

        return finish


def _process_group(param: Any) -> Any:
    """The ranks over which fully_shard has split a parameter."""
    sharded = [i for i, placement in enumerate(param.placements) if not placement.is_replicate()]
    if len(sharded) != 1 or not param.placements[sharded[0]].is_shard(0):
        raise RuntimeError(f"parameters sharded as {param.placements} cannot be shared out, only those on dimension 0")
    return param.device_mesh.get_group(sharded[0])
