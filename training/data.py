"""Token files, and which of their windows belong to which step: pure functions of (seed, step), nothing to restore.

    corpus = open_dataset("shakespeare_char")
    starts = window_starts(len(corpus.train), seed=1337, step=0, total_bs=480, block_size=1024)
    inputs, targets = take_windows(corpus.train, starts, block_size=1024)

The generator is Philox, whose raw numbers NumPy keeps the same for ever; everything is derived from those.
"""

import functools
import hashlib
import json
import os
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model import GPTConfig
from training.errors import UserError

DATA = Path(__file__).resolve().parent.parent / "data"
GPT2_VOCAB_SIZE = 50257
PADDED_GPT2_VOCAB_SIZE = GPTConfig.vocab_size  # for faster matrix products; the padding rows are never a target
_ORDER, _LABELS = 0, 1  # what a stream of random numbers is for


@dataclass(frozen=True)
class TokenDataset:
    """train, val: uint16 memory maps; every id is below vocab_size; tokenizer as in meta.json ("gpt2" without one)."""

    folder: Path
    train: np.ndarray
    val: np.ndarray
    identity: tuple  # size and modification time of both files when they were opened
    vocab_size: int
    tokenizer: object

    def check_unchanged(self):
        """UserError if a file is no longer the one that was opened: what was read since may be from another corpus."""
        if _identity(self.folder) != self.identity:
            raise UserError(
                f"train.bin or val.bin in {self.folder} was changed while the run was using it; put the old files back "
                "and go on with --init_from=resume."
            )

    def check_whole(self):
        """UserError if train.bin was cut short: reading its map beyond the end would kill the process."""
        path = self.folder / "train.bin"
        if not path.exists() or path.stat().st_size < self.train.nbytes:
            raise UserError(
                f"{path} was cut short or removed during the run; put it back and go on with --init_from=resume."
            )

    @property
    def model_vocab_size(self):
        """The rows of the model's embedding: the vocabulary, GPT-2's padded."""
        return PADDED_GPT2_VOCAB_SIZE if self.vocab_size == GPT2_VOCAB_SIZE else self.vocab_size

    def fits(self, rows):
        """Whether a model that was trained elsewhere, with `rows` rows in its embedding, can read this corpus."""
        gpt2 = self.tokenizer == "gpt2" and rows >= GPT2_VOCAB_SIZE  # padded or not
        return gpt2 or rows in (self.vocab_size, self.model_vocab_size)


def open_dataset(dataset):
    """Map data/`dataset`/train.bin and val.bin; UserError where they are missing, or are not what their name says."""
    folder = DATA / dataset
    meta = _read_meta(folder / "meta.json")
    train, val = (_map_tokens(folder / f"{split}.bin", dataset) for split in ("train", "val"))
    vocab_size, tokenizer = meta.get("vocab_size", PADDED_GPT2_VOCAB_SIZE), meta.get("tokenizer", "gpt2")
    return TokenDataset(folder, train, val, _identity(folder), vocab_size, tokenizer)


def _identity(folder):
    try:
        stats = [(folder / f"{split}.bin").stat() for split in ("train", "val")]
    except OSError:
        return None
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)


def _read_meta(path):
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}  # nanoGPT's files: GPT-2 tokens
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); prepare the corpus again.") from None
    size = meta.get("vocab_size") if isinstance(meta, dict) else None
    if type(size) is not int or not 1 <= size <= 2**16:
        raise UserError(
            f"{path}: vocab_size = {size!r}, wants a whole number from 1 to 65536; prepare the corpus again."
        )
    return meta


def _map_tokens(path, dataset):
    try:
        size = path.stat().st_size
    except OSError:
        raise UserError(f"{path} is missing; make it with: python data/{dataset}/prepare.py") from None
    if size == 0 or size % 2:
        raise UserError(f"{path} has {size} bytes, which is no file of two-byte tokens; prepare the corpus again.")
    return np.memmap(path, dtype="<u2", mode="r")


def check_dataset(corpus, total_bs, block_size):
    """Read both files once: {"train_sha256": ..., "val_sha256": ...}. UserError if too short or an id is out of range.

    The result is remembered in `.checked.json` beside the files, by size and modification time.
    """
    need = total_bs * block_size + 1
    if len(corpus.train) < need:
        raise UserError(
            f"{corpus.folder / 'train.bin'} has {len(corpus.train)} tokens, fewer than one step's {need} "
            f"(total_bs = {total_bs} times block_size = {block_size}, and one); lower either or use more data."
        )
    if len(corpus.val) < block_size + 1:
        raise UserError(
            f"{corpus.folder / 'val.bin'} has {len(corpus.val)} tokens, fewer than block_size + 1 = {block_size + 1}; "
            "lower block_size or use more data."
        )
    note = corpus.folder / ".checked.json"
    try:
        known = json.loads(note.read_text())
    except (OSError, ValueError):
        known = {}
    result, fresh = {}, {}
    for split in ("train", "val"):
        path = corpus.folder / f"{split}.bin"
        stat = path.stat()
        entry = known.get(split) if isinstance(known, dict) else None
        if not isinstance(entry, dict) or (entry.get("size"), entry.get("mtime_ns")) != (
            stat.st_size,
            stat.st_mtime_ns,
        ):
            largest, sha256 = _scan(path)
            entry = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "largest": largest, "sha256": sha256}
        if entry["largest"] >= corpus.vocab_size:
            raise UserError(
                f"{path} holds token {entry['largest']}, beyond the vocabulary of {corpus.vocab_size}; "
                "prepare the corpus again, or mend its meta.json."
            )
        fresh[split] = entry
        result[f"{split}_sha256"] = entry["sha256"]
    if fresh != known:
        try:
            temporary = note.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(fresh))
            os.replace(temporary, note)
        except OSError:
            pass  # a read-only corpus is checked again next time
    return result


def _scan(path):
    """(largest id, SHA-256) of a token file."""
    largest, digest = 0, hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
            largest = max(largest, int(np.frombuffer(block, "<u2").max()))
    return largest, digest.hexdigest()


def _raw(seed, stream, index, count, sub_index=0):
    """`count` 64-bit numbers: (seed, stream) is Philox's key, (index, sub_index) the high words of its counter."""
    generator = np.random.Philox(
        key=np.array([seed, stream], np.uint64), counter=np.array([0, 0, sub_index, index], np.uint64)
    )
    return generator.random_raw(count)


@functools.lru_cache(maxsize=2)  # a step can reach into the next epoch
def _epoch(seed, epoch, n_tokens, block_size):
    """(offset, order) of an epoch: windows start at offset + i * block_size, and are read in the order of i."""
    raw = _raw(seed, _ORDER, epoch, 1 + n_tokens // block_size)
    return int(raw[0] % np.uint64(n_tokens)), np.argsort(raw[1:], kind="stable")


def window_starts(n_tokens, seed, step, total_bs, block_size, first=None):
    """Where the `total_bs` sequences of a step start, (total_bs,) int64.

    first: how many sequences of the stream come before them; default step * total_bs.
    An epoch reads floor(n_tokens / block_size) windows that do not overlap, each once, in a random order; the file
    is a ring, cut at a random place in each epoch, so that fewer than block_size tokens are left out of one.
    """
    per_epoch = n_tokens // block_size
    first = step * total_bs if first is None else first
    starts = np.empty(total_bs, np.int64)
    done = 0
    while done < total_bs:
        epoch, position = divmod(first + done, per_epoch)
        offset, order = _epoch(seed, epoch, n_tokens, block_size)
        windows = order[position : position + total_bs - done]
        starts[done : done + len(windows)] = (offset + windows * block_size) % n_tokens
        done += len(windows)
    return starts


def evaluation_starts(n_tokens, eval_tokens, block_size):
    """Where the windows of an evaluation start: the same ones every time, evenly spread over the split, no overlap."""
    available = (n_tokens - 1) // block_size
    count = max(1, min(eval_tokens // block_size, available))
    return np.arange(count, dtype=np.int64) * available // count * block_size


def take_windows(tokens, starts, block_size):
    """inputs and targets, (len(starts), block_size) int64: the targets are the inputs one token on, in the ring."""
    windows = np.empty((len(starts), block_size + 1), tokens.dtype)
    inside = starts + block_size < len(tokens)
    windows[inside] = np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)[starts[inside]]
    windows[~inside] = tokens[(starts[~inside, None] + np.arange(block_size + 1)) % len(tokens)]
    return windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)


def label_uniforms(seed, step, sequences, block_size):
    """The random numbers in [0, 1) that draw the sampled labels of a step, (len(sequences), block_size) float32.

    `sequences` are places in the step's global batch, so the labels do not depend on how it is shared out.
    """
    raw = np.stack([_raw(seed, _LABELS, step, block_size, sequence) for sequence in sequences])
    return ((raw >> np.uint64(40)) * 2.0**-24).astype(np.float32)


class Prefetcher:
    """Prepares the batch that is expected next in one thread, while the device works on the one before.

        batch = prefetcher.get(prepare, step, *others)    # what prepare(step, *others) returns, a pure function
        prefetcher.close()

    Expected is the same call as many steps on as it moved last, at first one; what then is not asked for is dropped.
    What `prepare` raises ahead is raised by the `get` that asks for it.
    """

    def __init__(self):
        self._tasks, self._thread = queue.SimpleQueue(), None
        self._ahead, self._last = {}, {}  # by (prepare, *others): (step, its future); the last step

    def get(self, prepare, step, *others):
        key = (prepare, *others)
        expected, future = self._ahead.pop(key, (None, None))
        if future and not future.cancel() and expected == step:  # what has not begun is done here
            batch = future.result()
        else:
            batch = prepare(step, *others)
        following = step + max(1, step - self._last.get(key, step))
        self._last[key], self._ahead[key] = step, (following, self._submit(prepare, following, *others))
        return batch

    def _submit(self, function, *arguments):
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
            self._thread.start()
        future = Future()
        self._tasks.put((future, function, arguments))
        return future

    def _work(self):
        while task := self._tasks.get():
            future, function, arguments = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)
            del task, future, function, arguments  # a batch that nobody wants any more is freed

    def close(self):
        """End the thread."""
        for _, future in self._ahead.values():
            future.cancel()
        self._ahead.clear()
        self._last.clear()
        if self._thread:
            self._tasks.put(None)
            self._thread.join(timeout=2)  # a daemon: where the file system hangs, the process still ends
            self._thread = None
