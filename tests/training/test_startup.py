"""The start of a run: what it imports, where compiled code is kept, which attention kernel it names."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_adam
from model import GPT, GPTConfig
from tests.conftest import ROOT, tiny_words
from training import startup
from training.startup import attention_line, keep_compiled_code

CUDA = torch.device("cuda")
SMALL = {"block_size": 16, "vocab_size": 32, "n_layer": 1, "n_head": 4, "n_embd": 32}
OPERATORS = {
    "flash": "FlashAttention-2", "cudnn": "cuDNN", "efficient": "memory-efficient", "attention_math": "plain products",
}  # fmt: skip
UNNEEDED = ("transformers", "wandb", "matplotlib", "scipy", "torchao", "datasets", "torch._inductor.compile_fx")


def test_a_run_imports_no_package_that_it_does_not_use(corpus, tmp_path):
    code = "import sys, json, train_adam; train_adam.main(sys.argv[1:]); print(json.dumps(list(sys.modules)))"
    words = [*tiny_words(corpus, tmp_path), "--max_iters=1", "--warmup_iters=0"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not set(UNNEEDED) & set(json.loads(done.stdout.splitlines()[-1]))
    assert "attention: " not in done.stdout, "only GPUs have a choice"


@pytest.mark.gpu
def test_a_run_on_a_gpu_names_its_kernel_in_one_line(tiny, capsys):
    train_adam.main([*tiny, "--device=cuda", "--max_iters=1", "--warmup_iters=0"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("attention: ")]
    assert len(lines) == 1 and "unknown" not in lines[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_only_a_compiled_run_looks_for_a_cache_folder(tiny, monkeypatch, compiled):
    folders = []
    monkeypatch.setattr("training.step.compiler", lambda on: lambda function: function)
    monkeypatch.setattr("training.run.keep_compiled_code", lambda device: folders.append(device.type))
    train_adam.main([*tiny, "--max_iters=1", "--warmup_iters=0", f"--compile={compiled}"])
    assert folders == ["cpu"] * compiled


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("settings", [{}, {"n_kv_head": 2}, {"dropout": 0.25}, {"n_embd": 12, "n_head": 4}])
@pytest.mark.parametrize("only", [None, SDPBackend.MATH])
def test_the_line_names_the_kernel_that_the_model_runs(monkeypatch, device, settings, only):
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    config = GPTConfig(**SMALL | settings)
    gpt = GPT(config).to(device, torch.bfloat16)
    tokens = torch.zeros(2, 16, dtype=torch.int64, device=device)
    kernels = [only] if only else list(SDPBackend.__members__.values())[1:5]
    with sdpa_kernel(kernels), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        line = attention_line(config, torch.bfloat16, torch.device(device))
        gpt(tokens, tokens)
    ran = [event.key for event in profile.key_averages() if event.key.startswith("aten::_scaled_dot_product_")]
    names = {name for kind, name in OPERATORS.items() if f"aten::_scaled_dot_product_{kind}" in ran[0]}
    assert len(ran) == 1 and line.startswith(f"attention: {names.pop()}"), (ran, line)


@pytest.mark.parametrize("settings", [{}, {"n_kv_head": 1, "dropout": 0.1}])
def test_torch_is_asked_about_the_tensors_that_the_model_passes(monkeypatch, settings):
    """Shapes, strides and arguments: a kernel may refuse any of them."""
    asked, config = [], GPTConfig(**SMALL | settings)

    def record(answer):
        def call(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
            seen = [(t.shape[1:], t.stride()[1:], t.dtype, t.requires_grad) for t in (q, k, v)]
            asked.append([seen, attn_mask, dropout_p, is_causal, enable_gqa])
            return answer(q)

        return call

    monkeypatch.setattr(torch, "_fused_sdp_choice", record(lambda q: 1))
    monkeypatch.setattr(F, "scaled_dot_product_attention", record(lambda q: q))
    attention_line(config, torch.float32, torch.device("cpu"))
    GPT(config)(torch.zeros(2, 16, dtype=torch.int64))
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("kind", "capability", "cudnn", "words", "cost"),
    [
        (SDPBackend.CUDNN_ATTENTION, (9, 0), 91900, "cuDNN", False),
        (SDPBackend.FLASH_ATTENTION, (9, 0), 91002, "FlashAttention-2 (torch prefers cuDNN from 91501 on", True),
        (SDPBackend.FLASH_ATTENTION, (9, 0), 91900, "FlashAttention-2;", True),
        (SDPBackend.FLASH_ATTENTION, (8, 0), 91002, "FlashAttention-2", False),
        (SDPBackend.EFFICIENT_ATTENTION, (9, 0), None, "memory-efficient", False),
        (SDPBackend.MATH, (7, 0), 91002, "plain products", False),
    ],
)
def test_flash_attention_on_hopper_is_told_what_it_costs(monkeypatch, kind, capability, cudnn, words, cost):
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: int(kind.value))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    line = attention_line(GPTConfig(**SMALL), torch.float32, torch.device("cpu"))
    assert line.startswith(f"attention: {words}") and (startup.COST in line) == cost and "\n" not in line


@pytest.mark.parametrize("error", [RuntimeError, AttributeError, KeyError])
def test_a_torch_that_does_not_answer_ends_no_run(monkeypatch, error):
    def fails(*_, **__):
        raise error("no such function")

    monkeypatch.setattr(torch, "_fused_sdp_choice", fails)
    line = attention_line(GPTConfig(**SMALL), torch.float32, torch.device("cpu"))
    assert line == f"attention: unknown ({error.__name__})"


@pytest.fixture
def no_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "x")  # so that it is what it was after the test
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    return tmp_path / "cache"


def test_code_for_a_gpu_is_kept_in_the_users_cache_folder(no_cache_folder):
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    keep_compiled_code(CUDA)
    assert cache_dir() == str(no_cache_folder / "torch" / "inductor") and os.path.isdir(cache_dir())
    assert os.listdir(cache_dir()) == []


def test_a_folder_that_the_user_gave_stays(no_cache_folder, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    keep_compiled_code(CUDA)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"


@pytest.mark.parametrize("trouble", ["cpu", "no folder", "no locks", "full"])
def test_elsewhere_torchs_default_stays(no_cache_folder, monkeypatch, trouble):
    def fails(*_, **__):
        raise OSError

    if trouble == "no folder":
        no_cache_folder.write_text("a file")
    elif trouble == "no locks":
        monkeypatch.setattr(startup.fcntl, "flock", fails)
    elif trouble == "full":
        monkeypatch.setattr(startup.tempfile, "TemporaryFile", fails)
    keep_compiled_code(torch.device("cpu") if trouble == "cpu" else CUDA)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
