# A model of Llama's kind with 29M parameters on Python text with AdamW: 128 sequences of 512 tokens, 1560 steps (102M
# tokens). As wide and deep as the GPT-2 of train_gpt2_30m_adam.py, with as many parameters in the MLP.
#   python data/python/prepare.py
#   python train_adam.py config/train_llama_30m_adam.py

from config.train_gpt2_30m_adam import *

out_dir = "out/llama_30m_adam"
dataset = "python"
total_bs = 128
batch_size = 128
block_size = 512

n_kv_head = 2
norm = "rmsnorm"
position = "rope"
mlp = "swiglu"

# GPT-2's best settings of 30m_tuning, not tuned for this model. In experiments/30m_llama (780 steps, other settings)
# half of this learning rate was best.
learning_rate = 4e-3
embedding_lr = 1.6e-2
weight_decay = 0.2

max_iters = 1560
warmup_iters = 624

eval_interval = 390
