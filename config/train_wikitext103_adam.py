# GPT-2 with 124M parameters on WikiText-103 with AdamW: 7 epochs of about 1800 steps of 128 x 512 tokens.
#   python data/wikitext103/prepare.py     # needs the hub, or --source with your copy
#   python train_adam.py config/train_wikitext103_adam.py

from config.train_gpt2_small_adam import *

out_dir = "out/wikitext103_adam"
dataset = "wikitext103"
total_bs = 128
batch_size = 32
block_size = 512

scale_attn_by_inverse_layer_idx = False
dropout = 0.1  # each token is read seven times

# The learning rate of config/train_gpt2_small_adam.py is not tuned for this text; min_lr is a twentieth of it.
max_iters = 12_800
warmup_iters = 200
lr_schedule = "cosine_restarts"  # periods of 1, 2 and 4 epochs: T_0 = 1800, T_mult = 2
restart_iters = 1800

eval_interval = 200
dtype = "auto"  # mixed precision: bfloat16 on a GPU, float16 on an older one
