"""Read finished runs, check that they can be compared, and group those that differ only in the seed.

runs = [read_run(folder) for folder in folders]
check_comparable(runs)
groups = group(runs)               # groups[0], the group of the first run, is the baseline
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.config import TrainConfig
from training.errors import UserError
from training.foreign import is_plain_name, read_json
from training.metrics import CONFIG, METRICS, STATE, read_metrics

LINES = 1000  # lines of metrics that are enough for any figure
SMOOTHING = 0.02  # share of a run's logged steps over which train/loss is averaged
NOT_SETTINGS = {"seed", "out_dir", "overwrite", "init_from", "wandb_log", "wandb_project", "wandb_run_name"}
# Settings that may change at a resume: they do not affect training, or change only rounding. `dataset` is one of
# them: it is a path, and the SHA-256 shows whether the data changed.
HARMLESS = NOT_SETTINGS - {"seed"} | {
    "checkpoint", "log_interval", "eval_interval", "eval_only", "eval_iters", "always_save_checkpoint",
    "keep_checkpoints", "max_skipped", "nccl_timeout", "backend", "device", "activation_checkpointing", "world_size",
    "gradient_accumulation_steps", "device_name", "torch", "source_sha256", "dataset",
}  # fmt: skip
SPEED = {"world_size", "device_name", "activation_checkpointing"}  # of these, those that change its speed
TOKENIZER = str | dict | None
DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}  # what runs without them did
SHAPE = {"n_layer", "n_head", "n_embd"}  # a label names the model size instead
FOLLOW = {"lr_decay_iters": "max_iters", "min_lr": "learning_rate"}  # a label leaves these out where the other differs


@dataclass
class Run:
    """A run as its folder describes it.

    clean: whether it was started from a clean git commit, so that its exact code is known.
    shared: whether other runs used its GPU at the same time, or it moved to other GPUs; its times are then NaN.
    changed: the settings that changed at a resume. Such a run is no seed of another one.
    conditions: name -> value of everything that two runs must have in common to be compared.
    lines: some lines of its metrics; evaluations: those with a val/loss, which is infinite if it was not finite.
    """

    name: str
    config: dict
    parameters: int
    device: str
    commit: str | None
    clean: bool
    shared: bool
    conditions: dict
    lines: list
    evaluations: list
    changed: list

    @property
    def final(self):
        return self.evaluations[-1]

    @property
    def finished(self):
        """Whether the run completed its learning rate schedule, with the same settings throughout."""
        steps, decay = self.config["max_iters"], self.config.get("lr_decay_iters") or 0
        return not self.changed and self.final["step"] == steps >= decay

    def curve(self, key, against):
        """Two arrays: the values of the metric `against`, and those of the metric `key` on the same lines."""
        points = [(line[against], line[key]) for line in self.lines if key in line and against in line]
        points = np.array(points, dtype=float).reshape(-1, 2)
        return points[~np.isnan(points).any(axis=1)].T

    def late(self, key, share=0.0):
        """Mean of a metric over the last `share` of its lines, at least of one; None if it was not logged."""
        values = self.curve(key, "step")[1]
        return values[-max(1, round(share * len(values))) :].mean() if len(values) else None


@dataclass
class Group:
    """Runs with the same settings and different seeds."""

    runs: list
    label: str = ""

    @property
    def optimizer(self):
        """Its name. Sophia in an eigenbasis, or with AdamW for some parameters, counts as another optimizer."""
        config = self.runs[0].config
        parts = [config["optimizer_name"], *(name for name in ("eigenbasis", "spectral") if config.get(name))]
        return "+".join([*parts, *(["adamw"] if config.get("adamw_for", "none") != "none" else [])])

    @property
    def steps(self):
        """The training horizon."""
        return self.runs[0].config["max_iters"]

    @property
    def parameters(self):
        return self.runs[0].parameters

    @property
    def finished(self):
        return all(run.finished for run in self.runs)

    @property
    def unfinished(self):
        """Why it is not finished, in words."""
        return "settings changed" if any(run.changed for run in self.runs) else "not finished"

    @property
    def converged(self):
        """Whether all runs are finished, with a finite loss."""
        return self.finished and bool(np.isfinite(self.losses).all())

    @property
    def timed(self):
        """The runs whose times count: those with a GPU to themselves, on the device that most of these had."""
        return max(unshared_by_device(self.runs).values(), key=len, default=[])

    @property
    def losses(self):
        return np.array([run.final["val/loss"] for run in self.runs])

    @property
    def interval(self):
        """Half the width of Student's 95% interval of the mean loss; None for one seed or infinite losses."""
        from scipy import stats

        losses = self.losses
        if len(losses) < 2 or not np.isfinite(losses).all():
            return None
        return float(stats.t.ppf(0.975, len(losses) - 1) * np.std(losses, ddof=1) / math.sqrt(len(losses)))

    def mean(self, key):
        """Mean over the runs of a metric at the last step."""
        return float(np.mean([run.final[key] for run in self.runs]))


def unshared_by_device(runs):
    """{device: its runs with a GPU to themselves}, sorted by the device's name."""
    devices = sorted({run.device for run in runs if not run.shared})
    return {device: [run for run in runs if run.device == device and not run.shared] for device in devices}


def unclean(runs):
    """The runs that did not start from a clean git commit: their exact code is unknown."""
    return [run for run in runs if not run.clean]


def loss_unit(runs):
    of_characters = all("characters" in (run.conditions["tokenizer"] or "") for run in runs)
    return "nats a character" if of_characters else "nats a token"


def size_name(parameters):
    """'124M', '0.85M'."""
    return f"{parameters / 1e6:.0f}M" if parameters >= 1e7 else f"{parameters / 1e6:.2g}M"


def label(optimizer, swept):
    """The folder name of a sweep's run: adamw_780_seed3, adamw_3fa21c.

    max_iters and seed are written out. All other swept settings become 6 hex digits of their SHA-256.
    """
    others = {key: value for key, value in swept.items() if key not in ("max_iters", "seed")}
    parts = [optimizer, *([str(swept["max_iters"])] if "max_iters" in swept else [])]
    if others:
        parts.append(hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:6])
    return "_".join([*parts, *([f"seed{swept['seed']}"] if "seed" in swept else [])])


def read_run(folder):
    """The run in `folder`. UserError if files are missing or damaged, or if the run was never evaluated."""
    metrics, path = Path(folder, METRICS), Path(folder, CONFIG)
    if missing := [file for file in (metrics, path) if not os.path.isfile(file)]:
        raise UserError(f"{missing[0]} is missing: name the out_dir of a run.")
    try:
        facts = read_json(path, 1 << 26)
        config, data, parameters = facts["config"], facts["data"], facts["model"]["num_params"]
        conditions = {
            "training data (SHA-256)": data["train_sha256"],
            "validation data (SHA-256)": data["val_sha256"],
            "tokenizer": facts["tokenizer"],
            "total_bs * block_size": config["total_bs"] * config["block_size"],
            "block_size": config["block_size"],
            "eval_tokens": config["eval_tokens"],
            "model parameters": parameters,
        }
        counts = ("max_iters", "total_bs", "block_size", "eval_tokens")
        wanted = [(config.get(key), int, key) for key in counts] + [(parameters, int, "num_params")]
        wanted += [(config.get("lr_decay_iters"), int | None, "lr_decay_iters"), (facts["world_size"], int, "ranks")]
        wanted += [(config.get("optimizer_name"), str, "optimizer_name"), (facts["device_name"], str, "device_name")]
        wanted += [(facts.get("git_commit"), str | None, "git_commit"), (facts["tokenizer"], TOKENIZER, "tokenizer")]
        for value, kind, name in wanted:
            if not isinstance(value, kind) or (isinstance(value, int) and not 0 < value < 2**62):
                raise TypeError(f"{name} = {value!r:.80}")
        device, commit = f"{facts['world_size']} x {facts['device_name']}", facts.get("git_commit")
        clean = bool(commit) and not commit.endswith("-dirty") and facts.get("clean", True) is True
        keys = changed_keys(facts)
        clean = clean and "source_sha256" not in keys
        if (weights := facts.get("weights", config.get("init_from"))) not in (None, "scratch", "resume", "auto"):
            config["weights"] = weights  # with which training began
        if "adamw_for" in config:  # older runs call the group of parameters "vectors"
            config["adamw_for"] = config["adamw_for"].replace("vectors", "scalars")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); name another run.") from None
    of_steps = {line["step"]: line for line in read_metrics(metrics, about=LINES) if is_valid(line)}
    lines = [of_steps[step] for step in sorted(of_steps)]  # of two lines of a step the later one
    for line in lines:
        if "val/loss" in line and line["val/loss"] is None:
            line["val/loss"] = math.inf
        for key in [key for key, value in line.items() if value is None]:
            del line[key]
    evaluations = [line for line in lines if "val/loss" in line]
    if not evaluations:
        raise UserError(f"{metrics} has no val/loss: the run was never evaluated; name another run.")
    shared = facts.get("shared_device", False) or not SPEED.isdisjoint(keys)
    for line in lines if shared else ():
        line |= {key: math.nan for key in ("seconds", "tokens_per_second", "mfu") if key in line}
    changed = [key for key in keys if key not in HARMLESS]
    return Run(str(folder), config, parameters, device, commit, clean, shared, conditions, lines, evaluations, changed)


def changed_keys(facts):
    """The settings and facts of a config.json that changed at a resume. Before step 0 nothing is trained."""
    history = [entry for entry in facts.get("history", []) if entry["step"] > 0]
    return list(dict.fromkeys(str(key) for entry in history for key in entry["changed"]))


def read_sweep(folder):
    """The sweep.json in `folder`: {"sweep": its definition or a list of them, "runs": [...]}. UserError if damaged."""
    path = Path(folder, STATE)
    kinds = {"run": str, "optimizer": str, "swept": dict, "seed": int | None, "loss": int | float | str | None}
    kinds |= {"error": str}
    try:
        state = read_json(path, 1 << 28)
        definitions = state["sweep"] if isinstance(state["sweep"], list) else [state["sweep"]]
        runs = [{"optimizer": "", "error": ""} | run for run in state["runs"]]
        for definition in definitions:
            parts = [definition, definition.get("common", {}), definition.get("optimizers", {})]
            if wrong := [part for part in (*parts, *parts[2].values()) if not isinstance(part, dict)]:
                raise TypeError(f"{wrong[0]!r:.80} where settings belong")
        for run in runs:
            if wrong := [key for key, kind in kinds.items() if not isinstance(run[key], kind)]:
                raise TypeError(f"{wrong[0]} = {run[wrong[0]]!r:.80}")
            if not is_plain_name(run["run"]) or (isinstance(run["loss"], str) and run["loss"] != "inf"):
                raise TypeError(f"the run {run['run']!r:.80} with the loss {run['loss']!r:.80}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); put back a copy of it.") from None
    return {"sweep": state["sweep"], "runs": state["runs"]}


def is_valid(line):
    """Whether a line of metrics has tokens and seconds, and holds only numbers (null where one was not finite)."""
    known = all(isinstance(line.get(key), int | float) for key in ("tokens", "seconds"))
    return known and all(value is None or isinstance(value, int | float) for value in line.values())


def check_comparable(runs, scaling=False):
    """UserError that lists how a run differs from the first. With `scaling`, model sizes may differ."""
    for run in runs[1:]:
        pairs = ((name, runs[0].conditions[name], value) for name, value in run.conditions.items())
        pairs = ((name, *pair) for name, *pair in pairs if not (scaling and name == "model parameters"))
        differing = [f"{name} ({value!s:.16}, not {first!s:.16})" for name, first, value in pairs if first != value]
        if differing:
            raise UserError(f"{run.name} differs from {runs[0].name} in {', '.join(differing)}; --force allows it.")


def group(runs):
    """The runs as groups of seeds, in the order of their first runs, with labels that tell them apart.

    A run whose settings changed at a resume is a group of its own.
    """
    groups, settings, labels = {}, {}, set()
    newer = {key for run in runs for key in run.config if any(key not in other.config for other in runs)}
    for run in runs:
        used = {k: v for k, v in run.config.items() if v not in (None, "none") and v is not False}
        used = {k: v for k, v in used.items() if k not in newer or v != DEFAULTS.get(k)}
        own = {k: v for k, v in used.items() if k not in NOT_SETTINGS}  # a setting that is off counts as absent
        key = json.dumps([own, run.conditions, run.changed and run.name], sort_keys=True)
        for other in groups.setdefault(key, Group([])).runs:
            if other.config.get("seed") == run.config.get("seed"):
                raise UserError(f"{run.name} repeats {other.name} (same settings, same seed); leave one of them out.")
        groups[key].runs.append(run)
        settings[key] = own
    for key, seeds in groups.items():
        rivals = [settings[other] for other in groups if groups[other].optimizer == seeds.optimizer]
        differing = [name for name in settings[key] if any(r.get(name) != settings[key][name] for r in rivals)]
        differing = [name for name in differing if FOLLOW.get(name) not in differing]
        parts = [f"{name}={settings[key][name]!s:.24}" for name in differing if name not in SHAPE]
        folder = re.sub(r"[._-]*s(eed)?[=_-]?\d+$", "", Path(seeds.runs[0].name).name)
        size = [size_name(seeds.parameters)] if len({run.parameters for run in runs}) > 1 else []
        seeds.label = ", ".join([seeds.optimizer, *size, *(parts if len(parts) <= 3 else [folder])])
        if changed := [name for name in seeds.runs[0].changed if FOLLOW.get(name) not in seeds.runs[0].changed]:
            names = ", ".join(changed) if len(changed) <= 3 else f"{len(changed)} settings"
            seeds.label, folder = f"{seeds.label}, changed mid-run: {names}", Path(seeds.runs[0].name).name
        if seeds.label in labels:  # --force allows groups that differ in their conditions only
            seeds.label += f", {folder}"
        labels.add(seeds.label)
    return list(groups.values())
