# The equal tuning of sweep_30m_python.py on books: a random search of 16 runs each, of 780 steps of
# 128 x 512 tokens (51M tokens), at 30M. PATH: books as .txt, .jsonl or .parquet.
#   python data/text/prepare.py --source PATH... --out_dir data/books
#   python sweep.py config/sweep_30m_books.py --out_dir=out/sweep_30m_books --seeds=3
#   python compare.py out/sweep_30m_books/best_*_seed* --out=out/sweep_30m_books/best

from pathlib import Path
from runpy import run_path

python = run_path(str(Path(__file__).with_name("sweep_30m_python.py")))
runs, optimizers = python["runs"], python["optimizers"]
common = python["common"] | {"dataset": "books"}
