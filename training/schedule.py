"""The learning rate of each step, as a pure function of the step."""

import math


def learning_rate(step, config):
    """Linear warm-up over `warmup_iters` steps to `learning_rate`, then a cosine down to `min_lr` at `lr_decay_iters`.

    Step 0 already moves: its rate is learning_rate / (warmup_iters + 1).
    """
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= config.lr_decay_iters:
        return config.min_lr
    progress = (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)
