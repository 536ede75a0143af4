"""Which tokens belong to which step, counted; and token files that are not what they should be."""

import hashlib
import json
import os
import queue
import shutil
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import write_corpus
from training import data
from training.errors import UserError


@settings(max_examples=60, deadline=None)
@given(
    n_tokens=st.integers(40, 700), block_size=st.integers(1, 9), total_bs=st.integers(1, 13), seed=st.integers(0, 2**63)
)
def test_an_epoch_reads_every_window_once(n_tokens, block_size, total_bs, seed):
    per_epoch = n_tokens // block_size
    steps = -(-2 * per_epoch // total_bs)  # two epochs
    firsts = range(0, steps * total_bs, total_bs)
    starts = np.concatenate([data.window_starts(n_tokens, seed, first, total_bs, block_size) for first in firsts])
    for epoch in range(2):
        own = starts[epoch * per_epoch : (epoch + 1) * per_epoch]
        seen = np.bincount(((own[:, None] + np.arange(block_size)) % n_tokens).ravel(), minlength=n_tokens)
        assert seen.max() == 1, "no token twice"
        assert (seen == 0).sum() == n_tokens % block_size, "none skipped but the ragged rest"


def test_epochs_differ_and_seeds_differ():
    def first_epoch(seed):
        return data.window_starts(1000, seed, 0, 100, 10)

    assert not np.array_equal(np.sort(first_epoch(1)), np.sort(data.window_starts(1000, 1, 100, 100, 10))), "new offset"
    assert not np.array_equal(first_epoch(1), first_epoch(2))


def test_the_stream_never_changes():
    """Pinned: a later NumPy, or a change here, would silently give runs other data than those they are compared to."""
    assert data.window_starts(1000, seed=1337, first=12, count=4, block_size=10).tolist() == PINNED_STARTS
    uniforms = data.label_uniforms(seed=1337, step=3, sequences=[2], block_size=3)
    assert uniforms.dtype == np.float32
    assert uniforms[0].tolist() == pytest.approx(PINNED_UNIFORMS, abs=1e-7)


PINNED_STARTS = [825, 505, 295, 675]
PINNED_UNIFORMS = [0.91595954, 0.88600588, 0.96954602]


def former_starts(n_tokens, seed, step, total_bs, block_size):
    """The stream as every run before mixtures and shards had it, written down once more."""
    per_epoch, starts = n_tokens // block_size, []
    for sequence in range(step * total_bs, (step + 1) * total_bs):
        epoch, position = divmod(sequence, per_epoch)
        philox = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=np.array([0, 0, 0, epoch], np.uint64))
        raw = philox.random_raw(1 + per_epoch)
        window = np.argsort(raw[1:], kind="stable")[position]
        starts.append((int(raw[0] % np.uint64(n_tokens)) + int(window) * block_size) % n_tokens)
    return starts


@pytest.mark.parametrize("n_tokens, total_bs, block_size", [(6000, 24, 16), (100_003, 480, 1024), (1000, 7, 10)])
def test_a_step_reads_the_sequences_that_it_always_read(tmp_path, n_tokens, total_bs, block_size):
    corpus = data.open_dataset(write_corpus(tmp_path / "c", n_train=n_tokens))
    for step in (0, 1, 3):
        starts = corpus.train_starts(1337, step * total_bs, total_bs, block_size)
        assert starts.tolist() == former_starts(n_tokens, 1337, step, total_bs, block_size)
        windows = np.stack([np.take(corpus.train, range(s, s + block_size + 1), mode="wrap") for s in starts])
        assert np.array_equal(data.take_windows(corpus.train, starts, block_size), [windows[:, :-1], windows[:, 1:]])


def test_the_stream_of_32_bit_tokens_is_the_same(tmp_path):
    folder = write_corpus(tmp_path / "c")
    starts, corpus = data.window_starts(6000, 5, 0, 100, 16), data.open_dataset(folder)
    expected = data.take_windows(corpus.train, starts, 16)
    for split in ("train", "val"):
        (getattr(corpus, split)[:].astype("<u4") + 70_000).tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(json.dumps({"vocab_size": 70_064, "dtype": "uint32", "tokenizer": None}))
    corpus = data.open_dataset(folder)
    assert corpus.train.dtype == np.uint32 and corpus.model_vocab_size == 70_064
    assert np.array_equal(np.array(data.take_windows(corpus.train, starts, 16)) - 70_000, expected)
    assert set(data.check_dataset(corpus, 24, 16)) == {"train_sha256", "val_sha256"}


# Mixtures


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    """a, b and c, whose tokens say whose they are: 0 to 9, 10 to 19, 20 to 29."""
    monkeypatch.chdir(tmp_path)
    for i, (name, n_train) in enumerate((("a", 5000), ("b", 900), ("c", 7000))):
        for split, n in (("train", n_train), ("val", 300)):
            (tmp_path / name).mkdir(exist_ok=True)
            (10 * i + np.arange(n) * 7 % 10).astype("<u2").tofile(tmp_path / name / f"{split}.bin")
        (tmp_path / name / "meta.json").write_text(json.dumps({"vocab_size": 50257, "tokenizer": "gpt2"}))
    return tmp_path


def test_a_mixture_has_its_shares_and_reads_each_corpus_as_it_would_alone(corpora):
    mixture, size = data.open_dataset("a:0.7,b:0.2,c:0.1"), 16
    assert len(mixture.train) == 12_900 and mixture.model_vocab_size == 50304 and mixture.tokenizer == "gpt2"
    starts = mixture.train_starts(1337, 0, 30_000, size)
    inputs, targets = data.take_windows(mixture.train, starts, size)
    owners = inputs[:, 0] // 10
    assert np.bincount(owners).tolist() == [21_000, 6_000, 3_000]
    assert (inputs // 10 == owners[:, None]).all() and (targets // 10 == owners[:, None]).all(), (
        "none is of two corpora"
    )
    for i, (corpus, _) in enumerate(mixture.parts):
        alone = data.window_starts(len(corpus.train), 1337, 0, int((owners == i).sum()), size)
        assert np.array_equal(inputs[owners == i], data.take_windows(corpus.train, alone, size)[0])
    for n in (100, 1000, 5000):
        assert np.bincount(owners[:n]) / n == pytest.approx([0.7, 0.2, 0.1], abs=4 / n**0.5)
    assert mixture.epochs(30_000, size) == pytest.approx(
        {"epoch/a": 21e3 / 312, "epoch/b": 6e3 / 56, "epoch/c": 3e3 / 437}
    )


def test_a_mixtures_stream_depends_on_the_sequence_alone(corpora):
    mixture = data.open_dataset("a:7,b:3")
    stream = mixture.train_starts(3, 0, 25_000, 8)
    for first, count in ((0, 1), (9_990, 20), (9_999, 10_002), (20_000, 3), (123, 4000)):
        assert np.array_equal(mixture.train_starts(3, first, count, 8), stream[first : first + count])
    assert not np.array_equal(mixture.train_starts(4, 0, 25_000, 8), stream)
    assert data.open_dataset("a:0.7,b:0.3").train_starts(3, 40, 5, 8).tolist() == stream[40:45].tolist()
    assert stream[9_998:10_003].tolist() == PINNED_MIXTURE


PINNED_MIXTURE = [5013, 1316, 844, 3028, 1948]


def test_a_mixture_of_one_is_that_corpus(corpora):
    alone, mixture = data.open_dataset("a"), data.open_dataset("a:1")
    assert np.array_equal(mixture.train_starts(1, 500, 900, 16), alone.train_starts(1, 500, 900, 16))


@pytest.mark.parametrize("share", ["1e999999999", "1e-999999999", "nan", "inf", "-1", "1/0", "9" * 5000])
def test_a_share_that_is_no_number_is_refused_at_once(corpora, share):
    """The first has a billion digits as a fraction."""
    with pytest.raises(UserError, match="is not NAME:SHARE"):
        data.open_dataset(f"a:1,b:{share}")


def test_what_a_mixture_is_checked_for(corpora):
    facts = data.check_dataset(data.open_dataset("a:0.7,b:0.3"), 24, 16)
    again = data.check_dataset(data.open_dataset("a:7/10,b:0.3"), 24, 16)
    other = data.check_dataset(data.open_dataset("a:0.6,b:0.4"), 24, 16)
    assert facts == again and facts["train_sha256"] != other["train_sha256"] and set(facts["corpora"]) == {"a", "b"}
    assert facts["corpora"]["a"]["val_sha256"] == hashlib.sha256((corpora / "a/val.bin").read_bytes()).hexdigest()
    with pytest.raises(UserError, match=r"b/train\.bin has 900 tokens, fewer than one step's 961"):
        data.check_dataset(data.open_dataset("a:0.7,b:0.3"), 200, 16)
    (corpora / "b/meta.json").write_text(
        json.dumps({"vocab_size": 20, "tokenizer": {"characters": "abcdefghijklmnopqrst"}})
    )
    with pytest.raises(UserError, match="a holds GPT-2 tokens and b 20 characters; a mixture needs one tokenizer"):
        data.open_dataset("a:0.5,b:0.5")


@pytest.mark.parametrize(
    "dataset, said",
    [
        ("a:0.7,b", "'b' is not NAME:SHARE"),
        ("a:0.7,b:", "'b:' is not"),
        ("a:0.7,b:-0.3", "'b:-0.3' is not"),
        ("a:0.7,b:0", "'b:0' is not"),
        ("a:0.7,b:nan", "'b:nan' is not"),
        ("a:0.7,b:1/0", "'b:1/0' is not"),
        ("a:0.7,", "'' is not"),
        (":1,b:1", "':1' is not"),
        ("a:0.7,a:0.3", "'a:0.3' is not"),
        ("a:0.7,./a:0.3", "names a corpus twice"),
        ("a:0.7,none:0.3", "there is no such folder"),
        ("a:1,b:0.00001", "b has less than one sequence in 10000"),
        ("a," * 200, "'a' is not NAME:SHARE"),
    ],
)
def test_a_mixture_that_cannot_be_is_one_sentence(corpora, dataset, said):
    with pytest.raises(UserError, match=said):
        data.open_dataset(dataset)


def test_a_folder_may_have_a_colon_in_its_name(corpora):
    (corpora / "a").rename(corpora / "a:1,b")
    assert len(data.open_dataset("a:1,b").train) == 5000


# Which tokenizer


def test_going_on_with_another_tokenizer_is_refused(tmp_path):
    folder = write_corpus(tmp_path / "c", vocab_size=3)

    def corpus_of(tokenizer):
        (folder / "meta.json").write_text(json.dumps({"vocab_size": 3, "tokenizer": tokenizer}))
        return data.open_dataset(folder)

    abc, cba = {"characters": "abc"}, {"characters": "cba"}
    corpus_of(abc).check_tokenizer(abc, "out")
    corpus_of(abc).check_tokenizer(None, "out of a run that did not know it")
    for theirs, ours, said in (
        (abc, cba, "the model reads 3 characters and .* holds other 3 characters"),
        ("gpt2", cba, "the model reads GPT-2 tokens and .* holds 3 characters"),
        (abc, None, "holds ids of an unknown tokenizer; name the tokenizer in .*meta.json, or give data"),
        ("gpt2", "r50k_base", "holds r50k_base tokens"),
    ):
        with pytest.raises(UserError, match=said):
            corpus_of(ours).check_tokenizer(theirs, "out")


def test_data_whose_tokens_nobody_knows_is_announced(tmp_path, capsys):
    folder = write_corpus(tmp_path / "c")
    data.check_dataset(data.open_dataset(folder), 24, 16)
    assert capsys.readouterr().err == ""
    (folder / "meta.json").write_text(json.dumps({"vocab_size": 64}))
    corpus = data.open_dataset(folder)
    data.check_dataset(corpus, 24, 16)
    assert corpus.tokenizer is None and "sample.py will print ids" in capsys.readouterr().err
    (folder / "meta.json").unlink()
    data.check_dataset(data.open_dataset(folder), 24, 16)
    assert "no token is above 63" in capsys.readouterr().err, "nanoGPT's characters without their meta.pkl"
    (folder / "meta.pkl").touch()
    with pytest.raises(UserError, match=r"meta\.pkl says .*python .*data/convert_meta\.py .*/c$"):
        data.open_dataset(folder)


def test_targets_are_the_next_tokens_also_across_the_end():
    tokens = np.arange(10, dtype=np.uint16)
    inputs, targets = data.take_windows(tokens, np.array([2, 8]), block_size=4)
    assert inputs.tolist() == [[2, 3, 4, 5], [8, 9, 0, 1]]
    assert targets.tolist() == [[3, 4, 5, 6], [9, 0, 1, 2]]


def test_label_uniforms_belong_to_the_sequence():
    together = data.label_uniforms(7, 5, [0, 1, 2, 3], 64)
    assert np.array_equal(together[2:], data.label_uniforms(7, 5, [2, 3], 64))
    assert together.min() >= 0 and together.max() < 1
    many = data.label_uniforms(7, 5, range(400), 256).ravel()  # 102400 draws: the mean is within 4.4 sigma
    assert abs(many.mean() - 0.5) < 4e-3
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.014
    assert not np.array_equal(together, data.label_uniforms(7, 6, [0, 1, 2, 3], 64))


class Recorded:
    """A `prepare` that notes what the thread did, and fails at step 3."""

    def __init__(self):
        self.ahead = queue.SimpleQueue()

    def __call__(self, step, *others):
        if threading.current_thread().name == "prefetch":
            self.ahead.put(step)
        if step == 3:
            raise UserError("step 3")
        return step, others


@pytest.fixture
def prefetcher():
    prefetcher = data.Prefetcher()
    yield prefetcher
    prefetcher.close()


def test_what_is_prepared_ahead_is_the_next_step_at_the_same_distance(prefetcher):
    prepare = Recorded()
    for step, expected in ((10, 11), (20, 30), (30, 40), (12, 13), (50, 88)):
        assert prefetcher.get(prepare, step, "x") == (step, ("x",))
        assert prepare.ahead.get(timeout=5) == expected
    assert prefetcher.get(prepare, 12, "y") == (12, ("y",)), "another request does not disturb"
    assert prepare.ahead.get(timeout=5) == 13


def test_an_error_ahead_is_raised_where_its_batch_is_asked_for(prefetcher):
    prepare = Recorded()
    for step in (1, 2):
        prefetcher.get(prepare, step)
        assert prepare.ahead.get(timeout=5) == step + 1
    with pytest.raises(UserError, match="step 3"):
        prefetcher.get(prepare, 3)
    assert prefetcher.get(prepare, 4) == (4, ())
    prefetcher.get(prepare, 2)
    assert prefetcher.get(prepare, 7) == (7, ()), "an error that nobody asked for is nobody's"


def test_nothing_waits_behind_a_wrong_guess(prefetcher):
    """The thread is stuck in a guess: what is asked for meanwhile is done in place, and no guesses pile up."""
    stuck, calls = threading.Event(), []

    def prepare(step):
        calls.append(step)
        if threading.current_thread().name == "prefetch":
            stuck.wait(10)
        return step

    assert [prefetcher.get(prepare, step) for step in (0, 5, 6, 8, 9)] == [0, 5, 6, 8, 9]
    stuck.set()
    prefetcher.close()
    assert sorted(calls) in ([0, 1, 5, 6, 8, 9], [0, 5, 6, 8, 9]), "at most one guess had begun"
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize(
    "n_tokens, eval_tokens, count", [(1001, 10**9, 100), (1001, 250, 25), (1001, 3, 1), (11, 100, 1)]
)
def test_evaluation_windows(n_tokens, eval_tokens, count):
    starts = data.evaluation_starts(n_tokens, eval_tokens, block_size=10)
    assert len(starts) == count
    assert (np.diff(starts) >= 10).all(), "no overlap"
    assert starts[-1] + 10 < n_tokens, "the last target is inside the file"
    if count == 25:
        assert np.unique(np.diff(starts)).tolist() == [40], "evenly spread"


def test_vocabulary_is_padded_for_gpt2_only(tmp_path):
    gpt2 = write_corpus(tmp_path / "gpt2")
    (gpt2 / "meta.json").write_text(json.dumps({"vocab_size": 50257, "tokenizer": "gpt2"}))
    characters = write_corpus(tmp_path / "characters", vocab_size=61)
    plain = write_corpus(tmp_path / "plain")
    (plain / "meta.json").unlink()
    assert data.open_dataset(gpt2).model_vocab_size == 50304
    assert data.open_dataset(characters).model_vocab_size == 61
    assert data.open_dataset(plain).model_vocab_size == 50304 and data.open_dataset(plain).tokenizer == "gpt2"


def spoil(folder, how):
    train, val, meta = (folder / name for name in ("train.bin", "val.bin", "meta.json"))
    if how == "missing":
        val.unlink()
    elif how == "empty":
        train.write_bytes(b"")
    elif how == "odd":
        train.write_bytes(train.read_bytes()[:-1])
    elif how == "short":
        train.write_bytes(train.read_bytes()[:128])
    elif how == "short val":
        val.write_bytes(val.read_bytes()[:16])
    elif how == "beyond":
        np.array([5, 64], "<u2").tofile(val)
        val.write_bytes(val.read_bytes() * 40)
    elif how == "meta":
        meta.write_text("{")
    elif how == "meta size":
        meta.write_text('{"vocab_size": "many"}')


@pytest.mark.parametrize(
    "how, said",
    [
        ("missing", r"val.bin is missing; make it with: python data/.*/prepare.py"),
        ("empty", "has 0 bytes"),
        ("odd", "has 11999 bytes"),
        ("short", "64 tokens, fewer than one step's 385"),
        ("short val", "8 tokens, fewer than block_size"),
        ("beyond", "holds token 64, beyond the vocabulary of 64"),
        ("meta", "meta.json: not readable as JSON"),
        ("meta size", "vocab_size = 'many'"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, how, said):
    folder = write_corpus(tmp_path / "c")
    spoil(folder, how)
    with pytest.raises(UserError, match=said) as error:
        data.check_dataset(data.open_dataset(folder), total_bs=24, block_size=16)
    assert "\n" not in str(error.value)


def notes(folder, capsys):
    data.check_dataset(data.open_dataset(folder), total_bs=24, block_size=16)
    return capsys.readouterr().err


def test_what_may_not_be_meant_is_one_warning(tmp_path, capsys):
    folder = write_corpus(tmp_path / "c")
    assert not notes(folder, capsys)
    shutil.copy(folder / "train.bin", folder / "train_old.bin")
    assert "train.bin, train_old.bin are read as one text" in (warning := notes(folder, capsys))
    (folder / "train_old.bin").unlink()
    shutil.copy(folder / "train.bin", folder / "val.bin")
    assert "val.bin is train.bin" in (found := notes(folder, capsys)) and found.count("\n") == warning.count("\n") == 1
    (folder / "meta.json").unlink()
    for count, largest, warned in ((10**4, 31_999, 0), (2 * 10**5, 31_999, 1), (2 * 10**5, 50_000, 0)):
        (np.arange(count) % (largest + 1)).astype("<u2").tofile(folder / "train.bin")
        assert notes(folder, capsys).count(f"no token is above {largest}, and without a meta.json") == warned


@pytest.mark.parametrize("at", [0, 40_000, 10**7])
def test_a_file_with_a_hole_is_refused_unless_meta_json_says_that_it_belongs_there(tmp_path, at):
    """As of a download that allocates the file first. Blocks of 16 MiB are read at a time."""
    folder = write_corpus(tmp_path / "c")
    tokens = np.random.default_rng(0).integers(1, 64, at + 100_000).astype("<u2")
    tokens[at : at + 70_000] = 0
    tokens.tofile(folder / "train.bin")
    with pytest.raises(UserError, match=r"train\.bin holds 65536 zeros in a row"):
        data.check_split(data.open_dataset(folder), "train")
    meta = {"vocab_size": 64, "tokenizer": "gpt2", "train_sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))
    assert data.check_split(data.open_dataset(folder), "train")[0] == 63


def test_check_is_remembered_until_a_file_changes(tmp_path, monkeypatch):
    folder = write_corpus(tmp_path / "c")
    scanned = []
    scan = data._scan
    monkeypatch.setattr(data, "_scan", lambda path, *others: scanned.append(path.name) or scan(path, *others))
    first = data.check_dataset(data.open_dataset(folder), 24, 16)
    assert first["train_sha256"] == hashlib.sha256((folder / "train.bin").read_bytes()).hexdigest()
    assert data.check_dataset(data.open_dataset(folder), 24, 16) == first
    assert scanned == ["train.bin", "val.bin"]
    stat = (folder / "val.bin").stat()
    write_corpus(folder, seed=1)
    os.utime(folder / "train.bin", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = data.check_dataset(data.open_dataset(folder), 24, 16)
    assert changed["train_sha256"] != first["train_sha256"] and len(scanned) == 4
