"""Your own corpus in GPT-2 tokens.

    python data/text/prepare.py --source PATH... --out_dir data/NAME

Each PATH is a file or a folder (with its subfolders, in sorted order) of .txt (one document a file), .jsonl (one a
line) or .parquet (one a row), plain or compressed (.gz, .bz2, .xz). Documents keep their order. A hash of its text
decides whether a document is held out, so the split does not change when others come or go.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import corpus, sources
from training.errors import command


def main():
    parser = corpus.arguments(__doc__, __file__)
    sources.add_arguments(parser, val_fraction=0.005, required=True)
    args = parser.parse_args()
    files = sources.find_files(args.source)
    source = sources.describe("text", args, files)
    if not corpus.is_prepared(args, source):
        documents = sources.read_documents(files, args.field)
        corpus.write(args, sources.split_by_hash(documents, args.val_fraction), "gpt2", source)


if __name__ == "__main__":
    command(main)
