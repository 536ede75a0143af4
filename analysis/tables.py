"""The tables of compare.py, as lines of Markdown, and the notes below them."""

import math
import re
from itertools import pairwise

import numpy as np

from analysis.runs import SMOOTHING, loss_unit, unclean
from analysis.stats import ALPHA, baseline_horizons, baseline_needs, baseline_of, p_text, step_cost, verdict
from training.terminal import printable

WIDE = 2.5  # a larger factor between two horizons of the baseline is named beside speed-ups
COSTS = {"step": "steps", "tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}  # metric -> its name


def report(groups):
    """The lines that compare.py prints: final losses, stages, speed-ups, notes."""
    yield from markdown(loss_rows(groups), left=(0, HEADS.index("verdict")))
    for table in (stage_rows(groups), speed_rows(groups)):
        if rows := list(table):
            yield ""
            yield from markdown(rows, left=(0,))
    yield ""
    yield from map(plain, notes(groups))


STAGE = {"stage/length", "stage/clip_rate"}
HEADS = ["group", "seeds", "steps", "tokens", "final val/loss", "difference", "p", "verdict"]
MORE = ["train/loss", "accuracy", "seconds", "s/epoch", "tokens/s", "clipped"]  # those that no run has are left out


def loss_rows(groups):
    """The head and the rows, tuples of strings, of the table of final losses."""
    rows = []
    for group in groups:
        half, baseline, p, difference = group.interval, baseline_of(group, groups), None, ""
        loss = f"{group.losses.mean():.4f}" + (f" ± {half:.4f}" if half is not None else "")
        if not group.finished:
            words = group.unfinished
        elif group is groups[0]:
            words = "baseline"
        elif baseline is None:
            words = "no baseline at this horizon"
        elif baseline is group:
            words = "baseline of this size" if group.steps == groups[0].steps else "baseline at this horizon"
        else:
            p, words = verdict(group.losses, baseline.losses)
            difference = f"{group.losses.mean() - baseline.losses.mean():+.4f}"
        sizes = f"{len(group.runs)}", f"{group.mean('step'):,.0f}", f"{group.mean('tokens'):,.0f}"
        own = dict(zip(HEADS, (group.label, *sizes, loss, difference, p_text(p), words), strict=True))
        own |= {"seconds": "shared", "tokens/s": ""}
        for head, key, share, form in (
            ("train/loss", "train/loss", SMOOTHING, "{:.4f}"),
            ("accuracy", "val/accuracy", 0, "{:.2%}"),
            ("clipped", "train/clip_rate", 0, "{:.1%}"),
        ):
            ends = [run.late(key, share) for run in group.runs]
            if None not in ends:
                own[head] = form.format(np.mean(ends))
        if timed := group.timed:
            took, trained = (np.mean([run.final[key] for run in timed]) for key in ("seconds", "tokens"))
            own |= {"seconds": f"{took:,.1f}", "tokens/s": f"{trained / took:,.0f}" if took else ""}
            if all(run.final.get("epoch") for run in timed):
                own["s/epoch"] = f"{np.mean([run.final['seconds'] / run.final['epoch'] for run in timed]):,.1f}"
        rows.append(own)
    heads = [*HEADS, *(head for head in MORE if any(head in row for row in rows))]
    yield tuple(heads)
    for row in rows:
        yield tuple(row.get(head, "") for head in heads)


def stage_rows(groups):
    """The head and the rows of the table of the stages of block_size_schedule; nothing where no run has any.

    A row is a stage. Of each group with stages it has clipped steps in 1,000, and the loss at the full length after it.
    """
    cells, heads = {}, {}
    for group in groups:
        ends = [[line for line in run.evaluations if line.keys() >= STAGE] for run in group.runs]
        for lines in zip(*ends, strict=False):
            rate, loss = (np.mean([line[key] for line in lines]) for key in ("stage/clip_rate", "val/loss"))
            own = f"{group.label}: clipped in 1,000", f"{group.label}: val/loss"
            stage = cells.setdefault((lines[0]["step"], lines[0]["stage/length"]), {})
            stage |= dict(zip(own, (f"{1000 * rate:.0f}", f"{loss:.4f}"), strict=True))
            heads |= dict.fromkeys(own)
    if cells:
        yield "stage ends at step", "tokens in a sequence", *heads
    for (step, length), stage in sorted(cells.items()):
        yield f"{step:,}", f"{length:,}", *(stage.get(head, "") for head in heads)


def speed_rows(groups):
    """The head and the rows of the table of speed-ups; nothing unless the baseline has two training horizons.

    The column of FLOPs is left out where the runs do not log them.
    """
    others = [group for group in groups if group.optimizer != groups[0].optimizer and group.converged]
    rows = []
    for group in others:
        if len(baseline := baseline_horizons(group, groups)) < 2:
            continue
        horizons = [b.steps for b in baseline]
        needs = baseline_needs(horizons, [b.losses for b in baseline], group.losses)
        cells = {}
        for key in COSTS:
            ratio, why = step_cost(group, baseline, key)
            cells[key] = why or with_interval([n and n * ratio for n in needs], np.multiply(horizons, ratio), "{:.2f}")
        rows.append((group.label, f"{group.steps:,}", with_interval(needs, horizons, "{:,.0f}"), cells))
    costs = [key for key in COSTS if any(cells[key] != "not logged" for *_, cells in rows)]
    if rows:
        yield "speed-up [95% interval]", "steps", "baseline needs", *(f"in {COSTS[key]}" for key in costs)
    for *start, cells in rows:
        yield *start, *(cells[key] for key in costs)


def with_interval(values, horizons, form):
    """'1.37 [1.30, 1.45]'; a value outside of the baseline's horizons becomes a bound, with < or >."""

    def write(value):
        if value == 0:
            return "< " + form.format(horizons[0])
        return "> " + form.format(horizons[-1]) if math.isinf(value) else form.format(value)

    value, low, high = values
    return write(value) + (f" [{write(low)}, {write(high)}]" if low is not None else "")


def plain(text):
    """Escape `text` for Markdown: no name becomes a tag, formula, link, column or control character."""
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", printable(text))
    return re.sub(r"(?<!\\)([|$`]|(?<=\])\()", r"\\\1", " ".join(text.split()))


def markdown(rows, left):
    """Lines of an aligned Markdown table; `left`: the columns aligned to the left."""
    rows = [[plain(cell) for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths)])
    for row in rows:
        yield "| " + " | ".join(f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(row)) + " |"


def run_table(groups):
    """Every run with its final loss and its git commit."""
    rows = [("run", "group", "seed", "final val/loss", "seconds", "device", "commit")]
    for group in groups:
        for run in group.runs:
            numbers = f"{run.final['val/loss']:.4f}", "shared" if run.shared else f"{run.final['seconds']:,.1f}"
            commit = (run.commit or "none")[:7] + ("" if run.clean else " (not clean)")
            rows.append((run.name, group.label, str(run.config.get("seed", "")), *numbers, run.device, commit))
    return markdown(rows, left=(0, 1, 5, 6))


def notes(groups):
    """The notes below the tables, one sentence a line."""
    runs = [run for group in groups for run in group.runs]
    yield f"Losses are in {loss_unit(runs)}. Seconds: training time without compilation, evaluation and checkpoints."
    if any("train/loss" in line for run in runs for line in run.lines):
        yield f"train/loss: mean over the last {SMOOTHING:.0%} of the logged steps."
    if any("val/accuracy" in run.final for run in runs):
        yield "Accuracy: share of the evaluation's tokens that the model gives the highest probability."
    if any("train/clip_rate" in line for run in runs for line in run.lines[-2:]):
        yield "Clipped: share of steps whose gradient norm was above grad_clip."
    if any(len(group.runs) > 1 for group in groups):
        yield "±: half the width of Student's 95% interval of the mean over seeds."
    for run in runs:
        if run.changed:
            yield f"{run.name} changed {', '.join(run.changed)} at a resume: it is no seed of another row."
        elif not run.finished:
            step, last = run.final["step"], max(run.config["max_iters"], run.config.get("lr_decay_iters") or 0)
            yield f"{run.name} is not finished: its numbers are those of step {step} of {last}."
    if any(run.shared for run in runs):
        yield "Shared: other runs used the same GPU, or the run moved to other GPUs; these times are not compared."
    timed = [group for group in groups if group.timed]
    for group in timed:
        if len(group.timed) < len(group.runs):
            yield f"Seconds of {group.label}: mean of {len(group.timed)} of its {len(group.runs)} runs."
    if len(devices := sorted({group.timed[0].device for group in timed})) > 1:
        for device in devices:
            labels = "; ".join(group.label for group in timed if group.timed[0].device == device)
            yield f"Seconds on {device}: {labels}."
    if marked := [(group, len(unclean(group.runs))) for group in groups if unclean(group.runs)]:
        labels = "; ".join(f"{group.label} ({n} of {len(group.runs)} runs)" for group, n in marked)
        yield f"No clean git commit, so the exact code is unknown: {labels}."
    if len(groups) > 1:
        yield f"Better, worse: p < {ALPHA} in Welch's test, between finished runs with equal steps and 2 seeds or more."
        if not list(speed_rows(groups)):
            yield "No speed-up: this needs finished runs of the baseline's optimizer at two training horizons or more."
        else:
            yield "Speed-up: the baseline's cost of the same final loss, divided by this optimizer's cost."
            yield "< and >: the loss is outside the range of the baseline's final losses."
            horizons = {tuple(b.steps for b in baseline_horizons(group, groups)) for group in groups}  # by model size
            for short, long in sorted({gap for of_a_size in horizons for gap in pairwise(of_a_size)}):
                if long > WIDE * short:
                    yield f"No run of the baseline lies between {short:,} and {long:,} steps. A speed-up there also"
                    yield "depends on the interpolation, whose error is not in the interval."
