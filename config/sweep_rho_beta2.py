# How much Sophia-G minds rho and beta2, as the paper's sensitivity figure asks, at 30M: 16 runs of 1560 steps of
# 128 x 512 tokens (102M tokens). Draws a heat map.
#   python data/python/prepare.py
#   python sweep.py config/sweep_rho_beta2.py --out_dir=out/sweep_rho_beta2

common = {
    "dataset": "python",
    "total_bs": 128,
    "batch_size": 128,
    "block_size": 512,
    "max_iters": 1560,
    "warmup_iters": 312,
    "eval_interval": 390,
}
optimizers = {
    "sophiag": {
        "config": "config/train_gpt2_30m_sophiag.py",
        "learning_rate": 1e-3,
        "beta1": 0.9,
        "rho": [0.01, 0.03, 0.1, 0.3],
        "beta2": [0.9, 0.95, 0.99, 0.995],
    }
}
