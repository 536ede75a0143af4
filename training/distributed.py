"""The ranks of a run, the devices they own, and the signals they get: one process, or as many as torchrun started.

with Distributed(device="auto", backend="auto") as world:
    total = world.sum(torch.tensor([1.0], device=world.device))
"""

import contextlib
import datetime
import os
import secrets
import signal
import socket
import sys
import threading
import time
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

from training.errors import RunError, UserError

NOTICE_TIME = 5  # seconds in which a rank notices by itself that another died, if it can
LEAVE_TIME = 20  # seconds in which it has then left; torchrun kills it after 30


class Distributed:
    """rank, size, local_rank and device of this process; the collectives that a run needs, free for one process.

    one_machine: whether all ranks are on it, as far as torchrun says.

    Tensors go through `backend`; what the host has to say goes through a gloo group of its own (`_control`), so that
    no rank waits for its GPU to hear it. A collective fails after `timeout` seconds.
    Raises UserError when the device is not there.
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
            own = self.device if backend == "nccl" else None
            patience = datetime.timedelta(seconds=timeout)
            self._store, *_ = next(dist.rendezvous("env://", timeout=patience))
            dist.init_process_group(
                backend, store=self._store, rank=self.rank, world_size=self.size, device_id=own, timeout=patience
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
            if max(index, ranks - 1) >= count:  # seen on every rank of the machine, of which one says it
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
        if self.distributed and not (kind and self.backend == "nccl"):  # NCCL would wait for a rank that died
            if kind is None:
                dist.barrier(group=self._control)  # gloo aborts a rank that leaves while another still talks to it
            dist.destroy_process_group()
            self.distributed = False

    def mesh(self):
        """All ranks in a row, over which `sharding` splits a model."""
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
        """Call `function()` on rank 0 and give its result to all; a UserError there is raised on every rank."""
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
        """Call `function()` on one rank of each machine, then on the others; a UserError on any is raised on all."""
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
        """UserError that says what differs where the dicts `facts` are not the same on all ranks."""
        ours = self.gather(facts)
        for rank, theirs in enumerate(ours):
            differing = [key for key in ours[0] if theirs.get(key) != ours[0][key]]
            if differing:
                what = ", ".join(f"{key} ({ours[0][key]!r} and {theirs.get(key)!r})" for key in differing)
                raise UserError(
                    f"ranks 0 and {rank} were not started alike: they differ in {what}; make them the same."
                )

    def explain(self, error):
        """The RunError for a collective that failed with `error`, naming the rank that died; None for other errors."""
        if self._rank_monitor:
            self._rank_monitor.leaving.set()
        of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
        if not self._rank_monitor or not (isinstance(error, dist.DistError) or of_gloo):
            return None
        if self._rank_monitor.broken.wait(NOTICE_TIME):
            return RunError(self._rank_monitor.sentence())
        return RunError(f"the ranks no longer answer each other ({_first_line(error)}); restart with --init_from=auto.")

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


class RankMonitor:
    """Tells every rank at once when another died. Without it the host waits for its GPU, NCCL for the dead until the
    time-out, and then nobody can say who it was.

    Rank 0 has a connection to each other rank; when a process ends, however it does, the system closes its own.
    leaving: to be set when this rank has noticed by itself; if it does not, the lifeline ends it.
    broken: set when a rank died, `dead`.
    """

    BYE = (2**32 - 1).to_bytes(4)

    def __init__(self, world):
        self.rank, self.dead, self.leaving, self.broken = world.rank, None, threading.Event(), threading.Event()
        self._closed, patience = False, 60
        both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
        server = socket.create_server(("", 0), backlog=world.size, **both) if world.is_rank0 else None
        port, secret = world.gather((server and server.getsockname()[1], secrets.token_bytes(16)))[0]
        self._ranks = {}  # connection: the rank at its other end
        if server:
            server.settimeout(patience)
            while len(self._ranks) < world.size - 1:
                connection, _ = server.accept()
                connection.settimeout(5)  # one who says nothing must not hold up the others for long
                word = b""
                with contextlib.suppress(OSError):
                    word = _read(connection, 20)
                if word[:16] == secret:
                    self._ranks[connection] = int.from_bytes(word[16:])
                else:  # a port scanner, say
                    connection.close()
            server.close()
        else:
            connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=patience)
            connection.sendall(secret + self.rank.to_bytes(4))
            self._ranks[connection] = 0
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def sentence(self):
        return f"rank {self.rank} ends, because rank {self.dead} died; restart with --init_from=auto."

    def close(self, well):
        """Stop watching. The others learn that this rank leaves: where all went well they are told that it did."""
        self.leaving.set()
        self._closed = True
        if well:
            self._say(self.BYE)
        else:
            for connection in list(self._ranks):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _say(self, word):
        for connection in list(self._ranks):
            with contextlib.suppress(OSError):
                connection.sendall(word)

    def _watch(self):
        while not self._closed and self._ranks:
            for connection in wait(list(self._ranks), 0.2):  # select.select() takes no file above 1023
                try:
                    word = _read(connection, 4)
                except OSError:
                    word = b""
                rank = self._ranks.pop(connection)
                if word != self.BYE and not self._closed:
                    self._break(int.from_bytes(word) if word else rank)
                    return

    def _break(self, dead):
        self.dead = dead
        self.broken.set()
        self._say(dead.to_bytes(4))  # rank 0 passes it on, for the others nobody is left to tell
        if not self.leaving.wait(NOTICE_TIME):
            print(f"error: {self.sentence()}", file=sys.stderr, flush=True)
            for thread in threading.enumerate():
                if thread.name == "checkpoint":  # what is being written may yet be finished
                    thread.join(LEAVE_TIME)
            os._exit(RunError.exit_code)
        time.sleep(LEAVE_TIME)
        os._exit(RunError.exit_code)


class Signals:
    """Notes SIGTERM, SIGINT and SIGUSR1 (Slurm's warning) so that the run can end well; a second one ends it at once.

    Within a second of the first the second is taken for the same: torchrun passes on what the terminal sent already.
    """

    CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.received, self._since, self._before = None, None, {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.CAUGHT}

    def _note(self, number, frame):
        now = time.monotonic()
        if self.received is not None and now - self._since > 1:
            os._exit(128 + number)
        if self.received is None:
            self.received, self._since = number, now
            name = signal.Signals(number).name
            os.write(2, f"{name}: this step is finished and checkpointed; once more ends at once\n".encode())

    def restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _read(connection, count):
    """`count` bytes, or fewer where the other side has closed."""
    word = b""
    while len(word) < count and (more := connection.recv(count - len(word))):
        word += more
    return word


def _first_line(error):
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
