# Batches of 1024 x 512 tokens: only the matrices' learning rate is tuned, the rest is the best for batches of 128.

from experiments.best import best_of

common = {"max_iters": 260}
large = {"total_bs": 1024, "eval_interval": 130}
best = best_of("30m_tuning", 260) | best_of("30m_eigenbasis", 260, only=("soap",))
best["sophiag_eigenbasis_fresh"] = best_of("30m_eigenbasis_fresh", 260, only=("fresh",))["fresh"]
best["sophiag_eigenbasis_fresh"]["hess_bs"] = 64  # a sixteenth of the batch, as there
best |= best_of("30m_spectral", 260)
best["sophiag_spectral"]["hess_bs"] = 64
best["sophiah"]["hess_bs"] = 256  # a quarter, as there; Sophia-G's default follows the batch
optimizers = {}
for name, settings in best.items():
    shares = {"muon": (8, 4, 2, 1), "sophiag_spectral": (4, 2, 1, 0.5)}.get(name, (1, 0.5, 0.25, 0.125))
    optimizers[name] = settings | large | {"learning_rate": [settings["learning_rate"] * share for share in shares]}
