# GPT-2 with 30M parameters on Python source text with the best Sophia-G of two equal tunings, 16 runs for each
# optimizer: in the eigenbasis of its curvature. 128 sequences of 512 tokens a step, 1560 steps (102M tokens). Better
# than the tuned AdamW at 780 and 1560 steps, not than Muon or SOAP (README, "What Sophia buys"); at other sizes or on
# other text it was not tried. Measured at commit 3b0ca07, before the turn of the bases was made shorter.
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
learning_rate = 1e-3
# AdamW moves the embeddings, at a rate of their own.
adamw_for = "embeddings"
embedding_lr = 8e-3
weight_decay = 0.1
nesterov = True
beta1 = 0.95
beta2 = 0.98
# The smallest that was tried. 15% of the hidden matrices' coordinates are not clipped at first, half of them later.
rho = 0.1
bias_correction = True
hess_interval = 10
hess_bs = 16
grad_clip = 1.0

# The warm-up is 40% of the run, the longest that was tried.
max_iters = 1560
warmup_iters = 624
# min_lr is learning_rate / 20 where it is not given

eval_interval = 390
log_interval = 10
compile = True
