"""Bytes that the ranks exchange in a step, and the exchange's share of the time, by the formulas of docs/scaling.md.

inside, across = bytes_sent(config, parameters, matrices, ranks=64)    # by a GPU, within its node and to others
share = time_share(config, parameters, matrices, ranks=64, flops=..., peak=989e12)
"""

NODE = 8  # GPUs
NVLINK, NETWORK = 400e9, 50e9  # bytes a second that a GPU sends
MFU = 0.53  # share of its peak that a GPU by itself reaches: 124M and 355M on an H200
MUON_TRIPS = {"muon": 2, "whitened_muon": 3, "sophia_muon": 2}  # momentum and update; for factors the gradient too


def bytes_sent(config, parameters, matrices, ranks, node=NODE):
    """(bytes to GPUs of its node, bytes to other nodes) that a GPU sends in an optimizer step in bfloat16.

    parameters, matrices: how many numbers the model, and its hidden matrices, have. Gradients are float32. A ring
    passes through each node once, so the GPUs of a node share what leaves it. fsdp_shard is a node's GPUs or fewer.
    """
    here, nodes, trips = min(ranks, node), -(-ranks // node), MUON_TRIPS.get(config.optimizer_name, 0)
    if not config.fsdp:
        ring = 2 * 4 * parameters + 2 * matrices * bool(trips)  # an all-reduce, and Muon's updates to all
        return ring * (ranks - 1) / ranks, ring * (nodes - 1) / nodes / here
    shards, passes, keep = config.fsdp_shard or ranks, config.gradient_accumulation_steps, config.fsdp_keep
    once = 2 * matrices + 4 * (parameters - matrices)  # embeddings and norms are gathered in float32
    gathered = once if keep == "all" else passes * (once + 2 * matrices)  # matrices before each forward and backward
    ring = gathered + 4 * parameters * (passes if keep == "nothing" else 1)
    direct = trips * 2 * matrices / shards  # from each to each
    if shards <= here:  # between copies each GPU sums up its shard's gradient
        copies = ranks // shards
        across = 2 * 4 * parameters / shards * (copies - 1) / copies if copies > 1 else 0.0
        return (ring + direct) * (shards - 1) / shards, across
    inside = ring * (shards - 1) / shards + direct * (here - 1) / shards
    return inside, ring * (nodes - 1) / nodes / here + direct * (shards - here) / shards


def time_share(config, parameters, matrices, ranks, flops, peak):
    """The share of a step's time that the exchange takes, if none of it overlaps with the computation.

    flops: of a token's forward and backward pass. peak: FLOP/s of a GPU, of which it reaches MFU.
    """
    inside, across = bytes_sent(config, parameters, matrices, ranks)
    exchange = inside / NVLINK + across / NETWORK
    compute = config.total_bs * config.block_size / ranks * flops / (MFU * peak)
    return exchange / (exchange + compute)
