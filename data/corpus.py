"""Write train.bin, val.bin and meta.json from documents. All data/*/prepare.py use it.

    args = corpus.arguments(__doc__, __file__).parse_args()
    if not corpus.is_prepared(args, source):
        corpus.write(args, documents, "gpt2", source)    # documents: pairs like ("train", "To be, or not to be")

The text of a document is a str or, if it is long, an iterable of its parts. Memory holds a few megabytes of text for
each thread, or one str if that is larger.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from training.errors import Parser, UserError
from training.foreign import is_plain_name, read_json, sha256_of_file
from training.lock import lock_file
from training.tokenizer import get_tokenizer, identity, parts_of
from training.tracking import write_atomically

TASK = 1 << 18  # characters that a thread tokenizes at a time: enough to hide the hand-over, small enough to share out


class EmptySplit(UserError):
    """All documents fell into one split, so train.bin or val.bin would be empty."""


def arguments(description, script):
    """The parser with the options of every prepare.py. The folder of its file `script` is the default --out_dir."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = Parser(description=description)
    parser.add_argument("--out_dir", type=expanded, default=Path(script).resolve().parent, help="default: %(default)s")
    parser.add_argument("--num_proc", type=positive, default=cores, help="tokenizing threads (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="prepare again, replacing what is there")
    return parser


def expanded(text):
    return Path(text).expanduser()


def positive(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def is_prepared(args, source):
    """Whether `args.out_dir` already holds the corpus `source`, undamaged. Raises UserError if it holds another one."""
    folder, remedy = args.out_dir, "choose another --out_dir, or replace it with --force"
    if args.force or not any((folder / name).exists() for name in ("train.bin", "val.bin", "meta.json")):
        return False
    try:
        meta = read_json(folder / "meta.json", 1 << 26)
        found, hashes = meta["source"], {"train.bin": meta["train_sha256"], "val.bin": meta["val_sha256"]}
        if isinstance(meta["tokenizer"], dict) and "file" in meta["tokenizer"]:
            hashes[meta["tokenizer"]["file"]] = meta["tokenizer"]["sha256"]
        counts = f"{meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens"
    except (OSError, UserError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} holds data without a meta.json that says where it is from; {remedy}") from error
    if found != source:
        raise UserError(f"{folder} holds another corpus ({found}) than the one asked for ({source}); {remedy}")
    for name, sha256 in hashes.items():
        if not is_plain_name(name) or not os.path.isfile(folder / name) or sha256_of_file(folder / name) != sha256:
            print(f"{folder / name} is missing or damaged (not the SHA-256 of meta.json): preparing it again")
            return False
    print(f"{folder} is already prepared and intact ({counts}); --force prepares it again")
    return True


def write(args, documents, tokenizer, source, max_tokens=None):
    """Tokenize `documents`, pairs of "train" or "val" and a text, into `args.out_dir`.

    The bytes do not depend on `args.num_proc`. `tokenizer` is the string or dict for meta.json. With `max_tokens`, it
    ends before the document that would exceed them. The files appear only when all of them are complete.
    Raises EmptySplit if all documents fell into one split.
    """
    started, spec, tokenizer = time.monotonic(), tokenizer, get_tokenizer(tokenizer)
    bins, count, document, total = {}, Counter(), [], 0
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            bins[split] = _Bin(args.out_dir / f"{split}.bin", tokenizer.dtype)
        for split, tokens, is_end in _tokenized(documents, tokenizer, args.num_proc):
            document.append(tokens)
            total += len(tokens) // tokenizer.dtype.itemsize
            if is_end or not max_tokens:
                if max_tokens and total > max_tokens:
                    break
                bins[split].write(document)
                count[split] += is_end
                document = []
        for split in bins:
            if not bins[split].tokens:
                if not total:
                    raise UserError("the sources hold no text; name others")
                none = f"none of the {count.total()} documents came into {split}.bin"
                kind = EmptySplit if count.total() else UserError
                raise kind(f"{none}: more of them are needed, or another --val_fraction")
        dtype = tokenizer.dtype.name
        meta = {"vocab_size": tokenizer.vocab_size, "tokenizer": identity(spec), "dtype": dtype, "source": source}
        meta |= {f"{split}_tokens": bins[split].tokens for split in bins}
        meta |= {f"{split}_sha256": bins[split].sha256.hexdigest() for split in bins}
        files = {"tokenizer.json": spec["json"]} if isinstance(spec, dict) and "json" in spec else {}
        _publish(args.out_dir, bins, files | {"meta.json": json.dumps(meta, indent=1) + "\n"})
    except OSError as error:
        raise UserError(f"the corpus cannot be written to {args.out_dir}: {error}") from error
    finally:
        for file in bins.values():
            file.discard()
    seconds = time.monotonic() - started
    for split in bins:
        print(f"{bins[split].path}: {bins[split].tokens:,} tokens, {count[split]:,} documents")
    print(f"vocabulary of {tokenizer.vocab_size:,}; took {seconds:.1f} s")


class _Bin:
    """A .bin in the making: a temporary file that only one process at a time may write."""

    def __init__(self, path, dtype):
        self.path, self.temporary, self._itemsize = path, path.with_name(path.name + ".tmp"), dtype.itemsize
        self.tokens, self.sha256, self.is_mine = 0, hashlib.sha256(), False
        self.file = open(self.temporary, "ab")
        taken = f"another prepare.py is writing {path}: wait for it or choose another --out_dir"
        try:
            lock_file(self.file, taken, f"let no other prepare.py write {path}")
        except OSError:
            self.temporary.unlink()
            raise
        self.is_mine = True
        self.file.truncate(0)  # what a killed run left

    def write(self, parts):
        for part in parts:
            self.file.write(part)
            self.sha256.update(part)
            self.tokens += len(part) // self._itemsize

    def discard(self):
        with contextlib.suppress(OSError):  # a full disk, which `write` has reported
            self.file.close()
        if self.is_mine:
            self.temporary.unlink(missing_ok=True)


def _publish(folder, bins, texts):
    """Put the finished files in place. Old ones go first: a new one beside an old one would look like a corpus."""
    for file in bins.values():
        file.file.flush()
        os.fsync(file.file.fileno())
    for name in ("val.bin", "train.bin", "meta.json"):
        (folder / name).unlink(missing_ok=True)
    for name, text in texts.items():  # first: tokens without a meta.json would be taken for GPT-2's
        write_atomically(folder / name, text)
    for file in bins.values():
        os.replace(file.temporary, file.path)
        file.is_mine = False


def _tokenized(documents, tokenizer, num_proc):
    """Yield (split, bytes of little-endian ids, is it a document's end) in the order of `documents`."""
    for task, parts in _in_parallel(_tasks(documents, tokenizer), tokenizer, num_proc):
        yield from ((split, part, piece is None) for (split, piece), part in zip(task, parts, strict=True))


def _tasks(documents, tokenizer):
    """Group the pieces of documents, blank ones aside, into lists of (split, piece); (split, None) ends a document."""
    task, size = [], 0
    for split, text in documents:
        parts, blank, is_blank = parts_of(text), [], True
        while is_blank and (part := next(parts, None)) is not None:
            blank.append(part)
            is_blank = not part or part.isspace()
        if is_blank:
            continue
        for piece in tokenizer.pieces(itertools.chain(blank, parts)):
            task.append((split, piece))
            size += len(piece) + 1
            if size >= TASK:
                yield task
                task, size = [], 0
        task.append((split, None))
    yield task


def _encode(tokenizer, task):
    """The ids of each of a task's pieces, as little-endian bytes."""
    end, dtype = np.array([] if tokenizer.eot is None else [tokenizer.eot]), tokenizer.dtype.newbyteorder("<")
    arrays = [end if piece is None else tokenizer.encode_array(piece) for _, piece in task]
    return [array.astype(dtype).tobytes() for array in arrays]


def _in_parallel(tasks, tokenizer, num_proc):
    """Yield (task, its tokens) in order; at most 2 * num_proc tasks are in memory."""
    pool, pending = ThreadPoolExecutor(num_proc), deque()  # the tokenizers work without the interpreter's lock
    try:
        for task in tasks:
            pending.append((task, pool.submit(_encode, tokenizer, task)))
            if len(pending) == 2 * num_proc:
                task, future = pending.popleft()
                yield task, future.result()
        yield from ((task, future.result()) for task, future in pending)
    finally:
        pool.shutdown(cancel_futures=True)
