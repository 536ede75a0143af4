# The equal tunings of 30m_tuning, 30m_eigenbasis and 30m_spectral on books, half as long.

from experiments.best import sweep_of

tuning, eigenbasis, spectral = (sweep_of(name) for name in ("30m_tuning", "30m_eigenbasis", "30m_spectral"))
runs, half = tuning["runs"], {"dataset": "books", "max_iters": 390, "eval_interval": 195}
common = tuning["common"] | half | {"warmup_iters": [78, 156]}
optimizers = tuning["optimizers"] | {
    "sophiag_eigenbasis": eigenbasis["optimizers"]["sophiag_eigenbasis"]
    | half
    | {"warmup_iters": [39, 78, 156], "beta2": 0.9},
    "sophiag_spectral": spectral["optimizers"]["sophiag_spectral"] | half,
}
