"""bench.py: its rows, its table, its errors; the times themselves mean something on a GPU only."""

import json
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import bench
import model
from benchmarks import compilation, data, losses, report, train
from data import sources
from tests.conftest import ROOT, tiny_words
from training.errors import UserError, command
from training.run import Run


def test_optimizer_gives_a_row_for_every_contender_and_a_table(tmp_path, monkeypatch, capsys):
    """A tiny model on the CPU: every contender is timed, the floors are what they are defined to be."""
    monkeypatch.setitem(report.GPT2_SIZES, "30M", (1, 1, 64))
    out = tmp_path / "o.json"
    bench.main(f"optimizer --device cpu --models 30M --rounds 3 --calls 2 --commit abc --out {out}".split())
    result = json.loads(out.read_text())
    assert (result["device"], result["torch"], result["commit"]) == ("cpu", torch.__version__, "abc")
    assert result["errors"] == []
    value = {(row["contender"], row["metric"]): row["value"] for row in result["rows"]}
    for contender in ("sophia", "adamw_foreach", "floor"):
        assert value[contender, "step_ms"] > 0 and value[contender, "clip_step_ms"] > 0
    assert value["floor", "step_ms"] == pytest.approx(2 * value["floor", "update_hessian_ms"]), "24 bytes and 12"
    capsys.readouterr()
    bench.main(["table", str(out)])
    printed = capsys.readouterr().out.splitlines()
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in printed)
    (row,) = (dict(zip(head, line, strict=True)) for line in lines if line[:2] == ["30M", "sophia"])
    assert row["step, ms"] == f"{value['sophia', 'step_ms']:.4g}"


@pytest.mark.slow
def test_data_gives_a_row_for_every_prepare_and_the_pipelines_overhead(tmp_path, monkeypatch):
    """A little text and the tiny model: every prepare.py is timed, and a step with and without the pipeline."""

    def split(documents, fraction):
        return (("train" if i % 5 else "val", text) for i, text in enumerate(documents))

    monkeypatch.setattr(data, "TEXT_BYTES", 300_000)
    monkeypatch.setattr(data, "ROUNDS", 1)
    monkeypatch.setattr(sources, "split_by_hash", split)
    out = tmp_path / "o.json"
    bench.main(f"data --device cpu --commit abc --out {out}".split())
    result = json.loads(out.read_text())
    assert result["errors"] == []
    value = {(row["contender"], row["model"], row["metric"]): row["value"] for row in result["rows"]}
    rates = {name: value[name, "gpt2", "tokens_per_second"] for name in ("tiktoken", "text", "python")}
    for name in ("text", "python"):
        assert value[name, "gpt2", "share_of_tiktoken"] == pytest.approx(rates[name] / rates["tiktoken"])
    assert value["shakespeare_char", "characters", "tokens_per_second"] > 0
    times = [value[name, "tiny", "train_step_ms"] for name in ("pipeline", "resident batch")]
    overhead = value["pipeline", "tiny", "input_pipeline_overhead"]
    assert overhead == pytest.approx(times[0] / times[1] - 1)


def test_each_source_is_tokenized_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TEXT_BYTES", 300_000)
    texts = data.write_sources(tmp_path / "source")
    assert 300_000 <= sum(len(text.encode()) for text in texts) < 1_400_000
    for kind in ("py", "txt"):
        assert [path.read_bytes().decode("utf-8-sig") for path in sorted(tmp_path.rglob(f"*.{kind}"))] == texts
    assert len(set(texts)) == len(texts) and all(text.strip() for text in texts)


@pytest.mark.parametrize(
    "line, message",
    [
        ("optimizer --official /no/such --device cpu --models 30M --out OUT", "sophia.py is missing"),
        ("table /no/such.json", "is no result of this script"),
        ("table EMPTY", "is no result of this script"),
        ("table NAMELESS", "is no result of this script"),
        ("optimizer --device cpu --models 30M --out /proc/none/o.json", "cannot be read or written"),
        ("optimizer --out OUT", "no CUDA device"),
        ("data --device cuda --out OUT", "no CUDA device"),
        ("losses it's . --device cpu --out OUT", "cannot be read as a run"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, monkeypatch, line, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(report.GPT2_SIZES, "30M", (1, 1, 32))
    (tmp_path / "empty").write_text("{}")
    (tmp_path / "nameless").write_text('{"rows": [{}]}')
    line = line.replace("NAMELESS", str(tmp_path / "nameless"))
    line = line.replace("EMPTY", str(tmp_path / "empty")).replace("OUT", str(tmp_path / "o.json"))
    with pytest.raises(SystemExit) as ended:
        command(lambda: bench.main(line.split()))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "o.json").exists(), "nothing half-written"


PEER = """
from dataclasses import dataclass
import torch
from model_of_ours import GPT as Ours, GPTConfig as Shape

@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool
    dropout: float

class GPT(Ours):
    def __init__(self, config):
        super().__init__(Shape(config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd))
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)
"""


@pytest.mark.parametrize(
    "line",
    ["optimizer --rounds 0", "optimizer --calls 0", "train --steps 0", "train --block_size 0", "train --compile true"],
)
def test_numbers_and_switches_are_checked(capsys, line):
    with pytest.raises(SystemExit) as ended:
        command(lambda: bench.main([*line.split(), "--device=cpu"]))
    assert ended.value.code == 2 and line.split()[1] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow  # compiles and trains for every part of the benchmark
def test_train_gives_a_row_for_every_part(tmp_path, monkeypatch):
    """Toy models on the CPU, optimizers on two ranks included."""
    monkeypatch.setitem(report.GPT2_SIZES, "30M", (1, 1, 32))
    monkeypatch.setitem(train.MICRO_BATCH, "30M", 4)
    monkeypatch.setitem(train.MICRO_BATCH, "llama-30M", 4)
    monkeypatch.setattr(train, "ACCUMULATION", 2)
    monkeypatch.setitem(sys.modules, "model_of_ours", model)
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "model.py").write_text(PEER)
    out = tmp_path / "t.json"
    argv = f"train --device cpu --models 30M,llama-30M --rounds 1 --steps 2 --block_size 16 --compile False --out {out}"
    argv += " --optimizers whitened_muon,sophiag"
    bench.main([*argv.split(), f"--nanogpt={tmp_path / 'peer'}", "--commit=abc"])
    result = json.loads(out.read_text())
    assert result["errors"] == []
    value = {(row["contender"], row["metric"]): row["value"] for row in result["rows"] if row["model"] == "30M"}
    llama = {(row["contender"], row["metric"]) for row in result["rows"] if row["model"] == "llama-30M"}
    assert value.keys() - llama == {key for key in value if key[0] == "nanogpt"}, "which has no such model"
    for contender in ("ours", "nanogpt", "ours_checkpointing", "ours_fsdp_checkpointing"):
        assert value[contender, "tokens_per_second"] > 0, contender
    for optimizer in ("whitened_muon", "sophiag"):
        for name in ("", "one_pass_"):
            assert value[f"ours_{optimizer}_fsdp", f"{name}tokens_per_second"] > 0
        assert min(value[f"ours_{optimizer}", f"scaling_2gpu{name}"] for name in ("", "_one_pass")) > 0
    assert {("ours_sophiag", "curvature_overhead"), ("ours_sophiah", "curvature_overhead")} <= set(value)
    assert value["ours", "compile_seconds"] > 0 and value["nanogpt", "micro_batch"] == 4


@pytest.mark.slow  # four processes
def test_start_gives_the_seconds_to_the_first_step_and_the_speed_of_each_way_to_compile(tmp_path, monkeypatch):
    monkeypatch.setitem(report.GPT2_SIZES, "30M", (1, 1, 32))
    monkeypatch.setitem(train.MICRO_BATCH, "30M", 4)
    monkeypatch.delitem(train.CANDIDATES, "ours_cuda_graphs")
    argv = "train --parts start --device cpu --models 30M --rounds 1 --steps 1 --block_size 16 --compile False"
    bench.main([*argv.split(), f"--out={tmp_path / 't.json'}"])
    result = json.loads((tmp_path / "t.json").read_text())
    value = {(row["contender"], row["metric"]): row["value"] for row in result["rows"]}
    metrics = ("start_cold", "start_warm", "tokens_per_second")
    assert result["errors"] == []
    assert min(value[name, metric] for name in compilation.CANDIDATES for metric in metrics) > 0


@pytest.mark.parametrize(
    ("capability", "names"),
    [
        ((8, 0), {"ours"}),
        ((8, 9), {"ours", "ours_fp8"}),
        ((9, 0), {"ours", "ours_fp8", "ours_fp8_loss", "ours_fp8_both"}),
    ],
)
def test_each_fp8_setting_has_a_row_of_its_name_where_the_gpu_has_it(monkeypatch, capability, names):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = train.own_settings("cuda")
    assert found.keys() == names and train.own_settings("cpu").keys() == {"ours"}
    both = found.pop("ours_fp8_both", None)
    assert both in (None, {"fp8": True, "fp8_loss": True})
    assert all(more == {name.removeprefix("ours_"): True} for name, more in found.items() if name != "ours")


def test_scaling_is_over_the_mean_of_both_gpus(monkeypatch):
    alone = [{"scaling_2gpu": speed, "scaling_2gpu_one_pass": speed / 2} for speed in (100, 80)]
    found, rows = {"alone": alone, "together": {"scaling_2gpu": 171, "scaling_2gpu_one_pass": 45}}, {}
    monkeypatch.setattr(train, "on_ranks", lambda *_, **__: found)
    report = SimpleNamespace(add=lambda contender, model, metric, value, unit: rows.update({metric: value}))
    train.scaling(report, "124M", SimpleNamespace(device="cpu", optimizers=["adamw"]))
    assert rows == pytest.approx({"scaling_2gpu": 1.9, "scaling_2gpu_one_pass": 1.0})


@pytest.mark.slow  # several complete runs
@pytest.mark.parametrize("broken", ["ours", "ours_adamw"])
def test_contenders_leave_nothing_behind(tmp_path, monkeypatch, broken):
    """Whether they were timed or failed in their first step: no thread, which would keep their model, no handler."""
    monkeypatch.setitem(report.GPT2_SIZES, "30M", (1, 1, 32))
    monkeypatch.setitem(train.MICRO_BATCH, "30M", 8)
    step, calls, handler = Run.optimizer_step, [], signal.getsignal(signal.SIGINT)

    def fails_at_first(run):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        step(run)

    monkeypatch.setattr(Run, "optimizer_step", fails_at_first)
    part, out = "speed" if broken == "ours" else "curvature", tmp_path / "t.json"
    argv = f"train --parts {part} --device cpu --models 30M --rounds 1 --steps 1 --block_size 16 --compile False"
    bench.main([*argv.split(), f"--out={out}"])
    assert json.loads(out.read_text())["errors"] == [f"{broken} 30M start: RuntimeError: out of memory"]
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
    assert signal.getsignal(signal.SIGINT) == handler


@pytest.mark.slow  # several complete runs
def test_losses_differ_by_the_seed_hardly_by_the_micro_batch_and_not_by_the_checkout(tmp_path, corpus, monkeypatch):
    base = " ".join(tiny_words(corpus, tmp_path / "unused")) + " --max_iters=6"
    out = tmp_path / "l.json"
    argv = ["losses", ". --seed=1", ". --seed=2", f"{ROOT} --seed=1", ". --seed=1 --batch_size=6"]
    bench.main([*argv, "--base", base, "--device=cpu", f"--out={out}"])
    rows = [row for row in json.loads(out.read_text())["rows"] if row["metric"] == "largest_loss_difference"]
    other, same, micro_batch = (row["value"] for row in rows)
    assert other > 1e-3 and same == 0 and micro_batch < 1e-5
    with pytest.raises(UserError, match="neither a folder nor a commit"):
        bench.main(["losses", ".", "nothing", "--base", base, "--device=cpu", f"--out={out}"])
    before = worktrees()
    with pytest.raises(UserError, match="neither a folder nor a commit"):
        bench.main(["losses", "HEAD", "nothing", "--base", base, "--device=cpu", f"--out={out}"])
    assert worktrees() == before, "the checkout of HEAD is gone from git's list too"
    logged = iter([{0: 4.0, 1: 3.9}, {0: 4.0}])
    monkeypatch.setattr(losses, "losses_of", lambda *_: next(logged))
    with pytest.raises(UserError, match="do not log losses at the same steps"):
        bench.main(["losses", ".", ". --max_iters=1", "--device=cpu", f"--out={out}"])


def worktrees():
    argv = ["git", "-C", str(ROOT), "worktree", "list", "--porcelain"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout
