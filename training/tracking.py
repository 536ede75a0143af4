"""Write the records of a run: metrics.jsonl and config.json in out_dir, lines on the screen, and wandb if wanted.

tracker = Tracker(config, facts={"git_commit": ...}, start_step=0)
tracker.log({"step": 0, "train/loss": 10.8, ...})
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import subprocess
import threading
import time
from pathlib import Path

from training.errors import file_errors
from training.metrics import CONFIG, METRICS, read_metrics
from training.terminal import warn

SHARED = "SHARED_DEVICE"  # set in the environment of a run that shares its device: its times are not compared


class Clock:
    """Seconds of training. It waits for the device before it starts and before it pauses."""

    def __init__(self, synchronize, seconds=0.0):
        self._synchronize, self._seconds, self._since = synchronize, seconds, None

    def start(self):
        self._synchronize()
        self._since = time.perf_counter()

    @property
    def seconds(self):
        """Seconds up to now. It does not wait for the device, so it is exact only after something else did."""
        return self._seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)

    @contextlib.contextmanager
    def paused(self):
        self._synchronize()
        self._seconds, self._since = self.seconds, None
        yield
        self.start()


class Tracker:
    """Write the metrics of rank 0. Lines of `start_step` and later are cut first, so that no step is there twice."""

    def __init__(self, config, facts, start_step=0, wandb_id=None):
        self.out_dir = Path(config.out_dir)
        path, record = self.out_dir / METRICS, json.dumps({"config": vars(config), **facts})
        self._record = json.dumps(json.loads(record, parse_constant=str), indent=2) + "\n"  # JSON has no NaN
        with file_errors(path, "make room for it, or name another --out_dir"):
            before = read_metrics(path) if os.path.lexists(path) else []
            kept = [line for line in before if line["step"] < start_step]
            steps = [line["step"] for line in kept]
            apart = max((b - a for a, b in itertools.pairwise(steps)), default=start_step)
            if start_step and (not steps or start_step - 1 - steps[-1] > apart):  # a copy of the checkpoint alone, say
                warn(f"{path} lacks lines before step {start_step}, at which the run goes on; are files missing here?")
            for unfinished in self.out_dir.glob("*.json*.tmp"):  # of a run that was killed
                unfinished.unlink()
            write_atomically(self.out_dir / CONFIG, self._record)
            try:
                write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
            except OSError:
                if start_step == 0:  # a folder that holds no run
                    (self.out_dir / CONFIG).unlink()
                raise
            self._lines = Lines(path)
        aborted = any(line["step"] > start_step for line in before)
        self._wandb = Wandb(config, facts, wandb_id, kept, aborted) if config.wandb_log else None

    @property
    def wandb_id(self):
        return self._wandb.id if self._wandb else None

    def log(self, metrics):
        """Append one line. JSON has no NaN and no infinity: they become null."""
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._lines.append(json.dumps(finite))
        if self._wandb:
            self._wandb.log(metrics)

    def check(self):
        """Notice that out_dir or metrics.jsonl was removed, renamed or replaced. What is missing is written again."""
        try:
            if self._lines.moved():
                self.out_dir.mkdir(parents=True, exist_ok=True)
                warn(f"{self._lines.path} was {self._lines.reopen()}")
                write_atomically(self.out_dir / CONFIG, self._record)
        except OSError as error:
            warn(f"{self._lines.path} is not there any more and cannot be written again ({error}); put out_dir back.")

    def close(self):
        self._lines.close()
        if self._wandb:
            self._wandb.finish()


class Lines:
    """A file that complete lines are appended to. Lines that a full disk refuses are written with the next line."""

    def __init__(self, path):
        self.path, self._file, self._end = path, open(path, "a+b", buffering=0), path.stat().st_size
        self._waiting = []

    def append(self, line):
        warned = bool(self._waiting)
        self._waiting.append(line)
        try:
            self._write()
        except OSError as error:
            if not warned:
                warn(f"{self.path} cannot be written ({error}); its lines wait in memory.")

    def moved(self):
        """Whether there is another file, or none, at its path."""
        try:
            return not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except OSError:
            return True

    def reopen(self):
        """Go on in the file at its path, or in a new one with all lines; returns what was found, in words."""
        found = "replaced by another file during the run; new lines go there."
        if not os.path.lexists(self.path):
            found = "removed or renamed during the run; it is written again, but earlier checkpoints may be gone."
            self._file.seek(0)
            write_atomically(self.path, self._file.read(self._end))
        if not os.path.isfile(self.path):  # a FIFO would block
            raise OSError("it is not a file")
        new = open(self.path, "a+b", buffering=0)  # before the old one is closed: it may fail
        self._file.close()
        self._file, self._end = new, self.path.stat().st_size
        return found

    def _write(self):
        data = "".join(line + "\n" for line in self._waiting).encode()
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError:
            os.ftruncate(self._file.fileno(), self._end)  # no part of a line
            raise
        self._end, self._waiting = self._end + len(data), []

    def close(self):
        try:
            self._write()
        except OSError as error:
            warn(f"the last {len(self._waiting)} lines of {self.path} are lost ({error}).")
        self._file.close()


class Wandb:
    """Weights & Biases. A failure there is a warning: it neither stops nor slows training.

    id: of the wandb run, so that a resumed run continues it; None if wandb could not be started.
    kept, aborted: the run's lines before this start, and whether an attempt logged steps that are now done again. wandb
    takes no step back: the wandb run is rewound, or a new one begins with these lines where wandb cannot rewind.
    """

    PATIENCE = 60  # seconds that the start may take, and at the end the sending of what is left

    def __init__(self, config, facts, run_id, kept=(), aborted=False):
        self._max_iters, self.run, self.id = config.max_iters, None, run_id
        if not self._try("without wandb", lambda wandb: wandb):
            return
        settings = {
            "project": config.wandb_project,
            "name": config.wandb_run_name or Path(config.out_dir).name,
            "group": config.optimizer_name,
            "config": {**vars(config), **facts},
            "dir": config.out_dir,
            "settings": {"init_timeout": self.PATIENCE},
        }
        if aborted and kept and run_id:
            self.run = self._rewound(settings, f"{run_id}?_step={kept[-1]['step']}")
            run_id = self.run and run_id
        mine = settings | {"id": run_id, "resume": "allow"}
        if self.run is None:
            self.run = self._try("offline", lambda wandb: wandb.init(**mine))
        if self.run is None:  # no network or no account: it writes to the disk, and `wandb sync` sends that later
            self.run = self._try("without wandb", lambda wandb: wandb.init(**mine, mode="offline"))
        self.id = self.run.id if self.run else self.id
        if self.run and not self._try("without wandb", lambda _: self.run.define_metric("*", step_metric="step")):
            self.run = None
        known = run_id and self.run and (self.run.resumed or self.run.offline)  # not in another project or server
        for line in () if known else kept:
            self.log(line)

    def _rewound(self, settings, moment):
        """The wandb run cut at `moment`; None with a warning where that cannot be done, as on most servers."""
        import wandb

        try:
            if wandb.setup().settings.mode == "offline":
                raise OSError("wandb is offline")
            return wandb.init(**settings, resume_from=moment)
        except Exception as error:
            warn(f"wandb cannot rewind the run, which goes on as a new one ({(str(error).splitlines() or [''])[0]})")
            return None

    def _try(self, otherwise, action):
        try:
            import wandb

            return action(wandb)
        except Exception as error:
            warn(f"training goes on {otherwise}: wandb raised {type(error).__name__}: {error}")
            return None

    def log(self, metrics):
        def send(_):
            if metrics["step"] >= self.run.starting_step:  # else wandb has it already
                self.run.log(metrics, step=metrics["step"], commit=True)
            if metrics["step"] == self._max_iters:  # the end
                speed = metrics["tokens"] / max(metrics.get("seconds", 0.0), 1e-9)
                self.run.summary.update({"final_val_loss": metrics.get("val/loss"), "mean_tokens_per_second": speed})
            return True

        if self.run and not self._try("without wandb", send):
            self.run = None

    def finish(self):
        if self.run:
            end = threading.Thread(target=lambda: self._try("to its end", lambda _: self.run.finish()), daemon=True)
            end.start()
            end.join(self.PATIENCE)
            if end.is_alive():
                warn("wandb has not sent everything; `wandb sync` in out_dir does it later.")


def write_atomically(path, content):
    """Write `content`, text or bytes, to `path`: a reader sees the old file or the new one, never a part of it."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        error.filename = error.filename or str(path)  # a write to a full disk does not say it
        raise


def git_state():
    """(commit, the files that git tracks and that differ from it) of the code that runs; (None, None) outside git."""

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
        return git("rev-parse", "HEAD"), [line.split(maxsplit=1)[1] for line in changed]
    except (OSError, subprocess.CalledProcessError):
        return None, None


def source_hash():
    """SHA-256 of the code that runs: the scripts and training/."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *root.glob("training/*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def console_line(metrics, max_iters, tokens_per_step):
    """One line of the screen, e.g. 'step 100/2000  train/loss 2.31  lr 1.0e-03  12.3k tok/s  left 0:03:10'."""
    parts = [f"step {metrics['step']:>{len(str(max_iters))}}/{max_iters}"]
    if "val/loss" in metrics:
        parts.append(f"val/loss {metrics['val/loss']:.4f}")
    if "train/loss" in metrics:
        parts.append(f"train/loss {metrics['train/loss']:.4f}")
        parts.append(f"lr {metrics['lr']:.2e}  grad_norm {metrics['grad_norm']:.2f}")
    if "train/win_rate" in metrics:
        parts.append(f"win_rate {metrics['train/win_rate']:.2f}")
    if "tokens_per_second" in metrics:
        left = (max_iters - metrics["step"]) * tokens_per_step / metrics["tokens_per_second"]
        parts.append(f"{metrics['tokens_per_second'] / 1e3:.1f}k tok/s")
        if "mfu" in metrics:
            parts.append(f"mfu {100 * metrics['mfu']:.1f}%")
        parts.append(f"left {int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}")
    return "  ".join(parts)
