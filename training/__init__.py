"""What the scripts share. Importing it makes Ctrl-C end a script quietly until `errors.command` takes over.

It also keeps torch, which reads the level once, from printing C++ frames where a rank or its store is lost.
"""

import os
import signal
import sys
from pathlib import Path

INTERRUPTED, TERMINATED = 130, 143  # exit codes after Ctrl-C and SIGTERM, as of a program that the signal ends


def interrupted(number, frame):
    """End at once in an import, where modules in C swallow a KeyboardInterrupt or turn it into another error."""
    while frame:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
_script, _here = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve(), Path(__file__).resolve()
_is_ours = _here.parents[1] in _script.parents and "site-packages" not in _script.parts
if _is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup and a shell's & ignore it
    signal.signal(signal.SIGINT, interrupted)
