"""Ends that a run does not choose: a rank that dies, a signal that asks the run to stop.

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
