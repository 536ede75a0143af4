# GPT-NeoX (arXiv:2204.06745) with 6.86B parameters on the Pile with Sophia-G, in the shape of the Sophia paper's last
# version: 2048 sequences of 2048 tokens a step, 100k steps. With one
# embedding matrix for both ends, instead of GPT-NeoX's two, it would be 6.65B, the paper's 6.6B.
#   python data/text/prepare.py --source 'PILE/train/*.jsonl.zst' --out_dir data/pile      # your copy of the Pile
#   torchrun --standalone --nproc_per_node=8 train_sophiag.py config/train_neox_6.6b_sophiag.py

out_dir = "out/neox_6.6b_sophiag"
dataset = "pile"
total_bs = 2048
batch_size = 4
block_size = 2048

n_layer = 32
n_head = 32
n_embd = 4096
bias = True
position = "rope"
rope_dim = 32  # a quarter of each head
parallel_block = True
tie_embeddings = False

optimizer_name = "sophiag"
# Half of AdamW's learning rate: a place to start a sweep. The rest is that of the 1.5B.
learning_rate = 6e-5
weight_decay = 0.15
beta1 = 0.965
beta2 = 0.99
rho = 0.04
hess_interval = 10
grad_clip = 1.0

max_iters = 100_000
warmup_iters = 2000
# min_lr is learning_rate / 20 where it is not given

eval_interval = 1000
log_interval = 10
fsdp = True
activation_checkpointing = True
compile = True
