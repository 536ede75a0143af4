"""Read token files, and choose the window of tokens that each sequence is: a pure function of the seed.

    corpus = open_dataset("shakespeare_char")           # or a mixture: "fineweb:0.7,python:0.3"
    starts = corpus.train_starts(seed=1337, first=0, count=480, block_size=1024)
    inputs, targets = take_windows(corpus.train, starts, block_size=1024)

A resume has no state to restore. The generator is Philox; NumPy guarantees that its raw numbers never change.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from model import GPTConfig
from training.errors import UserError
from training.foreign import is_plain_name, read_json
from training.terminal import warn
from training.token_files import DATA, command, find_folder, guess_why_beyond, is_folder, open_split
from training.tokenizer import check_spec, describe, read_tokenizer_json, same
from training.tracking import write_atomically

GPT2_VOCAB_SIZE = 50257
PADDED_GPT2_VOCAB_SIZE = GPTConfig.vocab_size  # for faster matrix products; the padding rows are never a target
_ORDER, _LABELS, _CORPUS = 0, 1, 2  # what a stream of random numbers is for
AGAIN = "prepare the corpus again"
GO_ON = "go on with --init_from=resume"
LARGEST_OF_OTHERS = 40_000  # 10,000 GPT-2 tokens of English or code have larger ids; Llama's are below 32,000
HOLE = bytes(1 << 16)
MIXED = 10_000  # sequences of a mixture in which each corpus has its share exactly


@dataclass(frozen=True)
class TokenDataset:
    """One corpus.

    train, val: memory maps of uint16 or uint32, or `Shards` of them; every id is below vocab_size. tokenizer: as in
    meta.json, with the content of its file; "gpt2" without a meta.json, None where nobody knows it. files: the paths of
    each split. identity: size and modification time of all of them when they were opened.
    """

    name: str
    folder: Path
    train: np.ndarray
    val: np.ndarray
    files: dict
    identity: dict
    vocab_size: int
    tokenizer: object
    meta: dict

    @property
    def parts(self):
        """[(the corpus, its share of the sequences)] of what may be a mixture."""
        return [(self, 1.0)]

    def train_starts(self, seed, first, count, block_size):
        """Where sequences `first` to `first + count - 1` of the run start in `train`, (count,) int64."""
        return window_starts(len(self.train), seed, first, count, block_size)

    def epochs(self, sequences, block_size):
        """How often so many sequences read the corpus, by the metric's name."""
        return {"epoch": sequences / (len(self.train) // block_size)}

    def check_unchanged(self):
        """UserError if a file is no longer the one that was opened: what was read since may be from another corpus."""
        for path, identity in self.identity.items():
            if _stat(path)[:2] != identity:
                raise UserError(f"{path} was changed during the run; put the old file back and {GO_ON}.")

    def check_whole(self):
        """UserError if a training file was cut short: reading its map beyond the end would kill the process."""
        for path in self.files["train"]:
            if (_stat(path) or (0,))[0] < self.identity[path][0]:
                raise UserError(f"{path} was cut short or removed during the run; put it back and {GO_ON}.")

    @property
    def model_vocab_size(self):
        """The rows of the model's embedding: the vocabulary, GPT-2's padded."""
        return PADDED_GPT2_VOCAB_SIZE if self.vocab_size == GPT2_VOCAB_SIZE else self.vocab_size

    def fits(self, rows, theirs):
        """Whether a model with `rows` rows in its embedding, which reads ids of the tokenizer `theirs`, has enough."""
        least = GPT2_VOCAB_SIZE if self.tokenizer == "gpt2" else self.vocab_size
        padded = theirs is not None and rows >= least and same(theirs, self.tokenizer)
        return padded or rows in (self.vocab_size, self.model_vocab_size)

    def check_tokenizer(self, theirs, origin):
        """UserError where the model of `origin` reads ids of another tokenizer, `theirs` (None: nobody knows it)."""
        if theirs is not None and not same(theirs, self.tokenizer):
            of, ours = describe(theirs), describe(self.tokenizer)
            add = "" if self.tokenizer else f"name the tokenizer in {self.folder / 'meta.json'}, or "
            problem = f"the model reads {of} and {self.folder} holds {f'other {ours}' if ours == of else ours}"
            raise UserError(f"{problem}; {add}give data of the tokenizer that {origin} was trained with.")


class MixtureDataset:
    """Several corpora of one tokenizer, each with its share of the sequences. It is used as a TokenDataset is."""

    def __init__(self, corpora, weights):
        first, total = corpora[0], sum(weights)
        self.corpora, self._shares = corpora, [weight / total for weight in weights]
        rows = first.model_vocab_size
        fits = [c.model_vocab_size == rows and same(c.tokenizer, first.tokenizer) for c in corpora]
        if other := next((corpus for corpus, fit in zip(corpora, fits, strict=True) if not fit), None):
            both = f"{first.name} holds {describe(first.tokenizer)} and {other.name} {describe(other.tokenizer)}"
            raise UserError(f"{both}; a mixture needs one tokenizer: prepare one of them again with the other's.")
        self._counts = _shares_of(MIXED, self._shares)
        if 0 in self._counts:
            rare = corpora[self._counts.index(0)].name
            raise UserError(f"{rare} has less than one sequence in {MIXED}; raise its share or leave it out.")
        self.name, self.folder = ", ".join(corpus.name for corpus in corpora), first.folder
        self.train, self.val = (Rings([getattr(corpus, split) for corpus in corpora]) for split in ("train", "val"))
        self.tokenizer, self.vocab_size = first.tokenizer, max(corpus.vocab_size for corpus in corpora)
        self.model_vocab_size = first.model_vocab_size
        self.identity = {path: identity for corpus in corpora for path, identity in corpus.identity.items()}
        self.files = {"train": [path for corpus in corpora for path in corpus.files["train"]]}

    fits, check_tokenizer = TokenDataset.fits, TokenDataset.check_tokenizer
    check_unchanged, check_whole = TokenDataset.check_unchanged, TokenDataset.check_whole

    @property
    def parts(self):
        return [(corpus, float(share)) for corpus, share in zip(self.corpora, self._shares, strict=True)]

    def train_starts(self, seed, first, count, block_size):
        """Where the sequences start in the Rings `train`. Each corpus is read in the order that it has by itself."""
        starts, done = np.empty(count, np.int64), 0
        while done < count:
            block, position = divmod(first + done, MIXED)
            owners, places = _mixed(seed, block, tuple(self._counts))
            rows = slice(position, position + count - done)
            for i, corpus in enumerate(self.corpora):
                own = np.flatnonzero(owners[rows] == i)
                if len(own):
                    nth = block * self._counts[i] + int(places[rows][own[0]])
                    offset = self.train.ends[i] - len(corpus.train)
                    starts[done + own] = offset + corpus.train_starts(seed, nth, len(own), block_size)
            done += len(owners[rows])
        return starts

    def epochs(self, sequences, block_size):
        epochs = {corpus.name: corpus.epochs(sequences * share, block_size)["epoch"] for corpus, share in self.parts}
        return {f"epoch/{name}": epoch for name, epoch in epochs.items()}


def _shares_of(total, shares):
    """`total` as whole numbers in proportion to `shares`: largest remainders."""
    exact = [share * total for share in shares]
    counts = [int(number) for number in exact]
    order = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


@functools.lru_cache(maxsize=4)
def _mixed(seed, block, counts):
    """Of each of MIXED sequences in a row, whose it is, and how many in this block that corpus had before it."""
    owners = np.repeat(np.arange(len(counts)), counts)[np.argsort(_raw(seed, _CORPUS, block, MIXED), kind="stable")]
    places = np.empty(MIXED, np.int64)
    for i, count in enumerate(counts):
        places[owners == i] = np.arange(count)
    return owners, places


class Shards:
    """Several arrays of tokens as one, one after the other, without a copy."""

    def __init__(self, parts):
        self.parts, self.dtype = parts, np.result_type(*parts)
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, key):
        """Tokens by a slice."""
        start, stop, step = key.indices(len(self))
        first, last = np.searchsorted(self.ends[:-1], (start, stop), "right")
        cut = [
            part[max(start - end + len(part), 0) : max(stop - end + len(part), 0)]
            for part, end in zip(self.parts[first : last + 1], self.ends[first : last + 1], strict=True)
        ]
        return np.concatenate(cut)[::step]


class Rings(Shards):
    """The tokens of several corpora; a window that reaches a corpus's end goes on at its start."""


def open_dataset(dataset):
    """A corpus by its folder, or a mixture. UserError where files are missing, or are not what their name says."""
    shares = _parse_mixture(str(dataset))
    if not shares:
        return _open_corpus(dataset)
    corpora = [_open_corpus(name) for name in shares]
    names = [corpus.name for corpus in corpora]
    if len({corpus.folder.resolve() for corpus in corpora}) < len(corpora) or len(set(names)) < len(names):
        raise UserError(f"dataset = '{dataset}' names a corpus twice, or two of the same folder name; leave one out.")
    return MixtureDataset(corpora, list(shares.values()))


def _parse_mixture(dataset):
    """{name: weight} of a mixture; {} where `dataset` names one corpus."""
    if not {":", ","} & set(dataset) or is_folder(dataset):
        return {}
    shares = {}
    for part in dataset.split(","):
        name, _, weight = part.rpartition(":")
        try:
            is_sane = "/" in weight or 0 < float(weight) < math.inf  # 1e999999999 has a billion digits
            weight = Fraction(weight) if is_sane else 0
        except (ValueError, ZeroDivisionError):
            weight = 0
        if not name or weight <= 0 or name in shares:
            problem = f"dataset = '{dataset}': {part!r} is not NAME:SHARE with a share above 0, each name once"
            raise UserError(f"{problem}; write a mixture as in fineweb:0.7,python:0.3.")
        shares[name] = weight
    return shares


def _open_corpus(dataset):
    folder = find_folder(dataset)
    meta = _read_meta(folder)
    files, tokens = {}, {}
    for split in ("train", "val"):
        files[split], arrays = open_split(folder, split, "<u4" if meta.get("dtype") == "uint32" else "<u2")
        tokens[split] = arrays[0] if len(arrays) == 1 else Shards(arrays)
        count, said = len(tokens[split]), meta.get(f"{split}_tokens", len(tokens[split]))
        if count != said:
            names = ", ".join(path.name for path in files[split][:4]) + (", ..." if len(files[split]) > 4 else "")
            why = "a file was cut short, is missing, or does not belong there: copy the files again"
            differing = f"{names} holds {count} tokens, its meta.json says {said!r:.40}"
            raise UserError(f"{folder}: {differing}; {why} or {AGAIN}.")
    identity = {path: _stat(path)[:2] for path in (*files["train"], *files["val"])}
    vocab_size = meta.get("vocab_size", PADDED_GPT2_VOCAB_SIZE)
    tokenizer = meta.get("tokenizer") if meta else "gpt2"  # nanoGPT's files without meta.json are GPT-2 tokens
    return TokenDataset(folder.name, folder, *tokens.values(), files, identity, vocab_size, tokenizer, meta)


def _stat(path):
    """Size, modification time, inode and time of the last change of any kind, the last two a copy's own; or ()."""
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns


def _read_meta(folder):
    """The folder's meta.json, a tokenizer.json that it names included; {} without one."""
    path, old = folder / "meta.json", folder / "meta.pkl"
    try:
        meta = read_json(path, 1 << 26)
    except FileNotFoundError:
        if os.path.lexists(old):
            convert = command(DATA / "convert_meta.py", folder)
            raise UserError(f"{old} says what the ids stand for; make a meta.json of it with: {convert}") from None
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); {AGAIN}.") from None
    size = meta.get("vocab_size") if isinstance(meta, dict) else None
    if type(size) is not int or not 1 <= size < 2**31:
        raise UserError(f"{path}: vocab_size = {size!r}, wants a whole number from 1 to {2**31 - 1}; {AGAIN}.")
    dtype = meta.setdefault("dtype", "uint16" if size <= 2**16 else "uint32")
    if dtype not in ("uint16", "uint32") or (dtype == "uint16" and size > 2**16):
        wanted = "uint16 up to a vocabulary of 65536, or uint32"
        raise UserError(f"{path}: dtype = {dtype!r} with vocab_size = {size}; tokens are {wanted}: {AGAIN}.")
    spec = meta.get("tokenizer")
    try:
        check_spec(spec)
    except UserError as error:
        raise UserError(f"{path}: {error}.") from None
    if isinstance(spec, dict) and "file" in spec:
        if not is_plain_name(spec["file"]):
            raise UserError(f"{path}: the tokenizer's file {spec['file']!r:.80} is no name in this folder; correct it.")
        meta["tokenizer"] = read_tokenizer_json(folder / spec["file"])
        if meta["tokenizer"]["sha256"] != spec["sha256"]:
            raise UserError(f"{folder / spec['file']} is not the tokenizer that {path} names (its SHA-256 differs).")
    elif isinstance(spec, dict) and {len(spec["characters"]), len(set(spec["characters"]))} != {size}:
        count = len(set(spec["characters"]))
        raise UserError(f"{path}: vocab_size = {size}, but it names {count} different characters; {AGAIN}.")
    return meta


def check_dataset(corpus, total_bs, block_size):
    """Read all files once: {"train_sha256": ..., "val_sha256": ...}. UserError if too short or not what meta.json says.

    Says on stderr where the tokenizer is not known. The SHA-256 of several shards is that of their bytes in a row.
    """
    found = {}
    for part, share in corpus.parts:
        sequences = math.ceil(total_bs * share)
        need = sequences * block_size + 1
        if len(part.train) < need:
            few = f"{len(part.train)} tokens, fewer than one step's {need}"
            product = f"total_bs = {sequences} times block_size = {block_size}, and one"
            raise UserError(f"{_named(part, 'train')} has {few} ({product}); lower either or use more data.")
        if len(part.val) < block_size + 1:
            few = f"{len(part.val)} tokens, fewer than block_size + 1 = {block_size + 1}"
            raise UserError(f"{_named(part, 'val')} has {few}; lower block_size or use more data.")
        checked = {split: check_split(part, split) for split in ("train", "val")}
        facts = {f"{split}_sha256": sha256 for split, (_, sha256) in checked.items()} | {"share": share}
        found[part.name] = facts
        note = "" if part.tokenizer else "its meta.json names no tokenizer: sample.py will print ids instead of text"
        (largest, train_sha256), (_, val_sha256), files = *checked.values(), [path.name for path in part.files["train"]]
        if not part.meta and (largest < 256 or (largest < LARGEST_OF_OTHERS and len(part.train) > 100_000)):
            note = f"no token is above {largest}, and without a meta.json they are taken for GPT-2's"
        if "train_tokens" not in part.meta and "train.bin" in files and len(files) > 1:
            note = f"{', '.join(files[:4])} are read as one text; move away what does not belong to it"
        if train_sha256 == val_sha256:
            note = "val.bin is train.bin, so val/loss is that of the training data"
        if note and ("RANK" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"):
            warn(f"{part.folder}: {note}.")
    if len(found) == 1:
        return {key: value for key, value in facts.items() if key != "share"}
    found = {"corpora": found}
    for key in ("train_sha256", "val_sha256"):
        pairs = [[facts["share"], facts[key]] for facts in found["corpora"].values()]
        found[key] = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    return found


def _named(corpus, split):
    return corpus.files[split][0] if len(corpus.files[split]) == 1 else f"{corpus.folder}/*{split}*.bin"


def check_split(corpus, split):
    """(largest id, SHA-256) of a split of one corpus. UserError where they are not what meta.json says.

    The result is remembered in `.checked.json` beside the files, by their names, sizes, modification times, inodes and
    change times. The last two are this disk's: a note that came with the files, or that files were swapped behind, is
    not believed. One that was forged on this machine for these very files would be.
    """
    note, files = corpus.folder / ".checked.json", corpus.files[split]
    try:
        known = read_json(note, 1 << 26)
    except (OSError, ValueError, UserError):
        known = {}
    known = known if isinstance(known, dict) else {}
    entry, now = known.get(split), [[path.name, *_stat(path)] for path in files]
    kinds = {"files": list, "largest": int, "sha256": str}
    is_note = isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
    if not is_note or entry["files"] != now:
        digest, tokens = hashlib.sha256(), getattr(corpus, split)
        parts = tokens.parts if isinstance(tokens, Shards) else [tokens]
        refuses_holes = f"{split}_sha256" not in corpus.meta  # else the hash tells whether a hole belongs there
        largest = max(_scan(path, part, digest, refuses_holes) for path, part in zip(files, parts, strict=True))
        entry = {"files": now, "largest": largest, "sha256": digest.hexdigest()}
        with contextlib.suppress(OSError):  # a read-only corpus is checked again next time
            write_atomically(note, json.dumps(known | {split: entry}))
    name, largest, sha256 = _named(corpus, split), entry["largest"], entry["sha256"]
    if sha256 != corpus.meta.get(f"{split}_sha256", sha256):
        problem = f"{name} is not the file that meta.json describes, its SHA-256 differs"
        raise UserError(f"{problem}: it was damaged or replaced; copy it again or {AGAIN}.")
    if largest >= corpus.vocab_size:
        beyond = f"{corpus.vocab_size}{guess_why_beyond(getattr(corpus, split), corpus.vocab_size)}"
        raise UserError(f"{name} holds token {largest}, beyond the vocabulary of {beyond}; {AGAIN}, or mend meta.json.")
    if not largest and corpus.vocab_size > 1:
        raise UserError(f"{name} holds nothing but zeros, as a failed copy does; copy it again.")
    return largest, sha256


def _scan(path, tokens, digest, refuses_holes):
    """The largest id of a token file, whose bytes go into `digest`."""
    largest = 0
    with open(path, "rb") as file:
        digest.update(file.read(path.stat().st_size - tokens.nbytes))  # the header
        while block := file.read(1 << 24):
            digest.update(block)
            if refuses_holes and HOLE in block:
                raise UserError(f"{path} holds {len(HOLE)} zeros in a row, as an unfinished copy does; copy it again.")
            largest = max(largest, int(np.frombuffer(block, tokens.dtype).max()))
    return largest


def _raw(seed, stream, index, count, sub_index=0):
    """`count` 64-bit numbers: (seed, stream) is Philox's key, (index, sub_index) the high words of its counter."""
    key, counter = (np.array(numbers, np.uint64) for numbers in ((seed, stream), (0, 0, sub_index, index)))
    return np.random.Philox(key=key, counter=counter).random_raw(count)


@functools.lru_cache(maxsize=64)
def _epochs(seed, n_tokens, block_size):
    """The function that gives an epoch's (offset, order): windows start at offset + i * block_size, i in this order."""

    @functools.lru_cache(maxsize=2)  # a step can reach into the next epoch
    def epoch(number):
        raw = _raw(seed, _ORDER, number, 1 + n_tokens // block_size)
        return int(raw[0] % np.uint64(n_tokens)), np.argsort(raw[1:], kind="stable")

    return epoch


def window_starts(n_tokens, seed, first, count, block_size):
    """Where the sequences `first` to `first + count - 1` of a run start, (count,) int64.

    first: how many sequences of the stream come before them; default step * total_bs.
    An epoch reads floor(n_tokens / block_size) windows that do not overlap, each once, in a random order; the file
    is a ring, cut at a random place in each epoch, so that fewer than block_size tokens are left out of one.
    """
    per_epoch = n_tokens // block_size
    starts = np.empty(count, np.int64)
    done = 0
    while done < count:
        epoch, position = divmod(first + done, per_epoch)
        offset, order = _epochs(seed, n_tokens, block_size)(epoch)
        windows = order[position : position + count - done]
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
    for window, start in zip(windows, starts, strict=True):
        ring = tokens
        if isinstance(tokens, Rings):
            i = np.searchsorted(tokens.ends, start, "right")
            ring = tokens.parts[i]
            start -= tokens.ends[i] - len(ring)
        found = ring[start : start + len(window)]
        window[: len(found)], window[len(found) :] = found, ring[: len(window) - len(found)]
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
        self._tasks = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)  # begins with the first task
        self._ahead, self._last = {}, {}  # by (prepare, *others): (step, its future); the last step

    def get(self, prepare, step, *others):
        key = (prepare, *others)
        expected, future = self._ahead.pop(key, (None, None))
        if future and not future.cancel() and expected == step:  # what has not begun is done here
            batch = future.result()
        else:
            batch = prepare(step, *others)
        if not self._thread.ident:
            self._thread.start()
        following, future = step + max(1, step - self._last.get(key, step)), Future()
        self._tasks.put((future, prepare, (following, *others)))
        self._last[key], self._ahead[key] = step, (following, future)
        return batch

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
        """End the thread. It is a daemon: where the file system hangs, the process still ends."""
        for _, future in self._ahead.values():
            future.cancel()
        self._ahead.clear()
        self._tasks.put(None)
        if self._thread.ident:
            self._thread.join(timeout=2)
