"""The ranks of a run and their devices: one process, or as many as torchrun started.

with Distributed(device="auto", backend="auto") as world:
    total = world.sum(torch.tensor([1.0], device=world.device))
"""

import datetime
import os

import torch
import torch.distributed as dist

from training.errors import RunError, UserError
from training.monitor import NOTICE_TIME, RankMonitor


class Distributed:
    """rank, size, local_rank and device of this process, and the collectives that a run needs.

    one_machine: whether all ranks are on one machine.

    Tensors go through `backend`. Host objects go through a gloo group (`_control`), so that no rank has to wait for its
    GPU. A collective fails after `timeout` seconds. In one process the collectives cost nothing.
    Raises UserError if the device does not exist.
    """

    def __init__(self, device="auto", backend="auto", timeout=600):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.is_rank0 = self.rank == 0
        self.one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) == self.size
        self.device = self._device(device)
        self.distributed = "RANK" in os.environ
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.distributed:
            if backend == "auto":
                backend = "nccl" if self.device.type == "cuda" else "gloo"
            device_id = self.device if backend == "nccl" else None
            patience = datetime.timedelta(seconds=timeout)
            self._store, *_ = next(dist.rendezvous("env://", timeout=patience))
            dist.init_process_group(
                backend, store=self._store, rank=self.rank, world_size=self.size, device_id=device_id, timeout=patience
            )
            self._control = dist.new_group(backend="gloo", timeout=patience)
        self._rank_monitor = RankMonitor(self) if self.distributed and self.size > 1 else None
        self.backend = backend if self.distributed else "none"

    def _device(self, name):
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError:
            raise UserError(f"device = {name!r} is no device; allowed: auto, cuda, cuda:N, mps, cpu.") from None
        if device.type not in ("cuda", "mps", "cpu"):
            raise UserError(f"device = {name!r} is not supported; allowed: auto, cuda, cuda:N, mps, cpu.")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise UserError("device = 'mps' is not available on this machine; use --device=cpu.")
        if device.type == "cuda":
            index, count = self.local_rank if device.index is None else device.index, torch.cuda.device_count()
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.index is None else 1
            if max(index, ranks - 1) >= count:  # every rank of the machine notices, one prints it
                wanted, remedy = f"ranks: {ranks}", f"start --nproc_per_node={count}, or " if count else ""
                if device.index is not None:
                    wanted, remedy = "the first is number 0", "name another, or "
                raise UserError(
                    f"device = {name!r}: this machine has too few GPUs ({count}, {wanted}); {remedy}use --device=cpu."
                )
            device = torch.device("cuda", index)
        return device

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self._rank_monitor:
            self._rank_monitor.close(well=kind is None)
        if self.distributed and not (kind and self.backend == "nccl"):  # NCCL would wait for a dead rank
            if kind is None:
                dist.barrier(group=self._control)  # gloo aborts if a rank leaves while another still sends to it
            dist.destroy_process_group()
            self.distributed = False

    def mesh(self):
        """The device mesh of all ranks, over which `sharding` splits a model."""
        return dist.device_mesh.init_device_mesh(self.device.type, (self.size,))

    def sum(self, tensor):
        """The sum of `tensor` over the ranks, in place."""
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, thing):
        """[thing of rank 0, thing of rank 1, ...], on every rank. Small Python objects only."""
        things = [thing] * self.size
        if self.distributed:
            dist.all_gather_object(things, thing, group=self._control)
        return things

    def on_rank0(self, function):
        """Call `function()` on rank 0 and return its result on all ranks. All raise the UserError that it raises."""
        result = error = None
        if self.is_rank0:
            try:
                result = function()
            except UserError as raised:
                error = str(raised)
        if self.distributed:
            box = [result, error]
            dist.broadcast_object_list(box, src=0, group=self._control)
            result, error = box
        if error is not None:
            raise UserError(error)
        return result

    def local_rank0_first(self, function):
        """Call `function()` on one rank of each machine, then on the others. All raise the first UserError of any."""
        result = error = None
        for first in (True, False):
            if (self.local_rank == 0) == first:
                try:
                    result = function()
                except UserError as raised:
                    error = str(raised)
            errors = [text for text in self.gather(error) if text is not None]
            if errors:
                raise UserError(errors[0])
        return result

    def any(self, flag):
        """Whether `flag` is true on any rank. The hosts wait for each other, not for their devices."""
        if not self.distributed:
            return bool(flag)
        vote = torch.tensor(float(bool(flag)))
        dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._control)
        return vote.item() > 0

    def assert_same_on_all_ranks(self, facts):
        """UserError that names the keys in which the dicts `facts` of two ranks differ."""
        first, *others = self.gather(facts)
        for rank, other in enumerate(others, start=1):
            if differing := [
                f"{key} ({first[key]!r} and {other.get(key)!r})" for key in first if other.get(key) != first[key]
            ]:
                raise UserError(
                    f"ranks 0 and {rank} were not started alike: they differ in {', '.join(differing)}; make them the "
                    "same."
                )

    def explain(self, error):
        """The RunError that names the rank whose death made a collective fail with `error`; None for other errors."""
        if self._rank_monitor:
            self._rank_monitor.leaving.set()
        of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
        if not self._rank_monitor or not (isinstance(error, dist.DistError) or of_gloo):
            return None
        if self._rank_monitor.broken.wait(NOTICE_TIME):
            return RunError(self._rank_monitor.message())
        return RunError(f"the ranks no longer answer each other ({_first_line(error)}); restart with --init_from=auto.")

    def synchronize(self):
        """Wait until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    @property
    def device_name(self):
        """The GPU's model, or "cpu" or "mps"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def rng_devices(self):
        """The devices with a random generator of their own."""
        return [self.device] if self.device.type == "cuda" else []

    def rng_state(self):
        return [torch.get_rng_state()] + [torch.cuda.get_rng_state(device) for device in self.rng_devices]

    def set_rng_state(self, states):
        """Set this rank's random state from those of all ranks. If their number has changed, seed by rank instead."""
        if len(states) != self.size:
            torch.manual_seed(torch.initial_seed() + self.rank)
            return
        state, *of_devices = states[self.rank]
        torch.set_rng_state(state.cpu())
        for device, state in zip(self.rng_devices, of_devices, strict=False):
            torch.cuda.set_rng_state(state.cpu(), device)

    def share(self, count):
        """This rank's contiguous part of range(count). The parts of two ranks differ in length by one at most."""
        if count < self.size:
            raise UserError(f"{count} sequences are too few for {self.size} ranks; each needs one.")
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)


def _first_line(error):
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
