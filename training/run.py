"""One training run: ranks, data, model, mixed precision, evaluation, metrics and checkpoints, for any optimizer.

with Run(config) as run:
    optimizer = torch.optim.AdamW(run.parameter_groups(), lr=config.learning_rate)
    run.attach(optimizer)
    for step in run.steps():
        run.backward(run.train_batch(step))
        run.clip_gradients()
        run.apply(optimizer.step)
"""

import collections
import contextlib
import dataclasses
import functools
import gc
import math
import os
import statistics
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GPTConfig, cross_entropy, peak_flops
from training import data
from training.checkpoint import NEWEST, PREVIOUS, CheckpointWriter, copy_to_host, kept_checkpoints, load_checkpoint
from training.curvature import hessian_vector_product
from training.distributed import Distributed, Signals
from training.errors import RunError, UserError
from training.fp8 import to_fp8
from training.loss import LinearLoss, has_kernel
from training.pretrained import load_optimizer_state, start_from
from training.schedule import learning_rate, sequence_length
from training.sharding import check_sharding, shard, shard_state, total_norm
from training.tracking import CONFIG, METRICS, SHARED, Clock, Tracker, console_line, git_commit, source_hash

PLAIN = 8  # a pass with plain attention, differentiated twice, takes so many times fewer sequences than another
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Run:
    """Everything of a training run that does not depend on the optimizer. Use as a context manager.

    tokens_per_step: labels in one optimizer step, all ranks together.
    step: the step at which the run starts, > 0 after a resume.
    Raises UserError before anything is written where settings, data or out_dir do not allow the run.
    """

    def __init__(self, config):
        self.config = config
        self._tracker = self._writer = self._ddp = None
        self._prefetcher = data.Prefetcher()
        self.world = Distributed(config.device, config.backend, config.nccl_timeout)
        self._signals = Signals()
        try:
            self._set_up()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def _set_up(self):
        config, world = self.config, self.world
        config.device, config.dtype = str(world.device), _resolve_dtype(config.dtype, world.device)
        config.gradient_accumulation_steps = _accumulation(config, world.size)
        if config.fsdp:
            check_sharding(config, world)
        if getattr(config, "hess_bs", world.size) < world.size:
            raise UserError(
                f"hess_bs = {config.hess_bs} sequences are too few for {world.size} ranks, each needs one; "
                f"use at least --hess_bs={world.size}."
            )
        self.tokens_per_step = config.total_bs * config.block_size
        settings = {key: value for key, value in vars(config).items() if key != "device"}
        world.assert_same_on_all_ranks({**settings, "code (SHA-256)": source_hash(), "torch": torch.__version__})
        config.init_from = world.on_rank0(lambda: _check_out_dir(config))
        self.corpus = world.local_rank0_first(lambda: data.open_dataset(config.dataset))
        hashes = world.local_rank0_first(lambda: data.check_dataset(self.corpus, config.total_bs, config.block_size))
        world.assert_same_on_all_ranks(hashes)

        checkpoint, resume = None, config.init_from == "resume"
        if config.init_from != "scratch":
            checkpoint = world.local_rank0_first(
                lambda: load_checkpoint(config.out_dir)[0] if resume else start_from(config)
            )
        if resume:
            _check_state_fits(config, checkpoint)
        torch.manual_seed(config.seed)
        if world.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves a product in float32
        self.model = GPT(self._model_config(checkpoint))
        if checkpoint:
            self.model.load_state_dict(checkpoint["model"])
        if config.fp8:
            to_fp8(self.model, world.device)
        if config.fsdp:
            shard(self.model, world.mesh(), DTYPES[config.dtype], config.compile)
        self.model.to(world.device)
        self.model.activation_checkpointing = config.activation_checkpointing
        torch.manual_seed(config.seed + world.rank)  # from here on only dropout draws
        if config.compile:  # a graph for each loss, sequence length and mode; beyond the limit torch stops compiling
            torch._dynamo.config.recompile_limit = 64
        self._forward = _Loss(self.model, config.compile, config.fsdp)
        self._product = _compiler(config.compile)(functools.partial(hessian_vector_product, self.model))
        if world.distributed and not config.fsdp:
            ids = [world.device.index] if world.device.type == "cuda" else None
            # A graph cut at every bucket overlaps its exchange with the backward pass. Within a machine the cuts cost
            # more than that hides: whole graphs were faster on two H200, with one pass a step and with eight.
            torch._dynamo.config.optimize_ddp = not world.one_machine
            self._ddp = DistributedDataParallel(self._forward, device_ids=ids, gradient_as_bucket_view=True)
        self._autocast = torch.autocast(
            world.device.type, dtype=DTYPES[config.dtype], enabled=config.dtype != "float32", cache_enabled=False
        )
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=config.dtype == "float16")

        self._resumed = checkpoint
        self._shared_device = SHARED in os.environ or bool(resume and checkpoint.get("shared_device"))
        self.step = checkpoint["step"] if checkpoint else 0
        self._best = checkpoint["best_val_loss"] if checkpoint else float("inf")
        counts = checkpoint["counts"] if resume else {"clipped": 0.0, "skipped": 0.0, "skipped_in_a_row": 0.0}
        self._counts = {name: torch.tensor(count, device=world.device) for name, count in counts.items()}
        self._recent_losses = collections.deque(checkpoint["recent_losses"] if resume else (), maxlen=101)
        self._grad_norm = self._grad_scale = self._loss = None
        self._compiled = set()
        self._clock = Clock(world.synchronize, checkpoint["seconds"] if checkpoint else 0.0)
        self._logged = None  # (step, seconds) of the last line that knows them
        self._peak_flops = peak_flops(_device_name(world.device), config.dtype)
        if world.is_rank0 and not config.eval_only:
            if config.init_from != "resume":
                for path in _run_files(config.out_dir):
                    path.unlink(missing_ok=True)
            self._tracker = Tracker(
                config, self._facts(hashes), self.step, checkpoint["wandb_id"] if checkpoint else None
            )
            self._writer = CheckpointWriter(config.out_dir, config.keep_checkpoints, self.step if resume else None)
        self._say(
            f"{self.model.num_params() / 1e6:.2f}M parameters, {len(self.corpus.train) / 1e6:.1f}M training tokens; "
            f"{self.tokens_per_step} tokens a step: {world.size} ranks x {config.gradient_accumulation_steps} passes x "
            f"{config.batch_size} sequences x {config.block_size}; {config.dtype} on {_device_name(world.device)}"
        )
        if checkpoint and not resume:
            self._say(checkpoint["summary"])
        if resume:
            defaults = {field.name: field.default for field in dataclasses.fields(config)}
            before = defaults | checkpoint["config"]  # which may be of a time when there were fewer settings
            now = vars(config) | {key: before[key] for key in ("init_from", "overwrite")}
            changed = [key for key in before if before[key] != now.get(key)]
            self._say(f"resumed at step {self.step}; changed since the checkpoint: {', '.join(changed) or 'nothing'}")

    def _facts(self, hashes):
        """What config.json says of the run beside its settings."""
        return {
            "git_commit": git_commit(),
            "torch": torch.__version__,
            "device_name": _device_name(self.world.device),
            "shared_device": self._shared_device,
            "world_size": self.world.size,
            "command": sys.argv,
            "data": {"train_tokens": len(self.corpus.train), "val_tokens": len(self.corpus.val), **hashes},
            "tokenizer": self.corpus.tokenizer,
            "model": {
                **dataclasses.asdict(self.model.config),
                "num_params": self.model.num_params(),
                "flops_per_token": self.model.flops_per_token(self.config.block_size),
            },
        }

    def _model_config(self, checkpoint):
        names = {field.name for field in dataclasses.fields(GPTConfig)} - {"vocab_size"}
        shape = {name: getattr(self.config, name) for name in names}
        rows = checkpoint["model_args"]["vocab_size"] if checkpoint else 0
        rows = rows if self.corpus.fits(rows) else self.corpus.model_vocab_size
        try:
            wanted = GPTConfig(vocab_size=rows, **shape)
        except ValueError as error:
            raise UserError(str(error)) from None
        for name, value in (checkpoint["model_args"] if checkpoint else {}).items():
            if name != "dropout" and getattr(wanted, name) != value:
                remedy = (
                    f"give --{name}={value}"
                    if name in names
                    else f"use the data it was trained on, not {self.corpus.folder}"
                )
                raise UserError(
                    f"the checkpoint in {self.config.out_dir} has {name} = {value}, this run would have "
                    f"{getattr(wanted, name)}; {remedy}, or name another --out_dir."
                )
        return wanted

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        explained = self.world.explain(error)
        self._prefetcher.close()
        if self._writer:
            self._writer.wait()
        if self._tracker:
            self._tracker.close()
        if not explained or self.world.backend == "gloo":
            self._ddp = None
            gc.collect()  # DDP's cycles must be gone before the process group is: gloo aborts now and then otherwise
        self.world.__exit__(kind, error, traceback)
        self._signals.restore()
        if explained:
            raise explained from error

    def _say(self, text):
        if self.world.is_rank0:
            print(text, flush=True)

    # ----- the optimizer

    def parameter_groups(self):
        """The model's parameters as groups for an optimizer: `matrices` (decayed), `embeddings`, `vectors`.

        A group's rate is `lr_scale` times that of the schedule, where it has one.
        """
        config, groups = self.config, self.model.parameter_groups(self.config.weight_decay)
        for group in groups if config.embedding_lr else ():
            if group["name"] == "embeddings":
                group["lr_scale"] = config.embedding_lr / config.learning_rate
        return groups

    def attach(self, optimizer, statistics=dict):
        """Make `optimizer` part of the run: its rate follows the schedule, its state is in checkpoints.

        `statistics()` gives more numbers to log, by metric name; it is called only where a line is logged.
        """
        self.optimizer, self._statistics = optimizer, statistics
        if self.config.fsdp:
            optimizer.register_load_state_dict_pre_hook(shard_state)
        if self._resumed and self.config.init_from == "resume":
            load_state(optimizer, self._resumed["optimizer"])
            self._scaler.load_state_dict(self._resumed["scaler"])
            _set_rng_state(self._resumed["rng"], self.world)
        elif self._resumed and self._resumed["optimizer"]:
            load_optimizer_state(optimizer, self.model, self._resumed["optimizer"][1])
        self._resumed = None

    # ----- the loop

    def steps(self):
        """Yield the steps to do. Around each: learning rate, evaluation, checkpoint, metrics."""
        config = self.config
        step = self.step
        self._clock.start()
        while True:
            if self.world.any(self._signals.received):
                if config.eval_only:
                    return
                with self._clock.paused():
                    self._save(step)
                self._finish_writing()
                self._say(f"stopped before step {step}; go on with --init_from=resume")
                return
            metrics = {"step": step, "tokens": step * self.tokens_per_step}
            if step % config.eval_interval == 0 or step == config.max_iters or config.eval_only:
                with self._clock.paused():
                    metrics["val/loss"] = self.evaluate()
                    improved, self._best = metrics["val/loss"] < self._best, min(self._best, metrics["val/loss"])
                    if step > self.step and (improved or config.always_save_checkpoint):
                        self._save(step)
            if step == config.max_iters or config.eval_only:
                self._log(metrics | {"seconds": self._clock.seconds})
                self._finish_writing()
                return
            rate = learning_rate(step, config)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            yield step
            if step % config.log_interval == 0 or "val/loss" in metrics:
                self._log(metrics | self._training_metrics(step))
            step += 1

    def _finish_writing(self):
        """Return when the last checkpoint is on disk; RunError on all ranks when it could not be written."""

        def finish():
            if self._writer:
                self._writer.wait()
                if self._writer.error:
                    raise UserError(f"the last checkpoint could not be written ({self._writer.error})")

        try:
            self.world.on_rank0(finish)
        except UserError as error:
            raise RunError(f"{error}; free space in {self.config.out_dir} and resume from the one before.") from None

    def _pieces(self, count):
        """This rank's places in a batch of `count` sequences, in equal pieces of at most batch_size; their weights.

        With these weights the mean over the ranks of the sums over the pieces is the mean over the batch.
        """
        share = self.world.share(count)
        n = next(
            n for n in range(1, len(share) + 1) if len(share) % n == 0 and len(share) // n <= self.config.batch_size
        )
        size = len(share) // n
        return [share[i * size : (i + 1) * size] for i in range(n)], size * self.world.size / count

    def _windows(self, step):
        config = self.config
        return self.corpus.train_starts(config.seed, step * config.total_bs, config.total_bs, config.block_size)

    def _pinned(self, tensor):
        """In memory from which the device copies while the host goes on; torch reuses it when the copy is done."""
        return tensor.pin_memory() if self.world.device.type == "cuda" else tensor

    def _to_device(self, tensor):
        return tensor.to(self.world.device, non_blocking=True)

    def train_batch(self, step, sequences=None):
        """This rank's share of the step's batch, or its first `sequences`: (inputs, targets, weight), (B, T) each."""
        return self._batch(step, sequences or self.config.total_bs, False)

    def curvature_batch(self, step, sequences):
        """This rank's share of the first `sequences` of the step's own batch: (inputs, uniforms, weight), (B, T) each.

        The uniforms draw the labels of `sophia.sampled_label_loss`; they belong to the sequence, whatever rank has it.
        """
        return self._batch(step, sequences, True)

    def _batch(self, *request):
        batch = self._prefetcher.get(self._prepare, *request)
        return [(self._to_device(inputs), self._to_device(labels), weight) for inputs, labels, weight in batch]

    def _prepare(self, step, sequences, curvature):
        """A batch on the host. It runs in the prefetcher's thread: it reads the run and changes nothing."""
        config = self.config
        self.corpus.check_whole()
        starts = self._windows(step)
        pieces, weight = self._pieces(sequences)
        batch = []
        for piece in pieces:
            inputs, labels = data.take_windows(self.corpus.train, starts[piece], config.block_size)
            if curvature:
                labels = data.label_uniforms(config.seed, step, piece, config.block_size)
            batch.append((self._cut(step, inputs), self._cut(step, labels), weight))
        return batch

    def _cut(self, step, windows):
        """(B, block_size) -> (B * block_size / T, T), T the sequence length of the step."""
        return self._pinned(torch.from_numpy(windows.reshape(-1, sequence_length(step, self.config))))

    def backward(self, batch, loss=cross_entropy):
        """Leave in `.grad` the gradient of the mean of `loss(logits, targets)` over the batch of all ranks.

        The ranks sync once, in the last piece. Under fp16 the gradient is computed scaled and left unscaled.
        """
        if self.config.compile and (loss, batch[0][0].shape) not in self._compiled:
            self._compile(batch[0], loss)
        self._loss, self._grad_norm, self._grad_scale = torch.zeros((), device=self.world.device), None, None
        for i, (inputs, targets, weight) in enumerate(batch):
            with self._sync(last=i + 1 == len(batch)):
                value = self._piece_loss(inputs, targets, loss) * weight
                finite = value.detach() - value.detach() + 1  # 1, or NaN: then so are the gradients, on all ranks
                self._scaler.scale(value * finite).backward()
            self._loss += value.detach()
        if self._scaler.is_enabled():
            self._scaler.unscale_(self.optimizer)
            self._scaler.update()

    def hessian_vector_product(self, batch, parameters, vectors):
        """[H @ vectors by each of `parameters`], H the Hessian of the mean loss over the batch of all ranks.

        H is that by these parameters alone. A piece is taken in parts, because of what plain attention keeps.
        """
        names = {p: name for name, p in self.model.named_parameters()}
        vectors = {names[p]: vector for p, vector in zip(parameters, vectors, strict=True)}
        totals = {name: torch.zeros_like(vector) for name, vector in vectors.items()}
        for inputs, targets, weight in batch:
            n = next(n for n in range(1, len(inputs) + 1) if len(inputs) % n == 0 and self._fits(len(inputs) // n))
            for part in zip(inputs.chunk(n), targets.chunk(n), strict=True):
                products = self._part_product(*part, vectors)
                torch._foreach_add_(list(totals.values()), [products[k] for k in totals], alpha=weight / n)
        products = [self.world.sum(total).div_(self.world.size) for total in totals.values()]
        self._grad_norm = torch.nn.utils.get_total_norm(products, foreach=True)  # what `apply` then looks at
        self._grad_scale = None
        return products

    def _fits(self, sequences):
        return sequences * PLAIN <= max(self.config.batch_size, PLAIN)

    def _part_product(self, inputs, targets, vectors):
        if self.config.compile and ("product", inputs.shape) not in self._compiled:
            self._compiled.add(("product", inputs.shape))
            with self._clock.paused(), torch.random.fork_rng(devices=_rng_devices(self.world.device)):
                self._part_product(inputs, targets, vectors)
        checkpointing, self.model.activation_checkpointing = self.model.activation_checkpointing, False
        with self._autocast:
            products = self._product(inputs, targets, vectors)
        self.model.activation_checkpointing = checkpointing  # torch's cannot be differentiated forward
        return products

    def _sync(self, last):
        """The ranks exchange gradients in the backward pass of the last piece only."""
        if self.config.fsdp:
            self.model.set_requires_gradient_sync(last)
        return self._ddp.no_sync() if self._ddp and not last else contextlib.nullcontext()

    def _piece_loss(self, inputs, targets, loss):
        with self._autocast:
            return (self._ddp or self._forward)(inputs, targets, loss)

    def _compile(self, piece, loss):
        """Compile the graphs of `loss` by a pass that leaves nothing behind, outside of the training time."""
        inputs, targets, _ = piece
        devices = _rng_devices(self.world.device)
        last = self.config.fsdp  # what FSDP has not exchanged it keeps, where zero_grad does not reach it
        with self._clock.paused(), torch.random.fork_rng(devices=devices), self._sync(last):
            self._piece_loss(inputs, targets, loss).backward()
            self.optimizer.zero_grad(set_to_none=True)
        self._compiled.add((loss, inputs.shape))

    def _gradients(self):
        return [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _measure_gradients(self):
        if self._grad_norm is None:
            self._grad_norm = total_norm(self._gradients(), self.world)
        return self._grad_norm

    def clip_gradients(self):
        """Scale the gradients down to a global norm of at most `grad_clip`: in the optimizer's step, if it can."""
        norm, limit = self._measure_gradients(), self.config.grad_clip
        if not limit:
            return
        self._counts["clipped"] += norm > limit
        if self._scales_gradients():
            self._grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0)
        else:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)

    def _scales_gradients(self):
        """Whether the optimizer knows the protocol of torch's GradScaler: `grad_scale` and `found_inf`."""
        return getattr(self.optimizer, "_step_supports_amp_scaling", False)

    def apply(self, method, **arguments):
        """Call a method of the optimizer (`step`, `update_hessian`) on the gradients, then free them.

        Where the gradients, or the Hessian-vector products, are not finite the call has no effect, on all ranks alike.
        An optimizer that knows torch's `found_inf` protocol is told so on the device; for others the host has to look.
        """
        found_inf = (~torch.isfinite(self._measure_gradients())).float()
        self._counts["skipped"] += found_inf
        self._counts["skipped_in_a_row"] += 1
        self._counts["skipped_in_a_row"] *= found_inf
        if self._scales_gradients():
            optimizers = list(getattr(self.optimizer, "parts", {"": self.optimizer}).values())
            for optimizer in optimizers:
                optimizer.grad_scale, optimizer.found_inf = self._grad_scale, found_inf
            method(**arguments)
            for optimizer in optimizers:
                del optimizer.grad_scale, optimizer.found_inf
        elif not found_inf.item():
            method(**arguments)
        self.optimizer.zero_grad(set_to_none=True)

    # ----- what it reports

    @torch.no_grad()
    def evaluate(self):
        """Mean cross-entropy over the fixed windows of val.bin, nats a token; every rank does its part."""
        config, world = self.config, self.world
        world.local_rank0_first(self.corpus.check_unchanged)
        windows = data.evaluation_starts(len(self.corpus.val), config.eval_tokens, config.block_size)
        starts, most = windows[world.rank :: world.size], -(-len(windows) // world.size)
        exact = torch.float32 if world.device.type == "mps" else torch.float64  # mps has no float64
        total = torch.zeros(2, dtype=exact, device=world.device)
        self.model.eval()
        for first in range(0, most, config.batch_size):  # as often on every rank: with fsdp all take part in each pass
            piece = starts[first : first + config.batch_size]
            inputs, targets = data.take_windows(self.corpus.val, piece, config.block_size)
            missing = config.batch_size - len(piece)  # fill up: another shape would be compiled anew
            inputs, targets = (
                torch.nn.functional.pad(torch.from_numpy(array), (0, 0, 0, missing), value=fill)
                for array, fill in ((inputs, 0), (targets, -1))
            )
            with self._autocast:
                loss = self._forward(*(self._to_device(self._pinned(tensor)) for tensor in (inputs, targets)))
            if len(piece):
                total += torch.stack([loss, torch.ones_like(loss)]).to(exact) * (len(piece) * config.block_size)
        self.model.train()
        loss, tokens = world.sum(total).tolist()
        return loss / tokens

    def _training_metrics(self, step):
        """The numbers of the step just done; one wait for the device, on all ranks."""
        config, world = self.config, self.world
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        numbers = {
            "train/loss": world.sum(self._loss.clone()) / world.size,
            "grad_norm": self._grad_norm,
            "train/clip_rate": self._counts["clipped"] / (step + 1),
            "train/skipped": self._counts["skipped"],
            "skipped_in_a_row": self._counts["skipped_in_a_row"],
            "param_norm": total_norm(parameters, world),
        }
        states = self.optimizer.state.values()
        momenta = [m for s in states for m in (s.get("exp_avg"), s.get("momentum_buffer")) if m is not None]
        if momenta:
            numbers["momentum_norm"] = total_norm(momenta, world)
        values = torch.stack([number.float() for number in numbers.values()]).tolist()
        seconds = self._clock.seconds
        metrics = dict(zip(numbers, values, strict=True)) | self._statistics()
        if (in_a_row := metrics.pop("skipped_in_a_row")) >= config.max_skipped:
            newest = world.on_rank0(lambda: self._writer and self._writer.newest())
            remedy = "start again" if newest is None else f"resume from the newest checkpoint, of step {newest}"
            raise RunError(
                f"the last {in_a_row:.0f} updates up to step {step} were not finite and were skipped; {remedy} "
                f"in {config.out_dir}, with a lower --learning_rate."
            )
        if self._recent_losses:
            metrics["train/spike"] = metrics["train/loss"] / statistics.median(self._recent_losses)
        if math.isfinite(metrics["train/loss"]):
            self._recent_losses.append(metrics["train/loss"])
        metrics |= {"lr": self.optimizer.param_groups[0]["lr"], "seconds": seconds}
        if self._logged and seconds > self._logged[1]:
            speed = (step - self._logged[0]) * self.tokens_per_step / (seconds - self._logged[1])
            metrics["tokens_per_second"] = speed
            if self._peak_flops:
                flops = self.model.flops_per_token(sequence_length(step, config))
                metrics["mfu"] = speed * flops / self._peak_flops / world.size
        if world.device.type == "cuda":
            metrics["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._logged = (step, seconds)
        return metrics

    def _log(self, metrics):
        if self.world.is_rank0:
            if self._tracker:
                self._tracker.log(metrics)
            self._say(console_line(metrics, self.config.max_iters, self.tokens_per_step))

    def _save(self, step):
        """Checkpoint before `step`, that is after `step` updates. All ranks call it, rank 0 writes."""
        rng = self.world.gather(_rng_state(self.world))
        if not self.world.is_rank0 and not self.config.fsdp:
            return
        checkpoint = {
            "model": self.model.state_dict(keep_vars=True),  # so that the tied matrix is one object
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "step": step,
            "model_args": dataclasses.asdict(self.model.config),
            "config": vars(self.config),
            "tokenizer": self.corpus.tokenizer,
            "best_val_loss": self._best,
            "counts": {name: count.item() for name, count in self._counts.items()},
            "recent_losses": list(self._recent_losses),
            "seconds": self._clock.seconds,
            "shared_device": self._shared_device,
            "rng": rng,
            "wandb_id": self._tracker and self._tracker.wandb_id,
        }
        if self._writer:
            self._writer.save(checkpoint)
        else:
            copy_to_host(checkpoint, keep=False)  # this rank's part of what rank 0 gathers


def load_state(optimizer, state):
    """The optimizer's state from a checkpoint. Its settings (betas, weight decay, ...) stay those of this run.

    State are also the groups' "params" and, where an optimizer counts its steps there, "step".
    """
    if parts := getattr(optimizer, "parts", None):
        for name, part in parts.items():
            load_state(part, state[name])
        return
    groups = []
    for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        groups.append({**own, **{key: saved[key] for key in ("params", "step") if key in saved}})
    optimizer.load_state_dict({**state, "param_groups": groups})


def _compiler(compiled):
    return functools.partial(torch.compile, dynamic=False) if compiled else lambda function: function


class _Loss(torch.nn.Module):
    """The model's loss without its logits, which with their gradient take 12 GiB at 124M x 64. Compiled or not.

    Where a gradient is wanted `LinearLoss` gives it; without, or where the model is sharded and has to gather its
    parameters itself, block by block, the model does all.
    """

    def __init__(self, model, compiled, sharded):
        super().__init__()
        self.model, self._sharded = model, sharded
        compiled = _compiler(compiled)
        self._hidden = compiled(model.hidden)
        self._whole = compiled(lambda inputs, targets, loss: model(inputs, targets, loss)[1])
        self._compiled_loss = functools.cache(lambda loss: compiled(loss))

    def forward(self, inputs, targets, loss=cross_entropy):
        if self._sharded:
            return self.model(inputs, targets, self._compiled_loss(loss))[1]
        if not torch.is_grad_enabled():
            return self._whole(inputs, targets, loss)
        hidden = self._hidden(inputs).flatten(0, 1)
        if loss is not cross_entropy and not has_kernel(loss, hidden.device):
            loss = self._compiled_loss(loss)
        return LinearLoss.apply(hidden, self.model.lm_head.weight, targets.flatten(), loss)


def _resolve_dtype(dtype, device):
    if dtype != "auto":
        if dtype == "float16" and device.type != "cuda":
            raise UserError(
                f"dtype = 'float16' needs a cuda device, this is {device}; use --dtype=bfloat16 or float32."
            )
        return dtype
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def _accumulation(config, ranks):
    """gradient_accumulation_steps, derived from total_bs, or checked against it where it was given."""
    once = config.batch_size * ranks
    steps, rest = divmod(config.total_bs, once)
    given = config.gradient_accumulation_steps
    if given is not None and given * once != config.total_bs:
        fit = f"use --total_bs={given * once}" + (f" or --gradient_accumulation_steps={steps}." if not rest else ".")
        raise UserError(
            f"total_bs = {config.total_bs} is not batch_size {config.batch_size} x gradient_accumulation_steps {given} "
            f"x {ranks} ranks = {given * once}; {fit}"
        )
    if rest:
        sizes = [size for size in range(1, config.total_bs + 1) if config.total_bs % (size * ranks) == 0]
        fit = (
            f"batch_size can be {', '.join(map(str, sizes))}."
            if sizes
            else f"use a total_bs that is a multiple of {ranks}, or another number of ranks."
        )
        raise UserError(
            f"total_bs = {config.total_bs} sequences cannot be split into batch_size {config.batch_size} "
            f"x {ranks} ranks; {fit}"
        )
    return steps


def _run_files(out_dir):
    """The files that a run has left in `out_dir`."""
    named = [Path(out_dir) / name for name in (NEWEST, PREVIOUS, METRICS, CONFIG)]
    return [path for path in named if path.exists()] + kept_checkpoints(out_dir)


def _check_out_dir(config):
    """What init_from comes to where it is "auto"; UserError where out_dir holds another run or cannot be written."""
    folder = Path(config.out_dir)
    init_from = config.init_from
    if init_from == "auto":
        init_from = "resume" if (folder / NEWEST).exists() or (folder / PREVIOUS).exists() else "scratch"
    elif init_from != "resume" and not config.overwrite and not config.eval_only and _run_files(folder):
        raise UserError(
            f"{folder} already holds a run; go on with --init_from=resume, replace it with --overwrite=True, "
            "or name another --out_dir."
        )
    if config.eval_only:
        return init_from  # writes nothing
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"out_dir = {config.out_dir!r} cannot be written ({error.strerror}); name another one."
        ) from None
    return init_from


def _check_state_fits(config, checkpoint):
    """UserError where the optimizer's state in the checkpoint is not that of this run's optimizer."""
    before, step = checkpoint["config"], checkpoint["step"]

    def adamws(start):  # a checkpoint of the very step at which Sophia starts is still AdamW's
        return 0 < start >= step

    pairs = {
        "optimizer_name": (before["optimizer_name"], config.optimizer_name),
        "adamw_for": (before.get("adamw_for", "none"), getattr(config, "adamw_for", "none")),
        "eigenbasis": (before.get("eigenbasis", False), getattr(config, "eigenbasis", False)),
        "sophia_start_iter": (before.get("sophia_start_iter", 0), getattr(config, "sophia_start_iter", 0)),
    }
    for name, (theirs, ours) in pairs.items():
        if theirs != ours and (name != "sophia_start_iter" or adamws(theirs) != adamws(ours)):
            raise UserError(
                f"the checkpoint in {config.out_dir} is of {name} = {theirs}, this is {ours}, whose optimizer wants "
                f"another state at step {step}; resume with the former, or name another --out_dir."
            )


def _device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _rng_devices(device):
    return [device] if device.type == "cuda" else []


def _rng_state(world):
    return [torch.get_rng_state()] + [torch.cuda.get_rng_state(device) for device in _rng_devices(world.device)]


def _set_rng_state(states, world):
    """Each rank's own random state; with another number of ranks than before, a fresh one."""
    if len(states) != world.size:
        torch.manual_seed(torch.initial_seed() + world.rank)
        return
    own = states[world.rank]
    torch.set_rng_state(own[0].cpu())
    for device, state in zip(_rng_devices(world.device), own[1:], strict=False):
        torch.cuda.set_rng_state(state.cpu(), device)
