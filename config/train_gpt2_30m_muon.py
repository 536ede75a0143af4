# GPT-2 with 30M parameters on OpenWebText with Muon: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_adam.py config/train_gpt2_30m_muon.py

from config.train_gpt2_30m_adam import *

out_dir = "out/gpt2_30m_muon"

optimizer_name = "muon"
# Not tuned: AdamW's learning rate and decay, to which Muon's update is scaled. beta1 and beta2 are of its AdamW part.
momentum = 0.95
