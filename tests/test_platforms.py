"""Where parts of POSIX are missing, as on Windows, every script starts, trains and locks nothing, with one warning."""

import subprocess
import sys

from tests.conftest import ROOT, read_lines

WITHOUT = """
import os, pathlib, signal, sys
sys.path.insert(0, ROOT)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGALRM", "SIGPIPE"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
del os.sched_getaffinity
import bench, compare, evaluate, export_hf, sample, sweep, train_adam, train_sophiag
import data.corpus, data.sources, experiments.collect, experiments.results
from training.errors import command
command(lambda: train_adam.main(sys.argv[2:]))
with sweep.locked(pathlib.Path(sys.argv[1])):
    pass
"""


def test_a_run_and_a_sweep_without_posix_signals_and_locks(tiny, tmp_path):
    (tmp_path / "script.py").write_text(WITHOUT.replace("ROOT", repr(str(ROOT))))
    words = [sys.executable, tmp_path / "script.py", tmp_path / "sweep", *tiny, "--max_iters=4"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert read_lines(tmp_path / "out")[-1]["step"] == 4
    first, second = done.stderr.splitlines()
    assert first.startswith("warning: ") and "run.lock cannot be locked" in first
    assert second.startswith("warning: no file locks here") and str(tmp_path / "sweep") in second
