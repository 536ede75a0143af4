"""What a run writes down: metrics.jsonl and config.json in out_dir, a line on the screen, and wandb on request.

tracker = Tracker(config, facts={"git_commit": ...}, start_step=0)
tracker.log({"step": 0, "train/loss": 10.8, ...})
"""

import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

METRICS, CONFIG, STATE = "metrics.jsonl", "config.json", "sweep.json"  # of a run, a run, a sweep
SHARED = "SHARED_DEVICE"  # in the environment of a run that others keep company on its device: its times say nothing


class Clock:
    """Seconds of training: runs but where it is paused, and waits for the device before it starts or stops."""

    def __init__(self, synchronize, seconds=0.0):
        self._synchronize, self._seconds, self._since = synchronize, seconds, None

    def start(self):
        self._synchronize()
        self._since = time.perf_counter()

    @property
    def seconds(self):
        """Up to now, without waiting for the device: exact after something else did."""
        return self._seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)

    @contextlib.contextmanager
    def paused(self):
        self._synchronize()
        self._seconds, self._since = self.seconds, None
        yield
        self.start()


class Tracker:
    """Writes metrics of rank 0; the lines of steps from `start_step` on are cut first, so that no step stands twice."""

    def __init__(self, config, facts, start_step=0, wandb_id=None):
        self.out_dir = Path(config.out_dir)
        path = self.out_dir / METRICS
        lines = [json.dumps(line) for line in read_metrics(path) if line["step"] < start_step] if path.exists() else []
        write_atomically(path, "".join(line + "\n" for line in lines))
        write_atomically(self.out_dir / CONFIG, json.dumps({"config": vars(config), **facts}, indent=2) + "\n")
        self._lines = Lines(path)
        self._wandb = Wandb(config, facts, wandb_id) if config.wandb_log else None

    @property
    def wandb_id(self):
        return self._wandb.id if self._wandb else None

    def log(self, metrics):
        """Append one line; a number that is not finite becomes null, which JSON can hold."""
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._lines.append(json.dumps(finite))
        if self._wandb:
            self._wandb.log(metrics)

    def close(self):
        self._lines.close()
        if self._wandb:
            self._wandb.finish()


class Lines:
    """A file that whole lines are appended to. What a full disk does not take is kept and tried again with the next."""

    def __init__(self, path):
        self.path, self._file, self._end = path, open(path, "ab", buffering=0), path.stat().st_size
        self._waiting = []

    def append(self, line):
        warned = bool(self._waiting)
        self._waiting.append(line)
        try:
            self._write()
        except OSError as error:
            if not warned:
                print(f"warning: {self.path} cannot be written ({error}); its lines wait in memory.", file=sys.stderr)

    def _write(self):
        data = "".join(line + "\n" for line in self._waiting).encode()
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError:
            os.ftruncate(self._file.fileno(), self._end)  # no half lines
            raise
        self._end, self._waiting = self._end + len(data), []

    def close(self):
        try:
            self._write()
        except OSError as error:
            print(f"warning: the last {len(self._waiting)} lines of {self.path} are lost ({error}).", file=sys.stderr)
        self._file.close()


class Wandb:
    """Weights & Biases, of which nothing may stop or slow a run: what fails there is a warning, and training goes on.

    id: the run's, to go on under it after a resume; None where wandb could not be started.
    """

    PATIENCE = 60  # seconds for its start, and at the end for what is still to be sent

    def __init__(self, config, facts, run_id):
        self._max_iters = config.max_iters
        settings = {
            "project": config.wandb_project,
            "name": config.wandb_run_name or Path(config.out_dir).name,
            "group": config.optimizer_name,
            "config": {**vars(config), **facts},
            "id": run_id,
            "resume": "allow",
            "dir": config.out_dir,
            "settings": {"init_timeout": self.PATIENCE},
        }
        self.run = self._try("offline", lambda wandb: wandb.init(**settings))
        if self.run is None:  # no network, no account: `wandb sync` takes what it then writes to the disk
            self.run = self._try("without wandb", lambda wandb: wandb.init(**settings, mode="offline"))
        self.id = self.run.id if self.run else run_id

    def _try(self, otherwise, action):
        try:
            import wandb

            return action(wandb)
        except Exception as error:
            print(f"warning: training goes on {otherwise}: wandb said {type(error).__name__}: {error}", file=sys.stderr)
            return None

    def log(self, metrics):
        def send(_):
            self.run.log(metrics, step=metrics["step"])
            if metrics["step"] == self._max_iters:  # the end
                speed = metrics["tokens"] / max(metrics.get("seconds", 0.0), 1e-9)
                final = {"final_val_loss": metrics.get("val/loss"), "mean_tokens_per_second": speed}
                self.run.summary.update(final)
            return True

        if self.run and not self._try("without wandb", send):
            self.run = None

    def finish(self):
        if self.run:
            end = threading.Thread(target=lambda: self._try("to its end", lambda _: self.run.finish()), daemon=True)
            end.start()
            end.join(self.PATIENCE)
            if end.is_alive():
                print("warning: wandb has not sent everything; `wandb sync` in out_dir does it later.", file=sys.stderr)


def read_metrics(path, about=None):
    """The lines of a metrics.jsonl as dicts; a last line that was cut off in mid-write is left out.

    With `about`, of a longer file only so many lines, evenly spread over it, and all that hold a val/loss.
    """
    text = Path(path).read_bytes()
    lines = []
    for part in text.splitlines() if about is None else _thinned(text, about):
        with contextlib.suppress(ValueError):
            line = json.loads(part)
            if isinstance(line, dict) and type(line.get("step")) is int:
                lines.append(line)
    return lines


def _thinned(text, about):
    """Found by their bytes: only the lines that are wanted are cut out, and later parsed."""
    places, key = list(range(0, len(text), max(1, len(text) // about))), b'"val/loss"'
    at = text.find(key)
    while at >= 0:
        places.append(at)
        at = text.find(key, at + len(key))
    for start in sorted({text.rfind(b"\n", 0, at) + 1 for at in places}):
        end = text.find(b"\n", start)
        yield text[start : end if end >= 0 else len(text)]


def write_atomically(path, text):
    """The file at `path` is the old one or, all of it, the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def git_commit():
    """The commit of the code that runs, "-dirty" where files differ from it; None outside a git checkout."""

    def git(*words):
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def source_hash():
    """SHA-256 over the code that runs: the scripts and training/."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *root.glob("training/*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def console_line(metrics, max_iters, tokens_per_step):
    """One line for a person, e.g. 'step 100/2000  train/loss 2.31  lr 1.0e-03  12.3k tok/s  left 0:03:10'."""
    words = [f"step {metrics['step']:>{len(str(max_iters))}}/{max_iters}"]
    if "val/loss" in metrics:
        words.append(f"val/loss {metrics['val/loss']:.4f}")
    if "train/loss" in metrics:
        words.append(f"train/loss {metrics['train/loss']:.4f}")
        words.append(f"lr {metrics['lr']:.2e}  grad_norm {metrics['grad_norm']:.2f}")
    if "train/win_rate" in metrics:
        words.append(f"win_rate {metrics['train/win_rate']:.2f}")
    if "tokens_per_second" in metrics:
        left = (max_iters - metrics["step"]) * tokens_per_step / metrics["tokens_per_second"]
        words.append(f"{metrics['tokens_per_second'] / 1e3:.1f}k tok/s")
        if "mfu" in metrics:
            words.append(f"mfu {100 * metrics['mfu']:.1f}%")
        words.append(f"left {int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}")
    return "  ".join(words)
