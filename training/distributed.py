"""The ranks of a run and the devices they own: one process, or as many as torchrun started.

with World(device="auto", backend="auto") as world:
    total = world.sum(torch.tensor([1.0], device=world.device))
"""

import os

import torch
import torch.distributed as dist

from training.errors import UserError


class World:
    """rank, size, local_rank and device of this process; the collectives that a run needs, free for one process.

    Raises UserError when the device is not there.
    """

    def __init__(self, device="auto", backend="auto"):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.is_main = self.rank == 0
        self.device = self._device(device)
        self.distributed = "RANK" in os.environ
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.distributed:
            if backend == "auto":
                backend = "nccl" if self.device.type == "cuda" else "gloo"
            own = self.device if backend == "nccl" else None
            dist.init_process_group(backend, device_id=own)
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
            index = self.local_rank if device.index is None else device.index
            count = torch.cuda.device_count()
            if index >= count:
                raise UserError(
                    f"device = {name!r}: rank {self.rank} wants GPU {index} and this machine has {count}; "
                    "start fewer ranks, or use --device=cpu."
                )
            device = torch.device("cuda", index)
        return device

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.distributed:
            if kind is None:
                dist.barrier()  # gloo aborts a rank that leaves while another still talks to it
            dist.destroy_process_group()
            self.distributed = False

    def sum(self, tensor):
        """The sum of `tensor` over the ranks, in place."""
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, thing):
        """[thing of rank 0, thing of rank 1, ...], on every rank. Small Python objects only."""
        things = [thing] * self.size
        if self.distributed:
            dist.all_gather_object(things, thing)
        return things

    def on_main(self, function):
        """Call `function()` on rank 0 and give its result to all; a UserError there is raised on every rank."""
        result = error = None
        if self.is_main:
            try:
                result = function()
            except UserError as raised:
                error = str(raised)
        if self.distributed:
            box = [result, error]
            dist.broadcast_object_list(box, src=0)
            result, error = box
        if error is not None:
            raise UserError(error)
        return result

    def synchronize(self):
        """Wait until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def share(self, count):
        """The contiguous part of range(count) that belongs to this rank; the parts differ in length by one at most."""
        if count < self.size:
            raise UserError(f"{count} sequences are too few for {self.size} ranks; each needs one.")
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)
