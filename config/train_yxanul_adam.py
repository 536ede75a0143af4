# A Llama-like model with 196M parameters (RMSNorm, RoPE, GQA, SwiGLU) in FP8, with AdamW.
# Ten stages of 2000 steps, from sequences of 8 tokens to 2048; 240 x 2048 tokens a step, 9.8B in all.
#   python train_adam.py config/train_yxanul_adam.py          # one H100 or newer; FP8 needs the package torchao

from config.train_gpt2_small_adam import *

out_dir = "out/yxanul_adam"
dataset = "fineweb"
total_bs = 240  # a multiple of 3, or 1536 would not fit
batch_size = 15
block_size = 2048
block_size_schedule = "0:8,2000:16,4000:32,6000:64,8000:128,10000:256,12000:512,14000:1024,16000:1536,18000:2048"

n_layer = 25
n_kv_head = 4
scale_attn_by_inverse_layer_idx = False
norm = "rmsnorm"
position = "rope"
mlp = "swiglu"

# The learning rate of config/train_gpt2_small_adam.py is not tuned for this model; min_lr is a twentieth of it.
max_iters = 20_000
warmup_iters = 1000

eval_interval = 1000  # and at the end of every stage
fp8 = True
