"""A training run: ranks, data, model, evaluation, metrics and checkpoints, whatever the optimizer.

with Run(config) as run:
    run.set_optimizer(make_optimizer)
    for step in run.steps():
        run.backward(run.train_batch(step))
        run.optimizer_step()
"""

import collections
import dataclasses
import gc
import math
import os
import statistics
import sys
from pathlib import Path

import torch

from model import GPT, GPTConfig
from training import data, optimizers
from training.checkpoint import (
    NEWEST,
    PREVIOUS,
    CheckpointWriter,
    checkpoint_sha256,
    copy_to_host,
    kept_checkpoints,
    load_checkpoint,
    read_checkpoint,
    set_aside_unreadable,
)
from training.config import with_current_values
from training.distributed import Distributed
from training.errors import RunError, UserError
from training.flops import ESTIMATE_COST, peak_flops, run_flops
from training.fp8 import to_fp8
from training.hf import load_optimizer_state, start_from
from training.lock import RunLock
from training.metrics import CONFIG, METRICS
from training.monitor import Signals
from training.schedule import learning_rate, sequence_length
from training.sharding import check_sharding, shard, shard_state, total_norm
from training.step import DTYPES, Batches, TrainStep
from training.tracking import SHARED, Clock, Tracker, console_line, git_state, source_hash


class Run:
    """A training run, from its settings to its files. Use it as a context manager.

    tokens_per_step: labels in one optimizer step, all ranks together.
    step: the step at which the run starts, > 0 after a resume.
    optimizer: None before `set_optimizer`.
    Raises UserError, before anything is written, if settings, data or out_dir do not allow the run.
    """

    def __init__(self, config):
        self.config = config
        self._tracker = self._writer = self._batches = self._train_step = self._lock = None
        self._busy = 0.0  # seconds since the last line in which this rank did not wait for the others
        self.world = Distributed(config.device, config.backend, config.nccl_timeout)
        self._signals = Signals()
        if self.world.size > 1:
            self._signals.rank_lost = self.world.rank_lost
        try:
            self._set_up()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def _set_up(self):
        config, world = self.config, self.world
        _warn_of_separate_tasks()
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
        world.on_rank0(self._claim_out_dir)
        config.init_from = world.on_rank0(lambda: _check_out_dir(config))
        self.corpus = world.local_rank0_first(lambda: data.open_dataset(config.dataset))
        hashes = world.local_rank0_first(lambda: data.check_dataset(self.corpus, config.total_bs, config.block_size))
        world.assert_same_on_all_ranks(hashes)

        checkpoint, resume = None, config.init_from == "resume"
        if config.init_from != "scratch":
            checkpoint = self._load_checkpoint() if resume else world.local_rank0_first(lambda: start_from(config))
        if resume:
            checkpoint["config"] = with_current_values(type(config), checkpoint["config"])
            optimizers.check_state_fits(config, checkpoint)
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
        self._clock = Clock(world.synchronize, checkpoint["seconds"] if checkpoint else 0.0)
        self._batches = Batches(config, self.corpus, world)
        self._train_step = TrainStep(config, self.model, world, self._clock)
        if resume:
            self._train_step.set_counts(checkpoint["counts"])

        self._resumed = checkpoint
        self._shared_device = SHARED in os.environ or bool(resume and checkpoint.get("shared_device"))
        self.step = checkpoint["step"] if checkpoint else 0
        self._best = checkpoint["best_val_loss"] if checkpoint else float("inf")
        self._recent_losses = collections.deque(checkpoint["recent_losses"] if resume else (), maxlen=101)
        self._logged = None  # (step, seconds) of the last line with both
        self._peak_flops = peak_flops(world.device_name, config.dtype)
        before = checkpoint.get("flops") if resume else None  # of settings that may have been others
        self._flops_before = 0 if before is None else before - self._flops(self.step)
        if world.is_rank0 and not config.eval_only:
            if config.init_from != "resume":
                for path in _run_files(config.out_dir):
                    path.unlink(missing_ok=True)
            self._tracker = Tracker(
                config, self._facts(hashes), self.step, checkpoint["wandb_id"] if checkpoint else None
            )
            self._writer = CheckpointWriter(config.out_dir, config.keep_checkpoints, self.step if resume else None)
            world.finish = self._writer.wait
        self._say(
            f"{self.model.num_params() / 1e6:.2f}M parameters, {len(self.corpus.train) / 1e6:.1f}M training tokens; "
            f"{self.tokens_per_step} tokens a step: {world.size} ranks x {config.gradient_accumulation_steps} passes x "
            f"{config.batch_size} sequences x {config.block_size}; {config.dtype} on {world.device_name}"
        )
        if checkpoint and not resume:
            self._say(checkpoint["summary"])
        if resume:
            defaults = {field.name: field.default for field in dataclasses.fields(config)}
            before = defaults | checkpoint["config"]  # an older checkpoint has fewer settings
            now = vars(config) | {key: before[key] for key in ("init_from", "overwrite")}
            changed = [key for key in before if before[key] != now.get(key)]
            self._say(f"resumed at step {self.step}; changed since the checkpoint: {', '.join(changed) or 'nothing'}")

    def _claim_out_dir(self):
        """Take the lock of out_dir, before anything in it is read or removed."""
        if not self.config.eval_only:
            try:
                Path(self.config.out_dir).mkdir(parents=True, exist_ok=True)
                self._lock = RunLock(self.config.out_dir)
            except OSError as error:
                raise UserError(
                    f"out_dir = {self.config.out_dir!r} cannot be written ({error.strerror}); name another one."
                ) from None

    def _load_checkpoint(self):
        """The checkpoint to resume: rank 0 chooses the file, and all ranks make sure that they have the same."""
        config, world, chosen = self.config, self.world, []

        def choose():
            checkpoint, path = load_checkpoint(config.out_dir)
            chosen.append(checkpoint)
            return path

        path = world.on_rank0(choose)
        checkpoint = world.local_rank0_first(lambda: chosen[0] if chosen else read_checkpoint(path))
        world.assert_same_on_all_ranks(
            {"step": checkpoint["step"], "SHA-256": checkpoint_sha256(path)},
            f"read different checkpoints from {path}, with another",
            "out_dir must be one folder that all machines see",
        )
        if path.name == PREVIOUS and not config.eval_only:
            world.on_rank0(lambda: set_aside_unreadable(config.out_dir))
        return checkpoint

    def _facts(self, hashes):
        """What config.json holds beside the settings."""
        commit, clean = git_state()
        return {
            "git_commit": commit,
            "clean": clean,
            "source_sha256": source_hash(),
            "torch": torch.__version__,
            "device_name": self.world.device_name,
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
        if self._batches:
            self._batches.close()
        if kind is None:
            self.world.on_rank0(self._close_files)  # may take longer than the other ranks may wait at once
        else:
            self._close_files()
        if self._train_step and (not explained or self.world.backend == "gloo"):
            self._train_step.close()
            gc.collect()  # DDP's cycles have to go before the process group: gloo sometimes aborts otherwise
        self.world.__exit__(kind, error, traceback)
        self._signals.restore()
        if explained:
            raise explained from error

    def _close_files(self):
        for close in (
            self._writer and self._writer.wait,
            self._tracker and self._tracker.close,
            self._lock and self._lock.release,
        ):
            if close:
                close()

    def _say(self, text):
        if self.world.is_rank0:
            print(text, flush=True)

    # ----- one step: what a training script calls

    @property
    def optimizer(self):
        return self._train_step.optimizer

    def set_optimizer(self, make):
        """Step with the optimizer `make(config, parameter groups, device)`; on a resume it gets its state. Return it.

        Its learning rates follow the schedule and its state is in checkpoints.
        """
        optimizer = self._train_step.optimizer = make(self.config, self.parameter_groups(), self.world.device)
        if self.config.fsdp:
            optimizer.register_load_state_dict_pre_hook(shard_state)
        if self._resumed and self.config.init_from == "resume":
            optimizers.load_state(optimizer, self._resumed["optimizer"])
            self._train_step.scaler.load_state_dict(self._resumed["scaler"])
            self.world.set_rng_state(self._resumed["rng"])
        elif self._resumed and self._resumed["optimizer"]:
            load_optimizer_state(optimizer, self.model, self._resumed["optimizer"][1])
        self._resumed = None
        return optimizer

    def parameter_groups(self):
        """The model's parameter groups. One with an `lr_scale` has so many times the schedule's learning rate."""
        config, groups = self.config, self.model.parameter_groups(self.config.weight_decay)
        for group in groups if config.embedding_lr else ():
            if group["name"] == "embeddings":
                group["lr_scale"] = config.embedding_lr / config.learning_rate
        return groups

    def train_batch(self, step):
        """This rank's share of the step's batch, for `backward`."""
        return self._batches.train(step)

    def curvature_step(self, step):
        """Renew the optimizer's curvature by an estimate on the first hess_bs sequences of the step's batch."""
        self._train_step.curvature_step(self._batches, step)

    def backward(self, batch):
        """Leave in `.grad` the gradient of the mean loss over the batch of all ranks."""
        self._train_step.backward(batch)

    def optimizer_step(self):
        """Clip the gradients, step unless they are not finite, and free them."""
        self._train_step.optimizer_step()

    # ----- the loop

    def steps(self):
        """Yield the steps to do. Around each: learning rate, evaluation, checkpoint, metrics."""
        config = self.config
        step = self.step
        self._clock.start()
        while True:
            self.world.at_step(step)
            stop = self.world.largest(2 if self._signals.launcher_gone else bool(self._signals.received))
            if stop:
                if config.eval_only:
                    return
                with self._clock.paused():
                    self._save(step)
                self._finish_writing()
                if stop == 2:
                    raise RunError(
                        f"torchrun is gone and step {step} is checkpointed; go on with torchrun and --init_from=auto."
                    )
                self._say(f"stopped before step {step}; go on with --init_from=resume")
                return
            metrics = {}
            if step % config.eval_interval == 0 or step == config.max_iters or config.eval_only:
                with self._clock.paused():
                    metrics["val/loss"] = self.evaluate()
                    improved, self._best = metrics["val/loss"] < self._best, min(self._best, metrics["val/loss"])
                    if step > self.step and (improved or config.always_save_checkpoint):
                        self._save(step)
            if step == config.max_iters or config.eval_only:
                self._log(step, metrics | {"seconds": self._clock.seconds})
                self._finish_writing()
                return
            lr = learning_rate(step, config)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            began = self.world.busy_seconds
            yield step
            self._busy += self.world.busy_seconds - began
            if step % config.log_interval == 0 or "val/loss" in metrics:
                self._log(step, metrics | self._training_metrics(step))
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

    # ----- evaluation, metrics, checkpoints

    def _flops(self, step):
        """FLOPs of the steps before `step` under the settings of now, all ranks together."""
        estimate = optimizers.OPTIMIZERS[self.config.optimizer_name].estimate
        return run_flops(step, self.config, self.model.flops_per_token, ESTIMATE_COST[estimate])

    @torch.no_grad()
    def evaluate(self):
        """Mean cross-entropy over the fixed windows of val.bin in nats a token. The ranks share the windows."""
        config, world = self.config, self.world
        world.local_rank0_first(self.corpus.check_unchanged)
        windows = data.evaluation_starts(len(self.corpus.val), config.eval_tokens, config.block_size)
        starts, most = windows[world.rank :: world.size], -(-len(windows) // world.size)
        exact = torch.float32 if world.device.type == "mps" else torch.float64  # mps has no float64
        total = torch.zeros(2, dtype=exact, device=world.device)
        self.model.eval()
        for first in range(0, most, config.batch_size):  # as often on every rank: with fsdp each pass needs all
            places = starts[first : first + config.batch_size]
            inputs, targets = data.take_windows(self.corpus.val, places, config.block_size)
            missing = config.batch_size - len(places)  # filled up: another shape would be compiled anew
            inputs, targets = (
                torch.nn.functional.pad(torch.from_numpy(array), (0, 0, 0, missing), value=fill)
                for array, fill in ((inputs, 0), (targets, -1))
            )
            batches = self._batches
            loss = self._train_step.evaluation_loss(
                *(batches.to_device(batches.pinned(tensor)) for tensor in (inputs, targets))
            )
            if len(places):
                total += torch.stack([loss, torch.ones_like(loss)]).to(exact) * (len(places) * config.block_size)
        self.model.train()
        loss, tokens = world.sum(total).tolist()
        return loss / tokens

    def _training_metrics(self, step):
        """The metrics of the step just done. All ranks call it and wait once for their device."""
        config, world, done = self.config, self.world, self._train_step
        numbers = {
            "train/loss": world.sum(done.loss.clone()) / world.size,
            "grad_norm": done.grad_norm,
            "train/clip_rate": done.counts["clipped"] / (step + 1),
            "train/skipped": done.counts["skipped"],
            "skipped_in_a_row": done.counts["skipped_in_a_row"],
            "param_norm": total_norm(done.parameters, world),
        }
        states = self.optimizer.state.values()
        momenta = [m for s in states for m in (s.get("exp_avg"), s.get("momentum_buffer")) if m is not None]
        if momenta:
            numbers["momentum_norm"] = total_norm(momenta, world)
        with world.waiting():
            values = torch.stack([number.float() for number in numbers.values()]).tolist()
        seconds = self._clock.seconds
        metrics = dict(zip(numbers, values, strict=True)) | optimizers.statistics(config, self.optimizer)
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
        if world.size > 1:
            busy, self._busy = world.gather(self._busy), 0.0
            metrics |= {
                "slowest_rank": busy.index(max(busy)),
                "seconds_behind": max(busy) - statistics.median_low(busy),
            }
        if world.device.type == "cuda":
            metrics["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._logged = (step, seconds)
        return metrics

    def _log(self, step, metrics):
        if self.world.is_rank0:
            flops = float(self._flops_before + self._flops(step))
            metrics = {"step": step, "tokens": step * self.tokens_per_step, "flops": flops} | metrics
            if self._tracker:
                self._tracker.log(metrics)
            self._say(console_line(metrics, self.config.max_iters, self.tokens_per_step))

    def _save(self, step):
        """Write the checkpoint after `step` updates. All ranks call it, rank 0 writes."""
        rng = self.world.gather(self.world.rng_state())
        if not self.world.is_rank0 and not self.config.fsdp:
            return
        checkpoint = {
            "model": self.model.state_dict(keep_vars=True),  # keeps the tied matrix one object
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._train_step.scaler.state_dict(),
            "step": step,
            "model_args": dataclasses.asdict(self.model.config),
            "config": vars(self.config),
            "tokenizer": self.corpus.tokenizer,
            "best_val_loss": self._best,
            "counts": {name: count.item() for name, count in self._train_step.counts.items()},
            "recent_losses": list(self._recent_losses),
            "seconds": self._clock.seconds,
            "flops": self._flops_before + self._flops(step),
            "shared_device": self._shared_device,
            "rng": rng,
            "wandb_id": self._tracker and self._tracker.wandb_id,
        }
        if self._writer:
            self._writer.save(checkpoint)
        else:
            copy_to_host(checkpoint, keep=False)  # rank 0 gathers this rank's shards


def _warn_of_separate_tasks():
    """Warn if a launcher started several processes that do not know of each other."""
    for count, number in (("SLURM_NTASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")):
        tasks = os.environ.get(count, "")
        if "RANK" not in os.environ and tasks.isdigit() and int(tasks) > 1 and os.environ.get(number, "0") == "0":
            print(
                f"warning: {count} = {tasks}, but RANK is not set: this process trains alone; start one torchrun a "
                "machine (docs/training.md) to train together.",
                file=sys.stderr,
            )


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
    """gradient_accumulation_steps: derived from total_bs or, if it was given, checked against it."""
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
    """The files of an earlier run in `out_dir`."""
    named = [Path(out_dir) / name for name in (NEWEST, PREVIOUS, METRICS, CONFIG)]
    return [path for path in named if path.exists()] + kept_checkpoints(out_dir)


def _check_out_dir(config):
    """init_from, with "auto" resolved. UserError if out_dir holds another run or cannot be written."""
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
