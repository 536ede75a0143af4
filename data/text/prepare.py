"""Your own texts as tokens: a file, a folder, or many of them.

    python data/text/prepare.py --source input.txt --out_dir data/mine       # the last tenth of it is val.bin
    python data/text/prepare.py --source FOLDER 'more/*.jsonl.gz' --out_dir data/mine --tokenizer char
    python data/text/prepare.py --train train.txt --val val.txt --separator '<|endoftext|>' --out_dir data/mine

Read are .txt and .md (one document a file, or cut at --separator), .json and .jsonl (one a record), .csv and .parquet
(one a row), plain or compressed (.gz, .bz2, .xz, .zst); of a folder its subfolders too, in sorted order. Documents
keep their order. A hash of its text decides whether a document is held out, so the split does not change when others
come or go. Of a single text, and where the documents are too few for that, val.bin is the last --val_fraction.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import corpus, sources
from training.errors import command


def main():
    parser = corpus.arguments(__doc__, __file__)
    sources.add_arguments(parser, val_fraction=0.005, required=True)
    sources.prepare(parser.parse_args(), "text")


if __name__ == "__main__":
    command(main)
