"""The Trainer: composes model, data, strategy, schedule and precision, and runs the steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from scaledtrain.allocator import keep_freed_memory
from scaledtrain.balance import Balance
from scaledtrain.balance.make import make_balancer
from scaledtrain.callbacks import Callback
from scaledtrain.checkpoint import Checkpointing
from scaledtrain.checkpoint.begin import parts_before, resume_and_save
from scaledtrain.checkpoint.saver import Saver
from scaledtrain.comm.ambient import ambient_link
from scaledtrain.comm.protocols import Link
from scaledtrain.comm.votes import any_rank
from scaledtrain.connection import Connection, connect
from scaledtrain.data.loaders import must_end
from scaledtrain.data.steps import StepBatch, Steps, Weigh
from scaledtrain.drop_compute import DropCompute
from scaledtrain.errors import ConfigError
from scaledtrain.evaluation import Evaluator, as_numbers
from scaledtrain.fit_loop import FitLoop, FitResult, Limits
from scaledtrain.measures import Metric
from scaledtrain.mesh import Mesh
from scaledtrain.metrics import Metrics
from scaledtrain.parallel import Pipeline, lay_out
from scaledtrain.parallel.batches import share_out
from scaledtrain.parallel.engine import Engine, Recipe
from scaledtrain.precision import Precision, PrecisionName
from scaledtrain.recompute import CheckpointPolicy
from scaledtrain.recompute.late import LatePlan
from scaledtrain.replica import MakeOptimizer, MakeScheduler, Replica
from scaledtrain.run_dir import EVENTS
from scaledtrain.schedule import LossFn, MicrobatchLoop, Pace, Slowdown
from scaledtrain.seeding import be_deterministic, seed_everything
from scaledtrain.short_run import ShortRun
from scaledtrain.strategies import Strategy, Sync
from scaledtrain.trainer_state import Resumed, restore, state_of
from scaledtrain.watch import Watch
from scaledtrain.watch.watcher import Watcher

__all__ = ["Trainer"]


class Trainer:
    """Trains a model on one device or on many; the strategy says what the replicas tell each other.

    The same lines work under ``python``, ``torchrun`` and ``srun``: who takes part is read from the
    environment, and one process is not a special case.

    Args:
        model: any module; moved to this rank's device. All replicas start with rank 0's values.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar, the mean over the samples. None: the model
            returns its own loss (``model(**batch).loss``).
        loss_weight: of how many terms the loss of a batch is the mean, if not of its samples: of
            the tokens that are not masked, say. By that number microbatches, replicas and batches
            of an evaluation count, and it stands for samples in the metrics.
        optimizer: a factory, ``functools.partial(torch.optim.SGD, lr=0.1)``: it is called with the
            (name, parameter) pairs where the updates are made, on the replica or on a server.
        lr_scheduler: a factory from optimizer to ``LRScheduler``; one step per update.
        strategy: default `Sync`.
        mesh: the layout; checked against the job's size.
        engine: what divides parameters among the ranks of ``mesh.shard``; default `FullyShard`. One
            that offloads is for one rank alone as well.
        pipeline: how the ranks of ``mesh.pipe`` run their stages; default `Pipeline`, 1F1B.
        precision: the number formats, or their name (``"bf16-mixed"``); default fp32.
        activation_checkpointing: which activations are computed again instead of kept; None keeps
            all.
        gradient_accumulation_steps: batches of the loader per step on each replica.
        batches_per_step: batches of the loader per step on all replicas together, instead: a run
            that goes on with more or fewer of them keeps its global batch. Where they do not divide
            some replicas have one more, in turns.
        max_grad_norm: clip the gradient to this 2-norm.
        drop_compute: leave out the last batches of a step that takes too long.
        balance: how many samples of a step each replica trains on; default `Even`.
        eval_metrics: name -> ``metric(outputs, targets)``, a scalar, the mean over the samples; or
            a metric of torchmetrics, which is of all samples, on whatever ranks they are.
        callbacks: called in order.
        seed: of data order, dropout and every other generator; each rank's differ where they
            should.
        deterministic: use deterministic kernels only.
        compile: backend for ``torch.compile`` (``"inductor"``); None does not compile. With
            activation checkpointing each block is compiled by itself.
        slowdown: a handicap for straggler experiments.
        run_dir: where metrics are written; None writes none.
        log_every: steps between records.
        console: show progress on rank 0.
        trace: keep and write every span of time, for timelines.
        checkpointing: when the run is saved; None: never.
        watch: what is done about ranks that hang or are slow, and about NaN and loss spikes.
        resume: what it goes on from: ``"auto"``, the newest intact checkpoint of ``run_dir``, or
            what hosts kept of it in memory if that is newer (none: it begins), or the path of a
            checkpoint or of a run.
        fast_dev_run: make only so many steps on each replica (True: one), an evaluation on as many
            batches, and a checkpoint that is removed; write no files: to see that all of it runs.
        overfit_batches: train and evaluate on the first so many batches, again and again in the
            same order: to see that they can be learnt by heart; 0: on all there are.
        link: an existing connection to the other ranks; default: ``connect()``, or, on a rank of a
            simulated cluster, that rank's link.

    Attributes:
        model: this rank's piece of it, as it is trained.
        replica: its trainable tensors, of which optimizers are made.
        layout: which ranks have the replica together, and what each has.
        strategy: attached to the replica.
        schedule: runs the passes of a step.
        precision: its number formats.
        scaler: of the loss.
        eval_metrics: by name.
        watcher: what looks after the run.
        link: to the other ranks; ``trainer.link.group.rank == 0`` is the first of all.
        metrics: what is recorded and shown; ``say`` shows a line.
        timeline: spans of time.
        balancer: divides the samples of a step; None: all replicas have equally many.
        callbacks: called in this order; others may be added before a fit.
        epoch: passes over the data that are complete.
        steps_in_epoch: of this replica, in the pass under way.

    Raises:
        ConfigError: something asked for cannot be; the message says what to change.
        CheckpointError: the checkpoint to resume from is damaged.
        ClusterError: the ranks did not meet.

    A crash loses what was not saved: see ``checkpointing``, and ``state_dict``.

    Example:
        >>> from functools import partial
        >>> x, y = torch.randn(64, 2), torch.randn(64, 1)
        >>> data = torch.utils.data.TensorDataset(x, y)
        >>> loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
        >>> trainer = Trainer(nn.Linear(2, 1), nn.functional.mse_loss,
        ...                   partial(torch.optim.SGD, lr=0.1), console=False)
        >>> trainer.fit(loader, max_epochs=2).step
        8
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | None,
        optimizer: MakeOptimizer,
        *,
        loss_weight: Weigh | None = None,
        lr_scheduler: MakeScheduler | None = None,
        strategy: Strategy | None = None,
        mesh: Mesh | None = None,
        engine: Engine | None = None,
        pipeline: Pipeline | None = None,
        precision: Precision | PrecisionName = "fp32",
        activation_checkpointing: CheckpointPolicy | None = None,
        gradient_accumulation_steps: int = 1,
        batches_per_step: int | None = None,
        max_grad_norm: float | None = None,
        drop_compute: DropCompute | None = None,
        balance: Balance | None = None,
        eval_metrics: Mapping[str, Metric] | None = None,
        callbacks: Sequence[Callback] = (),
        seed: int = 0,
        deterministic: bool = False,
        compile: str | None = None,
        slowdown: Slowdown | None = None,
        run_dir: str | Path | None = None,
        log_every: int = 50,
        console: bool = True,
        trace: bool = False,
        checkpointing: Checkpointing | None = None,
        watch: Watch | None = None,
        resume: str | Path | None = None,
        fast_dev_run: bool | int = False,
        overfit_batches: int = 0,
        link: Link | None = None,
    ) -> None:
        self._short = ShortRun(fast_dev_run, overfit_batches)
        if gradient_accumulation_steps < 1:
            raise ConfigError(
                f"gradient_accumulation_steps is {gradient_accumulation_steps}; it is the number "
                "of batches per step, >= 1"
            )
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise ConfigError(f"max_grad_norm is {max_grad_norm}; it is > 0, or None not to clip")
        if deterministic:
            be_deterministic()
        self._owned: Connection | None = None
        link = link or ambient_link()
        if link is None:
            link = self._owned = connect()
        self.link: Link = link
        if link.device.type == "cpu":
            keep_freed_memory()
        if self._short.steps:
            run_dir, checkpointing, resume = self._short.keep_nothing(
                link, run_dir, checkpointing, resume
            )
        strategy = strategy or Sync()
        if batches_per_step is not None:
            gradient_accumulation_steps = share_out(
                batches_per_step,
                gradient_accumulation_steps,
                mesh or Mesh(),
                self.link.group.size,
                strategy.replicas_equal,
            )
        self.precision = Precision(precision) if isinstance(precision, str) else precision
        converted = self.precision.convert(model.to(self.link.device))
        n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._described = f"{type(model).__name__}, {n_parameters:,} trainable parameters"
        recipe = Recipe(
            self.precision,
            optimizer,
            # Replicas that are equal after each update have nothing to bring closer between two.
            strategy.replicas_equal,
            gradient_accumulation_steps,
            max_grad_norm,
            compile,
            loss_fn,
            recomputed=activation_checkpointing is not None,
            loss_weight=loss_weight,
            parts_before=parts_before(link, mesh, checkpointing, resume, run_dir),
        )
        try:
            self.layout = lay_out(converted, self.link, mesh or Mesh(), recipe, engine, pipeline)
        except BaseException:
            self._abandon()
            raise
        self.model = self.layout.model
        self.strategy: Strategy = strategy
        try:
            self.layout.check_fits(self.strategy, drop_compute, slowdown)
            self.replica = Replica(
                self.model,
                self.layout.optimizer(optimizer),
                self.layout.scheduler(lr_scheduler),
                partial(self.precision.rounding, seed),
                named_parameters=self.layout.named_parameters(),
                pieces=self.layout.updated_together,
                counted_elsewhere=self.layout.counted_elsewhere(),
                in_memory=self.layout.in_memory,
            )
            self.scaler = self.layout.scaler(partial(self.precision.scaler, self.replica))
            self.layout.link.event_log = None if run_dir is None else Path(run_dir) / EVENTS
            self.strategy.attach(self.replica, self.layout.link)
            seed_everything(seed, self.link.group.rank)
            self._compile = compile
            called = self.layout.called
            if compile is not None and activation_checkpointing is None:
                called = torch.compile(self.model, backend=compile)
            loop = MicrobatchLoop(
                called,
                loss_fn,
                self.precision,
                self.replica.parameters,
                evaluated=self.model,
                scaler=self.scaler,
                drop_compute=drop_compute,
                paces=self._paces(slowdown, seed),
                clock=self.link.clock,
                device=self.link.device,
            )
            self.schedule = self.layout.schedule(loop, self.scaler)
            self.timeline = self.link.timeline
            self.timeline.keep = trace
            self.metrics = Metrics(
                None if run_dir is None else Path(run_dir),
                rank=self.link.group.rank,
                timeline=self.timeline,
                device=self.link.device,
                bytes_sent=lambda: self.link.bytes_sent,
                more=self._more_metrics,
                data_ranks=self.layout.data_ranks,
                log_every=log_every,
                console=console,
            )
            self.balancer = make_balancer(balance, self.strategy, self.layout, self.metrics.say)
            self.epoch = 0
            self.steps_in_epoch = 0
            self._loss_weight = loss_weight
            self._accumulation = gradient_accumulation_steps
            self._batches_per_step = batches_per_step
            self._max_grad_norm = max_grad_norm
            self.eval_metrics = dict(eval_metrics or {})
            self.callbacks = list(callbacks)
            self._seed = seed
            self._loop: FitLoop | None = None
            self._introduced = False
            self._recomputation = LatePlan(
                activation_checkpointing,
                self.layout,
                self.precision,
                loss_fn,
                compile,
                self.link.device,
                self.metrics.say,
            )
            self._loader: Steps | None = None
            self._resumed = Resumed()
            self._saver: Saver | None = None
        except BaseException:
            self.layout.close()
            self._abandon()
            raise
        try:
            self._saver = resume_and_save(self, model, checkpointing, resume, run_dir)
            self.watcher = Watcher(watch, self, loss_fn, run_dir, self._saver)
        except BaseException:
            self._release()
            self._abandon()
            raise
        self._evaluator = Evaluator(
            self.layout, self.schedule, self.strategy, self.link, loss_weight, self.watcher.enter
        )

    @property
    def in_lockstep(self) -> bool:
        """Whether all replicas make the same steps at the same time."""
        return self.strategy.lockstep.size == self.layout.link.group.size

    @property
    def is_compiled(self) -> bool:
        """Whether what runs is a graph that ``torch.compile`` made, which calls no hooks."""
        return self._compile is not None

    @property
    def evaluation(self) -> Mapping[str, float]:
        """Values of the last evaluation; none before the first."""
        return {} if self._loop is None else self._loop.evaluation

    @property
    def step_size(self) -> tuple[int, int | None]:
        """Of a fit: batches of a step as configured, of all replicas, and samples of a batch."""
        assert self._loader is not None
        return self._loader.step_size

    @property
    def batch_multiple(self) -> int:
        """How many steps as configured are made as one, from the next one on; of a fit."""
        return 1 if self._loader is None else self._loader.multiple

    @batch_multiple.setter
    def batch_multiple(self, value: int) -> None:
        """Set by a callback, on all replicas at the same step."""
        assert self._loader is not None
        self._loader.multiple = value

    @property
    def step_count(self) -> int:
        """Updates that this replica's parameters have received."""
        return self.strategy.step

    def _paces(self, slowdown: Slowdown | None, seed: int) -> list[Pace]:
        handicap = slowdown.pace(self.link.group.rank, seed) if slowdown is not None else None
        return [pace for pace in (self.link.pace(seed), handicap) if pace is not None]

    def step(self, batch: StepBatch) -> bool:
        """Make one step; False if the strategy says that the run is over."""
        self._recomputation.plan(batch)
        computed = None
        while computed is None:  # once, unless the strategy abandons what was begun
            self.replica.zero_grad()
            weight = self.schedule.weight(batch)
            whole = [c.needs_own_gradients(self, batch) for c in self.callbacks]
            passes = 0 if any(whole) else self.schedule.backward_passes(batch)
            self.watcher.enter("pull")
            going = self.strategy.before_forward(passes, weight)
            self.metrics.saw_staleness(self.strategy.staleness)
            if not self.in_lockstep:  # else its other pieces come to the same
                going = not self.layout.agree(not going)
            if not going:
                return False
            self.watcher.begin_computing()
            start, waited = self.timeline.now(), self.timeline.waited
            abandon = self.strategy.abandons if self.strategy.may_abandon else None
            computed = self.schedule.run(batch, abandon)
            self.timeline.add("compute", start)
        if self.balancer is not None:
            self.balancer.computed(self.step_count, start, waited, computed.share)
        self._call("on_gradients")
        self.watcher.enter("reduce")
        if computed.is_due:
            self.strategy.reduce_gradients(weight * computed.share)
            self._call("on_reduced")
        finite, norm = self.scaler.check_and_clip(
            self.replica, self._max_grad_norm, self.metrics.due() or self.watcher.needs_norm
        )
        in_order = self.watcher.is_in_order(batch, computed, norm)
        self.watcher.enter("apply")
        if computed.is_due and finite and in_order:
            self.strategy.apply_gradients()
        elif computed.is_due:
            self.strategy.skip_update()
        self.strategy.after_step()
        mean: float = computed.samples
        if batch.samples_per_rank is not None:
            mean = batch.samples_per_rank * computed.share
        counted, mean = (computed.samples, mean) if in_order else (0, 0)
        self.metrics.record(self.strategy, computed.loss, counted, norm, mean)
        self.watcher.after_step()
        return True

    def _drain(self) -> None:
        """Let the gradients that are still under way make their updates."""
        nothing = StepBatch([], [])
        while self.schedule.pending:  # the same on all replicas in lockstep
            self.replica.zero_grad()
            weight = self.schedule.weight(nothing)
            self.schedule.run(nothing)
            found = any(p.grad is not None for p in self.replica.parameters)
            # One without samples in the step that is through now takes part if another has some.
            found = any_rank(self.strategy.lockstep, found, self.link.device)
            if found:
                self.strategy.reduce_gradients(weight)
            self.scaler.check_and_clip(self.replica, self._max_grad_norm, False)
            if found:
                self.strategy.apply_gradients()

    def fit(
        self,
        train: Iterable[Any],
        *,
        max_steps: int | None = None,
        max_epochs: int | None = None,
        max_seconds: float | None = None,
        eval: Iterable[Any] | None = None,
        eval_every: int | None = None,
    ) -> FitResult:
        """Train until the first of the given limits.

        Args:
            train: any loader of batches; see `ReplicaLoader` for how replicas share it. Its batch
                size is the local one: a step uses batch size x accumulation x replicas samples.
            max_steps: end when the parameters have had this many updates since training began. An
                asynchronous update is made from one replica's gradient, a synchronous one from all.
            max_epochs: end when every replica has passed over its share this many times since
                training began. A fit that ended inside an epoch is continued there.
            max_seconds: end after this time; replicas in lockstep, and ranks that have one
                together, look at it after evaluations and every ``log_every`` steps.
            eval: loader to evaluate on: after each epoch, or every ``eval_every`` steps, and at the
                end. Replicas in lockstep share it; asynchronous ones leave it to rank 0.
            eval_every: steps (updates) between evaluations.

        Raises:
            ConfigError: no limit, or a loader or model that does not fit.
            NonFiniteLossError: the loss became NaN or infinite.
            WaitTimeoutError, PeerLostError: another rank is stuck or died.
        """
        if self._short.batches and eval_every is None:  # an epoch may be one step
            eval_every = self.metrics.log_every
        limits = Limits(max_steps, max_epochs, max_seconds, eval_every)
        if not (limits.has_end or self._short.steps):
            raise ConfigError("fit would never end; give max_steps, max_epochs or max_seconds")
        if max_epochs is not None and not self._short.batches:
            must_end(train, f"the first of max_epochs={max_epochs} epochs")
        if eval is not None and not self._short.batches:
            must_end(eval, "an evaluation")
        replicas = self.layout.link.group
        sharing = replicas.size * self.layout.data_ranks
        train, eval = self._short.data(train, eval, self._seed, sharing)
        loader = self.layout.steps(
            train,
            replicas.rank,
            replicas.size,
            accumulation=self._accumulation,
            seed=self._seed,
            alone=not self.in_lockstep,
            balancer=self.balancer,
            weigh=self._loss_weight,
            batches_per_step=self._batches_per_step,
        )
        self._loader = loader
        self._resumed.find_place(self, loader)
        self._introduce(loader)
        for line in self._short.told(train, loader.step_size[0]):
            self.metrics.say(line)
        if self._short.steps:
            gradients = self._short.steps * replicas.size
            last = self.step_count + max(1, int(gradients // self.strategy.gradients_per_step))
            limits = limits.at_most(last)
        # Without these nobody can want to stop early, and replicas need not ask each other. If one
        # of those in lockstep may, all must be ready to be asked.
        may_stop = self.layout.agree(max_seconds is not None or bool(self.callbacks))
        may_stop = any_rank(self.strategy.lockstep, may_stop, self.link.device)
        run = self._loop = FitLoop(
            self,
            loader,
            self._call,
            limits,
            eval_loader=eval,
            may_stop=may_stop,
            after_step=self._step_ended,
            ready=self._resumed.restore_generators,
        )
        total = limits.max_steps
        if total is None and max_epochs is not None and loader.steps_per_epoch is not None:
            left = (max_epochs - self.epoch) * loader.steps_per_epoch - self.steps_in_epoch
            gradients = left * replicas.size
            total = self.step_count + gradients // self.strategy.gradients_per_step
        if self.balancer is not None:
            self.balancer.start()
        stop_request = self._saver.stop_request if self._saver is not None else nullcontext()
        try:
            with self.watcher.watching(loader), stop_request:
                # All begin at once, so times of different ranks are seconds since the same moment.
                self.strategy.start(limits.max_steps)
                self.metrics.start(self.step_count, total, max_seconds)
                if self._saver is not None:
                    self._saver.start(limits.max_steps)
                self._call("on_fit_start")
                stopped_by = run.run()
                has_pending = self.schedule.pending > 0
                if self.balancer is not None:
                    self.balancer.end()
                self.watcher.enter("end")
                self._drain()
                if self._saver is not None:
                    is_stopping = stopped_by not in ("max_steps", "max_epochs")
                    self._saver.end(is_stopping, is_changed=has_pending)
                else:
                    self.strategy.settle()
                self.layout.share_buffers()
            self._resumed = Resumed()
            self.layout.refresh()
            run.evaluate_at_end()
            self.metrics.flush(self.strategy)
            self._call("on_fit_end")
        finally:
            self.metrics.finish()
        return FitResult(self.step_count, self.metrics.seconds, stopped_by, run.evaluation)

    def _step_ended(self) -> None:
        if self.balancer is not None:
            self.balancer.step_ended(self.step_count)
        if self._saver is not None:
            self._saver.after_step()

    def stop(self) -> None:
        """End the run soon; from a callback.

        A replica alone, on one rank, ends after this step; replicas in lockstep, or the ranks that
        have one together, after their next evaluation or their next multiple of ``log_every``
        steps, together.
        """
        if self._loop is not None:
            self._loop.stopping = True

    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        """Mean loss and metrics over a loader, in eval mode.

        Replicas in lockstep (all of them under `Sync`) share the batches, with rank 0's buffers,
        and must call this together; otherwise the calling replica evaluates everything with its
        own.

        Returns:
            ``"loss"`` and each of ``eval_metrics``: means over all samples, or of a metric of
            torchmetrics what it makes of all samples.

        Raises:
            ConfigError: there are ``eval_metrics``, but the batches have no targets; or the loader
                has no end; or a metric is no number.
        """
        return as_numbers(self.measure(loader, self.eval_metrics))

    def measure(self, loader: Iterable[Any], metrics: Mapping[str, Metric]) -> dict[str, Tensor]:
        """As `evaluate`, of these metrics, whose values may have any shape."""
        return self._evaluator.measure(loader, metrics)

    def predict(self, loader: Iterable[Any]) -> list[Any]:
        """The model's outputs for each batch of a loader, in its order, in eval mode.

        The rank that calls this computes all of them; nothing is communicated but parts of the
        model, so that ranks that have a replica together call it together. Batches may be inputs
        alone, (inputs, targets), or dicts for the model. With ``mesh.pipe`` the rank of the last
        stage has the outputs (the last rank, with ``ZBVZeroBubble`` and ``DualPipeV`` the first),
        the others an empty list.
        """
        return self._evaluator.predict(loader)

    def state_dict(self) -> dict[str, Any]:
        """A copy of what this rank needs to go on: also its place in the data, and generators.

        Ranks that have a replica together (``mesh.shard``, ``mesh.pipe``) call this together, also
        from a callback: stages may have to make their copies of tied weights equal first.
        """
        return state_of(self, self._seed, self._loader)

    def full_state_dict(self) -> dict[str, Any]:
        """The whole model's state dict: plain tensors on the host, by the model's own names.

        It is this replica's, in whatever layout. The ranks of a replica call this together; its
        first rank has the result, the others an empty dict. A run with any layout begins with it if
        it is loaded into the model before that is given to a Trainer.
        """
        return self.layout.full_state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, on every rank, before ``fit``.

        Raises:
            ConfigError: it is of a run with another seed, whose data have another order.
        """
        self._resumed = restore(self, self._seed, state)

    def close(self) -> None:
        """Close files, and the connection if the Trainer made it; all ranks call it."""
        self._release()
        if self._owned is not None:
            self._owned.close()
            self._owned = None

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._release()
            self._abandon()

    def _abandon(self) -> None:
        """Leave the job without waiting for the others, who may be anywhere."""
        if self._owned is not None:
            self._owned.abandon()

    def _release(self) -> None:
        """Close files; the model is the user's again."""
        if self._saver is not None:
            self._saver.close()
        self._short.close()
        self.metrics.finish()
        self.layout.close()
        for callback in self.callbacks:
            callback.close()
        self._recomputation.close()

    def _call(self, moment: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, moment)(self, *arguments)

    def _more_metrics(self) -> dict[str, float]:
        told = {**self.scaler.metrics()}
        for callback in self.callbacks:
            told.update(callback.metrics())
        return told

    def _introduce(self, loader: Steps) -> None:
        """Say once what will run."""
        if self._introduced:
            return
        self._introduced = True
        replicas, each = self.layout.link.group.size, self.layout.pieces.size
        pieces = f" of {each} ranks" if each > 1 else ""
        local = "as loaded" if loader.batch_size is None else loader.batch_size
        self.metrics.say(
            f"scaledtrain: {self._described}; "
            f"{replicas} replica{'s' if replicas > 1 else ''}{pieces} on "
            f"{self.link.device.type} over {self.link.transport}; strategy "
            f"{self.strategy}; precision {self.precision}; batch per replica "
            f"{local} x {self._accumulation} accumulation"
            + ("" if self._batches_per_step is None else f", {self._batches_per_step} in a step")
        )
        if self.layout.told:
            self.metrics.say(self.layout.told)
