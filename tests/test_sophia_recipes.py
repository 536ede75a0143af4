"""The recipes of docs/optimizers.md, docs/frameworks.md and of the docstrings train, as they are written."""

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
    """The code under a heading of the docs, with the learning rate of a small problem."""
    text = "".join((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("optimizers", "frameworks"))
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)).replace("3e-4", "3e-2")


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
    model = make_model()
    names = {**vars(sophia), "F": F, "model": model, "batches": bigram_batches(60), "loss_fn": loss_fn, "bs": 64,
             "batch_size": 16, "block_size": 4}  # fmt: skip
    exec(code, names)
    assert_trained(model)


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 8))


def assert_trained(model):
    x, y = next(bigram_batches(1))
    assert loss_fn(model(x), y).item() < 0.2 < math.log(8)


@pytest.fixture
def scales(monkeypatch):
    """The `scale` of every call of update_hessian."""
    seen, update_hessian = [], SophiaG.update_hessian

    def watched(self, scale=1.0, **settings):
        seen.append(scale)
        update_hessian(self, scale, **settings)

    monkeypatch.setattr(SophiaG, "update_hessian", watched)
    return seen


@pytest.mark.parametrize("title", ["Gradient accumulation and data parallel", "Mixed precision with GradScaler"])
def test_accumulation_and_the_scaler_train(title, scales):
    model = make_model()
    exec(recipe(title), {"model": model, "batches": [*bigram_batches(240)], "bs": 64})
    assert_trained(model)
    assert scales == ([0.25] * 6 if "accumulation" in title else [1.0] * 24)


def test_the_trainer_recipe_trains_and_estimates_every_k_steps(tmp_path, scales):
    """Sequences of 5 to 8 tokens: what is padded with -100 counts neither in the estimate nor in its scale."""
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    dataset = []
    for start in range(64):
        ids = (start + torch.arange(8)) % 8
        dataset.append({"input_ids": ids, "labels": torch.where(torch.arange(8) < 5 + start % 4, ids, -100)})
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=24, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    names = {"model": model, "args": args, "dataset": dataset, "k": 10, "bs": 2 * 8 * 5.5}
    exec(recipe("Hugging Face Trainer"), names)
    assert len(scales) == 3  # at steps 0, 10 and 20, on the first of two micro-batches
    assert all(0.3 < scale < 0.7 and round(scale * 88, 6).is_integer() for scale in scales)
    history = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert history[-1] < 0.7 * history[0]
    assert isinstance(names["trainer"].optimizer.optimizer, SophiaG)
    assert {group["bs"] for group in names["trainer"].optimizer.param_groups} == {88}


def loader(batches):
    return torch.utils.data.DataLoader([*batches], batch_size=None)


def test_the_accelerate_recipe_trains(scales):
    pytest.importorskip("accelerate")
    names = {"model": make_model(), "loader": loader(bigram_batches(120)), "n": 2, "bs": 128}
    exec(recipe("accelerate"), names)
    assert_trained(names["accelerator"].unwrap_model(names["model"]))
    assert scales == [0.5] * 6
    assert names["sophia"].state[next(names["model"].parameters())]["step"] == 60
    assert names["optimizer"].optimizer is names["sophia"] and names["sophia"].statistics()["win_rate"] > 0


def test_the_lightning_recipe_trains(scales):
    pytest.importorskip("pytorch_lightning")
    model = make_model()
    exec(recipe("Lightning"), {"model": model, "loader": loader(bigram_batches(60)), "bs": 64})
    assert_trained(model)
    assert scales == [1.0] * 6


def test_lora_adapters_train():
    """Most parameters are frozen; both estimators leave them alone."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    for cls in (SophiaG, SophiaH):
        torch.manual_seed(0)
        sizes = {"vocab_size": 8, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
        base = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, attn_implementation="eager")
        )
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
        before = {name: p.clone() for name, p in model.named_parameters()}
        optimizer, losses = cls(model.parameters(), lr=1e-2, **({"bs": 64} if cls is SophiaG else {})), []
        for step, (x, y) in enumerate(bigram_batches(20)):
            if step % 5 == 0 and cls is SophiaG:
                sophia.sampled_label_loss(model(x).logits).backward()
                optimizer.update_hessian()
            elif step % 5 == 0:
                optimizer.update_hessian(sophia.hutchinson(loss_fn(model(x).logits, y), model.parameters()))
            optimizer.zero_grad()
            loss = loss_fn(model(x).logits, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for name, p in model.named_parameters():
            assert p.requires_grad == ("lora" in name) and torch.equal(p, before[name]) != p.requires_grad
