"""The recipes of docs/optimizers.md and of the docstrings train, as they are written."""

import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sophia
from sophia import SophiaG, SophiaH
from tests.conftest import ROOT


def recipe(title):
    """The code under a heading of docs/optimizers.md, with the learning rate of a small problem."""
    text = (ROOT / "docs/optimizers.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)).replace("lr=3e-4", "lr=3e-2")


def docstring_example(cls):
    """The lines of the class docstring from the one that makes the optimizer to the next blank one."""
    lines = inspect.getdoc(cls).splitlines()
    first = next(i for i, line in enumerate(lines) if f"optimizer = {cls.__name__}(" in line)
    last = next(i for i in range(first, len(lines)) if i + 1 == len(lines) or not lines[i + 1].strip())
    return inspect.cleandoc("\n" + "\n".join(lines[first : last + 1])).replace("lr=3e-4", "lr=3e-2")


def bigram_batches(count):
    """A language in which the next token is the current one plus one, of 8."""
    for _ in range(count):
        x = torch.randint(8, (16, 4))
        yield x, (x + 1) % 8


def loss_fn(logits, y):
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


@pytest.mark.parametrize(
    "code", [recipe("Plain loop"), docstring_example(SophiaG), docstring_example(SophiaH)], ids=("docs", "G", "H")
)
def test_the_plain_loop_trains(code):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 8))
    names = {**vars(sophia), "F": F, "model": model, "batches": bigram_batches(60), "loss_fn": loss_fn,
                "batch_size": 16, "block_size": 4}  # fmt: skip
    exec(code, names)
    x, y = next(bigram_batches(1))
    assert loss_fn(model(x), y).item() < 0.2 < math.log(8)


def test_the_trainer_recipe_trains_and_estimates_every_k_steps(tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    sequences = [(start + torch.arange(8)) % 8 for start in torch.arange(64) % 8]
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=24, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    names = {"model": model, "args": args, "dataset": [{"input_ids": s, "labels": s} for s in sequences]}
    names |= {"k": 10, "bs": 2 * 8 * 8, "tokens": 8 * 8}
    scales, update_hessian = [], SophiaG.update_hessian

    def watched(self, scale):
        scales.append(scale)
        update_hessian(self, scale)

    monkeypatch.setattr(SophiaG, "update_hessian", watched)
    exec(recipe("Hugging Face Trainer"), names)
    assert scales == [0.5] * 3  # at steps 0, 10 and 20, on the first of two micro-batches
    history = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert history[-1] < 0.7 * history[0]
