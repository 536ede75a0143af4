"""Files that are not token files, and folders by their many names: each refusal says what it is and what to do."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import shlex
import socket
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import write_corpus
from training import data, token_files
from training.errors import UserError

TOKENS = np.random.default_rng(7).integers(0, 50257, 6000).astype("<u2")  # as GPT-2's
SMALL = (TOKENS % 65).astype("<u2")  # as of characters


def corpus_with(folder, content, meta=None, split="train"):
    """A corpus whose train.bin is `content`, without a meta.json unless `meta` is one."""
    write_corpus(folder)
    (folder / f"{split}.bin").write_bytes(content)
    (folder / "meta.json").unlink() if meta is None else (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def packed(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def zipped(buffer):
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("train.bin", TOKENS.tobytes())


def tarred(buffer):
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("train.bin")
        entry.size = TOKENS.nbytes
        archive.addfile(entry, io.BytesIO(TOKENS.tobytes()))


def arrow_stream(buffer):
    table = pyarrow.table({"tokens": TOKENS})
    with pyarrow.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)


def safetensors(path):
    save_file({"tokens": torch.from_numpy(TOKENS.astype(np.int32))}, path)
    return path.read_bytes()


def shard(tokens=TOKENS, magic=20240520, version=1, count=None):
    """With llm.c's header."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + tokens.tobytes()


TEXT = ("To be, or not to be, that is the question — naïve 日本語.\n" * 300).encode()
JUNK = {
    "a NumPy .npy file": packed(lambda buffer: np.save(buffer, TOKENS)),
    "a zip archive (.zip, .npz or .pt)": packed(lambda buffer: np.savez(buffer, tokens=TOKENS)),
    "zip": packed(zipped),
    ".pt)": packed(lambda buffer: torch.save(torch.from_numpy(TOKENS.astype(np.int32)), buffer)),
    "compressed by gzip": gzip.compress(TOKENS.tobytes()),
    "compressed by bzip2": bz2.compress(TOKENS.tobytes()),
    "compressed by xz": lzma.compress(TOKENS.tobytes()),
    "compressed by zstd": pyarrow.compress(TOKENS.tobytes(), codec="zstd", asbytes=True),
    "compressed by lz4": pyarrow.compress(TOKENS.tobytes(), codec="lz4", asbytes=True),
    "a tar archive": packed(tarred),
    "a parquet file": packed(lambda buffer: pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 9}), buffer)),
    "an Arrow stream": packed(arrow_stream),
    "a 7z archive": b"7z\xbc\xaf\x27\x1c\0\4" + TOKENS.tobytes(),
    "a rar archive": b"Rar!\x1a\x07\x01\0" + TOKENS.tobytes(),
    "a PNG image": b"\x89PNG\r\n\x1a\n" + TOKENS.tobytes(),
    "a PDF": b"%PDF-1.7\n" + TOKENS.tobytes(),
    "an SQLite database": b"SQLite format 3\0" + bytes(4080),
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n",
    "JSON text": json.dumps({"error": "rate limit exceeded", "status": 429}).encode(),
    "JSON text ": json.dumps(TOKENS.tolist()).encode(),
    "an HTML page": b"\n<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>",
    "XML text": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "text, which data/text/prepare.py makes tokens of": TEXT,
    "text, which": ("﻿" + TEXT.decode()).encode()[:200_001],
    "UTF-16 text": TEXT.decode().encode("utf-16"),
    "4-byte integers": TOKENS.astype("<u4").tobytes(),
    "4-byte": (TOKENS.astype("<u4") + 40_000).tobytes(),
    "4-byte ": SMALL.astype("<u4").tobytes(),
    "8-byte integers": TOKENS.astype("<i8").tobytes(),
    "1-byte integers": SMALL.astype(np.uint8).tobytes(),
    "has 0 bytes": b"",
    "has 11999 bytes": TOKENS.tobytes()[:-1],
    "its header says 6000 tokens, it holds 5999": shard()[:-2],
    "its header says 6000 tokens, it holds 6001": shard() + b"\0\0",
    "its header says 7 tokens": shard(count=7),
    "its header says -1 tokens": shard(count=-1),
    "its header is cut off": shard()[:8],
    "its header says 6000 tokens, it holds 0": shard()[:1000],
    "llm.c's header of version 2": shard(version=2),
    "llm.c that holds Llama 3 tokens": shard(TOKENS.astype("<u4"), magic=20240801, version=7),
    "llm.c that holds a model": shard(magic=20240326, version=3),
    "llm.c that holds multiple-choice questions": shard(magic=20240522),
    "has 1024 bytes": shard(TOKENS[:0]),
    "nothing but zeros": bytes(12_000),
    "big-endian": TOKENS.astype(">u2").tobytes(),
} | {f"a Python pickle{' ' * i}": pickle.dumps(thing, i) for i in (2, 3, 4, 5) for thing in ([TOKENS, {"a": 1}],)}


@pytest.mark.parametrize("what", JUNK)
@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_no_token_file_is_named(tmp_path, what, split):
    folder = corpus_with(tmp_path / "c", JUNK[what], split=split)
    refused(folder, what.strip(), f"{folder / split}.bin")


def refused(folder, *words, **sizes):
    with pytest.raises(UserError) as error:
        data.check_dataset(data.open_dataset(folder), **{"total_bs": 24, "block_size": 16} | sizes)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 800
    return str(error.value)


def test_safetensors_and_lists_in_pickles_are_named(tmp_path):
    refused(corpus_with(tmp_path / "a", safetensors(tmp_path / "x")), "a safetensors file")
    refused(corpus_with(tmp_path / "b", pickle.dumps(TOKENS[:40].tolist(), 4)), "a Python pickle")


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, monkeypatch):
    path = write_corpus(tmp_path / "c") / "train.bin"

    def replaced(make):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        make()

    replaced(path.mkdir)
    refused(tmp_path / "c", "train.bin is a folder")
    replaced(lambda: os.mkfifo(path))
    refused(tmp_path / "c", "train.bin is a pipe")
    with socket.socket(socket.AF_UNIX) as server:
        replaced(lambda: None)
        monkeypatch.chdir(path.parent)  # a socket's path is short
        server.bind("train.bin")
        refused(tmp_path / "c", "train.bin is a socket")
    replaced(lambda: path.symlink_to("/dev/zero"))
    refused(tmp_path / "c", "train.bin is a device")
    replaced(lambda: path.symlink_to("train.bin"))
    refused(tmp_path / "c", "train.bin is a link to train.bin, which leads to itself")
    replaced(lambda: path.symlink_to("elsewhere.bin"))
    refused(tmp_path / "c", "train.bin is a link to elsewhere.bin, which does not exist")


@pytest.mark.parametrize(
    "tokens", [TOKENS, SMALL, SMALL % 3, TOKENS % 300, TOKENS[:3], SMALL[:70], TOKENS | 1], ids=str
)
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_what_are_tokens_is_taken_as_such(tmp_path, tokens, dtype):
    meta = {"vocab_size": 50304, "dtype": dtype}
    folder = corpus_with(tmp_path / "c", tokens.astype(dtype).tobytes(), meta)
    assert data.open_dataset(folder).train.tolist() == tokens.tolist()


@pytest.mark.parametrize("head", [b"\x1f\x8b", b"\x80\x04", b"\x80\x02]q", b"BZh", b"{\0", b"PK", b"\xff\xff\0\0"])
def test_a_coincidence_at_the_start_is_no_reason_to_refuse(tmp_path, head):
    """GPT-2 has a token for each pair of bytes; each of these starts a real corpus now and then."""
    meta = {"vocab_size": 65536}
    folder = corpus_with(tmp_path / "c", head + TOKENS.tobytes()[len(head) :], meta)
    assert len(data.open_dataset(folder).train) == 6000


def test_what_meta_json_says_is_checked(tmp_path):
    right = {"vocab_size": 65536, "dtype": "uint16"}
    for wrong, words in {
        "train_tokens=12000": ("holds 6000 tokens, its meta.json says 12000",),
        "train_tokens='many'": ("its meta.json says 'many'",),
        "val_tokens=699": ("val.bin holds 700 tokens, its meta.json says 699",),
        f"train_sha256={'0' * 64!r}": ("train.bin is not the file that meta.json describes", "SHA-256"),
        "val_sha256=None": ("val.bin is not the file that meta.json describes",),
        "dtype='int64'": ("dtype = 'int64'",),
        "dtype='uint32'": ("beyond the vocabulary of 65536 (it seems to hold uint16",),
        "vocab_size=65537": ("dtype = 'uint16' with vocab_size = 65537",),
        "vocab_size=0": ("vocab_size = 0",),
        "tokenizer='llama'": ("meta.json: the tokenizer of a meta.json is", "'llama'"),
        "tokenizer={'characters': 'abc'}": ("vocab_size = 65536, but it names 3 different characters",),
        "tokenizer={'file': 'tokenizer.json', 'sha256': 'x'}": ("tokenizer.json cannot be read",),
    }.items():
        key, value = wrong.split("=", 1)
        folder = corpus_with(tmp_path / "c", TOKENS.tobytes(), {**right, key: eval(value)})
        refused(folder, *words)


def test_a_file_cut_in_half_is_refused_before_it_is_read(tmp_path):
    folder = corpus_with(tmp_path / "c", TOKENS.tobytes(), {"vocab_size": 65536, "train_tokens": 6000})
    (folder / "train.bin").write_bytes(TOKENS[:3000].tobytes())
    with pytest.raises(UserError, match=r"train\.bin holds 3000 tokens, its meta\.json says 6000"):
        data.open_dataset(folder)


# Shards


def write_shards(folder, names, header=True):
    """`TOKENS` cut over files of these names, and a validation shard."""
    folder.mkdir()
    for name, part in zip(names, np.array_split(TOKENS, len(names)), strict=True):
        (folder / name).write_bytes(shard(part) if header else part.tobytes())
    (folder / "x_val_000000.bin").write_bytes(shard(TOKENS[:500]))
    return folder


def test_shards_are_one_stream_without_a_copy(tmp_path):
    names = [f"fineweb_train_{i:06}.bin" for i in range(1, 8)]
    folder = write_shards(tmp_path / "c", names)
    (folder / names[2]).write_bytes((folder / names[2]).read_bytes()[1024:])  # header or not
    (folder / "._fineweb_train_000001.bin").write_bytes(b"of macOS")
    corpus = data.open_dataset(folder)
    assert all(isinstance(part, np.memmap) for part in corpus.train.parts)
    assert corpus.train[0:6000].tolist() == TOKENS.tolist() and len(corpus.train) == 6000
    assert corpus.train[850:860].tolist() == TOKENS[850:860].tolist(), "over a border: 858"
    starts = corpus.train_starts(3, 0, 1200, 10)  # two epochs
    assert starts.tolist() == data.window_starts(6000, 3, 0, 1200, 10).tolist()
    assert np.array_equal(data.take_windows(corpus.train, starts, 10), data.take_windows(TOKENS, starts, 10))
    assert corpus.epochs(900, 10) == {"epoch": 1.5}
    facts = data.check_dataset(corpus, 24, 16)
    together = b"".join((folder / name).read_bytes() for name in names)
    assert facts["train_sha256"] == hashlib.sha256(together).hexdigest()


@pytest.mark.parametrize(
    "names, missing",
    [
        ([f"a_train_{i:06}.bin" for i in (1, 2, 4)], "a_train_000003.bin"),
        ([f"train_{i}.bin" for i in (0, 1, 9, 10, 11, 12, 2, 3, 4, 5, 6, 7)], "train_8.bin"),
        ([f"train-{i:05}-of-00004.bin" for i in (0, 1, 2)], "train-00003-of-00004.bin"),
        ([f"train-{i:05}-of-00003.bin" for i in (2, 3)], "train-00001-of-00003.bin"),
        (["train-00000-of-00002.bin"], "train-00001-of-00002.bin"),
    ],
)
def test_a_missing_shard_is_named(tmp_path, names, missing):
    refused(write_shards(tmp_path / "c", names), f"{tmp_path / 'c' / missing} is missing")


def test_numbers_that_are_no_series_miss_nothing(tmp_path):
    folder = write_shards(tmp_path / "c", ["train_20240101.bin", "train_20240201.bin", "v2_train.bin"], header=False)
    assert data.open_dataset(folder).train[:].tolist() == TOKENS.tolist()


def test_a_short_shard_is_named_and_shards_that_shrink_end_the_run(tmp_path):
    names = [f"train_{i}.bin" for i in range(4)]
    folder = write_shards(tmp_path / "c", names)
    corpus = data.open_dataset(folder)
    (folder / names[2]).write_bytes((folder / names[2]).read_bytes()[:-20])
    refused(folder, f"{folder / names[2]} is a shard that was cut short", "says 1500 tokens, it holds 1490")
    for check in (corpus.check_whole, corpus.check_unchanged):
        with pytest.raises(UserError, match=r"train_2\.bin was"):
            check()
    (folder / "train_val.bin").touch()
    refused(folder, "train_val.bin has both 'train' and 'val' in its name")


# Folders


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The working directory, which is also the home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "my data/c")
    (tmp_path / "linked").symlink_to("my data/c")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    return tmp_path


@pytest.mark.parametrize("name", ["~/my data/c", "my data/c", "./my data/c", "linked", "~/linked", "{home}/linked"])
def test_a_folder_by_any_of_its_names(home, name):
    assert len(data.open_dataset(name.format(home=home)).train) == 6000


def suggested(message):
    """The command in a message, as words."""
    words = shlex.split(message[message.index("python ") :].split("; ")[0].split(", or use")[0])
    assert Path(words[1]).is_file(), "it is there, from the working directory"
    return words[1:]


def test_a_name_that_two_folders_have_is_one_warning(home, monkeypatch, capsys):
    monkeypatch.setattr(token_files, "DATA", home / "repository")
    write_corpus(home / "repository" / "linked")
    assert token_files.find_folder("linked") == home / "repository" / "linked"
    assert "for the folder of this name here give --dataset=./linked" in capsys.readouterr().err
    assert token_files.find_folder("./linked") == Path("linked") and token_files.find_folder("my data/c")
    monkeypatch.chdir(home / "repository")
    assert token_files.find_folder("linked") and not capsys.readouterr().err, "one and the same"
    with pytest.raises(UserError, match="dataset = ''"):
        token_files.find_folder("")


@pytest.mark.parametrize("name", ["~/none", "none", "./none", "{home}/none", "{home}/my data/none", "linked/none"])
def test_a_missing_folder_is_met_by_the_command_that_makes_it(home, name):
    with pytest.raises(UserError, match="there is no such folder") as error:
        data.open_dataset(name.format(home=home))
    script, *options = suggested(str(error.value))
    assert Path(script) == token_files.DATA / "text/prepare.py" and options[:2] == ["--source", "YOUR_TEXT.txt"]
    where = Path(options[options.index("--out_dir") + 1])
    assert where == (token_files.DATA / "none" if name == "none" else Path(os.path.expanduser(name.format(home=home))))


def test_the_commands_for_corpora_of_this_repository(home, monkeypatch):
    with pytest.raises(UserError, match="or use --dataset=shakespeare_char"):
        data.open_dataset("shakespere_char")
    (home / "scratch/wikitext103").mkdir(parents=True)
    (home / "scratch/wikitext103/notes.txt").touch()
    script = token_files.DATA / "wikitext103/prepare.py"
    message = refused("scratch/wikitext103", "train.bin is missing")
    assert suggested(message) == [str(script), "--out_dir", "scratch/wikitext103"]
    monkeypatch.setattr(token_files, "DATA", home / "data")
    monkeypatch.setattr(data, "DATA", home / "data")
    for name in ("fineweb", "text", "mine"):
        (home / "data" / name).mkdir(parents=True)
        (home / "data" / name / "prepare.py").touch()
    (home / "data/mine/prepare.py").unlink()
    (home / "data/mine/input.txt").touch()
    assert suggested(refused("fineweb", "train.bin is missing")) == ["data/fineweb/prepare.py"]
    own = ["data/text/prepare.py", "--source", str(home / "data/mine/input.txt"), "--out_dir", str(home / "data/mine")]
    assert suggested(refused("mine", "train.bin is missing")) == own


def test_what_is_no_folder_is_named(home):
    refused("my data/c/train.bin", "is a file; name the folder")
    refused("loop", "loop is a link to loop, which leads to itself")
    refused("gone", "gone is a link to nowhere, which does not exist")
    refused("x" * 300, "there is no such folder")
    refused("~nobody_of_that_name/c", "there is no such folder")


def test_read_only_folders_are_checked_and_left_alone(tmp_path, monkeypatch):
    folder = write_corpus(tmp_path / "c")

    def refuse(*paths):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    assert data.check_dataset(data.open_dataset(folder), 24, 16)["train_sha256"]
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]
