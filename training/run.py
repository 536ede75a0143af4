"""A training run: ranks, data, model, evaluation, metrics and checkpoints, whatever the optimizer.

with Run(config) as run:
    run.set_optimizer(make_optimizer)
    for step in run.steps():
        run.backward(run.train_batch(step))
        run.optimizer_step()
"""

import collections
import contextlib
import dataclasses
import gc
import math
import os
import shutil
import statistics
import sys
import types
from pathlib import Path

import torch

from model import GPT, GPTConfig
from training import checkpoint as checkpoints
from training import data, optimizers
from training.config import model_config, with_current_values
from training.distributed import Distributed
from training.errors import RunError, UserError, file_errors, is_out_of_memory
from training.flops import ESTIMATE_COST, peak_flops, run_flops
from training.foreign import read_json, restoring
from training.fp8 import check_fp8_loss, check_fp8_tokens, to_fp8
from training.hf import MODEL_SETTINGS, load_optimizer_state, sha256_of, start_from, take_model_settings
from training.lock import RunLock, check_shared
from training.memory import estimate, largest, memory_of, micro_batch_sizes, sentence
from training.metrics import CONFIG, METRICS
from training.monitor import Signals
from training.schedule import check_whole, learning_rate, sequence_length, stages
from training.sharding import check_sharding, read_state, set_weights, shard, shard_state, total_norm
from training.shards import PartWriter
from training.startup import attention_line, keep_compiled_code
from training.step import DTYPES, Batches, TrainStep
from training.terminal import warn, warn_once
from training.tokenizer import identity as tokenizer_identity
from training.tracking import SHARED, Clock, Tracker, console_line, git_state, source_hash


class Run:
    """A training run, from its settings to its files. Use it as a context manager.

    tokens_per_step: labels in one optimizer step, all ranks together.
    step: the step at which the run starts, > 0 after a resume.
    optimizer: None before `set_optimizer`.
    Raises UserError, before anything is written, if settings, data or out_dir do not allow the run.
    """

    def __init__(self, config):
        self.config, self.corpus = config, None
        self._tracker = self._writer = self._batches = self._train_step = self._lock = self._made = None
        self._busy = 0.0  # seconds since the last line in which this rank did not wait for the others
        self.world = Distributed(config.device, config.backend, config.nccl_timeout)
        self._signals = Signals()
        if config.eval_only:
            self._signals.ends = "after this evaluation"
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
        if config.compile:
            keep_compiled_code(world.device)
        config.device, config.dtype = str(world.device), _resolve_dtype(config.dtype, world.device)
        settings = {key: value for key, value in vars(config).items() if key != "device"}
        world.assert_same_on_all_ranks({**settings, "code (SHA-256)": source_hash(), "torch": str(torch.__version__)})
        config.gradient_accumulation_steps = _accumulation(config, world.size)
        if config.fsdp:
            check_sharding(config, world)
        for name in ("total_bs", "hess_bs")[: 1 + (config.fsdp and hasattr(config, "hess_bs"))]:
            for _, length in stages(config):
                check_whole(name, getattr(config, name), config.block_size, length, world.size)
        if getattr(config, "hess_bs", world.size) < world.size:
            few = f"hess_bs = {config.hess_bs} sequences are too few for {world.size} ranks, each needs one"
            raise UserError(f"{few}; use at least --hess_bs={world.size}.")
        self.tokens_per_step = config.total_bs * config.block_size
        owner = world.on_rank0(self._claim_out_dir)
        if owner and not world.one_machine:
            world.local_rank0_first(lambda: check_shared(config.out_dir, owner))
        config.init_from = world.on_rank0(lambda: _check_out_dir(config))
        checkpoint, origin, resume, differing = None, None, config.init_from == "resume", []
        elsewhere = False  # whether the checkpoint is another run's, which goes on in this out_dir
        if not resume and config.init_from != "scratch":
            checkpoint = self._load_weights()
        if resume:
            checkpoint, origin = self._load_checkpoint()
            elsewhere = origin.parent.resolve() != Path(config.out_dir).resolve()
            if elsewhere and not config.eval_only:
                world.on_rank0(lambda: _check_empty(config))
            elif config.overwrite:
                warn_once(f"overwrite has no effect on a resume: the run in {config.out_dir} goes on.")
            if config.new_from not in ("scratch", "resume"):  # the weights that it started with say what model it is
                checkpoint["unused"] = take_model_settings(config, checkpoint["model_args"])
                began = checkpoint.get("facts", {}).get("weights", "scratch")
                if _place(began) != _place(config.new_from):
                    warn_once(f"{config.new_from} is not read: {origin} goes on, and its run began from {began}.")
            checkpoint["config"] = with_current_values(type(config), checkpoint["config"], origin)
            first = Path(checkpoint["config"].get("out_dir", config.out_dir))
            if elsewhere or (os.path.exists(first / METRICS) and not os.path.samefile(first, config.out_dir)):
                checkpoint["wandb_id"] = None  # the run that out_dir is a copy of goes on under it
            with restoring(origin, "settings"):
                before = types.SimpleNamespace(**{**vars(config), **checkpoint["config"]})
                self._lr_before = float(learning_rate(checkpoint["step"], before))
            differing = optimizers.state_differences(config, checkpoint)
        try:
            self.corpus = world.local_rank0_first(lambda: data.open_dataset(config.dataset))
        except UserError:
            if not resume or checkpoint["config"]["dataset"] == config.dataset:
                raise
            differing.append(("dataset", checkpoint["config"]["dataset"], config.dataset))
        model_config = self._model_config(checkpoint, differing)
        self.step = checkpoint["step"] if checkpoint else 0
        if resume and self.step > config.max_iters and not config.eval_only:
            below = f"max_iters = {config.max_iters} is below step {self.step} of the checkpoint in {config.out_dir}"
            raise UserError(f"{below}; use at least --max_iters={self.step}.")
        sizes = config.total_bs, config.block_size
        self._hashes = world.local_rank0_first(lambda: data.check_dataset(self.corpus, *sizes))
        different = f"read different files of dataset = {config.dataset}, with another"
        world.assert_same_on_all_ranks(self._hashes, different, "give all machines the same files")
        self._facts = {"source_sha256": source_hash(), "torch": str(torch.__version__)}
        self._facts |= {"device_name": world.device_name, "world_size": world.size}
        weights = checkpoint.get("facts", {}).get("weights", "scratch") if resume else config.init_from
        self._facts |= {"weights": weights} if weights != "scratch" else {}

        torch.manual_seed(config.seed)
        if world.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves a product in float32
        with torch.device("meta") if config.fsdp else contextlib.nullcontext():
            self.model = GPT(model_config)
        if checkpoint and not config.fsdp:
            self.model.load_state_dict(checkpoint["model"])
        if config.fp8:
            to_fp8(self.model, world.device)
        if config.fsdp:
            shard(self.model, world.mesh(config.fsdp_shard), DTYPES[config.dtype], config.compile)
            world.on_all_ranks(lambda: set_weights(self.model, checkpoint, world.device))
        self.model.to(world.device)
        self._names = {p: name for name, p in self.model.named_parameters()}
        self.model.activation_checkpointing = config.activation_checkpointing
        torch.manual_seed(config.seed + world.rank)  # from here on only dropout draws
        self._clock = Clock(world.synchronize, checkpoint["seconds"] if checkpoint else 0.0)
        self._batches = Batches(config, self.corpus, world, (self.step, _sequences_seen(config, checkpoint)))
        self._train_step = TrainStep(config, self.model, world, self._clock)
        if config.batch_size == "auto":
            self._choose_batch_size(checkpoint["config"].get("batch_size", 0) if resume else None)
        if config.fp8_loss:
            tokens = self._batches.tokens_at_once(config.total_bs)
            world.on_all_ranks(lambda: check_fp8_loss(world.device, model_config, tokens))
        if config.fp8:
            estimates = getattr(config, "hess_bs", config.total_bs)
            tokens = [n for count in (config.total_bs, estimates) for n in self._batches.tokens_at_once(count)]
            world.on_all_ranks(lambda: check_fp8_tokens(tokens))
        self._changed = self._changes(checkpoint) if resume else {}
        self._history = list(checkpoint.get("history", [])) if resume else []
        self._history += [{"step": self.step, "changed": self._changed}] if self._changed else []
        with restoring(origin, "counters"):
            self._train_step.load_state_dict(checkpoint if resume else {"step": self.step})
        if "block_size_schedule" in self._changed:  # the steps before are of no stage of this schedule
            self._train_step.start_stage(self.step)

        self._resumed, self._origin = checkpoint, origin
        self._shared_device = SHARED in os.environ or (resume and checkpoint.get("shared_device") is True)
        windows = [self._windows(tokens) for tokens in self._changed.get("eval_tokens", ())]
        self._remeasured = "val_sha256" in self._changed or any(count != windows[0] for count in windows)
        self._best = checkpoint["best_val_loss"] if checkpoint and not self._remeasured else math.inf
        if not self._best > -math.inf:  # no loss is below NaN
            warn_once(f"the lowest val/loss in {origin} is {self._best}; the search for the best one begins again.")
            self._best = math.inf
        self._recent_losses = collections.deque(checkpoint["recent_losses"] if resume else (), maxlen=101)
        self._has_skipped_matrices = False
        self._logged = None  # (step, seconds) of the last line with both
        self._peak_flops = peak_flops(world.device_name, config.dtype)
        before = checkpoint.get("flops") if resume else None  # perhaps with other settings
        self._flops_before = 0 if before is None else before - self._flops(self.step)

        def open_files():
            for path in _run_files(config.out_dir) if not resume or elsewhere else ():
                with file_errors(path, "remove it"):
                    path.unlink() if path.name in (METRICS, CONFIG) else checkpoints.remove(path)
            if resume and origin.stem == checkpoints.PREVIOUS and config.checkpoint == "newest":
                checkpoints.set_aside_unreadable(config.out_dir)
            if config.checkpoint != "newest":
                checkpoints.make_newest(origin, config.out_dir)
            if elsewhere and (origin.parent / METRICS).exists():
                shutil.copyfile(origin.parent / METRICS, Path(config.out_dir) / METRICS)
            self._tracker = Tracker(config, self._record(), self.step, checkpoint["wandb_id"] if checkpoint else None)
            before = self.step if resume else None
            self._writer = checkpoints.CheckpointWriter(config.out_dir, config.keep_checkpoints, before, world)

        if not config.eval_only:
            world.on_rank0(open_files)
            self._writer = self._writer or PartWriter(Path(config.out_dir), world)
            world.finish = self._writer.wait
        self._say(
            f"{self.model.num_params() / 1e6:.2f}M parameters, {len(self.corpus.train) / 1e6:.1f}M training tokens; "
            f"{self.tokens_per_step} tokens a step: {world.size} ranks x {config.gradient_accumulation_steps} passes x "
            f"{config.batch_size} sequences x {config.block_size}; {config.dtype} on {world.device_name}"
        )
        if world.device.type == "cuda":
            self._say(attention_line(model_config, DTYPES[config.dtype], world.device))
        if checkpoint and not resume:
            self._say(checkpoint["summary"])
        if checkpoint and checkpoint.get("unused"):
            warn_once(f"not used: {checkpoint['unused']}; the model is that of {origin or config.init_from}.")
        if resume:
            changed = ", ".join(self._changed) or "nothing"
            self._say(f"resumed at step {self.step}; changed since the checkpoint: {changed}")
            for text in self._effects():
                self._say(f"  {text}")

    def _choose_batch_size(self, before):
        """Set batch_size to the largest micro-batch that fits; on a resume to the checkpoint's, if that fits."""
        config, world = self.config, self.world
        sizes, rows = micro_batch_sizes(config.total_bs, world.size), self.model.config.vocab_size
        memory = memory_of(world.device)
        most = min(world.gather(estimate(config, memory, world.size, rows) if memory else 1))
        if world.device.type == "cpu":  # a host that is asked for too much does not refuse, it kills the process
            sizes = [size for size in sizes if size <= max(most, 1)]
        if before in sizes and self._train_step.fits(before):
            config.batch_size = before
        elif size := largest(sizes, self._train_step.fits, most):
            config.batch_size = size
        else:
            raise RunError(f"{self._memory_sentence(None)}.")
        config.gradient_accumulation_steps = _accumulation(config, world.size)
        self._say(f"batch_size = auto: the largest that fits is {config.batch_size}")

    def _memory_sentence(self, error):
        world, rows = self.world, self.corpus.model_vocab_size if self.corpus else GPTConfig.vocab_size
        return sentence(error, self.config, world.device_name, memory_of(world.device), world.size, rows)

    def _claim_out_dir(self):
        """Take the lock of out_dir, before anything in it is read or removed. Returns its owner."""
        if not self.config.eval_only:
            folder = Path(self.config.out_dir)
            with file_errors(folder, "name another --out_dir"):
                self._made = None if folder.exists() else folder
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = RunLock(folder)
                probe = folder / f".probe.{os.getpid()}"
                try:
                    probe.write_bytes(bytes(1 << 16))  # an empty file fits on a full disk
                finally:
                    probe.unlink(missing_ok=True)
                checkpoints.recover(folder)
                return self._lock.owner

    def _load_checkpoint(self):
        """(checkpoint to resume, its path). Rank 0 chooses the file, and all ranks check that they read the same."""
        config, world, chosen = self.config, self.world, []
        parts = () if config.fsdp else checkpoints.PARTS  # the tensors are read into the sharded model and optimizer

        def choose():
            checkpoint, path = checkpoints.load_checkpoint(config.out_dir, config.checkpoint, parts)
            chosen.append(checkpoint)
            return path

        path = world.on_rank0(choose)
        verify = world.local_rank == 0  # once on each machine
        read = checkpoints.read_checkpoint
        checkpoint = world.local_rank0_first(lambda: chosen[0] if chosen else read(path, parts, verify))
        world.assert_same_on_all_ranks(
            {"step": checkpoint["step"], "SHA-256": checkpoints.checkpoint_sha256(path)},
            f"read different checkpoints from {path}, with another",
            "out_dir must be one folder that all machines see",
        )
        return checkpoint, path

    def _load_weights(self):
        """The checkpoint of init_from, other than "resume". All ranks check that they read the same."""
        config, world = self.config, self.world
        checkpoint = world.local_rank0_first(lambda: start_from(config))
        if world.size > 1:
            world.assert_same_on_all_ranks(
                {"step": checkpoint["step"], "SHA-256": sha256_of(checkpoint)},
                f"read different weights from {config.init_from}, with another",
                "all machines must see the same files",
            )
        return checkpoint

    def _changes(self, checkpoint):
        """{setting or fact: [in the checkpoint, now]} where they differ. UserError if a data file was replaced."""
        config = self.config
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        before = defaults | checkpoint["config"]  # an older checkpoint has fewer settings
        now = vars(config) | {key: before[key] for key in ("init_from", "overwrite", "checkpoint")}
        changed = {key: [before[key], now.get(key)] for key in before if before[key] != now.get(key)}
        changed = {key: pair for key, pair in changed.items() if key not in MODEL_SETTINGS}  # 0 and what it stands for
        facts, facts_now = checkpoint.get("facts", {}), self._facts | self._hashes
        changed |= {key: [facts[key], now] for key, now in facts_now.items() if facts.get(key, now) != now}
        for split in ("train", "val"):
            if f"{split}_sha256" in changed and before["dataset"] == config.dataset:
                trained = f"the file that the checkpoint in {config.out_dir} was trained with (its SHA-256 differs)"
                remedy = "put that file back, or name another folder with --dataset"
                raise UserError(f"{split}.bin in {self.corpus.folder} is not {trained}; {remedy}.")
        return changed

    def _effects(self):
        """What the changed settings do to a resumed run, where that is more than they say. A sentence each."""
        changed, config, step = self._changed, self.config, self.step
        seen = self._batches.sequences_before(step)
        if {"seed", "train_sha256"} & changed.keys():
            yield f"the order of the data is another from sequence {seen} on; some may be read twice"
        elif "total_bs" in changed:
            yield f"total_bs changed: the data go on at sequence {seen}; none is left out or read twice"
        if self._remeasured:
            yield "val/loss is measured on other tokens than before, so earlier checkpoints do not count for ckpt_best"
        if (lr := learning_rate(step, config)) != self._lr_before:
            yield f"the learning rate of step {step} is {lr:.4g} instead of {self._lr_before:.4g}"

    def _record(self):
        """What config.json holds beside the settings."""
        commit, changed = git_state()
        sizes = {"train_tokens": len(self.corpus.train), "val_tokens": len(self.corpus.val)}
        return {
            "git_commit": commit,
            "clean": None if changed is None else not changed,
            **self._facts,
            "shared_device": self._shared_device,
            "history": self._history,
            "command": sys.argv,
            "data": sizes | self._hashes,
            "tokenizer": tokenizer_identity(self.corpus.tokenizer),
            "model": {
                **dataclasses.asdict(self.model.config),
                "num_params": self.model.num_params(),
                "flops_per_token": self.model.flops_per_token(self.config.block_size),
            },
        }

    def _model_config(self, checkpoint, differing=()):
        """The model's GPTConfig. UserError that names all settings with which the checkpoint does not go on.

        differing: [(setting, in the checkpoint, now)] of those that are known already; without data they say so.
        """
        config = self.config
        rows = checkpoint["model_args"]["vocab_size"] if checkpoint else 0
        fits = not self.corpus or (checkpoint and self.corpus.fits(rows, checkpoint.get("tokenizer")))
        rows = rows if fits else self.corpus.model_vocab_size
        wanted = model_config(config, rows)
        if not checkpoint:
            return wanted
        args, differing = vars(GPTConfig(**checkpoint["model_args"])), list(differing)  # older ones lack new settings
        derived = dict.fromkeys(("n_kv_head", "mlp_hidden", "rope_dim"), 0)
        defaults = vars(GPTConfig(**{**args, **derived}))
        for name, value in args.items():
            follows = name in derived and getattr(config, name) == 0 and value == defaults[name]  # from other settings
            if name != "dropout" and value != getattr(wanted, name) and not follows:
                differing.append((name, value, getattr(wanted, name)))
        said = "; ".join(f"{name} = {value}, this run has {now}" for name, value, now in differing)
        remedies = [f"--{name}={value}" for name, value, _ in differing if name != "vocab_size"]
        remedy = [f"give {' '.join(remedies)}"] if remedies else []
        origin = f"in {config.out_dir}" if config.init_from == "resume" else f"of {config.init_from}"
        if self.corpus and not remedy:
            self.corpus.check_tokenizer(checkpoint.get("tokenizer"), f"the checkpoint {origin}")
        if self.corpus and args["vocab_size"] != rows:
            remedy.append(f"use the data it was trained on, not {self.corpus.folder}")
        if remedy:
            other = "or name another --out_dir"
            if not {name for name, *_ in differing} & {*args, "dataset"}:
                other = f"or start new from its weights, with --init_from=ckpt:{config.out_dir} and another --out_dir"
            raise UserError(f"the checkpoint {origin} has {said}; {' and '.join(remedy)}, {other}.")
        return wanted

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        explained = self.world.explain(error)
        too_large = not explained and is_out_of_memory(error)
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
        if too_large:
            newest = self._writer and self._writer.step
            go_on = "" if newest is None else f", and go on from step {newest} with --init_from=resume"
            raise RunError(f"{self._memory_sentence(error)}{go_on}.") from None
        if explained:
            raise explained from error

    def _close_files(self):
        for part, close in ((self._writer, "wait"), (self._tracker, "close"), (self._lock, "release")):
            if part:
                getattr(part, close)()
        if self._made:
            with contextlib.suppress(OSError):
                self._made.rmdir()  # where nothing has come into it

    def _say(self, text):
        if self.world.is_rank0:
            print(text, flush=True)

    # ----- one step: what a training script calls

    @property
    def optimizer(self):
        return self._train_step.optimizer

    def set_optimizer(self, make):
        """Make `make(config, parameter groups, device)` the run's optimizer and return it, on a resume with its state.

        Its learning rates follow the schedule, and checkpoints hold its state.
        """
        optimizer = self._train_step.optimizer = make(self.config, self.parameter_groups(), self.world.device)
        if self.config.fsdp:
            optimizer.register_load_state_dict_pre_hook(shard_state)
        if self.world.size > 1 or self.config.fsdp:
            optimizers.share_matrices(optimizer)
        if self._resumed and self.config.init_from == "resume":
            self.world.on_all_ranks(lambda: self._restore(optimizer))  # a part may be missing that one rank needs
        elif self._resumed and self._resumed["optimizer"]:
            load_optimizer_state(optimizer, self.model, self._resumed["optimizer"][1])
        if self._resumed and self._resumed["optimizer"]:
            labels = [self._resumed["config"].get(key) for key in ("total_bs", "block_size")]
            if all(isinstance(n, int) for n in labels) and math.prod(labels) != self.tokens_per_step:
                optimizers.rescale_curvature(optimizer, math.prod(labels) / self.tokens_per_step)
        self._resumed = None
        return optimizer

    def _restore(self, optimizer):
        """Take the optimizer's state, GradScaler's and the random states from the checkpoint that is resumed."""
        checkpoint = self._resumed
        with restoring(self._origin, "optimizer's or random state"):
            if self.config.fsdp and checkpoint.manifest:
                read_state(checkpoint, optimizer, self._names)
            optimizers.load_state(optimizer, checkpoint["optimizer"], self._names, self.step)
            if checkpoint["scaler"]:  # empty from a run in another dtype than float16
                self._train_step.scaler.load_state_dict(checkpoint["scaler"])
            self.world.set_rng_state(checkpoint["rng"])

    def parameter_groups(self):
        """The model's parameter groups. `lr_scale` of a group multiplies the schedule's learning rate."""
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
        stage_starts = [first for first, _ in stages(config)[1:]]
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
                    raise RunError(f"torchrun is gone and step {step} is checkpointed; go on with --init_from=auto.")
                self._say(f"stopped before step {step}; go on with --init_from=resume")
                return
            metrics = {}
            stage_ends = step in stage_starts or (bool(stage_starts) and step == config.max_iters)
            stage_ends &= step > self.step or "block_size_schedule" not in self._changed
            if step % config.eval_interval == 0 or stage_ends or step >= config.max_iters or config.eval_only:
                with self._clock.paused():
                    metrics |= self.evaluate()
                    if stage_ends:
                        metrics["stage/length"] = sequence_length(step - 1, config)
                        metrics["stage/clip_rate"] = self._train_step.stage_clip_rate(step)
                    trained = step > self.step or self._origin  # else there is nothing to keep
                    if improved := trained and metrics["val/loss"] < self._best:
                        self._best = metrics["val/loss"]
                    if step > self.step and not math.isfinite(metrics["val/loss"]):
                        warn_once(f"val/loss is not finite at step {step}; no checkpoint of it is written.")
                    elif step > self.step and (improved or config.always_save_checkpoint):
                        self._save(step, improved)
                    elif improved and self._writer and self.world.is_rank0:
                        self._writer.mark_best(self._origin)
            if step in stage_starts:  # after the checkpoint, with which a resume logs the stage that ends here again
                self._train_step.start_stage(step)
            if step >= config.max_iters or config.eval_only:
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
        """Wait until the last checkpoint is on disk; RunError on all ranks if it could not be written."""

        def finish():
            if self._writer:
                self._writer.wait()
                if self._writer.error:
                    raise UserError(f"the last checkpoint could not be written ({self._writer.error})")

        try:
            self.world.on_rank0(finish)
            if self._writer:
                self._writer.wait()
        except UserError as error:
            remedy = f"make {self.config.out_dir} writable, with free space, and resume from the checkpoint before it"
            raise RunError(f"{error}; {remedy}.") from None

    # ----- evaluation, metrics, checkpoints

    def _flops(self, step):
        """FLOPs of the steps before `step` with this run's settings, all ranks together."""
        estimate = optimizers.OPTIMIZERS[self.config.optimizer_name].estimate
        return run_flops(step, self.config, self.model.flops_per_token, ESTIMATE_COST[estimate])

    def _windows(self, eval_tokens):
        """How many windows of each corpus an evaluation reads: a small val.bin is read in full by any eval_tokens."""
        counts = (len(part.val) for part, _ in self.corpus.parts)
        return [len(data.evaluation_starts(n, eval_tokens, self.config.block_size)) for n in counts]

    def evaluate(self):
        """Mean cross-entropy (nats a token) and accuracy over the fixed windows of val.bin, by their metrics' names.

        Of a mixture these are the means by the shares; each corpus has its own too.
        """
        self.world.local_rank0_first(self.corpus.check_unchanged)
        if self._tracker:
            self._tracker.check()
        parts = [(corpus.name, share, self._evaluate(corpus.val)) for corpus, share in self.corpus.parts]
        metrics = {key: sum(share * values[key] for _, share, values in parts) for key in parts[0][2]}
        if len(parts) > 1:
            metrics |= {f"{key}/{name}": values[key] for name, _, values in parts for key in values}
        return metrics

    @torch.no_grad()
    def _evaluate(self, tokens):
        """val/loss and val/accuracy of one corpus. The ranks share its windows."""
        config, world = self.config, self.world
        windows = data.evaluation_starts(len(tokens), config.eval_tokens, config.block_size)
        starts, most = windows[world.rank :: world.size], -(-len(windows) // world.size)
        exact = torch.float32 if world.device.type == "mps" else torch.float64  # mps has no float64
        total = torch.zeros(2, dtype=exact, device=world.device)
        self.model.eval()
        for first in range(0, most, config.batch_size):  # as often on every rank: with fsdp each pass needs all
            places = starts[first : first + config.batch_size]
            inputs, targets = data.take_windows(tokens, places, config.block_size)
            missing = config.batch_size - len(places)  # filled up: another shape would be compiled anew
            inputs, targets = (
                torch.nn.functional.pad(torch.from_numpy(array), (0, 0, 0, missing), value=fill)
                for array, fill in ((inputs, 0), (targets, -1))
            )
            batches = self._batches
            moved = [batches.to_device(batches.pinned(tensor)) for tensor in (inputs, targets)]
            means = self._train_step.evaluation(*moved)
            if len(places):
                total += means.to(exact) * len(places)
        self.model.train()
        return dict(zip(("val/loss", "val/accuracy"), (world.sum(total) / len(windows)).tolist(), strict=True))

    def _training_metrics(self, step):
        """The metrics of the step just done. All ranks call it and wait once for their device."""
        config, world, done = self.config, self.world, self._train_step
        numbers = {
            "train/loss": world.sum(done.loss.clone()) / world.size,
            "grad_norm": done.grad_norm,
            "train/clip_rate": done.counts["clipped"] / (step + 1),
            "train/skipped": done.counts["skipped"],
            "skipped_in_a_row": done.counts["skipped_in_a_row"],
            **{f"curvature/{name}": number for name, number in done.curvature.items()},
            "curvature/skipped": done.counts["curvature_skipped"],
            "curvature_skipped_in_a_row": done.counts["curvature_skipped_in_a_row"],
            "param_norm": total_norm(done.parameters, world),
            **optimizers.skipped_matrices(self.optimizer, world),
        }
        states = self.optimizer.state.values()
        momenta = [m for s in states for m in (s.get("exp_avg"), s.get("momentum_buffer")) if m is not None]
        if momenta:
            numbers["momentum_norm"] = total_norm(momenta, world)
        with world.waiting():
            values = torch.stack([number.float() for number in numbers.values()]).tolist()
        seconds = self._clock.seconds
        metrics = dict(zip(numbers, values, strict=True)) | optimizers.statistics(config, self.optimizer)
        in_a_row = {"updates": metrics.pop("skipped_in_a_row")}
        in_a_row["curvature estimates"] = metrics.pop("curvature_skipped_in_a_row")
        if not optimizers.OPTIMIZERS[config.optimizer_name].estimate:
            del metrics["curvature/skipped"]
        if metrics.get("train/skipped_matrices") and not self._has_skipped_matrices:
            self._has_skipped_matrices = True
            warn_once("some updates of matrices were not finite and are skipped (train/skipped_matrices counts them).")
        for what, count in in_a_row.items():
            if count < config.max_skipped:
                continue
            newest = world.on_rank0(lambda: self._writer and self._writer.newest())
            remedy = "start again" if newest is None else f"resume from the newest checkpoint, of step {newest}"
            problem = f"the last {count:.0f} {what} up to step {step} were not finite and were skipped"
            raise RunError(f"{problem}; {remedy} in {config.out_dir}, with a lower --learning_rate.")
        if self._recent_losses and (median := statistics.median(self._recent_losses)):
            metrics["train/spike"] = metrics["train/loss"] / median
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
            metrics["slowest_rank"] = busy.index(max(busy))
            metrics["seconds_behind"] = max(busy) - statistics.median_low(busy)
        if world.device.type == "cuda":
            metrics["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._logged = (step, seconds)
        return metrics

    def _log(self, step, metrics):
        if self.world.is_rank0:
            flops = float(self._flops_before + self._flops(step))
            sequences = self._batches.sequences_before(step)
            metrics = {
                "step": step,
                "tokens": sequences * self.config.block_size,
                "sequences": sequences,
                **self.corpus.epochs(sequences, self.config.block_size),
                "flops": flops,
                **metrics,
            }
            if self._tracker:
                self._tracker.log(metrics)
            self._say(console_line(metrics, self.config.max_iters, self.tokens_per_step))

    def _save(self, step, is_best=False):
        """Write the checkpoint after `step` updates. All ranks call it; rank 0 writes, or each rank its part."""
        rng = self.world.gather(self.world.rng_state())
        in_parts = self.config.fsdp or optimizers.has_parts(self.optimizer)
        if not self.world.is_rank0 and not in_parts:
            return
        state = optimizers.named_state(self.optimizer, self._names) if in_parts else self.optimizer.state_dict()
        checkpoint = {
            "model": self.model.state_dict(keep_vars=True),  # keeps the tied matrix one object
            "optimizer": state,
            "scaler": self._train_step.scaler.state_dict(),
            "step": step,
            "sequences_seen": self._batches.sequences_before(step),
            "history": self._history,
            "facts": self._facts | self._hashes,
            "model_args": dataclasses.asdict(self.model.config),
            "config": vars(self.config),
            "tokenizer": self.corpus.tokenizer,
            "best_val_loss": self._best,
            "is_best": is_best,
            **self._train_step.state_dict(),
            "recent_losses": list(self._recent_losses),
            "seconds": self._clock.seconds,
            "flops": self._flops_before + self._flops(step),
            "shared_device": self._shared_device,
            "rng": rng,
            "wandb_id": self._tracker and self._tracker.wandb_id,
        }
        if self._tracker:
            self._tracker.check()
        self._writer.save(checkpoint, in_parts)


def _warn_of_separate_tasks():
    """Warn if a launcher started several processes that do not know of each other."""
    launchers = {"SLURM_NTASKS": "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK", "WORLD_SIZE": ""}
    for count, number in launchers.items():
        tasks = os.environ.get(count, "")
        if "RANK" not in os.environ and tasks.isdigit() and int(tasks) > 1 and os.environ.get(number, "0") == "0":
            alone = f"{count} = {tasks}, but RANK is not set: this process trains alone"
            warn(f"{alone}; to train together, start one torchrun on each machine (docs/training.md).")


def _resolve_dtype(dtype, device):
    if dtype == "float16" and device.type != "cuda":
        raise UserError(f"dtype = 'float16' needs a cuda device, not {device}; use bfloat16 or float32.")
    if dtype != "auto" or device.type != "cuda":
        return "float32" if dtype == "auto" else dtype
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def _sequences_seen(config, checkpoint):
    """Sequences of the stream that a run with this checkpoint has read. Older ones do not say it."""
    if not checkpoint:
        return 0
    before = checkpoint["config"].get("total_bs", config.total_bs) if config.init_from == "resume" else config.total_bs
    return checkpoint.get("sequences_seen", checkpoint["step"] * before)


def _accumulation(config, ranks):
    """gradient_accumulation_steps: derived from total_bs or, if it was given, checked against it."""
    if config.batch_size == "auto" and config.total_bs % ranks == 0:
        return None  # until it is chosen
    once = ranks * (1 if config.batch_size == "auto" else config.batch_size)
    steps, rest = divmod(config.total_bs, once)
    given = config.gradient_accumulation_steps
    if given is not None and given * once != config.total_bs:
        fit = f"use --total_bs={given * once}" + (f" or --gradient_accumulation_steps={steps}" if not rest else "")
        product = f"batch_size {config.batch_size} x gradient_accumulation_steps {given} x {ranks} ranks"
        raise UserError(f"total_bs = {config.total_bs} is not {product} = {given * once}; {fit}.")
    if rest:
        sizes = ", ".join(map(str, micro_batch_sizes(config.total_bs, ranks)))
        fit = f"batch_size can be {sizes}" if sizes else f"use a multiple of {ranks}, or another number of ranks"
        parts = f"batch_size {config.batch_size} x {ranks} ranks"
        raise UserError(f"total_bs = {config.total_bs} sequences cannot be split into {parts}; {fit}.")
    return steps


def _run_files(out_dir):
    """The files of an earlier run in `out_dir`."""
    records = [path for name in (METRICS, CONFIG) if (path := Path(out_dir) / name).exists()]
    return records + checkpoints.all_checkpoints(out_dir)


def _check_empty(config):
    """UserError if out_dir holds a run while the checkpoint of another one is to be resumed in it."""
    if _run_files(config.out_dir) and not config.overwrite:
        other = f"{config.out_dir} already holds a run, and {config.checkpoint} is of another one"
        raise UserError(f"{other}; name a new --out_dir, or replace the run in it with --overwrite=True.")


def _place(init_from):
    """What weights are and where they lie, however their path is written."""
    kind, _, path = init_from.partition(":")
    return kind, os.path.realpath(path)


def _check_out_dir(config):
    """init_from, with "auto" resolved. UserError if out_dir holds another run, or weights that would be removed."""
    if not config.eval_only and config.init_from != "resume":
        files, (_, _, weights) = _run_files(config.out_dir), config.new_from.partition(":")
        if weights and os.path.realpath(weights) in map(os.path.realpath, (config.out_dir, *files)):
            raise UserError(f"{config.new_from} is in out_dir, where this run writes its own; name another --out_dir.")
        with contextlib.suppress(OSError, ValueError):
            if "model_type" in read_json(Path(config.out_dir) / CONFIG):
                found = f"{config.out_dir} holds a model of Hugging Face, whose {CONFIG} a run replaces"
                raise UserError(f"{found}; name another --out_dir.")
    if config.init_from == "auto":
        if checkpoints.all_checkpoints(config.out_dir):
            return "resume"
        if os.path.exists(Path(config.out_dir) / METRICS) and not config.overwrite:
            warn(f"{config.out_dir} holds a run and no checkpoint of it; training begins at step 0, in its place.")
        return config.new_from
    if config.init_from != "resume" and not (config.overwrite or config.eval_only) and _run_files(config.out_dir):
        remedy = "go on with --init_from=resume, replace it with --overwrite=True, or name another --out_dir"
        raise UserError(f"{config.out_dir} already holds a run; {remedy}.")
    if config.init_from == "scratch" and config.eval_only and checkpoints.all_checkpoints(config.out_dir):
        warn(f"untrained weights are evaluated; --init_from=resume takes the checkpoint in {config.out_dir}.")
    return config.init_from
