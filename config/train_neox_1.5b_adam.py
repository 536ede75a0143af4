# GPT-NeoX (arXiv:2204.06745) with 1.51B parameters on the Pile with AdamW, in the shape of the Sophia paper's last
# version: 2048 sequences of 2048 tokens a step, 100k steps.
#   python data/text/prepare.py --source 'PILE/train/*.jsonl.zst' --out_dir data/pile      # your copy of the Pile
#   torchrun --standalone --nproc_per_node=8 train_adam.py config/train_neox_1.5b_adam.py

from config.train_gpt2_small_adam import *

out_dir = "out/neox_1.5b_adam"
dataset = "pile"
total_bs = 2048
batch_size = 8
block_size = 2048

n_layer = 48
n_head = 24
n_embd = 1536
scale_attn_by_inverse_layer_idx = False
bias = True
position = "rope"
rope_dim = 16  # a quarter of each head
parallel_block = True
tie_embeddings = False

# Learning rate and weight decay of the authors' 1.5B run (github.com/Liuhong99/Sophia, issue 15); not tuned here.
learning_rate = 1.2e-4
weight_decay = 0.1

fsdp = True
