"""Finished runs side by side: tables with a verdict and, with --out, the same as Markdown, and figures.

python compare.py out/demo_adam out/demo_sophiag --out=out/demo
python compare.py out/adamw_*steps_seed* out/sophiag_seed* --out=assets/python_30m

It reads metrics.jsonl and config.json in each run's folder; runs that differ in nothing but the seed are one row. The
first run is the baseline. Runs on other data, batches or evaluations are refused.

What is claimed, and when:
- Losses are those of a run's last step, and only of runs whose schedule was finished. Nothing is read in mid-run.
- "better" and "worse" want two seeds or more on both sides, as many steps, and p < 0.01 in Welch's two-sided t-test.
  (0.01 and not 0.05: with five optimizers against one baseline, one false claim in 20 such tables.)
- A speed-up is what the baseline needs for the same final loss, over what this optimizer took. It is read off the
  final losses of the baseline's runs of several lengths, each its own schedule (of each length the best settings),
  interpolated monotonically on log steps, and never outside of them. Its 95% interval follows the spread of the seeds,
  not the error of the interpolation: gaps of more than 2.5 times between two of the baseline's lengths are named.
- In seconds, a step takes what it took in the runs that had their device alone, of both sides on the same device.
"""

import json
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from figures import draw, size_name
from training.errors import Parser, UserError, command
from training.metrics import CONFIG, METRICS, STATE, read_metrics

ALPHA = 0.01
WIDE = 2.5  # a gap between two lengths of the baseline, above which a speed-up comes with a warning
LINES = 1000  # of a run's metrics are enough for any figure
NOT_SETTINGS = {"seed", "out_dir", "overwrite", "init_from", "wandb_log", "wandb_project", "wandb_run_name"}
SHAPE = {"n_layer", "n_head", "n_embd"}  # the model's size says it
FOLLOW = {"lr_decay_iters": "max_iters", "min_lr": "learning_rate"}  # settings that differ where others do


@dataclass
class FinishedRun:
    """What is read of a run. shared: whether its device was, so that its times, here NaN, say nothing; conditions: name
    -> value of all that two runs must have in common to be compared; lines: some of its metrics, with their "flops";
    evaluations: the lines with a val/loss, infinite where it was not finite."""

    name: str
    config: dict
    parameters: int
    device: str
    shared: bool
    conditions: dict
    lines: list
    evaluations: list

    @property
    def final(self):
        return self.evaluations[-1]

    @property
    def finished(self):
        """Whether it went through the whole of its own schedule."""
        return self.final["step"] == self.config["max_iters"] >= (self.config.get("lr_decay_iters") or 0)

    def curve(self, key, against):
        """(where, values) of a metric, an array each."""
        points = [(line[against], line[key]) for line in self.lines if key in line and against in line]
        points = np.array(points, dtype=float).reshape(-1, 2)
        return points[~np.isnan(points).any(axis=1)].T


@dataclass
class Group:
    """Runs of the same settings with different seeds."""

    runs: list
    label: str = ""

    @property
    def optimizer(self):
        """Its name; Sophia with AdamW for some groups of parameters, or in an eigenbasis, is another than without."""
        config = self.runs[0].config
        parts = [config["optimizer_name"], *(name for name in ("eigenbasis", "spectral") if config.get(name))]
        return "+".join([*parts, *(["adamw"] if config.get("adamw_for", "none") != "none" else [])])

    @property
    def steps(self):
        return self.runs[0].config["max_iters"]

    @property
    def finished(self):
        return all(run.finished for run in self.runs)

    @property
    def timed(self):
        """The runs whose seconds count: alone on their device, and on that which most of those had."""
        return max(alone_on_devices(self.runs).values(), key=len, default=[])

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
        """Mean of what the runs had taken at their last step."""
        return float(np.mean([run.final[key] for run in self.runs]))


def alone_on_devices(runs):
    """{device: the runs that had one to themselves}, in the order of the devices' names."""
    devices = sorted({run.device for run in runs if not run.shared})
    return {device: [run for run in runs if run.device == device and not run.shared] for device in devices}


def main(words=None):
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the out_dir of a run; the first is the baseline")
    parser.add_argument("--out", metavar="PREFIX", help="write the tables to PREFIX.md, draw PREFIX.png, .svg and more")
    parser.add_argument("--force", action="store_true", help="compare runs although they are not comparable")
    parser.add_argument("--scaling", action="store_true", help="allow several model sizes; loss against size")
    parser.add_argument("--wandb", action="store_true", help="upload the figures to the baseline's wandb_project")
    arguments = parser.parse_args(words)
    if arguments.wandb and not arguments.out:
        raise UserError("--wandb uploads the figures of --out=PREFIX; name a prefix.")
    runs = [read_run(folder) for folder in arguments.runs if Path(folder).name != STATE]  # of a whole sweep's folder/*
    if not runs:
        raise UserError(f"{arguments.runs[0]} is a sweep's record: name the out_dir of a run.")
    if not arguments.force:
        check_comparable(runs, arguments.scaling)
    groups = group(runs)
    text = "\n".join(report(groups)) + "\n"
    print(text, end="")
    if arguments.out:
        figures = draw(groups, arguments.out, unit(runs), arguments.scaling)
        Path(f"{arguments.out}.md").write_text(text + "\n" + "\n".join(run_table(groups)) + "\n", encoding="utf-8")
        print(f"wrote {arguments.out}.md, {', '.join(figures)}; each figure as .svg too")
        if arguments.wandb:
            upload(figures, runs[0].config.get("wandb_project"), Path(arguments.out).name)


# ----- reading


def read_run(folder):
    """The run in `folder`. UserError where its files are missing or damaged, or it was never evaluated."""
    metrics, path = Path(folder, METRICS), Path(folder, CONFIG)
    for file in (metrics, path):
        if not file.is_file():
            raise UserError(f"{file} is missing: name the out_dir of a run.")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        config, data, model = facts["config"], facts["data"], facts["model"]
        conditions = {
            "training data (SHA-256)": data["train_sha256"],
            "validation data (SHA-256)": data["val_sha256"],
            "tokenizer": facts["tokenizer"],
            "total_bs * block_size": config["total_bs"] * config["block_size"],
            "block_size": config["block_size"],
            "eval_tokens": config["eval_tokens"],
            "model parameters": model["num_params"],
        }
        for key, kind in (("optimizer_name", str), ("max_iters", int), ("lr_decay_iters", int | None)):
            if not isinstance(config.get(key), kind):
                raise TypeError(f"{key} = {config.get(key)!r}")
        device, flops = f"{facts['world_size']} x {facts['device_name']}", flops_of_steps(config, model)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); name another run.") from None
    lines = [line for line in read_metrics(metrics, about=LINES) if is_whole(line)]
    for line in lines:
        line["flops"] = flops(line["step"])
        if "val/loss" in line and line["val/loss"] is None:
            line["val/loss"] = math.inf
    evaluations = [line for line in lines if "val/loss" in line]
    if not evaluations:
        raise UserError(f"{metrics} has no val/loss: the run was never evaluated; name another run.")
    shared = facts.get("shared_device", False)
    for line in lines if shared else ():
        line |= {key: math.nan for key in ("seconds", "tokens_per_second", "mfu") if key in line}
    return FinishedRun(str(folder), config, model["num_params"], device, shared, conditions, lines, evaluations)


def is_whole(line):
    """Whether a line of metrics knows where it is, and holds nothing but numbers (null where one was not finite)."""
    known = all(isinstance(line.get(key), int | float) for key in ("tokens", "seconds"))
    return known and all(value is None or isinstance(value, int | float) for value in line.values())


def flops_of_steps(config, model):
    """Step -> FLOPs of the steps before it: forward and backward passes, those of the curvature estimates too; not the
    optimizer's arithmetic.

    A sampled-label gradient costs as much as a training gradient; a Hessian-vector product about three times that:
    the backward pass (twice the forward's work) is differentiated with the forward pass. Shorter sequences of a
    block_size_schedule save their part of attention; a late Sophia estimates nothing before its first step.
    """
    estimates, late = {"sophiag": 1, "sophiah": 3}.get(config["optimizer_name"], 0), config.get("sophia_start_iter", 0)
    if estimates:
        estimates *= config["hess_bs"] / config["total_bs"] / config["hess_interval"]
    schedule = config.get("block_size_schedule") or f"0:{config['block_size']}"
    lengths = dict(tuple(int(number) for number in phase.split(":")) for phase in schedule.split(","))
    starts = sorted({late, *lengths})
    rates, length = [], None
    for start in starts:
        length = lengths.get(start, length)
        saved = 0
        if length != config["block_size"]:
            saved = 12 * model["n_layer"] * model["n_embd"] * (config["block_size"] - length)
        rates.append((model["flops_per_token"] - saved) * (1 + (estimates if start >= late else 0)))
    tokens = config["total_bs"] * config["block_size"]

    def until(step):
        ends = [*starts[1:], math.inf]
        parts = zip(starts, ends, rates, strict=True)
        return sum(max(0, min(step, end) - start) * tokens * rate for start, end, rate in parts)

    return until


def check_comparable(runs, scaling=False):
    """UserError that names what a run differs in from the first; with `scaling`, model sizes may."""
    for run in runs[1:]:
        pairs = ((name, runs[0].conditions[name], value) for name, value in run.conditions.items())
        differing = [
            f"{name} ({other!s:.16}, not {one!s:.16})"
            for name, one, other in pairs
            if one != other and not (scaling and name == "model parameters")
        ]
        if differing:
            raise UserError(f"{run.name} differs from {runs[0].name} in {', '.join(differing)}; --force allows it.")


def group(runs):
    """The runs as groups of seeds, in the order of their first runs, with labels that tell them apart."""
    groups, settings, labels = {}, {}, set()
    for run in runs:
        used = {k: v for k, v in run.config.items() if v not in (None, "none") and v is not False}
        own = {k: v for k, v in used.items() if k not in NOT_SETTINGS}  # what is not in use, or not known yet, is alike
        key = json.dumps([own, run.conditions], sort_keys=True)
        for other in groups.setdefault(key, Group([])).runs:
            if other.config.get("seed") == run.config.get("seed"):
                raise UserError(f"{run.name} is {other.name} again (same settings, same seed); leave one of them away.")
        groups[key].runs.append(run)
        settings[key] = own
    for key, one in groups.items():
        rivals = [settings[other] for other in groups if groups[other].optimizer == one.optimizer]
        differing = [name for name in settings[key] if any(r.get(name) != settings[key][name] for r in rivals)]
        differing = [name for name in differing if FOLLOW.get(name) not in differing]
        parts = [f"{name}={settings[key][name]}" for name in differing if name not in SHAPE]
        folder = re.sub(r"[._-]*s(eed)?[=_-]?\d+$", "", Path(one.runs[0].name).name)
        size = [size_name(one.runs[0].parameters)] if len({run.parameters for run in runs}) > 1 else []
        one.label = ", ".join([one.optimizer, *size, *(parts if len(parts) <= 3 else [folder])])
        if one.label in labels:  # they differ in what --force allows
            one.label += f", {folder}"
        labels.add(one.label)
    return list(groups.values())


# ----- statistics


def verdict(ours, theirs):
    """(p of Welch's test or None, the verdict in words) on two groups' final losses: the rule at the top."""
    from scipy import stats

    if diverged := int(np.sum(~np.isfinite(ours))):
        return None, f"diverged in {diverged} of {len(ours)}"
    if min(len(ours), len(theirs)) < 2:
        return None, "no claim: one seed"
    if not np.isfinite(theirs).all() or not (np.ptp(ours) or np.ptp(theirs)):
        return None, "no claim: the baseline diverged" if np.ptp(ours) else "no claim: seeds do not differ"
    p = float(stats.ttest_ind(ours, theirs, equal_var=False).pvalue)
    if p < ALPHA:
        return p, "better" if np.mean(ours) < np.mean(theirs) else "worse"
    return p, f"no difference shown with n = {len(ours)} and {len(theirs)}"


def baseline_of(one, groups):
    """The group that `one` is held against: of the baseline's optimizer, as long, as large; None if there is none.

    It is the first run's group or, at other lengths and sizes, the best.
    """
    found = [
        g
        for g in groups
        if g.optimizer == groups[0].optimizer and g.finished and g.steps == one.steps
        and g.runs[0].parameters == one.runs[0].parameters
    ]  # fmt: skip
    if groups[0] in found:
        return groups[0]
    return min(found, key=lambda g: g.losses.mean(), default=None)


def baseline_lengths(one, groups):
    """The baseline's groups of `one`'s model size, one a length, the shortest first."""
    same = [g for g in groups if g.optimizer == groups[0].optimizer and g.runs[0].parameters == one.runs[0].parameters]
    found = {g.steps: baseline_of(g, groups) for g in same if g.finished}
    return [found[steps] for steps in sorted(found) if np.isfinite(found[steps].losses).all()]


def steps_needed(lengths, losses, target):
    """Steps at which curves through `losses` (n, k) at `lengths` (k,) first come down to `target` (n,).

    Monotone cubic interpolation on log steps. 0 where the shortest is below the target, inf where none gets there.
    """
    from scipy.interpolate import PchipInterpolator

    grid = np.linspace(math.log(lengths[0]), math.log(lengths[-1]), 513)
    above = PchipInterpolator(np.log(lengths), losses, axis=1)(grid) - target[:, None]
    first = np.argmax(above <= 0, axis=1)
    last = np.maximum(first - 1, 0)
    rows = np.arange(len(target))
    fall = above[rows, last] - above[rows, first]
    share = np.divide(above[rows, last], fall, out=np.zeros_like(fall), where=fall > 0)
    steps = np.exp(grid[last] + share * (grid[first] - grid[last]))
    steps = np.where(above[:, 0] < 0, 0.0, steps)
    return np.where((above > 0).all(axis=1), np.inf, steps)


def baseline_needs(lengths, baseline, ours, draws=4000):
    """(steps, low, high) that the baseline needs for the mean of the losses `ours`; low and high None without seeds.

    lengths: its steps; baseline: the final losses at each. The interval is of draws of all means at once from what is
    known of them: Student's distribution around each, with one variance of the seeds for all, as few seeds allow.
    """
    samples = [*baseline, ours]
    means, counts = (np.array([f(s) for s in samples], dtype=float) for f in (np.mean, len))
    steps = steps_needed(lengths, means[None, :-1], means[-1:])[0]
    freedom = int(counts.sum()) - len(samples)
    if freedom < 1 or len(ours) < 2:
        return steps, None, None
    spread = math.sqrt(sum(float(np.var(s)) * len(s) for s in samples) / freedom)
    random = np.random.default_rng(0)  # the same runs give the same interval
    scale = spread * np.sqrt(freedom / random.chisquare(freedom, (draws, 1)))
    drawn = means + scale * random.standard_normal((draws, len(samples))) / np.sqrt(counts)
    needed = np.sort(steps_needed(lengths, drawn[:, :-1], drawn[:, -1]))
    return steps, needed[int(0.025 * draws)], needed[int(0.975 * draws)]


# ----- tables


def unit(runs):
    """What a loss is measured in."""
    return "nats a character" if all(isinstance(r.conditions["tokenizer"], dict) for r in runs) else "nats a token"


def report(groups):
    """The lines that are printed: the table of losses, that of speed-ups, and what a reader has to know."""
    yield from markdown(loss_rows(groups), left=(0, 7))
    if rows := list(speed_rows(groups)):
        yield ""
        yield from markdown(rows, left=(0,))
    yield ""
    yield from notes(groups)


def loss_rows(groups):
    heads = "group,seeds,steps,tokens,final val/loss,difference,p,verdict,seconds,tokens/s,clipped"
    yield tuple(heads.split(","))
    for one in groups:
        half, other, p, difference = one.interval, baseline_of(one, groups), None, ""
        loss = f"{one.losses.mean():.4f}" + (f" ± {half:.4f}" if half is not None else "")
        if not one.finished:
            words = "not finished"
        elif one is groups[0]:
            words = "baseline"
        elif other is None:
            words = "no baseline as long"
        elif other is one:
            words = "baseline of this size" if one.steps == groups[0].steps else "baseline of this length"
        else:
            p, words = verdict(one.losses, other.losses)
            difference = f"{one.losses.mean() - other.losses.mean():+.4f}"
        steps, tokens = one.mean("step"), one.mean("tokens")
        times = "shared", ""
        if timed := one.timed:
            took, trained = (np.mean([run.final[key] for run in timed]) for key in ("seconds", "tokens"))
            times = f"{took:,.1f}", f"{trained / took:,.0f}" if took else ""
        p = "" if p is None else f"{p:.4f}" if p >= 1e-4 else f"{p:.0e}"
        sizes = f"{len(one.runs)}", f"{steps:,.0f}", f"{tokens:,.0f}"
        rates = [run.curve("train/clip_rate", "step")[1][-1:] for run in one.runs]
        clipped = f"{np.mean(rates):.1%}" if all(len(rate) for rate in rates) else ""
        yield one.label, *sizes, loss, difference, p, words, *times, clipped


def speed_rows(groups):
    """Rows of the table of speed-ups, none where the baseline has not two lengths."""
    candidates = [(g, baseline_lengths(g, groups)) for g in groups if g.optimizer != groups[0].optimizer and g.finished]
    candidates = [(g, b) for g, b in candidates if len(b) > 1 and np.isfinite(g.losses).all()]
    if candidates:
        yield "speed-up [95% interval]", "steps", "baseline needs", "in steps", "in tokens", "in FLOPs", "in seconds"
    for one, baseline in candidates:
        lengths = [b.steps for b in baseline]
        needs = baseline_needs(lengths, [b.losses for b in baseline], one.losses)
        cells = [with_interval(needs, lengths, "{:,.0f}")]
        ours, theirs = one.runs, [run for b in baseline for run in b.runs]
        for key in ("step", "tokens", "flops", "seconds"):
            if key == "seconds":  # what a step takes is measured on one device, the losses may be of any
                timed, others = alone_on_devices(ours), alone_on_devices(theirs)
                if not timed or not others:
                    cells.append("shared")
                    continue
                if not timed.keys() & others:
                    cells.append("other devices")
                    continue
                device = max((device for device in timed if device in others), key=lambda device: len(timed[device]))
                ours, theirs = timed[device], others[device]
            took = np.mean([run.final[key] for run in ours])
            factor = np.mean([run.final[key] / run.final["step"] for run in theirs]) / took if took else math.nan
            cells.append(with_interval([n and n * factor for n in needs], np.multiply(lengths, factor), "{:.2f}"))
        yield one.label, f"{one.steps:,}", *cells


def with_interval(values, lengths, form):
    """'1.37 [1.30, 1.45]'; what lies outside of the baseline's lengths is said to, with < or >."""

    def write(value):
        if value == 0:
            return "< " + form.format(lengths[0])
        return "> " + form.format(lengths[-1]) if math.isinf(value) else form.format(value)

    value, low, high = values
    return write(value) + (f" [{write(low)}, {write(high)}]" if low is not None else "")


def markdown(rows, left):
    """Lines of an aligned Markdown table; `left`: the columns of text."""
    rows = list(rows)
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths)])
    for row in rows:
        yield "| " + " | ".join(f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(row)) + " |"


def run_table(groups):
    """Every run with its own final loss."""
    rows = [("run", "group", "seed", "final val/loss", "seconds", "device")]
    for one in groups:
        for run in one.runs:
            numbers = f"{run.final['val/loss']:.4f}", "shared" if run.shared else f"{run.final['seconds']:,.1f}"
            rows.append((run.name, one.label, str(run.config.get("seed", "")), *numbers, run.device))
    return markdown(rows, left=(0, 1, 5))


def notes(groups):
    """What a reader of the tables has to know, a sentence a line."""
    runs = [run for one in groups for run in one.runs]
    yield f"Losses are in {unit(runs)}; seconds are training only, without compilation, evaluation and checkpoints."
    if any("train/clip_rate" in line for run in runs for line in run.lines[-2:]):
        yield "Clipped: share of steps whose gradient norm was above grad_clip."
    if any(len(one.runs) > 1 for one in groups):
        yield "± is half of Student's 95% interval of the mean over seeds."
    for run in runs:
        if not run.finished:
            step, last = run.final["step"], max(run.config["max_iters"], run.config.get("lr_decay_iters") or 0)
            yield f"{run.name} is not finished: its numbers are those of step {step} of {last}."
    if any(run.shared for run in runs):
        yield "Shared: the runs had company on their device, so their times say nothing."
    timed = [one for one in groups if one.timed]
    for one in timed:
        if len(one.timed) < len(one.runs):
            yield f"Seconds of {one.label} are of {len(one.timed)} of its {len(one.runs)} runs."
    if len(devices := sorted({one.timed[0].device for one in timed})) > 1:
        for device in devices:
            yield f"Seconds on {device}: {'; '.join(one.label for one in timed if one.timed[0].device == device)}."
    if len(groups) > 1:
        yield f"Better, worse: p < {ALPHA} in Welch's test, two seeds or more each, equally long finished runs."
        if not list(speed_rows(groups)):
            yield "No speed-up: that takes finished runs of two lengths or more of the baseline's optimizer."
        else:
            yield "Speed-up: what the baseline needs for the same final loss over what this took; < and >: outside of"
            yield "the lengths that the baseline was trained for."
            lengths = {tuple(b.steps for b in baseline_lengths(one, groups)) for one in groups}  # by model size
            for short, long in sorted({gap for of_a_size in lengths for gap in pairwise(of_a_size)}):
                if long > WIDE * short:
                    yield f"No run of the baseline lies between {short:,} and {long:,} steps: there a speed-up depends"
                    yield "on the interpolation too, and its interval does not say how much."


def upload(figures, project, name):
    """The figures as a wandb run of its own."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs a package: pip install wandb, or leave --wandb away.") from None
    with wandb.init(project=project, name=name, job_type="compare") as run:
        run.log({Path(figure).stem: wandb.Image(str(figure)) for figure in figures})


if __name__ == "__main__":
    command(main)
