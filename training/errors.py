"""How every script here tells a person what is wrong: one sentence on stderr and exit code 2, no traceback.

if __name__ == "__main__":
    command(main)
"""

import os
import sys


class UserError(Exception):
    """Bad input. The message is one sentence that names the culprit and the remedy."""


def command(main):
    """Run `main()`; on a `UserError` print its sentence (once a machine, not once a rank) and exit with code 2."""
    try:
        main()
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
