"""sample.py: its text is what `generate` gives, padding is never drawn, bad input is one sentence."""

import dataclasses
import functools
import time

import pytest
import torch

import sample
from model import GPT, Cache, GPTConfig
from sample import draw, generate, stream
from training.checkpoint import load_checkpoint, save_checkpoint
from training.errors import UserError, command
from training.hf import load_model
from training.tokenizer import get_tokenizer

CHARACTERS = "\n abcdefghij"  # 12


def write_run(folder, vocab_size=12, tokenizer=None, favourite=None, spread=1.0, **shape):
    """A checkpoint of a model with random weights, `spread` times as large as new ones (1 guesses nearly uniformly);
    `favourite` gets far the largest logit."""
    torch.manual_seed(0)
    shape = {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, "bias": True, **shape}
    model = GPT(GPTConfig(vocab_size=vocab_size, **shape))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(spread)
    if favourite is not None:
        with torch.no_grad():
            model.transformer.ln_f.weight.zero_()
            model.transformer.ln_f.bias.copy_(100 * model.lm_head.weight[favourite])
            model.lm_head.weight[favourite] *= 20
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder, {
        "model": model.state_dict(),
        "model_args": dataclasses.asdict(model.config),
        "tokenizer": tokenizer or {"characters": CHARACTERS},
        "step": 1,
    })  # fmt: skip
    return model


def argv(folder, **settings):
    settings = {"out_dir": folder, "device": "cpu", "max_new_tokens": 40, **settings}
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.mark.parametrize("start, shown", [("", ""), ("abba", "abba"), ("abcdefghij" * 3, "abcdefghij" * 3)])
def test_streamed_text_is_generates_text(tmp_path, capsys, start, shown):
    model, tokenizer = write_run(tmp_path), get_tokenizer({"characters": CHARACTERS})
    sample.main(argv(tmp_path, start=start, num_samples=2, seed=5, top_k=7))
    printed = capsys.readouterr()
    prompt = tokenizer.encode(start or "\n")
    expected = []
    for seed in (5, 6):
        ids = generate(model, torch.tensor([prompt]), 40, temperature=0.8, top_k=7, seed=seed)[0, len(prompt) :]
        expected.append(shown + tokenizer.decode(ids.tolist()) + "\n")
    assert printed.out == "---------------\n".join(expected)
    assert printed.err == ("" if len(prompt) <= 16 else "warning: the prompt has 30 tokens, each new one is drawn "
                           "from the last block_size = 16.\n")  # fmt: skip


def test_tokens_are_printed_as_they_come(tmp_path, monkeypatch, capsys):
    write_run(tmp_path)
    forward, printed = GPT.forward, []

    def spy(*arguments, **more):
        printed.append(len(capsys.readouterr().out))
        return forward(*arguments, **more)

    monkeypatch.setattr(GPT, "forward", spy)
    sample.main(argv(tmp_path, max_new_tokens=6, start="ab"))
    assert printed == [2, 1, 1, 1, 1, 1], "each token is out before the next is computed"


@pytest.mark.parametrize("content", [b"bad\n", b"\xef\xbb\xbfbad\r\n"], ids=["", "of Windows"])
def test_the_prompt_can_come_from_a_file(tmp_path, capsys, monkeypatch, content):
    write_run(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompt.txt").write_bytes(content)
    sample.main(argv(tmp_path, start="FILE:~/prompt.txt"))
    assert capsys.readouterr().out.startswith("bad\n")


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 5.0}, {"top_k": 1}, {"top_k": None}])
def test_padding_is_never_drawn(tmp_path, capsys, settings):
    favourite = 50300  # a row without a token: its logit is far the largest
    model = write_run(tmp_path, 50304, "gpt2", favourite)
    prompt = torch.tensor([[50256]])
    assert (generate(model, prompt, 5, temperature=0.0)[0, 1:] == favourite).all(), "else this test shows nothing"
    settings = {"temperature": 0.8, "top_k": 200} | settings
    assert generate(model, prompt, 50, seed=1, vocab_size=50257, **settings).max() < 50257
    sample.main(argv(tmp_path, max_new_tokens=5, **settings))
    assert len(capsys.readouterr().out) > 1, "padding would decode to nothing"


@torch.no_grad()
def recomputed(model, idx, n, seed, last_only=False, **settings):
    """What `generate` means: each token from a forward pass over all of the last block_size tokens."""
    generator = torch.Generator().manual_seed(seed)
    settings = {"temperature": 1.0, "top_k": None, **settings}
    for _ in range(n):
        seen = idx[:, -model.config.block_size :]
        logits, _ = model(seen, None if last_only else seen)
        token = draw(logits[:, -1], generator=generator, **settings)
        idx = torch.cat((idx, token), dim=1)
    return idx


@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 30])  # block_size is 16: 20 more tokens go past it
@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.5}, {"temperature": 0}])
def test_the_cache_changes_no_text(tmp_path, length, settings):
    model = write_run(tmp_path, spread=5.0)
    idx = torch.randint(12, (3, length), generator=torch.Generator().manual_seed(1))
    for seed in range(3):
        text = generate(model, idx, 20, seed=seed, **settings)
        assert torch.equal(text, recomputed(model.eval(), idx, 20, seed, **settings))


def test_a_token_costs_one_position_until_the_context_is_full(tmp_path, monkeypatch):
    model, forward, positions = write_run(tmp_path), GPT.forward, []
    monkeypatch.setattr(GPT, "forward", lambda m, idx, **more: positions.append(idx.size(1)) or forward(m, idx, **more))
    generate(model, torch.zeros(1, 5, dtype=torch.long), 15)
    assert positions == [5] + [1] * 11 + [16] * 3


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [None, 200])
def test_the_cache_is_five_times_faster_at_512_tokens(top_k):
    """The 30M model on the CPU."""
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384)).eval(), torch.tensor([[50256]])
    times = []
    for write in (functools.partial(generate, model), functools.partial(recomputed, model, last_only=True)):
        start = time.perf_counter()
        times.append((write(idx, 512, seed=1, top_k=top_k), time.perf_counter() - start))
    (text, cached), (expected, plain) = times
    print(f"{cached:.1f} s with the cache, {plain:.1f} s without: {plain / cached:.1f} times faster")
    assert torch.equal(text, expected) and plain > 5 * cached


def test_logits_of_a_cached_token(tmp_path):
    model, idx = write_run(tmp_path), torch.arange(12)[None].repeat(2, 1)
    caches = [Cache(16) for _ in model.transformer.h]
    model.eval()(idx[:, :7], caches=caches)
    for t in range(7, 12):
        logits, _ = model(idx[:, t : t + 1], caches=caches)
        torch.testing.assert_close(logits, model(idx[:, : t + 1])[0], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="17 tokens are more than the model's block_size=16"):
        model(idx[:, :5], caches=caches)


@pytest.mark.parametrize(
    "settings, kept",  # probabilities 0.5, 0.25, 0.15, 0.1 at places 2, 0, 3, 1
    [({"top_p": 0.5}, [2]), ({"top_p": 0.51}, [2, 0]), ({"top_p": 0.8}, [2, 0, 3]), ({"top_p": 1.0}, [0, 1, 2, 3]),
     ({"top_p": 1e-9}, [2]), ({"top_p": 1e-309}, [2]), ({"top_p": 0.7, "top_k": 2}, [2, 0]),
     ({"top_p": 0.6, "top_k": 2}, [2])],
)  # fmt: skip
def test_top_p_keeps_the_fewest_tokens_that_have_it(settings, kept):
    probs = torch.tensor([0.25, 0.1, 0.5, 0.15])
    settings = {"top_k": None, **settings}
    drawn = draw(probs.log().expand(20_000, -1), 1.0, generator=torch.Generator().manual_seed(0), **settings)
    expected = torch.zeros(4).index_copy(0, torch.tensor(kept), probs[kept])
    frequencies = drawn.flatten().bincount(minlength=4) / 20_000
    torch.testing.assert_close(frequencies, expected / expected.sum(), atol=0.02, rtol=0)
    assert (frequencies > 0).equal(expected > 0)


def test_a_stream_that_is_left_early_gives_the_mode_back(tmp_path):
    model = write_run(tmp_path).train()
    next(tokens := stream(model, torch.tensor([[0]]), 5))
    assert not model.training and torch.is_grad_enabled()
    tokens.close()
    assert model.training


def test_characters_cut_over_several_tokens_come_whole():
    tokenizer = get_tokenizer("gpt2")
    text = "naïve 🤗 日本語 — \ufffd and more"
    ids = tokenizer.encode(text)
    pieces = list(sample.decode_stream(ids, tokenizer))
    assert "".join(pieces) == text
    assert len(pieces) > 8, "and not all at the end"
    cut = tokenizer.encode("🤗")[:1]
    assert "".join(sample.decode_stream(cut, tokenizer)) == "\ufffd", "half a character at the end is shown as such"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"start": "abc€"}, "'€' is not among the 12"),
        ({"start": "FILE:{folder}/none.txt"}, "none.txt (No such file or directory)"),
        ({"start": "FILE:{folder}"}, "(Is a directory)"),
        ({"start": "FILE:{folder}/ckpt.pt"}, "it is not UTF-8 text"),
        ({"start": "FILE:{folder}/empty.txt"}, "is empty"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "nan"}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"init_from": "gpt5"}, "init_from = 'gpt5' is not possible: one of resume, gpt2"),
        ({"init_from": "hf:{folder}/nothing"}, "no folder with a Hugging Face model"),
        ({"init_from": "import:{folder}/ckpt.pt"}, "it is this project's"),
        ({"num_samples": 0}, "num_samples"),
        ({"seed": 2**32}, "seed"),
        ({"out_dir": "{folder}/nothing"}, "nothing holds no checkpoint"),
        ({"device": "tpu"}, "device"),
        ({"sart": "a"}, "'start'"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, settings, message):
    write_run(tmp_path)
    (tmp_path / "empty.txt").touch()
    settings = {key: str(value).format(folder=tmp_path) for key, value in settings.items()}
    refused(capsys, argv(tmp_path, **settings), message)


@pytest.mark.parametrize("tokenizer, start, message", [
    ({"characters": "abcdefghijkl"}, "", "start = '' gives no token of this model; give another prompt"),
    (None, "9" * 5000, "ids from 0 to 11"),
])  # fmt: skip
def test_prompts_without_a_token(tmp_path, capsys, tokenizer, start, message):
    """A vocabulary without a newline cannot begin a document. Ids have few digits."""
    write_run(tmp_path, tokenizer=tokenizer or {"characters": CHARACTERS})
    if tokenizer is None:
        checkpoint = load_checkpoint(tmp_path)[0]
        save_checkpoint(tmp_path, {**checkpoint, "tokenizer": None})
    refused(capsys, argv(tmp_path, start=start), message)


def test_a_model_that_does_not_fit_the_tokenizer(tmp_path, capsys):
    write_run(tmp_path, vocab_size=8)
    refused(capsys, argv(tmp_path), "its model has 8 tokens and its tokenizer 12")


def refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as done:
        command(lambda: sample.main(arguments))
    printed = capsys.readouterr()
    assert done.value.code == 2 and printed.out == "" and message in printed.err
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1


def test_load_model_gives_the_trained_weights(tmp_path):
    model = write_run(tmp_path)
    loaded, tokenizer, _ = load_model("resume", tmp_path)
    idx = torch.arange(12)[None]
    assert torch.equal(loaded(idx)[0], model(idx)[0]) and tokenizer.decode([2, 3]) == "ab"
    with pytest.raises(UserError):
        load_model("resume", tmp_path / "elsewhere")


def test_text_from_openais_model(monkeypatch, tmp_path, capsys):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=2, n_embd=8, bias=True))
    monkeypatch.setattr("training.hf.from_pretrained", lambda name: {"gpt2": model}[name])
    sample.main(argv(tmp_path / "none", init_from="gpt2", start="To be", top_k=None, top_p=0.9, max_new_tokens=12))
    tokenizer = get_tokenizer("gpt2")
    idx = torch.tensor([tokenizer.encode("To be")])
    ids = generate(model, idx, 12, 0.8, None, 1337, top_p=0.9)[0].tolist()
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"
