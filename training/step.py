"""One optimizer step on this rank: micro-batches, backward, curvature estimate, clipping, finite check, update.

batches = Batches(config, corpus, world)
train_step = TrainStep(config, model, world, clock)
train_step.backward(batches.train(step=0))
train_step.optimizer_step()
"""

import contextlib
import functools

import torch
from torch.nn.parallel import DistributedDataParallel

from model import cross_entropy
from training import data
from training.curvature import hessian_vector_product, label_loss
from training.errors import is_out_of_memory
from training.fp8_loss import fits_fp8
from training.loss import LinearLoss, has_kernel
from training.optimizers import OPTIMIZERS, amp_scaling, second_order, step_arguments, supports_amp_scaling
from training.schedule import sequence_length, stages
from training.sharding import total_norm

GRAPHS = 64  # of a function that torch.compile makes at most, in a run of few stages
PLAIN_ATTENTION = 8  # a Hessian-vector product takes so many times fewer sequences at once than a training pass
COUNTS = ("clipped", "skipped", "skipped_in_a_row", "curvature_skipped", "curvature_skipped_in_a_row")
STAGE = ("stage_start", "stage_clipped")  # the step at which this stage of the schedule began, "clipped" before it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Batches:
    """This rank's share of each step's batch: micro-batches (inputs, targets, weight), (B, T) each and a number.

    With the weights, the mean over the ranks of the sums over their micro-batches is the mean over the batch.
    start: (step, sequences of the stream that come before it), as a checkpoint has them.
    """

    def __init__(self, config, corpus, world, start=(0, 0)):
        self.config, self.corpus, self.world, self._start = config, corpus, world, start
        self._prefetcher = data.Prefetcher()

    def train(self, step, sequences=None):
        """The step's batch, or its first `sequences`."""
        return self._get(step, sequences or self.config.total_bs, False)

    def curvature(self, step, sequences):
        """The first `sequences` of the step's batch. The targets are uniforms that draw `label_loss`'s labels.

        They belong to the sequence, whichever rank has it.
        """
        return self._get(step, sequences, True)

    def sequences_before(self, step):
        """Sequences of the stream that come before `step`, whatever total_bs was in earlier parts of the run."""
        start, seen = self._start
        return max(0, seen + (step - start) * self.config.total_bs)

    def tokens_at_once(self, sequences):
        """Tokens in a micro-batch of this rank, of a batch of so many full sequences; one number for each stage."""
        return [len(self._micro_batches(sequences, length)[0][0]) * length for _, length in stages(self.config)]

    def close(self):
        self._prefetcher.close()

    def _get(self, *request):
        batch = self._prefetcher.get(self._prepare, *request)
        return [(self.to_device(inputs), self.to_device(targets), weight) for inputs, targets, weight in batch]

    def _prepare(self, step, sequences, curvature):
        """The batch in host memory. The prefetcher's thread calls it; it changes nothing."""
        config = self.config
        self.corpus.check_whole()
        starts = self.corpus.train_starts(config.seed, self.sequences_before(step), config.total_bs, config.block_size)
        length = sequence_length(step, config)
        micro_batches, weight = self._micro_batches(sequences, length)
        return [(*self._rows(step, rows, length, starts, curvature), weight) for rows in micro_batches]

    def _micro_batches(self, count, length):
        """This rank's rows, sequences of `length` tokens, in a batch of `count` full ones; their weight.

        They are in equal parts, each of at most as many tokens as batch_size full sequences.
        """
        full = self.config.block_size
        share = self.world.share(count * full // length)
        n = _equal_parts(len(share), self.config.batch_size * full // length)
        size = len(share) // n
        return [share[i * size : (i + 1) * size] for i in range(n)], size * self.world.size * length / (count * full)

    def _rows(self, step, rows, length, starts, curvature):
        """(inputs, targets) of rows of the step's batch: its full sequences in a row, cut every `length` tokens."""
        config, full = self.config, self.config.block_size
        places = range(rows.start * length // full, -(-rows.stop * length // full))  # of the full sequences
        inputs, targets = data.take_windows(self.corpus.train, starts[places.start : places.stop], full)
        if curvature:
            targets = data.label_uniforms(config.seed, step, places, full)
        cut = slice(rows.start * length - places.start * full, rows.stop * length - places.start * full)
        return [self.pinned(torch.from_numpy(x.reshape(-1)[cut].reshape(-1, length))) for x in (inputs, targets)]

    def pinned(self, tensor):
        """In pinned memory, which a GPU copies while the host goes on; torch reuses it when the copy is done."""
        return tensor.pin_memory() if self.world.device.type == "cuda" else tensor

    def to_device(self, tensor):
        on_gpu = self.world.device.type == "cuda"  # elsewhere memory is not pinned, and mps may read it too late
        return tensor.to(self.world.device, non_blocking=on_gpu)


class TrainStep:
    """The training steps of a model on this rank, in step with the other ranks.

    optimizer: to be set before the first step. scaler: torch.amp's, for fp16.
    counts: {name of COUNTS and STAGE: number}, on the device.
    loss, grad_norm: of the last step's batch: this rank's part of the loss, the global norm before clipping.
    curvature: {"loss", "grad_norm"} of the last estimate; Hutchinson's has no loss. {} before the first.
    """

    def __init__(self, config, model, world, clock):
        self.config, self.model, self.world = config, model, world
        self.optimizer = self.loss = self.grad_norm = None
        self._clock, self._compiled = clock, set()
        self._estimate = OPTIMIZERS[config.optimizer_name].estimate
        self._settled = config.fsdp or world.size <= 2
        if config.compile:  # a graph for each loss, sequence length and mode; beyond the limits torch stops compiling
            limits = torch._dynamo.config
            limits.recompile_limit = max(GRAPHS, 4 * len(stages(config)))
            limits.accumulated_recompile_limit = 4 * limits.recompile_limit
        self._forward = ModelLoss(model, config.compile, config.fsdp, config.fp8_loss)
        self._product = compiler(config.compile)(functools.partial(hessian_vector_product, model))
        self._ddp = None
        if world.distributed and not config.fsdp:
            ids = [world.device.index] if world.device.type == "cuda" else None
            # A graph that is cut at every bucket overlaps the exchange of gradients with the backward pass. Within a
            # machine the cuts cost more: on two H200 whole graphs were faster, with one pass a step and with eight.
            torch._dynamo.config.optimize_ddp = not world.one_machine
            with world.waiting():
                self._ddp = DistributedDataParallel(self._forward, device_ids=ids, gradient_as_bucket_view=True)
        self._autocast = torch.autocast(
            world.device.type, dtype=DTYPES[config.dtype], enabled=config.dtype != "float32", cache_enabled=False
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.dtype == "float16")
        self.load_state_dict({})

    def state_dict(self):
        """The counts and the last estimate's numbers, as a checkpoint holds them."""
        return {key: {k: v.item() for k, v in getattr(self, key).items()} for key in ("counts", "curvature")}

    def load_state_dict(self, checkpoint):
        """Take them from a checkpoint. Older ones have neither those of estimates nor those of the stage."""
        numbers = dict.fromkeys(COUNTS, 0.0) | checkpoint.get("counts", {})
        numbers = dict(zip(STAGE, (float(checkpoint.get("step", 0)), numbers["clipped"]), strict=True)) | numbers
        for key, values in (("counts", numbers), ("curvature", checkpoint.get("curvature", {}))):
            setattr(self, key, {name: torch.tensor(value, device=self.world.device) for name, value in values.items()})

    def close(self):
        self._ddp = None

    @property
    def parameters(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def stage_clip_rate(self, step):
        """The share of clipped steps among those since `start_stage` and before `step`."""
        start, clipped = (self.counts[name].item() for name in STAGE)
        return (self.counts["clipped"].item() - clipped) / max(step - start, 1)

    def start_stage(self, step):
        self.counts["stage_start"] = torch.tensor(float(step))
        self.counts["stage_clipped"] = self.counts["clipped"].clone()

    # ----- gradients

    def backward(self, batch):
        """Leave in `.grad` the gradient of the mean cross-entropy over the batch of all ranks."""
        self.loss = self._accumulate(batch, cross_entropy)

    def curvature_step(self, batches, step):
        """Renew the curvature by an estimate on the first hess_bs sequences of the step's batch."""
        config, (optimizer, update) = self.config, second_order(self.optimizer)
        if self._estimate == "labels":
            loss = self._accumulate(batches.curvature(step, config.hess_bs), label_loss)
            norm, arguments = self._gradient_norm(), {"scale": config.hess_bs / config.total_bs}
            self.curvature = {"loss": self.world.sum(loss) / self.world.size, "grad_norm": norm}
        else:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            vectors = self._random_vectors(parameters, step)
            products = self._hessian_vector_products(batches.train(step, config.hess_bs), parameters, vectors)
            norm = torch.nn.utils.get_total_norm(products, foreach=True)
            arguments = {"estimates": torch._foreach_mul(vectors, products), "average": False}  # equal on all ranks
            self.curvature = {"grad_norm": norm}
        self._update(optimizer, functools.partial(update, **arguments), norm, counts="curvature_skipped")

    def optimizer_step(self):
        """Clip the gradients to a global norm of grad_clip, step and free them.

        An optimizer that knows torch.amp.GradScaler's protocol clips within its step.
        """
        limit, norm, grad_scale = self.config.grad_clip, self._gradient_norm(), None
        self.grad_norm = norm
        if limit:
            self.counts["clipped"] += norm > limit
            if supports_amp_scaling(self.optimizer):
                grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0)
            else:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, norm, foreach=True)
        step = functools.partial(self.optimizer.step, **step_arguments(self.config, self.optimizer))
        self._update(self.optimizer, step, norm, grad_scale)

    def _update(self, optimizer, update, norm, grad_scale=None, counts="skipped"):
        """Call `update`, a method of the optimizer, and free the gradients. It has no effect if `norm` is not finite.

        An optimizer that knows torch's protocol learns of that on the device; for others the host has to look.
        """
        found_inf = (~torch.isfinite(norm)).float()
        self.counts[counts] += found_inf
        self.counts[f"{counts}_in_a_row"] += 1
        self.counts[f"{counts}_in_a_row"] *= found_inf
        if supports_amp_scaling(optimizer):
            with amp_scaling(optimizer, grad_scale, found_inf):
                update()
        elif not found_inf.item():
            update()
        self.optimizer.zero_grad(set_to_none=True)

    def _gradient_norm(self):
        return total_norm([p.grad for p in self.parameters if p.grad is not None], self.world)

    def _accumulate(self, batch, loss):
        """Add up the gradients of `loss(logits, targets)` over the batch; return this rank's part of its mean.

        The ranks exchange gradients once, in the last micro-batch, unless fsdp_keep = "nothing". fp16's are computed
        scaled and left unscaled.
        """
        if self.config.compile and (loss, batch[0][0].shape) not in self._compiled:
            # FSDP would keep a gradient that it has not exchanged.
            self._rehearse(batch[0], loss, exchange=self.config.fsdp)
            self._compiled.add((loss, batch[0][0].shape))
        if not self._settled:
            # DDP puts its buckets in their final order after its first pass. With more than two ranks the order of a
            # sum depends on the buckets, so a resume would not give the same bits.
            for _ in range(2):
                self._rehearse(batch[0], loss, exchange=True)
            self._settled = True
        total = torch.zeros((), device=self.world.device)
        for i, (inputs, targets, weight) in enumerate(batch):
            last = i + 1 == len(batch)
            with self._exchange(last), self.world.waiting(self.config.fsdp):
                value = self._loss(inputs, targets, loss) * weight
                finite = value.detach() - value.detach() + 1  # 1, or NaN: then the gradients of all ranks are NaN
                with self.world.waiting(last):
                    self.scaler.scale(value * finite).backward()
            total += value.detach()
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
            self.scaler.update()
        return total

    @contextlib.contextmanager
    def _exchange(self, on):
        """Whether the ranks exchange gradients in the backward passes within. With fsdp, `fsdp_keep` has a say."""
        if not self.config.fsdp:
            with self._ddp.no_sync() if self._ddp and not on else contextlib.nullcontext():
                yield
            return
        keep, blocks = self.config.fsdp_keep, self.model.transformer.h
        self.model.set_requires_gradient_sync(on or keep == "nothing")
        self.model.set_reshard_after_backward(on or keep != "all")
        for block in blocks:
            block.set_reshard_after_forward(keep != "all")
        yield
        for block in blocks:  # an evaluation keeps nothing
            block.set_reshard_after_forward(True)

    def _loss(self, inputs, targets, loss):
        with self._autocast:
            return (self._ddp or self._forward)(inputs, targets, loss)

    def fits(self, size):
        """Whether micro-batches of `size` sequences fit in the memory of all ranks, found by trying. No trace is left.

        The ranks do not exchange gradients in it, so that one whose memory is full keeps no other waiting.
        """
        full = not self._try_micro_batch(size)
        self.model.train()
        self.model.zero_grad()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return not self.world.any(full)

    def _try_micro_batch(self, size):
        """Every pass of the run once, beside as much memory as the optimizer's state will take."""
        device, parameters = self.world.device, dict(self.model.named_parameters())
        estimated = len(self.world.share(self.config.hess_bs)) if self._estimate else 1
        estimated //= _equal_parts(estimated, size)

        def ids(count):
            return torch.zeros((count, self.config.block_size), dtype=torch.int64, device=device)

        def backward(count, loss):
            inputs = ids(count)
            with self._autocast:
                value = self._forward(inputs, inputs if loss is cross_entropy else inputs.float(), loss)
            value.backward()

        try:
            with torch.random.fork_rng(devices=self.world.rng_devices):
                if device.type == "cuda":  # two numbers a parameter; with DDP one has its gradients' place already
                    count = (1 if self._ddp else 2) * self.model.num_params()
                    _state = torch.empty(count, dtype=torch.float32, device=device)
                backward(size, cross_entropy)
                if self._estimate == "labels":
                    backward(estimated, label_loss)
                elif self._estimate == "hutchinson":
                    self.model.zero_grad()
                    vectors, _totals = ({k: torch.zeros_like(p) for k, p in parameters.items()} for _ in range(2))
                    part = ids(estimated // _equal_parts(estimated, _most_in_product(size)))
                    self._differentiate(part, part, vectors)
                self.model.eval()
                with torch.no_grad():
                    self.evaluation(ids(size), ids(size))
                self.world.synchronize()
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False

    def evaluation(self, inputs, targets):
        """(2,): loss and accuracy, means over the labels."""
        with self._autocast:
            return self._forward(inputs, targets, loss_and_accuracy)

    def _rehearse(self, micro_batch, loss, exchange):
        """A pass that leaves nothing behind but compiled graphs and DDP's buckets. It is no training time."""
        inputs, targets, _ = micro_batch
        with self._clock.paused(), torch.random.fork_rng(devices=self.world.rng_devices), self._exchange(exchange):
            self._loss(inputs, targets, loss).backward()
            self.optimizer.zero_grad(set_to_none=True)

    # ----- Hessian-vector products

    def _random_vectors(self, parameters, step):
        """u ~ N(0, I) of Hutchinson's estimate: other ones in each step, the same on all ranks."""
        generator = torch.Generator(self.world.device).manual_seed((self.config.seed << 32) + step)
        return [torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype) for p in parameters]

    def _hessian_vector_products(self, batch, parameters, vectors):
        """[H @ vectors for each of `parameters`], H the Hessian of the mean loss over the batch of all ranks.

        H is with respect to these parameters alone. A micro-batch is divided further: plain attention needs memory.
        """
        names = {p: name for name, p in self.model.named_parameters()}
        vectors = {names[p]: vector for p, vector in zip(parameters, vectors, strict=True)}
        totals = {name: torch.zeros_like(vector) for name, vector in vectors.items()}
        for inputs, targets, weight in batch:
            most = _most_in_product(self.config.batch_size * self.config.block_size // inputs.shape[1])
            n = _equal_parts(len(inputs), most)
            for part in zip(inputs.chunk(n), targets.chunk(n), strict=True):
                products = self._part_products(*part, vectors)
                torch._foreach_add_(list(totals.values()), [products[k] for k in totals], alpha=weight / n)
        return [self.world.sum(total).div_(self.world.size) for total in totals.values()]

    def _part_products(self, inputs, targets, vectors):
        if self.config.compile and ("product", inputs.shape) not in self._compiled:
            self._compiled.add(("product", inputs.shape))
            with self._clock.paused(), torch.random.fork_rng(devices=self.world.rng_devices):
                self._differentiate(inputs, targets, vectors)
        return self._differentiate(inputs, targets, vectors)

    def _differentiate(self, inputs, targets, vectors):
        checkpointing, self.model.activation_checkpointing = self.model.activation_checkpointing, False
        try:  # without checkpointing, which torch cannot differentiate forward
            with self._autocast:
                return self._product(inputs, targets, vectors)
        finally:
            self.model.activation_checkpointing = checkpointing


def _equal_parts(count, most):
    """Into how few equal parts of at most `most` a number of sequences can be divided."""
    return next(n for n in range(1, count + 1) if count % n == 0 and count // n <= most)


def _most_in_product(batch_size):
    """Sequences in a Hessian-vector product, at most."""
    return max(batch_size // PLAIN_ATTENTION, 1)


class ModelLoss(torch.nn.Module):
    """The model's loss, compiled or not, without its logits: with their gradient these take 12 GiB at 124M x 64.

    `LinearLoss` computes it wherever a gradient is wanted. The model computes it otherwise, and where it is sharded,
    since it then gathers its parameters block by block.
    """

    def __init__(self, model, compiled, sharded, fp8=False):
        super().__init__()
        self.model, self._sharded, self._fp8 = model, sharded, fp8
        compiled = compiler(compiled)
        self._hidden = compiled(model.hidden)
        self._model_loss = compiled(lambda inputs, targets, loss: model(inputs, targets, loss)[1])
        self._compiled_loss = functools.cache(lambda loss: compiled(loss))

    def forward(self, inputs, targets, loss=cross_entropy):
        if self._sharded:
            return self.model(inputs, targets, self._compiled_loss(loss))[1]
        if not torch.is_grad_enabled():
            return self._model_loss(inputs, targets, loss)
        hidden = self._hidden(inputs).flatten(0, 1)
        if loss is not cross_entropy and not has_kernel(loss, hidden.device):
            loss = self._compiled_loss(loss)
        weight = self.model.lm_head.weight
        fp8 = self._fp8 and loss is cross_entropy and fits_fp8(hidden, weight)
        return LinearLoss.apply(hidden, weight, targets.flatten(), loss, fp8)


def loss_and_accuracy(logits, targets):
    """(2,): mean cross-entropy, and the share of labels that are the likeliest token. Targets as cross_entropy's."""
    loss = cross_entropy(logits, targets)
    return torch.stack([loss, (logits.argmax(-1) == targets).sum() / (targets >= 0).sum().to(loss.dtype)])


def compiler(on):
    return functools.partial(torch.compile, dynamic=False) if on else lambda function: function
