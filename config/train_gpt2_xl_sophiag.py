# GPT-2 with 1.5B parameters on OpenWebText with Sophia-G: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_sophiag.py config/train_gpt2_xl_sophiag.py

out_dir = "out/gpt2_xl_sophiag"
dataset = "openwebtext"
total_bs = 480
batch_size = 2
block_size = 1024

n_layer = 48
n_head = 25
n_embd = 1600
scale_attn_by_inverse_layer_idx = True  # as in the official runs of both optimizers

optimizer_name = "sophiag"
# Rate and weight decay of the official 1.5B run on the Pile; its rho is in other units, so 0.05 is a guess.
learning_rate = 2.5e-4
weight_decay = 0.15
beta1 = 0.965
beta2 = 0.99
rho = 0.05
hess_interval = 10
grad_clip = 1.0

max_iters = 100_000
warmup_iters = 2000

compile = True
