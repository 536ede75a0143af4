"""Convert a nanoGPT meta.pkl to meta.json, so that its train.bin and val.bin train here with their own vocabulary.

    python data/convert_meta.py data/NAME

The pickle may hold only plain containers, strings and numbers; nothing in it is run. If every id is one character, the
meta.json names the characters. Otherwise it holds only the number of ids, and samples are printed as ids.
"""

import io
import json
import os
import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.corpus import expanded
from training.data import check_split, open_dataset
from training.errors import Parser, UserError, command
from training.foreign import read_bytes
from training.tracking import write_atomically

LARGEST = 1 << 26  # bytes of a meta.pkl


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, strings and numbers; refuses every name of a class or function, as code would need."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to another file")


def read_plain(path):
    """The content of a pickle of plain containers, strings and numbers. UserError for any other."""
    try:
        return _PlainUnpickler(io.BytesIO(read_bytes(path, LARGEST))).load()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name the folder of a meta.pkl") from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        problem = f"is damaged, or holds more than containers, strings and numbers ({error})"
        raise UserError(f"{path} {problem}; write a meta.json by hand") from None


def convert(found, path):
    """The vocab_size and tokenizer of a meta.json that say what nanoGPT's dictionary `found` says."""
    size, names = (found.get("vocab_size"), found.get("itos")) if isinstance(found, dict) else (None, None)
    names = dict(enumerate(names)) if isinstance(names, list) else names
    size = len(names) if size is None and isinstance(names, dict) else size
    if type(size) is not int or not 1 <= size < 2**31:
        raise UserError(f"{path} says no vocab_size; write a meta.json by hand")
    tokenizer = None
    if isinstance(names, dict) and all(isinstance(name, str) and len(name) == 1 for name in names.values()):
        letters = "".join(names.get(i, "") for i in range(size))
        ids = {letter: i for i, letter in enumerate(letters)}
        if not len(ids) == len(letters) == len(names) == size or found.get("stoi", ids) != ids:
            raise UserError(f"{path} contradicts itself: vocab_size, itos and stoi differ; write a meta.json by hand")
        tokenizer = {"characters": letters}
    return {"vocab_size": size, "tokenizer": tokenizer}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=expanded, help="the folder that holds meta.pkl and the .bin files")
    folder = parser.parse_args().folder
    target, found = folder / "meta.json", read_plain(folder / "meta.pkl")
    if os.path.lexists(target):
        raise UserError(f"{target} is there already; remove it to make it anew from meta.pkl")
    meta = convert(found, folder / "meta.pkl")
    dtype = "uint16" if meta["vocab_size"] <= 2**16 else "uint32"
    meta |= {"dtype": dtype, "source": "converted from nanoGPT's meta.pkl"}
    write_atomically(target, json.dumps(meta, indent=1) + "\n")
    try:
        corpus = open_dataset(folder.resolve())
        for split in ("train", "val"):
            meta |= {f"{split}_tokens": len(getattr(corpus, split)), f"{split}_sha256": check_split(corpus, split)[1]}
        write_atomically(target, json.dumps(meta, indent=1) + "\n")
    except BaseException:
        target.unlink()
        raise
    kind = f"{meta['vocab_size']} characters" if meta["tokenizer"] else f"{meta['vocab_size']} ids, tokenizer not known"
    print(f"{target}: {kind}; {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens")


if __name__ == "__main__":
    command(main)
