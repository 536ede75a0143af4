# GPT-2 with 30M parameters on OpenWebText with SGD: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_adam.py config/train_gpt2_30m_sgd.py

out_dir = "out/gpt2_30m_sgd"
dataset = "openwebtext"
total_bs = 480
batch_size = 60
block_size = 1024

n_layer = 6
n_head = 6
n_embd = 384

optimizer_name = "sgd"
# Not tuned: a place to start a sweep.
learning_rate = 0.3
weight_decay = 1e-4  # added to the gradient, not decoupled as in the other optimizers
momentum = 0.9  # Nesterov's
grad_clip = 1.0

max_iters = 100_000
warmup_iters = 2000

compile = True
