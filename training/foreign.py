"""Read files that others wrote: run nothing in them, bound their size and depth, check their types.

meta = read_json("data/mine/meta.json")                           # OSError, ValueError, UserError
checkpoint = checked_checkpoint(load_tensors("ckpt.pt"), "ckpt.pt")
"""

import contextlib
import hashlib
import json
import math
import os
import stat
import warnings

from training.errors import UserError

LARGEST = 1 << 30  # bytes of a file that is read into memory
DEPTH = 32  # lists and objects inside each other
PLAIN = (bool, int, float, str, type(None))


# ----- JSON


def read_bytes(path, most=LARGEST):
    """The content of a file. UserError if it is a folder, a FIFO or larger than `most`; OSError if it is not there."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a file; move it elsewhere.")  # a FIFO would block
    if status.st_size > most:
        raise UserError(f"{path} has {status.st_size:,} bytes, more than the {most:,} that are read; is it damaged?")
    with open(path, "rb") as file:
        return file.read(most)


def read_json(path, most=LARGEST):
    """The content of a JSON file. Raises as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path, most))


def parse_json(text):
    """The value of a JSON text. ValueError where it is none, is nested too deep, or has numbers beyond any float."""
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level = [value]
    for _ in range(DEPTH):
        parts = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        if not (level := [child for part in parts for child in part]):
            return value
    raise ValueError(f"it is nested more than {DEPTH} deep")


def _integer(text):
    if len(text) > 20:
        raise ValueError(f"the number {text[:20]}... is too large")
    return int(text)


def _finite(text):
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def is_plain_name(name):
    """Whether `name` is that of a file or folder, and no path that leads elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def sha256_of_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----- checkpoints


def load_tensors(path, mmap=False):
    """torch.load of tensors and plain values. UserError for any other file; its code is not run.

    mmap: leave the tensors on the disk until they are used.
    """
    import torch

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path} cannot be read (it is not a file).")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mmap = mmap and os.fsencode(path).decode(errors="replace") == str(path)  # torch's C++ wants UTF-8
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        _check_tensors(content)
        return content
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); name another checkpoint.") from None
    except (UserError, MemoryError):
        raise
    except Exception:  # a damaged file can raise nearly anything; torch's text advises to run the file's code
        raise UserError(f"{path} is damaged, or holds more than tensors and values; name another one.") from None


def _check_tensors(thing):
    """ValueError for tensors that hold no plain numbers in memory: sparse, quantized, complex ones, and others."""
    for item in thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ():
        _check_tensors(item)
    if hasattr(thing, "layout"):
        odd = thing.is_quantized or thing.is_complex() or str(thing.layout) != "torch.strided"
        if odd or thing.device.type != "cpu":
            raise ValueError(thing.layout)


class Checkpoint(dict):
    """A run's checkpoint. A key that it lacks is a UserError that names the file. manifest: that of a folder."""

    manifest = None

    def __init__(self, content, path):
        super().__init__(content)
        self.path = path

    def __missing__(self, key):
        raise UserError(f"{self.path} is no checkpoint of this project, it has no {key}; name another one.")


def checked_checkpoint(content, path):
    """`content` as a Checkpoint. UserError where a part is not of its type, or the weights are not the model's."""

    def is_number(value):
        return type(value) in (int, float) and abs(value) < 2**1000  # a larger int is no float; nor is NaN smaller

    def dict_of(is_right):
        return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))

    def list_of(is_right):
        return lambda value: isinstance(value, list) and all(map(is_right, value))

    def is_tokenizer(value):
        from training.tokenizer import check_spec

        with contextlib.suppress(UserError):
            check_spec(value)
            return not isinstance(value, dict) or "characters" in value or "json" in value
        return False

    kinds = {
        ("step", "sequences_seen"): lambda value: type(value) is int and 0 <= value < 2**63,
        ("config", "model_args"): dict_of(lambda item: isinstance(item, PLAIN) and "\0" not in str(item)),
        ("model", "optimizer", "scaler"): lambda value: isinstance(value, dict),
        ("facts",): lambda value: isinstance(value, dict) and _is_json(value),
        ("counts",): dict_of(is_number),
        ("curvature",): dict_of(lambda value: isinstance(value, float) or is_number(value)),
        ("history",): list_of(_is_change),
        ("recent_losses",): list_of(is_number),
        ("best_val_loss",): lambda value: isinstance(value, float) or is_number(value),
        ("seconds",): is_number,
        ("flops",): lambda value: value is None or is_number(value),
        ("wandb_id",): lambda value: isinstance(value, str | None),
        ("tokenizer",): is_tokenizer,
    }
    if not isinstance(content, dict):
        raise UserError(f"{path} is no checkpoint of this project; name another one.")
    for key, is_right in ((key, is_right) for keys, is_right in kinds.items() for key in keys):
        if key in content and not is_right(content[key]):
            raise UserError(f"{path} is no checkpoint of this project: its {key} is not of its type; name another one.")
    checkpoint = Checkpoint(content, path)
    if "model" in content and "model_args" in content:
        check_weights(checkpoint["model"], checkpoint["model_args"], path)
    return checkpoint


def _is_change(entry):
    """Whether it is an entry of a run's history."""
    is_one = isinstance(entry, dict) and type(entry.get("step")) is int and isinstance(entry.get("changed"), dict)
    return is_one and _is_json(entry)


def _is_json(value):
    try:
        return bool(json.dumps(value))
    except (TypeError, ValueError, RecursionError):
        return False


def check_weights(weights, model_args, path):
    """UserError where `weights` are not those of a GPT with these arguments."""
    import torch

    from model import GPT, GPTConfig

    remedy = "name another checkpoint"
    try:
        if model_args.get("n_layer", 12) > len(weights):
            raise ValueError(f"n_layer = {model_args.get('n_layer', 12)}, and {len(weights)} tensors")
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in GPT(GPTConfig(**model_args)).state_dict().items()}
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path}: its model_args are no GPT's ({str(error).splitlines()[0]}); {remedy}.") from None
    for name in expected.keys() | weights.keys():
        shape = getattr(weights.get(name), "shape", None)
        if shape is not None and not weights[name].is_floating_point():
            raise UserError(f"{path}: {name!s:.80} holds {weights[name].dtype}, no weights; {remedy}.")
        if shape is None or shape != expected.get(name):
            found = "missing" if name not in weights else "no tensor" if shape is None else tuple(shape)
            wanted = f"a GPT with its model_args has {tuple(expected[name]) if name in expected else 'none'}"
            raise UserError(f"{path}: {name!s:.80} is {found}, {wanted}; {remedy}.")


@contextlib.contextmanager
def restoring(path, what):
    """A UserError for what a checkpoint of the right form raises where its content does not fit."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, AssertionError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise UserError(f"{path}: its {what} cannot be taken over ({reason}); name another checkpoint.") from None
