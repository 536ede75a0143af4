# GPT-2 with 124M parameters on OpenWebText with Muon: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_adam.py config/train_gpt2_small_muon.py

out_dir = "out/gpt2_small_muon"
dataset = "openwebtext"
total_bs = 480
batch_size = 12
block_size = 1024

n_layer = 12
n_head = 12
n_embd = 768
scale_attn_by_inverse_layer_idx = True  # as in the official runs of both optimizers

optimizer_name = "muon"
# Not tuned: AdamW's rate and decay, to which Muon's update is scaled. beta1 and beta2 are of its AdamW part.
learning_rate = 6e-4
weight_decay = 0.1
momentum = 0.95
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

max_iters = 100_000
warmup_iters = 2000

compile = True
