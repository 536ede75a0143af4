"""Runs of other models than GPT-2: every optimizer, resumes, other numbers of ranks, FP8, and what is refused."""

import dataclasses
import json

import pytest
import torch

import sample
import train_adam
import train_sophiag
from model import GPT, GPTConfig
from sample import generate
from tests.conftest import interrupt, losses, read_lines, torchrun
from tests.test_model_kinds import KINDS
from tests.test_sample import write_run
from tests.training.test_resume import contents, refused, tiny  # noqa: F401  (a fixture)
from train_adam import AdamConfig
from training.checkpoint import read_checkpoint, save_checkpoint
from training.errors import UserError
from training.fp8 import to_fp8
from training.hf import load_model

LLAMA = ["--norm=rmsnorm", "--position=rope", "--n_kv_head=1", "--mlp=swiglu", "--mlp_hidden=24"]
QWEN = [*LLAMA, "--qk_norm=True", "--tie_embeddings=False"]
NEOX = ["--position=rope", "--rope_dim=4", "--parallel_block=True", "--bias=True", "--tie_embeddings=False"]


@pytest.mark.parametrize(
    "script, argv",
    [
        (train_adam, QWEN),
        (train_adam, [*LLAMA, "--optimizer_name=soap"]),
        (train_adam, [*LLAMA, "--optimizer_name=muon"]),
        (train_sophiag, [*NEOX, "--optimizer_name=sophiah"]),
        (train_sophiag, [*QWEN, "--adamw_for=embeddings+scalars", "--activation_checkpointing=True"]),
        (train_sophiag, [*QWEN, "--optimizer_name=sophia_muon"]),
    ],
    ids=["adamw", "soap", "muon", "sophiah", "sophiag", "sophia_muon"],
)
def test_a_resume_equals_the_uninterrupted_run(tiny, tmp_path, monkeypatch, script, argv):  # noqa: F811
    argv = [*tiny, *argv, "--max_iters=14", "--eval_interval=7", *(["--hess_interval=4"] * (script is train_sophiag))]
    script.main(argv)
    cut = [word.replace("/out", "/cut") for word in argv]
    interrupt(monkeypatch, script.main, cut, steps=9)
    script.main([*cut, "--init_from=resume"])
    assert losses(tmp_path / "cut") == losses(tmp_path / "out") and len(losses(tmp_path / "out")) == 14
    a, b = (read_checkpoint(tmp_path / name / "ckpt.pt")["model"] for name in ("out", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_resume_names_the_settings_that_are_missing_and_takes_both_spellings(tiny, tmp_path, capsys):  # noqa: F811
    train_adam.main([*tiny, *QWEN, "--rope_dim=4", "--max_iters=2"])
    before = contents(tmp_path / "out")
    error = refused(capsys, train_adam.main, [*tiny, "--max_iters=4", "--init_from=resume"])
    for remedy in [*QWEN, "--rope_dim=4"]:
        assert remedy in error, error
    assert "--gelu" not in error and contents(tmp_path / "out") == before
    resume = [*tiny, *QWEN, "--rope_dim=4", "--init_from=resume"]
    for changed in ("--rope_base=5000", "--norm_eps=1e-6"):  # neither shows in a shape
        error = refused(capsys, train_adam.main, [*resume, changed, "--max_iters=4"])
        assert changed.partition("=")[0] in error and contents(tmp_path / "out") == before
    train_adam.main([*resume, "--max_iters=4"])

    gpt2 = [*tiny, f"--out_dir={tmp_path}/gpt2"]
    train_adam.main([*gpt2, "--max_iters=2"])
    error = refused(capsys, train_adam.main, [*gpt2, "--n_embd=32", "--max_iters=4", "--init_from=resume"])
    assert "--n_embd=16" in error and "mlp_hidden" not in error, "it follows from n_embd"
    train_adam.main([*gpt2, "--n_kv_head=2", "--mlp_hidden=64", "--max_iters=4", "--init_from=resume"])
    history = json.loads((tmp_path / "gpt2" / "config.json").read_text())["history"]
    assert history == [{"step": 2, "changed": {"max_iters": [2, 4], "lr_decay_iters": [2, 4]}}]


def test_a_checkpoint_without_the_settings_is_gpt2s(tiny, tmp_path, capsys):  # noqa: F811
    train_adam.main([*tiny, "--max_iters=2"])
    checkpoint = read_checkpoint(tmp_path / "out" / "ckpt.pt")
    old = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "gelu",
           "scale_attn_by_inverse_layer_idx"}  # fmt: skip
    assert old < checkpoint["model_args"].keys()
    added = checkpoint["model_args"].keys() - old
    for part in ("model_args", "config"):
        checkpoint[part] = {key: value for key, value in checkpoint[part].items() if key not in added}
    save_checkpoint(tmp_path / "out", {**checkpoint, "is_best": False})
    error = refused(capsys, train_adam.main, [*tiny, "--norm=rmsnorm", "--max_iters=4", "--init_from=resume"])
    assert "norm = layernorm, this run has rmsnorm" in error
    train_adam.main([*tiny, "--max_iters=4", "--init_from=resume"])
    assert read_lines(tmp_path / "out")[-1]["step"] == 4
    train_adam.main([*tiny, f"--out_dir={tmp_path}/new", "--max_iters=1", f"--init_from=ckpt:{tmp_path}/out"])


@pytest.mark.parametrize("kind", ["qwen3", "neox"])
def test_tools_rebuild_the_model_from_its_checkpoint(tmp_path, capsys, kind):
    model, idx = write_run(tmp_path, spread=5.0, **{**KINDS[kind], "n_head": 4, "n_embd": 32}), torch.tensor([[0]])
    loaded, tokenizer, _ = load_model("resume", tmp_path)
    assert loaded.config == model.config and torch.equal(loaded(idx)[0], model(idx)[0])
    sample.main([f"--out_dir={tmp_path}", "--device=cpu", "--max_new_tokens=20", "--temperature=0"])
    text = generate(model, idx, 20, temperature=0)[0, 1:].tolist()
    assert capsys.readouterr().out == tokenizer.decode(text) + "\n"


def test_settings_of_another_kind_are_warned_of_even_where_they_are_the_defaults(tiny, tmp_path, capsys):  # noqa: F811
    train_adam.main([*tiny, *QWEN, "--max_iters=2"])
    argv = [*tiny, "--max_iters=1", f"--init_from=ckpt:{tmp_path}/out", f"--out_dir={tmp_path}/new"]
    capsys.readouterr()
    train_adam.main([*argv, "--position=learned", "--mlp=relu2", "--mlp_hidden=24", "--bias=False"])
    warning = f"warning: not used: position = 'learned', mlp = 'relu2'; the model is that of ckpt:{tmp_path}/out.\n"
    assert capsys.readouterr().err == warning
    written = json.loads((tmp_path / "new" / "config.json").read_text())["config"]
    assert written["position"] == "rope" and written.keys() == {field.name for field in dataclasses.fields(AdamConfig)}


def test_weights_go_on_at_any_block_size_with_rope(tiny, tmp_path):  # noqa: F811
    train_adam.main([*tiny, *QWEN, "--max_iters=2"])
    argv = [*tiny, "--max_iters=1", f"--init_from=ckpt:{tmp_path}/out"]
    for size in (8, 32):
        train_adam.main([*argv, f"--block_size={size}", f"--out_dir={tmp_path}/{size}"])
        args = read_checkpoint(tmp_path / str(size) / "ckpt.pt")["model_args"]
        assert (args["block_size"], args["norm"], args["n_kv_head"]) == (size, "rmsnorm", 1)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--norm=batchnorm"], "norm = 'batchnorm' is not possible: one of layernorm, rmsnorm"),
        (["--n_kv_head=3"], "n_head=2 and n_kv_head=3; change one of them"),
        (["--position=rope", "--rope_dim=3"], "rope_dim must be even and at most n_embd / n_head = 8, got 3"),
        (["--rope_base=1000"], "rope_base=1000.0 has no effect: position='learned' does not use it"),
        (["--mlp_hidden=-1"], "mlp_hidden = -1 is not possible: at least 0"),
    ],
)
def test_bad_settings_are_one_sentence_and_write_nothing(tiny, tmp_path, capsys, argv, message):  # noqa: F811
    assert message in refused(capsys, train_adam.main, [*tiny, *argv])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("argv", [QWEN, NEOX], ids=["qwen3", "neox"])
def test_ranks_that_share_or_split_the_model_take_the_same_steps(tiny, tmp_path, argv):  # noqa: F811
    """bf16, so that a gain gathered in bfloat16 instead of float32 would show."""
    ended = {}
    for name, more in {"one": [], "copies": ["--fsdp=False"], "shards": ["--fsdp=True"]}.items():
        words = [
            *tiny,
            *argv,
            "--max_iters=8",
            "--hess_bs=2",
            "--dtype=bfloat16",
            f"--out_dir={tmp_path}/{name}",
            *more,
        ]
        done = torchrun(1 if name == "one" else 2, "train_sophiag.py", words)
        assert done.returncode == 0, done.stderr
        ended[name] = losses(tmp_path / name)
    assert ended["shards"] == pytest.approx(ended["copies"], abs=1e-3)
    assert ended["one"] == pytest.approx(ended["copies"], abs=1e-3)
    for name in ("one", "shards"):
        words = [*tiny, *argv, "--max_iters=10", "--hess_bs=2", "--dtype=bfloat16", f"--out_dir={tmp_path}/{name}"]
        train_sophiag.main([*words, "--init_from=resume"])
        ended[name] = losses(tmp_path / name)
    assert ended["shards"] == pytest.approx(ended["one"], abs=1e-3) and len(ended["one"]) == 10


def test_fp8_takes_the_blocks_linear_layers_and_names_a_width_that_does_not_fit():
    pytest.importorskip("torchao")
    shape = {**KINDS["qwen3"], "n_layer": 1, "n_head": 4, "n_embd": 64, "block_size": 16, "vocab_size": 64}
    model = GPT(GPTConfig(**shape | {"mlp_hidden": 48}))
    to_fp8(model, torch.device("cpu"), emulate=True)
    converted = [name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"]
    assert [name.removeprefix("transformer.h.0.") for name in converted] == [
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj",
    ]  # fmt: skip
    idx = torch.randint(64, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        model(idx, idx)[1].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for settings, message in (
        ({"n_head": 4, "mlp_hidden": 40}, "mlp_hidden to be a multiple of 16, got 40"),
        (
            {"n_head": 16, "n_kv_head": 1, "mlp_hidden": 48},
            r"\(n_head \+ 2 n_kv_head\) \* n_embd / n_head to be .* 16, got 72",
        ),
    ):
        with pytest.raises(UserError, match=message):
            to_fp8(GPT(GPTConfig(**shape | settings)), torch.device("cpu"), emulate=True)
