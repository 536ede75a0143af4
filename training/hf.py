"""Import and export weights: Hugging Face's GPT-2, Llama, Qwen3 and GPT-NeoX; import a ckpt.pt of nanoGPT or Sophia.

model, tokenizer, settings = load_model("gpt2-medium", out_dir=None)   # or "hf:DIR", "import:PATH", "ckpt:PATH"
model, tokenizer, settings = load_model("resume", out_dir="out/run")   # the run's own checkpoint
checkpoint = start_from(config)                                        # to train on from config.init_from
to_hf(model).save_pretrained("exported")                               # the class of FAMILIES that the model is
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from model import EMBEDDINGS, GPT, GPTConfig
from training.checkpoint import MANIFEST, load_checkpoint, read_checkpoint
from training.data import GPT2_VOCAB_SIZE
from training.errors import UserError
from training.foreign import Checkpoint, check_weights, load_tensors, read_json, restoring
from training.optimizers import optimizer_of_state
from training.tokenizer import get_tokenizer, read_tokenizer_json, same

MODEL_SETTINGS = [field.name for field in dataclasses.fields(GPTConfig) if field.name not in ("vocab_size", "dropout")]
OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Hugging Face's GPT-2 keeps these transposed, (in, out)


# ----- families of Hugging Face


@dataclass(frozen=True)
class Family:
    """A kind of model that Hugging Face and GPT both have.

    name: of its class, less "LMHeadModel" or "ForCausalLM".
    kind: {setting of GPTConfig: the value that makes it this family}.
    keys: {setting of GPTConfig: the key of the family's config with that meaning}.
    fixed: {key of its config: the only value that GPT can be}.
    act: the key of its activation.
    blocks, modules: where its blocks are; {module of GPT: its modules, several where GPT's is fused}.
    """

    name: str
    kind: dict
    keys: dict
    fixed: dict = field(default_factory=dict)
    act: str = "hidden_act"
    blocks: str = "model.layers"
    modules: dict = field(default_factory=dict)

    @property
    def cls(self):
        import transformers

        return getattr(transformers, self.name + ("LMHeadModel" if self.name == "GPT2" else "ForCausalLM"))

    def names(self, name):
        """Hugging Face's names of GPT's tensor `name`."""
        module, _, kind = name.rpartition(".")
        inside, layer = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", module), ""
        if inside:
            layer, module = f"{self.blocks}.{inside[1]}.", inside[2]
        return [f"{layer}{their}.{kind}" for their in self.modules.get(module, module).split()]

    def arranged(self, name, tensor, config, back=False):
        """GPT's tensor `name` as this family arranges it; back: the reverse."""
        if self.name == "GPT2" and name.endswith(CONV1D):
            return tensor.t()
        if self.name == "GPTNeoX" and "attn.c_attn" in name:  # query, key and value of the first head, of the second
            parts = (config.n_head, 3) if back else (3, config.n_head)
            return tensor.unflatten(0, (*parts, config.head_dim)).transpose(0, 1).flatten(0, 2)
        return tensor

    def misfits(self, config):
        """The settings of a GPTConfig that this family cannot have."""
        wanted = {"n_kv_head": config.n_head, "scale_attn_by_inverse_layer_idx": False, "rope_dim": config.head_dim}
        wanted = {name: value for name, value in wanted.items() if name not in self.keys}
        if config.position == "learned" or self.name == "GPTNeoX":
            del wanted["rope_dim"]
        return [name for name, value in (wanted | self.kind).items() if getattr(config, name) != value]


SHAPE = {
    "block_size": "max_position_embeddings", "vocab_size": "vocab_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_embd": "hidden_size", "mlp_hidden": "intermediate_size",
    "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip
LLAMA_KIND = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "qk_norm": False, "parallel_block": False}
LLAMA_KEYS = SHAPE | {"n_kv_head": "num_key_value_heads", "norm_eps": "rms_norm_eps"}
LLAMA_MODULES = {
    "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm", "attn.c_attn": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
    "mlp.c_fc": "mlp.gate_proj mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip
FAMILIES = {
    "gpt2": Family(
        "GPT2",
        {"norm": "layernorm", "position": "learned", "mlp": "gelu", "qk_norm": False, "parallel_block": False},
        {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd", "scale_attn_by_inverse_layer_idx")}
        | {"block_size": "n_positions", "mlp_hidden": "n_inner", "norm_eps": "layer_norm_epsilon"}
        | {"tie_embeddings": "tie_word_embeddings"},
        {"scale_attn_weights": True, "add_cross_attention": False, "reorder_and_upcast_attn": False},
        act="activation_function",
        blocks="transformer.h",
    ),
    "llama": Family("Llama", LLAMA_KIND, LLAMA_KEYS, modules=LLAMA_MODULES),
    "qwen3": Family(
        "Qwen3",
        LLAMA_KIND | {"qk_norm": True, "bias": False},
        LLAMA_KEYS,
        {"attention_bias": False, "use_sliding_window": False},
        modules=LLAMA_MODULES,
    ),
    "gpt_neox": Family(
        "GPTNeoX",
        {"norm": "layernorm", "position": "rope", "mlp": "gelu", "qk_norm": False},
        SHAPE | {"norm_eps": "layer_norm_eps", "parallel_block": "use_parallel_residual"},
        blocks="gpt_neox.layers",
        modules={
            "transformer.wte": "gpt_neox.embed_in", "transformer.ln_f": "gpt_neox.final_layer_norm",
            "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_attn": "attention.query_key_value",
            "attn.c_proj": "attention.dense", "mlp.c_fc": "mlp.dense_h_to_4h", "mlp.c_proj": "mlp.dense_4h_to_h",
        },
    ),
}  # fmt: skip


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
    """(model on the CPU, its tokenizer, the settings and facts of its training or {}).

    Raises UserError if there is nothing to load, or if model and tokenizer do not fit.
    """
    if init_from == "resume":
        checkpoint, origin = load_checkpoint(out_dir, which, parts=("model",))
    else:
        checkpoint, origin = load_pretrained(init_from), init_from
    rows = checkpoint["model_args"]["vocab_size"]
    if checkpoint["tokenizer"] is None and init_from != "resume":
        remedy = "a Hugging Face folder says it by its tokenizer.json"
        raise UserError(f"{origin}: it does not say what its {rows} tokens are, and they are not GPT-2's; {remedy}.")
    tokenizer = get_tokenizer(checkpoint["tokenizer"], vocab_size=rows)
    if tokenizer.vocab_size > rows:
        problem = f"{origin}: its model has {rows} tokens and its tokenizer {tokenizer.vocab_size}"
        raise UserError(f"{problem}; train with data whose meta.json names the tokenizer that made it.")
    with torch.device("meta"):
        model = GPT(GPTConfig(**checkpoint["model_args"]))
    about = checkpoint.get("config", {}) | checkpoint.get("facts", {})
    return assign(model, checkpoint["model"], torch.float32), tokenizer, about


@quiet()
def from_pretrained(name):
    """The GPT with OpenAI's weights. transformers downloads them at the first use, then reads its cache.

    ValueError for an unknown name, and where the weights can neither be found nor downloaded.
    """
    if name not in OPENAI:
        raise ValueError(f"no pretrained model is called {name!r}, choose one of {', '.join(OPENAI)}")
    from transformers import GPT2LMHeadModel

    try:
        return from_hf(GPT2LMHeadModel.from_pretrained(name))
    except OSError as error:
        missing = f"the weights of {name} are neither in Hugging Face's cache (HF_HOME) nor downloadable now"
        raise ValueError(f"{missing}: run this once with access to huggingface.co") from error


@quiet()
def from_hf(hf_model):
    """A GPT with float32 copies of the weights of a model of transformers, whose class is one of FAMILIES.

    Where only some of its layers have biases, the others get zeros, which is the same function. ValueError names the
    key of hf_model's config that GPT cannot be.
    """
    family = next((family for family in FAMILIES.values() if isinstance(hf_model, family.cls)), None)
    if family is None:
        known = ", ".join(family.cls.__name__ for family in FAMILIES.values())
        raise ValueError(f"from_hf takes one of {known}, got a {type(hf_model).__name__}")
    config = _config_from_hf(family, hf_model.config)
    # Its config may say something else: transformers does not tie two matrices that a file holds and that differ.
    config.tie_embeddings = hf_model.get_input_embeddings().weight is hf_model.get_output_embeddings().weight
    with torch.device("meta"):
        model = GPT(config)
    theirs, weights = hf_model.state_dict(), {}
    for name, tensor in model.state_dict().items():
        parts = [theirs[their] for their in family.names(name) if their in theirs] or [torch.zeros(tensor.shape)]
        weights[name] = family.arranged(name, torch.cat(parts), config, back=True)
    return assign(model, weights, torch.float32)


def _config_from_hf(family, hf):
    """The GPTConfig of a config of transformers."""
    settings = family.kind | {ours: getattr(hf, theirs) for ours, theirs in family.keys.items()}
    settings["bias"] = family.kind.get("bias", family.name != "Llama" or hf.attention_bias or hf.mlp_bias)
    activations = {"silu": {}} if family.kind["mlp"] == "swiglu" else {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh",
                                                                     "gelu": "exact"}  # fmt: skip
    allowed = {family.act: tuple(activations), "quantization_config": (None,)}
    allowed |= {key: (value,) for key, value in family.fixed.items()}
    if family.kind["position"] == "rope":
        rope, width = hf.rope_parameters, settings["n_embd"] // settings["n_head"]
        if rope["rope_type"] != "default":
            raise ValueError(f"the Hugging Face model has rope_parameters={rope}, GPT only the rope_type 'default'")
        allowed |= {"head_dim": (None, width), "layer_types": (None, ["full_attention"] * settings["n_layer"])}
        settings["rope_base"] = float(rope["rope_theta"])
        if family.name == "GPTNeoX":
            settings["rope_dim"] = int(width * rope.get("partial_rotary_factor", 1.0))
            if not settings["rope_dim"]:  # for GPTConfig 0 means all
                raise ValueError(f"the Hugging Face model has rope_parameters={rope}, which rotates nothing")
    for key, values in allowed.items():
        if (value := getattr(hf, key, None)) not in values:
            expected = " or ".join(repr(value) for value in values if value is not None) or None
            raise ValueError(f"the Hugging Face model has {key}={value!r}, GPT can only be {expected}")
    if family.kind["mlp"] == "gelu":
        settings["gelu"] = activations[getattr(hf, family.act)]
    return GPTConfig(**{name: 0 if value is None else value for name, value in settings.items()})


@quiet()
def to_hf(model, vocab_size=None, end_of_text=None):
    """A copy of a GPT as a model of transformers, in eval mode: of the family in FAMILIES that has its settings.

    vocab_size: cut the rows beyond it, which pad the vocabulary (50257 for GPT-2's tokenizer); None keeps them.
    end_of_text: the token at which its `generate` stops (50256 for GPT-2's tokenizer); None: there is none.
    A model without biases gets zeros where the family has them, which is the same function.
    ValueError names the settings that no family has.
    """
    config = model.config
    vocab_size = vocab_size or config.vocab_size
    if vocab_size > config.vocab_size:
        raise ValueError(f"vocab_size={vocab_size} is more than the {config.vocab_size} tokens of the model")
    family = min(FAMILIES.values(), key=lambda family: len(family.misfits(config)))
    if misfits := family.misfits(config):
        settings = ", ".join(f"{name}={getattr(config, name)!r}" for name in misfits)
        raise ValueError(f"Hugging Face has no such model; the nearest, {family.name}, cannot have {settings}")
    with torch.device("meta"):
        hf_model = family.cls(family.cls.config_class(**_settings_for_hf(family, config, vocab_size, end_of_text)))
    if config.position == "rope":  # its frequencies are no weights, and are still on the meta device
        base = hf_model.base_model
        base.rotary_emb = type(base.rotary_emb)(config=hf_model.config)
    device, weights = model.lm_head.weight.device, {}
    shapes = {name: tensor.shape for name, tensor in hf_model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        tensor = tensor[:vocab_size] if name in ("transformer.wte.weight", "lm_head.weight") else tensor
        names = family.names(name)
        rows = [shapes[their][0] for their in names]
        weights |= zip(names, family.arranged(name, tensor, config).split(rows), strict=True)
    weights |= {name: torch.zeros(shape, device=device) for name, shape in shapes.items() if name not in weights}
    return assign(hf_model, weights, model.lm_head.weight.dtype).eval()


def _settings_for_hf(family, config, vocab_size, end_of_text):
    """The arguments of the family's config."""
    settings = {theirs: getattr(config, ours) for ours, theirs in family.keys.items()} | family.fixed
    act = "silu" if config.mlp == "swiglu" else "gelu" if config.gelu == "exact" else "gelu_new"
    settings |= {"vocab_size": vocab_size, family.act: act, "bos_token_id": end_of_text, "eos_token_id": end_of_text}
    if family.name == "GPT2":
        settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    if family.name == "Llama":
        settings |= {"attention_bias": config.bias, "mlp_bias": config.bias}
    if config.position == "rope":
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_base}
        if family.name != "GPTNeoX":
            settings["head_dim"] = config.head_dim
        else:
            share = config.rope_dim / config.head_dim
            while int(config.head_dim * share) < config.rope_dim:  # as transformers rounds
                share = math.nextafter(share, 2)
            settings["rope_parameters"]["partial_rotary_factor"] = share
    return settings


def assign(model, weights, dtype):
    """Give a model that was built on the meta device copies of `weights`, and tie its output matrix if it is tied."""
    copies = {k: v.detach().to(dtype, copy=True, memory_format=torch.contiguous_format) for k, v in weights.items()}
    model.load_state_dict(copies, assign=True)
    if not isinstance(model, GPT):
        model.tie_weights()
    elif model.config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return model


# ----- checkpoints to train on from


def start_from(config):
    """The checkpoint of `config.init_from`, for a run with this config. The config takes on the model's settings.

    An import whose optimizer is the config's goes on at its step with its optimizer state. Everything else gives
    weights for step 0. A smaller block_size forgets the positions beyond it.
    """
    checkpoint = load_pretrained(config.init_from, () if config.fsdp else ("model",))
    args, weights = checkpoint["model_args"], checkpoint["model"]
    args |= dataclasses.asdict(GPTConfig(**args))  # older ones lack the settings of today
    block_size, positions = config.block_size, "transformer.wpe.weight"
    if args["position"] == "learned" and args["block_size"] < block_size:
        most = args["block_size"]
        raise UserError(f"block_size = {block_size} is beyond the {most} positions of {config.init_from}; lower it.")
    name, states = checkpoint["optimizer"] or (None, {})
    continues = name == config.optimizer_name
    if not continues:
        checkpoint.update(step=0, optimizer=None)
    elif checkpoint["step"] >= config.max_iters:
        done = f"the {checkpoint['step']} steps that {config.init_from} has done"
        raise UserError(f"max_iters = {config.max_iters} is not beyond {done}; raise it.")
    if args["position"] == "learned":
        state = {key: value[:block_size] for key, value in states.get(positions, {}).items() if key != "step"}
        states[positions] = states.get(positions, {}) | state
        weights[positions] = weights[positions][:block_size]
    args["block_size"] = block_size
    checkpoint["unused"] = take_model_settings(config, args)
    shape = ", ".join(f"{key} = {args[key]}" for key in MODEL_SETTINGS)
    taken = f"step {checkpoint['step']} with the state of its {name}" if continues else "weights, for step 0"
    left = f" (the state of its {name} is of no use to {config.optimizer_name})" if name and not continues else ""
    checkpoint["summary"] = f"from {config.init_from}: {taken}{left}; {shape}"
    return checkpoint


def take_model_settings(config, args):
    """Give `config` the model settings of a checkpoint's `model_args`, but block_size; return those given in vain."""
    args, defaults = vars(GPTConfig(**args)), {field.name: field.default for field in dataclasses.fields(config)}
    differing = {key: getattr(config, key) for key in MODEL_SETTINGS if getattr(config, key) != args[key]}
    differing.pop("block_size", None)
    vars(config).update({key: args[key] for key in differing})
    given = [key for key in differing if differing[key] != defaults[key] or key in getattr(config, "given", ())]
    return ", ".join(f"{key} = {differing[key]!r}" for key in given)


def sha256_of(checkpoint):
    """The SHA-256 of the weights and optimizer states of a start_from checkpoint."""
    if getattr(checkpoint, "manifest", None):  # the weights are not read yet
        return checkpoint.manifest["sha256"]
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


def load_pretrained(init_from, parts=("model",)):
    """The model of `init_from` in the form of this project's checkpoints.

    parts: as `read_checkpoint` has it, for "ckpt:". Without "model" a folder's weights are left to `set_weights`.
    "optimizer" is None or (its optimizer_name, {parameter name: state}); "tokenizer" is None if it is not known.
    """
    kind, _, path = init_from.partition(":")
    checkpoint = Checkpoint({"step": 0, "optimizer": None, "config": {}}, path)
    if kind == "import":
        checkpoint |= _read_import(path)
    elif kind == "ckpt":
        is_run = Path(path).is_dir() and not (Path(path) / MANIFEST).exists()
        own = load_checkpoint(path, parts=parts)[0] if is_run else read_checkpoint(path, parts=parts)
        checkpoint.path, checkpoint.manifest = own.path, None if parts else own.manifest
        checkpoint |= {key: own[key] for key in ("model", "model_args", "tokenizer", "config")}
    else:
        try:
            model = _read_folder(path) if kind == "hf" else from_pretrained(kind)
        except (ValueError, ImportError) as error:
            raise UserError(f"init_from = {init_from!r}: {str(error).splitlines()[0]}.") from None
        checkpoint |= {"model": model.state_dict(), "model_args": dataclasses.asdict(model.config)}
    rows = checkpoint["model_args"]["vocab_size"]
    checkpoint.setdefault("tokenizer", _find_tokenizer(rows, path if kind == "hf" else ""))
    checkpoint |= {"best_val_loss": float("inf"), "seconds": 0.0, "wandb_id": None}
    return checkpoint


def _find_tokenizer(rows, folder):
    """What a folder's tokenizer.json is. Without one GPT-2's if a model has as many tokens, padded or not; or None."""
    path = Path(folder, "tokenizer.json")
    if not folder or not path.exists():
        return "gpt2" if 0 <= rows - GPT2_VOCAB_SIZE < 1000 else None
    spec = read_tokenizer_json(path)
    try:
        tokenizer = get_tokenizer(spec)
    except UserError as error:
        raise UserError(f"{folder}: {error}; replace or remove it.") from None
    ids, characters = tokenizer.ids, "".join(sorted(tokenizer.ids, key=tokenizer.ids.get))
    if len(characters) == len(ids) == tokenizer.vocab_size and json.loads(spec["json"])["model"]["type"] == "WordLevel":
        return {"characters": characters}
    return "gpt2" if len(ids) == GPT2_VOCAB_SIZE and same(spec, "gpt2") else spec


@quiet()
def _read_folder(path):
    """The GPT of a Hugging Face folder. No code in it is run; transformers' AutoConfig would offer that."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not (Path(path) / "config.json").exists():
        remedy = "name one, or get one from the hub with: hf download NAME --local-dir DIR"
        raise ValueError(f"{path} is no folder with a Hugging Face model, it has no config.json; {remedy}")
    try:
        config = read_json(Path(path) / "config.json")
        model_type = config.get("model_type")
        if model_type not in FAMILIES:
            known = ", ".join(map(repr, FAMILIES))
            raise ValueError(f"{path} holds a model with model_type={model_type!r}, only {known} can be read")
        family = FAMILIES[model_type]
        if (layers := config.get(key := family.keys["n_layer"], 0)) > 10_000:  # transformers would build them all first
            raise ValueError(f"{path} has {key}={layers!r} in its config.json, more than 10,000; is it damaged?")
        options = {"local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        hf_model, info = family.cls.from_pretrained(path, dtype=torch.float32, **options)  # not the config's: it rounds
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # a damaged file can raise nearly anything there
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason})") from None
    if info["missing_keys"]:
        raise ValueError(f"{path} lacks weights, {min(info['missing_keys'])} among them")
    if info["mismatched_keys"]:
        key, found, wanted = min(info["mismatched_keys"])
        shapes = f"{key} is {tuple(found)}, its config.json says {tuple(wanted)}"
        raise ValueError(f"{path} has weights of other shapes: {shapes}; copy both files again")
    extra = [key for key in info["unexpected_keys"] if not key.endswith(".masked_bias")]  # GPT-2's constant, once saved
    if extra:
        raise ValueError(f"{path} has weights that its config.json does not describe, {min(extra)} among them")
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
    ends = [weights.get(name) for name in ("transformer.wte.weight", "lm_head.weight")]
    args["tie_embeddings"] = not all(map(torch.is_tensor, ends)) or torch.equal(*ends)  # old files have two matrices
    check_weights(weights, args, path)
    with restoring(path, "optimizer's state"):
        optimizer = _named_states(foreign.get("optimizer"), weights, args["tie_embeddings"], path)
    return {
        "model": weights,
        "model_args": dataclasses.asdict(GPTConfig(**args)),
        "step": foreign["iter_num"],
        "config": foreign.get("config", {}),
        "optimizer": optimizer,
    }


def _named_states(optimizer, weights, tied, path):
    """(optimizer_name, {parameter name: state}) of an optimizer's state_dict, which knows parameters only by number.

    nanoGPT numbers all matrices with the embeddings, then all vectors, each in the model's order. The official
    repository and early nanoGPT number the Linear layers' weights, then all others, each sorted by name.
    """
    if not optimizer or not optimizer.get("state"):
        return None
    names = [name for name in weights if name != "lm_head.weight" or not tied]  # if tied, it counts once, as wte
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
