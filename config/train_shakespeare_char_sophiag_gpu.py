# A small character GPT on Shakespeare with Sophia-G, on one GPU.
#   python train_sophiag.py config/train_shakespeare_char_sophiag_gpu.py

out_dir = "out/shakespeare_char_sophiag_gpu"
dataset = "shakespeare_char"
total_bs = 64
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # 5000 steps are 18 epochs

# Why not the settings of the large runs: beta1 = 0.965 and a curvature that starts at 0 and remembers 100 estimates
# (1000 steps) are made for runs of 100k steps. In a run this short beta1 = 0.9 makes nearly all of the difference;
# bias_correction lets the curvature count from its first estimate on.
optimizer_name = "sophiag"
learning_rate = 4e-4
weight_decay = 0.2
beta1 = 0.9
beta2 = 0.99
rho = 0.05
hess_interval = 10
bias_correction = True

max_iters = 5000
warmup_iters = 500

eval_interval = 500
log_interval = 50
compile = True
