"""WikiText-103 (raw) in GPT-2 tokens: about 28,500 articles for training, 60 for validation.

    python data/wikitext103/prepare.py                      # Salesforce/wikitext from the Hugging Face hub
    python data/wikitext103/prepare.py --source PATH...     # from files, read as data/text/prepare.py does

PATH is the folder of an unpacked wikitext-103-v1.zip (wiki.train.tokens, ...) or wikitext-103-raw-v1.zip
(wiki.train.raw, ...), or parquet files of the hub. The lines from one article's title (" = Title = ") to the next
become one document. A file belongs to the split "train" or "valid" that is in its name or its folder's name; "test" and
all other files are left out. If "train" or "valid" is missing, a hash of each document decides, with --val_fraction.
"""

import io
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import sources
from training.errors import command

NAME, CONFIG = "Salesforce/wikitext", "wikitext-103-raw-v1"
TITLE = re.compile(r"^ = [^=\n].* = \r?$", re.MULTILINE)


def articles(texts):
    """Yield the articles that `texts` (lines, whole files) are parts of; a text before any title is one by itself."""
    article, previous = [], ""
    for text in texts:
        text = text if isinstance(text, str) else "".join(text)
        if not article and not TITLE.search(text):
            yield text
            continue
        text = text if text.endswith("\n") else (text or " ") + "\n"  # the hub has "" for the blank line " \n"
        for line in io.StringIO(text):
            if article and TITLE.match(line) and not previous.strip():
                yield "".join(article)
                article = []
            article.append(line)
            previous = line
    yield "".join(article)


def from_hub():
    return sources.hub_splits(sources.load_from_hub(NAME, CONFIG), articles=articles)


def main():
    parser = sources.arguments(__doc__, __file__, val_fraction=0.005)
    hub = f"{NAME} {CONFIG} from the Hugging Face hub", from_hub
    sources.prepare(parser.parse_args(), "WikiText-103", hub, articles, by_name=True)


if __name__ == "__main__":
    command(main)
