# The equal tuning of sweep_30m_python.py on books, at half its length, of Sophia-G in the eigenbasis and of its
# spectral step too: random search of 16 runs each, of 390 steps of 128 x 512 tokens (26M tokens), at 30M. PATH: books
# as .txt, .jsonl or .parquet.
#   python data/text/prepare.py --source PATH... --out_dir data/books
#   python sweep.py config/sweep_30m_books.py --out_dir=out/sweep_30m_books --seeds=3

from pathlib import Path
from runpy import run_path

here, names = Path(__file__).parent, ("python", "eigenbasis", "spectral")
python, eigenbasis, spectral = (run_path(str(here / f"sweep_30m_{name}.py")) for name in names)
runs, half = python["runs"], {"dataset": "books", "max_iters": 390, "eval_interval": 195}
common = python["common"] | half | {"warmup_iters": [78, 156]}
optimizers = python["optimizers"] | {
    "sophiag_eigenbasis": eigenbasis["optimizers"]["sophiag_eigenbasis"]
    | half
    | {"warmup_iters": [39, 78, 156], "beta2": 0.9},
    "sophiag_spectral": spectral["optimizers"]["sophiag_spectral"] | half,
}
