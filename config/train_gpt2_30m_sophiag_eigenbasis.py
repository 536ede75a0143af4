# GPT-2 with 30M parameters on Python source text with Sophia-G's own step, momentum over curvature and clipped, in the
# eigenbasis of the curvature. 128 sequences of 512 tokens a step, 1,560 steps (102M tokens).
#   python data/python/prepare.py
#   python train_sophiag.py config/train_gpt2_30m_sophiag_eigenbasis.py
# The settings come from 16 + 25 runs of 780 steps (experiments/30m_eigenbasis, 30m_eigenbasis_recipe and _fresh).
# docs/results.md compares it with other optimizers. The spectral step (train_gpt2_30m_sophiag_spectral.py) is better.

out_dir = "out/gpt2_30m_sophiag_eigenbasis"
dataset = "python"
total_bs = 128
batch_size = 128
block_size = 512

n_layer = 6
n_head = 6
n_embd = 384

optimizer_name = "sophiag"
eigenbasis = True
learning_rate = 1e-3
# AdamW updates the embeddings, at a learning rate of their own.
adamw_for = "embeddings"
embedding_lr = 1.6e-2
weight_decay = 0.1
nesterov = True
beta1 = 0.95
beta2 = 0.9
# Of the hidden matrices' coordinates 0.16 are not clipped at first, 0.32 to 0.5 from step 100 of 780 on.
rho = 0.1
bias_correction = True
hess_interval = 5
hess_bs = 8
grad_clip = 1.0

# The warm-up is 40% of the run, the longest that was tried; with 20% 780 steps ended 0.06 higher
# (one seed).
max_iters = 1560
warmup_iters = 624

eval_interval = 390
compile = True
