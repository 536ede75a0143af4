# Large batches, which the paper's claim is about: half a million tokens a step (1024 x 512), 260 steps (136M tokens),
# at 30M on Python source text. What was best before, at its rate of the matrices, half, a quarter and an eighth of
# it. Muon and the spectral Sophia-G came out best at the highest rates, so they have eight times to once and four
# times to half of it, and are best at the highest again. SOAP is too, and was not given higher ones. The rate of the
# embeddings is kept. Sophia-G in the eigenbasis comes with the recipe that took 25 runs more than the others had.
#   python data/python/prepare.py
#   python sweep.py config/sweep_30m_large.py --out_dir=out/sweep_30m_large --seeds=3

from pathlib import Path
from runpy import run_path

best_of = run_path(str(Path(__file__).with_name("best.py")))["best_of"]
common = {"max_iters": 260}
large = {"total_bs": 1024, "eval_interval": 130}
best = best_of("30m_python", max_iters=260) | best_of("30m_eigenbasis", max_iters=260, only=("soap",))
best["sophiag_eigenbasis_fresh"] = best_of("30m_eigenbasis_fresh", max_iters=260, only=("fresh",))["fresh"]
best["sophiag_eigenbasis_fresh"]["hess_bs"] = 64  # a sixteenth of the batch, as there
best |= best_of("30m_spectral", max_iters=260)
best["sophiag_spectral"]["hess_bs"] = 64
best["sophiah"]["hess_bs"] = 256  # a quarter, as there; Sophia-G's default follows the batch
optimizers = {}
for name, settings in best.items():
    shares = {"muon": (8, 4, 2, 1), "sophiag_spectral": (4, 2, 1, 0.5)}.get(name, (1, 0.5, 0.25, 0.125))
    optimizers[name] = settings | large | {"learning_rate": [settings["learning_rate"] * share for share in shares]}
