# The equal tuning of sweep_30m_python.py on books, at half its length: random search of 16 runs each, of 390 steps of
# 128 x 512 tokens (26M tokens), at 30M. PATH: books as .txt, .jsonl or .parquet.
#   python data/text/prepare.py --source PATH... --out_dir data/books
#   python sweep.py config/sweep_30m_books.py --out_dir=out/sweep_30m_books

from pathlib import Path
from runpy import run_path

python = run_path(str(Path(__file__).with_name("sweep_30m_python.py")))
runs, optimizers = python["runs"], python["optimizers"]
common = python["common"] | {"dataset": "books", "max_iters": 390, "warmup_iters": [78, 156], "eval_interval": 195}
