"""Report a user's mistake in every script: one sentence on stderr and exit code 2, no traceback.

if __name__ == "__main__":
    command(main)
"""

import argparse
import contextlib
import errno
import hashlib
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from training import INTERRUPTED, TERMINATED, interrupted
from training.terminal import open_streams, printable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


class UserError(Exception):
    """Bad input. The message is one sentence that names the culprit and the remedy."""

    exit_code = 2


class RunError(UserError):
    """A run that cannot go on although its input was right. The message says what to do. Exit code 1."""

    exit_code = 1


class Parser(argparse.ArgumentParser):
    """argparse's parser with UserErrors. It prints the description as written, and options cannot be abbreviated."""

    def __init__(self, **settings):
        defaults = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**defaults | settings)

    def error(self, message):
        raise UserError(f"{message} (--help explains).")


@contextlib.contextmanager
def file_errors(path, remedy):
    """Around work on the file or folder `path`: an OSError becomes a UserError that names the file and `remedy`."""
    try:
        yield
    except OSError as error:
        name = error.filename2 or error.filename or path
        raise UserError(f"{name} cannot be read or written ({error.strerror or error}); {remedy}.") from None
    except Exception as error:
        if "(os error " not in str(error):  # what libraries in Rust raise
            raise
        raise UserError(f"{path} cannot be read or written ({error}); {remedy}.") from None


def is_out_of_memory(error):
    """Whether an exception says that the memory of the host or of a device is used up."""
    if error is None or isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return error is not None
    said = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    of_torch = type(error).__name__ == "OutOfMemoryError"
    of_torch = of_torch or (isinstance(error, RuntimeError) and any(text in str(error) for text in said))
    return of_torch or is_out_of_memory(error.__cause__)


def command(main, goes_on=False):
    """Run `main()`. On a `UserError` print its sentence, once on each machine, and exit with its code.

    A file that cannot be used, a missing package and used-up memory are sentences too. Ctrl-C and SIGTERM end it
    quietly. goes_on: as in `open_streams`.
    """
    open_streams(goes_on)
    if signal.getsignal(signal.SIGINT) is interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # so that nothing half-written stays
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        with file_errors("the working directory", "change to another one"):
            os.getcwd()  # where it was removed, torch ends the process without a word
        main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        explained = _explain(error)
        if not explained:
            raise
        tell(explained)
        sys.exit(explained.exit_code)
    finally:
        if sys.stdout:
            sys.stdout.flush()


def tell(error):
    """Print the sentence of a UserError on stderr, unless another rank of this machine prints the same.

    torchrun gives the ranks that it starts together one folder for their errors. Without it local rank 0 prints the
    UserErrors, and every rank its RunErrors.
    """
    sentence, is_rank = printable(" ".join(str(error).split())), "RANK" in os.environ
    rank, file = (os.environ.get(name, "") for name in ("LOCAL_RANK", "TORCHELASTIC_ERROR_FILE"))
    if is_rank and file:
        try:
            (Path(file).parent.parent / hashlib.sha256(sentence.encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass
    elif is_rank and error.exit_code != 1 and rank.isdecimal() and int(rank):
        return
    print(f"error: {sentence}", file=sys.stderr, flush=True)


def _explain(error):
    """The UserError that says what `error` means to a user; None if it is a mistake in the code."""
    if isinstance(error, UserError):
        return error
    if is_out_of_memory(error):
        reason = (str(error).splitlines() or ["MemoryError"])[0]
        return RunError(f"the memory is used up ({reason}); use less at once, or a larger machine.")
    if isinstance(error, ImportError) and (error.name or "").startswith("triton"):
        return UserError(f"training on a GPU needs Triton ({error}); pip install triton, or triton-windows on Windows.")
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return UserError(f"the package {package} is missing; get it with: pip install {package}.")
    compiling, lines = type(error).__module__.startswith(("torch._dynamo", "torch._inductor")), str(error).splitlines()
    reason = next((line for line in lines if "C++ compiler" in line), None) if compiling else None
    if reason:
        return UserError(f"compile = True needs a C++ compiler ({reason}); install g++, or leave --compile out.")
    if _is_of_triton(error) or any("C compiler" in line for line in lines if compiling):
        reason = next((line for line in lines if "C compiler" in line), (lines or [""])[0])
        return UserError(f"Triton's kernels need a C compiler ({reason}); install gcc and python3-dev, or set CC.")
    if compiling:
        reason = ": ".join(lines[:2])
        return RunError(f"torch.compile failed ({reason}); leave --compile out (TORCH_LOGS=+dynamo says more).")
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:  # as Python writes such bytes
        return UserError(f"{error.object!r:.80} is to be a name, and it is not UTF-8; use another one.")
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
        name = "a file" if error.filename is None else error.filename
        remedy = "check its path, permissions and free space"
        kind = RunError if error.errno in FULL else UserError
        return kind(f"{name} cannot be read or written ({error.strerror}); {remedy}.")
    return None


def _is_of_triton(error):
    """Whether it comes from Triton's call of the C compiler."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__") == "triton.runtime.build" for frame in frames)
