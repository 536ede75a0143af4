"""Own text by any name and in any form: the same documents, and bad records named or left out."""

import bz2
import csv
import errno
import fcntl
import gzip
import io
import json
import lzma
import random
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data import corpus, sources
from tests.data.test_corpus import (
    arguments,
    documents,
    prepare,
    prepare_in_new_process,
    read_corpus,
    state,
    write_jsonl,
)
from training.errors import UserError
from training.tokenizer import get_tokenizer

LINES = "".join(f"{i} " + "whale " * (i % 9) + "sea.\n" for i in range(4_000))  # 130 KB


def one_text(path, *options, text=LINES):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, newline="")
    out = path.parent / "out"
    return prepare("text", "--source", path, "--out_dir", out, *options), out


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
@pytest.mark.parametrize("fraction", [None, 0.5, 0.001])
def test_of_one_file_the_last_share_is_val(tmp_path, tokenizer, fraction):
    options = ["--tokenizer", tokenizer] + (["--val_fraction", fraction] if fraction else [])
    result, out = one_text(tmp_path / "Input.TXT", *options)
    assert result.returncode == 0, result.stderr
    meta, found = read_corpus(out)
    train, val = (found[split] if tokenizer == "char" else found[split][0] for split in ("train", "val"))
    assert train + val == LINES and train.endswith("\n")
    assert len(val) / len(LINES) == pytest.approx(fraction or 0.1, abs=60 / len(LINES))
    if tokenizer == "char":
        assert meta["tokenizer"] == {"characters": "".join(sorted(set(LINES)))}
        assert meta["train_tokens"] + meta["val_tokens"] == len(LINES)
    again = prepare("text", "--source", tmp_path / "Input.TXT", "--out_dir", out, *options)
    assert again.returncode == 0 and "already prepared" in again.stdout


@pytest.mark.parametrize(
    "text", ["ab", "a b\nc d", "one line without an end " * 400, "\n\n\nx\ny", "naïve 日本語 😀\r\n"]
)
def test_the_shortest_texts_are_split_too(tmp_path, text):
    result, out = one_text(tmp_path / "a.txt", "--tokenizer", "char", text=text)
    assert result.returncode == 0, result.stderr
    found = read_corpus(out)[1]
    assert found["train"] + found["val"] == text and found["train"] and found["val"]


@pytest.mark.parametrize(
    "name, text, said",
    [("a.txt", "", "no text;"), ("a.txt", " \n", "no text;"), ("a.jsonl", '{"text": ""}', "no text;"),
     ("a.txt", "x", "came into")],
)  # fmt: skip
def test_a_text_that_cannot_be_split_is_one_sentence(tmp_path, name, text, said):
    result, out = one_text(tmp_path / name, text=text)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and said in result.stderr
    assert list(out.iterdir()) == []


def test_a_large_file_is_the_same_in_parts_whatever_its_compression(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGE", 5_000)
    monkeypatch.setattr(sources, "BLOCK", 777)
    monkeypatch.setattr(corpus, "TASK", 5_000)
    text = LINES.replace("sea", "naïve 日本語 😀")
    packed = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".XZ": lzma.compress, ".zst": zstd}
    for i, (suffix, pack) in enumerate(packed.items()):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(pack(text.encode()))
        options = ["--out_dir", tmp_path / str(i), "--num_proc", 1 + i % 3]
        assert prepare("text", "--source", path, *options).returncode == 0
        assert (tmp_path / str(i) / "train.bin").read_bytes() == (tmp_path / "0/train.bin").read_bytes()
        found = read_corpus(tmp_path / str(i))[1]
        assert "".join(found["train"] + found["val"]) == text
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode())[:-20])
    (tmp_path / "c.txt").write_bytes(text.encode() + b"caf\xe9\n")
    for name, culprit in (
        ("b.txt.gz", "b.txt.gz cannot be read beyond line"),
        ("c.txt", "c.txt, line 4001: not UTF-8"),
    ):
        result = prepare("text", "--source", tmp_path / name, "--out_dir", tmp_path / name[:1])
        assert result.returncode == 2 and culprit in result.stderr, result.stderr
        assert list((tmp_path / name[:1]).iterdir()) == []
    good = ["--source", tmp_path, "--skip_bad", "--out_dir", tmp_path / "good", "--val_fraction", 0.4]
    result = prepare("text", *good)
    assert result.returncode == 0 and "left out: 2 bad records, the first: " in result.stdout, result.stderr


def zstd(content):
    half = len(content) // 2  # two frames, as pzstd and cat write them
    return b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in (content[:half], content[half:]))


def test_few_documents_are_split_at_the_end_of_them_all(tmp_path):
    texts = [f"Chapter {i}\n" + LINES[: 3_000 * i] for i in range(1, 4)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.md").write_text(text)
    result = prepare("text", "--source", tmp_path, "--out_dir", tmp_path / "out")
    assert result.returncode == 0 and "too few documents" in result.stdout
    found = read_corpus(tmp_path / "out")[1]
    assert "".join(found["train"] + found["val"]) == "".join(texts) and found["train"][:2] == texts[:2]
    assert len("".join(found["val"])) / len("".join(texts)) == pytest.approx(0.1, abs=0.01)


def test_train_and_val_files_are_those_splits(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    (tmp_path / "b.txt").write_text("c")
    options = ["--train", tmp_path / "a.jsonl", "--val", tmp_path / "b.txt", "--out_dir", tmp_path / "out"]
    assert prepare("text", *options).returncode == 0
    assert read_corpus(tmp_path / "out")[1] == {"train": ["a", "b"], "val": ["c"]}
    assert "already prepared" in prepare("text", *options).stdout
    (tmp_path / "link.txt").symlink_to("b.txt")
    result = prepare("text", "--train", tmp_path / "b.txt", "--val", tmp_path / "link.txt", "--out_dir", tmp_path / "o")
    assert result.returncode == 2 and "b.txt is among both --train and --val" in result.stderr
    for wrong in (options[:2], options[2:4], [*options[:4], "--source", tmp_path / "b.txt"]):
        result = prepare("text", *wrong, "--out_dir", tmp_path / "other")
        assert result.returncode == 2 and "--train and --val go together" in result.stderr


@pytest.mark.parametrize("separator", ["<|endoftext|>", r"\n\n", "日本"])
@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_text_files_are_cut_at_the_separator(tmp_path, monkeypatch, separator, block):
    monkeypatch.setattr(sources, "BLOCK", block)
    texts = [f"Story {i}\nwith a line. naïve" for i in range(60)]
    between = separator.replace(r"\n", "\n")
    (tmp_path / "a.txt").write_text("﻿" + f"\n{between}\r\n".join(texts) + f"\n{between}\n", newline="")
    options = ["--separator", separator, "--val_fraction", 0.3, "--out_dir", tmp_path / "out"]
    result = prepare("text", "--source", tmp_path / "a.txt", *options)
    assert result.returncode == 0, result.stderr
    found = read_corpus(tmp_path / "out")[1]
    assert sorted(found["train"] + found["val"]) == sorted(texts) and 5 < len(found["val"]) < 35


def test_a_separator_for_other_line_ends_is_refused(tmp_path):
    """Without a word the file would be one document."""
    (tmp_path / "a.txt").write_bytes(b"one\r\nline\r\n\r\ntwo\r\n" * 3)
    options = ["--source", tmp_path / "a.txt", "--out_dir", tmp_path / "out", "--val_fraction", 0.5, "--separator"]
    result = prepare("text", *options, r"\n\n")
    assert result.returncode == 2 and r"give --separator '\r\n\r\n'" in result.stderr
    assert prepare("text", *options, r"\r\n\r\n").returncode == 0
    texts = read_corpus(tmp_path / "out")[1]
    assert sorted([*texts["train"], *texts["val"]]) == ["one\r\nline", "two", *["two\r\none\r\nline"] * 2]


def test_a_separator_that_never_comes_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "RECORD", 50_000)
    monkeypatch.setattr(sources, "BLOCK", 1_000)
    result, _ = one_text(tmp_path / "a.txt", "--separator", "<|endoftxt|>")
    assert result.returncode == 2 and "a.txt, line 1: no separator '<|endoftxt|>'" in result.stderr


TEXTS = documents(30, words=8)


def as_csv(texts, name="text"):
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([["id", name, "x"], *([i, text, ""] for i, text in enumerate(texts))])
    return buffer.getvalue()


RECORDS = {
    "list.json": json.dumps([{"text": text, "n": [1, {"text": "no"}]} for text in TEXTS]),
    "pretty.json": json.dumps([{"text": text} for text in TEXTS], indent=2, ensure_ascii=False),
    "strings.json": " \n " + json.dumps(TEXTS) + "\n",
    "lines.json": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
    "bom.json": "﻿" + "\n\n".join(json.dumps({"text": text}, indent=1) for text in TEXTS),
    "table.csv": as_csv(TEXTS),
    "bom.CSV": "﻿" + as_csv(TEXTS),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("block", [1, 50, 1 << 20])
@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_records_in_json_and_csv(tmp_path, monkeypatch, name, block, suffix):
    monkeypatch.setattr(sources, "BLOCK", block)
    content = RECORDS[name].encode()
    (tmp_path / (name + suffix)).write_bytes(zstd(content) if suffix else content)
    assert list(sources.read_documents(sources.find_files([tmp_path]), "text")) == TEXTS


GOOD = '{"text": "good"}\n'
BAD = {
    "a.jsonl": (GOOD + '{"text": "cut\n' + GOOD, "line 2: not JSON", 2),
    "b.jsonl": (GOOD + '{"txt": "x"}\n\n[1]\n' + GOOD, "line 2: no text in the field 'text'; its fields are txt; ", 2),
    "a.json": (GOOD + '{"text": "cut\n' + GOOD, "line 2: not JSON", 2),
    "b.json": ('[{"text": "good"},\n{"text": 3},\n{"text": oops},\n{"text": "good"}]\n', "line 2: no text", 2),
    "c.json": ('[{"text": "good"},\n{"text": "good"},\n{"text": "go', "line 3: not JSON", 2),
    "d.json": ('[{"text": "good"},\n{"text": "good"}', "line 2: not JSON (the list has no end)", 2),
    "e.json": ('[{"text": "good"},{"text": "good"}] x', "line 1: not JSON (text after the end", 2),
    "f.json": (b'{"text": "good"}\n{"text": "caf\xe9"}\n{"text": "good"}', "line 2: not UTF-8", 2),
    "g.json": ("[" * 100_000 + "\n" + GOOD + GOOD, "line 1: not JSON", None),
    "h.json": ("", None, 0),
    "a.csv": ("text,b\ngood,1\nbad\ngood,2\n", "line 3: 1 columns, not the 2", 2),
    "b.csv": ('text,b\ngood,1\n"a"b,1\ngood,2\n', "line 3: not CSV", 2),
    "c.csv": ('text,b\ngood,1\ngood,2\n"open,3\n', "line 4: not CSV", 2),
    "d.csv": (b"text\ngood\ncaf\xe9\ngood\n", "line 3: not UTF-8", 2),
    "a.txt": (b"caf\xe9\n", "line 1: not UTF-8", 0),
    "utf16.txt": ("good\n".encode("utf-16-le"), "line 1: it holds the character NUL", 0),
    "preallocated.txt": (b"good\n" + bytes(99), "line 2: it holds the character NUL", 0),
    "b.txt.gz": (gzip.compress(b"x" * 99)[:-9], "b.txt.gz cannot be read beyond", 0),
    "c.jsonl.zst": (zstd(GOOD.encode() * 2)[:-4], "c.jsonl.zst cannot be read beyond", None),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_a_bad_record_is_named_or_left_out(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(sources, "BLOCK", block)
    content, culprit, good = BAD[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    files, bad = sources.find_files([tmp_path / name]), sources.Bad()
    if culprit:
        with pytest.raises(UserError) as error:
            list(sources.read_documents(files, "text"))
        assert str(tmp_path / name) in str(error.value) and culprit in str(error.value), str(error.value)
    found = list(sources.read_documents(files, "text", bad=bad))
    assert found == ["good"] * good if good is not None else set(found) <= {"good"}
    assert bool(bad.count) == bool(culprit) and (culprit or "") in bad.first


def test_bad_records_are_counted_once_and_the_rest_is_prepared(tmp_path):
    (tmp_path / "a.jsonl").write_text("oops\n" + GOOD * 3 + "[]\n" + '{"text": "other"}\n' * 3)
    options = ["--source", tmp_path / "a.jsonl", "--out_dir", tmp_path / "out"]
    result = prepare("text", *options)
    assert result.returncode == 2 and "a.jsonl, line 1: not JSON" in result.stderr
    result = prepare("text", *options, "--skip_bad", "--val_fraction", 0.5, "--tokenizer", "char")
    assert result.returncode == 0 and "left out: 2 bad records, the first: " in result.stdout, result.stderr
    (tmp_path / "b.jsonl").write_text("oops\n")
    result = prepare("text", "--source", tmp_path / "b.jsonl", "--out_dir", tmp_path / "b", "--skip_bad")
    assert result.returncode == 2 and "left out: 1 bad records" in result.stderr and result.stderr.count("\n") == 1


# Tokenizers


def byte_level(folder, vocab_size=400, texts=(LINES,)):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=9)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_tokenizer_json_goes_with_the_data(tmp_path):
    path = byte_level(tmp_path / "tok")
    texts = documents(100)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    options = ["--source", source, "--tokenizer", path, "--val_fraction", 0.2, "--out_dir", tmp_path / "out"]
    result = prepare_in_new_process("text", *options)
    assert result.returncode == 0, result.stderr
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["tokenizer"]["file"] == "tokenizer.json" and meta["dtype"] == "uint16" and meta["vocab_size"] <= 400
    assert (tmp_path / "out/tokenizer.json").read_bytes() == path.read_bytes()
    spec = {**meta["tokenizer"], "json": path.read_text()}
    tokenizer = get_tokenizer(spec)
    ids = np.fromfile(tmp_path / "out/train.bin", "<u2")
    found = [
        tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, np.flatnonzero(ids == tokenizer.eot) + 1)[:-1]
    ]
    assert found == [text for text in texts if text in found] and len(found) > 60, "in order, not truncated"
    assert "already prepared" in prepare("text", *options).stdout
    by_folder = [path.parent if option == path else option for option in options]
    assert "already prepared" in prepare("text", *by_folder).stdout
    (tmp_path / "out/tokenizer.json").write_text("{}")
    assert "tokenizer.json is missing or damaged" in prepare("text", *options).stdout
    assert (tmp_path / "out/tokenizer.json").read_bytes() == path.read_bytes()
    other = byte_level(tmp_path / "tok", 350)
    assert "holds another corpus" in prepare("text", *options[:2], "--tokenizer", other, *options[4:]).stderr


def test_more_than_65536_tokens_are_written_as_uint32(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(70_000)} | {"[UNK]": 70_000, "</s>": 70_001}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "words.json"))
    texts = [" ".join(f"w{random.Random(i).randrange(70_000)}" for i in range(n, n + 50)) for n in range(0, 5_000, 50)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    options = ["--source", source, "--tokenizer", tmp_path / "words.json", "--out_dir", tmp_path / "out"]
    assert prepare("text", *options, "--val_fraction", 0.2).returncode == 0
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert (meta["dtype"], meta["vocab_size"]) == ("uint32", 70_002)
    ids = np.fromfile(tmp_path / "out/train.bin", "<u4")
    assert len(ids) == meta["train_tokens"] and ids.max() == 70_001 and (ids[50::51] == 70_001).all()
    assert f"w{ids[0]}" in " ".join(texts)


def test_characters_beyond_65536_are_too(tmp_path):
    text = "".join(map(chr, [*range(32, 0xD800), *range(0xE000, 0x12000)])) + "\n"
    result, out = one_text(tmp_path / "a.txt", "--tokenizer", "char", text=text * 3)
    assert result.returncode == 0, result.stderr
    meta = json.loads((out / "meta.json").read_text())
    ids = [np.fromfile(out / f"{split}.bin", "<u4") for split in ("train", "val")]
    assert (
        meta["dtype"] == "uint32" and get_tokenizer(meta["tokenizer"]).decode(np.concatenate(ids).tolist()) == text * 3
    )


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        ("gpt5", "one of gpt2, r50k_base"),
        ("none.json", "none.json cannot be read (No such file"),
        ("bad.json", "not one of the package tokenizers"),
        (".", "tokenizer.json cannot be read"),
    ],
)
def test_a_tokenizer_that_is_none_is_one_sentence(tmp_path, monkeypatch, tokenizer, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text('{"a": 1}')
    result, _ = one_text(tmp_path / "texts/a.txt", "--tokenizer", tokenizer)
    assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1, result.stderr


# File systems


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_locks_it_goes_on_with_a_warning(tmp_path, monkeypatch, error):
    monkeypatch.setattr(fcntl, "flock", raising(error))
    result, out = one_text(tmp_path / "a.txt")
    assert result.returncode == 0 and result.stderr.startswith("warning: no file locks here")
    assert sorted(path.name for path in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def raising(error):
    def flock(*arguments):
        raise OSError(error, "flock")

    return flock


def test_another_error_of_the_lock_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", raising(errno.EIO))
    result, out = one_text(tmp_path / "a.txt")
    assert result.returncode == 2 and "cannot be written" in result.stderr and list(out.iterdir()) == []


def test_a_prepared_corpus_is_recognized_where_nothing_can_be_written(tmp_path, monkeypatch):
    result, out = one_text(tmp_path / "a.txt")
    before = state(out)
    monkeypatch.setattr(corpus._Bin, "__init__", lambda *_: pytest.fail("opened to write"))
    again = prepare("text", "--source", tmp_path / "a.txt", "--out_dir", out)
    assert result.returncode == again.returncode == 0 and state(out) == before


def test_documents_in_parts_are_written_as_they_are(tmp_path):
    parts = [["", " \n", "one ", "two"], [" ", ""], [], ["thr", "ee"]]
    corpus.write(arguments(tmp_path), [("train", p) for p in parts] + [("val", iter(["x"]))], "gpt2", "parts")
    assert read_corpus(tmp_path)[1] == {"train": [" \none two", "three"], "val": ["x"]}


def test_a_bomb_of_one_line_is_one_sentence(tmp_path, monkeypatch):
    """A packed file of a megabyte that unpacks to a gigabyte: no more of it is held than one record may have."""
    monkeypatch.setattr(sources, "RECORD", 1 << 20)
    for name in ("bomb.jsonl.gz", "bomb.json.gz", "bomb.csv.gz"):
        with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
            file.write(b'{"text": "' if "json" in name else b"text\n")
            for _ in range(64):
                file.write(b"x" * (1 << 20))
        tracemalloc.start()
        with pytest.raises(UserError, match=name):
            list(sources.read_documents([tmp_path / name], "text"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 32 << 20, (name, peak)
