"""Memory that is used up: one sentence, and the micro-batch that fits."""

import pytest
import torch

import evaluate
import train_adam
import train_sophiag
from tests.conftest import losses, torchrun
from tests.training.test_resume import TINY, config_of, refused
from training import memory
from training.checkpoint import read_checkpoint
from training.config import load_config
from training.curvature import hessian_vector_product, label_loss
from training.errors import command, is_out_of_memory
from training.run import Run
from training.step import ModelLoss, TrainStep

SIZES = [1, 2, 3, 4, 6, 8, 12, 24]


@pytest.fixture
def tiny(corpus, tmp_path):
    settings = {**TINY, "total_bs": 24, "dataset": corpus, "out_dir": tmp_path / "out"}
    return [f"--{key}={value}" for key, value in settings.items()]


def limit(monkeypatch, most, error=torch.OutOfMemoryError, of=lambda *arguments: True):
    """A device on which a forward pass of more than `most` sequences is out of memory; returns the sizes asked for.

    of: whether a pass, by its arguments, is limited.
    """
    forward, asked = ModelLoss.forward, []

    def limited(loss, inputs, *arguments):
        asked.append(len(inputs))
        if len(inputs) > most and of(*arguments):
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(loss, inputs, *arguments)

    monkeypatch.setattr(ModelLoss, "forward", limited)
    return asked


# ----- the search


@pytest.mark.parametrize("guess", [0, 1, 5, 12, 24, 10**9])
def test_the_largest_that_fits_is_found_from_any_guess(guess):
    for most in range(1, 30):
        tried = []
        found = memory.largest(SIZES, lambda size, most=most, tried=tried: tried.append(size) or size <= most, guess)
        assert found == max(size for size in SIZES if size <= most) and len(tried) == len(set(tried))
    assert memory.largest(SIZES, lambda size: False, guess) is None


def test_a_step_is_divided_without_rest():
    assert memory.micro_batch_sizes(24, 1) == SIZES
    assert memory.micro_batch_sizes(24, 3) == [1, 2, 4, 8] and memory.micro_batch_sizes(24, 5) == []


@pytest.mark.parametrize(
    "settings, peak, size",
    [  # GiB at this micro-batch, from assets/bench/train.json, whose runs do not evaluate
        ({"n_layer": 12, "n_head": 12, "n_embd": 768}, 21.64, 64),
        ({"n_layer": 24, "n_head": 16, "n_embd": 1024}, 30.66, 32),
        ({"n_layer": 24, "n_head": 16, "n_embd": 1024, "activation_checkpointing": True}, 7.47, 32),
    ],
)
def test_the_formula_is_near_what_was_measured_and_not_above_it(settings, peak, size):
    config = load_config(train_adam.AdamConfig, [f"--{k}={v}" for k, v in settings.items()] + ["--dtype=bfloat16"])
    assert 0.05 * size < memory.estimate(config, peak * 2**30, ranks=1) <= size
    assert memory.estimate(config, 2**30, ranks=1) == 0


# ----- batch_size = auto


@pytest.mark.parametrize("script, most", [(train_adam, 1), (train_adam, 9), (train_sophiag, 5), (train_sophiag, 100)])
def test_auto_takes_the_largest_that_fits_and_leaves_no_trace(tiny, tmp_path, monkeypatch, capsys, script, most):
    words, size = [*tiny, "--dropout=0.1", "--max_iters=6"], max(size for size in SIZES if size <= most)
    with monkeypatch.context() as patch:
        limit(patch, most)
        script.main([*words, "--batch_size=auto"])
    assert f"batch_size = auto: the largest that fits is {size}" in capsys.readouterr().out
    config = config_of(tmp_path / "out")["config"]
    assert config["batch_size"] == size and config["gradient_accumulation_steps"] == 24 // size
    script.main([*words, f"--batch_size={size}", f"--out_dir={tmp_path / 'given'}"])
    assert losses(tmp_path / "out") == losses(tmp_path / "given"), "bit for bit, dropout included"
    first, second = (read_checkpoint(tmp_path / name / "ckpt.pt")["rng"] for name in ("out", "given"))
    assert torch.equal(first[0][0], second[0][0])


def chosen(words):
    with Run(load_config(train_sophiag.SophiaConfig, [*words, "--batch_size=auto"])) as run:
        return run.config.batch_size, run.model.activation_checkpointing


@pytest.mark.parametrize("hess_bs, most, size", [(24, 2, 12), (24, 3, 24), (4, 2, 24), (4, 1, 12), (1, 1, 24)])
def test_auto_tries_the_hessian_vector_product(tiny, monkeypatch, hess_bs, most, size):
    """It takes an eighth of a micro-batch at once, and hess_bs at most."""

    def limited(model, inputs, *arguments):
        if len(inputs) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hessian_vector_product(model, inputs, *arguments)

    monkeypatch.setattr("training.step.hessian_vector_product", limited)
    words = [*tiny, "--optimizer_name=sophiah", f"--hess_bs={hess_bs}", "--activation_checkpointing=True"]
    assert chosen(words) == (size, True)


@pytest.mark.parametrize("hess_bs, size", [(24, 4), (12, 4), (5, 24), (2, 24)])
def test_auto_tries_an_estimate_of_its_own_size(tiny, monkeypatch, hess_bs, size):
    limit(monkeypatch, 5, of=lambda targets, loss=None: loss is label_loss)
    assert chosen([*tiny, f"--hess_bs={hess_bs}"])[0] == size


def test_auto_tries_an_evaluation(tiny, monkeypatch):
    limit(monkeypatch, 5, of=lambda *_: not torch.is_grad_enabled())
    assert chosen(tiny)[0] == 4


def test_after_the_search_there_are_no_gradients(tiny, monkeypatch):
    limit(monkeypatch, 9)
    with Run(load_config(train_adam.AdamConfig, [*tiny, "--batch_size=auto"])) as run:
        assert all(p.grad is None for p in run.model.parameters()) and run.model.training


def test_other_errors_are_not_taken_for_a_full_memory(tiny, monkeypatch):
    limit(monkeypatch, 0, error=lambda text: RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        train_adam.main([*tiny, "--batch_size=auto"])


def test_a_resume_keeps_the_size_of_the_checkpoint(tiny, tmp_path, monkeypatch):
    for most, start in ((5, "scratch"), (100, "resume")):
        limit(monkeypatch, most)
        train_adam.main([*tiny, "--batch_size=auto", "--max_iters=4", f"--init_from={start}"])
        monkeypatch.undo()
    facts = config_of(tmp_path / "out")
    assert facts["config"]["batch_size"] == 4 and facts["history"] == []


def test_where_nothing_fits_it_is_one_sentence(tiny, tmp_path, monkeypatch, capsys):
    limit(monkeypatch, 0)
    with pytest.raises(SystemExit) as ended:
        command(lambda: train_adam.main([*tiny, "--batch_size=auto"]))
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.count("\n") == 1 and "--activation_checkpointing=True" in error
    assert not (tmp_path / "out").exists()


def test_a_cpu_is_not_asked_for_more_than_the_host_has(tiny, monkeypatch):
    asked = limit(monkeypatch, 1000)
    config = load_config(train_adam.AdamConfig, [*tiny, "--batch_size=auto", "--dtype=float32"])
    left = memory.estimate(config, 2**30, 1, 64)
    monkeypatch.setattr("training.run.memory_of", lambda device: int(2**30 * 7 / left))
    with Run(config):
        assert max(asked) == config.batch_size < 24


@pytest.mark.parametrize("more", ["--fsdp=True", "--eval_iters=3", "--gradient_accumulation_steps=2"])
def test_auto_goes_with_no_number_that_follows_from_it(tiny, capsys, more):
    assert "give a number" in refused(capsys, train_adam.main, [*tiny, "--batch_size=auto", more])


@pytest.mark.parametrize("word", ["Auto", "automatic", "0", "None", "1.5"])
def test_no_other_word_is_a_size(tiny, capsys, word):
    assert "batch_size" in refused(capsys, train_adam.main, [*tiny, f"--batch_size={word}"])


def test_all_ranks_take_the_size_of_the_smallest(tiny, tmp_path):
    script = tmp_path / "limited.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(memory.__file__.rsplit("/", 2)[0])!r})
import torch, train_adam
from training.step import ModelLoss
forward, most = ModelLoss.forward, (12, 5)[int(os.environ["RANK"])]
def limited(loss, inputs, *arguments):
    if len(inputs) > most:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return forward(loss, inputs, *arguments)
ModelLoss.forward = limited
train_adam.main(sys.argv[1:])
""")
    done = torchrun(2, script, [*tiny, "--batch_size=auto", "--max_iters=3"])
    assert done.returncode == 0, done.stderr
    assert config_of(tmp_path / "out")["config"]["batch_size"] == 4
    train_adam.main([*tiny, "--batch_size=24", "--max_iters=3", f"--out_dir={tmp_path / 'alone'}"])
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


# ----- one sentence


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError, MemoryError, lambda text: RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["gpu", "python", "host"],
)
@pytest.mark.parametrize("after", [0, 15])
def test_a_full_memory_is_one_sentence(tiny, monkeypatch, capsys, error, after):
    backward, calls = TrainStep.backward, []

    def fails(step, batch):
        calls.append(batch)
        if len(calls) > after:
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB.")
        backward(step, batch)

    monkeypatch.setattr(TrainStep, "backward", fails)
    monkeypatch.setattr("training.run.memory_of", lambda device: 2**30)
    with pytest.raises(SystemExit) as ended:
        command(lambda: train_adam.main([*tiny, "--batch_size=12", "--max_iters=20"]))
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.startswith("error: ") and said.count("\n") == 1, said
    for word in ("batch_size = 12", "--batch_size=8", "--activation_checkpointing=True", "--fsdp=True"):
        assert word in said, said
    assert ("go on from step 10 with --init_from=resume" in said) == (after == 15)


def test_a_model_that_is_too_large_for_any_micro_batch(tiny, monkeypatch, capsys):
    monkeypatch.setattr(TrainStep, "backward", lambda step, batch: [].append(torch.empty(2**46)))
    with pytest.raises(SystemExit):
        command(lambda: train_adam.main([*tiny, "--batch_size=1", "--activation_checkpointing=True"]))
    said = capsys.readouterr().err
    assert "--fsdp=True" in said and "--batch_size=" not in said and said.count("\n") == 1


def test_a_tool_says_it_in_one_sentence_too(monkeypatch, capsys):
    def full(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(evaluate, "load_model", full)
    with pytest.raises(SystemExit) as ended:
        command(lambda: full([]))
    assert ended.value.code == 1 and capsys.readouterr().err.count("\n") == 1


def test_what_counts_as_a_full_memory():
    wrapped = RuntimeError("backend compiler failed")
    wrapped.__cause__ = torch.OutOfMemoryError("x")
    full = [MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("CUDA error: out of memory"), wrapped]
    assert all(map(is_out_of_memory, full))
    assert not any(map(is_out_of_memory, [None, ValueError("out of memory"), RuntimeError("bug"), OSError(28, "full")]))
