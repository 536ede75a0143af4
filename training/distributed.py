"""The ranks of a run and their devices: one process, or as many as torchrun started.

with Distributed(device="auto", backend="auto") as world:
    total = world.sum(torch.tensor([1.0], device=world.device))
"""

import contextlib
import datetime
import json
import os
import secrets
import socket
import threading
import time

import torch
import torch.distributed as dist

from training.errors import RunError, UserError
from training.monitor import NOTICE_TIME, RankMonitor, late


class Distributed:
    """rank, size, local_rank and device of this process, and the collectives that a run needs.

    one_machine: whether all ranks are on one machine.
    store: by which the ranks tell each other what no collective can wait for; None in one process. Rank 0 serves it, so
    that it outlives torchrun.
    finish: called before a process is ended because another rank is lost; the run lets it finish its checkpoint.

    Tensors go through `backend`. Host objects go through a gloo group (`_control`), so that no rank has to wait for its
    GPU. A collective fails after `timeout` seconds. In one process the collectives cost nothing.
    Raises UserError if the device does not exist, RunError if a rank does not arrive within `timeout` seconds.
    """

    def __init__(self, device="auto", backend="auto", timeout=600):
        self.timeout, self.finish = timeout, lambda: None
        self._waits, self._waited, self._rank_monitor = 0, 0.0, None  # nested waits, seconds of all that have ended
        self.store = None
        self.distributed = "RANK" in os.environ
        self.rank, self.size, self.local_rank = _number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0)
        self.is_rank0 = self.rank == 0
        self.one_machine = _number("LOCAL_WORLD_SIZE", self.size) == self.size
        if not 0 <= self.rank < self.size:
            raise UserError(f"RANK = {self.rank} is not below WORLD_SIZE = {self.size}, or is negative; {_UNSET}.")
        self.device = self._device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.distributed:
            if backend == "auto":
                backend = "nccl" if self.device.type == "cuda" else "gloo"
            try:
                self._join(backend, self.device if backend == "nccl" else None)
            except dist.DistError as error:
                raise RunError(f"a rank was lost while they started ({_first_line(error)}); start again.") from None
        self.backend = backend if self.distributed else "none"

    def _join(self, backend, device_id):
        """Wait until all ranks are there, then form the process groups."""
        patience, host = datetime.timedelta(seconds=self.timeout), os.environ.get("MASTER_ADDR")
        if not host:
            raise UserError(f"RANK is set and MASTER_ADDR is not; {_UNSET}.")
        port = _number("MASTER_PORT")
        if not 0 <= port < 1 << 16:
            raise UserError(f"MASTER_PORT = {port} is no port; {_UNSET}.")
        serves = self.is_rank0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not serves:
            _wait_for(host, port, self.timeout)
        try:
            store = dist.TCPStore(host, port, None, serves, patience, wait_for_workers=False, multi_tenant=True)
        except dist.DistError as error:
            if serves:
                raise RunError(f"rank 0 cannot listen ({_first_line(error)}); use another MASTER_PORT.") from None
            raise late([0], self.timeout, f"{host}:{port}: {_first_line(error)}") from None
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(self._meet(store), store),
            rank=self.rank,
            world_size=self.size,
            device_id=device_id,
            # NCCL aborts the process without a word; the control group and the monitor are to be first
            timeout=patience + datetime.timedelta(seconds=30 if backend == "nccl" else 0),
        )
        self._control = dist.new_group(backend="gloo", timeout=patience)
        self._rank_monitor = RankMonitor(self) if self.size > 1 else None
        server = dist.TCPStore(host, 0, None, True, patience, wait_for_workers=False) if self.is_rank0 else None
        port = self.gather(server and server.port)[0]
        self.store = server or dist.TCPStore(host, port, None, False, patience, wait_for_workers=False)

    def _meet(self, store):
        """A prefix for keys that is known to the processes of this start alone.

        torchrun keeps its store when it restarts ranks, with the keys of those that died. So rank 0 answers each
        process by the random number that it has left. Counting restarts would not do: agents count them differently.
        """
        deadline, start, number = time.monotonic() + self.timeout, secrets.token_hex(8), secrets.token_hex(8)
        if not self.is_rank0:
            store.set(f"number/{self.rank}", number)
            try:
                start = store.get(f"start/{number}").decode()
            except dist.DistError:
                raise late([0], self.timeout) from None
            store.set(f"{start}/arrived/{self.rank}", "")
            store.set_timeout(datetime.timedelta(seconds=self.timeout + 10))
            missing = json.loads(store.get(f"{start}/missing"))
        else:
            missing, answered = set(range(1, self.size)), {}
            while missing and time.monotonic() < deadline:
                for rank in sorted(missing):
                    if store.check([f"{start}/arrived/{rank}"]):
                        missing.remove(rank)
                    elif store.check([f"number/{rank}"]):
                        number = store.get(f"number/{rank}").decode()
                        if answered.get(rank) != number:
                            store.set(f"start/{number}", start)
                            answered[rank] = number
                time.sleep(0.01)
            store.set(f"{start}/missing", json.dumps(sorted(missing)))
        if missing:
            time.sleep(1 if self.is_rank0 else 0)  # the others read it from this process
            raise late(missing, self.timeout)
        return start

    def _device(self, name):
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError:
            raise UserError(f"device = {name!r} is no device; allowed: auto, cuda, cuda:N, mps, cpu.") from None
        if device.type not in ("cuda", "mps", "cpu"):
            raise UserError(f"device = {name!r} is not supported; allowed: auto, cuda, cuda:N, mps, cpu.")
        if device.type == "mps" and ("RANK" in os.environ or not torch.backends.mps.is_available()):
            problem = "works in one process" if "RANK" in os.environ else "is not available on this machine"
            raise UserError(f"device = 'mps' {problem}; use --device=cpu.")
        if device.type == "cuda":
            index, count = self.local_rank if device.index is None else device.index, torch.cuda.device_count()
            ranks = _number("LOCAL_WORLD_SIZE", 1) if device.index is None else 1
            if max(index, ranks - 1) >= count:  # every rank of the machine notices, one prints it
                wanted, remedy = f"ranks: {ranks}", f"start --nproc_per_node={count}, or " if count else ""
                if device.index is not None:
                    wanted, remedy = "the first is number 0", "name another, or "
                few = f"this machine has too few GPUs ({count}, {wanted})"
                raise UserError(f"device = {name!r}: {few}; {remedy}use --device=cpu.")
            device = torch.device("cuda", index)
        return device

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self._rank_monitor:
            self._rank_monitor.close(well=kind is None)
        if self.distributed and not (kind and self.backend == "nccl"):  # NCCL would wait for a dead rank
            if kind is None:
                self.any(False)  # gloo aborts if a rank leaves while another still sends to it
            dist.destroy_process_group()
            self.distributed = False

    def mesh(self, shard=None):
        """The device mesh of all ranks; with `shard` in rows of that many, for copies of a model that a row splits."""
        shape, names = ((self.size // shard, shard), ("copies", "shards")) if shard else ((self.size,), None)
        return dist.device_mesh.init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    def sum(self, tensor):
        """The sum of `tensor` over the ranks, in place."""
        if self.distributed:
            with self.waiting():
                dist.all_reduce(tensor)
        return tensor

    def gather(self, thing):
        """[thing of rank 0, thing of rank 1, ...], on every rank. Small Python objects only."""
        things = [thing] * self.size
        if self.distributed:
            with self.waiting():
                dist.all_gather_object(things, thing, group=self._control)
        return things

    @contextlib.contextmanager
    def waiting(self, does=True):
        """Around a wait for the other ranks or for the device: this rank is then not the one that they wait for."""
        if not does:
            yield
            return
        self._waits, started = self._waits + 1, time.monotonic()
        if self._rank_monitor:
            self._rank_monitor.busy_since = None
        try:
            yield
        finally:
            self._waits -= 1
            if not self._waits:
                now = time.monotonic()
                self._waited += now - started
                if self._rank_monitor:
                    self._rank_monitor.busy_since = now

    @property
    def busy_seconds(self):
        """Seconds up to now in which this rank did not wait, from an arbitrary start."""
        return time.monotonic() - self._waited

    def at_step(self, step):
        """Tell the monitor which step this rank is in."""
        if self._rank_monitor:
            self._rank_monitor.step = step

    def rank_lost(self):
        """Whether a rank has died or does not answer."""
        return bool(self._rank_monitor) and self._rank_monitor.broken.is_set()

    def _patiently(self, function):
        """[function(), None] or [None, the text of its UserError]; None: nothing to call.

        It may take longer than a collective waits: a thread calls it, and meanwhile the ranks meet again and again.
        """
        result = [None, None, None]

        def call():
            try:
                result[0] = function()
            except UserError as error:
                result[1] = str(error)
            except BaseException as error:
                result[2] = error

        thread = threading.Thread(target=call, daemon=True)
        if function and not self.distributed:
            call()
        elif function:
            thread.start()
        while self.distributed:
            if function:
                thread.join(self.timeout / 4)
            if not self.any(thread.is_alive()):
                break
        if result[2]:
            raise result[2]
        return result[:2]

    def on_rank0(self, function):
        """Call `function()` on rank 0 and return its result on all ranks. All raise the UserError that it raises."""
        result, error = self.gather(self._patiently(function if self.is_rank0 else None))[0]
        if error is not None:
            raise UserError(error)
        return result

    def local_rank0_first(self, function):
        """Call `function()` on one rank of each machine, then on the others. All raise the first UserError of any."""
        result = error = None
        for first in (True, False):
            mine = (self.local_rank == 0) == first
            outcome = self._patiently(function if mine else None)
            result, error = outcome if mine else (result, error)
            if error and not self.one_machine and (host := socket.gethostname()) not in error:
                error = f"{error.removesuffix('.')} (on {host})."
            self._raise_first(error)
        return result

    def on_all_ranks(self, function):
        """Call `function()` on every rank, however long it takes. All raise the first UserError of any."""
        result, error = self._patiently(function)
        self._raise_first(error)
        return result

    def _raise_first(self, error):
        """Raise the first UserError of any rank. error: the text of this rank's, or None."""
        for text in filter(None, self.gather(error)):
            raise UserError(text)

    def any(self, flag):
        """Whether `flag` is true on any rank. The hosts wait for each other, not for their devices."""
        return self.largest(bool(flag)) > 0

    def largest(self, number):
        """The largest of the ranks' whole numbers."""
        if self.distributed:
            vote = torch.tensor(float(number))
            with self.waiting():
                dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._control)
            number = int(vote)
        return number

    def assert_same_on_all_ranks(self, facts, what="were not started alike: they differ in", remedy="make them equal"):
        """UserError that names the keys in which the dicts `facts` of two ranks differ."""
        first, *others = self.gather(facts)
        for rank, other in enumerate(others, start=1):
            keys = [key for key in first if other.get(key) != first[key]]
            if differing := [f"{key} ({first[key]!r} and {other.get(key)!r})" for key in keys]:
                raise UserError(f"ranks 0 and {rank} {what} {', '.join(differing)}; {remedy}.")

    def explain(self, error):
        """The RunError that names the rank whose death made a collective fail with `error`; None for other errors."""
        if self._rank_monitor:
            self._rank_monitor.leaving.set()
        of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
        if not self._rank_monitor or not (isinstance(error, dist.DistError) or of_gloo):
            return None
        if not self._rank_monitor.broken.wait(NOTICE_TIME):
            self._rank_monitor.accuse()
        if self.rank_lost():
            return RunError(self._rank_monitor.message())
        return RunError(f"the ranks no longer answer each other ({_first_line(error)}); restart with --init_from=auto.")

    def synchronize(self):
        """Wait until the device has finished its work."""
        with self.waiting():
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
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)


_UNSET = "start the ranks with torchrun, or unset RANK to train in one process"


def _number(name, default=None):
    """A whole number from the environment, as torchrun sets it beside RANK; without RANK the default."""
    text = os.environ.get(name, default) if "RANK" in os.environ else default
    try:
        return int(text)
    except (TypeError, ValueError):
        raise UserError(f"{name} = {text!r} in the environment is no whole number; {_UNSET}.") from None


def _wait_for(host, port, timeout):
    """Wait until `host` listens at `port`. A TCPStore would print C++ frames while it tries."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host, port), max(deadline - time.monotonic(), 0.01)):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise late([0], timeout, f"{host}:{port}: {error.strerror or error}") from None
        time.sleep(0.1)


def _first_line(error):
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
