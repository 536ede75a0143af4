"""Write a checkpoint as a Hugging Face folder: a model and its tokenizer, which transformers loads offline.

python export_hf.py --out_dir=out/gpt2_small_sophiag --to=exported
python export_hf.py --init_from=import:nanoGPT/out/ckpt.pt --to=exported

    model = AutoModelForCausalLM.from_pretrained("exported")
    tokenizer = AutoTokenizer.from_pretrained("exported")

The model becomes a GPT-2, Llama, Qwen3 or GPT-NeoX of transformers, whichever fits its settings (docs/models.md). If
none fits, the export is refused. The rows that pad the vocabulary are cut. GPT-2's tokenizer is exported as
GPT2Tokenizer, a tokenizer of characters as PreTrainedTokenizerFast with one token for each character. In transformers,
unlike in training, "<|endoftext|>" in a text is the end-of-text token.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from training.config import ModelSource, load_config, setting
from training.errors import UserError, command, file_errors
from training.hf import load_model, quiet, to_hf
from training.terminal import warn
from training.tokenizer import gpt2_files, in_characters


@dataclass
class ExportConfig(ModelSource):
    to: str = setting("", "folder to write; it must be empty or not exist")

    def check(self):
        super().check()
        self.to = os.path.expanduser(self.to)
        if not self.to:
            raise UserError("to = '': give the folder to write as --to=DIR.")


def main(argv=None):
    config = load_config(ExportConfig, argv)
    folder = Path(config.to)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; name another one with --to=DIR.")
    model, tokenizer, _ = load_model(config.init_from, config.out_dir, config.checkpoint)
    existed = folder.exists()
    try:
        with file_errors(folder, "name another folder"):
            export(model, tokenizer, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # no part of it stays
        if existed:
            folder.mkdir(exist_ok=True)
        raise
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


@quiet()
def export(model, tokenizer, folder):
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files into `folder`."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        hf_model = to_hf(model, tokenizer.vocab_size, tokenizer.eot)
    except ValueError as error:
        raise UserError(f"{error}; sample.py and evaluate.py read the checkpoint itself.") from None
    hf_model.generation_config.pad_token_id = tokenizer.eot  # a batch of prompts needs one, and GPT-2 has none
    hf_model.save_pretrained(folder)
    if tokenizer.spec is None:
        warn("the tokenizer of this model is not known: the folder has none.")
        return
    if isinstance(tokenizer.spec, str):
        hf_tokenizer = gpt2_tokenizer(folder) if tokenizer.spec == "gpt2" else tiktoken_tokenizer(tokenizer)
    else:
        characters = tokenizer.spec.get("characters")
        hf_tokenizer = character_tokenizer(characters) if characters else json_tokenizer(tokenizer)
    hf_tokenizer.model_max_length = model.config.block_size
    hf_tokenizer.save_pretrained(folder)


def gpt2_tokenizer(folder):
    """OpenAI's vocabulary as transformers' tokenizer. Older versions read the two files that go into `folder`."""
    from transformers import GPT2Tokenizer

    vocab, merges = gpt2_files()
    (folder / "vocab.json").write_bytes(vocab)
    (folder / "merges.txt").write_bytes(merges)
    pairs = [tuple(line.split()) for line in merges.decode().splitlines()[1:]]  # the first line is a version
    return GPT2Tokenizer(json.loads(vocab), pairs)


def tiktoken_tokenizer(tokenizer):
    """Another of tiktoken's vocabularies. tiktoken has ranks where `tokenizers` has merges: of every two tokens that
    make a third."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    encoding, ranks = tokenizer.encoding, tokenizer.encoding._mergeable_ranks
    text = {token: in_characters(token) for token in ranks}
    cuts = ((token[:i], token[i:], rank) for token, rank in ranks.items() for i in range(1, len(token)))
    pairs = sorted((rank, ranks[a], ranks[b], a, b) for a, b, rank in cuts if a in ranks and b in ranks)
    merged = Tokenizer(models.BPE(tokenizer.ids, [(text[a], text[b]) for *_, a, b in pairs]))
    merged.add_special_tokens(list(encoding._special_tokens))
    pattern = re.sub(r"(?<=[+*?])\+|(?<=\d})\+", "", encoding._pat_str).replace("$", r"\z")  # in that package's dialect
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    merged.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    merged.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=merged, **_end(tokenizer))


def json_tokenizer(tokenizer):
    """The tokenizer.json that the data was prepared with."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.json), **_end(tokenizer))


def _end(tokenizer):
    return {} if tokenizer.eot is None else {"eos_token": tokenizer.decode([tokenizer.eot])}


def character_tokenizer(characters):
    """A tokenizer with one token for each character. It refuses other characters, as in training."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


if __name__ == "__main__":
    command(main)
