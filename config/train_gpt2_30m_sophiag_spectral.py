# GPT-2 with 30M parameters on Python source text with the spectral step, the best Sophia-G here: Muon's step in
# coordinates that the curvature whitens. 128 sequences of 512 tokens a step, 1,560 steps (102M tokens).
#   python data/python/prepare.py
#   python train_sophiag.py config/train_gpt2_30m_sophiag_spectral.py
# Learning rates, decay, momentum and warm-up are the best of 16 runs of 780 steps (experiments/30m_spectral). The
# other settings are those of train_gpt2_30m_sophiag_eigenbasis.py. docs/results.md compares it with other optimizers.
# On books a warm-up of 40% and an embedding_lr of 8e-3 were best; with batches of 1024 sequences, four times the
# learning rate.

out_dir = "out/gpt2_30m_sophiag_spectral"
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
# The highest value of its range, as embedding_lr; 8e-3 ended 0.0005 and 0.0047 higher (one seed, on two machines).
learning_rate = 1.6e-2
# AdamW updates embeddings and vectors, at a learning rate of their own.
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

eval_interval = 390
compile = True
