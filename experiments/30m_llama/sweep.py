"""AdamW, Sophia-G, Muon and whitened Muon on a Llama-like 30M: learning rates at 780 steps, then held-out seeds.

Settings are those of the GPT-2 tuning. Of three learning rates of each the best is given back as --rates, in the order
of the optimizers.
"""

from experiments.best import best_of, whitened_muon, with_seeds

LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "n_kv_head": 2}


def sweep(steps=780, held_out="1", rates="", only=""):
    """rates: one learning rate for each optimizer; without them three values each."""
    optimizers = best_of("30m_further", steps)  # AdamW and Sophia-G, with 25 more runs of tuning than 30m_tuning
    optimizers |= best_of("30m_tuning", steps, only=("muon",)) | {"whitened_muon": whitened_muon(steps)}
    given = [float(rate) for rate in rates.split(",") if rate]
    for i, settings in enumerate(optimizers.values()):
        rate = settings["learning_rate"]
        settings["learning_rate"] = given[i] if given else [rate / 2, rate, rate * 2]
    return with_seeds(optimizers, held_out, only, max_iters=[steps], **LLAMA)
