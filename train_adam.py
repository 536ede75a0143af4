"""Pre-train GPT-2 with a first-order optimizer: the baseline that Sophia has to beat.

python train_adam.py config/train_shakespeare_char_adam.py
torchrun --standalone --nproc_per_node=8 train_adam.py config/train_gpt2_small_adam.py --batch_size=12
"""

import sys
from dataclasses import dataclass

import torch

from training.config import TrainConfig, load_config, setting
from training.errors import command
from training.run import Run


@dataclass
class AdamConfig(TrainConfig):
    """The settings of a run with a first-order optimizer."""

    optimizer_name: str = setting("adamw", "which optimizer", choices=("adamw",))


def main(words=None):
    config = load_config(AdamConfig, sys.argv[1:] if words is None else words)
    with Run(config) as run:
        optimizer = torch.optim.AdamW(
            run.parameter_groups(),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=run.world.device.type in ("cuda", "cpu"),
        )
        run.attach(optimizer)
        for step in run.steps():
            run.backward(run.train_batch(step))
            run.clip_gradients()
            run.apply(optimizer.step)


if __name__ == "__main__":
    command(main)
