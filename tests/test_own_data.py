"""From own files to a first sample: every tokenizer and every form of data through the scripts that a person runs."""

import json
import math
import shutil

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import export_hf
import sample
import train_adam
from tests.conftest import read_lines, torchrun, write_corpus
from tests.data.test_corpus import prepare
from tests.data.test_sources import byte_level
from training.checkpoint import load_checkpoint
from training.data import open_dataset
from training.errors import command
from training.tokenizer import get_tokenizer, same

TEXT = "".join(f"Chapter {i}. The whale swam {i * i} miles; naïve 日本語 followed.\n" for i in range(700))
TINY = {
    "device": "cpu", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "total_bs": 8, "batch_size": 4,
    "max_iters": 6, "warmup_iters": 0, "learning_rate": 1e-3, "eval_interval": 3, "log_interval": 1, "eval_tokens": 320,
}  # fmt: skip


def words(**settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def train(dataset, out_dir, **settings):
    return train_adam.main(words(**TINY | {"dataset": dataset, "out_dir": out_dir} | settings))


def write_letters(folder, **sizes):
    """Random characters, 64 different ones."""
    spec = {"characters": "".join(map(chr, range(32, 96)))}
    (write_corpus(folder, **sizes) / "meta.json").write_text(json.dumps({"vocab_size": 64, "tokenizer": spec}))
    return folder


def refused(main, *arguments, **settings):
    with pytest.raises(SystemExit) as ended:
        command(lambda: main(*arguments, **settings))
    assert ended.value.code == 2


@pytest.mark.parametrize("kind", ["char", "gpt2", "tokenizer.json", "r50k_base"])
def test_text_to_training_sample_evaluation_and_export(tmp_path, monkeypatch, capsys, kind):
    if kind == "r50k_base":  # GPT-2's ranks under another name, which the web need not be asked for
        monkeypatch.setitem(tiktoken.registry.ENCODINGS, kind, get_tokenizer("gpt2").encoding)
    (tmp_path / "input.txt").write_text(TEXT)
    tokenizer = byte_level(tmp_path / "tok", texts=(TEXT,)) if kind == "tokenizer.json" else kind
    result = prepare(
        "text", "--source", tmp_path / "input.txt", "--out_dir", tmp_path / "mine", "--tokenizer", tokenizer
    )
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    train(tmp_path / "mine", run)
    facts = json.loads((run / "config.json").read_text())
    assert len(json.dumps(facts["tokenizer"])) < 300, "not the content of a tokenizer.json"
    shutil.rmtree(tmp_path / "tok", ignore_errors=True)
    capsys.readouterr()
    sample.main(words(out_dir=run, device="cpu", start="The whale", max_new_tokens=30, temperature=0.5))
    printed = capsys.readouterr().out
    assert printed.startswith("The whale") and len(printed) > 30
    found = evaluate.main(words(out_dir=run, device="cpu", stride=16))
    corpus = open_dataset(tmp_path / "mine")
    n_bytes = len(TEXT[-len(TEXT) // 10 :].encode())
    nats = found["loss"] * (len(corpus.val) - 1)
    assert nats / math.log(2) / found["bits_per_byte"] == pytest.approx(n_bytes, rel=0.02)
    shutil.rmtree(tmp_path / "mine")
    export_hf.main(words(out_dir=run, to=tmp_path / "hf"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True)
    line = "naïve whale 12;"
    ids = tokenizer(line)["input_ids"]
    ours = load_checkpoint(run)[0]["tokenizer"]
    assert ids == get_tokenizer(ours).encode(line) and tokenizer.decode(ids) == line
    assert model(torch.tensor([ids])).logits.shape[-1] == get_tokenizer(ours).vocab_size


def test_ids_of_an_unknown_tokenizer_are_announced_and_printed(tmp_path, capsys):
    folder = write_corpus(tmp_path / "c")
    (folder / "meta.json").write_text(json.dumps({"vocab_size": 64}))
    train(folder, tmp_path / "run")
    assert "sample.py will print ids" in capsys.readouterr().err
    sample.main(words(out_dir=tmp_path / "run", device="cpu", start="5 17", max_new_tokens=4))
    ids = capsys.readouterr().out.split()
    assert ids[:2] == ["5", "17"] and len(ids) == 6 and all(int(i) < 64 for i in ids)
    assert math.isnan(evaluate.main(words(out_dir=tmp_path / "run", device="cpu"))["bits_per_byte"])
    export_hf.main(words(out_dir=tmp_path / "run", to=tmp_path / "hf"))
    assert not (tmp_path / "hf/tokenizer.json").exists() and "not known" in capsys.readouterr().err


def test_going_on_with_other_characters_is_refused(tmp_path, capsys):
    for name, characters in (("a", "abcdefgh"), ("b", "hgfedcba")):
        write_corpus(tmp_path / name, vocab_size=8)
        (tmp_path / name / "meta.json").write_text(
            json.dumps({"vocab_size": 8, "tokenizer": {"characters": characters}})
        )
    train(tmp_path / "a", tmp_path / "run")
    refused(train, tmp_path / "b", tmp_path / "run", init_from="resume", max_iters=9)
    assert "the model reads 8 characters" in capsys.readouterr().err
    refused(evaluate.main, words(out_dir=tmp_path / "run", dataset=tmp_path / "b", device="cpu"))
    assert "holds other 8 characters" in capsys.readouterr().err
    train(tmp_path / "a", tmp_path / "run", init_from="resume", max_iters=9)


def test_shards_train_as_the_one_file_that_they_are_cut_from(tmp_path):
    whole = write_letters(tmp_path / "whole")
    tokens = np.fromfile(whole / "train.bin", "<u2")
    shutil.copytree(whole, tmp_path / "shards")
    (tmp_path / "shards/train.bin").unlink()
    for i, part in enumerate(np.array_split(tokens, 3)):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(part)
        (tmp_path / f"shards/a_train_{i:06}.bin").write_bytes(header.tobytes() + part.tobytes())
    for name in ("whole", "shards"):
        train(tmp_path / name, tmp_path / f"run_{name}")
    losses = [
        [line["train/loss"] for line in read_lines(tmp_path / f"run_{name}")[:-1]] for name in ("whole", "shards")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    found = [
        evaluate.main(words(out_dir=tmp_path / f"run_{n}", device="cpu", split="train")) for n in ("whole", "shards")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_exported_tokenizers_split_as_tiktoken_does(monkeypatch, name):
    """The patterns of these encodings, with GPT-2's ranks instead of their own, which only the web has."""
    ranks = {token: rank for token, rank in get_tokenizer("gpt2").encoding._mergeable_ranks.items() if rank < 5000}
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: ranks)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    tokenizer = get_tokenizer(name)
    exported = export_hf.tiktoken_tokenizer(tokenizer)
    for text in (
        TEXT[:5000],
        "it's 1234567\n\n  x \n y  \t\r\n",
        "HeLLo World's /// \n/ naïve日本語😀 \u00a0 z ",
        "  ",
    ):
        assert exported(text)["input_ids"] == tokenizer.encode(text) and exported.decode(tokenizer.encode(text)) == text
    assert exported("<|endoftext|>")["input_ids"] == [tokenizer.eot] == [exported.eos_token_id]
    spec = {"file": "tokenizer.json", "sha256": "0", "json": exported.backend_tokenizer.to_str()}
    assert same(spec, name) and same(name, spec) and not same(spec, "gpt2")


# Mixtures


@pytest.fixture
def mixture(tmp_path):
    write_letters(tmp_path / "a", n_train=3000, seed=1)
    write_letters(tmp_path / "b", n_train=2000, n_val=500, seed=2)
    return f"{tmp_path}/a:0.75,{tmp_path}/b:0.25"


def without_times(lines):
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def test_a_mixture_validates_each_and_their_mean_and_counts_epochs(tmp_path, mixture, capsys):
    train(mixture, tmp_path / "run")
    lines = read_lines(tmp_path / "run")
    for line in (lines[0], lines[-1]):
        for key in ("val/loss", "val/accuracy"):
            assert line[key] == pytest.approx(0.75 * line[f"{key}/a"] + 0.25 * line[f"{key}/b"], abs=1e-6)
        assert line["val/loss/a"] != line["val/loss/b"]
    assert lines[-1]["epoch/a"] == pytest.approx(48 * 0.75 / 187) and lines[-1]["epoch/b"] == pytest.approx(
        48 * 0.25 / 125
    )
    assert "epoch" not in lines[-1]
    found = evaluate.main(words(out_dir=tmp_path / "run", device="cpu", stride=16))
    each = [evaluate.main(words(out_dir=tmp_path / "run", device="cpu", stride=16, dataset=tmp_path / n)) for n in "ab"]
    assert found["loss"] == pytest.approx(0.75 * each[0]["loss"] + 0.25 * each[1]["loss"], abs=1e-9)
    for name, alone in zip("ab", each, strict=True):
        assert alone["loss"] == pytest.approx(lines[-1][f"val/loss/{name}"], abs=0.02)


def test_a_mixture_goes_on_exactly_where_it_was(tmp_path, mixture):
    train(mixture, tmp_path / "whole")
    train(mixture, tmp_path / "cut", max_iters=3, lr_decay_iters=6)
    train(mixture, tmp_path / "cut", init_from="resume")
    whole, cut = (without_times(read_lines(tmp_path / name)) for name in ("whole", "cut"))
    assert [line["train/loss"] for line in whole[:-1]] == [line["train/loss"] for line in cut[:-1]]
    assert whole[-1]["val/loss"] == cut[-1]["val/loss"]


def test_a_mixture_is_the_same_on_two_ranks(tmp_path, mixture):
    train(mixture, tmp_path / "one")
    options = words(**TINY | {"dataset": mixture, "out_dir": tmp_path / "two"})
    result = torchrun(2, "train_adam.py", options)
    assert result.returncode == 0, result.stderr
    one, two = (read_lines(tmp_path / name) for name in ("one", "two"))
    for ours, theirs in zip(one, two, strict=True):
        for key in ("train/loss", "val/loss", "val/loss/a", "val/loss/b", "epoch/a"):
            assert theirs.get(key) == pytest.approx(ours.get(key), abs=1e-5)
