"""Weights from and to elsewhere: against Hugging Face's logits; an imported run goes on as it would have; bad files."""

import dataclasses
import functools
import hashlib
import json

import numpy as np
import pytest
import torch

import evaluate
import export_hf
import train_adam
import train_sophiag
from model import GPT, GPTConfig
from sophia import SophiaG
from tests.conftest import ROOT, read_lines, tiny_words, write_corpus
from tests.test_model import randomize, small_gpt, tokens
from training import data
from training.checkpoint import read_checkpoint
from training.config import load_config
from training.errors import UserError, command
from training.hf import MODEL_SETTINGS, from_hf, from_pretrained, load_model, load_pretrained, sha256_of, to_hf

SHAPE = dict(n_layer=1, n_head=4, n_embd=24, block_size=16, vocab_size=64)  # not the one of tiny_words
STEPS = 5  # that the other code has done


def nanogpts_groups(model):
    """All matrices, then all vectors, in the order of named_parameters."""
    parameters = list(model.parameters())
    return [[p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]]


def official_groups(model):
    """The Linear layers' weights by name, then everything else by name."""
    named = dict(sorted(model.named_parameters()))
    linear = {name for name in named if name.endswith(("attn.weight", "proj.weight", "fc.weight"))}
    return [[named[name] for name in named if name in linear], [named[name] for name in named if name not in linear]]


def foreign(path, corpus, make_optimizer, groups, official, bias=True, tied=True, **extra):
    """A ckpt.pt as another repository writes it after STEPS steps, and what it would do in the next 5: their losses."""
    torch.manual_seed(1)
    args = {**SHAPE, "bias": bias, "dropout": 0.0}
    if official:
        args["scale_attn_by_inverse_layer_idx"] = True
    model = GPT(GPTConfig(**args, gelu="tanh" if official else "exact", tie_embeddings=tied))
    optimizer = make_optimizer([{"params": group} for group in groups(model)])
    bs = {"bs": 24 * 16} if isinstance(optimizer, SophiaG) else {}
    losses = []
    for step in range(STEPS + 5):
        if step == STEPS:
            weights = {f"_orig_mod.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
            if official:  # its causal mask is in its checkpoints
                weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
            torch.save({
                "model": weights, "optimizer": optimizer.state_dict(), "model_args": args, "iter_num": STEPS,
                "best_val_loss": torch.tensor(4.0), "config": {"learning_rate": 0.5, "compile": True}, **extra,
            }, path)  # fmt: skip
        starts = data.window_starts(6000, 1337, 24 * step, 24, 16)
        inputs, targets = (torch.from_numpy(a) for a in data.take_windows(corpus_tokens(corpus), starts, 16))
        loss = model(inputs, targets)[1]
        optimizer.zero_grad()
        loss.backward()
        if bs and step == 0:
            optimizer.update_hessian()
        optimizer.step(**bs)
        losses.append(loss.item())
    return losses[STEPS:]


def corpus_tokens(corpus):
    return np.fromfile(corpus / "train.bin", "<u2")


def adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)


def sophiag(groups):
    return SophiaG(groups, lr=1e-2, betas=(0.9, 0.95), rho=0.1, weight_decay=0.0)


SAME = ["--learning_rate=1e-2", "--decay_lr=False", "--weight_decay=0", "--grad_clip=0", "--beta1=0.9", "--beta2=0.95",
        "--max_iters=10", "--eval_interval=5"]  # fmt: skip


@pytest.mark.parametrize(
    "script, make, groups, official, bias, tied",
    [(train_adam, adamw, nanogpts_groups, False, False, True), (train_adam, adamw, nanogpts_groups, False, True, False),
     (train_adam, adamw, official_groups, True, True, True),
     (train_sophiag, sophiag, official_groups, True, False, True)],
    ids=["nanogpt", "nanogpt with biases and two matrices", "official adamw", "official sophiag"],
)  # fmt: skip
def test_an_imported_run_goes_on_as_before(
    corpus, tmp_path, capsys, monkeypatch, script, make, groups, official, bias, tied
):
    path, tiny = tmp_path / "ckpt.pt", tiny_words(corpus, tmp_path / "out")
    expected = foreign(path, corpus, make, groups, official, bias, tied)
    more = ["--hess_interval=1000", "--rho=0.1"] if script is train_sophiag else []
    script.main([*tiny, *SAME, *more, f"--init_from=import:{path}"])
    lines = read_lines(tmp_path / "out")
    assert [line["step"] for line in lines] == [5, 6, 7, 8, 9, 10]
    assert [line["train/loss"] for line in lines[:-1]] == pytest.approx(expected, abs=1e-5)
    gelu = "tanh" if official else "exact"
    config = json.loads((tmp_path / "out" / "config.json").read_text())["config"]
    assert (config["n_layer"], config["n_embd"], config["bias"], config["gelu"]) == (1, 24, bias, gelu)
    with monkeypatch.context() as patch:
        patch.setattr("training.run.load_optimizer_state", lambda *_: None)
        script.main([*tiny, *SAME, *more, f"--init_from=import:{path}", f"--out_dir={tmp_path}/without"])
    without = [line["train/loss"] for line in read_lines(tmp_path / "without")[:-1]]
    assert without != pytest.approx(expected, abs=1e-3), "the state has to matter for this to test it"
    assert f"step 5 with the state of its {config['optimizer_name']}" in capsys.readouterr().out

    shape = ["--n_layer=1", "--n_head=4", "--n_embd=24", f"--bias={bias}", f"--gelu={gelu}", f"--tie_embeddings={tied}"]
    shape.append(f"--scale_attn_by_inverse_layer_idx={official}")
    script.main([*tiny, *SAME, *more, *shape, "--init_from=resume", "--max_iters=12"])
    assert [line["step"] for line in read_lines(tmp_path / "out")] == [5, 6, 7, 8, 9, 10, 11, 12]


def test_another_optimizer_takes_the_weights_alone(corpus, tmp_path, capsys):
    path = tmp_path / "ckpt.pt"
    foreign(path, corpus, adamw, nanogpts_groups, official=False)
    train_sophiag.main([*tiny_words(corpus, tmp_path / "out"), f"--init_from=import:{path}", "--max_iters=3"])
    assert "weights, for step 0 (the state of its adamw is of no use to sophiag)" in capsys.readouterr().out
    assert [line["step"] for line in read_lines(tmp_path / "out")] == [0, 1, 2, 3]


def test_a_smaller_block_size_forgets_positions_and_their_state(corpus, tmp_path):
    path, argv = tmp_path / "ckpt.pt", tiny_words(corpus, tmp_path / "out")
    foreign(path, corpus, adamw, nanogpts_groups, official=False)
    train_adam.main([*argv, *SAME, f"--init_from=import:{path}", "--block_size=8"])
    checkpoint = read_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert checkpoint["model"]["transformer.wpe.weight"].shape == (8, 24)
    assert checkpoint["model_args"]["block_size"] == 8
    assert {tuple(state["exp_avg"].shape) for state in checkpoint["optimizer"]["state"].values()} >= {(8, 24), (64, 24)}


def test_imported_weights_compute_what_they_were_trained_as(corpus, tmp_path):
    path = tmp_path / "ckpt.pt"
    foreign(path, corpus, adamw, nanogpts_groups, official=False)
    checkpoint = load_pretrained(f"import:{path}")
    assert checkpoint["model_args"] == dataclasses.asdict(GPTConfig(**SHAPE, bias=True, gelu="exact"))
    foreign(path, corpus, adamw, official_groups, official=True)
    args = load_pretrained(f"import:{path}")["model_args"]
    assert (args["gelu"], args["scale_attn_by_inverse_layer_idx"]) == ("tanh", True)


# ----- Hugging Face


def small_hf(**settings):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = dict(n_positions=32, vocab_size=97, n_layer=3, n_head=4, n_embd=32, bos_token_id=None, eos_token_id=None)
    return randomize(GPT2LMHeadModel(GPT2Config(**{**config, **settings})))


@pytest.mark.parametrize("scale_attn", [False, True])
def test_logits_of_hugging_face_weights(scale_attn):
    hf_model = small_hf(scale_attn_by_inverse_layer_idx=scale_attn)
    model = from_hf(hf_model)
    idx = tokens(2, 32)
    expected = hf_model(idx).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(model(idx, idx)[0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(idx)[0], expected[:, -1:], atol=1e-4, rtol=0)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.data_ptr() != hf_model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale_attn", [False, True])
def test_logits_of_our_weights_in_hugging_face(bias, scale_attn):
    model = small_gpt(bias=bias, scale_attn_by_inverse_layer_idx=scale_attn)
    hf_model = to_hf(model)
    idx = tokens(2, 32)
    torch.testing.assert_close(hf_model(idx).logits, model(idx, idx)[0], atol=1e-4, rtol=0)
    assert all(not p.is_meta for p in hf_model.parameters())
    with torch.no_grad():
        hf_model.transformer.wte.weight.zero_()
    assert model.transformer.wte.weight.abs().sum() > 0, "to_hf must copy"


def test_the_exact_gelu_both_ways():
    hf_model = small_hf(activation_function="gelu")
    model, idx = from_hf(hf_model), tokens(2, 32)
    torch.testing.assert_close(model(idx, idx)[0], hf_model(idx).logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(to_hf(model)(idx).logits, hf_model(idx).logits, atol=1e-4, rtol=0)
    tanh = from_hf(small_hf())
    assert (tanh(idx, idx)[0] - model(idx, idx)[0]).abs().max() > 1e-3, "else this test shows nothing"


def test_dropout_falls_where_hugging_face_drops():
    model, idx = small_gpt(dropout=0.3).train(), tokens(2, 32)
    hf_model = to_hf(model).train()
    torch.manual_seed(0)
    expected = hf_model(idx).logits
    torch.manual_seed(0)
    torch.testing.assert_close(model(idx, idx)[0], expected, atol=1e-4, rtol=0)
    assert (model(idx, idx)[0] - expected).abs().max() > 0.1, "another seed, another mask"


def test_layer_scale_changes_the_logits():
    idx = tokens(2, 32)
    plain, scaled = small_gpt(), small_gpt(scale_attn_by_inverse_layer_idx=True)
    assert (plain(idx, idx)[0] - scaled(idx, idx)[0]).abs().max() > 1e-2


def test_to_hf_cuts_the_padded_vocabulary_and_survives_saving(tmp_path):
    from transformers import GPT2LMHeadModel

    model = small_gpt(vocab_size=128, bias=True)
    to_hf(model, vocab_size=97).save_pretrained(tmp_path)
    hf_model = GPT2LMHeadModel.from_pretrained(tmp_path)
    idx = tokens(2, 32)
    torch.testing.assert_close(hf_model(idx).logits, model(idx, idx)[0][..., :97], atol=1e-4, rtol=0)
    assert (hf_model.config.vocab_size, hf_model.config.n_positions) == (97, 32)
    with pytest.raises(ValueError, match="vocab_size=129 is more than the 128"):
        to_hf(model, vocab_size=129)


def test_released_gpt2_config_can_be_represented():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = from_hf(GPT2LMHeadModel(GPT2Config()))  # the defaults are those of OpenAI's 124M model
    assert model.config == GPTConfig(1024, 50257, 12, 12, 768, dropout=0.0, bias=True)


@pytest.mark.parametrize(
    "setting",
    [
        {"activation_function": "relu"},
        {"scale_attn_weights": False},
        {"add_cross_attention": True},
        {"reorder_and_upcast_attn": True},
    ],
)
def test_from_hf_names_what_it_cannot_represent(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        from_hf(small_hf(**setting))


def test_from_hf_wants_the_language_model():
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel, LlamaForCausalLM, .* got a GPT2Model"):
        from_hf(small_hf().transformer)


def test_from_pretrained_has_the_weights_and_refuses_unknown_names(monkeypatch):
    from transformers import GPT2LMHeadModel

    hf_model = small_hf()
    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", lambda name: hf_model)
    idx = tokens(2, 32)
    model = from_pretrained("gpt2")
    torch.testing.assert_close(model.eval()(idx, idx)[0], hf_model(idx).logits, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="'gpt3', choose one of gpt2, gpt2-medium, gpt2-large, gpt2-xl"):
        from_pretrained("gpt3")


def test_from_pretrained_without_network_says_what_is_missing(monkeypatch):
    from transformers import GPT2LMHeadModel

    def offline(name):
        raise OSError("couldn't connect")

    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", offline)
    with pytest.raises(ValueError, match=r"the weights of gpt2-xl are neither in .* nor downloadable"):
        from_pretrained("gpt2-xl")


# ----- Llama, Qwen3, GPT-NeoX

SETTINGS = {
    "LlamaConfig": {"num_key_value_heads": 2},
    "Qwen3Config": {"num_key_value_heads": 2, "head_dim": 8},
    "GPTNeoXConfig": {},
}
VARIANTS = [
    ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": None, "rms_norm_eps": 1e-4}),
    ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "rope_theta": 500.0, "intermediate_size": 40}),
    ("LlamaConfig", {"attention_bias": True}),
    ("LlamaConfig", {"mlp_bias": True}),
    ("Qwen3Config", {}),
    ("Qwen3Config", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    ("GPTNeoXConfig", {"rotary_pct": 0.5}),
    ("GPTNeoXConfig", {"attention_bias": False}),
    ("GPTNeoXConfig", {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_new"}),
    ("GPTNeoXConfig", {"tie_word_embeddings": True, "layer_norm_eps": 1e-3, "rotary_emb_base": 100}),
]


def other_hf(name, **settings):
    """A model of transformers with random weights far from its initialization, biases and gains included."""
    import transformers

    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=97,
                 max_position_embeddings=32, bos_token_id=None, eos_token_id=None)  # fmt: skip
    config = getattr(transformers, name)(**shape | SETTINGS[name] | settings)
    return randomize(getattr(transformers, name.replace("Config", "ForCausalLM"))(config))


@pytest.mark.parametrize("name, settings", VARIANTS)
def test_logits_of_other_families_both_ways(tmp_path, name, settings):
    from transformers import AutoModelForCausalLM

    hf_model, idx = other_hf(name, **settings), tokens(2, 32)
    model, expected = from_hf(hf_model), hf_model(idx).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(model(idx, idx)[0], expected, atol=1e-4, rtol=0)
    to_hf(randomize(model)).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    assert type(again) is type(hf_model)
    torch.testing.assert_close(again(idx).logits, model(idx, idx)[0], atol=1e-4, rtol=0)
    read = load_pretrained(f"hf:{tmp_path}")
    assert read["model_args"] == dataclasses.asdict(model.config)
    assert all(torch.equal(read["model"][key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_are_not_rounded_to_the_dtype_of_the_config(tmp_path, name):
    """As of a bfloat16 model that was fine-tuned in float32."""
    hf_model = other_hf(name)
    hf_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    expected = from_hf(hf_model).state_dict()
    for key, tensor in load_pretrained(f"hf:{tmp_path}")["model"].items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("name", ["GPT2Config", *SETTINGS])
def test_two_matrices_in_a_file_stay_two_although_its_config_ties_them(tmp_path, name):
    """As transformers has it, which warns of that."""
    from transformers import AutoModelForCausalLM

    make = small_hf if name == "GPT2Config" else functools.partial(other_hf, name)
    make(tie_word_embeddings=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    expected, idx = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval(), tokens(2, 32)
    read = load_pretrained(f"hf:{tmp_path}")
    model = GPT(GPTConfig(**read["model_args"]))
    model.load_state_dict(read["model"])
    assert model.lm_head.weight is not model.transformer.wte.weight
    torch.testing.assert_close(model(idx, idx)[0], expected(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings, name",
    [
        (dict(norm="rmsnorm", position="rope", mlp="swiglu", n_kv_head=1), "Llama"),
        (dict(norm="rmsnorm", position="rope", mlp="swiglu", qk_norm=True, tie_embeddings=False), "Qwen3"),
        (dict(position="rope", rope_dim=6, bias=False), "GPTNeoX"),
        (dict(tie_embeddings=False, mlp_hidden=40, norm_eps=1e-3, bias=True), "GPT2"),
    ],
)
def test_to_hf_takes_the_family_and_cuts_the_padded_vocabulary(settings, name):
    model, idx = small_gpt(vocab_size=128, **settings), tokens(2, 32)
    hf_model = to_hf(model, vocab_size=97)
    assert type(hf_model).__name__.startswith(name)
    torch.testing.assert_close(hf_model(idx).logits, model(idx, idx)[0][..., :97], atol=1e-4, rtol=0)


@pytest.mark.parametrize("width, rotated", [(100, 58), (64, 16), (80, 20), (12, 10)])
def test_a_rotated_part_survives_transformers_rounding(width, rotated):
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=width, vocab_size=8, position="rope", rope_dim=rotated))
        assert from_hf(to_hf(model)).config.rope_dim == rotated


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(mlp="relu2"), "the nearest, GPT2, cannot have mlp='relu2'"),
        (dict(n_kv_head=2), "the nearest, GPT2, cannot have n_kv_head=2"),
        (
            dict(norm="rmsnorm", position="rope", mlp="swiglu", qk_norm=True, bias=True),
            "Qwen3, cannot have bias=True|Llama, cannot have qk_norm",
        ),
        (dict(norm="rmsnorm", position="rope", mlp="swiglu", rope_dim=4), "Llama, cannot have rope_dim=4"),
        (
            dict(norm="rmsnorm", position="rope", mlp="swiglu", parallel_block=True),
            "Llama, cannot have parallel_block=True",
        ),
        (
            dict(position="rope", scale_attn_by_inverse_layer_idx=True),
            "cannot have position='rope'",
        ),
    ],
)
def test_to_hf_names_what_no_family_has(settings, message):
    with pytest.raises(ValueError, match=message):
        to_hf(small_gpt(**settings))


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("LlamaConfig", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters=.*'linear'"),
        ("LlamaConfig", {"hidden_act": "gelu"}, "hidden_act='gelu', GPT can only be 'silu'"),
        ("LlamaConfig", {"head_dim": 16}, "head_dim=16, GPT can only be 8"),
        ("Qwen3Config", {"head_dim": 16}, "head_dim=16"),
        ("Qwen3Config", {"attention_bias": True}, "attention_bias=True, GPT can only be False"),
        ("Qwen3Config", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window=True|layer_types="),
        ("GPTNeoXConfig", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("GPTNeoXConfig", {"rotary_pct": 0.4}, "rope_dim must be even"),
        ("GPTNeoXConfig", {"rotary_pct": 0.1}, "partial_rotary_factor': 0.1.*, which rotates nothing"),
    ],
)
def test_from_hf_names_the_key_of_other_families(name, settings, message):
    with pytest.raises(ValueError, match=message):
        from_hf(other_hf(name, **settings))


@pytest.mark.parametrize(
    "name, constants, extra",
    [
        ("LlamaConfig", ["model.layers.0.self_attn.rotary_emb.inv_freq"], "model.layers.0.self_attn.q_proj.bias"),
        ("LlamaConfig", [], "model.layers.2.self_attn.q_proj.weight"),
        ("GPTNeoXConfig", ["gpt_neox.layers.0.attention.masked_bias"], "gpt_neox.layers.1.adapter.weight"),
    ],
)
def test_weights_that_the_config_does_not_describe_are_refused_and_old_constants_are_not(
    tmp_path, name, constants, extra
):
    from safetensors.torch import load_file, save_file

    other_hf(name).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file) | {key: torch.ones(8) for key in constants}
    save_file(weights, file, metadata={"format": "pt"})
    load_pretrained(f"hf:{tmp_path}")
    save_file(weights | {extra: torch.ones(8)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"does not describe, {extra} among them"):
        load_pretrained(f"hf:{tmp_path}")


# ----- fine-tuning


@pytest.fixture(scope="module")
def gpt2_corpus(tmp_path_factory):
    folder = write_corpus(tmp_path_factory.mktemp("gpt2"), vocab_size=50257)
    return folder


def small_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50257, n_positions=32, n_layer=1, n_head=2, n_embd=8))


@pytest.mark.parametrize(
    "script, init_from, make",
    [
        (train_adam, "gpt2", small_gpt2),
        (train_sophiag, "hf", small_gpt2),
        (train_adam, "hf", lambda: other_hf("Qwen3Config", vocab_size=50257)),
        (train_sophiag, "hf", lambda: other_hf("GPTNeoXConfig", vocab_size=50257)),
    ],
    ids=["gpt2", "hf", "qwen3", "neox"],
)
def test_fine_tuning_starts_from_the_weights(gpt2_corpus, tmp_path, monkeypatch, capsys, script, init_from, make):
    hf_model = make().eval()
    if init_from == "hf":
        hf_model.save_pretrained(tmp_path / "hf")
        init_from = f"hf:{tmp_path}/hf"
    else:
        monkeypatch.setattr("training.hf.from_pretrained", lambda name: from_hf(hf_model))
    argv = [*tiny_words(gpt2_corpus, tmp_path / "out"), "--max_iters=4", "--eval_interval=2", "--eval_tokens=128"]
    script.main([*argv, f"--init_from={init_from}"])
    assert "weights, for step 0; " in capsys.readouterr().out
    corpus = data.open_dataset(gpt2_corpus)
    windows = data.take_windows(corpus.val, data.evaluation_starts(700, 128, 16), 16)
    logits = hf_model(torch.from_numpy(windows[0])).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(windows[1]).flatten())
    assert read_lines(tmp_path / "out")[0]["val/loss"] == pytest.approx(expected.item(), abs=1e-4)
    args = read_checkpoint(tmp_path / "out" / "ckpt.pt")["model_args"]
    assert args["vocab_size"] == 50257, "no row is made up"
    shape = [f"--{key}={value}" for key, value in args.items() if key in MODEL_SETTINGS]
    script.main([*argv, *shape, "--init_from=resume", "--max_iters=6"])
    assert read_lines(tmp_path / "out")[-1]["step"] == 6


@pytest.mark.parametrize("make", [small_gpt2, lambda: other_hf("Qwen3Config", vocab_size=50257)], ids=["gpt2", "qwen3"])
def test_auto_starts_from_the_weights_that_the_config_names_and_then_resumes(gpt2_corpus, tmp_path, make):
    """As slurm/train.sbatch has it, which adds --init_from=auto to a command."""
    make().save_pretrained(tmp_path / "hf")
    (tmp_path / "config.py").write_text(f'init_from = "hf:{tmp_path}/hf"\n')
    tiny = tiny_words(gpt2_corpus, tmp_path / "out")
    argv = [str(tmp_path / "config.py"), *tiny, "--eval_interval=2", "--eval_tokens=128", "--lr_decay_iters=4"]
    train_adam.main([*argv, "--max_iters=4"])
    for steps in (2, 4):
        train_adam.main([*argv, f"--max_iters={steps}", f"--out_dir={tmp_path}/auto", "--init_from=auto"])
        (tmp_path / "hf" / "model.safetensors").unlink(missing_ok=True)
    expected, found = ([line.get("val/loss") for line in read_lines(tmp_path / name)] for name in ("out", "auto"))
    assert found == expected and len(found) == 5
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["weights"] == f"hf:{tmp_path}/hf"
    with pytest.raises(UserError, match="hf"):
        train_adam.main([*argv, "--max_iters=4", f"--out_dir={tmp_path}/new", "--init_from=auto"])


@pytest.mark.parametrize("name", ["adam", "sophiag"])
def test_the_fine_tuning_configs(name):
    script = {"adam": train_adam.AdamConfig, "sophiag": train_sophiag.SophiaConfig}[name]
    config = load_config(script, [str(ROOT / f"config/finetune_shakespeare_{name}.py")])
    assert (config.init_from, config.dataset, config.optimizer_name) == ("gpt2", "shakespeare", config.optimizer_name)
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
                              bias=config.bias, block_size=config.block_size))  # fmt: skip
    assert model.num_params(non_embedding=False) == 124_439_808, "the shape of what it starts from, for a resume"


# ----- bad input


def refused(capsys, argv, message):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command(lambda: train_adam.main(argv))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error, error


def test_files_that_cannot_be_imported(corpus, tmp_path, capsys):
    tiny, path = tiny_words(corpus, tmp_path / "out"), tmp_path / "ckpt.pt"
    argv = [*tiny, f"--init_from=import:{path}"]
    refused(capsys, argv, "ckpt.pt cannot be read (No such file or directory)")
    path.write_bytes(b"no checkpoint")
    refused(capsys, argv, "is damaged, or holds more than tensors")
    torch.save({"model": {}, "config": ROOT}, path)  # an object: reading it would run code
    refused(capsys, argv, "is damaged, or holds more than tensors")
    torch.save({"step": 3, "model": {}, "model_args": {}}, path)
    refused(capsys, argv, "it is this project's, resume it")
    foreign(path, corpus, adamw, nanogpts_groups, official=False)
    refused(capsys, [*argv, "--max_iters=5"], "max_iters = 5 is not beyond the 5 steps")
    refused(capsys, [*argv, "--block_size=32"], "block_size = 32 is beyond the 16 positions")
    other = write_corpus(tmp_path / "other", vocab_size=50)
    refused(capsys, [*argv, f"--dataset={other}"], "vocab_size = 64")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["model"].pop("_orig_mod.transformer.ln_f.weight"), "transformer.ln_f.weight is missing"),
        (lambda c: c["model"].update(odd=torch.zeros(2)), "odd is (2,), a GPT with its model_args has none"),
        (lambda c: c["model_args"].update(n_embd=7), "n_embd must be divisible"),
        (lambda c: c["optimizer"]["state"].pop(0), "it does not fit transformer.wte.weight"),
        (lambda c: c["optimizer"]["param_groups"][0]["params"].reverse(), "order not known here"),
    ],
)
def test_checkpoints_that_do_not_hold_together(corpus, tmp_path, capsys, change, message):
    path = tmp_path / "ckpt.pt"
    foreign(path, corpus, adamw, nanogpts_groups, official=False)
    checkpoint = torch.load(path)
    change(checkpoint)
    torch.save(checkpoint, path)
    refused(capsys, [*tiny_words(corpus, tmp_path / "out"), f"--init_from=import:{path}"], message)


def test_folders_that_cannot_be_read(tiny, tmp_path, capsys):
    folder = tmp_path / "hf"
    argv = [*tiny, f"--init_from=hf:{folder}"]
    refused(capsys, argv, "hf is no folder with a Hugging Face model")
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    refused(capsys, argv, "model_type='mixtral', only 'gpt2', 'llama', 'qwen3', 'gpt_neox' can be read")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    refused(capsys, argv, "cannot be read")
    for text in ("[]", "{", '{"model_type": []}'):
        (folder / "config.json").write_text(text)
        refused(capsys, argv, "init_from = 'hf:")
    allowed = "gpt2, gpt2-medium, gpt2-large, gpt2-xl, hf:DIR, import:PATH"
    refused(capsys, [*tiny, "--init_from=hf:"], allowed)
    refused(capsys, [*tiny, "--init_from=gpt3"], "init_from = 'gpt3' is not possible")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"intermediate_size": 80}, "mlp.down_proj.weight is (32, 64), its config.json says (32, 80); copy both"),
        ({"num_attention_heads": 5}, "The hidden size (32) is not a multiple of the number of attention heads (5)"),
        ({"hidden_size": "32"}, "Field 'hidden_size' expected int, got str"),
        ({"num_hidden_layers": 10**9}, "has num_hidden_layers=1000000000 in its config.json, more than 10,000"),
    ],
)
def test_a_config_that_is_not_of_its_weights_is_named(tiny, tmp_path, capsys, settings, message):
    other_hf("LlamaConfig").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    refused(capsys, [*tiny, f"--init_from=hf:{tmp_path}"], message)


@pytest.mark.parametrize("model_type", ["own", "llama"])
def test_code_in_a_folder_is_neither_run_nor_offered(tiny, tmp_path, capsys, monkeypatch, model_type):
    """Whoever answers transformers' question with y runs it."""
    folder = tmp_path / "hf"
    other_hf("LlamaConfig").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    if model_type == "llama":
        assert load_pretrained(f"hf:{folder}")["model_args"]["norm"] == "rmsnorm"
    else:
        refused(capsys, [*tiny, f"--init_from=hf:{folder}"], "model_type='own', only 'gpt2'")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_tokenizer_of_that_size_is_not_gpt2s(gpt2_corpus, tmp_path, capsys):
    """GPT-NeoX's models have 50304 rows, as GPT-2's padded ones, and another tokenizer."""
    from tokenizers import Tokenizer, models

    other_hf("GPTNeoXConfig", vocab_size=50304).save_pretrained(tmp_path / "hf")
    assert load_pretrained(f"hf:{tmp_path}/hf")["tokenizer"] == "gpt2", "nothing says otherwise"
    Tokenizer(models.WordLevel({f"t{i}": i for i in range(50277)})).save(str(tmp_path / "hf" / "tokenizer.json"))
    _, tokenizer, _ = load_model(f"hf:{tmp_path}/hf", None)
    assert tokenizer.vocab_size == 50277 and tokenizer.decode([7]) == "t7"
    error = "tokens of tokenizer.json"
    refused(capsys, [*tiny_words(gpt2_corpus, tmp_path / "out"), f"--init_from=hf:{tmp_path}/hf"], error)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_folder_with_a_tokenizer_of_its_own_and_padding_rows_is_used_throughout(tmp_path, capsys, name):
    """As Qwen3 and Pythia are: fewer tokens than rows. Its export is saved in another form, and is the same again."""
    from tokenizers import Tokenizer, models

    hf, data_folder, run = tmp_path / "hf", tmp_path / "data", tmp_path / "run"
    other_hf(name, vocab_size=80).save_pretrained(hf)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(63)} | {"</s>": 63}, unk_token="t0"))
    words.save(str(hf / "tokenizer.json"), pretty=False)
    write_corpus(data_folder)
    content = (hf / "tokenizer.json").read_bytes()
    (data_folder / "tokenizer.json").write_bytes(content)
    spec = {"file": "tokenizer.json", "sha256": hashlib.sha256(content).hexdigest()}
    (data_folder / "meta.json").write_text(json.dumps({"vocab_size": 64, "tokenizer": spec}))

    model, tokenizer, _ = load_model(f"hf:{hf}", None)
    assert (model.config.vocab_size, tokenizer.vocab_size, tokenizer.decode([7, 8])) == (80, 64, "t7 t8")
    evaluated = evaluate.main([f"--init_from=hf:{hf}", f"--dataset={data_folder}", "--device=cpu", "--stride=32"])
    assert evaluated["loss"] > 4
    tiny = [word for word in tiny_words(data_folder, run) if not word.startswith("--n_")] + ["--warmup_iters=0"]
    train_adam.main([*tiny, f"--init_from=hf:{hf}", "--max_iters=2"])
    args = read_checkpoint(run / "ckpt.pt")["model_args"]
    assert args["vocab_size"] == 80
    shape = [f"--{key}={value}" for key, value in args.items() if key in MODEL_SETTINGS]
    train_adam.main([*tiny, *shape, "--init_from=resume", "--max_iters=3"])
    export_hf.main([f"--out_dir={run}", f"--to={tmp_path / 'again'}"])
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() != content
    train_adam.main([*tiny, f"--init_from=hf:{tmp_path / 'again'}", f"--out_dir={tmp_path / 'next'}", "--max_iters=1"])
    assert read_checkpoint(tmp_path / "next" / "ckpt.pt")["model_args"]["vocab_size"] == 64
    Tokenizer(models.WordLevel({f"t{63 - i}": i for i in range(64)})).save(str(hf / "tokenizer.json"))
    argv = [*tiny, f"--init_from=hf:{hf}", f"--out_dir={tmp_path / 'other'}"]
    refused(capsys, argv, "the model reads tokens of tokenizer.json")


def test_load_model_wants_to_know_the_tokenizer(corpus, tmp_path):
    path = tmp_path / "ckpt.pt"
    foreign(path, corpus, adamw, nanogpts_groups, official=False)
    with pytest.raises(Exception, match="does not say what its 64 tokens are"):
        load_model(f"import:{path}", None)
    small_gpt2().save_pretrained(tmp_path / "hf")
    model, tokenizer, _ = load_model(f"hf:{tmp_path}/hf", None)
    assert dataclasses.asdict(model.config)["vocab_size"] == 50257 and tokenizer.eot == 50256


def test_the_hash_of_weights_sees_every_bit_and_state():
    def given(**changes):
        weights = {"b": torch.ones(3, dtype=torch.bfloat16), "a": torch.arange(6.0).view(2, 3).t()}
        states = {"a": {"step": 3, "exp_avg": torch.zeros(())}}
        return {"model": weights | changes, "optimizer": ("adamw", states)}

    expected = sha256_of(given())
    assert sha256_of(given()) == expected
    others = [given(a=torch.arange(6.0).view(3, 2)), given(b=torch.ones(3)), given(c=torch.ones(1))]
    others += [given(b=torch.tensor([1, 1, 1 + 2**-7], dtype=torch.bfloat16)), given() | {"optimizer": None}]
    others.append(given() | {"optimizer": ("adamw", {"a": {"step": 4, "exp_avg": torch.zeros(())}})})
    assert len({expected, *map(sha256_of, others)}) == 7
