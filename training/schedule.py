"""Learning rate and sequence length, as pure functions of the step. CONTRIBUTING.md says how to add a schedule."""

import bisect
import functools
import itertools
import math

from training.errors import UserError

SCHEDULES = ("cosine", "linear", "wsd", "wsd_sqrt", "cosine_restarts", "constant")
TO_ZERO = ("linear", "wsd", "wsd_sqrt")  # their min_lr is 0 where it is not given


def learning_rate(step, config):
    """Linear warm-up over `warmup_iters` steps to `learning_rate`, then `lr_schedule` down to `min_lr`.

    cosine           half a cosine, which ends at `lr_decay_iters`
    linear           a straight line, which ends there
    wsd              warm-up, stable, decay: `learning_rate`, then a straight line in the last share `wsd_decay` of
                     `lr_decay_iters` (arXiv:2404.06395, with the linear decay of arXiv:2405.18392)
    wsd_sqrt         the same with 1 - sqrt(share of the decay that is over), which falls faster at first (the 1-sqrt of
                     arXiv:2405.18392)
    cosine_restarts  half cosines of `restart_iters` steps, each `restart_multiplier` times as long as the one before
                     (SGDR, arXiv:1608.03983); the last one is cut off at `lr_decay_iters`
    constant         `learning_rate`

    From `lr_decay_iters` on, every schedule but constant stays at `min_lr`. Without `decay_lr` all steps have
    `learning_rate`. Step 0 of a warm-up has learning_rate / (warmup_iters + 1), not 0.
    """
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if config.lr_schedule == "constant":
        return config.learning_rate
    if step >= config.lr_decay_iters:
        return config.min_lr
    start, length = config.warmup_iters, config.lr_decay_iters - config.warmup_iters
    if config.lr_schedule in ("wsd", "wsd_sqrt"):
        start = max(start, config.lr_decay_iters * (1 - config.wsd_decay))
        length = config.lr_decay_iters - start
    elif config.lr_schedule == "cosine_restarts":
        start, length = period(step, config)
    progress = max(0.0, (step - start) / length) if length else 0.0
    if config.lr_schedule in TO_ZERO:
        left = 1 - (math.sqrt(progress) if config.lr_schedule == "wsd_sqrt" else progress)
    else:
        left = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + left * (config.learning_rate - config.min_lr)


def period(step, config):
    """(first step, number of steps) of the period of cosine_restarts that `step`, after the warm-up, is in."""
    start, length = config.warmup_iters, config.restart_iters
    while step >= start + length:
        start, length = start + length, length * config.restart_multiplier
    return start, length


def sequence_length(step, config):
    """Tokens in a training sequence at `step`: block_size, or the length that `block_size_schedule` gives."""
    found = stages(config)
    return found[bisect.bisect_right(found, (step, math.inf)) - 1][1]


def stages(config):
    """[(first step, tokens in a sequence)] of the run."""
    return parse_block_sizes(config.block_size_schedule, config.block_size, config.total_bs)


@functools.lru_cache(maxsize=8)
def parse_block_sizes(text, block_size, total_bs):
    """[(first step, tokens in a sequence)] of block_size_schedule, '0:128,2000:256'. UserError for another text.

    Every step has total_bs * block_size tokens, so they must divide into sequences of each length without rest.
    """
    if not text:
        return [(0, block_size)]
    setting = f"block_size_schedule = {text!r:.80}"
    try:
        phases = [tuple(int(number) for number in phase.split(":")) for phase in text.split(",")]
        starts, lengths = zip(*phases, strict=True)
    except ValueError:
        raise UserError(f"{setting} is not written as 0:128,2000:256 (STEP:LENGTH,...); correct it.") from None
    if starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
        raise UserError(f"{setting}: its steps have to begin at 0 and to rise; correct it.")
    for length in lengths:
        if not 1 <= length <= block_size:
            raise UserError(f"{setting}: {length} is not between 1 and block_size = {block_size}; correct it.")
        check_whole("total_bs", total_bs, block_size, length)
    return phases


def check_whole(name, sequences, block_size, length, ranks=1):
    """UserError where the tokens of the setting `name` are no whole number of sequences of `length` on each rank."""
    multiple = ranks * length // math.gcd(block_size, ranks * length)
    if sequences % multiple:
        on = f" on each of {ranks} ranks" if ranks > 1 else ""
        tokens = f"{name} = {sequences} times block_size = {block_size} tokens"
        problem = f"{tokens} are not a whole number of sequences of {length}{on}"
        raise UserError(f"block_size_schedule: {problem}; make {name} a multiple of {multiple}, or change {length}.")
