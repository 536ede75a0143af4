"""Weights from and to elsewhere: OpenAI's GPT-2, Hugging Face, nanoGPT's and the official Sophia repo's ckpt.pt.

model, tokenizer, settings = load_model("gpt2-medium", out_dir=None)   # or "hf:DIR", "import:PATH", "ckpt:PATH"
model, tokenizer, settings = load_model("resume", out_dir="out/run")   # the run's own checkpoint
checkpoint = start_from(config)                                        # to train on from config.init_from
to_hf(model).save_pretrained("exported")                               # transformers.GPT2LMHeadModel
"""

import contextlib
import dataclasses
import hashlib
import logging
import warnings
from pathlib import Path

import torch

from model import EMBEDDINGS, GPT, GPTConfig
from training.checkpoint import MANIFEST, load_checkpoint, read_checkpoint
from training.data import GPT2_VOCAB_SIZE
from training.errors import UserError
from training.foreign import check_weights, load_tensors, restoring
from training.optimizers import optimizer_of_state
from training.tokenizer import get_tokenizer

MODEL_SETTINGS = [field.name for field in dataclasses.fields(GPTConfig) if field.name not in ("vocab_size", "dropout")]
OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Hugging Face keeps these transposed, (in, out)


# ----- models


@contextlib.contextmanager
def quiet():
    """Keep transformers, and what it imports, from warning of what no user of this project can change."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def load_model(init_from, out_dir, which="newest"):
    """(model on the CPU, its tokenizer, the settings it was trained with or {}).

    Raises UserError if there is nothing to load, or if model and tokenizer do not fit.
    """
    if init_from == "resume":
        checkpoint, origin = load_checkpoint(out_dir, which, parts=("model",))
    else:
        checkpoint, origin = load_pretrained(init_from), init_from
    rows = checkpoint["model_args"]["vocab_size"]
    if checkpoint["tokenizer"] is None and init_from != "resume":
        raise UserError(f"{origin}: it does not say what its {rows} tokens are, and they are not GPT-2's.")
    tokenizer = get_tokenizer(checkpoint["tokenizer"], vocab_size=rows)
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{origin}: its model has {rows} tokens and its tokenizer {tokenizer.vocab_size}; "
            "train with data whose meta.json names the tokenizer that made it."
        )
    with torch.device("meta"):
        model = GPT(GPTConfig(**checkpoint["model_args"]))
    return assign(model, checkpoint["model"], torch.float32), tokenizer, checkpoint.get("config", {})


@quiet()
def from_pretrained(name, dropout=0.0):
    """The GPT with OpenAI's weights. transformers downloads them at the first use, then reads its cache.

    ValueError for an unknown name, and where the weights can neither be found nor downloaded.
    """
    if name not in OPENAI:
        raise ValueError(f"no pretrained model is called {name!r}, choose one of {', '.join(OPENAI)}")
    from transformers import GPT2LMHeadModel

    try:
        return from_hf(GPT2LMHeadModel.from_pretrained(name), dropout)
    except OSError as error:
        missing = f"the weights of {name} are neither in Hugging Face's cache (HF_HOME) nor downloadable now"
        raise ValueError(f"{missing}: run this once with access to huggingface.co") from error


@quiet()
def from_hf(hf_model, dropout=0.0):
    """A GPT with float32 copies of a `transformers.GPT2LMHeadModel`'s weights.

    ValueError names the setting of hf_model that GPT does not have.
    """
    from transformers import GPT2LMHeadModel

    if not isinstance(hf_model, GPT2LMHeadModel):
        raise ValueError(f"from_hf takes a GPT2LMHeadModel, got a {type(hf_model).__name__}")
    hf = hf_model.config
    for name, allowed in dict(
        activation_function=("gelu_new", "gelu_pytorch_tanh", "gelu"),  # the first two are one function
        n_inner=(None, 4 * hf.n_embd), layer_norm_epsilon=(1e-5,), scale_attn_weights=(True,),
        add_cross_attention=(False,), reorder_and_upcast_attn=(False,), tie_word_embeddings=(True,),
    ).items():  # fmt: skip
        if getattr(hf, name) not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"the Hugging Face model has {name}={getattr(hf, name)!r}, GPT can only be {expected}")
    shape = (hf.n_positions, hf.vocab_size, hf.n_layer, hf.n_head, hf.n_embd)
    gelu = "exact" if hf.activation_function == "gelu" else "tanh"
    with torch.device("meta"):
        model = GPT(GPTConfig(*shape, dropout, True, hf.scale_attn_by_inverse_layer_idx, gelu))
    weights = {k: v.t() if k.endswith(CONV1D) else v for k, v in hf_model.state_dict().items()}
    return assign(model, weights, torch.float32)


@quiet()
def to_hf(model, vocab_size=None):
    """A copy of a GPT as `transformers.GPT2LMHeadModel`, in eval mode.

    vocab_size: cut the rows beyond it, which pad the vocabulary (50257 for GPT-2's tokenizer); None keeps them.
    A model without biases gets zeros, which is the same function.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    vocab_size = vocab_size or config.vocab_size
    if vocab_size > config.vocab_size:
        raise ValueError(f"vocab_size={vocab_size} is more than the {config.vocab_size} tokens of the model")
    end_of_text = 50256 if vocab_size > 50256 else None  # GPT-2's; other vocabularies have none
    with torch.device("meta"):
        hf_model = GPT2LMHeadModel(GPT2Config(
            vocab_size=vocab_size, n_positions=config.block_size, n_layer=config.n_layer, n_head=config.n_head,
            n_embd=config.n_embd, scale_attn_by_inverse_layer_idx=config.scale_attn_by_inverse_layer_idx,
            activation_function="gelu" if config.gelu == "exact" else "gelu_new",
            resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
            bos_token_id=end_of_text, eos_token_id=end_of_text,
        ))  # fmt: skip
    weights = model.state_dict()
    for name, like in hf_model.state_dict().items():
        if name.endswith(".bias") and not config.bias:
            weights[name] = torch.zeros(like.shape, device=model.lm_head.weight.device)
        elif name.endswith(CONV1D):
            weights[name] = weights[name].t()
    weights["transformer.wte.weight"] = weights["lm_head.weight"] = weights["lm_head.weight"][:vocab_size]
    return assign(hf_model, weights, model.lm_head.weight.dtype).eval()


def assign(model, weights, dtype):
    """Give a model that was built on the meta device copies of `weights`, and tie its output matrix."""
    copies = {k: v.detach().to(dtype, copy=True, memory_format=torch.contiguous_format) for k, v in weights.items()}
    model.load_state_dict(copies, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model


# ----- checkpoints to train on from


def start_from(config):
    """The checkpoint of `config.init_from`, for a run with this config. The config takes on the model's settings.

    An import whose optimizer is the config's goes on at its step with its optimizer state. Everything else gives
    weights for step 0. A smaller block_size forgets the positions beyond it.
    """
    checkpoint = load_pretrained(config.init_from)
    args, weights = checkpoint["model_args"], checkpoint["model"]
    block_size, positions = config.block_size, "transformer.wpe.weight"
    if args["block_size"] < block_size:
        most = args["block_size"]
        raise UserError(f"block_size = {block_size} is beyond the {most} positions of {config.init_from}; lower it.")
    name, states = checkpoint["optimizer"] or (None, {})
    continues = name == config.optimizer_name
    if not continues:
        checkpoint.update(step=0, optimizer=None)
    elif checkpoint["step"] >= config.max_iters:
        done = f"the {checkpoint['step']} steps that {config.init_from} has done"
        raise UserError(f"max_iters = {config.max_iters} is not beyond {done}; raise it.")
    state = {key: value[:block_size] for key, value in states.get(positions, {}).items() if key != "step"}
    states[positions] = states.get(positions, {}) | state
    weights[positions] = weights[positions][:block_size]
    args["block_size"] = block_size
    for key in MODEL_SETTINGS:
        setattr(config, key, args[key])
    shape = ", ".join(f"{key} = {args[key]}" for key in MODEL_SETTINGS)
    taken = f"step {checkpoint['step']} with the state of its {name}" if continues else "weights, for step 0"
    left = f" (the state of its {name} is of no use to {config.optimizer_name})" if name and not continues else ""
    checkpoint["summary"] = f"from {config.init_from}: {taken}{left}; {shape}"
    return checkpoint


def sha256_of(checkpoint):
    """The SHA-256 of the weights and optimizer states of a start_from checkpoint."""
    digest, (_, states) = hashlib.sha256(), checkpoint["optimizer"] or (None, {})
    for name, tensors in sorted({"": checkpoint["model"], **states}.items()):
        for key, tensor in sorted(tensors.items()):
            tensor = torch.as_tensor(tensor)
            digest.update(f"{name} {key} {tensor.dtype} {tensor.shape}".encode())
            digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_optimizer_state(optimizer, model, states):
    """Give `optimizer` the `states` of a start_from checkpoint, {parameter name: state}. Its settings stay."""
    names = {p: name for name, p in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: states[names[p]] for i, p in enumerate(parameters) if names[p] in states}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def load_pretrained(init_from):
    """The model of `init_from` in the form of this project's checkpoints.

    "optimizer" is None or (its optimizer_name, {parameter name: state}); "tokenizer" is None if it is not known.
    """
    kind, _, path = init_from.partition(":")
    checkpoint = {"step": 0, "optimizer": None, "config": {}}
    if kind == "import":
        checkpoint |= _read_import(path)
    elif kind == "ckpt":
        is_run = Path(path).is_dir() and not (Path(path) / MANIFEST).exists()
        own = load_checkpoint(path, parts=("model",))[0] if is_run else read_checkpoint(path, parts=("model",))
        checkpoint |= {key: own[key] for key in ("model", "model_args", "tokenizer", "config")}
    else:
        try:
            model = _read_folder(path) if kind == "hf" else from_pretrained(kind)
        except (ValueError, ImportError) as error:
            raise UserError(f"init_from = {init_from!r}: {str(error).splitlines()[0]}.") from None
        checkpoint |= {"model": model.state_dict(), "model_args": dataclasses.asdict(model.config)}
    rows = checkpoint["model_args"]["vocab_size"]
    checkpoint.setdefault("tokenizer", "gpt2" if 0 <= rows - GPT2_VOCAB_SIZE < 1000 else None)  # padded or not
    return checkpoint | {"best_val_loss": float("inf"), "seconds": 0.0, "wandb_id": None}


@quiet()
def _read_folder(path):
    from transformers import AutoConfig, GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not (Path(path) / "config.json").exists():
        raise ValueError(f"{path} is no folder with a Hugging Face model, it has no config.json")
    try:
        model_type = AutoConfig.from_pretrained(path, local_files_only=True).model_type
        if model_type != "gpt2":
            raise ValueError(f"{path} holds a model of type {model_type!r}, only 'gpt2' can be read")
        hf_model, info = GPT2LMHeadModel.from_pretrained(path, local_files_only=True, output_loading_info=True)
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # a damaged file can raise nearly anything there
        raise ValueError(f"{path} cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]})") from None
    if info["missing_keys"]:
        raise ValueError(f"{path} lacks weights, {min(info['missing_keys'])} among them")
    return from_hf(hf_model)


def _read_import(path):
    """A ckpt.pt of nanoGPT or of the official Sophia repository. No code in the file is run."""
    foreign = load_tensors(path)
    if not isinstance(foreign, dict) or not {"model", "model_args", "iter_num"} <= foreign.keys():
        remedy = "name a ckpt.pt of nanoGPT's form"
        if "step" in foreign:
            remedy = "it is this project's, resume it or start new from it with ckpt:PATH"
        raise UserError(f"{path} has no model, model_args and iter_num, as nanoGPT's ckpt.pt has; {remedy}.")
    for key, kind in {"model": dict, "model_args": dict, "iter_num": int, "config": dict, "optimizer": dict}.items():
        if not isinstance(foreign.get(key, kind()), kind):
            raise UserError(f"{path}: its {key} is no {kind.__name__}, as nanoGPT's is; name another checkpoint.")
    weights = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in foreign["model"].items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(".attn.bias")}  # a causal mask
    args = {key: value for key, value in foreign["model_args"].items() if key in (*MODEL_SETTINGS, "vocab_size")}
    official = "scale_attn_by_inverse_layer_idx" in args  # its model has the tanh GELU, nanoGPT's the exact one
    args |= {"bias": "transformer.ln_f.bias" in weights, "gelu": "tanh" if official else "exact"}
    check_weights(weights, args, path)
    with restoring(path, "optimizer's state"):
        optimizer = _named_states(foreign.get("optimizer"), weights, path)
    return {
        "model": weights,
        "model_args": dataclasses.asdict(GPTConfig(**args)),
        "step": foreign["iter_num"],
        "config": foreign.get("config", {}),
        "optimizer": optimizer,
    }


def _named_states(optimizer, weights, path):
    """(optimizer_name, {parameter name: state}) of an optimizer's state_dict, which knows parameters only by number.

    nanoGPT numbers all matrices with the embeddings, then all vectors, each in the model's order. The official
    repository and early nanoGPT number the Linear layers' weights, then all others, each sorted by name.
    """
    if not optimizer or not optimizer.get("state"):
        return None
    names = [name for name in weights if name != "lm_head.weight"]  # tied: it counts once, as wte
    matrices = [name for name in names if weights[name].dim() > 1]
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    if len(optimizer["param_groups"][0]["params"]) != len(matrices):
        names, matrices = sorted(names), sorted(set(matrices) - set(EMBEDDINGS))
    order = matrices + [name for name in names if name not in matrices]
    states = {name: optimizer["state"].get(number, {}) for name, number in zip(order, numbers, strict=False)}
    for name in order:
        state = states.get(name, {})
        if {value.shape for key, value in state.items() if key != "step"} != {weights[name].shape}:
            problem = f"its optimizer's state is in an order not known here, it does not fit {name}"
            raise UserError(f'{path}: {problem}; remove its "optimizer" to start from the weights alone.')
    return optimizer_of_state(state) or "optimizer", states
