"""TinyStories: 2.1 million short stories for training, 22,000 for validation, written by language models.

    python data/tinystories/prepare.py                      # roneneldan/TinyStories from the Hugging Face hub
    python data/tinystories/prepare.py --source PATH...     # from files, also TinyStoriesV2-GPT4-*.txt

Text files are cut into stories at --separator, by default <|endoftext|>. Files with "train" or "valid" in their names
are those splits. If one is missing, a hash of each story decides, with --val_fraction.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import sources
from training.errors import command

NAME = "roneneldan/TinyStories"


def main():
    parser = sources.arguments(__doc__, __file__, val_fraction=0.01, separator="<|endoftext|>")
    hub = f"{NAME} from the Hugging Face hub", lambda: sources.hub_splits(sources.load_from_hub(NAME))
    sources.prepare(parser.parse_args(), "TinyStories", hub, by_name=True)


if __name__ == "__main__":
    command(main)
