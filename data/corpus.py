"""From documents to train.bin, val.bin and meta.json (shared/DESIGN.md, section 2): what all data/*/prepare.py share.

    args = corpus.arguments(__doc__, __file__).parse_args()
    if not corpus.is_prepared(args, source):
        corpus.write(args, documents, "gpt2", source)    # documents: pairs like ("train", "To be, or not to be")

Nothing here holds more than a few megabytes of text per process, or one document where that is larger.
"""

import argparse
import bz2
import fcntl
import gzip
import hashlib
import json
import lzma
import multiprocessing
import os
import shutil
import signal
import ssl
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from training.errors import UserError
from training.tokenizer import get_tokenizer

TASK = 1 << 20  # characters that a process tokenizes at a time: enough to hide the transfer, small enough to share out


# --- Command line -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help shows what there is)")


def arguments(description, script):
    """The parser with what every prepare.py takes. `script` is its file, whose folder is the default --out_dir."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, default=Path(script).resolve().parent, help="default: the script's")
    parser.add_argument("--num_proc", type=positive, default=cores, help="tokenizing processes (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="prepare again, replacing what is there")
    return parser


def add_source_arguments(parser, val_fraction, required):
    """What a corpus takes that is, or can be, read from files."""
    parser.add_argument(
        "--source", nargs="+", required=required, metavar="PATH",
        help=".txt (one document a file), .jsonl or .parquet files, plain or .gz, .bz2, .xz, or folders of them",
    )  # fmt: skip
    parser.add_argument("--field", default="text", help="where a record's text is (default: %(default)s)")
    parser.add_argument(
        "--val_fraction", type=fraction, default=val_fraction,
        help="share of the files' documents to hold out, chosen by a hash of each (default: %(default)s)",
    )  # fmt: skip


def positive(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def fraction(text):
    try:
        if 0 < float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, not {text!r}")


# --- Reading ----------------------------------------------------------------------------------------------------------


def find_files(sources):
    """The .txt, .jsonl and .parquet files, compressed or not, that `sources` (files and folders) hold, each once.

    The order is that of `sources`, within a folder that of the sorted paths. Raises UserError where nothing is found.
    """
    files = {}
    for source in map(Path, sources):
        found = sorted(filter(Path.is_file, source.rglob("*"))) if source.is_dir() else [source]
        found = [path for path in found if _kind(path) in READERS]
        if not source.exists() or not found:
            what = "no such file or folder" if not source.exists() else "no .txt, .jsonl or .parquet (.gz, .bz2, .xz)"
            raise UserError(f"--source {source}: {what}")
        for path in found:
            files.setdefault(path.resolve(), path)
    return list(files.values())


def describe(name, args, files):
    """The `source` of a corpus that is read from `files`: tells another set of files or other settings apart."""
    size = sum(path.stat().st_size for path in files)
    folders = ", ".join(Path(source).resolve().name for source in args.source)
    settings = f"field {args.field!r}, val_fraction {args.val_fraction}"
    return f"{name} from {folders}: {len(files)} files, {size:,} bytes; {settings}"


def read_documents(files, field):
    """Yield the text of every document in `files`, in their order.

    Raises UserError that names the file, and the line or row, of what cannot be read.
    """
    with tqdm(total=sum(path.stat().st_size for path in files), unit="B", unit_scale=True, disable=None) as bar:
        for path in files:
            number, done, opener = 0, 0, COMPRESSED.get(path.suffix, lambda file: file)
            try:
                with open(path, "rb") as file, opener(file) as stream:
                    for number, text in enumerate(READERS[_kind(path)](path, stream, field), 1):  # noqa: B007
                        yield text
                        position = file.tell()
                        bar.update(position - done)
                        done = position
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise UserError(
                    f"{path} cannot be read beyond document {number} ({error}); is it damaged or incomplete?"
                ) from error


def split_by_hash(documents, val_fraction):
    """Pair each text with "train" or "val", by the text alone: the same text is always on the same side."""
    for text in documents:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        yield ("val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"), text


def load_from_hub(name, config=None):
    """`datasets.load_dataset`; where that fails, one sentence, and soon: without the hub it would retry for minutes."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=10).close()
    except OSError as error:
        if not isinstance(error, urllib.error.HTTPError) and not isinstance(getattr(error, "reason", 0), ssl.SSLError):
            os.environ["HF_HUB_OFFLINE"] = "1"  # a copy in the local cache will do
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name} needs `pip install datasets`, or its files, named with --source") from error
    try:
        return datasets.load_dataset(name, config)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{name} cannot be had from {endpoint} ({reason}): get its files another way and name them with --source"
        ) from error


def _kind(path):
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _read_txt(path, stream, field):
    content = stream.read()
    try:
        yield content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8; convert the file or leave it out") from error


def _read_jsonl(path, stream, field):
    for number, line in enumerate(stream, 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); repair or remove the line") from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise UserError(f"{path}, line {number}: no text in the field {field!r}; name another one with --field")
        yield record[field]


def _read_parquet(path, stream, field):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    row = 0
    with tempfile.TemporaryFile() as unpacked:
        if path.suffix in COMPRESSED:  # parquet is read from its end
            shutil.copyfileobj(stream, unpacked, 1 << 20)
        try:
            parquet = pyarrow.parquet.ParquetFile(unpacked if path.suffix in COMPRESSED else stream)
            if field not in parquet.schema_arrow.names:
                names = ", ".join(parquet.schema_arrow.names)
                raise UserError(f"{path}: no column {field!r}; name one of these with --field: {names}")
            for batch in parquet.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    row, text = row + 1, value.as_py()
                    if not isinstance(text, str):
                        raise UserError(f"{path}, row {row}: {text!r:.40} in column {field!r} is no text")
                    yield text
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read beyond row {row} ({error}); is it damaged?") from error


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


# --- Writing ----------------------------------------------------------------------------------------------------------


def is_prepared(args, source):
    """Whether `args.out_dir` already holds the corpus `source`, undamaged. Raises UserError if it holds another one."""
    folder, there = args.out_dir, [name for name in ("train.bin", "val.bin") if (args.out_dir / name).exists()]
    remedy = "choose another --out_dir, or replace it with --force"
    if args.force or not (there or (folder / "meta.json").exists()):
        return False
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        found, hashes = meta["source"], {"train.bin": meta["train_sha256"], "val.bin": meta["val_sha256"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds data without a meta.json that says where it is from; {remedy}") from error
    if found != source:
        raise UserError(f"{folder} holds another corpus ({found}) than the one asked for ({source}); {remedy}")
    for name, sha256 in hashes.items():
        if name not in there or _sha256(folder / name) != sha256:
            print(f"{folder / name} is missing or damaged (not the SHA-256 of meta.json): preparing it again")
            return False
    counts = f"{meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens"
    print(f"{folder} is already prepared and intact ({counts}); --force prepares it again")
    return True


def write(args, documents, tokenizer, source, max_tokens=None):
    """Tokenize `documents`, pairs of "train" or "val" and a text, into `args.out_dir`.

    The bytes do not depend on `args.num_proc`. `tokenizer` is the string or dict for meta.json. With `max_tokens`, it
    ends before the document that would exceed them. Until the three files are complete none of them is there.
    """
    started, spec, tokenizer = time.monotonic(), tokenizer, get_tokenizer(tokenizer)
    bins, count, document, total = {}, Counter(), [], 0
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            bins[split] = _Bin(args.out_dir / f"{split}.bin")
        for split, tokens, is_end in _tokenized(documents, tokenizer, args.num_proc):
            document.append(tokens)
            if is_end:
                total += sum(map(len, document)) // 2
                if max_tokens and total > max_tokens:
                    break
                bins[split].write(document)
                count[split] += 1
                document = []
        for split in bins:
            if not bins[split].tokens:
                raise UserError(
                    f"of {count.total()} documents none came into {split}.bin: give more documents"
                    f"{', or a larger --val_fraction' if hasattr(args, 'val_fraction') and split == 'val' else ''}"
                )
        meta = {"vocab_size": tokenizer.vocab_size, "tokenizer": spec, "dtype": "uint16", "source": source}
        meta |= {f"{split}_tokens": bins[split].tokens for split in bins}
        meta |= {f"{split}_sha256": bins[split].sha256.hexdigest() for split in bins}
        _publish(args.out_dir, bins, meta)
    except OSError as error:
        raise UserError(f"the corpus cannot be written to {args.out_dir}: {error}") from error
    finally:
        for file in bins.values():
            file.close()
    seconds = time.monotonic() - started
    for split in bins:
        print(f"{bins[split].path}: {bins[split].tokens:,} tokens, {count[split]:,} documents")
    print(f"vocabulary of {tokenizer.vocab_size:,}; took {seconds:.1f} s")


class _Bin:
    """A .bin in the making: a temporary file that only one process at a time may write."""

    def __init__(self, path):
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")
        self.tokens, self.sha256, self.is_mine = 0, hashlib.sha256(), False
        self.file = open(self.temporary, "ab")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another prepare.py is writing {path}: wait for it or choose another --out_dir") from error
        self.is_mine = True
        self.file.truncate(0)  # what a killed run left

    def write(self, parts):
        for part in parts:
            self.file.write(part)
            self.sha256.update(part)
            self.tokens += len(part) // 2

    def close(self):
        self.file.close()
        if self.is_mine:
            self.temporary.unlink(missing_ok=True)


def _publish(folder, bins, meta):
    """Put the finished files in place. Old ones go first: a new one beside an old one would look like a corpus."""
    temporary = folder / "meta.json.tmp"
    temporary.write_text(json.dumps(meta, indent=1) + "\n")
    for file in bins.values():
        file.file.flush()
        os.fsync(file.file.fileno())
    for name in ("val.bin", "train.bin", "meta.json"):
        (folder / name).unlink(missing_ok=True)
    for file in bins.values():
        os.replace(file.temporary, file.path)
        file.is_mine = False
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, folder / "meta.json")
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def _tokenized(documents, tokenizer, num_proc):
    """Yield (split, bytes of uint16 ids, is it a document's end) in the order of `documents`."""
    for task, (tokens, lengths) in _in_parallel(_tasks(documents, tokenizer), tokenizer, num_proc):
        start = 0
        for (split, piece), length in zip(task, lengths, strict=True):
            yield split, tokens[start : start + length], piece is None
            start += length


def _tasks(documents, tokenizer):
    """Group the pieces of documents, blank ones aside, into lists of (split, piece); (split, None) ends a document."""
    task, size = [], 0
    for split, text in documents:
        if not text or text.isspace():
            continue
        for piece in tokenizer.pieces(text):
            task.append((split, piece))
            size += len(piece) + 1
            if size >= TASK:
                yield task
                task, size = [], 0
        task.append((split, None))
    yield task


def _encode(tokenizer, task):
    """The ids of a task's pieces, as the bytes of one little-endian uint16 array, and how many bytes each has."""
    end = np.array([] if tokenizer.eot is None else [tokenizer.eot])
    arrays = [end if piece is None else tokenizer.encode_array(piece) for _, piece in task]
    parts = [array.astype("<u2").tobytes() for array in arrays]
    return b"".join(parts), [len(part) for part in parts]


def _in_parallel(tasks, tokenizer, num_proc):
    """Yield (task, its tokens) in order; at most 2 * num_proc tasks are in memory."""
    if num_proc == 1:
        yield from ((task, _encode(tokenizer, task)) for task in tasks)
        return
    pending = deque()
    # Spawned, not forked: a fork beside the threads of pyarrow or datasets can hang.
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        for task in tasks:
            pending.append((task, pool.submit(_encode, tokenizer, task)))
            if len(pending) == 2 * num_proc:
                task, future = pending.popleft()
                yield task, future.result()
        while pending:
            task, future = pending.popleft()
            yield task, future.result()
    except BrokenProcessPool as error:
        raise UserError("a tokenizing process was killed; if memory ran out, use a smaller --num_proc") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker():
    """Leave Ctrl-C to the parent, and end with it even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
