"""FineWeb-Edu's sample of 10 billion tokens: 9.7 million educational web pages.

    python data/fineweb/prepare.py                          # HuggingFaceFW/fineweb-edu from the Hugging Face hub
    python data/fineweb/prepare.py --max_tokens 1000000000  # the first billion tokens of it
    python data/fineweb/prepare.py --source PATH...         # from files, read as data/text/prepare.py does

Pages keep the order of the files. A hash of each page decides whether it is held out, with --val_fraction.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import corpus, sources
from training.errors import command

NAME, CONFIG = "HuggingFaceFW/fineweb-edu", "sample-10BT"


def main():
    parser = sources.arguments(__doc__, __file__, val_fraction=0.0005)
    parser.add_argument("--max_tokens", type=corpus.positive, help="stop before a page that would exceed this number")
    args = parser.parse_args()
    fraction, part = args.val_fraction or args.default_fraction, f", max_tokens {args.max_tokens}"
    part = part if args.max_tokens else ""

    def from_hub():
        pages = sources.load_from_hub(NAME, CONFIG)["train"].select_columns("text")
        return sources.split_by_hash(sources.texts_of(pages, "train"), fraction)

    hub = f"{NAME} {CONFIG} from the Hugging Face hub, val_fraction {fraction}{part}", from_hub
    sources.prepare(args, f"FineWeb-Edu{part}", hub, max_tokens=args.max_tokens)


if __name__ == "__main__":
    command(main)
