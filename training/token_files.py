"""Find and map the token files of a dataset: train.bin and val.bin, or several files of a split. Refuse other files.

    folder = find_folder("shakespeare_char")              # data/shakespeare_char
    files, arrays = open_split(folder, "train", "<u2")    # every *train*.bin there, in the order of their names

A file holds raw little-endian ids, or llm.c's header (256 int32: 20240520, version 1, number of tokens) and uint16 ids.
"""

import difflib
import errno
import glob
import itertools
import os
import re
import shlex
import stat
from pathlib import Path

import numpy as np

from training.errors import UserError
from training.terminal import warn_once

DATA = Path(__file__).resolve().parent.parent / "data"
SHARD, HEADER = 20240520, 1024  # the first number of llm.c's header, and its bytes
OTHER_LLMC = {
    20240326: "a model", 20240327: "a debug state", 20240522: "multiple-choice questions", 20240801: "Llama 3 tokens",
}  # fmt: skip
SIGNATURES = {
    b"\x93NUMPY": "a NumPy .npy file",
    b"PK\x03\x04": "a zip archive (.zip, .npz or .pt)",
    b"\x1f\x8b\x08": "compressed by gzip",
    b"\xfd7zXZ\x00": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive",
    b"\x89PNG\r\n": "a PNG image",
    b"%PDF-": "a PDF",
    b"SQLite format 3\0": "an SQLite database",
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"GGUF": "a GGUF model",
    b"MMIDIDX\x00\x00": "the index of a Megatron dataset",
    b"version https://git-lfs": "a git-lfs pointer, not the file itself (git lfs pull fetches it)",
}


def command(script, *arguments):
    """A command line that runs a script of this project from the working directory."""
    path = Path(os.path.relpath(script)) if script.is_relative_to(Path.cwd()) else script
    return shlex.join(["python", str(path), *map(str, arguments)])


def find_folder(dataset):
    """The folder that `dataset` names: one under data/, or a path (absolute, with ~, or from the working directory)."""
    if not str(dataset):
        raise UserError("dataset = '': name the folder that holds train.bin and val.bin.")
    choices = _choices(dataset)
    is_first = str(dataset).startswith(".") or os.sep not in str(dataset)
    folder = next(filter(os.path.exists, choices), choices[0 if is_first else 1])
    if os.path.isdir(folder):
        here = Path(dataset)
        if folder == DATA / here and os.path.isdir(here) and not os.path.samefile(folder, here):
            warn_once(f"dataset = '{dataset}' is {folder}; for the folder of this name here give --dataset=./{here}.")
        return folder
    if os.path.exists(folder):
        raise UserError(f"dataset = '{dataset}': {folder} is a file; name the folder that holds train.bin and val.bin.")
    if link := next(filter(os.path.islink, choices), None):
        raise UserError(f"dataset = '{dataset}': {_broken_link(link)}; name another folder.")
    near = difflib.get_close_matches(str(dataset), [path.name for path in DATA.glob("*/")], n=1)
    near = f", or use --dataset={near[0]}" if near and near[0] != str(dataset) else ""
    missing = f"{folder / 'train.bin'} is missing, there is no such folder"
    raise UserError(f"{missing}; make it with: {_preparing(folder)}{near}")


def is_folder(dataset):
    """Whether `dataset` is the name or path of a folder."""
    return any(map(os.path.isdir, _choices(dataset)))


def _choices(dataset):
    path = Path(os.path.expanduser(dataset))
    return [path, DATA / path] if str(dataset).startswith(".") else [DATA / path, path]


def _broken_link(path):
    try:
        path.stat()
    except OSError as error:
        why = "leads to itself" if error.errno == errno.ELOOP else "does not exist"
        return f"{path} is a link to {os.readlink(path)}, which {why}"
    return f"{path} is a broken link"


def _preparing(folder):
    """The command that makes the corpus in `folder`."""
    script = DATA / folder.name / "prepare.py"
    if os.path.isfile(script) and folder.name != "text":
        is_default = folder.resolve() == script.parent.resolve()
        return command(script, *([] if is_default else ["--out_dir", folder]))
    text = min(glob.glob(os.path.join(glob.escape(str(folder)), "*.txt")), default="YOUR_TEXT.txt")
    return command(DATA / "text" / "prepare.py", "--source", text, "--out_dir", folder)


def open_split(folder, split, dtype):
    """(the files, the memory map of each) of every *`split`*.bin in `folder`. UserError names what is wrong."""
    files = sorted(path for path in folder.glob(f"*{split}*.bin") if not path.name.startswith("."))
    if not files:
        raise UserError(f"{folder / split}.bin is missing; make it with: {_preparing(folder)}")
    for path in files:
        if "train" in path.name and "val" in path.name:
            raise UserError(f"{path} has both 'train' and 'val' in its name; rename it to have one of them.")
    _check_numbers(files)
    return files, [_map(path, np.dtype(dtype)) for path in files]


def _check_numbers(files):
    """UserError where files are numbered, as in train_000001.bin or train-00001-of-00010.bin, and one is missing."""
    series = {}
    for path in files:
        if found := re.fullmatch(r"(.*?)(\d+)(?:-of-(\d+))?(\D*)", path.name):
            before, number, total, after = found.groups()
            series.setdefault((before, total, after), []).append(number)
    for (before, total, after), names in series.items():
        numbers = [int(number) for number in names]
        first, last = min(numbers), max(numbers)
        if total:
            first, last = (1, int(total)) if int(total) in numbers else (0, int(total) - 1)
        missing = sorted(set(range(first, last + 1)) - set(numbers)) if last - first < 10**6 else []
        if missing and (total or len(missing) <= len(numbers)):  # more: these are no running numbers
            name = f"{before}{missing[0]:0{min(map(len, names))}}{f'-of-{total}' if total else ''}{after}"
            raise UserError(f"{files[0].parent / name} is missing among the shards beside it; put it back.")


def _map(path, dtype):
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
            raise UserError(f"{path} is {kind.get(stat.S_IFMT(status.st_mode), 'a device')}, not a token file.")
        size = status.st_size
        with open(path, "rb") as file:
            head = file.read(1 << 17)
    except OSError as error:
        reason = _broken_link(path) if path.is_symlink() and not path.exists() else f"{path}: {error.strerror}"
        raise UserError(f"{reason}; put the token file there.") from None
    if what := what_is(head, size):
        raise UserError(f"{path} is not a token file, it seems to be {what}; prepare the tokens again.")
    offset = 0
    if head[:4] == SHARD.to_bytes(4, "little"):
        offset, numbers = HEADER, np.frombuffer(head[: len(head[:HEADER]) // 4 * 4], "<i4")
        held = (size - HEADER) // 2
        if size < HEADER or size % 2 or numbers[2] != held:
            says = f"its header says {numbers[2]} tokens" if len(numbers) > 2 else "its header is cut off"
            raise UserError(f"{path} is a shard that was cut short: {says}, it holds {max(held, 0)}; copy it again.")
        if numbers[1] != 1 or dtype.itemsize != 2:
            found = f"version {numbers[1]}" if numbers[1] != 1 else "uint16 tokens and its meta.json says uint32"
            raise UserError(f"{path} is a shard with llm.c's header of {found}; it has to be version 1 with uint16.")
    if size == offset or (size - offset) % dtype.itemsize:
        problem = f"{path} has {size} bytes, which is no file of {dtype.itemsize}-byte tokens; was it cut short?"
        raise UserError(f"{problem} copy it again or prepare it again with: {_preparing(path.parent)}")
    if not offset and dtype.itemsize == 2 and (width := _width(np.frombuffer(head[: len(head) // 8 * 8], "<u2"))) != 2:
        remedy = 'say "dtype": "uint32" in its meta.json' if width == 4 else "write it again as uint16"
        raise UserError(f"{path} seems to hold {width}-byte integers, not uint16 tokens; {remedy}.")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset)


def what_is(head, size):
    """What a file of `size` bytes that begins with `head` seems to be, in words; None where it can be tokens."""
    if known := next((what for signature, what in SIGNATURES.items() if head.startswith(signature)), None):
        return known
    if re.match(rb"BZh[1-9]1AY&SY", head):
        return "compressed by bzip2"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if re.match(rb"\x80[\x02-\x05][\x80-\x95\]}(cKXMJN]", head) and _is_pickle(head):
        return "a Python pickle"
    if head[8:10] == b'{"' and 2 <= int.from_bytes(head[:8], "little") <= size - 8:
        return "a safetensors file"
    if (other := OTHER_LLMC.get(int.from_bytes(head[:4], "little"))) and head[5:8] == b"\0\0\0":
        return f"a file of llm.c that holds {other}"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) and 3 in (head[2:8:2].count(0), head[3:8:2].count(0)):
        return "UTF-16 text"
    return _text(head[:65536], size)


def _is_pickle(head):
    """Whether its first instructions are a pickle's."""
    import pickletools

    try:
        list(itertools.islice(pickletools.genops(head), 17))
    except ValueError:  # at the end of the head, or at what is no instruction
        return head[2:3] in (b"\x95", b"\x8a")
    return True


def _text(head, size):
    """What kind of text `head` is; None where it is none."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4 or len(head) == size:
            return None
        text = head[: error.start].decode("utf-8-sig")
    if len(head) < 8 or re.search(r"[^\t\n\r\f\x1b\x20-\x7e\x85\xa0-\U0010ffff]", text):
        return None
    start = text.lstrip()[:200].lower()
    if start.startswith(("<!doctype html", "<html")):
        return "an HTML page, such as a server sends instead of a file"
    if start.startswith("<"):
        return "XML text, such as a server sends instead of a file"
    if re.match(r'[{\[]\s*["{\[\d}\]-]', start):
        return "JSON text"
    return "text, which data/text/prepare.py makes tokens of"


def _width(tokens):
    """The bytes of an integer in a file whose start, read as uint16, is `tokens`: 2 unless all speaks against it."""
    if len(tokens) < 64 or not tokens.any():
        return 2
    low, high = tokens[0::2], tokens[1::2]
    if high.max() == 0 or (high.max() <= 4 and low.max() >= 256 and (high == 0).mean() > 0.4):
        return 8 if not tokens[2::4].any() and not tokens[3::4].any() else 4
    octets = tokens.view(np.uint8)
    if len(tokens) >= 512 and octets.max() < 128 and octets[1::2].any():
        return 1
    return 2


def guess_why_beyond(tokens, vocab_size):
    """Why ids of a file are beyond the vocabulary, to be put into a sentence; "" where nothing is known."""
    head = np.asarray(tokens[: 1 << 16])
    if head.byteswap().max() < vocab_size:
        return " (it seems to hold big-endian integers)"
    if head.view(np.uint8).max() < vocab_size <= 256:
        return " (it seems to hold 1-byte integers)"
    if head.dtype.itemsize == 4 and head.view("<u2").max() < vocab_size:
        return " (it seems to hold uint16, not the uint32 of its meta.json)"
    return ""
