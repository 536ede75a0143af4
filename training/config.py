"""Settings: a typed dataclass per script, config files of plain assignments, `--key=value` on the command line.

    config = load_config(SophiaConfig, ["config/train_gpt2_small_sophiag.py", "--batch_size=8"])

The last argument wins. A config file is Python and is executed: give only files that you trust.
"""

import dataclasses
import difflib
import inspect
import operator
import os
import runpy
import sys
import types
import typing
from dataclasses import dataclass

from training.errors import UserError
from training.foreign import read_bytes
from training.schedule import SCHEDULES, TO_ZERO, learning_rate, period, stages
from training.terminal import warn_once

ALIASES = {"interval": "hess_interval"}  # the official repository writes it this way
# Settings of older versions, off by default, and files of config/: what somebody is told who still uses them.
REMOVED = dict.fromkeys(
    ("eigenbasis", "spectral", *(f"train_gpt2_30m_sophiag_{name}.py" for name in ("eigenbasis", "spectral", "tuned"))),
    "was replaced by whitened_muon (train_adam.py) and sophia_muon (train_sophiag.py); commit efa612d still has it",
)
PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "hf:DIR", "import:PATH", "ckpt:PATH")
STARTS = ("scratch", "resume", "auto", *PRETRAINED)
MUON = ("optimizer_name", ("muon", "whitened_muon", "sophia_muon"))
WHITENED = ("optimizer_name", ("whitened_muon", "sophia_muon"))
WITH_BETAS = ("optimizer_name", ("adamw", "nadamw", "lion", "soap", *MUON[1], "sophiag", "sophiah"))
WSD = ("lr_schedule", ("wsd", "wsd_sqrt"))
RESTARTS = ("lr_schedule", ("cosine_restarts",))
FALLS = ("lr_schedule", tuple(name for name in SCHEDULES if name != "constant"))
DECAYS, SPLIT = ("decay_lr", (True,)), ("fsdp", (True,))
CHECKPOINT = "which checkpoint --init_from=resume takes: newest, best (lowest val/loss), a STEP, or a PATH"


def setting(default, help, **limits):
    """A dataclass field with its help and limits: choices=(...), at_least=, above=, at_most=, below=.

    words: values that are no numbers. former: {value of older versions: value of now}; both are accepted.
    needs: (another setting, its values with which this one is read). elsewhere: (another script, its values).
    """
    return dataclasses.field(default=default, metadata={"help": help, **limits})


class Given:
    """Slots, which are not in vars() of a config.

    given: names of the settings that the command line gave.
    new_from: init_from; for auto the value before it, such as a config file's, with which a run starts new.
    """

    __slots__ = ("given", "new_from")


@dataclass
class TrainConfig(Given):
    """The settings of every training run. Their names are nanoGPT's and the official Sophia repository's."""

    out_dir: str = setting("out", "folder of the run: checkpoints, metrics.jsonl, config.json")
    init_from: str = setting(
        "scratch",
        "start new (scratch), go on (resume), either (auto), or start from other weights; auto over a config file's "
        "weights starts from these",
        choices=STARTS,
    )
    checkpoint: str = setting("newest", CHECKPOINT)
    max_skipped: int = setting(20, "stop after this many non-finite steps, or estimates, in a row", at_least=1)
    overwrite: bool = setting(False, "start new even if out_dir holds a run, and remove that run's files")
    seed: int = setting(1337, "seed of weights, data order, dropout and sampled labels", at_least=0, below=2**31)

    dataset: str = setting("openwebtext", "folder under data/ (or its path), or a mixture: NAME:SHARE,NAME:SHARE")
    total_bs: int = setting(480, "sequences in one optimizer step, over all ranks", at_least=1)
    batch_size: int = setting(12, "sequences in a rank's forward pass; auto: what fits", at_least=1, words=("auto",))
    gradient_accumulation_steps: int | None = setting(None, "derived: total_bs / (batch_size * ranks)", at_least=1)
    block_size: int = setting(1024, "tokens in a sequence", at_least=1)
    block_size_schedule: str = setting("", "sequence length from a step on: STEP:LENGTH,...; a step keeps its tokens")

    n_layer: int = setting(12, "transformer blocks", at_least=1)
    n_head: int = setting(12, "attention heads in a block", at_least=1)
    n_embd: int = setting(768, "width; divisible by n_head", at_least=1)
    dropout: float = setting(0.0, "dropout probability", at_least=0.0, below=1.0)
    bias: bool = setting(False, "biases in Linear and LayerNorm, as in OpenAI's GPT-2")
    scale_attn_by_inverse_layer_idx: bool = setting(False, "divide attention scores of block i by i + 1 (i from 0)")
    gelu: str = setting("tanh", "GELU: GPT-2's tanh approximation, or exact as in nanoGPT", choices=("tanh", "exact"))
    norm: str = setting("layernorm", "which normalization", choices=("layernorm", "rmsnorm"))
    norm_eps: float = setting(1e-5, "added to the variance in every norm", above=0.0)
    position: str = setting("learned", "learned position embeddings, or rotary (rope)", choices=("learned", "rope"))
    rope_base: float = setting(10000.0, "rope: base of the frequencies", above=0.0)
    rope_dim: int = setting(0, "rope: number of rotated coordinates in each head; 0: all", at_least=0)
    n_kv_head: int = setting(0, "number of key/value heads (GQA); 0: n_head", at_least=0)
    mlp: str = setting("gelu", "activation of the MLP", choices=("gelu", "swiglu", "relu2"))
    mlp_hidden: int = setting(
        0, "width of the MLP; 0: 4 n_embd; for swiglu 8/3 n_embd, rounded up to a multiple of 64", at_least=0
    )
    qk_norm: bool = setting(False, "RMSNorm of every query and key, as in Qwen3")
    tie_embeddings: bool = setting(True, "input embedding and output matrix are one matrix")
    parallel_block: bool = setting(False, "attention and MLP both read the block's input, as in GPT-NeoX")

    optimizer_name: str = setting("", "which optimizer")
    learning_rate: float = setting(6e-4, "peak learning rate", at_least=0.0)
    embedding_lr: float | None = setting(None, "peak learning rate of the embeddings; default learning_rate", above=0.0)
    weight_decay: float = setting(0.1, "weight decay of the Linear weights; decoupled, except for sgd", at_least=0.0)
    beta1: float = setting(0.9, "decay of the gradient average", at_least=0.0, below=1.0, needs=WITH_BETAS)
    beta2: float = setting(0.95, "decay of the second-moment average", at_least=0.0, below=1.0, needs=WITH_BETAS)
    grad_clip: float = setting(1.0, "largest global gradient norm; 0 turns clipping off", at_least=0.0)

    cautious_decay: bool = setting(False, "weight decay only where the update moves towards 0", needs=MUON)
    muon_steps: str = setting(
        "jordan", "Newton-Schulz: K. Jordan's, or Polar Express (minimax)", choices=("jordan", "minimax"), needs=MUON
    )
    whiten_sides: str = setting("both", "sides that are whitened", choices=("input", "output", "both"), needs=WHITENED)
    whiten_exponent: float = setting(0.125, "power of the inverse factors; 0: muon", at_least=0.0, needs=WHITENED)
    whiten_ridge: float = setting(0.01, "added to a factor, times its mean eigenvalue", at_least=0.0, needs=WHITENED)
    whiten_decay: float = setting(0.95, "decay of the factors' averages", at_least=0.0, below=1.0, needs=WHITENED)
    whiten_interval: int = setting(
        10, "steps between updates of the factors' roots", at_least=1, needs=("optimizer_name", ("whitened_muon",))
    )
    whiten_max_width: int | None = setting(None, "wider sides are whitened in blocks", at_least=1, needs=WHITENED)

    max_iters: int = setting(100_000, "optimizer steps in the run", at_least=1)
    decay_lr: bool = setting(True, "warm-up and lr_schedule; False: learning_rate throughout")
    lr_schedule: str = setting("cosine", "how the learning rate falls after warm-up", choices=SCHEDULES, needs=DECAYS)
    warmup_iters: int = setting(2000, "steps of linear warm-up", at_least=0)
    lr_decay_iters: int | None = setting(None, "step where the decay ends; default max_iters", at_least=1, needs=FALLS)
    min_lr: float | None = setting(
        None, "final learning rate; default learning_rate / 20, 0 for linear and wsd*", at_least=0.0, needs=FALLS
    )
    wsd_decay: float = setting(0.2, "last share of lr_decay_iters, the decay", above=0.0, at_most=1.0, needs=WSD)
    restart_iters: int | None = setting(None, "steps of the first period, torch's T_0", at_least=1, needs=RESTARTS)
    restart_multiplier: float = setting(2.0, "each period over the last, torch's T_mult", at_least=1.0, needs=RESTARTS)

    eval_interval: int = setting(1000, "steps between evaluations", at_least=1)
    eval_tokens: int = setting(2**21, "tokens of val.bin in an evaluation; a smaller one is used in full", at_least=1)
    eval_iters: int | None = setting(None, "sets eval_tokens to eval_iters * batch_size * block_size", at_least=1)
    eval_only: bool = setting(False, "evaluate once and stop")
    log_interval: int = setting(10, "steps between lines of metrics", at_least=1)
    always_save_checkpoint: bool = setting(True, "checkpoint at every evaluation; False: only at a new best val/loss")
    keep_checkpoints: int = setting(0, "how many ckpt_STEP.pt to keep beside ckpt.pt and ckpt_prev.pt", at_least=0)

    wandb_log: bool = setting(False, "log to Weights & Biases too")
    wandb_project: str = setting("sophia", "Weights & Biases project")
    wandb_run_name: str = setting("", "Weights & Biases run name; default: the last part of out_dir")

    device: str = setting("auto", "auto (the first available of cuda, mps, cpu), cuda, cuda:1, mps, cpu")
    dtype: str = setting(
        "auto",
        "autocast type; auto: bfloat16, float16 on GPUs without bfloat16, float32 without a GPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    compile: bool = setting(False, "torch.compile the model")
    fp8: bool = setting(False, "Linear layers in FP8 (package torchao; an H100, L40S or newer), best with compile")
    fp8_loss: bool = setting(
        False, "output matrix and loss in FP8 (Hopper GPUs, micro-batches of 8,192 tokens or more)"
    )
    activation_checkpointing: bool = setting(False, "keep only each block's input and recompute the rest: less memory")
    fsdp: bool = setting(False, "split the model and its optimizer over the ranks (FSDP2), instead of copies")
    fsdp_shard: int | None = setting(None, "ranks over which one copy is split; default all", at_least=1, needs=SPLIT)
    fsdp_keep: str = setting(
        "gradients", "what is kept complete between micro-batches", choices=("nothing", "gradients", "all"), needs=SPLIT
    )
    backend: str = setting("auto", "of the ranks; auto: nccl on cuda, else gloo", choices=("auto", "nccl", "gloo"))
    nccl_timeout: int = setting(600, "seconds that a rank waits for the others", at_least=1, at_most=10**6)

    def check(self):
        """Raise UserError if settings contradict each other; fill in those that follow from others."""
        ModelSource.check(self)
        model_config(self)
        if self.lr_decay_iters is None:
            self.lr_decay_iters = self.max_iters
        if self.min_lr is None:
            self.min_lr = 0.0 if self.lr_schedule in TO_ZERO else self.learning_rate / 20
        if self.decay_lr and self.warmup_iters > self.lr_decay_iters:
            beyond = f"warmup_iters = {self.warmup_iters} is beyond lr_decay_iters = {self.lr_decay_iters}"
            raise UserError(f"{beyond}; shorten the warm-up, or train for more steps.")
        if self.decay_lr and self.lr_schedule == "cosine_restarts" and self.restart_iters is None:
            raise UserError("lr_schedule = 'cosine_restarts' needs --restart_iters, the steps of the first period.")
        if self.decay_lr and self.lr_schedule == "cosine_restarts" and self.lr_decay_iters > self.warmup_iters:
            start, length = period(self.lr_decay_iters - 1, self)
            if self.lr_decay_iters < (end := round(start + length)):
                cut = f"lr_decay_iters = {self.lr_decay_iters} cuts off the last period of cosine_restarts"
                rate = f"at a learning rate of {learning_rate(self.lr_decay_iters - 1, self):.3g}"
                warn_once(f"{cut}, {rate}; complete periods end at steps {start:.0f} and {end}.")
        if self.min_lr > self.learning_rate:
            raise UserError(f"min_lr = {self.min_lr} is above learning_rate = {self.learning_rate}; lower it.")
        if self.embedding_lr and not self.learning_rate:
            raise UserError("embedding_lr is kept as a multiple of learning_rate, which is 0; raise learning_rate.")
        for name in ("fp8", "fp8_loss"):
            if getattr(self, name) and self.dtype not in ("auto", "bfloat16"):
                raise UserError(f"{name} needs dtype = 'bfloat16', not {self.dtype!r}; change it, or leave {name} out.")
        if self.fp8_loss and self.fsdp:
            raise UserError("fp8_loss needs the complete output matrix, and fsdp splits it; leave one of the two out.")
        starts = {"block_size_schedule": stages(self)[-1][0]} | {
            "sophia_start_iter": getattr(self, "sophia_start_iter", 0)
        }
        if self.decay_lr and self.lr_schedule != "constant" and "lr_decay_iters" not in getattr(self, "given", ()):
            starts["lr_decay_iters"] = self.lr_decay_iters - 1  # of a config file, perhaps for other max_iters
        if late := [name for name, step in starts.items() if step >= self.max_iters]:
            end = f"the run ends at max_iters = {self.max_iters}"
            warn_once(f"{end}, before the last change by {late[0]}, at step {starts[late[0]]}.")
        for name in ("fsdp", "eval_iters", "gradient_accumulation_steps"):
            if self.batch_size == "auto" and getattr(self, name):
                raise UserError(f"{name} = {getattr(self, name)} does not go with batch_size = 'auto'; give a number.")
        if self.eval_iters is not None:
            if "eval_tokens" in getattr(self, "given", ()):
                both = f"eval_tokens = {self.eval_tokens} and eval_iters = {self.eval_iters} both set the evaluation"
                raise UserError(f"{both}; leave one of them out, or add --eval_iters=None.")
            self.eval_tokens = self.eval_iters * self.batch_size * self.block_size


def model_config(config, vocab_size=1):
    """The GPTConfig of a run's settings. UserError for a model that cannot be."""
    from model import GPTConfig  # imports torch, which takes seconds

    shape = {field.name: getattr(config, field.name, vocab_size) for field in dataclasses.fields(GPTConfig)}
    try:
        return GPTConfig(**shape)
    except ValueError as error:
        raise UserError(f"{error}.") from None


@dataclass
class ModelSource:
    """The settings of a script that reads a model."""

    out_dir: str = setting("out", "folder of the run whose checkpoint is read")
    init_from: str = setting("resume", "the run in out_dir, or weights from elsewhere", choices=("resume", *PRETRAINED))
    checkpoint: str = setting("newest", CHECKPOINT)

    def check(self):
        """UserError if no folder is named, a checkpoint would not be read, or a ModelSource's script has several ranks.

        A shell leaves --key=~ as it is.
        """
        self.out_dir, self.checkpoint = map(os.path.expanduser, (self.out_dir, self.checkpoint))
        for name in ("init_from", "new_from"):
            setattr(self, name, ":".join(map(os.path.expanduser, getattr(self, name, "").split(":", 1))))
        if not self.out_dir:  # it would be the working directory
            raise UserError("out_dir = '': name a folder.")
        if isinstance(self, ModelSource) and "RANK" in os.environ and os.environ.get("WORLD_SIZE") != "1":
            raise UserError("this script works in one process; start it without torchrun.")
        if self.checkpoint != "newest" and self.init_from != "resume":
            needs = f"checkpoint = {self.checkpoint!r} needs init_from = 'resume', not {self.init_from!r}"
            remedy = "use --init_from=resume to go on from it, or ckpt:PATH to start new from its weights"
            raise UserError(f"{needs}; {remedy}.")


def load_config(cls, argv=None):
    """Build a `cls` from command-line arguments: config files and `--key=value`, in order; by default the process's.

    `--help` prints the settings and exits with 0. Raises UserError for an unknown key, a wrong type, an impossible
    value, or a file that cannot be run.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(f"{sys.modules[cls.__module__].__doc__ or ''}\nsettings (--key=value, or key = value in a config file):")
        for name, kind, default, help in describe(cls):
            print(f"  {name:<32}{kind:<6} {default:<14} {help}")
        sys.exit(0)
    values, on_command_line, new_from = {}, set(), "scratch"
    for argument in argv:
        key, equals, text = argument[2:].partition("=")
        if not argument.startswith("--"):
            found = run_config_file(cls, argument)
            for name in on_command_line & found.keys():
                if found[name] != values[name]:
                    later = f"{argument} comes after --{name}={values[name]} and sets it to {found[name]!r}"
                    warn_once(f"{later}; give config files first.")
            on_command_line -= found.keys()
            values |= found
        elif _is_removed(key, text, "the command line"):
            continue
        elif not equals:
            raise UserError(f"{argument}: write it as --{key}=VALUE.")
        else:
            field = _field(cls, key, "the command line")
            values[field.name] = _parse(field, text)
            on_command_line.add(field.name)
        if values.get("init_from") not in (None, "auto", "resume"):
            new_from = values["init_from"]
    config = cls(**with_current_values(cls, values))
    config.given, config.new_from = on_command_line, new_from if config.init_from == "auto" else config.init_from
    for field in dataclasses.fields(cls):
        _check_limits(field, getattr(config, field.name))
    config.check()
    _check_read(config, values, on_command_line)
    return config


def _check_read(config, values, on_command_line):
    """Refuse settings of the command line that this run would not read; warn of those in a config file."""
    unread = []
    for field in dataclasses.fields(config):
        name, allowed = _unmet(config, field)
        if name is None or values.get(field.name, field.default) == field.default:
            continue
        if field.name in on_command_line:
            unread_here = f"{field.name} = {values[field.name]!r} has no effect with {name} = {getattr(config, name)!r}"
            choices = _field(type(config), name, "").metadata.get("choices", allowed)
            reads = " or ".join(repr(value) for value in allowed if value in choices)
            raise UserError(f"{unread_here}; leave it out{reads and f', or set {name} to {reads}'}.")
        unread.append(field.name)
    if unread:
        warn_once(f"some settings of the config files have no effect in this run: {', '.join(unread)}.")


def _unmet(config, field):
    """What `field` needs, itself or by the setting that it needs, and this run has not; (None, ()) if it is read."""
    name, allowed = field.metadata.get("needs", (None, ()))
    if name is None or getattr(config, name) not in allowed:
        return name, allowed
    return _unmet(config, config.__dataclass_fields__[name])


def with_current_values(cls, settings, where=""):
    """`settings`, a dict, with the values that older versions wrote replaced by those of now.

    UserError for a value of another type than the setting's, and for one of REMOVED that is on; it says `where`.
    """
    current = {name: value for name, value in settings.items() if not _is_removed(name, value, where)}
    for field in dataclasses.fields(cls):
        if field.name in current:
            value = current[field.name]
            current[field.name] = _convert(field, field.metadata.get("former", {}).get(value, value), where)
            if where:
                _check_limits(field, current[field.name], {"at_least", "above", "at_most", "below"}, f"{where}: ")
    return current


def _is_removed(name, value, where):
    """Whether the setting is one of REMOVED. UserError if it is on."""
    if name in REMOVED and value not in (False, "False", "false"):
        raise UserError(f"{where}: {name} {REMOVED[name]}.")
    return name in REMOVED


def describe(cls):
    """Yield every setting of `cls` as (name, type, default, help with its limits), for --help and docs/settings.md."""
    for field in dataclasses.fields(cls):
        default = "" if field.default in (None, "") else str(field.default)
        name, values = field.metadata.get("needs", ("", ()))
        needs = f"with {name} {' or '.join(map(str, values))}" if name else ""
        limits = "; ".join(filter(None, [_allowed(field), needs]))
        yield field.name, _kind(field)[0].__name__, default, field.metadata["help"] + (f" ({limits})" if limits else "")


def run_config_file(cls, path):
    """The settings that a config file assigns. Imports, functions and names with a leading underscore are left out.

    A warning where it assigns none, as a JSON file; UserError for `key: value`, as in YAML, which assigns nothing.
    """
    values, names = {}, run_file(path, runpy.run_path, path)
    for key, value in names.items():
        known = key in cls.__dataclass_fields__
        own = not (key.startswith("_") or isinstance(value, types.ModuleType) or callable(value)) or known
        if own and not _is_removed(key, value, path):
            field = _field(cls, key, path)
            values[field.name] = _convert(field, value, path)
    if left := [key for key in names.get("__annotations__", {}) if key not in names]:
        raise UserError(f"{path}: {left[0]}: assigns nothing, a config file is Python; write {left[0]} = ...")
    if not values:
        warn_once(f"{path} assigns no setting; a config file is Python, with lines such as batch_size = 8.")
    return values


def run_file(path, function, *arguments, **options):
    """The result of `function`, which runs code of the file `path`: its exceptions become UserErrors."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, not a file with settings; a setting is --key=value.")
    try:
        read_bytes(path, 1 << 24)
    except OSError as error:
        _is_removed(os.path.basename(path), True, path)
        raise UserError(f"{path}: cannot read this file ({error.strerror}); settings are --key=value.") from None
    try:
        return function(*arguments, **options)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: running this file raised {type(error).__name__}: {error}; correct it.") from None


def _field(cls, key, where):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    key = ALIASES.get(key, key)
    if key not in fields:
        script = os.path.basename(inspect.getfile(cls))
        near = [f"the nearest is {name!r}; " for name in difflib.get_close_matches(key, fields, n=1, cutoff=0.5)]
        raise UserError(f"{where}: {script} has no setting {key!r}; {''.join(near)}its --help lists all.")
    return fields[key]


def _kind(field):
    """(type, whether None is allowed) of a field annotated `T` or `T | None`."""
    if isinstance(field.type, types.UnionType):
        return next(kind for kind in typing.get_args(field.type) if kind is not types.NoneType), True
    return field.type, False


def _parse(field, text):
    """The value that a command-line argument gives."""
    kind, optional = _kind(field)
    if optional and text == "None":
        return None
    if text in field.metadata.get("words", ()):
        return text
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UserError(f"--{field.name}={text:.80}: wants True or False.")
    try:
        return kind(text)
    except ValueError:
        wants = "a whole number" if kind is int else "a number"
        raise UserError(f"--{field.name}={text:.80}: wants {wants}.") from None


def _convert(field, value, where=""):
    """The value that the file `where` gives; an int is accepted for a float."""
    where = where and f"{where}: "
    kind, optional = _kind(field)
    if (value is None and optional) or value in field.metadata.get("words", ()):
        return value
    if type(value) is int and abs(value) >= 2**63:
        raise UserError(f"{where}{field.name} is a number of {value.bit_length()} bits; use one below 2**63.")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{where}{field.name} = {value!r}: wants {kind.__name__}, got {type(value).__name__}.")
    if kind is str and "\0" in value:
        raise UserError(f"{where}{field.name} = {value!r:.80}: a name cannot hold the character \\0.")
    return value


_LIMITS = {
    "at_least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "at_most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
    "choices": (lambda value, limit: _kind_of(value) in [_kind_of(choice) for choice in limit], "one of"),
}


def _kind_of(choice):
    """A choice as it is compared: "hf:DIR" and every value that starts with "hf:" and goes on are the same."""
    head, _, rest = choice.partition(":")
    return f"{head}:..." if rest else choice


def _allowed(field):
    limits = [(relation, field.metadata[key]) for key, (_, relation) in _LIMITS.items() if key in field.metadata]
    parts = [f"{relation} {', '.join(limit) if isinstance(limit, tuple) else limit}" for relation, limit in limits]
    return ", ".join([*parts, *field.metadata.get("words", ())])


def _check_limits(field, value, which=_LIMITS, where=""):
    if value is None or value in field.metadata.get("words", ()):
        return
    finite = not isinstance(value, float) or abs(value) < float("inf")  # false for NaN too
    for key in which:
        if not finite or (key in field.metadata and not _LIMITS[key][0](value, field.metadata[key])):
            script, values = field.metadata.get("elsewhere", ("", ()))
            elsewhere = f"; {script} has it" if value in values else ""
            possible = f"{_allowed(field) or 'a finite number'}{elsewhere}"
            raise UserError(f"{where}{field.name} = {value!r} is not possible: {possible}.")
