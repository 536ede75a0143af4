# GPT-2 with 30M parameters on OpenWebText with AdamW: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_adam.py config/train_gpt2_30m_adam.py

out_dir = "out/gpt2_30m_adam"
dataset = "openwebtext"
total_bs = 480
batch_size = 60
block_size = 1024

n_layer = 6
n_head = 6
n_embd = 384

optimizer_name = "adamw"
# The rate that was best in runs of 1560 steps of 128 x 512 tokens; not tuned at this length.
learning_rate = 2e-3
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

max_iters = 100_000
warmup_iters = 2000

compile = True
