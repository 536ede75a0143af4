"""How every script here tells a person what is wrong: one sentence on stderr and exit code 2, no traceback.

if __name__ == "__main__":
    command(main)
"""

import argparse
import os
import sys


class UserError(Exception):
    """Bad input. The message is one sentence that names the culprit and the remedy."""

    exit_code = 2


class RunError(UserError):
    """A run that cannot go on, through no fault of its input; the message says what to do. Exit code 1."""

    exit_code = 1


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, as every script here does."""

    def error(self, message):
        raise UserError(f"{message} (--help explains).")


def command(main):
    """Run `main()`; on a `UserError` print its sentence (once a machine, not once a rank) and exit with its code."""
    try:
        main()
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 or error.exit_code == 1:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
