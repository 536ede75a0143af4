# A model of Llama's kind with 29M parameters on Python text with AdamW: 128 sequences of 512 tokens, 1560 steps (102M
# tokens). As wide and deep as the GPT-2 of train_gpt2_30m_adam.py, with as many parameters in the MLP.
#   python data/python/prepare.py
#   python train_adam.py config/train_llama_30m_adam.py

out_dir = "out/llama_30m_adam"
dataset = "python"
total_bs = 128
batch_size = 128
block_size = 512

n_layer = 6
n_head = 6
n_kv_head = 2
n_embd = 384
norm = "rmsnorm"
position = "rope"
mlp = "swiglu"

optimizer_name = "adamw"
# GPT-2's best settings in runs of this length (experiments/30m_tuning); not tuned for this model.
learning_rate = 4e-3
embedding_lr = 1.6e-2
weight_decay = 0.2
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

max_iters = 1560
warmup_iters = 624
# min_lr is learning_rate / 20 where it is not given

eval_interval = 390
log_interval = 10
compile = True
