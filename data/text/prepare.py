"""Your own texts as tokens: a file, a folder, or many of them.

    python data/text/prepare.py --source input.txt --out_dir data/mine       # the last tenth of it is val.bin
    python data/text/prepare.py --source FOLDER 'more/*.jsonl.gz' --out_dir data/mine --tokenizer char
    python data/text/prepare.py --train train.txt --val val.txt --separator '<|endoftext|>' --out_dir data/mine

It reads .txt and .md (one document a file, or cut at --separator), .json and .jsonl (one a record), .csv and .parquet
(one a row), plain or compressed (.gz, .bz2, .xz, .zst). A folder is read with its subfolders, in sorted order.
Documents keep their order. A hash of a document's text decides whether it is held out, so the split does not change
when other documents come or go. If there is a single text, or few documents, val.bin is its last --val_fraction.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import sources
from training.errors import command


def main():
    sources.prepare(sources.arguments(__doc__, __file__, val_fraction=0.005).parse_args(), "text")


if __name__ == "__main__":
    command(main)
