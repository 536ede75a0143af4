"""What every prepare.py does, tried through data/text/prepare.py on files made here."""

import bz2
import contextlib
import gzip
import hashlib
import importlib
import io
import json
import lzma
import os
import random
import subprocess
import sys
import time
import types
import unittest.mock
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data import corpus, sources
from training.errors import UserError, command
from training.tokenizer import get_tokenizer

ROOT = Path(__file__).resolve().parents[2]
FILES = {"train.bin", "val.bin", "meta.json"}


def prepare(name, *options):
    """Run data/NAME/prepare.py as its command line does, but in this process, which is quicker than a new one."""
    options = [*map(str, options), *["--num_proc=1"][: "--num_proc" not in options]]
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        unittest.mock.patch("sys.argv", ["prepare.py", *options]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            command(importlib.import_module(f"data.{name}.prepare").main)
        except SystemExit as exit_:
            code = exit_.code
    return types.SimpleNamespace(returncode=code, stdout=output.getvalue(), stderr=errors.getvalue())


def prepare_in_new_process(name, *options, **kwargs):
    script = [sys.executable, str(ROOT / "data" / name / "prepare.py"), *map(str, options)]
    return subprocess.run(script, capture_output=True, text=True, **kwargs)


def arguments(folder, num_proc=1):
    return corpus.arguments("", __file__).parse_args([f"--out_dir={folder}", f"--num_proc={num_proc}"])


def documents(count, words=60, seed=0):
    """Texts of random words, each other than the rest; the awkward ones first."""
    generator = random.Random(seed)
    awkward = ["<|endoftext|>", "naïve 日本語 \u2028 😀\r\n", " \n\t leading and trailing \n "]
    vocabulary = ["sea", "Ship,", "of", "1851", "\n\n", "whale."]
    return awkward + [f"{i} " + " ".join(generator.choices(vocabulary, k=words)) for i in range(count)]


def write_jsonl(path, texts, field="text"):
    with open(path, "w") as file:
        file.writelines(json.dumps({field: text}) + "\n" for text in texts)
    return path


def read_corpus(folder):
    """(meta, {split: its documents}), having checked every number of meta.json against the files."""
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer, texts = get_tokenizer(meta["tokenizer"]), {}
    assert set(meta) == {
        *("vocab_size", "tokenizer", "dtype", "source"),
        *("train_tokens", "val_tokens", "train_sha256", "val_sha256"),
    }
    for split in ("train", "val"):
        content = (folder / f"{split}.bin").read_bytes()
        assert hashlib.sha256(content).hexdigest() == meta[f"{split}_sha256"]
        ids = np.frombuffer(content, "<u2")
        assert len(ids) == meta[f"{split}_tokens"] and ids.max() < meta["vocab_size"]
        if tokenizer.eot is None:
            texts[split] = tokenizer.decode(ids.tolist())
            continue
        assert ids[-1] == tokenizer.eot
        texts[split] = [tokenizer.decode(part[:-1]) for part in np.split(ids, np.flatnonzero(ids == 50256) + 1)[:-1]]
    return meta, texts


def test_every_document_comes_back_in_order_whole_and_ended(tmp_path):
    texts = documents(400)
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, "", " \n"])
    options = ["--source", source.name, "--out_dir", "out", "--val_fraction", 0.1]
    result = prepare_in_new_process("text", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    meta, found = read_corpus(tmp_path / "out")
    assert (meta["vocab_size"], meta["tokenizer"], meta["dtype"]) == (50257, "gpt2", "uint16")
    held_out = set(found["val"])
    assert found["train"] == [text for text in texts if text not in held_out]
    assert found["val"] == [text for text in texts if text in held_out]
    assert 20 <= len(held_out) <= 60  # 10% of 403, give or take three deviations
    assert f"train.bin: {meta['train_tokens']:,} tokens" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_the_split_of_a_document_does_not_depend_on_the_others(tmp_path):
    texts, options = documents(200), ["--val_fraction", 0.2]
    for name, part in (("all", texts), ("some", texts[::-3])):
        source = write_jsonl(tmp_path / f"{name}.jsonl", part)
        assert prepare("text", "--source", source, "--out_dir", tmp_path / name, *options).returncode == 0
    held_out = set(read_corpus(tmp_path / "all")[1]["val"])
    assert set(read_corpus(tmp_path / "some")[1]["val"]) == held_out & set(texts[::-3])


def test_same_bytes_whatever_the_number_of_threads(tmp_path, monkeypatch):
    """Small tasks, so that three threads finish out of order, and a document of many pieces in their midst."""
    monkeypatch.setattr(corpus, "TASK", 5_000)
    texts = documents(300)
    texts.insert(100, "word \n" * 200_000)
    pairs = [("val" if i % 7 == 3 else "train", text) for i, text in enumerate(texts)]
    for num_proc in (1, 3):
        corpus.write(arguments(tmp_path / str(num_proc), num_proc), iter(pairs), "gpt2", "numbers")
    for name in FILES:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    found = read_corpus(tmp_path / "3")[1]
    assert found == {split: [text for where, text in pairs if where == split] for split in ("train", "val")}


def test_documents_are_read_no_faster_than_they_are_written(tmp_path, monkeypatch):
    """Memory is bounded: of a corpus without end, a failing write leaves most unread."""
    monkeypatch.setattr(corpus, "TASK", 1_000)
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield "train", "word " * 200

    args = arguments(tmp_path, num_proc=2)
    with pytest.raises(UserError, match=r"none of the 5 documents came into val\.bin"):
        corpus.write(args, endless(), "gpt2", "endless", max_tokens=1_100)  # 201 tokens each
    assert read <= 5 + 1 + 2 * 2
    assert list(tmp_path.iterdir()) == []


def test_max_tokens_ends_with_the_last_whole_document_that_fits(tmp_path):
    args = arguments(tmp_path)
    pairs = [("val", "a b"), ("train", "a b c"), ("train", "a b c d e"), ("train", "a")]  # 3, 4, 6 and 2 tokens
    corpus.write(args, pairs, "gpt2", "four", max_tokens=12)
    assert read_corpus(tmp_path)[1] == {"val": ["a b"], "train": ["a b c"]}


@pytest.fixture
def prepared(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", documents(60))
    options = ("--source", source, "--out_dir", tmp_path / "out", "--val_fraction", "0.2")
    assert prepare("text", *options).returncode == 0
    return tmp_path / "out", options


def state(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_nothing_is_done_twice_unless_forced(prepared):
    folder, options = prepared
    before = state(folder)
    again = prepare("text", *options)
    assert again.returncode == 0 and "already prepared" in again.stdout
    assert state(folder) == before
    assert prepare("text", *options, "--force").returncode == 0
    after = state(folder)
    assert all(after[name][0] == before[name][0] and after[name][1] > before[name][1] for name in FILES)


def test_a_source_that_was_edited_since_is_one_warning(prepared):
    """With as many bytes as before; a corpus keeps no hash of its sources, which may be large."""
    folder, options = prepared
    assert "warning" not in prepare("text", *options).stderr
    options[1].write_bytes(options[1].read_bytes().replace(b"whale", b"Whale"))
    os.utime(options[1], (time.time() + 9, time.time() + 9))
    before, again = state(folder), prepare("text", *options)
    assert again.returncode == 0 and state(folder) == before
    assert again.stderr.count("was changed after") == 1 and "--force" in again.stderr


@pytest.mark.parametrize("damage", ["a flipped bit", "a missing file"])
def test_a_damaged_corpus_is_prepared_again(prepared, damage):
    folder, options = prepared
    intact = (folder / "val.bin").read_bytes()
    if damage == "a flipped bit":
        (folder / "val.bin").write_bytes(bytes([intact[0] ^ 1]) + intact[1:])
    else:
        (folder / "val.bin").unlink()
    result = prepare("text", *options)
    assert result.returncode == 0 and "val.bin is missing or damaged" in result.stdout
    assert (folder / "val.bin").read_bytes() == intact


@pytest.mark.parametrize("change", ["another setting", "a grown source", "a lost meta.json"])
def test_another_corpus_is_not_replaced_unless_forced(prepared, change):
    folder, options = prepared
    if change == "another setting":
        options = [*options, "--val_fraction", "0.5"]
    elif change == "a grown source":
        write_jsonl(options[1], documents(61))
    else:
        (folder / "meta.json").unlink()
    before = state(folder)
    result = prepare("text", *options)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "--force" in result.stderr
    assert state(folder) == before
    assert prepare("text", *options, "--force").returncode == 0
    read_corpus(folder)


def test_killed_in_the_middle_nothing_looks_finished_and_the_next_run_completes(tmp_path):
    source, folder = write_jsonl(tmp_path / "a.jsonl", documents(400)), tmp_path / "out"
    script = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from data import corpus, sources
def stalling():
    yield from sources.read_documents([Path({str(source)!r})], "text")
    time.sleep(600)
if __name__ == "__main__":
    corpus.TASK = 1_000
    args = corpus.arguments("", "x").parse_args(["--out_dir", {str(folder)!r}, "--num_proc", "2"])
    corpus.write(args, sources.split_by_hash(stalling(), 0.2), "gpt2", "stalling")
"""
    (tmp_path / "stalling.py").write_text(script)
    process = subprocess.Popen([sys.executable, tmp_path / "stalling.py"])
    try:
        wait_for(lambda: (folder / "train.bin.tmp").exists() and (folder / "train.bin.tmp").stat().st_size > 0)
    finally:
        process.kill()
        process.wait()
    assert not FILES & {path.name for path in folder.iterdir()}
    for out in (folder, tmp_path / "clean"):
        assert prepare("text", "--source", source, "--val_fraction", 0.2, "--out_dir", out).returncode == 0
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "train.bin").read_bytes() == (tmp_path / "clean" / "train.bin").read_bytes()


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_at_once_in_one_folder_do_not_mix(tmp_path):
    args = arguments(tmp_path)

    def intruding():
        yield "train", "first"
        with pytest.raises(UserError, match=r"another prepare\.py is writing"):
            corpus.write(args, [("train", "x"), ("val", "x")], "gpt2", "second")
        yield "val", "first"

    corpus.write(args, intruding(), "gpt2", "first")
    assert read_corpus(tmp_path)[1] == {"train": ["first"], "val": ["first"]}


def test_a_full_disk_leaves_the_old_corpus_as_it_was(prepared, tmp_path):
    """A file size limit stands in for the disk: the write fails the same way."""
    folder, options = prepared
    write_jsonl(options[1], documents(3_000))
    before = state(folder)
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); del sys.argv[0]; "
    code = [sys.executable, "-c", limit + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    script = [str(ROOT / "data/text/prepare.py"), *map(str, options), "--force"]
    result = subprocess.run(code + script, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "cannot be written" in result.stderr
    assert state(folder) == before


def test_kinds_and_compressions_read_the_same(tmp_path):
    texts = documents(40, words=20)
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts).encode()
    table = pyarrow.table({"other": range(len(texts)), "body": texts})
    pyarrow.parquet.write_table(table, tmp_path / "plain.parquet", row_group_size=7)
    packed = (tmp_path / "plain.parquet").read_bytes()
    compress = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    corpora = []
    for suffix, pack in compress.items():
        folder = tmp_path / f"txt{suffix}" / "sub folder"
        folder.mkdir(parents=True)
        for i, text in enumerate(texts):
            (folder / f"{i:02}.txt{suffix}").write_bytes(pack(text.encode()))
        (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(lines))
        (tmp_path / f"a.parquet{suffix}").write_bytes(pack(packed))
        corpora += [[tmp_path / f"txt{suffix}"], [tmp_path / f"a.jsonl{suffix}"], [tmp_path / f"a.parquet{suffix}"]]
    for paths in corpora:
        assert list(sources.read_documents(sources.find_files(paths), "body")) == texts, paths


def test_files_are_taken_in_sorted_order_and_once(tmp_path):
    names = ["b/1.txt", "a/10.TXT", "a/2.Csv.GZ", "c.jsonl", "a/x.json", "README.md", "meta.json", "train.bin", "e.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = sources.find_files([tmp_path / "b", tmp_path, tmp_path / "c.jsonl"])
    names = [str(path.relative_to(tmp_path)) for path in found]
    assert names == ["b/1.txt", "README.md", "a/10.TXT", "a/2.Csv.GZ", "a/x.json", "c.jsonl"], "a corpus is no source"
    by_pattern = sources.find_files([tmp_path / "**/*.[tT]*", tmp_path / "a/x.json"])
    assert [path.name for path in by_pattern] == ["10.TXT", "1.txt", "x.json"]


@pytest.mark.parametrize("link", ["../elsewhere", "nowhere.txt", "../elsewhere/a.txt"])
def test_nothing_in_a_folder_is_left_out_without_a_word(tmp_path, capsys, link):
    for name in ("in/a.txt", "in/b.html", "in/.git/x.txt", "in/.x.txt", "elsewhere/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "in/.broken").symlink_to("nowhere")
    assert [path.name for path in sources.find_files([tmp_path / "in"])] == ["a.txt"], "hidden files are none"
    assert "other kinds are not read: .html" in capsys.readouterr().out
    (tmp_path / "in/link").symlink_to(link)
    if link.endswith("/a.txt"):
        (tmp_path / "in/link").rename(tmp_path / "in/link.txt")
        assert len(sources.find_files([tmp_path / "in"])) == 2
        return
    with pytest.raises(UserError, match="in/link is a link to a folder or to nothing"):
        sources.find_files([tmp_path / "in"])
    with pytest.raises(UserError, match=r"nothing\*\.txt: no such file"):
        sources.find_files([tmp_path / "nothing*.txt"])


def cut_short(content):
    return content[: len(content) // 2]


GOOD = b'{"text": "good"}\n'
BAD_INPUT = {
    "broken.jsonl": (GOOD * 2 + b'{"text": "cut\n' + GOOD, "broken.jsonl, line 3"),
    "latin1.jsonl": (GOOD + b'{"text": "caf\xe9"}\n', "latin1.jsonl, line 2"),
    "list.jsonl": (GOOD + b"[]\n", "list.jsonl, line 2"),
    "field.jsonl": (GOOD + b'{"content": "x"}\n', "--field"),
    "null.jsonl": (GOOD + b"\n" + b'{"text": null}\n', "null.jsonl, line 3"),
    "deep.jsonl": (GOOD + b"[" * 100_000 + b"\n", "deep.jsonl, line 2"),
    "latin1.txt": (b"one\ntwo\ncaf\xe9\n", "latin1.txt, line 3"),
    "cut.jsonl.gz": (cut_short(gzip.compress(GOOD * 9)), "cut.jsonl.gz"),
    "cut.jsonl.xz": (cut_short(lzma.compress(GOOD * 9)), "cut.jsonl.xz"),
    "cut.jsonl.bz2": (cut_short(bz2.compress(GOOD * 9)), "cut.jsonl.bz2"),
    "not.txt.gz": (b"plain", "not.txt.gz"),
    "not.txt.xz": (b"plain", "not.txt.xz"),
    "not.txt.bz2": (b"plain", "not.txt.bz2"),
    "not.parquet": (b"plain", "not.parquet"),
    "empty.parquet": (b"", "empty.parquet"),
    "kind.csv": (b"a,b\n", "kind.csv"),
    "twice.csv": (b"text,b,text\n1,2,3\n", "several columns are named 'text'"),
    "blank.txt": (b" \n", "the sources hold no text"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named_in_one_sentence_and_nothing_is_written(tmp_path, name):
    content, culprit = BAD_INPUT[name]
    (tmp_path / name).write_bytes(content)
    result = prepare("text", "--source", tmp_path / name, "--out_dir", tmp_path / "out")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and culprit in result.stderr, result.stderr
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (["--source", "/nowhere/at.all"], "/nowhere/at.all"),
        ([], "--source"),
        (["--source", ".", "--num_proc", "0"], "--num_proc"),
        (["--source", ".", "--val_fraction", "1"], "--val_fraction"),
        (["--source", ".", "--val_franction", "0.1"], "--val_franction"),
        (["--source", __file__, "--out_dir", __file__], "test_corpus.py"),
    ],
)
def test_a_bad_option_is_named_in_one_sentence(options, culprit):
    result = prepare("text", *options)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and culprit in result.stderr, result.stderr


def test_parquet_says_which_columns_and_rows(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", "b", None]}), tmp_path / "a.parquet")
    options = ["--source", tmp_path / "a.parquet", "--out_dir", tmp_path / "out"]
    assert "name one of these with --field: body" in prepare("text", *options).stderr
    assert "a.parquet, row 3" in prepare("text", *options, "--field", "body").stderr


@pytest.mark.parametrize("name", sorted(path.parent.name for path in ROOT.glob("data/*/prepare.py")))
def test_help_says_what_the_corpus_is(name, tmp_path):
    result = prepare_in_new_process(name, "--help", cwd=tmp_path)
    assert result.returncode == 0 and f"python data/{name}/prepare.py" in result.stdout and "--force" in result.stdout
