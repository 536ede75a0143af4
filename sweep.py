"""The same tuning budget for every optimizer: a grid or a random search, the best of each again with fresh seeds.

python sweep.py config/sweep_30m_lr.py --out_dir=out/sweep_30m_lr --seeds=3
python compare.py out/sweep_30m_lr/best_*_seed* --out=out/sweep_30m_lr/best

A sweep file is Python; it assigns

    common = {"dataset": "python", "max_iters": 1560}              # settings of every run
    optimizers = {
        "adamw": {"config": "config/train_gpt2_30m_adam.py", "learning_rate": [5e-4, 1e-3, 2e-3, 4e-3]},
        "sophiag": {"config": "config/train_gpt2_30m_sophiag.py", "learning_rate": [...], "beta1": 0.9},
    }
    runs = 16                                                      # optional: random search, so many runs each

where what is a list is swept (all combinations, or `runs` of them drawn at random, the same ones each time, each value
about as often as the others), and what is not is fixed. Every optimizer must get as many runs as the others, of as
many tokens. Runs go one after another, or one on each GPU, or --jobs of them at a time: small models fill a GPU better
together, but then their times say nothing. Killed and started again it does what is missing: a run that was cut off
goes on from its checkpoint. A run that fails or diverges counts as loss inf; to have it run again, remove its folder.
Writes sweep.json and a figure for each swept setting; an optimizer with two of them gets a heat map.
"""

import fcntl
import itertools
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
from tqdm import tqdm

from figures import draw_sweep
from train_adam import AdamConfig
from train_sophiag import SophiaConfig
from training.config import load_config
from training.errors import Parser, UserError, command
from training.metrics import METRICS, STATE, read_metrics
from training.tracking import SHARED, write_atomically

FIRST_ORDER, SOPHIA = ("train_adam.py", AdamConfig), ("train_sophiag.py", SophiaConfig)
APART = 10  # seconds between starts on one GPU: runs of one length that start together also leave it idle together


@dataclass
class Trial:
    """One run of a sweep. swept: its values of the swept settings; seed: the fresh one of a repeat of the best, else
    None; loss: None until it ends."""

    optimizer: str
    swept: dict
    words: list  # of the command line, the script first
    folder: Path
    max_iters: int
    seed: int | None = None
    step: int = 0
    loss: float | None = None
    error: str = ""

    def read(self):
        """Take step and final loss from the run's metrics; whether it is done."""
        lines = read_metrics(self.folder / METRICS, about=1000) if (self.folder / METRICS).exists() else []
        self.step = lines[-1]["step"] if lines else 0
        if self.step == self.max_iters and "val/loss" in lines[-1]:
            self.loss = math.inf if lines[-1]["val/loss"] is None else lines[-1]["val/loss"]
        return self.loss is not None

    def start(self, device, lock, shared):
        """(process, its log): start it, or go on with it, on the GPU `device` where that is not None."""
        environment = {key: value for key, value in os.environ.items() if key != SHARED}
        environment |= {"CUDA_VISIBLE_DEVICES": device} if device is not None else {}
        environment |= {SHARED: "1"} if shared else {}
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *self.words, "--init_from=auto"]
        log = open(self.folder / "log.txt", "ab")
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=environment, pass_fds=[lock.fileno()], **streams), log


def main(words=None):
    parser = Parser(description=__doc__)
    parser.add_argument("sweep", metavar="SWEEP.py", help="what to sweep; it is run as code")
    parser.add_argument("--out_dir", required=True, help="folder of the sweep; each run gets a folder in it")
    parser.add_argument("--seeds", type=int, default=0, help="fresh seeds to run each optimizer's best with")
    help = "runs at a time, spread over the GPUs; default one on each, or 1; on one GPU they start 10 s apart"
    parser.add_argument("--jobs", type=int, help=help)
    arguments = parser.parse_args(words)
    if arguments.seeds < 0 or (arguments.jobs is not None and arguments.jobs < 1):
        raise UserError("--seeds is 0 or more, --jobs 1 or more.")
    out_dir, definition = Path(arguments.out_dir), read_sweep(arguments.sweep)
    trials = grid(definition, out_dir)
    with locked(out_dir) as lock:
        failed = read_state(out_dir, definition)
        gpus = visible_gpus() or [None]
        devices = list(itertools.islice(itertools.cycle(gpus), arguments.jobs or len(gpus)))
        seeds = arguments.seeds * len(definition["optimizers"]) / len(trials)  # as a share of the others
        total = round(sum(trial.max_iters for trial in trials) * (1 + seeds))
        with tqdm(total=total, initial=steps_done(trials), unit="step", smoothing=0.1) as bar:
            run_all(trials, devices, lock, bar, failed, partial(write_state, out_dir, definition, trials))
            again = best_again(trials, arguments.seeds, out_dir)
            run_all(again, devices, lock, bar, failed, partial(write_state, out_dir, definition, trials + again))
    figures = draw_sweep(averaged(trials), out_dir)
    print("\n".join(summary(trials + again)))
    print(f"wrote {', '.join([str(out_dir / STATE), *figures])}")


# ----- what to run


def read_sweep(path):
    """{"common": settings, "optimizers": {name: settings}} of a sweep file, and its "runs" where it assigns them.

    UserError where it cannot be one.
    """
    try:
        names = runpy.run_path(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read this sweep file ({error.strerror}).") from None
    except Exception as error:
        raise UserError(f"{path}: running this sweep file raised {type(error).__name__}: {error}.") from None
    definition = {key: names.get(key) for key in ("common", "optimizers")}
    named = definition["optimizers"]
    parts = [*definition.values(), *(named.values() if isinstance(named, dict) else ())]
    if not named or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path}: a sweep file assigns dicts, `common` and `optimizers` (--help shows one).")
    if (runs := names.get("runs")) is not None:
        if type(runs) is not int or runs < 1:
            raise UserError(f"{path}: runs = {runs!r}, wants a whole number from 1 on, or leave it away for all.")
        definition["runs"] = runs
    try:
        return json.loads(json.dumps(definition))  # as it will be read back from sweep.json
    except TypeError as error:
        raise UserError(f"{path}: settings are numbers, strings, True, False and None ({error}).") from None


def grid(definition, out_dir):
    """The trials of every optimizer: its grid, or `runs` drawn from it.

    UserError for settings that a script would refuse, drawn or not, and for unequal budgets.
    """
    trials, budgets = [], {}
    for optimizer, own in definition["optimizers"].items():
        settings = {"optimizer_name": optimizer, **definition["common"], **own}
        files = [settings.pop("config")] if "config" in settings else []
        script, config_class = SOPHIA if str(settings["optimizer_name"]).startswith("sophia") else FIRST_ORDER
        swept = {key: values for key, values in settings.items() if isinstance(values, list)}
        budgets[optimizer] = []
        for values in itertools.product(*swept.values()):
            point = dict(zip(swept, values, strict=True))
            folder = out_dir / "_".join([optimizer, *(f"{key}={value}" for key, value in point.items())])
            words = [*files, *(f"--{key}={value}" for key, value in {**settings, **point, "out_dir": folder}.items())]
            config = load_config(config_class, words)
            budgets[optimizer].append(config.max_iters * config.total_bs * config.block_size)
            words = [str(Path(__file__).parent / script), *words]
            trials.append(Trial(optimizer, point, words, folder, config.max_iters))
    if not trials or len({trial.folder for trial in trials}) < len(trials):
        raise UserError("an optimizer sweeps an empty list, or one with a value twice; every run is done once.")
    other, theirs = next(iter(budgets.items()))
    for optimizer, tokens in budgets.items():
        if len(tokens) != len(theirs) and "runs" not in definition:
            raise UserError(f"{optimizer} has {len(tokens)} runs and {other} {len(theirs)}; all must get as many.")
        if odd := [n for n in tokens if n != theirs[0]]:
            raise UserError(f"{optimizer} has a run of {odd[0]:,} tokens, {other} of {theirs[0]:,}; make them as long.")
    return list(draw(trials, definition["runs"])) if "runs" in definition else trials


def draw(trials, runs):
    """`runs` trials of each optimizer, drawn without replacement: random search (Bergstra & Bengio, JMLR 13, 2012).

    Each next one is drawn among those whose values came least often so far, so that no value of a setting is left out.
    An optimizer's name is the seed of its draw, which so depends on nothing but its own grid.
    """
    for optimizer in dict.fromkeys(trial.optimizer for trial in trials):
        own, random = [trial for trial in trials if trial.optimizer == optimizer], Random(optimizer)
        if len(own) < runs:
            raise UserError(f"{optimizer} has {len(own)} combinations, fewer than runs = {runs}; give it more values.")
        luck = {trial.folder: random.random() for trial in own}  # not sample(): Pythons differ in it
        values = {key: len({trial.swept[key] for trial in own}) for key in own[0].swept}
        drawn = Counter()  # how often each value of each setting

        def excess(trial, values=values, drawn=drawn):
            return sum(drawn[item] * values[item[0]] for item in trial.swept.items())

        for _ in range(runs):
            trial = min(own, key=lambda trial: (excess(trial), luck[trial.folder]))
            own.remove(trial)
            drawn.update(trial.swept.items())
            yield trial


def best_again(trials, seeds, out_dir):
    """Each optimizer's best trial with `seeds` fresh seeds: its own loss is that of a winner, too good on average."""
    again = []
    for optimizer in dict.fromkeys(trial.optimizer for trial in trials):
        best = min((trial for trial in trials if trial.optimizer == optimizer), key=lambda trial: trial.loss)
        for seed in range(1, seeds + 1) if math.isfinite(best.loss) else ():
            folder = out_dir / f"best_{best.folder.name}_seed{seed}"
            words = [*best.words, f"--seed={seed}", f"--out_dir={folder}"]
            again.append(Trial(optimizer, best.swept, words, folder, best.max_iters, seed))
    return again


# ----- running


def locked(out_dir):
    """An open file that is locked until this process and all the runs, which inherit it, have ended."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = open(out_dir / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"a sweep, or a run of one, is still at work in {out_dir}; wait for it or end it.") from None
    except OSError as error:
        raise UserError(f"--out_dir={out_dir}: cannot write there ({error.strerror}); name another one.") from None
    return lock


def steps_done(trials):
    return sum(trial.max_iters if trial.loss is not None or trial.read() else trial.step for trial in trials)


def run_all(trials, devices, lock, bar, failed, save_state):
    """Run what is not done, one for each entry of `devices` at a time.

    failed: {folder: error} of runs that failed before. They stay failed, unless their folder was removed.
    """
    others = bar.n - steps_done(trials)
    for trial in trials:
        if trial.loss is None and trial.folder.name in failed and trial.folder.exists():
            trial.loss, trial.error = math.inf, failed[trial.folder.name]
    pending, free, running = [trial for trial in trials if trial.loss is None], list(devices), []
    shared, last_start = len(devices) > len(set(devices)), {}
    apart = shared and devices[0] is not None
    save_state()
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # that ends the runs, below
    try:
        while pending or running:
            rested = [d for d in free if not apart or time.monotonic() - last_start.get(d, -math.inf) > APART]
            for device in dict.fromkeys(rested) if apart else rested:
                if not pending:
                    break
                free.remove(device)
                trial, last_start[device] = pending.pop(0), time.monotonic()
                running.append((trial, device, *trial.start(device, lock, shared)))
            time.sleep(0.3)
            for entry in [entry for entry in running if entry[2].poll() is not None]:
                running.remove(entry)
                trial, device, process, log = entry
                free.append(device)
                log.close()
                if not trial.read():
                    if process.returncode in (0, -signal.SIGTERM, -signal.SIGINT):
                        raise UserError(f"{trial.folder.name} was ended by a signal; start the sweep again to go on.")
                    lines = Path(log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
                    trial.loss, trial.error = math.inf, f"exit code {process.returncode}: {(lines or [''])[-1]}"
                    bar.write(f"{trial.folder.name} failed: {trial.error}", file=sys.stderr)
                save_state()
            bar.set_postfix_str(", ".join(entry[0].folder.name for entry in running)[:60], refresh=False)
            bar.update(others + steps_done(trials) - bar.n)
    finally:
        for _, _, process, _ in running:
            process.terminate()  # it then writes a checkpoint
        for _, _, process, log in running:
            process.wait()
            log.close()
        signal.signal(signal.SIGTERM, previous)


def visible_gpus():
    """What CUDA_VISIBLE_DEVICES may be, one GPU each; empty without one."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(i) for i in range(torch.cuda.device_count())]) if torch.cuda.is_available() else []


# ----- sweep.json


def read_state(out_dir, definition):
    """{folder: error} of the runs that failed before. UserError where out_dir holds a sweep of something else."""
    if not (out_dir / STATE).exists():
        return {}
    try:
        state = json.loads((out_dir / STATE).read_text(encoding="utf-8"))
        known, failed = state["sweep"], {run["run"]: run["error"] for run in state["runs"] if run["error"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{out_dir / STATE} is damaged; name another --out_dir.") from None
    if known != definition:
        raise UserError(f"{out_dir} holds another sweep (see its {STATE}); name another --out_dir.")
    return failed


def write_state(out_dir, definition, trials):
    """All that is known; a loss is null where the run is not done, "inf" where it diverged or failed."""
    runs = [
        {
            "run": trial.folder.name, "optimizer": trial.optimizer, "swept": trial.swept, "seed": trial.seed,
            "loss": "inf" if trial.loss == math.inf else trial.loss, "error": trial.error,
        }
        for trial in trials
    ]  # fmt: skip
    write_atomically(out_dir / STATE, state_text({"sweep": definition, "runs": runs}))


def state_text(state):
    """sweep.json with a line for each run."""
    runs = ",\n".join(json.dumps(run) for run in state["runs"])
    return f'{{"sweep": {json.dumps(state["sweep"])},\n"runs": [\n{runs}\n]}}\n'


# ----- what came out


def averaged(trials):
    """Of trials that sweep the seed one for all seeds of the same settings, with their mean loss: no seed is best."""
    groups = {}
    for trial in trials:
        swept = {key: value for key, value in trial.swept.items() if key != "seed"}
        groups.setdefault((trial.optimizer, json.dumps(swept)), []).append(replace(trial, swept=swept))
    return [replace(own[0], loss=float(np.mean([trial.loss for trial in own]))) for own in groups.values()]


def summary(trials):
    """A line an optimizer: its best, and what its fresh seeds gave."""
    for optimizer in dict.fromkeys(trial.optimizer for trial in trials):
        every = [trial for trial in trials if trial.optimizer == optimizer and trial.seed is None]
        own = averaged(every)
        seeds = [trial.loss for trial in trials if trial.optimizer == optimizer and trial.seed is not None]
        best, lost = min(own, key=lambda trial: trial.loss), sum(math.isinf(trial.loss) for trial in own)
        settings = ", ".join(f"{key}={value}" for key, value in best.swept.items())
        line = f"{optimizer}: best of {len(own)} runs {best.loss:.4f} at {settings or 'its only settings'}"
        line += f" (means of {len(every) // len(own)} seeds)" if len(own) < len(every) else ""
        line += f"; {lost} failed or diverged" if lost else ""
        yield line + (f"; with fresh seeds {np.mean(seeds):.4f} (n = {len(seeds)})" if seeds else "")


if __name__ == "__main__":
    command(main)
