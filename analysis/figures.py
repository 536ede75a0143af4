"""The figures of compare.py, sweep.py and experiments/, in one style. Each is written as PNG and SVG.

figure, panels = new_figure(1, 2)
save(figure, "out/losses")     # out/losses.png and out/losses.svg
"""

import logging
import math
import re
from pathlib import Path

import numpy as np

from analysis.runs import SMOOTHING, loss_unit, size_name
from training.errors import UserError, file_errors
from training.terminal import printable

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home folder that cannot be written
COLOURS = (  # that colour-blind readers can tell apart
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9", "#882255", "#999999", "#7A5230"
)  # fmt: skip
DASHES = ("-", "--", ":", "-.", (0, (1, 3)), (0, (8, 2, 1, 2, 1, 2)))
MARKERS = "osD^vPX*"
LEGEND = 14  # with more groups, the legend names only optimizers, and train/loss is not drawn
STRONG = {"marker": "o", "markersize": 4, "linewidth": 1.8}  # for val/loss; train/loss is thin and light
QUANTITIES = {"optimizer steps": "step", "tokens": "tokens", "FLOPs": "flops", "training time (seconds)": "seconds"}
METERS = {  # metric -> label of its axis
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "train/clip_rate": "share of steps clipped so far",
    "train/win_rate": "win rate (coordinates not clipped)",
    "tokens_per_second": "tokens a second",
    "memory_gib": "peak memory (GiB)",
}


def new_figure(rows, columns, width=11, height=4.4):
    """(figure, array of its panels)."""
    from matplotlib.figure import Figure  # without pyplot no window opens

    figure = Figure(figsize=(width, height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def log_ticks(axes, ticks, labels=None):
    """Give a panel a logarithmic x-axis with these ticks and no others."""
    axes.set_xscale("log")
    axes.set_xticks(ticks, labels or [f"{tick:,}" for tick in ticks])
    axes.xaxis.minorticks_off()


def readable(name):
    """A name as matplotlib draws it: "$" starts no formula, "_" hides no label, control characters are written out."""
    return re.sub("^_", " _", printable(name).replace("$", r"\$"))


def save(figure, prefix):
    """Write PREFIX.png and PREFIX.svg; returns the name of the PNG."""
    from matplotlib import rc_context

    with file_errors(prefix, "name another --out"), rc_context({"svg.hashsalt": "sophia"}):  # the same file each time
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(f"{prefix}.png", dpi=150)
        figure.savefig(f"{prefix}.svg", metadata={"Date": None})
    return f"{prefix}.png"


def draw(groups, prefix, scaling=False):
    """Draw all figures of compare.py; returns the names of the PNGs."""
    unit = loss_unit([run for group in groups for run in group.runs])
    optimizers = list(dict.fromkeys(group.optimizer for group in groups))
    styles = []
    for i, group in enumerate(groups):
        before = sum(other.optimizer == group.optimizer for other in groups[:i])
        colour = optimizers.index(group.optimizer) if len(optimizers) > 1 else i
        dash = before if len(optimizers) > 1 else i // len(COLOURS)
        styles.append({"color": COLOURS[colour % len(COLOURS)], "linestyle": DASHES[dash % len(DASHES)]})
    styled = list(zip(groups, styles, strict=True))
    written = [draw_losses(styled, prefix, unit), draw_training(styled, f"{prefix}_training")]
    written.append(draw_finals(styled, f"{prefix}_final", unit))
    if any("val/accuracy" in run.final for group in groups for run in group.runs):
        written.append(draw_accuracy(styled, f"{prefix}_accuracy"))
    if scaling:
        written.append(draw_scaling(groups, f"{prefix}_scaling", unit))
    return written


def running_mean(curve, width):
    """Means over `width` neighbours of each row of `curve`; the rows become shorter by width - 1."""
    return [np.convolve(row, np.full(width, 1 / width), "valid") for row in curve]


def legend(figure, axes, styled, more=()):
    """A legend under the figure: the groups, or only the optimizers if there are many groups; then `more`."""
    entries = {}
    for group, style in styled:
        entries.setdefault(group.label if len(styled) <= LEGEND else group.optimizer, {"linewidth": 1.8, **style})
    for label, style in [*entries.items(), *more]:
        axes.plot([], [], label=readable(label), **style)
    columns = max(1, min(len(entries) + len(more), 110 // (8 + max(map(len, entries)))))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)


def draw_losses(styled, prefix, unit):
    """Draw loss against steps, tokens, FLOPs and seconds, without the steep fall at the beginning."""
    from matplotlib.ticker import EngFormatter

    logged = {key for group, _ in styled for run in group.runs for key in run.final}
    quantities = {name: key for name, key in QUANTITIES.items() if key in logged}  # older runs do not log FLOPs
    figure, panels = new_figure(2, 2) if len(quantities) == 4 else new_figure(1, len(quantities), width=15)
    late, many = [], len(styled) > LEGEND
    beginning = 0.6 if many else 0.1  # share of a run that does not set the range of losses
    for group, style in styled:
        common = set.intersection(*({line["step"] for line in run.evaluations} for run in group.runs))
        if not common:
            continue
        losses = [[line["val/loss"] for line in run.evaluations if line["step"] in common] for run in group.runs]
        losses = np.array(losses)
        late += list(losses[:, np.array(sorted(common)) >= max(common) * beginning].ravel())
        for axes, key in zip(panels, quantities.values(), strict=True):
            runs = (group.timed or group.runs) if key == "seconds" else group.runs
            for run in runs:
                curve = run.curve("train/loss", key)
                if many or not curve.size:
                    continue
                where, train = running_mean(curve, max(1, round(SMOOTHING * curve.shape[1])))
                axes.plot(where, train, linewidth=0.7, alpha=0.4, **style)
            where = [[line.get(key, np.nan) for line in run.evaluations if line["step"] in common] for run in runs]
            where = np.mean(where, axis=0)
            axes.plot(where, losses.mean(axis=0), **STRONG, markevery=max(1, len(where) // 25), **style)
            if len(group.runs) > 1:
                axes.fill_between(where, losses.min(axis=0), losses.max(axis=0), alpha=0.2, color=style["color"])
    late = [loss for loss in late if math.isfinite(loss)] or [0, 1]
    margin = 0.05 * (max(late) - min(late)) or 0.1
    for axes, quantity in zip(panels, quantities, strict=True):
        axes.set(xlabel=quantity, ylabel=f"loss ({unit})", xlim=(0, None))
        if not axes.lines or all(np.isnan(line.get_xdata()).all() for line in axes.lines):
            axes.text(0.5, 0.5, "these runs shared their GPU", transform=axes.transAxes, ha="center", color="gray")
        elif "seconds" in quantity and len({group.timed[0].device for group, _ in styled if group.timed}) > 1:
            axes.set_xlabel(f"{quantity}, of several devices")
        axes.set_ylim(min(late) - margin, max(late) + margin)
        if "seconds" not in quantity:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    val, train = STRONG | {"color": "gray"}, {"linewidth": 0.7, "color": "gray"}
    val_label = "val/loss, mean and range over seeds" if any(len(o.runs) > 1 for o, _ in styled) else "val/loss"
    thin = [] if many else [(f"train/loss, mean over {SMOOTHING:.0%} of the run", train)]
    legend(figure, panels[0], styled, [(val_label, val), *thin])
    return save(figure, prefix)


def draw_training(styled, prefix):
    """Draw learning rate, gradient norm, share of clipped steps, win rate, speed and memory against steps."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    figure, panels = new_figure(2, 3, width=14, height=3.8)
    for axes, (key, label) in zip(panels, METERS.items(), strict=True):
        curves = [(run.curve(key, "step"), style) for group, style in styled for run in group.runs]
        curves = [(curve, style) for curve, style in curves if curve.size]
        for curve, style in curves:
            where, values = running_mean(curve, 1 if key == "lr" else max(1, round(SMOOTHING * curve.shape[1])))
            axes.plot(where, values, linewidth=1.3, alpha=0.8, **style)
        axes.set(xlabel="optimizer steps", ylabel=label, xlim=(0, None))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if not curves:
            axes.text(0.5, 0.5, "not logged by these runs", transform=axes.transAxes, ha="center", color="gray")
            axes.set(xticks=[], yticks=[])
        elif key == "grad_norm" and any(curve[1].max() > 0 for curve, _ in curves):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        elif key != "lr":
            axes.set_ylim(0, None)
        if key == "tokens_per_second":
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    legend(figure, panels[0], styled)
    return save(figure, prefix)


def draw_accuracy(styled, prefix):
    figure, panels = new_figure(1, 2)
    for axes, (label, key) in zip(panels, {"optimizer steps": "step", "epochs": "epoch"}.items(), strict=True):
        for group, style in styled:
            for run in group.runs:
                axes.plot(*run.curve("val/accuracy", key), **STRONG, **style)
        axes.set(xlabel=label, ylabel="accuracy on the validation text", xlim=(0, None), ylim=(0, None))
    legend(figure, panels[0], styled)
    return save(figure, prefix)


def best_of_each(items, key, loss=lambda group: group.losses.mean()):
    """{key(item): the item with the lowest loss of those with that key}, sorted by key."""
    keys = sorted({key(group) for group in items})
    return {k: min((group for group in items if key(group) == k), key=loss) for k in keys}


def best_by_horizon(groups):
    """{steps: the best of these groups with so many}."""
    return best_of_each(groups, lambda group: group.steps)


def means_and_errors(groups):
    return [group.losses.mean() for group in groups], [group.interval or 0 for group in groups]


def draw_finals(styled, prefix, unit):
    """Draw each group's final losses, their mean and 95% interval; and, of several horizons, loss against steps."""
    finished = [(group, style) for group, style in styled if group.converged]
    horizons = len({group.steps for group, _ in finished}) > 1
    optimizers = list(dict.fromkeys(group.optimizer for group, _ in styled))
    styled = sorted(styled, key=lambda item: (optimizers.index(item[0].optimizer), item[0].steps))
    figure, panels = new_figure(1, 1 + horizons, width=13 if horizons else 8, height=max(2.5, 1.2 + 0.35 * len(styled)))
    places = np.arange(len(styled))[::-1]
    for place, (group, style) in zip(places, styled, strict=True):
        if (group, style) not in finished:
            at = {"transform": panels[0].get_yaxis_transform(), "va": "center", "ha": "center", "color": "gray"}
            panels[0].text(0.5, place, "diverged" if group.finished else group.unfinished, **at)
            continue
        losses, colour = group.losses, style["color"]
        panels[0].plot(losses, np.full(len(losses), place), "o", alpha=0.35, markersize=5, color=colour)
        panels[0].errorbar(losses.mean(), place, xerr=group.interval, fmt="D", capsize=4, color=colour)
    panels[0].set(xlabel=f"final val/loss ({unit}); mean, 95% interval, seeds", ylim=(-0.6, len(styled) - 0.4))
    panels[0].set_yticks(places, [readable(group.label) for group, _ in styled])
    if horizons:
        for optimizer in dict.fromkeys(group.optimizer for group, _ in finished):
            own = [(group, style) for group, style in finished if group.optimizer == optimizer]
            best = best_by_horizon([group for group, _ in own])
            style = STRONG | {"color": own[0][1]["color"], "label": readable(optimizer), "capsize": 4}
            panels[1].errorbar(list(best), *means_and_errors(best.values()), **style)
        panels[1].set_ylabel(f"final val/loss ({unit})")
        panels[1].set_xlabel("training steps of the complete schedule;\nthe best settings at each horizon")
        log_ticks(panels[1], sorted({group.steps for group, _ in finished}))
        panels[1].legend(frameon=False, fontsize=8, loc="upper right")
    return save(figure, prefix)


def draw_final_losses(groups, out, labels):
    """Draw one clean figure: mean final val/loss against training horizon, a curve for each optimizer.

    Bars are 95% intervals of the mean over seeds. Of several groups of an optimizer at one horizon the best is drawn.
    Points at the same horizon are moved apart a little, so that no bar hides another.

    labels: {optimizer, as in Group.optimizer: its name in the figure}; others are left out.
    out: the prefix of the PNG, whose name is returned, and of the SVG.
    """
    finished = [group for group in groups if group.converged]
    curves = {name: best_by_horizon([group for group in finished if group.optimizer == name]) for name in labels}
    curves = {name: best for name, best in curves.items() if best}
    if not curves:
        raise UserError(f"{out}: there is no finished run of {' or '.join(labels)}; give other labels.")
    figure, (axes,) = new_figure(1, 1, width=9, height=5.4)
    for i, (name, best) in enumerate(curves.items()):
        apart = 1.013 ** (i - (len(curves) - 1) / 2)
        means, errors = means_and_errors(best.values())
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 7}
        style |= {"label": readable(labels[name]), "linewidth": 2, "elinewidth": 1.5, "capsize": 4}
        axes.errorbar([steps * apart for steps in best], means, errors, **style)
    ticks = sorted({steps for best in curves.values() for steps in best})
    log_ticks(axes, ticks)
    axes.set_xlim(ticks[0] / 1.1, ticks[-1] * 1.1)
    axes.tick_params(labelsize=12)
    axes.set_xlabel("training steps of the complete schedule (log scale)", fontsize=13)
    axes.set_ylabel(f"final val/loss ({loss_unit([run for group in finished for run in group.runs])})", fontsize=13)
    lines, names = axes.get_legend_handles_labels()
    heights = [-min(best.items())[1].losses.mean() for best in curves.values()]
    order = sorted(range(len(names)), key=heights.__getitem__)
    axes.legend([lines[i] for i in order], [names[i] for i in order], frameon=False, fontsize=13, loc="upper right")
    return save(figure, out)


def draw_speedups(by_horizon, by_size, literature, prefix):
    """Draw speed-ups over AdamW in steps, with 95% intervals: against training horizon, and against model size.

    by_horizon: {optimizer's name: [(steps, speed-up, low, high, beyond)]}; beyond is 1 or -1 for a point that is only a
    lower or an upper bound and gets an arrow, else 0. by_size: the same with the number of parameters for steps.
    literature: {label: [(parameters, speed-up)]}.
    """
    figure, panels = new_figure(1, 2, width=13, height=5)
    for axes, curves in zip(panels, (by_horizon, by_size), strict=True):
        for i, (name, points) in enumerate(curves.items()):
            colour, apart = COLOURS[1 + list(by_horizon).index(name)], 1.04 ** (i - (len(curves) - 1) / 2)
            for x, value, low, high, beyond in points:
                style = {"fmt": "o", "fillstyle": "none" if beyond else "full", "capsize": 4, "color": colour}
                axes.errorbar(x * apart, value, [[value - low], [high - value]] if low < high else None, **style)
                if beyond:
                    arrow = {"arrowstyle": "->", "color": colour}
                    axes.annotate("", (x * apart, value + 0.12 * beyond), (x * apart, value), arrowprops=arrow)
            where, values = zip(*[(x * apart, value) for x, value, *_ in points], strict=True)
            axes.plot(where, values, color=colour, label=readable(name), linewidth=1.5 if axes is panels[0] else 0)
        axes.axhline(1, color=COLOURS[0], linewidth=1.5, label="AdamW")
        axes.set(ylim=(0.6, 2.35), ylabel="AdamW's steps for the same loss / own steps")
    ticks = sorted({x for points in by_horizon.values() for x, *_ in points})
    log_ticks(panels[0], ticks)
    panels[0].set(xlim=(ticks[0] / 1.15, ticks[-1] * 1.15))
    panels[0].set_xlabel("training steps of the complete schedule (log scale)")
    panels[0].legend(frameon=False, loc="upper right")
    for (label, points), style in zip(literature.items(), ("s--", "*"), strict=True):
        panels[1].plot(*zip(*points, strict=True), style, color="gray", markersize=9, label=label)
    panels[1].plot([], [], "o", color="black", fillstyle="none", label="arrow: a bound")
    largest = max(x for points in literature.values() for x, _ in points)
    sizes = sorted({x for points in by_size.values() for x, *_ in points} | {largest})  # 130M has no room beside 124M
    log_ticks(panels[1], sizes, [size_name(size) for size in sizes])
    handles, labels = panels[1].get_legend_handles_labels()
    panels[1].legend(handles[-3:], labels[-3:], frameon=False, loc="upper right")
    panels[1].set(xlim=(sizes[0] / 1.4, sizes[-1] * 1.4), xlabel="parameters (log scale)")
    return save(figure, prefix)


def draw_scaling(groups, prefix, unit):
    """Draw final loss against model size for each optimizer, with a fitted power law from three sizes on."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter
    from scipy import stats

    figure, (axes,) = new_figure(1, 1, width=8, height=5)
    finished = [group for group in groups if group.converged]
    ticks = sorted({group.parameters for group in finished})
    for i, optimizer in enumerate(dict.fromkeys(group.optimizer for group in finished)):
        best = best_of_each([g for g in finished if g.optimizer == optimizer], lambda group: group.parameters)
        sizes, (losses, error) = list(best), means_and_errors(best.values())
        label, colour = readable(optimizer), COLOURS[i % len(COLOURS)]
        if len(sizes) > 2 and min(losses) > 0:
            fit = stats.linregress(np.log(sizes), np.log(losses))
            half = stats.t.ppf(0.975, len(sizes) - 2) * fit.stderr
            label += f": loss ∝ N^({fit.slope:.4f} ± {half:.4f})"
            axes.plot(sizes, np.exp(fit.intercept) * np.power(sizes, fit.slope), "--", linewidth=1, color=colour)
        axes.errorbar(sizes, losses, error, fmt="o", capsize=4, color=colour, label=label)
    positive = all(group.losses.min() > 0 for group in finished)  # 0 has no place on a log scale
    axes.set(xlabel="parameters (N)", ylabel=f"final val/loss ({unit})", yscale="log" if positive else "linear")
    log_ticks(axes, ticks, [size_name(n) for n in ticks])
    axes.yaxis.minorticks_off()
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.legend(frameon=False)
    return save(figure, prefix)


def draw_sweep(trials, out_dir):
    """Draw loss against each swept setting, and a heat map for optimizers that sweep two; the names of the PNGs.

    A grid search gets a line through the best run at each value. A random search gets a star at its best run only: a
    line would favour the value that was drawn most often. Its heat map has empty cells.
    trials: those of sweep.py, with `optimizer`, `swept` (setting -> value) and `loss`, inf if it failed or diverged.
    """
    from matplotlib.transforms import ScaledTranslation

    written, optimizers = [], list(dict.fromkeys(trial.optimizer for trial in trials))
    for key in dict.fromkeys(key for trial in trials for key in trial.swept):
        if len({trial.swept[key] for trial in trials if key in trial.swept}) == 1:
            continue
        figure, (axes,) = new_figure(1, 1, width=7.5, height=4.8)
        here = [trial for trial in trials if key in trial.swept]
        losses = [trial.loss for trial in here if math.isfinite(trial.loss)] or [0, 1]
        above = max(losses) + 0.06 * ((max(losses) - min(losses)) or 1)  # the height of runs that failed
        notes = {}
        for i, optimizer in enumerate(optimizers):
            own = [trial for trial in here if trial.optimizer == optimizer]
            if not own:
                continue
            finite = [trial for trial in own if math.isfinite(trial.loss)]
            style, strong = {"color": COLOURS[i % len(COLOURS)]}, {"marker": "o"}
            if is_grid(own):
                best = best_of_each(finite, lambda trial, key=key: trial.swept[key], lambda trial: trial.loss).values()
                notes["line: best over the other settings"] = True
            else:
                best = sorted(finite, key=lambda trial: trial.loss)[:1]
                strong = {"marker": "*", "markersize": 13, "markeredgecolor": "black", "linestyle": "none"}
                notes["star: best run"] = True
            values, heights = [trial.swept[key] for trial in best], [trial.loss for trial in best]
            lines = axes.plot(values, heights, label=readable(optimizer), **style, **strong)
            for trial in own:
                place = trial.swept[key], above if math.isinf(trial.loss) else trial.loss
                lines += axes.plot(*place, "x" if math.isinf(trial.loss) else "o", alpha=0.35, **style)
            if not is_grid(own):  # optimizers share values, so draw them side by side
                points = 4 * (i - (len(optimizers) - 1) / 2)
                for line in lines:
                    line.set_transform(axes.transData + ScaledTranslation(points / 72, 0, figure.dpi_scale_trans))
        if any(math.isinf(trial.loss) for trial in here):
            axes.plot([], [], "x", color="gray", label="failed or diverged")
        places = sorted({trial.swept[key] for trial in here})
        numbers = all(isinstance(place, int | float) for place in places)
        if numbers and min(places) > 0 and max(places) > 4 * min(places):
            log_ticks(axes, places)
        axes.set_xticks(places, [tick(place) for place in places], rotation=45 if len(places) > 3 else 0)
        axes.set(xlabel=key, ylabel=f"final val/loss\n({'; '.join(notes)})")
        figure.legend(loc="outside lower center", ncols=5, frameon=False)
        written.append(save(figure, f"{out_dir}/sweep_{key}"))
    for optimizer in optimizers:
        own = [trial for trial in trials if trial.optimizer == optimizer]
        if len(own[0].swept) == 2:
            written.append(heat_map(own, f"{out_dir}/sweep_{optimizer}"))
    return written


def is_grid(trials):
    """Whether an optimizer's trials are all combinations of their values."""
    return len(trials) == math.prod(len({trial.swept[key] for trial in trials}) for key in trials[0].swept)


def tick(value):
    return f"{value:g}" if isinstance(value, int | float) else readable(str(value))


def heat_map(trials, prefix):
    """Draw the loss over two swept settings as a table of coloured cells."""
    down, across = trials[0].swept
    rows, columns = (sorted({trial.swept[key] for trial in trials}) for key in (down, across))
    losses = np.full((len(rows), len(columns)), np.nan)
    for trial in trials:
        losses[rows.index(trial.swept[down]), columns.index(trial.swept[across])] = trial.loss
    figure, (axes,) = new_figure(1, 1, width=2.5 + 1.0 * len(columns), height=1.5 + 0.7 * len(rows))
    axes.grid(False)
    shown = axes.imshow(np.ma.masked_invalid(losses), cmap="viridis_r", aspect="auto")
    for (i, j), loss in np.ndenumerate(losses):
        dark = math.isfinite(loss) and shown.norm(loss) > 0.5
        text = "" if math.isnan(loss) else f"{loss:.3f}" if math.isfinite(loss) else "diverged"
        axes.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
    axes.set(xlabel=across, ylabel=down, title=readable(trials[0].optimizer))
    axes.set_xticks(range(len(columns)), [tick(value) for value in columns])
    axes.set_yticks(range(len(rows)), [tick(value) for value in rows])
    figure.colorbar(shown, ax=axes, label="final val/loss")
    return save(figure, prefix)
