"""Notice a rank or a launcher that is dead or silent, and signals that ask a run to stop.

monitor = RankMonitor(world)     # one thread on each rank: tells all ranks which one died or does not answer
signals = Signals()              # signals.received is set by SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2
"""

import contextlib
import os
import secrets
import signal
import socket
import struct
import threading
import time
from multiprocessing.connection import wait

from training.errors import RunError, tell
from training.terminal import warn

NOTICE_TIME = 5  # seconds in which a rank notices by itself that another died, if it can
LEAVE_TIME = 20  # seconds in which it has then left; torchrun kills it after 30
HEARTBEAT = 1.0  # seconds
LAUNCHER = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None  # the process of torchrun

_MESSAGE = struct.Struct("!Biqd")  # kind, rank, its step, seconds for which the others have waited for it
_BEAT, _BYE, _LOST = range(3)


class RankMonitor:
    """Tell every rank at once that a rank died or does not answer, and which one.

    Without it the host waits for its GPU and NCCL for the dead rank until the time-out, and no error names that rank.
    Rank 0 has a connection to each other rank. The system closes a process's connection however the process ends. A
    rank that is stopped, or whose machine hangs, sends no heartbeats; after `world.timeout` seconds it counts as lost.

    leaving: to be set when this rank has noticed by itself; if it does not, the monitor ends the process.
    broken: set when a rank is lost. dead: its number.
    step: of the run, sent with the heartbeats. busy_since: when this rank last stopped waiting for the others, None
    while it waits.
    """

    def __init__(self, world):
        self.rank, self.dead, self.leaving, self.broken = world.rank, None, threading.Event(), threading.Event()
        self.step, self.busy_since = 0, time.monotonic()
        self._world, self._closed, self._lost_step, self._lost_for = world, False, 0, 0.0
        self._sending, self._warned = threading.Lock(), None
        both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
        server = socket.create_server(("", 0), backlog=world.size, **both) if world.is_rank0 else None
        port, secret = world.gather((server and server.getsockname()[1], secrets.token_bytes(16)))[0]
        self._ranks = {}  # connection: the rank at its other end
        if server:
            self._accept(server, secret, world)
        else:
            host = os.environ["MASTER_ADDR"]
            try:
                connection = socket.create_connection((host, port), timeout=world.timeout)
                connection.sendall(secret + self.rank.to_bytes(4))
            except OSError as error:
                problem = f"rank {self.rank} cannot connect to rank 0 at {host}:{port} ({error})"
                raise RunError(f"{problem}; open the ports between the machines.") from None
            self._ranks[connection] = 0
        now = time.monotonic()
        self._heard = {rank: (now, rank, 0, 0.0) for rank in self._ranks.values()}  # time and content of the last
        self._thread = threading.Thread(target=self._watch, name="rank monitor", daemon=True)
        self._thread.start()

    def _accept(self, server, secret, world):
        deadline = time.monotonic() + world.timeout
        with server:
            while missing := set(range(1, world.size)) - set(self._ranks.values()):
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    raise late(missing, world.timeout) from None
                connection.settimeout(5)  # a silent stranger must not delay the ranks for long
                message = b""
                with contextlib.suppress(OSError):
                    message = _read(connection, 20)
                if message[:16] == secret:
                    self._ranks[connection] = int.from_bytes(message[16:])
                else:  # e.g. a port scanner
                    connection.close()

    def message(self):
        what = "died"
        if self._lost_for:
            what = f"has not answered for {self._lost_for:.0f} s (last known at step {self._lost_step})"
        return f"the run ends, because rank {self.dead} {what}; restart with --init_from=auto."

    def awaited(self):
        """(rank, its step, seconds): the rank for which the others have waited longest, as far as this one knows."""
        now = time.monotonic()
        ranks = [(self._busy(), self.step, self.rank)]
        for rank, (heard, about, step, seconds) in list(self._heard.items()):
            silent = now - heard
            if about != rank and silent > 3 * HEARTBEAT:  # rank 0 was to say whom it waits for, and is silent itself
                about, seconds = rank, 0.0
            ranks.append((seconds + silent, step, about))
        seconds, step, rank = max(ranks)
        return rank, step, seconds

    def accuse(self):
        """Name the rank that does not answer, to the other ranks too, after a collective has timed out."""
        rank, step, seconds = self.awaited()
        if self._busy() < seconds > self._world.timeout / 2:  # else this rank waited in a place unknown to the monitor
            self._note(rank, step, seconds)

    def close(self, well):
        """Stop watching. The other ranks learn that this rank leaves, and whether all went well."""
        self.leaving.set()
        self._closed = True
        if well:
            self._send(_BYE)
        else:
            for connection in list(self._ranks):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _send(self, kind, rank=0, step=0, seconds=0.0):
        with self._sending:
            for connection in list(self._ranks):
                with contextlib.suppress(OSError):
                    connection.sendall(_MESSAGE.pack(kind, rank, step, seconds))

    def _watch(self):
        before = beat = time.monotonic()
        while not self._closed and self._ranks:
            for connection in wait(list(self._ranks), 0.2):  # select.select() takes no file above 1023
                try:
                    message = _read(connection, _MESSAGE.size)
                except OSError:
                    message = b""
                rank = self._ranks[connection]
                kind, *about = _MESSAGE.unpack(message) if len(message) == _MESSAGE.size else (_LOST, rank, 0, 0.0)
                if kind == _BEAT:
                    self._heard[rank] = (time.monotonic(), *about)
                    continue
                del self._ranks[connection], self._heard[rank]
                if kind == _LOST and not self._closed:
                    self._break(*about)
                    return
            now = time.monotonic()
            if now - before > 3 * HEARTBEAT:  # this process was stopped itself, and the others perhaps with it
                self._heard = {rank: (heard + now - before, *what) for rank, (heard, *what) in self._heard.items()}
            before = now
            if now >= beat:
                self._send(_BEAT, *(self.awaited() if self.rank == 0 else (self.rank, self.step, self._busy())))
                beat = now + HEARTBEAT
            for rank, (heard, _, step, _) in self._heard.items():  # rank 0 hears all, the others hear rank 0
                if now - heard > max(self._world.timeout, 5 * HEARTBEAT):
                    self._break(rank, step, now - heard)
                    return
                if now - heard > max(3 * HEARTBEAT, min(60, self._world.timeout / 2)) and self._warned != heard:
                    self._warned = heard
                    if self.rank < 2:
                        warn(f"rank {rank} has been silent for {now - heard:.0f} s.")

    def _busy(self):
        since = self.busy_since
        return time.monotonic() - since if since else 0.0

    def _note(self, rank, step, seconds):
        self.dead, self._lost_step, self._lost_for = rank, step, seconds
        self.broken.set()
        self._send(_LOST, rank, step, seconds)  # rank 0 tells the others; they have no one else to tell

    def _break(self, rank, step, seconds):
        self._note(rank, step, seconds)
        if self.leaving.wait(NOTICE_TIME):
            time.sleep(LEAVE_TIME)
        else:
            tell(RunError(self.message()))
        self._world.finish()
        os._exit(RunError.exit_code)


class Signals:
    """Catch the signals that ask a run to stop, so that it can stop well. A second one ends it at once.

    A second one within a second does not count: torchrun passes on a signal that the terminal has sent already. Nor
    does the SIGTERM that torchrun sends to all ranks when one is lost, which is what `rank_lost()` tells: a checkpoint
    that is being written is finished.
    """

    NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")  # Windows has two of them

    rank_lost, ends = None, "after this step, with a checkpoint"

    def __init__(self):
        self.received, self._since, self._before, self._excused = None, None, {}, False
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in self.NAMES if hasattr(signal, name)):
                if signal.getsignal(number) != signal.SIG_IGN or number != getattr(signal, "SIGHUP", None):  # nohup
                    self._before[number] = signal.signal(number, self._note)

    @property
    def launcher_gone(self):
        """Whether torchrun, which started this rank, has ended."""
        return LAUNCHER is not None and os.getppid() != LAUNCHER

    def _note(self, number, frame):
        now = time.monotonic()
        if self.received is not None and now - self._since > 1 and not self._excuse(number):
            os._exit(128 + number)
        if self.received is None:
            self.received, self._since = number, now
            name = signal.Signals(number).name
            with contextlib.suppress(OSError):  # the terminal may be closed
                os.write(2, f"{name}: ends {self.ends}; a second signal ends it\n".encode())

    def _excuse(self, number):
        """Whether torchrun sent this signal because a rank is lost. It does so once, and may know before this rank."""
        for _ in range(20 if self.rank_lost and number == signal.SIGTERM and not self._excused else 0):
            if self.rank_lost():
                self._excused = True
                return True
            time.sleep(0.05)
        return False

    def restore(self):
        """Give the signals back, unless one was received: one that comes late must not spoil the exit code."""
        for number, handler in self._before.items() if self.received is None else ():
            signal.signal(number, handler)
        self._before = {}


def late(ranks, timeout, reason=""):
    """The RunError for ranks that others have waited for in vain at the start. reason: why, if it is known."""
    names = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)[:8]))}"
    late = f"{names}{' and others' if len(ranks) > 8 else ''} did not arrive within {timeout} s"
    return RunError(f"{late}{reason and f' ({reason})'}; start all ranks together, or raise --nccl_timeout.")


def _read(connection, count):
    """`count` bytes, or fewer if the other side has closed."""
    message = b""
    while len(message) < count and (more := connection.recv(count - len(message))):
        message += more
    return message
