# A small character GPT on Shakespeare with Sophia-G, on a CPU: two minutes on two cores.
#   python train_sophiag.py config/train_shakespeare_char_sophiag.py

out_dir = "out/shakespeare_char_sophiag"
dataset = "shakespeare_char"
total_bs = 16
batch_size = 16
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128

# Why not the settings of the large runs: beta1 = 0.965 and a curvature that starts at 0 and remembers 100 estimates
# (1000 steps) are made for runs of 100k steps. In a run this short beta1 = 0.9 makes nearly all of the difference;
# bias_correction lets the curvature count from its first estimate on.
optimizer_name = "sophiag"
learning_rate = 1.5e-3
weight_decay = 0.4
beta1 = 0.9
beta2 = 0.99
rho = 0.2  # of rates and rhos tried: 0.05 ended at 1.786 with 9% of the coordinates unclipped, 0.2 at 1.757 with 20%
hess_interval = 10
bias_correction = True

max_iters = 1500
warmup_iters = 150

eval_interval = 250
eval_tokens = 131_072
log_interval = 50
device = "cpu"
