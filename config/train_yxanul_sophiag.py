# A Llama-like model with 196M parameters (RMSNorm, RoPE, GQA, SwiGLU) in FP8, with Sophia-G.
# Ten stages of 2000 steps, from sequences of 8 tokens to 2048; 240 x 2048 tokens a step, 9.8B in all.
#   python train_sophiag.py config/train_yxanul_sophiag.py          # one H100 or newer; FP8 needs the package torchao

out_dir = "out/yxanul_sophiag"
dataset = "fineweb"
total_bs = 240  # a multiple of 3, or 1536 would not fit
batch_size = 15
block_size = 2048
block_size_schedule = "0:8,2000:16,4000:32,6000:64,8000:128,10000:256,12000:512,14000:1024,16000:1536,18000:2048"

n_layer = 25
n_head = 12
n_kv_head = 4
n_embd = 768
norm = "rmsnorm"
position = "rope"
mlp = "swiglu"

optimizer_name = "sophiag"
# Not tuned: the learning rate of config/train_gpt2_small_adam.py, the rest of its Sophia-G.
learning_rate = 6e-4
weight_decay = 0.2
beta1 = 0.965
beta2 = 0.99
rho = 0.05
hess_interval = 10
hess_bs = 60  # a multiple of 3 too
grad_clip = 1.0

max_iters = 20_000
warmup_iters = 1000
# min_lr is learning_rate / 20 where it is not given

eval_interval = 1000  # and at the end of every stage
log_interval = 10
fp8 = True
compile = True
