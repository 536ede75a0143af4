# GPT-2 with 124M parameters on OpenWebText with Lion: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_adam.py config/train_gpt2_small_lion.py

out_dir = "out/gpt2_small_lion"
dataset = "openwebtext"
total_bs = 480
batch_size = 12
block_size = 1024

n_layer = 12
n_head = 12
n_embd = 768
scale_attn_by_inverse_layer_idx = True  # as in the official runs of both optimizers

optimizer_name = "lion"
# Not tuned: the Lion paper (arXiv:2302.06675) advises a rate 3 to 10 times below AdamW's, and a decay as much above.
learning_rate = 1e-4
weight_decay = 0.5
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0

max_iters = 100_000
warmup_iters = 2000

compile = True
