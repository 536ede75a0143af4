"""export_hf.py: what transformers load without a network computes and encodes as here; lm-eval runs on it."""

import importlib.util
import json
import math
import os
import resource
import subprocess
import sys

import pytest
import torch

import export_hf
from sample import generate
from tests.conftest import ROOT
from tests.test_sample import CHARACTERS, write_run
from training.errors import command
from training.hf import load_model
from training.tokenizer import get_tokenizer, read_tokenizer_json, same

TEXTS = [
    "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer",
    "   leading, trailing   \t\t and\r\n\r\n\n  mixed \u00a0blanks\u2003 of \u3000all kinds \x0b\x0c\x1c\x1f ",
    "I'll we've they'd DON'T it's 'quoted' ''twice'' 1234567890 3.14 1e-9 ٣٤٥ ½ Ⅷ",
    "naïve Grüße, 日本語のテキスト, Привет, مرحبا, עברית, हिन्दी, 한국어 🤗👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 ﬁ \u200b\ufeff",
    "def f(x):\n    return {'a': [x ** 2, ~x]}  # comment\n\n\nif __name__ == '__main__':\n\tprint(f(3))\n",
    "https://example.org/a?b=c&d=%20#e <html>&amp;</html> \\n \\\\ $x_i^{2}$ ---- ==== !!!???...",
    "aaaaaaaaaaaaaaaaaaaaaaaa zzzzqqqxxj antidisestablishmentarianism SolidGoldMagikarp",
    "\n", " ", "", "\ufffd", "\x00\x01\x7f",
]  # fmt: skip


def load(folder):
    """The exported model and tokenizer, in a process that may not use the network for it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = {"local_files_only": True}
    return AutoModelForCausalLM.from_pretrained(folder, **arguments), AutoTokenizer.from_pretrained(folder, **arguments)


def export(tmp_path, *argv):
    export_hf.main([f"--out_dir={tmp_path}/run", f"--to={tmp_path}/hf", *argv])
    return load(tmp_path / "hf")


LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "n_kv_head": 1, "bias": False, "tie_embeddings": False}
NEOX = {"position": "rope", "rope_dim": 4, "parallel_block": True}


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"bias": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"gelu": "exact"},
        LLAMA,
        LLAMA | {"qk_norm": True, "tie_embeddings": True},
        NEOX,
        NEOX | {"tie_embeddings": False, "n_head": 1, "n_embd": 15, "rope_dim": 6},
        LLAMA | {"n_head": 3, "n_embd": 18, "bias": True},
    ],
)
def test_logits_and_files(tmp_path, capsys, shape):
    model = write_run(tmp_path / "run", 50304, "gpt2", n_layer=2, spread=5.0, **shape).eval()
    hf_model, hf_tokenizer = export(tmp_path)
    assert "model.safetensors" in capsys.readouterr().out
    idx = torch.randint(50257, (2, 16), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(hf_model.eval()(idx).logits, model(idx, idx)[0][..., :50257], atol=1e-4, rtol=0)
    assert hf_model.config.vocab_size == 50257 and len(hf_tokenizer) == 50257
    names = "config.json generation_config.json merges.txt model.safetensors tokenizer.json tokenizer_config.json"
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [*names.split(), "vocab.json"]
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert [generation[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [50256] * 3


@pytest.mark.parametrize("shape", [{}, LLAMA, NEOX])
def test_its_greedy_text_is_ours(tmp_path, shape):
    model = write_run(tmp_path / "run", 50304, "gpt2", spread=5.0, **shape).eval()
    hf_model, hf_tokenizer = export(tmp_path)
    inputs = hf_tokenizer("To be", return_tensors="pt")
    text = hf_model.generate(**inputs, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert torch.equal(text, generate(model, inputs["input_ids"], 10, temperature=0, vocab_size=50257))


def test_its_tokenizer_encodes_like_tiktoken(tmp_path):
    write_run(tmp_path / "run", 50304, "gpt2")
    _, exported = export(tmp_path)
    tokenizer = get_tokenizer("gpt2")
    for text in [*TEXTS, "".join(TEXTS), (ROOT / "README.md").read_text(), (ROOT / "model.py").read_text()]:
        ids = exported(text)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert exported.decode(ids, clean_up_tokenization_spaces=False) == text
    assert exported("<|endoftext|>")["input_ids"] == [50256] and exported.model_max_length == 16
    assert same(read_tokenizer_json(tmp_path / "hf" / "tokenizer.json"), "gpt2"), "data of either fine-tune it"


def test_the_two_classic_files_make_the_same_tokenizer(tmp_path):
    from transformers import GPT2Tokenizer

    write_run(tmp_path / "run", 50304, "gpt2")
    export(tmp_path)
    (tmp_path / "hf" / "tokenizer.json").unlink()
    classic, tokenizer = GPT2Tokenizer.from_pretrained(tmp_path / "hf", local_files_only=True), get_tokenizer("gpt2")
    assert all(classic(text)["input_ids"] == tokenizer.encode(text) for text in TEXTS)


def test_a_run_on_characters(tmp_path):
    model = write_run(tmp_path / "run", spread=5.0).eval()
    hf_model, hf_tokenizer = export(tmp_path)
    text = "\nbad  cab\n\n fig "
    ids = hf_tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == get_tokenizer({"characters": CHARACTERS}).encode(text)
    assert hf_tokenizer.decode(ids[0]) == text
    torch.testing.assert_close(hf_model(ids).logits, model(ids, ids)[0], atol=1e-4, rtol=0)
    with pytest.raises(Exception, match=r"(?i)unk"):
        hf_tokenizer("€")
    again, tokenizer, _ = load_model(f"hf:{tmp_path}/hf", None)
    assert tokenizer.spec == {"characters": CHARACTERS} and torch.equal(again(ids)[0], model(ids)[0])


@pytest.mark.parametrize("end", ["</s>", "none of them"])
def test_generation_ends_at_the_end_of_text_of_the_runs_tokenizer(tmp_path, end):
    """Not at GPT-2's, which is an ordinary token of any other vocabulary that is as large."""
    vocabulary = {f"t{i}": i for i in range(50300) if i != 7} | {end: 7}
    text = json.dumps({"version": "1.0", "added_tokens": [], "model": {
        "type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}})  # fmt: skip
    write_run(tmp_path / "run", 50300, {"file": "tokenizer.json", "sha256": "0", "json": text}, **LLAMA)
    hf_model, hf_tokenizer = export(tmp_path)
    expected = 7 if end == "</s>" else None
    generation = hf_model.generation_config
    found = [generation.bos_token_id, generation.eos_token_id, generation.pad_token_id, hf_model.config.eos_token_id]
    assert found == [expected] * 4 and hf_tokenizer.eos_token_id == expected


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--to="], "give the folder to write as --to=DIR"),
        (["--to={folder}/run"], "run is not an empty folder"),
        (["--out_dir={folder}/none"], "none holds no checkpoint"),
        (["--to=/proc/self/hf"], "cannot be read or written"),
        (["--to={folder}/\udcff"], "is to be a name, and it is not UTF-8; use another one"),
        (["--out_dir={folder}/relu2"], "the nearest, GPT2, cannot have mlp='relu2'"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, argv, message):
    write_run(tmp_path / "run", 50304, "gpt2")
    write_run(tmp_path / "relu2", mlp="relu2")
    argv = [f"--out_dir={tmp_path}/run", f"--to={tmp_path}/hf", *(word.format(folder=tmp_path) for word in argv)]
    with pytest.raises(SystemExit) as ended:
        command(lambda: export_hf.main(argv))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "hf").exists()


TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}
training_split: train
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "The {{{{thing}}}} is"
doc_to_choice: ["red", "green"]
doc_to_target: colour
metric_list: [{{metric: acc}}]
"""


@pytest.mark.parametrize("existed", [True, False])
def test_a_disk_that_takes_no_weights_keeps_no_part_of_them(tmp_path, capsys, existed):
    """The limit on the size of a file stands for a full disk; the writer is a library's in Rust."""
    write_run(tmp_path / "run", 50304, "gpt2")
    folder = tmp_path / "hf"
    if existed:
        folder.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            command(lambda: export(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "File too large" in error
    assert folder.exists() == existed and not list(tmp_path.glob("hf/*"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install -r requirements-eval.txt")
@pytest.mark.parametrize("shape", [{}, LLAMA, LLAMA | {"qk_norm": True}, NEOX], ids=["gpt2", "llama", "qwen3", "neox"])
def test_lm_eval_runs_few_shot_on_an_exported_model(tmp_path, shape):
    """The path of the SuperGLUE numbers in Sophia's paper: choices are compared by their likelihood after examples."""
    model = write_run(tmp_path / "run", 50304, "gpt2", spread=5.0, block_size=64, **shape).eval()
    export(tmp_path)
    things = {"train": [("rose", 0), ("leaf", 1), ("frog", 1), ("blood", 0)], "test": [("grass", 1), ("brick", 0)] * 4}
    for split, rows in things.items():
        lines = [json.dumps({"thing": thing, "colour": colour}) for thing, colour in rows]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "colours.yaml").write_text(TASK.format(folder=tmp_path))
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "colours", "--device", "cpu", "--num_fewshot", "2",
        "--model_args", f"pretrained={tmp_path}/hf", "--include_path", str(tmp_path), "--log_samples",
        "--output_path", str(tmp_path / "results"),
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    # Not in the repository's root, where its evaluate.py would hide Hugging Face's package of that name.
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**os.environ, **offline}
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").rglob("samples_colours_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(samples) == 8
    tokenizer = get_tokenizer("gpt2")
    for sample in samples:
        for request, ((found, _),) in zip(sample["arguments"].values(), sample["resps"], strict=True):
            assert request["arg_0"].count("The ") == 3, "two examples and the question"
            context, answer = (tokenizer.encode(request[key]) for key in ("arg_0", "arg_1"))
            idx = torch.tensor([context + answer])
            log_probs = model(idx, idx)[0][0, :, :50257].log_softmax(-1)
            expected = sum(log_probs[len(context) - 1 + i, token].item() for i, token in enumerate(answer))
            assert math.isclose(float(found), expected, abs_tol=1e-3)


def test_a_user_sees_our_messages_only(tmp_path):
    """One that reads a folder of transformers and writes one."""
    write_run(tmp_path / "run", 64, {"characters": CHARACTERS}, n_layer=1)
    export_hf.main([f"--out_dir={tmp_path}/run", f"--to={tmp_path}/hf"])
    command = [sys.executable, ROOT / "export_hf.py", f"--init_from=hf:{tmp_path}/hf", f"--to={tmp_path}/again"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1, done
