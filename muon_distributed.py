"""The work of Muon or WhitenedMuon shared out over ranks. Needs torch alone, and muon.py beside it.

    optimizer = WhitenedMuon(matrices)     # of a model in DistributedDataParallel, or split by fully_shard
    share(optimizer)                       # before the first step and before a state is loaded

Every matrix has an owner, the rank that computes its update. Factors and roots live on the owner alone.

- Copies (DDP): every rank has the gradients. The owners' updates are gathered, so all ranks have the same bits.
- Shards (FSDP2): the rows of a momentum, and of WhitenedMuon's gradient, meet on the owner by an all-to-all. Another
  one takes the update's rows back. Momenta are sharded as their parameters.

On GPUs everything travels in bfloat16. The update of one batch travels while that of the next is computed.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muon import Muon, _Batch, _blocks, _ns_schedule, _sides, _splits, _stack

__all__ = ["share", "update_flops"]

_ROOT_PRODUCTS = 25  # matrix products that an inverse root takes


def share(optimizer: Muon, process_group: Any = None) -> None:
    """Let ranks compute an optimizer's updates together.

    Args:
        process_group: of the ranks that hold copies of the parameters, by default all. Sharded parameters bring their
            own: the ranks over which they are sharded.

    Raises:
        RuntimeError: for parameters that are sharded otherwise than by fully_shard on dimension 0.
    """
    optimizer._share = _Share(optimizer, process_group)


def update_flops(shape: Sequence[int], split: int, group: dict[str, Any]) -> float:
    """FLOPs a step of a parameter that holds `split` matrices. The owners are chosen by them."""
    rows, columns = shape[0] // split, math.prod(shape[1:])
    size, least = rows * columns, min(rows, columns)
    flops = len(_ns_schedule(group["ns_coefficients"], group["ns_steps"])) * (4.0 * size * least + 2.0 * least**3)
    for side in _sides(group) if "sides" in group else ():
        blocks = _blocks(rows if side == "left" else columns, group["max_width"])
        width = (rows if side == "left" else columns) // blocks
        flops += 6.0 * size * width + 2.0 * _ROOT_PRODUCTS * blocks * width**3 / group["interval"]
    return split * flops


class _Share:
    """Who computes what. owner: {parameter: rank}, the same on all ranks."""

    def __init__(self, optimizer: Muon, process_group: Any) -> None:
        self._optimizer, self.process_group = optimizer, process_group
        costs = []
        for group in optimizer.param_groups:
            for param, split in zip(group["params"], _splits(group), strict=True):
                costs.append((update_flops(param.shape, split, group), param))
                if hasattr(param, "device_mesh"):
                    self.process_group = _process_group(param)
        self.rank, self.size = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
        self.owner, loads = {}, [0.0] * self.size
        for cost, param in sorted(costs, key=lambda pair: -pair[0]):  # each to the rank that has the least so far
            self.owner[param] = loads.index(min(loads))
            loads[self.owner[param]] += cost

    def updates(self, batches: list[_Batch], group: dict[str, Any]) -> Iterator[tuple[_Batch, Tensor]]:
        """Yield every batch with its update: (matrices, rows, columns), or (parameters, rows of this rank, columns)."""
        sent = []
        for batch in batches:
            route, moved = self._route(batch), self._optimizer._moved(batch, group)
            grads = route.to_owners(batch.grads) if group.get("source") == "gradient" else None
            sent.append((batch, route, route.to_owners(moved), grads))
        before = None
        for batch, route, arriving, grads in sent:
            own, update = self._own(batch, grads), arriving()
            if own.states:
                update = self._optimizer._direction(update, own, group)
            after = batch, route.to_all(update)
            if before:
                yield before[0], before[1]()
            before = after
        if before:
            yield before[0], before[1]()

    def complete(self, batch: _Batch) -> _Batch | None:
        """The matrices of a batch that this rank owns, with complete gradients; None if it owns none."""
        own = self._own(batch, self._route(batch).to_owners(batch.grads))
        return own if own.states else None

    def _own(self, batch: _Batch, grads: Callable[[], Tensor] | None) -> _Batch:
        own = copy.copy(batch)
        own.states = [state for state, owner in zip(batch.states, batch.owners, strict=True) if owner == self.rank]
        own.grads = list(grads()) if grads else []
        return own

    def _route(self, batch: _Batch) -> "_Copies | _Shards":
        return _Shards(self, batch) if batch.sharded else _Copies(self, batch)


class _Copies:
    """The way of a batch whose matrices are complete on every rank. They are in the order of their owners."""

    def __init__(self, ranks: _Share, batch: _Batch) -> None:
        self._ranks, self._shape = ranks, batch.shape
        self._counts = [0] * ranks.size  # of matrices
        for owner, (_, split) in zip(batch.owners, batch.states, strict=True):
            self._counts[owner] += split

    def to_owners(self, matrices: list[Tensor]) -> Callable[[], Tensor]:
        first = sum(self._counts[: self._ranks.rank])
        mine = matrices[first : first + self._counts[self._ranks.rank]]
        return lambda: _stack(mine) if mine else _stack(matrices[:1])[:0]

    def to_all(self, update: Tensor) -> Callable[[], Tensor]:
        mine = update.new_empty(max(self._counts), *self._shape)  # an all-gather wants as much from every rank
        mine[: len(update)] = update
        everyones = update.new_empty(self._ranks.size * len(mine), *self._shape)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch before 2.13
        work = gather(everyones, mine, self._ranks.process_group, async_op=True)

        def gathered() -> Tensor:
            work.wait()
            parts = everyones.chunk(self._ranks.size)
            return torch.cat([part[:count] for part, count in zip(parts, self._counts, strict=True)])

        return gathered


class _Shards:
    """The way of a batch of which every rank has some rows of every parameter, as `fully_shard` leaves them."""

    def __init__(self, ranks: _Share, batch: _Batch) -> None:
        (height, self._columns), self._split = batch.shape, batch.states[0][1]
        self._group, rank, self._height = ranks.process_group, ranks.rank, height * self._split
        most = -(-self._height // ranks.size)
        self._rows = [min(most, max(0, self._height - other * most)) for other in range(ranks.size)]
        self._here, self._own, self._all = self._rows[rank], batch.owners.count(rank), len(batch.owners)
        self._at_owners = [self._own * rows for rows in self._rows]  # rows of this rank's parameters, by holder
        self._at_holders = [batch.owners.count(other) * self._here for other in range(ranks.size)]

    def to_owners(self, shards: list[Tensor]) -> Callable[[], Tensor]:
        received = self._exchange(_stack(shards), self._at_holders, self._at_owners)

        def complete() -> Tensor:
            parts = [p.view(self._own, rows, self._columns) for p, rows in zip(received(), self._rows, strict=True)]
            return torch.cat(parts, dim=1).view(self._own * self._split, self._height // self._split, self._columns)

        return complete

    def to_all(self, update: Tensor) -> Callable[[], Tensor]:
        parts = update.reshape(self._own, self._height, self._columns).split(self._rows, dim=1)
        flat = torch.cat([part.flatten() for part in parts])
        received = self._exchange(flat, self._at_owners, self._at_holders)
        return lambda: torch.cat(received()).view(self._all, self._here, self._columns)

    def _exchange(self, tensor: Tensor, give: list[int], take: list[int]) -> Callable[[], tuple[Tensor, ...]]:
        """An all-to-all of numbers of rows; the rows from each rank, flat."""
        give, take = ([rows * self._columns for rows in counts] for counts in (give, take))
        received = tensor.new_empty(sum(take))
        work = dist.all_to_all_single(received, tensor.flatten(), take, give, self._group, async_op=True)

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
