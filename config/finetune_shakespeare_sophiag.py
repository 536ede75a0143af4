# OpenAI's 124M GPT-2 trained on with Shakespeare's works and Sophia-G: 32 sequences a step, 100 steps (2 epochs).
#   python train_sophiag.py config/finetune_shakespeare_sophiag.py
# The weights come from Hugging Face's hub at the first use; --init_from=gpt2-xl for the largest, with its n_layer,
# n_head and n_embd when the run is resumed.

from config.finetune_shakespeare_adam import *

out_dir = "out/finetune_shakespeare_sophiag"

# AdamW's small learning rate stays: no coordinate moves by more than it in a step. Why not the settings of the large
# runs: see train_shakespeare_char_sophiag.py; in 100 steps there are 20 estimates of the curvature.
optimizer_name = "sophiag"
weight_decay = 0.2
beta2 = 0.99
hess_interval = 5
bias_correction = True
