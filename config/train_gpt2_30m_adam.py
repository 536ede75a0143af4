# GPT-2 with 30M parameters on OpenWebText with AdamW: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_adam.py config/train_gpt2_30m_adam.py

from config.train_gpt2_small_adam import *

out_dir = "out/gpt2_30m_adam"
batch_size = 60

n_layer = 6
n_head = 6
n_embd = 384
scale_attn_by_inverse_layer_idx = False

# The rate that was best in runs of 1560 steps of 128 x 512 tokens; not tuned at this length.
learning_rate = 2e-3
