# GPT-2 with 774M parameters on OpenWebText with Sophia-G: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_sophiag.py config/train_gpt2_large_sophiag.py

out_dir = "out/gpt2_large_sophiag"
dataset = "openwebtext"
total_bs = 480
batch_size = 5
block_size = 1024

n_layer = 36
n_head = 20
n_embd = 1280
scale_attn_by_inverse_layer_idx = True  # as in the official runs of both optimizers

optimizer_name = "sophiag"
learning_rate = 3e-4
weight_decay = 0.2
beta1 = 0.965
beta2 = 0.99
rho = 0.05
hess_interval = 10
grad_clip = 1.0

max_iters = 100_000
warmup_iters = 2000

compile = True
