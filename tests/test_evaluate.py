"""evaluate.py against a plain loop over Hugging Face's model, and against the loss that training reports."""

import json
import math

import numpy as np
import pytest
import torch

import evaluate
import train_adam
from tests.conftest import read_lines, tiny_words, write_corpus
from tests.test_sample import CHARACTERS, write_run
from training.errors import command
from training.hf import to_hf
from training.tokenizer import get_tokenizer


def plain_loop(hf_model, tokens, stride, T):
    """Mean -log p of tokens[1:], one window after the other, one token after the other."""
    total, end = 0.0, 1  # tokens before `end` are done; the first has nothing before it
    for start in range(0, len(tokens), stride):
        window = torch.from_numpy(tokens[start : start + T + 1].astype(np.int64))
        log_probs = hf_model(window[None, :-1]).logits[0].log_softmax(-1)
        for i in range(end - start, len(window)):
            total -= log_probs[i - 1, window[i]].item()
        end = start + len(window)
        if end == len(tokens):
            return total / (len(tokens) - 1)


def corpus_of(folder, val, tokenizer, vocab_size):
    folder.mkdir()
    for split, tokens in (("train", val[::-1]), ("val", val)):
        np.array(tokens, "<u2").tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(json.dumps({"vocab_size": vocab_size, "tokenizer": tokenizer}))
    return folder


def argv(folder, corpus, **settings):
    settings = {"out_dir": folder, "dataset": corpus, "device": "cpu", **settings}
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.fixture
def characters(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 12, 123)
    return tokens, corpus_of(tmp_path / "corpus", tokens, {"characters": CHARACTERS}, 12)


@pytest.mark.parametrize("stride", [1, 5, 8, 15, 16])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_equal_to_a_plain_loop_over_hugging_face(tmp_path, capsys, characters, stride, batch_size):
    tokens, corpus = characters
    model = write_run(tmp_path / "run", spread=8.0)
    for split, own in (("val", tokens), ("train", tokens[::-1])):
        found = evaluate.main(argv(tmp_path / "run", corpus, stride=stride, batch_size=batch_size, split=split))
        expected = plain_loop(to_hf(model), own, stride, 16)
        assert found["loss"] == pytest.approx(expected, abs=1e-4) and abs(expected - math.log(12)) > 0.1
        assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
        assert found["bits_per_byte"] == pytest.approx(expected / math.log(2), rel=1e-4), "a character is a byte here"
        assert f"loss {found['loss']:.4f}  perplexity {found['perplexity']:.4f}  bits" in capsys.readouterr().out


@pytest.mark.parametrize("n", [2, 3, 15, 16, 17, 18, 32, 33])
def test_every_token_counts_once(n):
    """A model that gives all tokens the same probability is as bad as it can be on each of n - 1 tokens."""
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(block_size=16, vocab_size=8, n_layer=1, n_head=1, n_embd=4))
    model.lm_head.weight.data.zero_()
    for stride in (1, 3, 16):
        nats = evaluate.total_nats(model, np.zeros(n, "<u2"), stride, batch_size=3)
        assert nats == pytest.approx((n - 1) * math.log(8), rel=1e-5)


def test_bytes_are_those_of_the_text(tmp_path):
    tokenizer = get_tokenizer("gpt2")
    texts = ["Grüße, 日本語 🤗!\n\n  def f(x):\treturn x\n", "plain words", "🤗"]
    ids = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eot]]
    assert evaluate.count_bytes(np.array(ids, "<u2"), tokenizer) == sum(len(text.encode()) for text in texts)
    own = get_tokenizer({"characters": "aé日"})
    assert evaluate.count_bytes(np.array([0, 1, 2, 2], "<u2"), own) == len("aé日日".encode())

    write_run(tmp_path / "run", 50304, "gpt2")
    corpus = corpus_of(tmp_path / "corpus", ids, "gpt2", 50257)
    found = evaluate.main(argv(tmp_path / "run", corpus))
    n_bytes = sum(len(text.encode()) for text in texts) - len(tokenizer.decode(ids[:1]).encode())
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * (len(ids) - 1) / math.log(2) / n_bytes)


def test_windows_without_overlap_give_the_val_loss_of_training(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", n_val=16 * 40 + 1, vocab_size=50257)
    train_adam.main([*tiny_words(corpus, tmp_path / "run"), "--n_embd=8", "--max_iters=5", "--eval_interval=5"])
    for dataset in ("", corpus):
        found = evaluate.main(argv(tmp_path / "run", dataset, stride=16))  # "": the run's own
        assert found["loss"] == pytest.approx(read_lines(tmp_path / "run")[-1]["val/loss"], abs=1e-5)


def test_a_split_that_was_replaced_since_the_training_is_one_warning(tmp_path, capsys, characters):
    """By default the dataset is the training's; a new split of it may hold what the model was trained on."""
    tokens, corpus = characters
    short = ["--max_iters=1", "--warmup_iters=0", "--total_bs=4", "--batch_size=4"]
    train_adam.main([*tiny_words(corpus, tmp_path / "run"), *short])
    words = [word for word in argv(tmp_path / "run", corpus) if not word.startswith("--dataset")]
    evaluate.main(words)
    assert "warning" not in capsys.readouterr().err
    np.array(tokens[::-1], "<u2").tofile(corpus / "val.bin")
    evaluate.main(words)
    warning = capsys.readouterr().err
    assert warning.count("warning: val.bin in") == 1 and "SHA-256 differs" in warning
    evaluate.main([*words, f"--dataset={corpus}/../corpus"])
    assert "warning" not in capsys.readouterr().err


def test_openais_weights(tmp_path, monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    hf_model = GPT2LMHeadModel(GPT2Config(n_positions=16, n_layer=1, n_head=2, n_embd=8, initializer_range=0.5)).eval()
    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", lambda name: {"gpt2": hf_model}[name])
    corpus = write_corpus(tmp_path / "corpus", n_val=100, vocab_size=50257)
    found = evaluate.main(argv(tmp_path / "none", corpus, init_from="gpt2", stride=8))
    expected = plain_loop(hf_model, np.fromfile(corpus / "val.bin", "<u2"), 8, 16)
    assert found["loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"stride": 17}, "stride = 17 would leave tokens out, block_size is 16"),
        ({"stride": 0}, "stride"),
        ({"split": "test"}, "one of train, val"),
        ({"out_dir": "{folder}/none"}, "none holds no checkpoint"),
        ({"dataset": "{folder}/none"}, "none/train.bin is missing"),
        ({"dataset": ""}, "run does not say what it was trained on"),
        ({"dataset": "{folder}/gpt2"}, "the model reads 12 characters and {folder}/gpt2 holds GPT-2 tokens"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, characters, settings, message):
    write_run(tmp_path / "run")
    write_corpus(tmp_path / "gpt2")
    settings = {key: str(value).format(folder=tmp_path) for key, value in settings.items()}
    with pytest.raises(SystemExit) as ended:
        command(lambda: evaluate.main(argv(**{"folder": tmp_path / "run", "corpus": characters[1]} | settings)))
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert message.format(folder=tmp_path) in printed.err


def test_a_window_far_longer_than_the_split_costs_no_more_than_the_split():
    from model import GPT, GPTConfig

    tokens, losses = np.arange(40, dtype="<u2") % 8, []
    for block_size in (39, 10**9):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=block_size, vocab_size=8, n_layer=1, n_head=1, n_embd=4, position="rope"))
        losses.append(evaluate.total_nats(model, tokens, block_size // 2, batch_size=3))
    assert losses[0] == losses[1] > 0
