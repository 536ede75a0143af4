"""Finished runs side by side: a table of their losses and speeds and, with --out, a figure of their loss curves.

python compare.py out/demo_adam out/demo_sophiag --out=out/demo      # writes out/demo.png and out/demo.svg

It reads metrics.jsonl and config.json in each run's folder, and refuses runs on other data, batches or evaluations.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.errors import UserError, command
from training.tracking import CONFIG, METRICS, read_metrics

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # colour-blind readers' too
HEADS = "run", "optimizer", "steps", "tokens", "final val/loss", "difference", "best val/loss", "seconds", "tokens/s"
STRONG = {"marker": "o", "markersize": 4, "linewidth": 1.8}  # val/loss; train/loss is thin and light
SMOOTHING = 0.02  # the width of the running mean of train/loss, as a share of a run's logged steps


@dataclass
class FinishedRun:
    """What is read of a run. conditions: name -> value of all that two runs must share to be compared; lines: its
    metrics; evaluations: the lines with a val/loss, infinite where it was not finite (null in the file)."""

    name: str
    optimizer: str
    max_iters: int
    device: str
    conditions: dict
    lines: list
    evaluations: list

    def curve(self, key):
        """(steps, seconds, values) of a metric, an array each."""
        points = [(line["step"], line["seconds"], line[key]) for line in self.lines if key in line]
        return np.array(points, dtype=float).reshape(-1, 3).T


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, as every script here does."""

    def error(self, message):
        raise UserError(f"{message} (--help explains).")


def main(words=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the out_dir of a run; the first is the baseline")
    parser.add_argument("--out", metavar="PREFIX", help="draw the loss curves as PREFIX.png and PREFIX.svg")
    parser.add_argument("--force", action="store_true", help="compare runs although they are not comparable")
    arguments = parser.parse_args(words)
    runs = [read_run(folder) for folder in arguments.runs]
    if not arguments.force:
        check_comparable(runs)
    print("\n".join([*table(runs), "", *notes(runs)]))
    if arguments.out:
        draw(runs, arguments.out)
        print(f"wrote {arguments.out}.png and {arguments.out}.svg")


def read_run(folder):
    """The run in `folder`. UserError where its files are missing or damaged, or it was never evaluated."""
    metrics, config = Path(folder, METRICS), Path(folder, CONFIG)
    for path in (metrics, config):
        if not path.is_file():
            raise UserError(f"{path} is missing: name the out_dir of a run.")
    try:
        facts = json.loads(config.read_text(encoding="utf-8"))
        settings, data = facts["config"], facts["data"]
        conditions = {
            "training data (SHA-256)": data["train_sha256"],
            "validation data (SHA-256)": data["val_sha256"],
            "tokenizer": facts["tokenizer"],
            "total_bs * block_size": settings["total_bs"] * settings["block_size"],
            "block_size": settings["block_size"],
            "eval_tokens": settings["eval_tokens"],
        }
        facts = settings["optimizer_name"], settings["max_iters"], f"{facts['world_size']} x {facts['device_name']}"
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config} is damaged ({type(error).__name__}: {error}); name another run.") from None
    lines = read_metrics(metrics)
    evaluated = (line for line in lines if "val/loss" in line)
    evaluations = [line if line["val/loss"] is not None else line | {"val/loss": math.inf} for line in evaluated]
    if not evaluations:
        raise UserError(f"{metrics} has no val/loss: the run was never evaluated; name another run.")
    return FinishedRun(str(folder), *facts, conditions, lines, evaluations)


def check_comparable(runs):
    """UserError that names what a run differs in from the first."""
    for run in runs[1:]:
        pairs = ((name, runs[0].conditions[name], value) for name, value in run.conditions.items())
        differing = [f"{name} ({other!s:.16}, not {one!s:.16})" for name, one, other in pairs if one != other]
        if differing:
            raise UserError(f"{run.name} differs from {runs[0].name} in {', '.join(differing)}; --force allows it.")


def unit(runs):
    """What a loss is measured in."""
    return "nats a character" if all(isinstance(r.conditions["tokenizer"], dict) for r in runs) else "nats a token"


def table(runs):
    """Lines of an aligned Markdown table, a row a run. All but the best loss are of the run's last evaluation."""
    rows, baseline = [HEADS], runs[0].evaluations[-1]["val/loss"]
    for run in runs:
        last, best = run.evaluations[-1], min(line["val/loss"] for line in run.evaluations)
        difference = "" if run is runs[0] else f"{last['val/loss'] - baseline:+.4f}"
        speed = f"{last['tokens'] / last['seconds']:,.0f}" if last["seconds"] else ""
        numbers = f"{last['val/loss']:.4f}", difference, f"{best:.4f}", f"{last['seconds']:,.1f}", speed
        rows.append((run.name, run.optimizer, f"{last['step']:,}", f"{last['tokens']:,}", *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)])
    for row in rows:
        yield "| " + " | ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)) + " |"


def notes(runs):
    """What a reader of the table has to know, a sentence a line."""
    yield f"Losses are in {unit(runs)}; seconds are training only, without compilation, evaluation and checkpoints."
    for run in runs:
        if (step := run.evaluations[-1]["step"]) != run.max_iters:
            yield f"{run.name} is not finished: its numbers are those of step {step} of {run.max_iters}."
    if len({run.device for run in runs}) > 1:
        yield f"Seconds are of different devices: {', '.join(f'{run.name} on {run.device}' for run in runs)}."
    if len(runs) > 1:
        yield "Differences are to the first run, one seed each: no significance can be claimed."


def running_mean(curve, width):
    """Each row of `curve`, the steps and seconds too, as means over `width` neighbours; shorter by width - 1."""
    return [np.convolve(row, np.full(width, 1 / width), "valid") for row in curve]


def draw(runs, prefix):
    """Loss against steps and against seconds, as PREFIX.png and PREFIX.svg."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure  # without pyplot it draws with Agg, and opens no window
    except ImportError:
        raise UserError("a figure needs matplotlib: pip install matplotlib, or leave --out away.") from None
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    names, late = [Path(run.name).name for run in runs], []
    for i, run in enumerate(runs):
        *val_at, val = run.curve("val/loss")  # at steps and seconds
        *train_at, train = running_mean(curve := run.curve("train/loss"), max(1, round(SMOOTHING * curve.shape[1])))
        name = names[i] if names.count(names[i]) == 1 else run.name
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": ("-", "--", ":")[i // len(COLOURS) % 3]}
        for axes, train_x, val_x in zip(panels, train_at, val_at, strict=True):
            axes.plot(train_x, train, linewidth=0.8, alpha=0.5, **style)
            axes.plot(val_x, val, **STRONG, markevery=max(1, len(val) // 25), **style)
        panels[0].plot([], [], linewidth=1.8, label=f"{name} ({run.optimizer})", **style)
        late += [*train[train_at[0] >= val_at[0][-1] / 10], *val[val_at[0] >= val_at[0][-1] / 10]]
    panels[0].plot([], [], **STRONG, color="gray", label="val/loss")
    panels[0].plot([], [], linewidth=0.8, color="gray", label=f"train/loss, mean over {SMOOTHING:.0%} of the run")
    late = [loss for loss in late if math.isfinite(loss)] or [0, 1]
    margin = 0.05 * (max(late) - min(late)) or 0.1
    for axes, quantity in zip(panels, ("optimizer steps", "training time (seconds)"), strict=True):
        axes.set(xlabel=quantity, ylabel=f"loss ({unit(runs)})", xlim=(0, None))
        axes.set_ylim(min(late) - margin, max(late) + margin)  # a run's first tenth, its fall, may leave the frame
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        with rc_context({"svg.hashsalt": "compare"}):  # the same runs give the same file
            figure.savefig(f"{prefix}.png", dpi=150)
            figure.savefig(f"{prefix}.svg", metadata={"Date": None})
    except OSError as error:
        raise UserError(f"--out={prefix}: cannot write there ({error.strerror}); name another prefix.") from None


if __name__ == "__main__":
    command(main)
