"""OpenWebText in GPT-2 tokens: 8 million pages, about 9 billion tokens for training, 4.4 million for validation.

    python data/openwebtext/prepare.py                      # Skylion007/openwebtext from the Hugging Face hub
    python data/openwebtext/prepare.py --source PATH...     # from files, read as data/text/prepare.py does

From the hub, order and split are nanoGPT's: 0.05% of the pages, drawn with seed 2357, are held out. From files, a hash
of each document decides, with --val_fraction.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import sources
from training.errors import command

NAME = "Skylion007/openwebtext"


def from_hub():
    """Pairs of "train" or "val" and a text, in nanoGPT's order."""
    dataset = sources.load_from_hub(NAME)["train"].train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    return sources.hub_splits(dataset, val="test")


def main():
    parser = sources.arguments(__doc__, __file__, val_fraction=0.0005)
    hub = f"{NAME} from the Hugging Face hub, nanoGPT's split", from_hub
    sources.prepare(parser.parse_args(), "OpenWebText", hub)


if __name__ == "__main__":
    command(main)
