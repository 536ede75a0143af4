# GPT-2 with 30M parameters on Python source text with whitened Muon: Muon's step in coordinates that the training
# gradient's second moments whiten. 128 sequences of 512 tokens a step, 1,560 steps (102M tokens).
#   python data/python/prepare.py
#   python train_adam.py config/train_gpt2_30m_whitened_muon.py
# The settings are those of the variant `blocks` of experiments/30m_whitened_muon. 780 steps on an H200 ended at 1.2894
# there (8 seeds). Learning rates and warm-up were tuned for the spectral step (experiments/30m_spectral).

from config.train_gpt2_30m_adam import *

out_dir = "out/gpt2_30m_whitened_muon"
dataset = "python"
total_bs = 128
batch_size = 128
block_size = 512

optimizer_name = "whitened_muon"
learning_rate = 1.6e-2
embedding_lr = 3.2e-2  # of AdamW, which updates embeddings and scalars
momentum = 0.85
weight_decay = 0.2
whiten_interval = 2
whiten_max_width = 384

max_iters = 1560
warmup_iters = 312

eval_interval = 390
