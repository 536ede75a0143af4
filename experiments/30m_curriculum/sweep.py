# A curriculum of ten sequence lengths at 30M, with AdamW, with AdamW and then Sophia-G, and without the curriculum.
#   python data/python/prepare.py
#   python sweep.py experiments/30m_curriculum/sweep.py --out_dir=out/30m_curriculum
# The lengths are those of config/train_yxanul_hybrid.py; the model is of its kind, with GPT-2 30M's depth and width.

LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048)
STEPS = 78  # of a stage

common = {
    "dataset": "python",
    "total_bs": 36,
    "batch_size": 36,
    "block_size": 2048,
    "n_kv_head": 2,
    "norm": "rmsnorm",
    "position": "rope",
    "mlp": "swiglu",
    "max_iters": STEPS * len(LENGTHS),
    "warmup_iters": STEPS,
    "eval_interval": STEPS,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "seed": [3, 4],
}
curriculum = {"block_size_schedule": ",".join(f"{i * STEPS}:{length}" for i, length in enumerate(LENGTHS))}
adamw = {"config": "config/train_gpt2_30m_adam.py", "optimizer_name": "adamw"}
sophia = {"config": "config/train_gpt2_30m_sophiag.py", "optimizer_name": "sophiag", "hess_bs": 9}
optimizers = {
    "adamw": adamw | curriculum,
    "hybrid": sophia | curriculum | {"sophia_start_iter": 5 * STEPS},  # from stage 6 on
    "adamw_full": adamw,
}
