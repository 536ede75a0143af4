# OpenAI's 124M GPT-2 trained on with Shakespeare's works and AdamW: 32 sequences a step, 100 steps (2 epochs).
#   python train_adam.py config/finetune_shakespeare_adam.py
# The weights come from Hugging Face's hub at the first use; --init_from=gpt2-xl for the largest, with its shape below
# when the run is resumed.

out_dir = "out/finetune_shakespeare_adam"
init_from = "gpt2"
dataset = "shakespeare"
total_bs = 32
batch_size = 4
block_size = 1024

n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.1  # 2 epochs of 1.4M tokens
bias = True  # as OpenAI's model has them

# A small, nearly constant rate, as nanoGPT's example has it: the weights are good already.
optimizer_name = "adamw"
learning_rate = 3e-5
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

max_iters = 100
warmup_iters = 10

eval_interval = 20
eval_tokens = 131_072
log_interval = 1
always_save_checkpoint = False  # keep the best: the loss on held-out text rises again in long runs
