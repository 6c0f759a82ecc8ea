"""What a run records: JSON lines on every rank, TensorBoard and a console on rank 0.

Between two records nothing touches the device's results: losses stay tensors, times are sums of
host clocks. A record is made every ``log_every`` steps, and only then the host waits for values.
"""

from __future__ import annotations

import math
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from scaledtrain.console import Console
from scaledtrain.errors import ConfigError, NonFiniteLossError
from scaledtrain.records import Records
from scaledtrain.strategies import Strategy
from scaledtrain.timeline import PHASES, Timeline

__all__ = ["Metrics"]


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Metrics:
    """Collects the steps of one rank and writes them down at intervals.

    A record (one JSON object a line in ``metrics-rank<r>.jsonl``; the same names in TensorBoard)
    holds, over the steps since the last one:

    * ``step``: updates made to the parameters; ``seconds``: since fit began; ``steps`` and
      ``samples``: of this replica, over which the rest is taken;
    * ``loss``: mean over this replica's samples; ``learning_rate``: of the next update;
    * ``grad_norm``: 2-norm of this replica's gradient at the record's step, before clipping;
    * ``samples_per_second``: of all replicas together (where each counts its own steps only, its
      own times their number: the mean over the replicas is then that of all);
    * ``step_seconds``: mean of this replica;
    * ``data_seconds``, ``compute_seconds``, ``communication_seconds``, ``waiting_seconds``,
      ``evaluation_seconds``: the parts of ``step_seconds``;
    * where the loss is scaled, ``loss_scale``: of the next step, and ``overflows``: steps of this
      replica that made no update, since training began;
    * where a `NoiseScale` measures, ``batch_size``: samples of the last whole step it measured,
      and ``noise_scale``, ``gradient_variance``, ``gradient_squared_norm`` where there are such;
    * ``staleness_mean``, ``staleness_max``, ``staleness_counts`` (value -> pushes), where there is
      one;
    * ``bytes_sent``: payload that this rank handed to a transport, per step of this replica;
    * ``memory_bytes``: peak of this process (CPU) or device (CUDA).

    An evaluation is a line with ``kind`` ``"evaluation"``. What a `scaledtrain.watch.Watch` sees
    are lines of kind ``"ranks"``, seconds a step of each rank, and ``"trouble"``; a
    `scaledtrain.layers.LayerWatch` writes ``"layers"`` and ``"warning"``. With a traced
    timeline ``trace-rank<r>.jsonl`` has one ``[phase, start, end]`` a line, in seconds since fit
    began (with stages also one for each pass, as ``["0F1", start, end]``, see `PipelineOrder`),
    and before them ``["begin", seconds, host]``: when that was on the clock of the host, which its
    ranks share.

    A crash loses the records since the last interval; every line written is whole. On a disk that
    is full records are left out, which is told, and training goes on.

    Args:
        run_dir: folder for files; None writes none.
        rank: this rank.
        timeline: where the time parts come from.
        device: whose memory is reported.
        bytes_sent: tells how much this rank has sent so far; None: nothing is.
        data_ranks: how many ranks train a replica together, each on samples of its own.
        more: tells what else is to be in a record, by name; None: nothing.
        log_every: steps between records, at least 1.
        console: whether rank 0 shows progress on stderr.
        tensorboard: whether rank 0 writes TensorBoard events to ``run_dir/tensorboard``.
    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        rank: int,
        timeline: Timeline,
        device: torch.device,
        bytes_sent: Callable[[], int] | None = None,
        data_ranks: int = 1,
        more: Callable[[], Mapping[str, float]] | None = None,
        log_every: int = 50,
        console: bool = True,
        tensorboard: bool = True,
    ) -> None:
        if log_every < 1:
            raise ConfigError(f"log_every is {log_every}; it is the steps between records, >= 1")
        self.log_every = log_every
        self._rank = rank
        self._timeline = timeline
        self._device = device
        self._bytes_sent = bytes_sent or (lambda: 0)
        self._data_ranks = data_ranks
        self._more = more or dict
        self._console = Console(console and rank == 0)
        self._traced_begin: float | None = None
        self._records = Records(run_dir, rank, tensorboard and rank == 0)
        self._begin = timeline.now()
        self._seconds_before = 0.0  # of the run that this one continues
        self._last_loss: Tensor | None = None
        self._forget(0, self._begin)

    def _forget(self, step: int, now: float) -> None:
        self._first_step = step
        self._since = now
        self._steps = 0
        self._samples = 0
        self._mean_samples = 0.0  # of a rank
        self._losses: list[Tensor] = []
        self._weights: list[int] = []
        self._staleness: dict[int, int] = {}
        self._sent_before = self._bytes_sent()

    @property
    def seconds(self) -> float:
        """Since fit began."""
        return self._timeline.now() - self._begin

    def state_dict(self) -> dict[str, float]:
        """How long the run has taken so far."""
        return {"seconds": self._seconds_before + self.seconds}

    def load_state_dict(self, state: Mapping[str, float], step: int) -> None:
        """Go on from there."""
        self._seconds_before = state["seconds"]
        self.forget_after(step)

    def forget_after(self, step: int) -> None:
        """Remove the records of later steps, which will be made again."""
        self._records.forget_after(step)

    def went_back(self, left: int, step: int) -> None:
        """The run was at one step, and is at an earlier one again; what it took is not undone."""
        self._first_step -= left - step
        self.forget_after(step)

    def start(self, step: int, total: int | None, max_seconds: float | None = None) -> None:
        """A fit begins at this step; it will end at that one, or after that time, if known."""
        self._console.start(step, total, max_seconds)
        self._begin = self._timeline.now()
        self._timeline.drain()
        self._forget(step, self._begin)

    def due(self) -> bool:
        """Whether the step under way will make a record."""
        return self._steps + 1 >= self.log_every

    @property
    def last_loss(self) -> float:
        """Of the last step of this replica; NaN: it had no samples."""
        return math.nan if self._last_loss is None else float(self._last_loss)

    def saw_staleness(self, staleness: int | None) -> None:
        """Count one pushed gradient's staleness."""
        if staleness is not None:
            self._staleness[staleness] = self._staleness.get(staleness, 0) + 1

    def record(
        self,
        strategy: Strategy,
        loss: Tensor,
        samples: int,
        grad_norm: Tensor | None,
        gradient_samples: float | None = None,
    ) -> None:
        """Take note of a step; makes a record when one is due.

        Args:
            strategy: after the step; tells step, learning rate and gradients per step.
            loss: of this replica, a scalar on its device.
            samples: that this replica trained on.
            grad_norm: of its gradient, if measured.
            gradient_samples: over all ranks; None: each trained on as many.

        Raises:
            NonFiniteLossError: at a record, if a loss since the last one was NaN or infinite.
        """
        self._steps += 1
        self._samples += samples
        self._mean_samples += samples if gradient_samples is None else gradient_samples
        self._last_loss = loss if samples else None
        if samples:
            self._losses.append(loss)
            self._weights.append(samples)
        self._console.advance(strategy.step)
        if self._steps >= self.log_every:
            self.flush(strategy, grad_norm)

    def flush(self, strategy: Strategy, grad_norm: Tensor | None = None) -> None:
        """Make a record of the steps since the last one."""
        if self._steps == 0:
            return
        step = strategy.step
        loss = self._finite_mean_loss(step)
        now = self._timeline.now()
        elapsed = max(now - self._since, 1e-9)
        phases, spans = self._timeline.drain()
        gradients = (step - self._first_step) * strategy.gradients_per_step * self._data_ranks
        values: dict[str, float] = {
            "learning_rate": strategy.learning_rate,
            "samples_per_second": gradients * (self._mean_samples / self._steps) / elapsed,
            "step_seconds": elapsed / self._steps,
            "bytes_sent": (self._bytes_sent() - self._sent_before) / self._steps,
            "memory_bytes": _peak_memory_bytes(self._device),
            **self._more(),
        }
        if loss is not None:
            values["loss"] = loss
        if grad_norm is not None:
            values["grad_norm"] = float(grad_norm)
        for phase in PHASES:
            values[f"{phase}_seconds"] = phases.get(phase, 0.0) / self._steps
        if self._staleness:
            count = sum(self._staleness.values())
            values["staleness_mean"] = sum(s * n for s, n in self._staleness.items()) / count
            values["staleness_max"] = max(self._staleness)
        counts = {"steps": self._steps, "samples": self._samples}
        self._write("step", step, values, **counts, staleness_counts=self._staleness)
        if rows := [*spans, *self._timeline.drain_named()]:
            self._write_trace([[n, s - self._begin, e - self._begin] for n, s, e in rows])
        text = f"{values['samples_per_second']:.0f} samples/s"
        if self._staleness:
            text += f"  staleness {values['staleness_mean']:.1f}"
        if values.get("overflows"):
            text += f"  {values['overflows']:.0f} overflows"
        if "noise_scale" in values:
            text += f"  noise scale {values['noise_scale']:.0f}, batch {values['batch_size']:.0f}"
        self._console.show(step, f"loss {values.get('loss', math.nan):.4f}", text)
        self._forget(step, now)

    def _finite_mean_loss(self, step: int) -> float | None:
        if not self._losses:
            return None
        losses = torch.stack(self._losses).float()
        weights = torch.tensor(self._weights, dtype=torch.float32, device=losses.device)
        mean = float(losses @ weights) / sum(self._weights)
        finite = torch.isfinite(losses) if not math.isfinite(mean) else None
        if finite is not None and not bool(finite.all()):
            first = int((~finite).nonzero()[0])
            ago = len(losses) - first - 1
            when = f"at step {step}" if ago == 0 else f"{ago} of its steps before step {step}"
            raise NonFiniteLossError(
                f"the loss of rank {self._rank} was {losses[first].item()} {when}; lower the "
                "learning rate, clip gradients (max_grad_norm=1.0), or look for NaN in the inputs"
            )
        return mean

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Write down an evaluation."""
        self._write("evaluation", step, values)
        self._console.evaluated(step, self.seconds, values)

    def say(self, text: str) -> None:
        """Show a line on rank 0."""
        self._console.say(text)

    def note(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        """Write down something else than a record or an evaluation; only into the file."""
        self._records.append("metrics", [{"kind": kind, "step": step, **record}])

    @property
    def draws(self) -> bool:
        """Whether this rank writes for TensorBoard."""
        return self._records.draws

    def show(
        self,
        prefix: str,
        step: int,
        values: Mapping[str, float],
        histograms: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Give TensorBoard further scalars, and values to draw the distribution of, by name."""
        self._records.show(prefix, step, values, histograms)

    def _write(self, kind: str, step: int, values: dict[str, float], **more: Any) -> None:
        seconds = self._seconds_before + self.seconds
        record = {"kind": kind, "step": step, "seconds": seconds, **values, **more}
        self._records.append("metrics", [record])
        self._records.show("evaluation" if kind == "evaluation" else "train", step, values)

    def _write_trace(self, rows: list[list[Any]]) -> None:
        if self._traced_begin != self._begin:
            self._traced_begin = self._begin
            rows = [["begin", self._begin, socket.gethostname()], *rows]
        self._records.append("trace", rows)

    def finish(self) -> None:
        """The fit is over: the bar is gone."""
        self._console.close()
