"""Print to stdout and stderr even if they are closed, full, or unable to print a character; escape text from others.

open_streams(goes_on=True)      # a run outlives its terminal
warn("wandb could not be reached")
"""

import contextlib
import io
import os
import re
import select
import sys

CLOSED = 141  # exit code of a tool whose reader has gone, as of a program that SIGPIPE ends
_CONTROL = r"\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNSAFE = re.compile(f"[{_CONTROL}\x1b]")
_UNSAFE_ON_STDERR = re.compile(rf"[{_CONTROL}]|\x1b(?!\[[0-9;]*[mA])")  # colours and bars of other libraries


def printable(text, unsafe=_UNSAFE):
    """`text` with control characters, which could steer a terminal, written as \\x1b."""
    return unsafe.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def warn(text):
    """Print a warning on stderr, one line. A stream that cannot be written never stops a run."""
    with contextlib.suppress(OSError, ValueError):
        print(f"warning: {printable(' '.join(str(text).split()))}", file=sys.stderr, flush=True)


def warn_once(text):
    """Warn on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        warn(text)


class _Bytes(io.FileIO):
    """File descriptor 1 or 2. What cannot be written is left out; a tool ends if that is its stdout."""

    def __init__(self, number, goes_on):
        super().__init__(number, "w", closefd=False)
        self._goes_on, self._warned = goes_on, False

    def write(self, data):
        try:
            while (count := super().write(data)) is None:  # a terminal that does not block
                select.select((), (self,), ())
            return count
        except OSError as error:
            self._failed(error)
            return len(data)

    def _failed(self, error):
        if self._warned:
            return
        self._warned, number = True, self.fileno()
        name, other = ("stdout", 2) if number == 1 else ("stderr", 1)
        if self._goes_on:
            message = f"warning: {name} cannot be written ({error.strerror}); the run goes on without it.\n"
        elif number == 1 and isinstance(error, BrokenPipeError):
            raise SystemExit(CLOSED)
        elif number == 1:
            message = f"error: stdout cannot be written ({error.strerror}); send it elsewhere.\n"
        else:
            return
        with contextlib.suppress(OSError):
            os.write(other, message.encode())
        if not self._goes_on:
            raise SystemExit(1)


class _Text(io.TextIOWrapper):
    """A stream that can print any character. What its encoding lacks, and control characters, become \\x1b.

    exact: control characters go through.
    """

    exact = False

    def write(self, text):
        unsafe = _UNSAFE if self.fileno() == 1 else _UNSAFE_ON_STDERR
        super().write(text if self.exact else printable(text, unsafe))
        return len(text)


def open_streams(goes_on=False):
    """Make stdout and stderr streams that no closed pipe, full disk or odd character turns into a traceback.

    goes_on: a stream that cannot be written is a warning; otherwise the program ends where that is stdout.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get its number
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        if old is not getattr(sys, f"__{name}__"):  # a test's
            continue
        if os.name != "posix":  # the console of Windows is no file
            if old is not None:
                old.reconfigure(errors="backslashreplace")
            continue
        with contextlib.suppress(OSError, AttributeError):
            old.flush()
        settings = {"encoding": old.encoding if old else "utf-8", "errors": "backslashreplace"}
        settings |= {"line_buffering": number == 2 or bool(old and old.line_buffering)}
        setattr(sys, name, _Text(io.BufferedWriter(_Bytes(number, goes_on)), **settings))
