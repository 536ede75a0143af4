"""Shakespeare's plays and poems, one token a character: 4.6 million for training, 0.5 million for validation.

    python data/shakespeare_char/prepare.py                 # in data/shakespeare_char: train.bin, val.bin, meta.json

The vocabulary is 84 characters. The works and the split are those of data/shakespeare/prepare.py; an empty line
separates works.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import corpus
from data.shakespeare.prepare import SOURCE, arguments, splits
from training.errors import command


def main():
    args = arguments(__doc__, __file__).parse_args()
    if not corpus.is_prepared(args, SOURCE):
        documents = list(splits(args.source))
        characters = "".join(sorted({character for _, text in documents for character in text}))
        corpus.write(args, documents, {"characters": characters}, SOURCE)


if __name__ == "__main__":
    command(main)
