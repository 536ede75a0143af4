"""OpenWebText in GPT-2 tokens: 8 million pages, about 9 billion tokens for training, 4.4 million for validation.

    python data/openwebtext/prepare.py                      # Skylion007/openwebtext from the Hugging Face hub
    python data/openwebtext/prepare.py --source PATH...     # from files, read as data/text/prepare.py does

From the hub, order and split are nanoGPT's (a 0.0005th drawn with seed 2357). From files, a hash of each document
decides, with --val_fraction.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tqdm import tqdm

from data import corpus, sources
from training.errors import command

NAME = "Skylion007/openwebtext"


def from_hub():
    """Pairs of "train" or "val" and a text, in nanoGPT's order."""
    dataset = sources.load_from_hub(NAME)["train"].train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    for split, part in (("train", dataset["train"]), ("val", dataset["test"])):
        for batch in tqdm(part.iter(batch_size=1000), total=-(-len(part) // 1000), desc=split, disable=None):
            yield from ((split, text) for text in batch["text"])


def main():
    parser = corpus.arguments(__doc__, __file__)
    sources.add_arguments(parser, val_fraction=0.0005, required=False)
    args = parser.parse_args()
    if args.source:
        files = sources.find_files(args.source)
        source = sources.describe("OpenWebText", args, files)
        documents = sources.split_by_hash(sources.read_documents(files, args.field), args.val_fraction)
    else:
        source, documents = f"{NAME} from the Hugging Face hub, nanoGPT's split", from_hub()
    if not corpus.is_prepared(args, source):
        corpus.write(args, documents, "gpt2", source)


if __name__ == "__main__":
    command(main)
