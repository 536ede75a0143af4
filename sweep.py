"""Tune several optimizers with the same budget: grid or random search, then held-out seeds of each one's best run.

python sweep.py experiments/30m_tuning/sweep.py --out_dir=out/tuning --seeds=3
python compare.py out/tuning/best_*_seed* --out=out/tuning/best

A sweep file is Python. It assigns

    common = {"dataset": "python", "max_iters": 1560}              # settings of every run
    optimizers = {
        "adamw": {"config": "config/train_gpt2_30m_adam.py", "learning_rate": [5e-4, 1e-3, 2e-3, 4e-3]},
        "sophiag": {"config": "config/train_gpt2_30m_sophiag.py", "learning_rate": [...], "beta1": 0.9},
    }
    runs = 16                                                      # optional: random search, 16 runs an optimizer

A list is swept; other values are fixed. "script" names a training script of your own (docs/comparing.md). A file may
instead define `def sweep(steps=780)` that returns these in a dict; its parameters are then options: --steps=1560. The
sweep.json that a sweep writes is a sweep file too. Start an interrupted sweep again: it runs what is missing. A failed
or diverged run counts as an infinite loss; remove its folder to repeat it. docs/comparing.md has the rules and the
output.
"""

import inspect
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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random

# first: Ctrl-C during the other imports is then quiet
from training import INTERRUPTED, TERMINATED
from training.errors import Parser, UserError, command, file_errors

# isort: split
import numpy as np
import torch
from tqdm import tqdm

from analysis.figures import draw_sweep
from analysis.runs import HARMLESS, changed_keys, label, read_sweep
from train_adam import AdamConfig
from train_sophiag import SophiaConfig
from training.config import ALIASES, TrainConfig, load_config, run_config_file, run_file
from training.foreign import is_plain_name, read_json
from training.hf import MODEL_SETTINGS
from training.lock import lock_file
from training.metrics import CONFIG, METRICS, STATE, read_metrics
from training.tracking import SHARED, git_state, write_atomically

FIRST_ORDER, SOPHIA = ("train_adam.py", AdamConfig), ("train_sophiag.py", SophiaConfig)
MOST = 100_000  # combinations of an optimizer's values
LONGEST_NAME = 150  # bytes; steps, digits, seed and best_ come to it, and a file system takes 255
APART = 10  # seconds between starts on one GPU, so that its runs do not all evaluate at once and leave it idle


@dataclass
class Trial:
    """One run of a sweep. swept: its values of the swept settings; config: all of its settings; seed: its held-out seed
    if it repeats the best run, else None; loss: None until it ends; wanted: the settings that the sweep or its config
    file names, as its config.json is to have them."""

    optimizer: str
    swept: dict
    argv: list  # the script, then its command line
    folder: Path
    config: TrainConfig
    seed: int | None = None
    step: int = 0
    loss: float | None = None
    error: str = ""
    wanted: dict = field(default_factory=dict)

    def read(self):
        """Take step and final loss from the run's metrics; returns whether it is done.

        A run whose settings are, or were for some steps, not this trial's is done with the loss inf.
        """
        lines = read_metrics(self.folder / METRICS, about=1000) if (self.folder / METRICS).exists() else []
        self.step = lines[-1]["step"] if lines else 0
        if self.step == self.config.max_iters and "val/loss" in lines[-1]:
            self.loss = math.inf if lines[-1]["val/loss"] is None else lines[-1]["val/loss"]
        if lines and (problem := self._problem()):
            self.loss, self.error = math.inf, f"{problem}; remove this folder to repeat the run"
        return self.loss is not None

    def _problem(self):
        """Why the run in the folder does not count as this trial, in words; "" if it does."""
        path = self.folder / CONFIG
        try:
            facts = read_json(path)
            changed = [key for key in changed_keys(facts) if key not in HARMLESS]
            other = [
                f"{key} = {facts['config'][key]!r}"
                for key, value in self.wanted.items()
                if facts["config"].get(key, value) != value
            ]
        except FileNotFoundError:
            return ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{CONFIG} is damaged ({type(error).__name__}: {error})"
        return f"{', '.join(changed)} changed mid-run" if changed else f"it has {', '.join(other)}" if other else ""

    def start(self, device, lock, shared):
        """Start or resume the run, on the GPU `device` if that is not None; returns (process, its log)."""
        environment = {key: value for key, value in os.environ.items() if key != SHARED}
        environment |= {"CUDA_VISIBLE_DEVICES": device} if device is not None else {}
        environment |= {SHARED: "1"} if shared else {}
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *self.argv, "--init_from=auto"]  # new, with the weights that argv names, or resumed
        log = open(self.folder / "log.txt", "ab")
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        inherited = [lock.fileno()] if os.name == "posix" else ()
        return subprocess.Popen(command, env=environment, pass_fds=inherited, **streams), log


def main(argv=None):
    arguments, definition = read_command_line(sys.argv[1:] if argv is None else argv)
    if not 0 <= arguments.seeds <= 1000 or not 1 <= (1 if arguments.jobs is None else arguments.jobs) <= 1000:
        raise UserError("--seeds must be 0 to 1000, and --jobs 1 to 1000.")
    out_dir = Path(arguments.out_dir)
    known = read_state(out_dir, definition)
    trials = grid(definition, out_dir, known)
    if not arguments.dirty and (changed := git_state()[1]):
        why = f"{changed[0]} differs from the git commit, so nobody could tell which code the runs had"
        raise UserError(f"{why}; commit it, or have the runs marked as not clean with --dirty=True.")
    with locked(out_dir) as lock:
        gpus = visible_gpus() or [None]
        devices = list(itertools.islice(itertools.cycle(gpus), arguments.jobs or len(gpus)))
        seeds = arguments.seeds * len(definition["optimizers"]) / len(trials)  # as a share of the others
        total = round(sum(trial.config.max_iters for trial in trials) * (1 + seeds))
        with tqdm(total=total, initial=steps_done(trials), unit="step", smoothing=0.1) as bar:
            run_all(trials, devices, lock, bar, known, partial(write_state, out_dir, definition, trials, known))
            again = best_again(trials, arguments.seeds, out_dir)
            run_all(again, devices, lock, bar, known, partial(write_state, out_dir, definition, trials + again, known))
    figures = draw_sweep(averaged(trials), out_dir)
    print("\n".join(summary(trials + again)))
    print(f"wrote {', '.join([str(out_dir / STATE), *figures])}")


# ----- the sweep file and the command line


def read_command_line(argv):
    """(arguments, definition): the options, and what the sweep file defines under its own options.

    The definition is {"common": settings, "optimizers": {name: settings}}, with "runs" for a random search.
    """
    parser = Parser(description=__doc__)
    help = "the sweep file, which is run as code; or the sweep.json of a sweep, which is run again"
    parser.add_argument("sweep", metavar="SWEEP.py", help=help)
    help = "folder of the sweep; each run gets a folder in it"
    parser.add_argument("--out_dir", type=os.path.expanduser, required=True, help=help)
    parser.add_argument("--seeds", type=int, default=0, help="held-out seeds to repeat each optimizer's best run with")
    help = "runs at a time, spread over the GPUs; default: one on each GPU, or 1. On one GPU they start 10 s apart"
    parser.add_argument("--jobs", type=int, help=help)
    help = "run although files differ from the git commit; config.json then says clean: false"
    parser.add_argument("--dirty", type=boolean, default=False, metavar="True", help=help)
    path = next((w for w in argv if (w.endswith(".py") or Path(w).name == STATE) and not w.startswith("-")), None)
    names, options = _definition(path) if path else {}, []
    if inspect.isfunction(function := names.get("sweep")):
        group = parser.add_argument_group(f"options of {path}")
        for name, parameter in inspect.signature(function).parameters.items():
            default = parameter.default
            if name in ("sweep", "out_dir", "seeds", "jobs", "dirty", "help"):
                raise UserError(f"{path}: sweep()'s parameter {name} is an option of sweep.py already; rename it.")
            if not isinstance(default, bool | int | float | str):
                raise UserError(f"{path}: sweep()'s parameter {name} needs a number, string, True or False as default.")
            kind = boolean if isinstance(default, bool) else type(default)
            group.add_argument(f"--{name}", type=kind, default=default, help=f"default {default!r}")
            options.append(name)
    arguments = parser.parse_args(argv)
    if arguments.sweep != path:
        raise UserError(f"{arguments.sweep}: a sweep file is NAME.py or {STATE}; give it before any other such name.")
    if inspect.isfunction(function):
        names = run_file(path, function, **{name: getattr(arguments, name) for name in options})
    return arguments, check_definition(names, path)


def _definition(path):
    """What a sweep file assigns, or the definition in a sweep.json."""
    if path.endswith(".py"):
        return run_file(path, runpy.run_path, path)
    if isinstance(definition := read_sweep(Path(path).parent)["sweep"], list):
        raise UserError(f"{path} holds {len(definition)} sweeps; give the sweep file that made them.")
    return definition


def boolean(text):
    if text not in ("True", "False"):
        raise ValueError(text)
    return text == "True"


def check_definition(names, path):
    """The definition in `names`, as it will be read back from sweep.json. UserError if it is none."""
    names = names if isinstance(names, dict) else {}
    definition = {key: names.get(key) for key in ("common", "optimizers")}
    optimizers = definition["optimizers"]
    parts = [*definition.values(), *(optimizers.values() if isinstance(optimizers, dict) else ())]
    if not optimizers or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path}: a sweep file gives two dicts, `common` and `optimizers` (--help shows one).")
    paths = [(key, part[key]) for part in parts for key in ("config", "script") if key in part]
    if odd := [pair for pair in paths if not isinstance(pair[1], str)]:
        raise UserError(f"{path}: {odd[0][0]} = {odd[0][1]!r:.80}, but it must be the path of one file.")
    if (runs := names.get("runs")) is not None:
        if type(runs) is not int or runs < 1:
            raise UserError(f"{path}: runs = {runs!r}, but it must be an integer above 0; leave it out for all runs.")
        definition["runs"] = runs
    try:
        return json.loads(json.dumps(definition))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: settings are numbers, strings, True, False and None ({error}).") from None


# ----- which runs


def settings_of(definition, optimizer):
    return {"optimizer_name": optimizer, **definition["common"], **definition["optimizers"][optimizer]}


def script_of(settings):
    """(training script, class of its settings). Takes "script" out of `settings`: a script that has a class Config."""
    if not (script := settings.pop("script", None)):
        return SOPHIA if str(settings["optimizer_name"]).startswith("sophia") else FIRST_ORDER
    path = str(Path(__file__).parent / script)
    if "Config" not in (names := run_file(path, runpy.run_path, path)):
        raise UserError(f"{path}: a training script has its settings in a dataclass Config; name it so.")
    return path, names["Config"]


def grid(definition, out_dir, known=()):
    """The trials of every optimizer: all combinations, or `runs` of them. Runs in `known` keep their folders.

    UserError for settings that a training script refuses, drawn or not, and for unequal budgets.
    """
    trials, budgets, folders = [], {}, {}
    names = {key_of(run["optimizer"], run["swept"]): run["run"] for run in known if run["seed"] is None}
    for optimizer in definition["optimizers"]:
        if not is_plain_name(optimizer) or not optimizer.isprintable() or len(optimizer.encode()) > LONGEST_NAME:
            limits = f"without '/', and with {LONGEST_NAME} bytes at most"
            raise UserError(f"{optimizer!r:.80} is to be in the names of folders; name this optimizer {limits}.")
        settings = settings_of(definition, optimizer)
        files = [settings.pop("config")] if "config" in settings else []
        script, config_class = script_of(settings)
        swept = {key: values for key, values in settings.items() if isinstance(values, list)}
        named = {ALIASES.get(key, key) for key in settings}.union(*(run_config_file(config_class, f) for f in files))
        budgets[optimizer] = []
        if (count := math.prod(map(len, swept.values()))) > MOST:
            raise UserError(f"{optimizer} has {count:,} combinations, more than {MOST:,}; give fewer values.")
        for values in itertools.product(*swept.values()):
            point = dict(zip(swept, values, strict=True))
            folder = out_dir / names.get(key_of(optimizer, point), label(optimizer, point))
            if (other := folders.setdefault(folder, (optimizer, point))) != (optimizer, point):
                raise UserError(f"{folder.name} would be the folder of {other} and {optimizer, point}; rename one.")
            argv = [*files, *(f"--{key}={value}" for key, value in {**settings, **point, "out_dir": folder}.items())]
            config = load_config(config_class, argv)
            if config.eval_only or config.init_from == "resume":
                raise UserError(f"{optimizer} has eval_only, or init_from = 'resume'; a sweep trains, leave it out.")
            budgets[optimizer].append(config.max_iters * config.total_bs * config.block_size)
            argv = [str(Path(__file__).parent / script), *argv]
            other = HARMLESS if config.new_from == "scratch" else HARMLESS.union(MODEL_SETTINGS)
            wanted = {k: v for k in sorted(named - other) if (v := getattr(config, k)) not in (None, "auto")}
            trials.append(Trial(optimizer, point, argv, folder, config, wanted=wanted))
    if not trials or len(folders) < len(trials):
        raise UserError("an optimizer sweeps an empty list, or one with a value twice; list each value once.")
    other, first = next(iter(budgets.items()))
    for optimizer, tokens in budgets.items():
        if len(tokens) != len(first) and "runs" not in definition:
            raise UserError(f"{optimizer} has {len(tokens)} runs and {other} {len(first)}; make them equal.")
        if odd := [n for n in tokens if n != first[0]]:
            raise UserError(f"{optimizer} has a run of {odd[0]:,} tokens, {other} of {first[0]:,}; make them equal.")
    return list(draw(trials, definition["runs"], set(names.values()))) if "runs" in definition else trials


def key_of(optimizer, swept):
    return optimizer, json.dumps(swept, sort_keys=True)


def draw(trials, runs, known=()):
    """`runs` trials of each optimizer, drawn without replacement: random search (Bergstra & Bengio, JMLR 13, 2012).

    Those with a label in `known` come first. Each further one is drawn among those whose values came least often so
    far, so that no value is left out. The draw is seeded with the optimizer's name, and depends only on its own grid.
    """
    for optimizer in dict.fromkeys(trial.optimizer for trial in trials):
        own, random = [trial for trial in trials if trial.optimizer == optimizer], Random(optimizer)
        if len(own) < runs:
            raise UserError(f"{optimizer} has {len(own)} combinations, fewer than runs = {runs}; give it more values.")
        luck = {trial.folder: random.random() for trial in own}  # sample() differs between versions of Python
        values = {key: len({trial.swept[key] for trial in own}) for key in own[0].swept}
        drawn = Counter()  # how often each value of each setting

        def excess(trial, values=values, drawn=drawn):
            return sum(drawn[item] * values[item[0]] for item in trial.swept.items())

        for _ in range(runs):
            candidates = [trial for trial in own if trial.folder.name in known] or own
            trial = min(candidates, key=lambda trial: (excess(trial), luck[trial.folder]))
            own.remove(trial)
            drawn.update(trial.swept.items())
            yield trial


def best_again(trials, seeds, out_dir):
    """Each optimizer's best trial with held-out seeds: as the lowest of many, its own loss is too good on average."""
    again = []
    for optimizer in dict.fromkeys(trial.optimizer for trial in trials):
        best = min((trial for trial in trials if trial.optimizer == optimizer), key=lambda trial: trial.loss)
        used = {trial.config.seed for trial in trials}
        held_out = (seed for seed in itertools.count(1) if seed not in used)
        for seed in itertools.islice(held_out, seeds) if math.isfinite(best.loss) else ():
            folder = out_dir / f"best_{best.folder.name}_seed{seed}"
            argv = [*best.argv, f"--seed={seed}", f"--out_dir={folder}"]
            wanted = best.wanted | {"seed": seed}
            again.append(Trial(optimizer, best.swept, argv, folder, best.config, seed, wanted=wanted))
    return again


# ----- running


def locked(out_dir):
    """An open file, locked until this process and its runs, which inherit it, have ended."""
    with file_errors(out_dir, "name another --out_dir"):
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = open(out_dir / ".lock", "w")
        taken = f"a sweep or one of its runs is still at work in {out_dir}; wait for it or stop it."
        lock_file(lock, taken, f"start no second sweep in {out_dir}.")
    return lock


def steps_done(trials):
    return sum(trial.config.max_iters if trial.loss is not None or trial.read() else trial.step for trial in trials)


def run_all(trials, devices, lock, bar, known, save_state):
    """Run what is not done, one for each entry of `devices` at a time.

    Runs that failed before, as `known` from sweep.json says, stay failed unless their folder was removed.
    """
    failed = {run["run"]: run["error"] for run in known if run["error"]}
    others = bar.n - steps_done(trials)
    for trial in trials:
        if trial.loss is None and trial.folder.name in failed and trial.folder.exists():
            trial.loss, trial.error = math.inf, failed[trial.folder.name]
    for trial in (trial for trial in trials if trial.error and trial.folder.name not in failed):
        bar.write(f"{trial.folder.name} failed: {trial.error}", file=sys.stderr)
    pending, free, running = [trial for trial in trials if trial.loss is None], list(devices), []
    shared, last_start = len(devices) > len(set(devices)), {}
    apart = shared and devices[0] is not None
    save_state()
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
                    if process.returncode in (0, -signal.SIGTERM, -signal.SIGINT, INTERRUPTED, TERMINATED):
                        raise UserError(f"{trial.folder.name} was stopped by a signal; start the sweep again to go on.")
                    lines = Path(log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
                    trial.loss, trial.error = math.inf, f"exit code {process.returncode}: {(lines or [''])[-1]}"
                if trial.error:
                    bar.write(f"{trial.folder.name} failed: {trial.error}", file=sys.stderr)
                save_state()
            bar.set_postfix_str(", ".join(entry[0].folder.name for entry in running)[:60], refresh=False)
            bar.update(others + steps_done(trials) - bar.n)
    finally:
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C reaches the runs, and ends them
        for _, _, process, _ in running:
            process.terminate()  # the run then writes a checkpoint; SIGTERM ends the sweep as Ctrl-C does
        for _, _, process, log in running:
            process.wait()
            log.close()
        signal.signal(signal.SIGINT, interrupt)


def visible_gpus():
    """The values of CUDA_VISIBLE_DEVICES that select one GPU each; empty without a GPU."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(i) for i in range(torch.cuda.device_count())]) if torch.cuda.is_available() else []


# ----- sweep.json


def read_state(out_dir, definition):
    """The runs that out_dir's sweep.json lists. UserError if that sweep had other settings than `definition` has."""
    if not os.path.lexists(out_dir / STATE):
        return []
    state = read_sweep(out_dir)
    complete = all({"optimizer", "error"} <= run.keys() for run in state["runs"])
    if not complete or not {"common", "optimizers"} <= set(state["sweep"]):
        raise UserError(f"{out_dir / STATE} is damaged, or not that of one sweep; name another --out_dir.")
    if difference := first_difference(state["sweep"], definition):
        raise UserError(f"{out_dir} holds a sweep with {difference}; only add to it, or name another --out_dir.")
    for run in (run for run in state["runs"] if run["optimizer"] in state["sweep"]["optimizers"]):
        before, after = (settings_of(sweep, run["optimizer"]) for sweep in (state["sweep"], definition))
        swept = {key: values for key, values in after.items() if isinstance(values, list)}
        values = {key: run["swept"][key] if key in run["swept"] else fixed_value(before, key) for key in swept}
        run["swept"] = {key: next((v for v in swept[key] if v == values[key]), values[key]) for key in swept}
    return state["runs"]


def fixed_value(settings, key):
    """What the runs of these settings have for a setting that they do not sweep."""
    if key in settings:
        return settings[key]
    config_class, name = script_of(dict(settings))[1], ALIASES.get(key, key)
    from_file = run_config_file(config_class, settings["config"]) if "config" in settings else {}
    return from_file.get(name, config_class.__dataclass_fields__[name].default)


def first_difference(known, definition):
    """What `definition` changes in a `known` one, in words; "" if it only adds values, optimizers or runs."""
    for optimizer in known["optimizers"]:
        if optimizer not in definition["optimizers"]:
            return f"the optimizer {optimizer}, which is missing now"
        before, after = settings_of(known, optimizer), settings_of(definition, optimizer)
        for key in {**before, **after}:
            old, new = before.get(key), after.get(key)
            if isinstance(new, list):
                values = old if isinstance(old, list) else [fixed_value(before, key)]
                if all(value in new for value in values):
                    continue
            if old != new:
                return f"{optimizer}'s {key} = {old!r}, which is {new!r} now"
    before, after = known.get("runs") or math.inf, definition.get("runs") or math.inf
    return f"runs = {known.get('runs')}, which is {definition['runs']} now" if after < before else ""


def write_state(out_dir, definition, trials, known):
    """Write sweep.json: a loss is null until the run is done, "inf" if it diverged or failed.

    Runs in `known` that are no trial of today stay in it while their folder exists: repeats of a former best run.
    """
    runs = {
        trial.folder.name: {
            "run": trial.folder.name, "optimizer": trial.optimizer, "swept": trial.swept, "seed": trial.seed,
            "loss": "inf" if trial.loss == math.inf else trial.loss, "error": trial.error,
        }
        for trial in trials
    }  # fmt: skip
    runs |= {run["run"]: run for run in known if run["run"] not in runs and (out_dir / run["run"]).exists()}
    write_atomically(out_dir / STATE, state_text({"sweep": definition, "runs": list(runs.values())}))


def state_text(state):
    """The text of sweep.json, one line for each run."""
    runs = ",\n".join(json.dumps(run) for run in state["runs"])
    return f'{{"sweep": {json.dumps(state["sweep"])},\n"runs": [\n{runs}\n]}}\n'


# ----- results


def averaged(trials):
    """One trial for all seeds of the same settings, with their mean loss: a sweep over seeds does not choose a seed."""
    groups = {}
    for trial in trials:
        swept = {key: value for key, value in trial.swept.items() if key != "seed"}
        groups.setdefault((trial.optimizer, json.dumps(swept)), []).append(replace(trial, swept=swept))
    return [replace(own[0], loss=float(np.mean([trial.loss for trial in own]))) for own in groups.values()]


def summary(trials):
    """One line for each optimizer: its best run, and the mean loss of its held-out seeds."""
    for optimizer in dict.fromkeys(trial.optimizer for trial in trials):
        every = [trial for trial in trials if trial.optimizer == optimizer and trial.seed is None]
        own = averaged(every)
        seeds = [trial.loss for trial in trials if trial.optimizer == optimizer and trial.seed is not None]
        best, lost = min(own, key=lambda trial: trial.loss), sum(math.isinf(trial.loss) for trial in own)
        settings = ", ".join(f"{key}={value}" for key, value in best.swept.items())
        line = f"{optimizer}: best of {len(own)} runs {best.loss:.4f} at {settings or 'its only settings'}"
        line += f" (means of {len(every) // len(own)} seeds)" if len(own) < len(every) else ""
        line += f"; {lost} failed or diverged" if lost else ""
        yield line + (f"; with held-out seeds {np.mean(seeds):.4f} (n = {len(seeds)})" if seeds else "")


if __name__ == "__main__":
    command(main)
