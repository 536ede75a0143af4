"""Which tokens belong to which step, counted; and token files that are not what they should be."""

import hashlib
import json
import os
import queue
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
    starts = np.concatenate([data.window_starts(n_tokens, seed, s, total_bs, block_size) for s in range(steps)])
    for epoch in range(2):
        own = starts[epoch * per_epoch : (epoch + 1) * per_epoch]
        seen = np.bincount(((own[:, None] + np.arange(block_size)) % n_tokens).ravel(), minlength=n_tokens)
        assert seen.max() == 1, "no token twice"
        assert (seen == 0).sum() == n_tokens % block_size, "none skipped but the ragged rest"


def test_epochs_differ_and_seeds_differ():
    def first_epoch(seed):
        return data.window_starts(1000, seed, 0, 100, 10)

    assert not np.array_equal(np.sort(first_epoch(1)), np.sort(data.window_starts(1000, 1, 1, 100, 10))), "new offset"
    assert not np.array_equal(first_epoch(1), first_epoch(2))


def test_the_stream_never_changes():
    """Pinned: a later NumPy, or a change here, would silently give runs other data than those they are compared to."""
    assert data.window_starts(1000, seed=1337, step=3, total_bs=4, block_size=10).tolist() == PINNED_STARTS
    uniforms = data.label_uniforms(seed=1337, step=3, sequences=[2], block_size=3)
    assert uniforms.dtype == np.float32
    assert uniforms[0].tolist() == pytest.approx(PINNED_UNIFORMS, abs=1e-7)


PINNED_STARTS = [825, 505, 295, 675]
PINNED_UNIFORMS = [0.91595954, 0.88600588, 0.96954602]


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


def test_check_is_remembered_until_a_file_changes(tmp_path, monkeypatch):
    folder = write_corpus(tmp_path / "c")
    scanned = []
    scan = data._scan
    monkeypatch.setattr(data, "_scan", lambda path: scanned.append(path.name) or scan(path))
    first = data.check_dataset(data.open_dataset(folder), 24, 16)
    assert first["train_sha256"] == hashlib.sha256((folder / "train.bin").read_bytes()).hexdigest()
    assert data.check_dataset(data.open_dataset(folder), 24, 16) == first
    assert scanned == ["train.bin", "val.bin"]
    stat = (folder / "val.bin").stat()
    write_corpus(folder, seed=1)
    os.utime(folder / "train.bin", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = data.check_dataset(data.open_dataset(folder), 24, 16)
    assert changed["train_sha256"] != first["train_sha256"] and len(scanned) == 4
