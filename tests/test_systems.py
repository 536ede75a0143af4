"""The systems that config/ describes beside GPT-2 on OpenWebText: from their corpus to their table, at a small size."""

import json
import random
from types import SimpleNamespace

import pytest
import torch

import compare
import train_adam
import train_sophiag
from model import GPT, GPTConfig
from tests.conftest import ROOT, losses, read_lines, torchrun
from tests.data.test_corpus import prepare
from training import memory
from training.config import load_config, model_config
from training.schedule import check_whole, learning_rate, sequence_length, stages
from training.step import Batches

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


# ----- Yxanul: a curriculum


YXANUL = {"adam": ADAM[1], "sophiag": SOPHIA[1], "hybrid": SOPHIA[1]}


@pytest.mark.parametrize("name", YXANUL)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_yxanuls_ten_stages_keep_the_tokens_of_a_step(name, ranks):
    config = settings(YXANUL[name], f"yxanul_{name}")
    lengths = [length for _, length in stages(config)]
    assert lengths == [8, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048] and config.total_bs % (15 * ranks) == 0
    batches = Batches(config, None, SimpleNamespace(size=ranks, share=lambda n: range(n // ranks)))
    for length in lengths:
        check_whole("total_bs", config.total_bs, 2048, length, ranks)
        rows, weight = batches._micro_batches(config.total_bs, length)
        assert len(rows) * weight == pytest.approx(1) and len(rows[0]) * length == 15 * 2048, "a micro-batch's tokens"
    if name == "hybrid":
        assert sequence_length(config.sophia_start_iter - 1, config) == 128, "the fifth stage is AdamW's"
        assert sequence_length(config.sophia_start_iter, config) == 256


def test_a_small_yxanul_runs_through_its_stages_and_compare_shows_them(corpus, tmp_path, capsys):
    small = ["--n_layer=1", "--n_embd=48", "--block_size=32", "--total_bs=12", "--batch_size=3", "--device=cpu"]
    small += ["--block_size_schedule=0:2,4:8,8:24,12:32", "--max_iters=16", "--warmup_iters=4", "--eval_interval=8"]
    small += [f"--dataset={corpus}", "--fp8=False", "--compile=False", "--log_interval=1", "--learning_rate=1e-3"]
    for name, kind in YXANUL.items():
        script = train_adam if kind is ADAM[1] else train_sophiag
        more = [] if name == "adam" else ["--hess_bs=3", *(["--sophia_start_iter=8"] if name == "hybrid" else [])]
        words = [str(ROOT / f"config/train_yxanul_{name}.py"), *small, *more, f"--out_dir={tmp_path / name}"]
        script.main(words)
    assert losses(tmp_path / "adam")[:9] == losses(tmp_path / "hybrid")[:9], "AdamW in the first two stages of both"
    capsys.readouterr()
    compare.main([str(tmp_path / name) for name in YXANUL])
    stage = next(block for block in capsys.readouterr().out.split("\n\n") if "stage ends at step" in block)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in stage.splitlines()]
    assert [row[:2] for row in rows[2:]] == [["4", "2"], ["8", "8"], ["12", "24"], ["16", "32"]]
    assert len(rows[0]) == 2 + 2 * 3 and all(all(row) for row in rows)


# ----- a model of Llama's kind


def test_a_small_llama_trains_from_its_config(wikitext, tmp_path):
    assert parameters(settings(ADAM[1], "llama_30m_adam")) == pytest.approx(28.8e6, rel=0.005)
    small = ["--n_layer=1", "--n_head=4", "--n_embd=32", "--block_size=16", "--total_bs=8", "--batch_size=8"]
    small += ["--max_iters=20", "--warmup_iters=2", "--eval_tokens=256", "--device=cpu", "--compile=False"]
    small += [f"--dataset={wikitext}", f"--out_dir={tmp_path / 'run'}"]
    train_adam.main([str(ROOT / "config/train_llama_30m_adam.py"), *small])
    before, after = (line["val/loss"] for line in read_lines(tmp_path / "run") if "val/loss" in line)
    assert after < before - 0.5


# ----- sizes and memory


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(model_config(config, GPTConfig.vocab_size)).parameters())


@pytest.mark.parametrize(
    "name, count",
    [("yxanul_adam", 196e6), ("neox_1.5b_adam", 1.51e9), ("neox_6.6b_adam", 6.86e9)],
)
def test_the_number_of_parameters_is_what_the_config_says(name, count):
    config = settings(ADAM[1], name)
    assert parameters(config) == pytest.approx(count, rel=0.005)
    second = SOPHIA[1], name.replace("adam", "sophiag")
    assert parameters(settings(*second)) == parameters(config)
    assert model_config(settings(*second), 1) == model_config(config, 1)
    assert memory.sizes(config)[0] == parameters(config)


def test_the_papers_6_6b_is_the_count_with_one_embedding():
    assert parameters(settings(ADAM[1], "neox_6.6b_adam", "--tie_embeddings=True")) == pytest.approx(6.65e9, rel=0.001)


PROBE = f"""
import gc, json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train_adam
from training.run import Run
from training.step import TrainStep

held, loss, optimizer_step = {{}}, TrainStep._loss, Run.optimizer_step

def all_tensors():
    gc.collect()
    found = {{}}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for t in (thing, thing.grad if thing.is_leaf else None):
                t = getattr(t, "_local_tensor", t)
                if t is not None and t.is_floating_point() and t.device.type == "cpu":
                    found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(found.values())

def watched_loss(step, *arguments):
    held["between"] = all_tensors()  # before the last micro-batch, in the end
    return loss(step, *arguments)

def watched_step(run):
    held["after"] = all_tensors()
    optimizer_step(run)

TrainStep._loss, Run.optimizer_step = watched_loss, watched_step
train_adam.main(sys.argv[2:])
open(sys.argv[1] + os.environ["RANK"], "w").write(json.dumps(held))
"""


def test_the_formula_of_memory_is_what_two_ranks_hold(corpus, tmp_path):
    """A small GPT-NeoX with fsdp, between two micro-batches and after the last."""
    small = ["--n_layer=2", "--n_head=4", "--n_embd=256", "--rope_dim=16", "--block_size=16", "--total_bs=4"]
    small += ["--batch_size=1", "--max_iters=2", "--warmup_iters=1", "--device=cpu", "--dtype=float32"]
    small += ["--compile=False", f"--dataset={corpus}", f"--out_dir={tmp_path / 'run'}"]
    config = settings(ADAM[1], "neox_1.5b_adam", *small)
    (tmp_path / "probe.py").write_text(PROBE)
    words = [str(tmp_path / "held"), str(ROOT / "config/train_neox_1.5b_adam.py"), *small]
    done = torchrun(2, tmp_path / "probe.py", words)
    assert done.returncode == 0, done.stderr
    for passes, when in ((2, "between"), (1, "after")):
        config.gradient_accumulation_steps = passes
        for rank in range(2):
            held = json.loads((tmp_path / f"held{rank}").read_text())
            assert held[when] == pytest.approx(memory.state_bytes(config, 2, 64), rel=0.05)
