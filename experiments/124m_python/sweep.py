# The order at 30M, at 124M: one seed. The learning rate of the matrices is halved because the width doubles
# (arXiv:2203.03466); the embeddings keep theirs.

from experiments.best import best_of

common = {"max_iters": [2300], "seed": [1]}
shape = {"total_bs": 128, "batch_size": 64, "block_size": 1024, "eval_interval": 575}
shape |= {"scale_attn_by_inverse_layer_idx": False}  # as at 30M
best = best_of("30m_tuning", 2300, only=("adamw", "muon"))
best |= best_of("30m_eigenbasis", 2300, only=("soap",))
best["sophiag_eigenbasis"] = best_of("30m_eigenbasis_fresh", 2300, only=("fresh",))["fresh"]
best |= best_of("30m_spectral", 2300)
optimizers = {
    name: settings
    | shape
    | {"config": settings["config"].replace("30m", "small"), "learning_rate": settings["learning_rate"] / 2}
    for name, settings in best.items()
}
