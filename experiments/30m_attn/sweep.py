# The equal tuning's best settings with scale_attn_by_inverse_layer_idx; 30m_python at 780 steps is the control.

from experiments.best import best_of

common = {"max_iters": 780, "scale_attn_by_inverse_layer_idx": [True], "seed": [1, 2, 3]}
optimizers = best_of("30m_tuning", 780, only=("adamw", "sophiag", "sophiag_adamw"))
