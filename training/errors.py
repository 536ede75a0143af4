"""How every script reports a mistake: one sentence on stderr and exit code 2, no traceback.

if __name__ == "__main__":
    command(main)
"""

import argparse
import errno
import os
import sys


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


def is_out_of_memory(error):
    """Whether an exception says that the memory of the host or of a device is used up."""
    if error is None or isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return error is not None
    said = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    of_torch = type(error).__name__ == "OutOfMemoryError"
    of_torch = of_torch or (isinstance(error, RuntimeError) and any(text in str(error) for text in said))
    return of_torch or is_out_of_memory(error.__cause__)


def command(main):
    """Run `main()`. On a `UserError` print its sentence, once on each machine, and exit with its code."""
    try:
        main()
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 or error.exit_code == 1:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["MemoryError"])[0]
        print(f"error: the memory is used up ({reason}); use less at once, or a larger machine.", file=sys.stderr)
        sys.exit(RunError.exit_code)
