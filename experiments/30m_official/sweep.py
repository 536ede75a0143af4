"""The official Sophia-G, ours with its habits, and ours without them: the settings of 30m_tuning, held-out seeds."""

from experiments.best import best_of, with_seeds


def sweep(official="", steps=1560, held_out="3,4,5", only=""):
    """official: the official sophia.py; without it, all but its own runs."""
    tuned = best_of("30m_tuning", steps, only=("sophiag",))["sophiag"]
    plain = tuned | {"bias_correction": False}
    habits = plain | {"script": "experiments/30m_official/official.py"}
    optimizers = {"habits": habits, "corrected": tuned, "plain": plain}  # in this order, should time run out
    if official:
        optimizers = {"official": habits | {"official": official}} | optimizers
    return with_seeds(optimizers, held_out, only, max_iters=[steps])
