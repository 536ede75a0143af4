"""Where documents come from: files of your own (.txt, .jsonl, .parquet, plain or compressed) and the Hugging Face hub.

files = sources.find_files(args.source)
documents = sources.split_by_hash(sources.read_documents(files, "text"), val_fraction=0.005)
"""

import argparse
import bz2
import gzip
import hashlib
import json
import lzma
import os
import shutil
import ssl
import tempfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from tqdm import tqdm

from training.errors import UserError


def add_arguments(parser, val_fraction, required):
    """What a corpus takes that is, or can be, read from files."""
    parser.add_argument(
        "--source", nargs="+", required=required, metavar="PATH",
        help=".txt (one document a file), .jsonl or .parquet files, plain or .gz, .bz2, .xz, or folders of them",
    )  # fmt: skip
    parser.add_argument("--field", default="text", help="where a record's text is (default: %(default)s)")
    parser.add_argument(
        "--val_fraction", type=_fraction, default=val_fraction,
        help="share of the files' documents to hold out, chosen by a hash of each (default: %(default)s)",
    )  # fmt: skip


def _fraction(text):
    try:
        if 0 < float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, not {text!r}")


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
    first, more = Path(args.source[0]).resolve().name, " and others" if len(args.source) > 1 else ""
    settings = f"field {args.field!r}, val_fraction {args.val_fraction}"
    return f"{name} from {first}{more}: {len(files)} files, {size:,} bytes; {settings}"


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
    except (OSError, ValueError) as error:
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
