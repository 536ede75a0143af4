"""The systems that config/ describes beside GPT-2 on OpenWebText: from their corpus to their table, at a small size."""

import json
import random

import pytest

import compare
import train_adam
import train_sophiag
from tests.conftest import ROOT, read_lines
from tests.data.test_corpus import prepare
from training.config import load_config
from training.schedule import learning_rate

ADAM, SOPHIA = (train_adam, train_adam.AdamConfig), (train_sophiag, train_sophiag.SophiaConfig)
WIKITEXT = {"sgd": ADAM, "adam": ADAM, "sophiag": SOPHIA}


def settings(kind, name, *argv):
    return load_config(kind, [str(ROOT / f"config/train_{name}.py"), *argv])


# ----- WikiText-103


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory):
    """Tokens of a stand-in for WikiText-103, prepared from files of its names and form."""
    folder, draw = tmp_path_factory.mktemp("wikitext"), random.Random(0)
    words = "the of and in to a was is for on as with by he his at from that which it".split()  # noqa: SIM905
    for split, articles in (("train", 60), ("valid", 8), ("test", 8)):
        with open(folder / f"wiki.{split}.tokens", "w", encoding="utf-8") as file:
            for i in range(articles):
                file.write(f" \n = Article {i} = \n \n")
                file.writelines(" " + " ".join(draw.choices(words, range(20, 0, -1), k=40)) + " . \n" for _ in range(3))
    assert (
        prepare("wikitext103", "--source", folder, "--tokenizer", "char", "--out_dir", folder / "tokens").returncode
        == 0
    )
    return folder / "tokens"


def test_the_wikitext_benchmark_from_the_corpus_to_the_table(wikitext, tmp_path, capsys):
    small = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--total_bs=8", "--batch_size=8"]
    small += ["--device=cpu", "--dtype=bfloat16", "--compile=False", f"--dataset={wikitext}", "--learning_rate=1e-2"]
    small += [
        "--max_iters=62",
        "--warmup_iters=6",
        "--restart_iters=8",
        "--eval_interval=31",
        "--eval_tokens=512",
        "--log_interval=1",
    ]
    for name, (script, _) in WIKITEXT.items():
        script.main([str(ROOT / f"config/train_wikitext103_{name}.py"), *small, f"--out_dir={tmp_path / name}"])
    meta = json.loads((wikitext / "meta.json").read_text())
    for name in WIKITEXT:
        lines = read_lines(tmp_path / name)
        evaluations = [line for line in lines if "val/loss" in line]
        assert [line["step"] for line in evaluations] == [0, 31, 62]
        for line in evaluations:
            assert line["epoch"] == pytest.approx(8 * line["step"] / (meta["train_tokens"] // 32))
            assert 0 <= line["val/accuracy"] < 0.9
        assert evaluations[-1]["val/loss"] < evaluations[0]["val/loss"]
        rates = [line["lr"] for line in lines[:-1]]
        assert [i for i in range(7, 62) if rates[i] > rates[i - 1]] == [14, 30], "restarts after 8 and 16 steps"
    capsys.readouterr()
    compare.main([*(str(tmp_path / name) for name in WIKITEXT), f"--out={tmp_path / 'figure'}"])
    out = capsys.readouterr().out
    heads, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line[:1] == "|"]
    assert {"train/loss", "final val/loss", "accuracy", "s/epoch"} <= set(heads)
    assert len(rows) == 3 and all(float(row[heads.index("s/epoch")].replace(",", "")) > 0 for row in rows)
    assert {"figure.png", "figure_accuracy.png", "figure_training.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name, kind", [(name, kind) for name, (_, kind) in WIKITEXT.items()])
def test_the_wikitext_runs_restart_as_torchs_schedule_does(name, kind):
    import torch

    config = settings(kind, f"wikitext103_{name}")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, T_0=config.restart_iters, T_mult=int(config.restart_multiplier), eta_min=config.min_lr
    )
    for step in (0, 1, 900, 1799, 1800, 1801, 5399, 5400, 12_599):
        restarts.step(step)
        assert learning_rate(config.warmup_iters + step, config) == pytest.approx(restarts.get_last_lr()[0], rel=1e-9)
    assert config.max_iters == config.warmup_iters + 7 * config.restart_iters
    same = {"dataset", "total_bs", "block_size", "n_layer", "n_embd", "max_iters", "grad_clip", "lr_schedule"}
    sgd = settings(train_adam.AdamConfig, "wikitext103_sgd")
    assert {key: getattr(config, key) for key in same} == {key: getattr(sgd, key) for key in same}
