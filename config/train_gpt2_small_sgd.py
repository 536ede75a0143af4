# GPT-2 with 124M parameters on OpenWebText with SGD: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_adam.py config/train_gpt2_small_sgd.py

out_dir = "out/gpt2_small_sgd"
dataset = "openwebtext"
total_bs = 480
batch_size = 12
block_size = 1024

n_layer = 12
n_head = 12
n_embd = 768
scale_attn_by_inverse_layer_idx = True  # as in the official runs of both optimizers

optimizer_name = "sgd"
# Not tuned: a place to start a sweep.
learning_rate = 0.3
weight_decay = 1e-4  # added to the gradient, not decoupled as in the other optimizers
momentum = 0.9  # Nesterov's
grad_clip = 1.0

max_iters = 100_000
warmup_iters = 2000

compile = True
