"""The paper's further claims (arXiv:2305.14342, sections 3 and 4) at 30M on Python source text, a panel each.

    python experiments/results.py        # draws assets/claims.png when its data changed

The share of clipped steps, scale_attn_by_inverse_layer_idx, how sensitive Sophia-G (AdamW for the embeddings) is to rho
and beta2, and the share of the matrices in the blocks that it leaves unclipped.
"""

import numpy as np

from analysis.figures import COLOURS, log_ticks, new_figure

NAMES = {
    "adamw": "AdamW",
    "sophiag": "Sophia-G",
    "sophiag_adamw": "Sophia-G, AdamW\nfor embeddings",
    "sophiag_eigenbasis": "the same, in\nthe eigenbasis",
    "sophiah": "Sophia-H",
}
COLOUR = dict(zip(NAMES, COLOURS, strict=False))


def clipped(one):
    """The share of clipped steps of each run, in percent."""
    return [100 * run.curve("train/clip_rate", "step")[1][-1] for run in one.runs]


def draw_clipped(axes, python):
    """Bars: means for each optimizer and training horizon; dots: seeds."""
    lengths = sorted({length for _, length in python})
    for i, optimizer in enumerate(NAMES):
        own = [length for length in lengths if (optimizer, length) in python]
        for j, length in enumerate(own):
            values, place = clipped(python[optimizer, length]), i + (j - (len(own) - 1) / 2) * 0.8 / len(lengths)
            alpha = 0.35 + 0.65 * lengths.index(length) / (len(lengths) - 1)
            axes.bar(place, np.mean(values), 0.75 / len(lengths), color=COLOUR[optimizer], alpha=alpha)
            axes.plot(np.full(len(values), place), values, ".", color="black", markersize=4)
            axes.text(place, max(values) + 0.4, f"{length:,}", ha="center", va="bottom", fontsize=8, rotation=90)
    axes.set_xticks(range(len(NAMES)), NAMES.values(), fontsize=8)
    axes.axhline(10, color="gray", linewidth=1, linestyle="--")
    axes.margins(y=0.15)
    axes.set(ylabel="steps with a clipped gradient (%)", title="Clipped steps, by number of steps")
    note = "the paper: AdamW above the dashed line,\nSophia under 1%"
    axes.text(0.01, 0.97, note, transform=axes.transAxes, va="top", fontsize=8, color="gray")


def draw_attention(axes, python, attention):
    names = [name for name in NAMES if (name, 780) in attention]
    for i, name in enumerate(names):
        for shift, groups, alpha in ((-0.18, python, 0.4), (0.18, attention, 1.0)):
            one, style = groups[name, 780], {"fmt": "D", "capsize": 4, "color": COLOUR[name], "alpha": alpha}
            axes.errorbar(i + shift, one.losses.mean(), one.interval, **style)
            axes.plot(np.full(len(one.losses), i + shift), one.losses, ".", color="black", markersize=4)
    axes.set_xticks(range(len(names)), [NAMES[name] for name in names], fontsize=8)
    axes.set(ylabel="final val/loss (nats)", xlim=(-0.6, len(names) - 0.4))
    axes.set_title("scale_attn_by_inverse_layer_idx: without (pale), with; 780 steps", fontsize=10)


def draw_sensitivity(axes, python, runs):
    """A line over rho for each beta2, one seed a point; behind them the mean and 95% interval of the tuned AdamW."""
    points = {(run.config["rho"], run.config["beta2"]): run.final["val/loss"] for run in runs}
    rhos, betas = (sorted({key[i] for key in points}) for i in (0, 1))
    adamw = python["adamw", 780]
    low, high = adamw.losses.mean() - adamw.interval, adamw.losses.mean() + adamw.interval
    axes.axhspan(low, high, color=COLOUR["adamw"], alpha=0.15, linewidth=0)
    axes.axhline(adamw.losses.mean(), color=COLOUR["adamw"], linewidth=1, label="AdamW, mean and 95% interval")
    for i, beta2 in enumerate(betas):
        losses, alpha = [points[rho, beta2] for rho in rhos], 0.4 + 0.6 * i / (len(betas) - 1)
        style = {"color": COLOUR["sophiag_adamw"], "alpha": alpha, "label": f"beta2 {beta2:g}"}
        axes.plot(rhos, losses, marker="osD^"[i % 4], **style)
    axes.set(xlabel="rho", ylabel="final val/loss (nats)")
    log_ticks(axes, rhos, [f"{rho:g}" for rho in rhos])
    axes.set_title("rho and beta2, Sophia-G with AdamW for embeddings, 780 steps, one seed", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def draw_win_rates(axes, runs):
    """The share of the hidden matrices' coordinates that is not clipped, over the run, for each rho at beta2 0.99."""
    for run in sorted((run for run in runs if run.config["beta2"] == 0.99), key=lambda run: run.config["rho"]):
        steps, rates = run.curve("train/win_rate/matrices", "step")
        (line,) = axes.plot(steps, 100 * rates, linewidth=1.2)
        axes.annotate(f"rho {run.config['rho']:g}", (steps[-1], 100 * rates[-1]), color=line.get_color(), fontsize=8)
    axes.set(xlabel="optimizer steps", ylabel="coordinates not clipped (%)", ylim=(0, 104))
    axes.set_title("Win rate of the hidden matrices, beta2 0.99, the same runs", fontsize=10)


def draw_claims(prefix, python, attention, sensitivity):
    """Draw PREFIX.png. python, attention: {(optimizer, steps): group} of 30m_python and 30m_attn; the other: runs."""
    figure, panels = new_figure(2, 2, width=14, height=4.6)
    draw_clipped(panels[0], {key: one for key, one in python.items() if key[0] in NAMES})
    draw_attention(panels[1], python, attention)
    draw_sensitivity(panels[2], python, sensitivity)
    draw_win_rates(panels[3], sensitivity)
    figure.savefig(f"{prefix}.png", dpi=150)
