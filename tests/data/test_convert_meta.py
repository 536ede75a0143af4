"""nanoGPT's meta.pkl: read without running anything in it, and never guessed."""

import collections
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import convert_meta
from tests.conftest import write_corpus
from training import data
from training.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LETTERS = "\n !abc日"
NANOGPT = {"vocab_size": 7, "itos": dict(enumerate(LETTERS)), "stoi": {c: i for i, c in enumerate(LETTERS)}}


def with_pickle(folder, found, vocab_size=7):
    write_corpus(folder, vocab_size=vocab_size)
    (folder / "meta.json").unlink()
    (folder / "meta.pkl").write_bytes(found if isinstance(found, bytes) else pickle.dumps(found))
    return folder


def convert(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert_meta.py", str(folder)])
    convert_meta.main()
    return json.loads((folder / "meta.json").read_text())


@pytest.mark.slow
def test_the_command_that_training_names_converts_it(tmp_path):
    folder = with_pickle(tmp_path / "my data", NANOGPT)
    with pytest.raises(UserError) as error:
        data.open_dataset(folder)
    command = str(error.value).split(": ", 1)[1].replace("python", sys.executable, 1)
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.returncode == 0 and "7 characters; 6,000 training" in result.stdout, result.stderr
    corpus = data.open_dataset(folder)
    assert corpus.tokenizer == {"characters": LETTERS} and corpus.model_vocab_size == 7
    assert data.check_dataset(corpus, 24, 16)["train_sha256"] == corpus.meta["train_sha256"]
    again = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert again.returncode == 2 and "meta.json is there already" in again.stderr


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_all_protocols_of_pickle(tmp_path, monkeypatch, protocol):
    assert convert(with_pickle(tmp_path / "c", pickle.dumps(NANOGPT, protocol)), monkeypatch)["vocab_size"] == 7


@pytest.mark.parametrize("found", [{"vocab_size": 7}, {"vocab_size": 7, "itos": {i: f"word{i}" for i in range(7)}}])
def test_ids_that_are_no_characters_have_no_tokenizer(tmp_path, monkeypatch, found):
    assert convert(with_pickle(tmp_path / "c", found), monkeypatch)["tokenizer"] is None
    assert data.open_dataset(tmp_path / "c").tokenizer is None


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


class Built:
    def __init__(self):
        self.vocab_size = 7


REFUSED = {
    "code": pickle.dumps({"vocab_size": 7, "itos": Evil()}),
    "code in protocol 0": b"cos\nsystem\n(S'touch ran'\ntR.",
    "an instance": b"(ios\nsystem\n(S'touch ran'\n.",
    "eval": b"c__builtin__\neval\n(V__import__('os').system('touch ran')\ntR.",
    "an object": pickle.dumps(Built()),
    "a numpy number": pickle.dumps({"vocab_size": np.int64(7)}),
    "an ordered dict": pickle.dumps(collections.OrderedDict(NANOGPT)),
    "an extension": b"\x80\x02\x82\x01.",
    "another file": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "a damaged file": pickle.dumps(NANOGPT)[:-9],
    "no pickle": b"<html>",
    "nothing": b"",
    "a state without an object": b"\x80\x02]}b.",
    "a call of a string": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "a list": pickle.dumps([1, 2]),
    "no size": pickle.dumps({"itos": None}),
    "another size": pickle.dumps({**NANOGPT, "vocab_size": 8}),
    "another order": pickle.dumps({**NANOGPT, "stoi": {c: 6 - i for i, c in enumerate(LETTERS)}}),
    "a character twice": pickle.dumps({"vocab_size": 2, "itos": {0: "a", 1: "a"}}),
    "ids beyond the size": pickle.dumps({"vocab_size": 7, "itos": {i + 1: c for i, c in enumerate(LETTERS)}}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_anything_else_is_refused_and_not_run(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    folder = with_pickle(tmp_path / "c", REFUSED[what])
    with pytest.raises(UserError, match=r"meta\.pkl") as error:
        convert(folder, monkeypatch)
    assert "\n" not in str(error.value) and not (folder / "meta.json").exists() and not (tmp_path / "ran").exists()


def test_tokens_that_it_does_not_describe_leave_no_meta_json(tmp_path, monkeypatch):
    folder = with_pickle(tmp_path / "c", NANOGPT, vocab_size=9)
    with pytest.raises(UserError, match="holds token 8, beyond the vocabulary of 7"):
        convert(folder, monkeypatch)
    assert not (folder / "meta.json").exists()
    with pytest.raises(UserError, match=r"cannot be read.*name the folder"):
        convert(tmp_path / "none", monkeypatch)
