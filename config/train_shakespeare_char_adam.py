# A small character GPT on Shakespeare with AdamW, on a CPU: two minutes on two cores.
#   python train_adam.py config/train_shakespeare_char_adam.py

out_dir = "out/shakespeare_char_adam"
dataset = "shakespeare_char"
total_bs = 16
batch_size = 16
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128

optimizer_name = "adamw"
learning_rate = 4e-3
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.99  # few tokens in a step: a longer average than the usual 0.95

max_iters = 1500
warmup_iters = 150

eval_interval = 250
eval_tokens = 131_072
log_interval = 50
device = "cpu"
