# GPT-2 with 30M parameters on Python source text with the best Sophia-G that was found: Muon's step in coordinates that
# the curvature whitens. Rates, decay, momentum and warm-up are the best of 16 runs of 780 steps, as the others had; k,
# beta2 and hess_bs are those of train_gpt2_30m_sophiag_eigenbasis.py. 128 sequences of 512 tokens a step, 1560 steps
# (102M tokens). Better than the tuned AdamW, Muon and the recipe in the eigenbasis at 780, 1560 and 5200 steps, than
# SOAP at the first two, and on books, where a warm-up of 40% and an embedding_lr of 8e-3 were best. At 124M, with half
# the matrices' rate and one seed, it ended 0.003 above Muon (see README, "What Sophia buys"). With batches of 1024
# sequences four times the rate was best, the highest tried, with one seed (sweep_30m_large.py).
#   python data/python/prepare.py
#   python train_sophiag.py config/train_gpt2_30m_sophiag_tuned.py

out_dir = "out/gpt2_30m_sophiag_tuned"
dataset = "python"
total_bs = 128
batch_size = 128
block_size = 512

n_layer = 6
n_head = 6
n_embd = 384

optimizer_name = "sophiag"
eigenbasis = True
spectral = True
# The highest that was tried, as embedding_lr; 8e-3 ended 0.0005 and 0.0047 higher (one seed, on two machines).
learning_rate = 1.6e-2
# AdamW moves embeddings and vectors, at a rate of their own.
adamw_for = "embeddings+vectors"
embedding_lr = 3.2e-2
weight_decay = 0.1
nesterov = True
beta1 = 0.9
beta2 = 0.9
bias_correction = True
hess_interval = 5
hess_bs = 8
grad_clip = 1.0

max_iters = 1560
warmup_iters = 312
# min_lr is learning_rate / 20 where it is not given

eval_interval = 390
log_interval = 10
compile = True
