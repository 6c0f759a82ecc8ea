"""The Trainer on one process: equal to a loop written by hand, and clear when it cannot be.

What holds for every strategy is in tests/contract.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import (
    Callback,
    Mesh,
    ParameterServer,
    Precision,
    StopAtTarget,
    Strategy,
    Sync,
    Trainer,
)
from scaledtrain.errors import ClusterError, ConfigError, NonFiniteLossError
from scaledtrain.schedule import Slowdown, loss_of

STRATEGIES = [Sync, ParameterServer]
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def net(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2))


def data(n: int = 20) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 3, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


def batches(size: int = 4) -> list[Any]:
    return list(DataLoader(data(), batch_size=size))


def trainer(model: nn.Module | None = None, **options: Any) -> Trainer:
    options = {"optimizer": SGD, "loss_fn": F.cross_entropy, "console": False, **options}
    return Trainer(model or net(), **options)


def plain_loop(
    batches: list[Any], make_optimizer: Callable[..., torch.optim.Optimizer], *, epochs: int = 2
) -> list[Tensor]:
    """What a user would write."""
    model = net()
    optimizer = make_optimizer(model.parameters())
    for _ in range(epochs):
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return list(model.parameters())


def assert_same(model: nn.Module, expected: list[Tensor]) -> None:
    for got, want in zip(model.parameters(), expected, strict=True):
        assert torch.equal(got, want)


def test_uneven_accumulation_is_the_mean_over_all_samples() -> None:
    """10 samples as batches of 4, 4, 2: one step whose gradient is that of the mean over 10."""
    x, y = data(10).tensors
    t = trainer(optimizer=partial(torch.optim.SGD, lr=1.0), gradient_accumulation_steps=3)
    t.fit([(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])], max_epochs=1)
    expected = plain_loop([(x, y)], partial(torch.optim.SGD, lr=1.0), epochs=1)
    for got, want in zip(t.model.parameters(), expected, strict=True):
        # Three partial sums in float32 instead of one: a few units of the last place (6e-8).
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limits", [(3, 6, 9, 10), (1, 10)])
def test_several_fits_are_one_run(limits: tuple[int, ...]) -> None:
    """A fit that ends inside an epoch is continued there: each of the 5 batches once an epoch."""
    whole, parts = trainer(), trainer()
    whole.fit(batches(), max_steps=10)
    for limit in limits:
        parts.fit(batches(), max_steps=limit)
    assert_same(parts.model, list(whole.model.parameters()))


def test_evaluation_leaves_every_module_in_its_mode() -> None:
    model = net(dropout=0.5)
    model[2].eval()
    t = trainer(model)
    t.evaluate(batches())
    assert [m.training for m in model] == [True, True, False, True]


def test_same_seed_same_run_also_with_dropout() -> None:
    loader = DataLoader(data(), batch_size=4, shuffle=True)
    runs = []
    for seed in (7, 7, 8):
        t = trainer(net(dropout=0.5), seed=seed)
        t.fit(loader, max_epochs=1)
        runs.append(torch.cat([p.detach().reshape(-1) for p in t.model.parameters()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_evaluate_is_the_mean_over_samples_in_eval_mode() -> None:
    model = net(dropout=0.5)
    t = trainer(model, eval_metrics={"accuracy": lambda o, y: (o.argmax(1) == y).float().mean()})
    x, y = data(10).tensors
    values = t.evaluate(DataLoader(TensorDataset(x, y), batch_size=4))  # 4 + 4 + 2
    model.eval()
    outputs = model(x)
    assert values["loss"] == pytest.approx(F.cross_entropy(outputs, y).item(), rel=1e-6)
    assert values["accuracy"] == pytest.approx((outputs.argmax(1) == y).double().mean().item())


def masked_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    """NaN where all is masked, and so is its gradient."""
    kept = targets >= 0
    losses = F.cross_entropy(outputs, targets.clamp(min=0), reduction="none")
    return (losses * kept).sum() / kept.sum()


def test_a_batch_whose_targets_are_all_masked_counts_nothing() -> None:
    whole = batches()[:2]
    inputs, targets = batches()[2]
    given = [whole[0], (inputs, torch.full_like(targets, -100)), whole[1]]

    def count(batch: Any) -> int:
        return int((batch[1] >= 0).sum())

    with trainer(
        loss_fn=masked_mean, loss_weight=count, gradient_accumulation_steps=3
    ) as accumulated:
        accumulated.fit(given, max_epochs=2)
        value = accumulated.evaluate(given)["loss"]
    with trainer(gradient_accumulation_steps=2) as expected:
        expected.fit(whole, max_epochs=2)
        assert value == pytest.approx(expected.evaluate(whole)["loss"], rel=1e-6)
    for got, want in zip(accumulated.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    slow = Slowdown({0: 2.0})
    with trainer(loss_fn=masked_mean, loss_weight=count, slowdown=slow) as alone:  # a step, too
        alone.fit(given[1:2], max_epochs=1)
        assert_same(alone.model, list(net().parameters()))


def test_outputs_of_a_batch_that_counts_nothing_may_be_infinite() -> None:
    logits = torch.tensor([[1.0, -math.inf]], requires_grad=True)
    loss = loss_of(0, {"logits": logits}, torch.tensor(math.nan))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("weight", [0.8, -1, float("nan")])
def test_a_batch_counts_a_number_of_terms(weight: float) -> None:
    with (
        trainer(loss_weight=lambda batch: weight) as weighted,
        pytest.raises(ConfigError, match=f"loss_weight gave {weight:g} for a batch; it is of how"),
    ):
        weighted.fit(batches(), max_epochs=1)


def test_predict_gives_every_batch_in_order() -> None:
    t = trainer()
    x = data(10).tensors[0]
    outputs = t.predict(DataLoader(TensorDataset(x), batch_size=4))
    assert [len(o) for o in outputs] == [4, 4, 2]
    t.model.eval()
    for output, batch in zip(outputs, x.split(4), strict=True):
        assert torch.equal(output, t.model(batch))


class HuggingFaceLike(nn.Module):
    """A dict batch in, an object with ``.loss`` out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        @dataclass
        class Output:
            loss: Tensor
            logits: Tensor

        logits = self.net(x)
        return Output(F.cross_entropy(logits, labels), logits)


def test_model_that_returns_its_own_loss() -> None:
    dicts = [{"x": x, "labels": y} for x, y in batches()]
    t = trainer(HuggingFaceLike(), loss_fn=None)
    t.fit(dicts, max_epochs=2)
    assert_same(t.model, plain_loop(batches(), SGD))


def test_frozen_parameters_stay() -> None:
    model = net()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    t = trainer(model)
    t.fit(batches(), max_epochs=1)
    assert torch.equal(model[0].weight, before)


def test_limits() -> None:
    assert trainer().fit(batches(), max_steps=7).stopped_by == "max_steps"
    t = trainer()
    assert t.fit(batches(), max_steps=7, max_epochs=1).stopped_by == "max_epochs"
    assert t.step_count == 5
    assert t.fit(batches(), max_steps=7).step == 7  # counted from the beginning of training
    result = trainer().fit(batches(), max_seconds=0.05)
    assert result.stopped_by == "max_seconds"
    assert result.seconds >= 0.05


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stop_at_target_and_callbacks(strategy: Callable[[], Strategy]) -> None:
    class Log(Callback):
        def __init__(self) -> None:
            self.moments: list[str] = []

        def on_fit_start(self, trainer: Trainer) -> None:
            self.moments.append("start")

        def on_step_end(self, trainer: Trainer) -> None:
            self.moments.append("step")

        def on_fit_end(self, trainer: Trainer) -> None:
            self.moments.append("end")

    log = Log()
    t = trainer(strategy=strategy(), callbacks=[log, StopAtTarget("loss", at_most=1e9)])
    result = t.fit(batches(), max_epochs=5, eval=batches(), eval_every=3)
    assert result.stopped_by == "callback"
    assert log.moments[0] == "start"
    assert log.moments[-1] == "end"
    # The server's worker learns its version at the next pull, one step later than Sync.
    assert log.moments.count("step") == (3 if strategy is Sync else 4)
    assert result.evaluation["loss"] > 0


def test_deterministic_and_compiled_agree_with_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # so that it is put back
    try:
        t = trainer(deterministic=True, compile="eager")
        t.fit(batches(), max_epochs=2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(t.model, plain_loop(batches(), SGD))
    torch._dynamo.reset()


def test_slowdown_takes_the_stated_time_and_changes_no_number() -> None:
    t = trainer(slowdown=Slowdown({0: 3.0}, min_compute_seconds=0.01))
    result = t.fit(batches(), max_steps=4)
    assert result.seconds >= 4 * 3 * 0.01
    assert_same(t.model, plain_loop(batches()[:4], SGD, epochs=1))


def step_seconds(slowdown: Slowdown, rank: int, seed: int, n: int) -> list[float]:
    """What each step takes where the host needs no time for it."""
    pace = slowdown.pace(rank, seed)
    assert pace is not None
    seconds = []
    for _ in range(n):
        pace.begin_step()
        seconds.append(pace.seconds(0.0, 1.0))
    return seconds


def test_gamma_distributed_times_have_mean_1_and_are_those_of_seed_and_rank() -> None:
    varied = Slowdown({1: 2.0}, 1.0, gamma_shape=4.0)
    times = torch.tensor(step_seconds(varied, 0, 0, 20_000))
    # Mean 1 with a standard error of 0.5 / sqrt(20000) = 0.0035; deviation 1 / sqrt(4).
    assert times.mean().item() == pytest.approx(1.0, abs=0.02)
    assert times.std().item() == pytest.approx(0.5, abs=0.02)
    assert torch.tensor(step_seconds(varied, 1, 0, 20_000)).mean().item() == pytest.approx(
        2.0, abs=0.04
    )
    assert step_seconds(varied, 0, 0, 5) == step_seconds(varied, 0, 0, 5)
    assert (
        len({tuple(step_seconds(varied, rank, seed, 5)) for rank in (0, 2) for seed in (0, 1)}) == 4
    )
    assert step_seconds(Slowdown({1: 2.0}, 1.0), 1, 0, 2) == [2.0, 2.0]


def test_gamma_distributed_times_are_slept_and_change_no_number() -> None:
    slowdown = Slowdown({}, min_compute_seconds=0.01, gamma_shape=4.0)
    t = trainer(slowdown=slowdown, seed=7)
    result = t.fit(batches(), max_steps=4)
    assert result.seconds >= sum(step_seconds(slowdown, 0, 7, 4))
    assert_same(t.model, plain_loop(batches()[:4], SGD, epochs=1))


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_files(tmp_path: Path) -> None:
    half = partial(torch.optim.SGD, lr=0.5)
    t = trainer(run_dir=tmp_path, log_every=2, trace=True, optimizer=half)
    t.fit(batches(), max_epochs=1, eval=batches())
    t.close()
    lines = read_lines(tmp_path / "metrics-rank0.jsonl")
    records = [line for line in lines if line["kind"] == "step"]
    assert [r["step"] for r in records] == [2, 4, 5]  # 5 steps, every 2, and the rest
    assert [r["steps"] for r in records] == [2, 2, 1]
    assert all(r["learning_rate"] == 0.5 for r in records)
    parts = ("data", "compute", "communication", "waiting", "evaluation")
    for r in records:
        assert 0 < sum(r[f"{p}_seconds"] for p in parts) <= r["step_seconds"]
        assert r["samples_per_second"] == pytest.approx(4 / r["step_seconds"])
        assert r["memory_bytes"] > 0
    evaluation = next(line for line in lines if line["kind"] == "evaluation")
    assert evaluation["step"] == 5
    (begin, _, host), *spans = read_lines(tmp_path / "trace-rank0.jsonl")
    assert (begin, host) == ("begin", socket.gethostname())
    assert [phase for phase, _, _ in spans].count("data") == 5
    assert all(0 <= start <= end for _, start, end in spans)
    assert list((tmp_path / "tensorboard").iterdir())


def test_grad_norm_is_recorded() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([3.0, 4.0]))

        def forward(self, x: Tensor) -> Tensor:
            return (self.w * x).sum()

    seen: list[float | None] = []
    t = trainer(Norm(), loss_fn=None, log_every=1)
    flush = t.metrics.flush

    def spy(strategy: Strategy, norm: Tensor | None = None) -> None:
        seen.append(None if norm is None else float(norm))
        flush(strategy, norm)

    t.metrics.flush = spy  # type: ignore[method-assign]
    t.fit([torch.tensor([3.0, 4.0])], max_steps=1)
    assert seen[0] == 5.0  # the gradient is (3, 4)


# What cannot be done is said clearly.


def test_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="no parameter with requires_grad=True"):
        trainer(nn.ReLU())


def test_optimizer_must_be_a_factory() -> None:
    model = net()
    with pytest.raises(ConfigError, match=r"functools.partial\(torch.optim.SGD"):
        trainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="not a torch.optim.Optimizer"):
        trainer(model, optimizer=lambda params: None)


def test_loss_must_be_a_scalar() -> None:
    with pytest.raises(ConfigError, match=r"not \(4,\); average it"):
        trainer(loss_fn=partial(F.cross_entropy, reduction="none")).fit(batches(), max_steps=1)


def test_metrics_need_targets() -> None:
    t = trainer(HuggingFaceLike(), loss_fn=None, eval_metrics={"accuracy": lambda o, y: y})
    with pytest.raises(ConfigError, match="compare outputs with targets"):
        t.evaluate([{"x": x, "labels": y} for x, y in batches()])


def test_gradients_that_are_never_finite_end_the_run() -> None:
    """The loss is 0, its gradient infinite: the server rejects every push."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.w.sqrt().sum()

    t = trainer(Root(), loss_fn=None, strategy=ParameterServer(), log_every=1000)
    with pytest.raises(ClusterError, match="last 100 gradients were all rejected"):
        t.fit([torch.zeros(1)], max_steps=3)


def test_batch_must_be_a_pair() -> None:
    with pytest.raises(ConfigError, match=r"must be \(inputs, targets\); the loader gave a dict"):
        trainer().fit([{"x": torch.zeros(4, 3)}], max_steps=1)


def test_model_without_a_loss() -> None:
    lstm = trainer(nn.LSTM(3, 2), loss_fn=None)  # it returns a tuple
    with pytest.raises(ConfigError, match="without a .loss"):
        lstm.fit([torch.zeros(4, 2, 3)], max_steps=1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nan_loss_names_the_step(strategy: Callable[[], Strategy]) -> None:
    loader = batches()
    loader[2] = (loader[2][0] * float("nan"), loader[2][1])
    t = trainer(strategy=strategy(), log_every=5)
    with pytest.raises(NonFiniteLossError, match="rank 0 was nan .* lower the learning rate"):
        t.fit(loader, max_epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1"),
        ({"log_every": 0}, "log_every is 0"),
        ({"mesh": Mesh(replicate=4)}, "mesh.replicate is 4, but the job has 1 rank"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(**options)


def test_impossible_values() -> None:
    with pytest.raises(ConfigError, match="a factor is >= 1"):
        Slowdown({1: 0.5})
    with pytest.raises(ConfigError, match=r"gamma_shape is 0\.0; it is > 0"):
        Slowdown({}, gamma_shape=0.0)
    with pytest.raises(ConfigError, match=r"'fp33' \(did you mean 'fp32'\?\); it can be: 'fp32'"):
        Precision("fp33")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="one of at_least and at_most"):
        StopAtTarget("loss")


def test_fit_needs_an_end() -> None:
    with pytest.raises(ConfigError, match="would never end"):
        trainer().fit(batches())


def test_target_that_is_not_measured() -> None:
    t = trainer(callbacks=[StopAtTarget("accuracy", at_least=0.9)])
    with pytest.raises(ConfigError, match="watches 'accuracy', but the evaluation has: loss"):
        t.fit(batches(), max_epochs=1, eval=batches())
