# A small character GPT on Shakespeare with AdamW, on one GPU.
#   python train_adam.py config/train_shakespeare_char_adam_gpu.py

out_dir = "out/shakespeare_char_adam_gpu"
dataset = "shakespeare_char"
total_bs = 64
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # 5000 steps are 18 epochs

optimizer_name = "adamw"
learning_rate = 1e-3
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.99

max_iters = 5000
warmup_iters = 500

eval_interval = 500
log_interval = 50
compile = True
