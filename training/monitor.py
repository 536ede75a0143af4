"""The death of a rank, and signals that ask a run to stop.

monitor = RankMonitor(world)     # one thread on each rank: tells all ranks which one died
signals = Signals()              # signals.received is set by SIGTERM, SIGINT and SIGUSR1
"""

import contextlib
import os
import secrets
import signal
import socket
import sys
import threading
import time
from multiprocessing.connection import wait

from training.errors import RunError

NOTICE_TIME = 5  # seconds in which a rank notices by itself that another died, if it can
LEAVE_TIME = 20  # seconds in which it has then left; torchrun kills it after 30


class RankMonitor:
    """Tell every rank at once that a rank died, and which one.

    Without it the host waits for its GPU and NCCL for the dead rank until the time-out, and no error names that rank.
    Rank 0 has a connection to each other rank. The system closes a process's connection however the process ends.

    leaving: to be set when this rank has noticed by itself; if it does not, the monitor ends the process.
    broken: set when a rank has died. dead: its number.
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
                connection.settimeout(5)  # a silent stranger must not delay the ranks for long
                message = b""
                with contextlib.suppress(OSError):
                    message = _read(connection, 20)
                if message[:16] == secret:
                    self._ranks[connection] = int.from_bytes(message[16:])
                else:  # e.g. a port scanner
                    connection.close()
            server.close()
        else:
            connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=patience)
            connection.sendall(secret + self.rank.to_bytes(4))
            self._ranks[connection] = 0
        self._thread = threading.Thread(target=self._watch, name="rank monitor", daemon=True)
        self._thread.start()

    def message(self):
        return f"rank {self.rank} ends, because rank {self.dead} died; restart with --init_from=auto."

    def close(self, well):
        """Stop watching. The other ranks learn that this rank leaves, and whether all went well."""
        self.leaving.set()
        self._closed = True
        if well:
            self._send(self.BYE)
        else:
            for connection in list(self._ranks):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _send(self, message):
        for connection in list(self._ranks):
            with contextlib.suppress(OSError):
                connection.sendall(message)

    def _watch(self):
        while not self._closed and self._ranks:
            for connection in wait(list(self._ranks), 0.2):  # select.select() takes no file above 1023
                try:
                    message = _read(connection, 4)
                except OSError:
                    message = b""
                rank = self._ranks.pop(connection)
                if message != self.BYE and not self._closed:
                    self._break(int.from_bytes(message) if message else rank)
                    return

    def _break(self, dead):
        self.dead = dead
        self.broken.set()
        self._send(dead.to_bytes(4))  # rank 0 tells the others; they have no one else to tell
        if not self.leaving.wait(NOTICE_TIME):
            print(f"error: {self.message()}", file=sys.stderr, flush=True)
            for thread in threading.enumerate():
                if thread.name == "checkpoint":  # let it finish its write
                    thread.join(LEAVE_TIME)
            os._exit(RunError.exit_code)
        time.sleep(LEAVE_TIME)
        os._exit(RunError.exit_code)


class Signals:
    """Catch SIGTERM, SIGINT and SIGUSR1 (Slurm's warning), so that the run can stop well. A second one ends it at once.

    A second one within a second does not count: torchrun passes on a signal that the terminal has sent already.
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
            with contextlib.suppress(OSError):  # the terminal may be closed
                os.write(
                    2, f"{name}: finishing this step, then writing a checkpoint; a second signal ends it\n".encode()
                )

    def restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _read(connection, count):
    """`count` bytes, or fewer if the other side has closed."""
    message = b""
    while len(message) < count and (more := connection.recv(count - len(message))):
        message += more
    return message
