"""Read documents: from your own files, plain or compressed, or from the Hugging Face hub.

    sources.prepare(sources.arguments(__doc__, __file__, val_fraction=0.005).parse_args(), "text")

A document is a str. A text file of more than 16 MB is a TextFile: its parts, read again in each iteration.
"""

import bz2
import codecs
import contextlib
import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import shutil
import ssl
import tempfile
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data import corpus
from training.errors import UserError
from training.terminal import warn
from training.tokenizer import characters_of, check_spec, parts_of, read_tokenizer_json

BLOCK = 1 << 20  # bytes read at a time
LARGE = 1 << 24  # bytes from which on a text file is not held in memory
RECORD = 1 << 28  # bytes, the most that is read in search of a record's end
ESCAPES = {"r": "\r", "n": "\n", "t": "\t"}
VAL_OF_ONE_TEXT = 0.1  # share held out of a text that is not made of documents
OUTPUT = ("meta.json", "tokenizer.json", ".checked.json")  # what is beside the tokens, and no source


def arguments(description, script, val_fraction, separator=None):
    """The parser of `corpus.arguments` with the options of a corpus that can be read from files."""
    parser = corpus.arguments(description, script)
    parser.add_argument(
        "--source", nargs="+", metavar="PATH",
        help="files, folders, patterns in quotes: .txt, .md, .csv, .json, .jsonl, .parquet; also .gz, .bz2, .xz, .zst",
    )  # fmt: skip
    parser.add_argument("--train", nargs="+", metavar="PATH", help="instead of --source: what to train on; needs --val")
    parser.add_argument("--val", nargs="+", metavar="PATH", help="instead of --source: what to hold out; needs --train")
    parser.add_argument("--field", default="text", help="field of a record with its text (default: %(default)s)")
    parser.add_argument(
        "--separator", default=separator, type=lambda text: re.sub(r"\\[rnt]", lambda c: ESCAPES[c[0][1]], text),
        help="cut .txt and .md files into documents at this text, e.g. '<|endoftext|>' or '\\n\\n'",
    )  # fmt: skip
    parser.add_argument("--skip_bad", action="store_true", help="leave out records that cannot be read, and count them")
    parser.add_argument(
        "--tokenizer", default="gpt2", metavar="NAME",
        help="gpt2, another name that tiktoken knows, char, or a tokenizer.json (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--val_fraction", type=float,
        help=f"share of the documents to hold out, chosen by a hash of each (default: {val_fraction}); from a single "
        f"text, the share at its end (default: {VAL_OF_ONE_TEXT})",
    )  # fmt: skip
    parser.set_defaults(default_fraction=val_fraction)
    return parser


def prepare(args, name, hub=None, articles=lambda texts: texts, by_name=False, max_tokens=None):
    """Prepare the corpus `name` from the files in `args` or, if there are none, from `hub`.

    hub: (its description, a function that gives pairs of "train" or "val" and a text). articles: makes documents of
    the texts in the files. by_name: files with "train" and "valid" in their names, or their folders', are these splits.
    """
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction}: give a number between 0 and 1")
    if args.separator == "":
        raise UserError("--separator '': give the text between two documents, or leave it out")
    if bool(args.train) != bool(args.val) or (args.train and args.source):
        raise UserError("--train and --val go together, and without --source")
    if not (args.source or args.train or hub):
        raise UserError("the following arguments are required: --source PATH, or --train PATH --val PATH")
    fraction, bad, at_end = args.val_fraction or args.default_fraction, Bad(), False

    def read(files):
        return articles(read_documents(files, args.field, args.separator, bad if args.skip_bad else None))

    if args.source:
        files = find_files(args.source)
        splits, found = _splits_by_name(files) if by_name else None, files
        if by_name:
            files = list(itertools.chain(*splits.values())) if splits else [p for p in found if _split_of(p) != "test"]
        if others := sorted({path.name for path in found} - {path.name for path in files}):
            print(f"left out by their names: {', '.join(others[:4])}{', ...' if len(others) > 4 else ''}")
        if not files:
            raise UserError("--source: it holds nothing but files for tests, by their names; name those for training")
        at_end = len(files) == 1 and _kind(files[0]) in TEXTS and not args.separator
        if at_end:
            fraction = args.val_fraction or VAL_OF_ONE_TEXT
        source = describe(name, args, files, fraction)
    elif args.train:
        splits = {"train": find_files(args.train, "--train"), "val": find_files(args.val, "--val")}
        files = [*splits["train"], *splits["val"]]
        if len({path.resolve() for path in files}) < len(files):
            both = {path.resolve() for path in splits["train"]} & {path.resolve() for path in splits["val"]}
            raise UserError(f"{min(both)} is among both --train and --val; name it once, or val/loss is of known text")
        source = describe(name, args, files, None)
    else:
        source, splits, files = hub[0] + _others(args), None, []

    def again():
        bad.count = 0
        return read(files)

    def documents():
        bad.count = 0
        if not args.source and not args.train:
            return hub[1]()
        if splits:
            return ((split, text) for split, paths in splits.items() for text in read(paths))
        return split_at_end(again, fraction) if at_end else split_by_hash(read(files), fraction)

    if splits and args.val_fraction is not None:
        raise UserError("--val_fraction has no effect: the files are given, or named, as train or val; leave it out")
    if corpus.is_prepared(args, source):
        made = (args.out_dir / "meta.json").stat().st_mtime
        if newer := [path for path in files if path.stat().st_mtime > made]:
            warn(f"{newer[0]} was changed after {args.out_dir} was prepared from it; --force prepares it again.")
        return
    spec = _spec(args.tokenizer, documents)
    try:
        try:
            corpus.write(args, documents(), spec, source, max_tokens)
        except corpus.EmptySplit as error:
            if splits:
                raise UserError(f"{str(error).partition(':')[0]}: its files hold no text; name others") from error
            if not args.source or at_end:
                raise
            at_end, fraction = True, args.val_fraction or VAL_OF_ONE_TEXT
            print(f"too few documents to hold out some by a hash: val.bin is the last {fraction:.3g} of the text")
            corpus.write(args, documents(), spec, source, max_tokens)
    except UserError as error:
        if not bad.count:
            raise
        raise UserError(f"{error}; left out: {bad}") from error
    if bad.count:
        print(f"left out: {bad}")


def _spec(tokenizer, documents):
    """The "tokenizer" of the meta.json that --tokenizer stands for; `documents()` are read for their characters."""
    if tokenizer == "char":
        return {"characters": characters_of(text for _, text in documents()) or "\n"}
    if path := _tokenizer_file(tokenizer):
        return read_tokenizer_json(path)
    try:
        check_spec(tokenizer)
    except UserError:
        import tiktoken

        names = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"--tokenizer {tokenizer}: it is char, a tokenizer.json, or one of {names}") from None
    return tokenizer


def _tokenizer_file(tokenizer):
    """The tokenizer.json that --tokenizer names, or None where it is a name."""
    path = Path(tokenizer).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    return path if path.suffix.lower() == ".json" else None


def _split_of(path):
    """ "train", "val" or "test" by the name of a file or, where that has none of them, of its folder; else None."""
    found = re.search("(?<![a-z])(train|valid|test)", path.name.lower())  # neither "constraints" nor "latest"
    splits = {"train": "train", "validation": "val", "valid": "val", "test": "test"}
    return splits.get(found[1] if found else path.parent.name.lower())


def _splits_by_name(files):
    """{"train": files, "val": files} by their names; None where one of them would be empty.

    UserError where two have the same name, but for its ending: they are two versions of one corpus.
    """
    splits = {split: [path for path in files if _split_of(path) == split] for split in ("train", "val")}
    for paths in splits.values():
        first = {_bare(path).stem: path for path in reversed(paths)}
        if second := next((path for path in paths if path not in first.values()), None):
            both = f"{first[_bare(second).stem]} and {second}"
            raise UserError(f"--source: {both} are two versions of one file; name the folder of one of them")
    return splits if all(splits.values()) else None


def find_files(sources, option="--source"):
    """The files of the kinds in READERS, compressed or not, that `sources` (files, folders, patterns) hold, each once.

    The order is that of `sources`, within a folder or pattern that of the sorted paths. Of a folder, hidden files are
    left out, such as those of .git. Raises UserError where nothing is found, and for links that would be left out.
    """
    files = {}
    for source in map(Path, sources):
        source = source.expanduser()
        if glob.has_magic(str(source)) and not source.exists():
            found = [Path(path) for path in sorted(glob.glob(str(source), recursive=True)) if os.path.isfile(path)]
        elif source.is_dir():
            hidden = re.compile(r"(^|/)\.")
            inside = [p for p in sorted(source.rglob("*")) if not hidden.search(p.relative_to(source).as_posix())]
            if link := next((path for path in inside if path.is_symlink() and not path.is_file()), None):
                problem = f"{link} is a link to a folder or to nothing, which is not followed"
                raise UserError(f"{option} {source}: {problem}; name what it leads to, or remove it")
            found = [path for path in inside if path.is_file() and path.name not in OUTPUT]
        else:
            found = [source]
        readable = [path for path in found if _kind(path) in READERS]
        if not readable or (found == [source] and not source.exists()):
            what = f"no {', '.join(READERS)} (or compressed: {', '.join(COMPRESSED)})"
            raise UserError(f"{option} {source}: {what if source.exists() else 'no such file or folder'}")
        if others := sorted({path.suffix or path.name for path in set(found) - set(readable)} - {".bin"}):
            print(f"{source}: files of other kinds are not read: {', '.join(others[:8])}")
        for path in readable:
            files.setdefault(path.resolve(), path)
    return list(files.values())


def describe(name, args, files, fraction):
    """The `source` entry of a corpus that is read from `files`. Other files or settings give another text."""
    size, named = sum(path.stat().st_size for path in files), args.source or args.train
    first, more = Path(named[0]).resolve().name, " and others" if len(named) > 1 else ""
    split = "train and val given" if fraction is None else f"val_fraction {fraction}"
    settings = f"field {args.field!r}, {split}{_others(args)}"
    return f"{name} from {first}{more}: {len(files)} files, {size:,} bytes; {settings}"


def _others(args):
    """The settings of a corpus that are not the default ones."""
    others = f", separator {args.separator!r}" if args.separator else ""
    others += ", bad records left out" if args.skip_bad else ""
    if args.tokenizer != "gpt2":
        path = _tokenizer_file(args.tokenizer)
        others += f", tokenizer {read_tokenizer_json(path)['sha256'] if path else args.tokenizer}"
    return others


@dataclass
class Bad:
    """Records that could not be read."""

    count: int = 0
    first: str = ""

    def add(self, error):
        self.count, self.first = self.count + 1, self.first or str(error)

    def __str__(self):
        return f"{self.count:,} bad records, the first: {self.first}"


@dataclass
class TextFile:
    """The text of a file, part by part. Raises UserError that names the line which is not UTF-8."""

    path: Path

    def __iter__(self):
        decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
        with _open(self.path) as (_, stream), tqdm(desc=self.path.name, unit="B", unit_scale=True, disable=None) as bar:
            block = True
            while block:
                try:
                    block = stream.read(BLOCK)
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise _not_utf8(self.path, line + error.object.count(b"\n", 0, error.start)) from error
                except DAMAGE as error:
                    raise _damaged(self.path, f"line {line}", error) from error
                if null := _null(self.path, text, line):
                    raise null
                line += text.count("\n")
                bar.update(len(block))
                yield text

    def problem(self):
        """The UserError that reading it would raise, or None."""
        try:
            for _ in self:
                pass
        except UserError as error:
            return error


def read_documents(files, field, separator=None, bad=None):
    """Yield every document in `files`, in their order.

    Raises UserError that names the file, and the line or row, of what cannot be read; with `bad` it is counted there.
    """
    with tqdm(total=sum(path.stat().st_size for path in files), unit="B", unit_scale=True, disable=None) as bar:
        for path in files:
            done = 0
            for text, position in _read_file(path, field, separator):
                if bad is not None and isinstance(text, TextFile):
                    text = text.problem() or text
                if not isinstance(text, UserError):
                    yield text
                elif bad is None:
                    raise text
                else:
                    bad.add(text)
                bar.update(position - done)
                done = position


def _read_file(path, field, separator):
    """Yield (a text, or the UserError of a bad record, how far the file is read)."""
    number = 0
    try:
        with _open(path) as (file, stream):
            for text in READERS[_kind(path)](path, stream, field, separator):
                number += not isinstance(text, UserError)
                yield text, file.tell()
    except DAMAGE as error:
        yield _damaged(path, f"document {number}", error), path.stat().st_size


def split_by_hash(documents, val_fraction):
    """Pair each text with "train" or "val", by the text alone: the same text is always on the same side."""
    for text in documents:
        digest = hashlib.blake2b(digest_size=8)
        for part in parts_of(text):
            digest.update(part.encode("utf-8", "surrogatepass"))
        yield ("val" if int.from_bytes(digest.digest(), "big") < val_fraction * 2**64 else "train"), text


def split_at_end(read, val_fraction):
    """Pair the texts of `read()` with "train" and the last `val_fraction` of their characters with "val".

    The text at the border is cut there, at the end of a line where one is near. They are read twice, to count first.
    """
    count = total = 0  # without the blanks at the end
    for text in read():
        for part in parts_of(text):
            total = count + len(part.rstrip()) if part.strip() else total
            count += len(part)
    left = total - max(1, round(total * val_fraction))

    def head(parts, rest):
        nonlocal left
        for part in parts:
            if len(part) > left:
                cut = part.rfind("\n", max(0, left - 4096), left) + 1 or left
                left = 0
                rest.append(part[cut:])
                yield part[:cut]
                return
            left -= len(part)
            yield part

    for text in read():
        parts, rest = parts_of(text), []
        if left:
            yield "train", head(parts, rest)
        yield "val", itertools.chain(rest, parts)


def load_from_hub(name, config=None):
    """`datasets.load_dataset`. It raises UserError soon: without the hub it would retry for minutes."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=10).close()
    except (OSError, ValueError) as error:
        if not isinstance(error, urllib.error.HTTPError) and not isinstance(getattr(error, "reason", 0), ssl.SSLError):
            os.environ["HF_HUB_OFFLINE"] = "1"  # a copy in the local cache will do
    import datasets

    try:
        return datasets.load_dataset(name, config)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        remedy = "get its files another way and name them with --source"
        raise UserError(f"{name} cannot be had from {endpoint} ({reason}): {remedy}") from error


def hub_splits(dataset, val="validation", articles=lambda texts: texts):
    """Pairs of "train" or "val" and a text of a dataset from the hub. val: what it calls its held-out split."""
    for split, part in (("train", dataset["train"]), ("val", dataset[val])):
        yield from ((split, text) for text in articles(texts_of(part, split)))


def texts_of(part, name):
    """Yield the texts of a split from the hub, with a bar that says `name`."""
    for batch in tqdm(part.iter(batch_size=1000), total=-(-len(part) // 1000), desc=name, disable=None):
        yield from batch["text"]


def _bare(path):
    """The file's name without the suffix of a compression."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name)


def _kind(path):
    """Its suffix without that of a compression; WikiText's own names (wiki.train.tokens, wiki.train.raw) are texts."""
    path = _bare(path)
    return ".txt" if re.fullmatch(r"wiki\.\w+\.(tokens|raw)", path.name.lower()) else path.suffix.lower()


@contextlib.contextmanager
def _open(path):
    """The file, and the stream of its unpacked bytes."""
    with open(path, "rb") as file, COMPRESSED.get(path.suffix.lower(), lambda file: file)(file) as stream:
        yield file, stream


def _open_zst(file):
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), BLOCK)


# A reader yields texts, and a UserError for each record that cannot be read.


def _read_text(path, stream, field, separator):
    if separator:
        yield from _read_separated(path, stream, separator.encode())
        return
    is_small = path.suffix.lower() not in COMPRESSED and path.stat().st_size < LARGE
    content = stream.read() if is_small else stream.read(LARGE)  # which first allocates as much: slow for small files
    if len(content) >= LARGE:
        yield TextFile(path)
        return
    try:
        text = content.decode("utf-8-sig")
        yield _null(path, text) or text
    except UnicodeDecodeError as error:
        yield _not_utf8(path, content.count(b"\n", 0, error.start) + 1)


def _damaged(path, place, error):
    return UserError(f"{path} cannot be read beyond {place} ({error}); is it damaged or incomplete?")


def _null(path, text, line=1):
    """The UserError for a text with NUL characters: UTF-16 without its mark, or the end of a file that is not whole."""
    if (at := text.find("\0")) >= 0:
        line += text.count("\n", 0, at)
        return UserError(f"{path}, line {line}: it holds the character NUL, as UTF-16 and cut files do; repair it")


def _not_utf8(path, line):
    return UserError(f"{path}, line {line}: not UTF-8; convert the file or leave it out")


def _read_separated(path, stream, separator):
    """The parts of a text file between separators, without the line breaks around them."""
    buffer, searched, line, block = bytearray(), 0, 1, True
    while block:
        block = stream.read(BLOCK)
        buffer += block
        while (end := buffer.find(separator, searched)) >= 0 or (not block and buffer):
            part = bytes(buffer[: end if end >= 0 else len(buffer)])
            try:
                text = part.decode("utf-8-sig" if line == 1 else "utf-8")
                wrong, windows = _null(path, text, line), separator.replace(b"\n", b"\r\n")
                if end < 0 and line == 1 and windows in part:
                    wrong = UserError(f"{path}: its lines end with \\r\\n; give --separator {windows.decode()!r}")
                yield wrong or text.strip("\r\n")
            except UnicodeDecodeError as error:
                yield _not_utf8(path, line + part.count(b"\n", 0, error.start))
            line, searched = line + part.count(b"\n") + separator.count(b"\n"), 0
            del buffer[: len(part) + len(separator)]
        searched = max(0, len(buffer) - len(separator) + 1)
        if len(buffer) > RECORD:
            size = f"{len(buffer):,} bytes from here"
            raise UserError(f"{path}, line {line}: no separator {separator.decode()!r} in {size}")


def _lines(path, stream):
    """The lines of a stream. A few kilobytes can unpack to a line that no memory holds."""
    number = 1
    while line := stream.readline(RECORD):
        if len(line) == RECORD:
            raise UserError(f"{path}, line {number}: it has {RECORD:,} characters or more; break it into lines")
        yield line
        number += 1


def _read_jsonl(path, stream, field, separator):
    for number, line in enumerate(_lines(path, stream), 1):
        if not line.isspace():
            try:
                yield _text_in(json.loads(line), field, path, number)
            except (ValueError, RecursionError) as error:
                yield _not_json(path, number, error)


def _not_json(path, line, error):
    return UserError(f"{path}, line {line}: not JSON ({error}); repair or remove the line")


def _text_in(record, field, path, line):
    text = record.get(field) if isinstance(record, dict) else record
    if isinstance(text, str):
        return text
    fields = f"; its fields are {', '.join(record):.200}" if isinstance(record, dict) else ""
    remedy = "name another one with --field, or leave such records out with --skip_bad"
    return UserError(f"{path}, line {line}: no text in the field {field!r}{fields}; {remedy}")


def _read_json(path, stream, field, separator):
    """A list of records, or records one after another, which many .json files are."""
    text, decoder = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape"), json.JSONDecoder()
    buffer, at, line, is_list, is_open, is_first = "", 0, 1, False, True, True

    def more():
        nonlocal buffer, at
        block = text.read(max(BLOCK, len(buffer) - at))
        buffer, at = buffer[at:] + block, 0
        return block

    while True:
        start = re.compile(r"[\s,]*" if is_list else r"\s*").match(buffer, at).end()
        line, at = line + buffer.count("\n", at, start), start
        if at == len(buffer):
            if more():
                continue
            break
        if is_first and buffer[at] == "[":
            is_list, is_first, at = True, False, at + 1
            continue
        is_first = False
        if buffer[at] == "]" and is_list and is_open:
            is_open, at = False, at + 1
            continue
        try:
            if not is_open:
                raise json.JSONDecodeError("text after the end of the list", buffer, at)
            record, end = decoder.raw_decode(buffer, at)
            found = _text_in(record, field, path, line)
            if isinstance(found, str) and re.search("[\udc80-\udcff]", found):
                found = _not_utf8(path, line)
        except (ValueError, RecursionError) as error:
            cut_off = getattr(error, "pos", 0) > len(buffer) - 16 or "Unterminated" in str(error)
            if cut_off and len(buffer) - at < RECORD and more():
                continue
            found = _not_json(path, line, error)
            end = buffer.find("\n", at) + 1 or len(buffer)  # a new record may begin there
        yield found
        line, at = line + buffer.count("\n", at, end), end
    if is_list and is_open:
        yield _not_json(path, line, "the list has no end")


def _read_csv(path, stream, field, separator):
    """A row of column names, then a document a row."""
    csv.field_size_limit(RECORD)
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(_lines(path, text), strict=True)
    try:
        names = next(rows, [])
    except csv.Error as error:
        raise UserError(f"{path}, line 1: not CSV ({error}); repair it or leave it out") from None
    if field not in names:
        raise UserError(f"{path}: no column {field!r}; name one of these with --field: {', '.join(names)}")
    if names.count(field) > 1:
        raise UserError(f"{path}: several columns are named {field!r}; rename all but one")
    column, first = names.index(field), 1
    while True:
        first = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield UserError(f"{path}, line {first}: not CSV ({error}); repair or remove the row")
            continue
        if row is None:
            return
        if len(row) not in (0, len(names)):
            yield UserError(f"{path}, line {first}: {len(row)} columns, not the {len(names)} of the first line")
        elif row and re.search("[\udc80-\udcff]", row[column]):
            yield _not_utf8(path, first)
        elif row:
            yield row[column]


def _read_parquet(path, stream, field, separator):
    import pyarrow.parquet

    row = 0
    with tempfile.TemporaryFile() as unpacked:
        is_packed = path.suffix.lower() in COMPRESSED
        if is_packed:  # parquet is read from its end
            shutil.copyfileobj(stream, unpacked, BLOCK)
        try:
            parquet = pyarrow.parquet.ParquetFile(unpacked if is_packed else stream)
            if field not in parquet.schema_arrow.names:
                names = ", ".join(parquet.schema_arrow.names)
                raise UserError(f"{path}: no column {field!r}; name one of these with --field: {names}")
            for batch in parquet.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        text = error
                    wrong = f"{path}, row {row}: {text!r:.40} in column {field!r} is no text"
                    yield text if isinstance(text, str) else UserError(wrong)
        except pyarrow.ArrowException as error:
            raise UserError(f"{path} cannot be read beyond row {row} ({error}); is it damaged?") from error


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
TEXTS = (".txt", ".md")
READERS = {
    **dict.fromkeys(TEXTS, _read_text),
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
