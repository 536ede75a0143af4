"""Update the generated tables of README.md and docs/*.md, and the figures of final losses and claims.

python experiments/results.py            # rewrites what stands between <!-- generated: NAME --> and <!-- end -->
python experiments/results.py --check    # changes nothing; fails when a table or a figure is not that of the runs

Losses come from experiments/*/runs, speeds from assets/bench/*.json, settings from the dataclasses.
"""

import hashlib
import json
import re
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from analysis.figures import draw_final_losses, draw_speedups
from analysis.runs import group, read_run, read_sweep, unclean
from analysis.stats import baseline_needs, p_text, step_cost, verdict
from analysis.tables import markdown, with_interval
from benchmarks.report import GPT2_SIZES, markdown_table
from experiments.claims.claims import draw_claims
from model import GPTConfig
from train_adam import AdamConfig
from train_sophiag import SophiaConfig
from training import exchange, memory
from training.config import describe, load_config
from training.errors import Parser, UserError, command
from training.metrics import METRICS

EXPERIMENTS = Path(__file__).resolve().parent
ROOT = EXPERIMENTS.parent
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
MARK = "†"
NAMES = {  # an optimizer's label in sweep.json -> its name in tables
    "adamw": "AdamW",
    "sophiag": "Sophia-G",
    "sophiah": "Sophia-H",
    "sophiag_adamw": "Sophia-G, AdamW for the embeddings",
    "sophiag_adamw_beta2": "Sophia-G, the same with beta2 0.95",
    "sophiag_eigenbasis": "Sophia-G in the eigenbasis",
    "sophiag_eigenbasis_fresh": "Sophia-G in the eigenbasis, recipe",
    "sophiag_spectral": "spectral step",
    "soap": "SOAP",
    "muon": "Muon",
    "lion": "Lion",
    "nadamw": "NAdamW, AdamW's settings",
}
LLAMA = {name: NAMES[name] for name in ("adamw", "sophiag_adamw", "muon")} | {"whitened_muon": "whitened Muon"}
MAIN = ("adamw", "sophiag", "sophiah", "soap", "muon", "sophiag_spectral")  # the rows and curves of the README
FASTER = ("sophiag", "sophiah", "sophiag_adamw", "sophiag_eigenbasis_fresh", "soap", "muon", "sophiag_spectral")
HORIZONS = (780, 1560, 5200)
OTHER_HORIZONS = (3120, 7800)  # of the baseline, for speed-ups
ELSEWHERE = [  # rows of beside_literature
    ("arXiv:2509.02046", "0.1B", "20 to 160", "", "1.4"),
    ("arXiv:2509.02046", "1.2B", "20 to 160", "", "1.1"),
    ("public track, FineWeb", "162M", "11", "1.73 = 5,625 / 3,250", "2.09 = 5,625 / 2,690"),
]
LITERATURE = {  # label in the figure: [(parameters, speed-up)]
    "best of arXiv:2509.02046": [(130e6, 1.4), (1.2e9, 1.1)],
    "public track: Adam 5,625, Muon 3,250 steps": [(162e6, 5625 / 3250)],
}


# ----- reading


@cache
def groups_of(name):
    """{(optimizer, steps, learning rate): the group of its seeds} of experiments/NAME/runs."""
    found = {}
    for run in read_sweep(EXPERIMENTS / name)["runs"]:
        if (folder := EXPERIMENTS / name / "runs" / run["run"]).exists():
            one = read_run(folder)
            key = run["optimizer"], one.config["max_iters"], one.config["learning_rate"]
            found.setdefault((key, run["seed"] is None and "seed" not in run["swept"]), []).append(one)
    held_out = {key: runs for (key, alone), runs in found.items() if not alone}
    return {key: group(runs)[0] for key, runs in ({key: runs for (key, _), runs in found.items()} | held_out).items()}


@cache
def horizon(name, optimizer, steps):
    """The only group of an optimizer at a horizon; None if it has not run."""
    own = [one for key, one in groups_of(name).items() if key[:2] == (optimizer, steps)]
    if len(own) > 1:
        raise UserError(f"{name} has two groups of {optimizer} at {steps} steps; a table cannot show both.")
    return own[0] if own else None


# ----- cells


def loss_cell(one):
    """'1.297 ± 0.001 (8)': mean, half the 95% interval, seeds. Marked where a run has no clean commit."""
    if one is None:
        return "not run"
    spread = f" ± {one.interval:.3f}" if one.interval is not None else ""
    return f"{one.losses.mean():.3f}{spread} ({len(one.runs)})" + f" {MARK}" * bool(unclean(one.runs))


def against(one, baseline):
    """(difference, p, verdict) of a group to another, as text."""
    if one is None or baseline is None or one is baseline:
        return "", "", ""
    p, words = verdict(one.losses, baseline.losses)
    return f"{one.losses.mean() - baseline.losses.mean():+.3f}", p_text(p), words.split(" with n")[0].split(": ")[-1]


def table(head, rows, left=(0,)):
    """A Markdown table, and below it what its marks mean."""
    text = "\n".join(markdown([head, *rows], left))
    notes = ["Final validation loss in nats a token: mean ± half the 95% interval (seeds)."] if " ± " in text else []
    if MARK in text:
        notes.append(f"{MARK} Some of these runs started with uncommitted changes and have not been rerun.")
    return "\n\n".join([text, "\n".join(notes)] if notes else [text])


# ----- tables


def results_main():
    """Six optimizers at three horizons."""
    rows = [(NAMES[name], *(loss_cell(horizon("30m_python", name, steps)) for steps in HORIZONS)) for name in MAIN]
    head = ("optimizer", *(f"{steps:,} steps ({steps * 65536 / 1e6:.0f}M tokens)" for steps in HORIZONS))
    return table(head, rows)


def results_30m():
    rows = [(NAMES[name], *(loss_cell(horizon("30m_python", name, steps)) for steps in HORIZONS)) for name in NAMES]
    others = [f"{loss_cell(horizon('30m_python', 'adamw', steps))} at {steps:,} steps" for steps in OTHER_HORIZONS]
    text = table(("optimizer", *(f"{steps:,} steps" for steps in HORIZONS)), rows)
    return f"{text}\n\nAdamW also ran at other horizons: {', '.join(others)}."


def verdicts(baseline, names):
    """Verdict, difference and p of each optimizer at each horizon."""
    rows = []
    for name in names:
        cells = []
        for steps in HORIZONS:
            one, other = (horizon("30m_python", optimizer, steps) for optimizer in (name, baseline))
            change, p, words = against(one, other)
            mark = f" {MARK}" * bool(one and unclean([*one.runs, *other.runs]))
            cells.append(f"{words}: {change}{p and f' (p = {p})'}{mark}" if one else "")
        rows.append((NAMES[name], *cells))
    return table((f"against {NAMES[baseline]}", *(f"{steps:,} steps" for steps in HORIZONS)), rows, left=(0, 1, 2, 3))


@cache
def speedup(name, steps, baseline="adamw", key="step"):
    """([speed-up over the baseline, low, high], the range that its runs cover); None if not run, or why it is unknown.

    key: steps or seconds. Low and high are those of the 95% interval.
    """
    if (one := horizon("30m_python", name, steps)) is None:
        return None
    others = [horizon("30m_python", baseline, other) for other in sorted((*HORIZONS, *OTHER_HORIZONS))]
    others = [other for other in others if other]
    ratio, why = step_cost(one, others, key)
    needs = baseline_needs([other.steps for other in others], [other.losses for other in others], one.losses)
    return why or ([n * ratio for n in needs], [other.steps * ratio for other in others])


def speedup_cell(*what):
    """'1.94 [1.88, 2.01]'; '< 1.00' where all three are out of range."""
    found = speedup(*what) or ""
    return found if isinstance(found, str) else re.sub(r"(.*) \[\1, \1\]", r"\1", with_interval(*found, "{:.2f}"))


def speedups(baseline, names):
    """Speed-ups over the baseline, in steps and in seconds."""
    rows, costs = [], [(key, steps) for key in ("step", "seconds") for steps in HORIZONS]
    for name in names:
        every = *HORIZONS, *OTHER_HORIZONS
        groups = [horizon("30m_python", one, steps) for one in (name, baseline) for steps in every]
        mark = f" {MARK}" * any(unclean(one.runs) for one in groups if one)
        rows.append((NAMES[name] + mark, *(speedup_cell(name, steps, baseline, key) for key, steps in costs)))
    head = [f"{steps:,} steps, in {key.removesuffix('s')}s" for key, steps in costs]
    return table((f"over {NAMES[baseline]}", *head), rows)


def beside_literature():
    """Speed-ups of Muon and of the best optimizer, here and elsewhere."""
    rows = []
    for steps in HORIZONS:
        cells = [speedup_cell(name, steps) for name in ("muon", "sophiag_spectral")]
        tokens = steps * 65536 / horizon("30m_python", "muon", steps).parameters
        rows.append(("here, Python source", "30M", f"{tokens:.1f}", *cells))
    bounds = speedups_by_size()
    for i, (size, tokens) in enumerate((("30M", 1560 * 65536 / 29.9e6), ("124M", 2300 * 131072 / 123.6e6)), 1):
        cells = [f"at least {bounds[NAMES[name]][i][1]:.2f}" for name in ("muon", "sophiag_spectral")]
        rows.append(("the same, read off in mid-run", size, f"{tokens:.1f}", *cells))
    head = ("source", "parameters", "tokens a parameter", "Muon", "best optimizer")
    return table(head, [*rows, *ELSEWHERE], left=(0,))


def results_large_batches():
    """Per optimizer the learning rates that were tried, and held-out seeds of the best."""
    groups, runs, adamw, rows = groups_of("30m_large"), read_sweep(EXPERIMENTS / "30m_large")["runs"], None, []
    for name in NAMES:
        tried = [run for run in runs if run["optimizer"] == name and run["seed"] is None]
        if not tried:
            continue
        rates = [run["swept"]["learning_rate"] for run in tried]
        rate = min(tried, key=lambda run: run["loss"])["swept"]["learning_rate"]
        one = groups[name, 260, rate]
        adamw = adamw or one  # the first of NAMES
        edge = ", the highest tried" if rate == max(rates) else ", the lowest tried" if rate == min(rates) else ""
        rows.append((NAMES[name], f"{rate:.3g}{edge}", loss_cell(one), *against(one, adamw)))
    head = ("optimizer", "learning rate of the matrices", "final val/loss", "to AdamW", "p", "verdict")
    return table(head, rows, left=(0, 1, 5))


def results_books():
    """Books: held-out seeds, verdicts against AdamW."""
    groups = {NAMES[name]: one for name in NAMES if (one := horizon("30m_books", name, 390)) is not None}
    return beside_adamw(groups)


def results_llama():
    folders = {name: sorted(EXPERIMENTS.glob(f"30m_llama/runs/{name}_780_seed[345]")) for name in LLAMA}
    groups = {LLAMA[name]: group([*map(read_run, runs)])[0] for name, runs in folders.items() if runs}
    return beside_adamw(groups)


def beside_adamw(groups):
    """A row for each of {name: group}, with its verdict against AdamW."""
    rows = [(name, loss_cell(one), *against(one, groups["AdamW"])) for name, one in groups.items()]
    return table(("optimizer", "final val/loss", "to AdamW", "p", "verdict"), rows, left=(0, 4))


def results_124m():
    """124M: losses and times of one seed."""
    rows = []
    for (name, *_), one in sorted(groups_of("124m_python").items(), key=lambda item: item[1].losses.mean()):
        (run,) = one.runs
        spent = run.final["seconds"]
        rows.append((NAMES[name], loss_cell(one), f"{spent:,.0f}", f"{run.final['tokens'] / spent:,.0f}"))
    return table(("optimizer", "final val/loss", "training, seconds", "tokens/s"), rows)


def settings():
    """Every setting of both training scripts."""
    sophia, adam = ({row[0]: row for row in describe(config)} for config in (SophiaConfig, AdamConfig))
    lines = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, (_, kind, default, meaning) in sophia.items():
        if name not in adam:
            meaning = f"Sophia: {meaning}"
        elif name == "optimizer_name":
            default, meaning = f"{adam[name][2]} / {default}", f"{adam[name][3]} / {meaning}"
        else:
            if adam[name][2] != default:
                default = f"{adam[name][2]} (AdamW), {default} (Sophia)"
            if (help := adam[name][3].partition(" (")[0]) != meaning.partition(" (")[0]:
                meaning = f"{help} / {meaning}"
        lines.append(f"| `{name}` | {kind} | {default} | {meaning} |")
    lines += [f"| `{row[0]}` | {row[1]} | {row[2]} | {row[3]} |" for row in adam.values() if row[0] not in sophia]
    return "\n".join(lines)


def several_gpus():
    """Memory, traffic and its share of the time by training/memory.py and training/exchange.py, on H200s."""
    head = ("model", "GPUs", "how", "passes", "memory, GiB", "NVLink, GB", "network, GB", "share of time")
    rows = []
    for name, (layers, heads, width) in SIZES_ON_GPUS.items():
        for gpus in (1, 8, 64):
            how = [] if gpus == 1 or name == "124M" else ["--fsdp=True"]
            how += ["--fsdp_shard=8"] if how and gpus == 64 else []
            cells = []
            for optimizer in ("adamw", "whitened_muon"):
                shape = [f"--n_layer={layers}", f"--n_head={heads}", f"--n_embd={width}", "--dtype=bfloat16"]
                config = load_config(AdamConfig, [*shape, *how, "--total_bs=512", f"--optimizer_name={optimizer}"])
                fits = memory.estimate(config, 141e9, gpus)
                batch = max([n for n in memory.micro_batch_sizes(512, gpus) if n <= fits], default=0)
                config.gradient_accumulation_steps = passes = batch and 512 // gpus // batch
                parameters, matrices = memory.sizes(config)
                sent = exchange.bytes_sent(config, parameters, matrices, gpus)
                flops = 6 * parameters + 12 * layers * width * config.block_size
                share = exchange.time_share(config, parameters, matrices, gpus, flops, 989.4e12)
                numbers = memory.state_bytes(config, gpus) / 2**30, *(n / 1e9 for n in sent)
                cells.append([str(passes or "none fits"), *(f"{n:.3g}" for n in numbers), f"{share:.1%}"])
            pairs = [a if a == b else f"{a} / {b}" for a, b in zip(*cells, strict=True)]
            rows.append((name, str(gpus), " ".join(how).replace("--", "") or "copies", *pairs))
    return table(head, rows, left=(0, 2))


SIZES_ON_GPUS = {"124M": GPT2_SIZES["124M"], "1.5B": GPT2_SIZES["1.5B"], "6.6B": (32, 32, 4096)}


def memory_of_neox():
    """Memory of a GPU in the runs of config/train_neox_*, by the formula. Both optimizers take the same."""
    rows = []
    for size in ("1.5b", "6.6b"):
        config = load_config(AdamConfig, [str(ROOT / f"config/train_neox_{size}_adam.py")])
        batch = config.batch_size * config.block_size * memory.token_bytes(config, GPTConfig.vocab_size) / 2**30
        cells = []
        for gpus in (1, 2, 8, 64):
            config.fsdp, config.gradient_accumulation_steps = gpus > 1, config.total_bs // (config.batch_size * gpus)
            state = memory.state_bytes(config, gpus) / 2**30
            cells.append(f"{state:.1f} + {batch:.1f} = {state + batch:.1f}" if config.fsdp else f"{state:.1f}")
        rows.append((f"GPT-NeoX {size.upper()}", f"{memory.sizes(config)[0] / 1e9:.2f}B", *cells))
    head = "GiB a GPU: state + micro-batch", "parameters", "state without fsdp", "2 GPUs", "8 GPUs", "64 GPUs"
    return table(head, rows)


TABLES = {
    "memory": memory_of_neox,
    "several-gpus": several_gpus,
    "results-main": results_main,
    "results-30m": results_30m,
    "results-large-batches": results_large_batches,
    "results-books": results_books,
    "results-llama": results_llama,
    "results-124m": results_124m,
    "verdicts-adamw": lambda: verdicts("adamw", list(NAMES)[1:]),
    "verdicts-muon": lambda: verdicts("muon", ("sophiag_eigenbasis", *FASTER[3:5], "sophiag_spectral")),
    "speedups": lambda: speedups("adamw", FASTER),
    "speedups-elsewhere": beside_literature,
    "speedups-muon": lambda: speedups("muon", ["sophiag_spectral"]),
    "settings": settings,
    "speed-training": lambda: markdown_table(ROOT / "assets/bench/train.json"),
    "speed-llama": lambda: markdown_table(ROOT / "assets/bench/llama.json"),
    "speed-fp8-loss": lambda: markdown_table(ROOT / "assets/bench/fp8_loss.json"),
    "speed-optimizer": lambda: markdown_table(ROOT / "assets/bench/optimizer.json"),
    "speed-muon-training": lambda: markdown_table(ROOT / "assets/bench/muon_train.json"),
    "speed-muon-optimizer": lambda: markdown_table(ROOT / "assets/bench/muon_optimizer.json"),
    "speed-data": lambda: markdown_table(ROOT / "assets/bench/data.json"),
}


# ----- figures


def main_groups():
    return [one for name in MAIN for steps in HORIZONS if (one := horizon("30m_python", name, steps)) is not None]


def draw_main(prefix):
    """Final loss against training horizon, six curves."""
    names = {one.optimizer: NAMES[name] for name in MAIN if (one := horizon("30m_python", name, 780))}
    draw_final_losses(main_groups(), prefix, names)


def point(name, steps):
    """(speed-up, low, high, beyond) as draw_speedups takes them."""
    found, (least, *_, most) = speedup(name, steps)
    return *np.clip(found, least, most).round(4).tolist(), int(found[0] > most) - int(found[0] < least)


def mid_run_bound(one, adamw):
    """A lower bound of the speed-up: the steps of the run over the step at which it reaches AdamW's final loss.

    The loss is read off between evaluations of a run whose learning rate has not decayed yet. None if it never does.
    """
    lines = [run.evaluations for run in one.runs]
    losses = np.mean([[line["val/loss"] for line in own] for own in lines], axis=0)
    if losses.min() > (target := adamw.losses.mean()):
        return None
    return round(one.steps / float(np.interp(-target, -losses, [line["step"] for line in lines[0]])), 4)


def speedups_by_horizon():
    return {NAMES[name]: [(n, *point(name, n)) for n in HORIZONS if speedup(name, n)] for name in MAIN[1:]}


def speedups_by_size():
    """At 30M the speed-up at 1,560 steps. At 30M and 124M the bounds of runs whose tokens a parameter are similar."""
    found, large = {}, {name: one for (name, *_), one in groups_of("124m_python").items()}
    for name in [name for name in MAIN[1:] if name in large]:
        small = (horizon("30m_python", one, 1560) for one in (name, "adamw"))
        pairs = [small, (large[name], large["adamw"])]
        bounds = [(one.parameters, *[mid_run_bound(one, adamw)] * 3, 1) for one, adamw in pairs]
        found[NAMES[name]] = [(bounds[0][0], *point(name, 1560)), *bounds]
    return found


def draw_paper_claims(prefix):
    python, attention = ({key[:2]: one for key, one in groups_of(name).items()} for name in ("30m_python", "30m_attn"))
    draw_claims(prefix, python, attention, [read_run(path) for path in EXPERIMENTS.glob("30m_rho_beta2/runs/*")])


def drawn_in_claims():
    names = "30m_python", "30m_attn", "30m_rho_beta2"
    return [path.read_text() for name in names for path in sorted(EXPERIMENTS.glob(f"{name}/runs/*/{METRICS}"))]


FIGURES = {  # in assets/: how it is drawn, and the data that it shows
    "final_losses": (draw_main, lambda: [one.losses.tolist() for one in main_groups()]),
    "speedups": (
        lambda prefix: draw_speedups(speedups_by_horizon(), speedups_by_size(), LITERATURE, prefix),
        lambda: [speedups_by_horizon(), speedups_by_size(), LITERATURE],
    ),
    "claims": (draw_paper_claims, drawn_in_claims),
}


def digest(data):
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def drawn(path):
    """The digest of the data that a figure was drawn from; None if it has none."""
    from PIL import Image

    return Image.open(path).text.get("data") if path.exists() else None


def redraw(name):
    """Draw assets/NAME.png, with the digest of its data inside."""
    from PIL import Image, PngImagePlugin

    draw, data = FIGURES[name]
    with tempfile.TemporaryDirectory() as folder:
        draw(f"{folder}/figure")
        note = PngImagePlugin.PngInfo()
        note.add_text("data", digest(data()))
        Image.open(f"{folder}/figure.png").save(ROOT / f"assets/{name}.png", pnginfo=note, optimize=True)


# ----- files


def rewritten(path):
    """The text of a Markdown file with every table made anew. UserError for a table that is not in TABLES."""

    def block(match):
        start, name, _, end = match.groups()
        if name not in TABLES:
            raise UserError(f"{path}: there is no table {name!r}; name one of {', '.join(TABLES)}.")
        return f"{start}{TABLES[name]()}\n{end}"

    return BLOCK.sub(block, path.read_text(encoding="utf-8"))


def documents():
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def differing(paths):
    """The files whose tables are not those of the runs, and the figures whose data changed."""
    files = [path for path in paths if rewritten(path) != path.read_text(encoding="utf-8")]
    return files + [path for name, (_, data) in FIGURES.items()
                    if drawn(path := ROOT / f"assets/{name}.png") != digest(data())]  # fmt: skip


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table or figure is out of date")
    arguments = parser.parse_args(argv)
    changed = differing(documents())
    if arguments.check and changed:
        names = ", ".join(str(path.relative_to(ROOT)) for path in changed)
        raise UserError(f"{names}: not up to date; run python experiments/results.py.")
    for path in changed:
        if path.suffix == ".md":
            path.write_text(rewritten(path), encoding="utf-8")
        else:
            redraw(path.stem)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    command(main)
