"""fp8: which layers it takes, what stays as it was, how far its losses are off, and its refusals."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch

from model import GPT, GPTConfig
from tests.conftest import read_lines, tiny_words
from train_adam import AdamConfig
from train_sophiag import main
from training import fp8
from training import run as run_module
from training.errors import UserError
from training.fp8 import check_fp8_loss, to_fp8
from training.step import Batches

CPU = torch.device("cpu")


def test_only_the_blocks_linear_layers(monkeypatch):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64))
    plain, names = copy.deepcopy(model), [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())
    to_fp8(model, CPU, emulate=True)
    converted = [name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"]
    assert converted == [f"transformer.h.{i}.{x}" for i in (0, 1) for x in
                         ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]  # fmt: skip
    assert [name for name, _ in model.named_parameters()] == names, "checkpoints and parameter groups fit"
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    idx = torch.randint(64, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [m(idx, idx.roll(1))[1] for m in (plain, model)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() != losses[1].item() and abs(losses[0].item() - losses[1].item()) < 0.05
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 0.2 * a.grad.norm()


def test_a_run(tiny, tmp_path, monkeypatch):
    """Emulated on the CPU: Sophia-G with it learns, writes the same kind of checkpoint, and is resumed without it."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(run_module, "to_fp8", lambda model, device: to_fp8(model, device, emulate=True))
    main([*tiny, "--dtype=bfloat16", "--fp8=True"])
    losses = [line["train/loss"] for line in read_lines(tmp_path / "out") if "train/loss" in line]
    assert losses[-1] < losses[0]
    main([*tiny, "--dtype=bfloat16", "--max_iters=32", "--init_from=resume"])
    assert read_lines(tmp_path / "out")[-1]["step"] == 32


def test_refusals(corpus, tmp_path):
    argv = tiny_words(corpus, tmp_path / "out")
    with pytest.raises(UserError, match=r"fp8 needs an NVIDIA GPU with FP8 products .* this is cpu"):
        main([*argv, "--dtype=bfloat16", "--fp8=True"])
    with pytest.raises(UserError, match="fp8 needs dtype = 'bfloat16'"):
        main([*argv, "--dtype=float32", "--fp8=True"])
    with pytest.raises(UserError, match=r"fp8_loss needs a Hopper GPU .* this is cpu"):
        main([*argv, "--dtype=bfloat16", "--fp8_loss=True"])
    with pytest.raises(UserError, match="fp8_loss needs dtype = 'bfloat16'"):
        main([*argv, "--dtype=float32", "--fp8_loss=True"])
    with pytest.raises(UserError, match="fsdp splits it"):
        main([*argv, "--dtype=bfloat16", "--fp8_loss=True", "--fsdp=True"])
    with pytest.raises(UserError, match="sophiah differentiates twice, and fp8 cannot be"):
        main([*argv, "--optimizer_name=sophiah", "--fp8=True"])
    assert not (tmp_path / "out" / "config.json").exists()
    for name, size in (("n_embd", 40), ("block_size", 100)):
        shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 64, name: size}
        with pytest.raises(UserError, match=f"{name} to be a multiple of 16, got {size}"):
            to_fp8(GPT(GPTConfig(**shape)), CPU, emulate=True)


@pytest.mark.parametrize(
    "words, wrong",
    [
        (["--block_size_schedule=0:3,2:16"], None),
        (["--block_size_schedule=0:3,2:16", "--batch_size=2"], 24),  # 128 sequences of 3 tokens: 16 times 8, not 10
        (["--block_size_schedule=0:3,2:16", "--hess_bs=15", "--batch_size=4"], 60),  # of 80: 4 times 20, not 21
    ],
)
def test_the_tokens_of_every_micro_batch_have_to_fit_before_the_run_begins(tiny, tmp_path, monkeypatch, words, wrong):
    """A stage that begins after hours could fail else. A GPU takes multiples of 16; the emulation takes all."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(run_module, "to_fp8", lambda model, device: to_fp8(model, device, emulate=True))
    argv = [*tiny, "--dtype=bfloat16", "--fp8=True", "--max_iters=4", *words]
    with pytest.raises(UserError, match=f"has {wrong}; change batch_size") if wrong else contextlib.nullcontext():
        main(argv)
    assert (tmp_path / "out" / "config.json").exists() == (wrong is None)


@pytest.mark.parametrize(
    ("width", "tokens", "errors", "message"),
    [
        (64, [8192], (0.03, 0.06, 0.002), None),
        (40, [8192], (0.03, 0.06, 0.002), "n_embd to be a multiple of 16, got 40"),
        (64, [9000, 8192], (0.03, 0.06, 0.002), "fp8_loss needs a multiple of 16 tokens .* has 9000"),
        (
            64,
            [8192, 4096],
            (0.03, 0.06, 0.002),
            "8,192 tokens or more in a micro-batch, .* has 4,096; raise",
        ),
        (64, [8192], (0.03, 0.2, 0.002), "wrong gradients here .* 0.03 and 0.2, 0.002 of a sum"),
        (64, [8192], (0.03, 0.06, 0.02), "wrong gradients here .* 0.02 of a sum of probabilities"),
        (64, [8192], (float("nan"), 0.03, 0.002), "wrong gradients here"),
    ],
)
def test_fp8_loss_is_refused_where_it_would_not_be_used_or_be_wrong(monkeypatch, width, tokens, errors, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fp8, "gradient_errors", lambda *_: errors)
    config = GPTConfig(n_layer=1, n_head=2, n_embd=width, block_size=16, vocab_size=64)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_fp8_loss(torch.device("cuda"), config, tokens)


def test_an_amd_gpu_of_hoppers_capability_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "MI300X")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    config = GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=16, vocab_size=64)
    with pytest.raises(UserError, match=r"fp8_loss needs a Hopper GPU .* this is MI300X"):
        check_fp8_loss(torch.device("cuda"), config, [8192])


def test_the_size_of_a_micro_batch_counts_the_ranks_and_the_stages():
    def tokens(ranks, **settings):
        config = AdamConfig(dataset="none", total_bs=24, block_size=64, batch_size=8, **settings)
        return Batches(config, None, SimpleNamespace(share=lambda n: range(n // ranks), size=ranks)).tokens_at_once(24)

    assert tokens(1) == [8 * 64]
    assert tokens(4) == [6 * 64]
    assert tokens(1, block_size_schedule="0:48,10:64") == [8 * 48, 8 * 64]


@pytest.mark.gpu
def test_on_the_gpu_the_loss_is_that_of_bf16():
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 here")
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=256, block_size=128, vocab_size=512)).cuda()
    plain = copy.deepcopy(model)
    to_fp8(model, torch.device("cuda"))
    idx = torch.randint(512, (8, 128), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        losses = [torch.compile(m)(idx, idx.roll(1))[1] for m in (plain, model)]
    losses[1].backward()
    assert abs(losses[0].item() - losses[1].item()) < 0.01
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
