"""What the ranks exchange in a step, and how much of its time that takes, by the formulas of docs/training.md.

inside, across = bytes_sent(config, parameters, matrices, ranks=64)    # by a GPU, within its node and to others
share = time_share(config, model, ranks=64, peak=989e12)
"""

NODE = 8  # GPUs
NVLINK, NETWORK = 400e9, 50e9  # bytes a second that a GPU sends
MFU = 0.53  # share of the peak that a GPU by itself reaches, measured at 124M and 355M on an H200
FACTOR_TRIPS = {"muon": 2, "whitened_muon": 3, "sophia_muon": 2}  # momentum and update; the gradient too for factors


def bytes_sent(config, parameters, matrices, ranks, node=NODE):
    """(bytes to GPUs of the node, bytes to other nodes) that a GPU sends in an optimizer step.

    parameters, matrices: how many numbers the model, and its hidden matrices, have. Compute is in bfloat16. Rings pass
    through a node once, so all GPUs of a node share what leaves it.
    """
    passes = config.gradient_accumulation_steps
    here, nodes = min(ranks, node), -(-ranks // node)
    shards = (config.fsdp_shard or ranks) if config.fsdp else 1
    muon = FACTOR_TRIPS.get(config.optimizer_name, 0)
    if not config.fsdp:
        gathered, reduced = 2 * matrices if muon else 0, 2 * 4 * parameters  # an all-reduce is a scatter and a gather
    else:
        others = parameters - matrices  # gathered in float32 and kept until the backward pass
        all_kept = config.fsdp_keep == "all"
        gathered = 2 * matrices + 4 * others if all_kept else passes * (2 * 2 * matrices + 4 * others)
        reduced = (passes if config.fsdp_keep == "nothing" else 1) * 4 * parameters
    inside, across = (gathered + reduced) * (here - 1) / here, 0.0
    if shards == ranks or not config.fsdp:
        inside, across = (gathered + reduced) * (ranks - 1) / ranks, (gathered + reduced) * (nodes - 1) / nodes / here
    elif nodes > 1:  # copies on other nodes: an all-reduce of the shard's gradient
        across = 2 * 4 * parameters / shards * (nodes - 1) / nodes
    if config.fsdp:  # all-to-alls within the shards
        sent = muon * 2 * matrices / shards
        inside += sent * (min(shards, here) - 1) / shards
        across += sent * max(0, shards - here) / shards
    return inside, across


def time_share(config, flops_per_token, parameters, matrices, ranks, peak):
    """The share of a step's time that the exchange takes where none of it overlaps with the computation."""
    inside, across = bytes_sent(config, parameters, matrices, ranks)
    exchange = inside / NVLINK + across / NETWORK
    compute = config.total_bs * config.block_size / ranks * flops_per_token / (peak * MFU)
    return exchange / (exchange + compute)
