"""How every script reports a mistake: one sentence on stderr and exit code 2, no traceback.

if __name__ == "__main__":
    command(main)
"""

import argparse
import errno
import os
import sys

from training.terminal import open_streams, printable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
INTERRUPTED = 130  # exit code after Ctrl-C, as of a program that SIGINT ends


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


def command(main, goes_on=False):
    """Run `main()`. On a `UserError` print its sentence, once on each machine, and exit with its code.

    A file that cannot be used is a sentence too. Ctrl-C ends it quietly. goes_on: as `open_streams` has it.
    """
    open_streams(goes_on)
    try:
        main()
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 or error.exit_code == 1:
            _print(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise
        name = "a file" if error.filename is None else error.filename
        _print(f"{name} cannot be read or written ({error.strerror}); check its path, permissions and free space.")
        sys.exit(RunError.exit_code if error.errno in FULL else UserError.exit_code)
    finally:
        if sys.stdout:
            sys.stdout.flush()


def _print(error):
    print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
