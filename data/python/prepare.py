"""Python sources of this Python installation in GPT-2 tokens: 118 and 176 million on two machines.

    python data/python/prepare.py                           # in data/python: train.bin, val.bin, meta.json
    python data/python/prepare.py --max_tokens 20000000     # a random part of it

It reads the *.py files of the standard library and of site-packages: UTF-8, up to 1 MB, each content once, ordered by
a hash of the content. A second hash holds out 1% of the files. The corpus depends on the installed packages; once
prepared, it stays as it is until --force.
"""

import hashlib
import os
import platform
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from training.errors import command  # first: Ctrl-C during the other imports is then quiet

# isort: split
from tqdm import tqdm

from data import corpus, sources

MAX_BYTES = 1_000_000
VAL_FRACTION = 0.01


def find_sources(folders):
    """The paths of the files to take, in the order of their content's SHA-256."""
    found, left_out = {}, {"copies": 0, f"over {MAX_BYTES:,} bytes": 0, "not UTF-8": 0}
    for path in tqdm(list(_python_files(folders)), unit=" files", desc="hashing", disable=None):
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest in found:
            left_out["copies"] += 1
        elif len(content) > MAX_BYTES:
            left_out[f"over {MAX_BYTES:,} bytes"] += 1
        elif not is_utf8(content):
            left_out["not UTF-8"] += 1
        else:
            found[digest] = path
    print(f"{len(found):,} files; left out: " + ", ".join(f"{n:,} {why}" for why, n in left_out.items()))
    return [found[digest] for digest in sorted(found)]


def _python_files(folders):
    """The *.py files. A site-packages within the standard library is another interpreter's, or in `folders` itself."""
    for folder in folders:
        for parent, children, names in os.walk(folder):
            children[:] = sorted(name for name in children if name not in ("site-packages", "dist-packages"))
            paths = (Path(parent, name) for name in sorted(names) if name.endswith(".py"))
            yield from (path for path in paths if path.is_file() and os.access(path, os.R_OK))


def is_utf8(content):
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def texts():
    folders = dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    for path in tqdm(find_sources(folders), unit=" files", desc="tokenizing", disable=None):
        yield path.read_bytes().decode("utf-8-sig")


def main():
    parser = corpus.arguments(__doc__, __file__)
    parser.add_argument("--max_tokens", type=corpus.positive, help="stop before a file that would exceed this number")
    args = parser.parse_args()
    source = f"standard library and site-packages of Python {platform.python_version()}, max_tokens {args.max_tokens}"
    if not corpus.is_prepared(args, source):
        corpus.write(args, sources.split_by_hash(texts(), VAL_FRACTION), "gpt2", source, args.max_tokens)


if __name__ == "__main__":
    command(main)
