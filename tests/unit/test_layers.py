"""Layers under way: values by hand, what is told of them, and that nothing of the run changes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F

from scaledtrain import (
    Checkpointing,
    LayerWatch,
    LocalSGD,
    ParameterServer,
    Sync,
    Trainer,
    Watch,
)
from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ConfigError
from scaledtrain.layers.findings import Findings, TensorFacts
from scaledtrain.layers.parameters import _turns
from scaledtrain.layers.sampled import sampled
from scaledtrain.layers.scale import ScaleWatch
from scaledtrain.loss_scale import LossScale
from scaledtrain.precision import Precision
from scaledtrain.recompute import CheckpointEvery, CheckpointPolicy, CheckpointSqrt
from tests.worlds import World

Batch = tuple[Tensor, Tensor]
SGD = partial(torch.optim.SGD, lr=0.01)


def two_layers() -> nn.Sequential:
    """3 relu(2 x)."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    nn.init.constant_(model[0].weight, 2.0)
    nn.init.constant_(model[2].weight, 3.0)
    return model


BATCHES = [(torch.tensor([[x]]), torch.tensor([[y]])) for x, y in ((1.0, 4.0), (-1.0, 0.0))]


def rows_of(watch: LayerWatch, steps: int = 1, **options: Any) -> dict[str, Any]:
    """After steps of both samples, in two microbatches."""
    options = {"console": False, "gradient_accumulation_steps": 2, **options}
    with Trainer(two_layers(), F.mse_loss, SGD, callbacks=[watch], **options) as trainer:
        trainer.fit(BATCHES * steps, max_steps=steps)
    return watch.rows


def test_a_small_net_has_the_values_of_a_calculation_by_hand() -> None:
    """x is 1 and -1, so 2 x is 2 and -2, relu 2 and 0, the output 6 and 0, the targets 4 and 0.

    The loss is (4 + 0) / 2, its gradients by the outputs 2 and 0. By the second weight 2 * 2 = 4,
    by the first 2 * 3 * 1 = 6. SGD makes them 0.01 times as large: 0.04 / 3 and 0.06 / 2.
    """
    rows = rows_of(LayerWatch(every_steps=1))
    assert rows["0"] == pytest.approx(
        {"grad_norm": 6.0, "weight_norm": 2.0, "update_ratio": 0.03, "mean": 0.0, "std": 2.0}
    )
    assert rows["1"] == pytest.approx(
        {"mean": 1.0, "std": 1.0, "zeros": 0.5, "dead": 0.0, "units": 1.0}
    )
    assert rows["2"] == pytest.approx(
        {"grad_norm": 4.0, "weight_norm": 3.0, "update_ratio": 0.04 / 3, "mean": 3.0, "std": 3.0}
    )


def test_the_update_is_the_one_that_was_made() -> None:
    """Clipped to 1 from sqrt(6^2 + 4^2); the norm of the gradient is that before.

    With a server the update of step 1 comes with the pull of step 2, whose gradients are not used
    until then.
    """
    rows = rows_of(LayerWatch(every_steps=1), max_grad_norm=1.0)
    assert rows["2"]["grad_norm"] == pytest.approx(4.0)
    assert rows["2"]["update_ratio"] == pytest.approx(0.01 * 4 / math.sqrt(52) / 3, rel=1e-4)
    assert rows_of(LayerWatch(every_steps=1), strategy=ParameterServer())["0"]["update_ratio"] == 0
    rows = rows_of(LayerWatch(every_steps=1), 2, strategy=ParameterServer())
    assert rows["0"]["update_ratio"] == pytest.approx(0.03)


def test_a_model_too_large_for_the_copies_takes_turns() -> None:
    """A weight has 4 bytes: of each step one of the two is measured, and the norms of both."""
    first, second = (rows_of(LayerWatch(every_steps=1, copy_size=4), n) for n in (1, 2))
    assert ("update_ratio" in first["0"], "update_ratio" in first["2"]) == (True, False)
    assert ("update_ratio" in second["0"], "update_ratio" in second["2"]) == (False, True)
    assert first["2"]["weight_norm"] == 3.0
    assert _turns([3, 4, 9, 1, 1, 1], 7) == [[0, 1], [2], [3, 4, 5]]


def test_records_and_tensorboard_have_the_measured_steps(tmp_path: Path) -> None:
    rows_of(LayerWatch(every_steps=2), 4, run_dir=tmp_path)
    lines = map(json.loads, (tmp_path / "metrics-rank0.jsonl").read_text().splitlines())
    measured = {line["step"]: line["layers"] for line in lines if line["kind"] == "layers"}
    assert list(measured) == [1, 3]
    shown = EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0})
    shown.Reload()
    assert [e.value for e in shown.Scalars("layers_grad_norm/0")] == pytest.approx(
        [rows["0"]["grad_norm"] for rows in measured.values()]
    )
    first, _ = shown.Histograms("layers_gradients/0")
    value = first.histogram_value
    assert (value.num, value.min, value.max, sum(value.bucket)) == (1, 6.0, 6.0, 1)


def wide(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Dropout(dropout)) for _ in range(4)]
    return nn.Sequential(nn.BatchNorm1d(6), *blocks, nn.Linear(6, 1))


def samples(n: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(4, 6, generator=generator) for _ in range(n)]
    return [(x, x.sum(1, keepdim=True)) for x in inputs]


STILL = partial(torch.optim.SGD, lr=1e-6)


def plant_dead(layer: nn.Module, units: int) -> None:
    """The first ones are never above 0, the others always."""
    with torch.no_grad():
        layer.bias[:units] = -100.0  # type: ignore[operator, index]
        layer.bias[units:] = 10.0  # type: ignore[operator, index]


@pytest.mark.parametrize("policy", [None, CheckpointEvery(1), CheckpointSqrt()])
def test_dead_units_are_told_once_they_were_zero_for_long(
    policy: CheckpointPolicy | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Two batches of 4 in a step: 8 samples after the first, 16 after the second; not after three.

    Activations that are computed again do not count twice.
    """
    model = wide()
    plant_dead(model[2][0], 2)
    watch = LayerWatch(every_steps=1, dead_after_samples=16)
    trainer = Trainer(
        model, F.mse_loss, STILL, callbacks=[watch], console=False,
        gradient_accumulation_steps=2, activation_checkpointing=policy,
    )  # fmt: skip
    with trainer:
        trainer.fit(samples(), max_steps=1)
        assert (watch.rows["2.1"]["dead"], watch.rows["2.1"]["units"]) == (0, 6)
        trainer.fit(samples(), max_steps=3)
    assert watch.rows["2.1"]["dead"] == 2
    (message,) = (m for m in caplog.messages if "2.1 (ReLU)" in m)
    assert "step 2: 2.1 (ReLU): 2 of 6 units were zero for each of the last 16 samples" in message


class Functional(nn.Module):
    """A convolution with a ReLU that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


def test_a_unit_of_a_convolution_is_a_channel_also_where_relu_is_no_module() -> None:
    """3 channels, 5 places; the first channel's bias is far below what can come."""
    model = nn.Sequential(Functional(), nn.Flatten(), nn.Linear(15, 1))
    plant_dead(model[0].conv, 1)
    watch = LayerWatch(every_steps=1, dead_after_samples=2)
    with Trainer(model, F.mse_loss, SGD, callbacks=[watch], console=False) as trainer:
        trainer.fit([(torch.ones(2, 2, 5), torch.zeros(2, 1))], max_steps=1)
    row = watch.rows["0"]
    assert (row["dead"], row["units"]) == (1, 3)
    assert row["zeros"] == pytest.approx(1 / 3)


def test_a_relu_in_place_is_a_module_of_its_own() -> None:
    """It returns the tensor that it is given: -1 and 2 for both samples, and makes 0 of -1."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 1))
    nn.init.zeros_(model[0].weight)
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-1.0, 2.0]))
    watch = LayerWatch(every_steps=1, dead_after_samples=2)
    with Trainer(model, F.mse_loss, SGD, callbacks=[watch], console=False) as trainer:
        trainer.fit([(torch.ones(2, 2), torch.zeros(2, 1))], max_steps=1)
    assert watch.rows["0"]["mean"] == 0.5
    assert watch.rows["1"] == {"mean": 1.0, "std": 1.0, "zeros": 0.5, "dead": 1, "units": 2}
    assert "mean" not in watch.rows.get("the model", {})  # which returns what 2 has returned


class Positive(nn.Module):
    """Before the first convolution, which tells where channels are."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def test_each_microbatch_begins_as_the_first_one() -> None:
    """Of images with 2 channels, 3 wide; after the last layer of a pass units are last."""
    layers = Positive(), nn.Conv2d(2, 1, 1), nn.Flatten(), nn.Linear(9, 1)
    watch = LayerWatch(every_steps=1)
    with Trainer(
        nn.Sequential(*layers), F.mse_loss, SGD, callbacks=[watch], console=False,
        gradient_accumulation_steps=2,
    ) as trainer:  # fmt: skip
        trainer.fit([(torch.ones(1, 2, 3, 3), torch.zeros(1, 1))] * 2, max_steps=1)
    assert watch.rows["0"]["units"] == 2


def test_histograms_are_of_all_units() -> None:
    """64 values of each of 64 columns would be an even share; a row is as long as a stretch."""
    columns = torch.arange(64.0).expand(4096, 64)
    counts = sampled(columns, 4096).long().bincount(minlength=64)
    assert counts.sum() == 4096
    assert 60 <= counts.min() <= counts.max() <= 68
    assert len(sampled(torch.zeros(8191), 4096)) == 4096  # not one of each value
    few = torch.arange(3.0)
    copied = sampled(few, 4)
    few.zero_()
    assert copied.tolist() == [0.0, 1.0, 2.0]


def test_a_tanh_at_its_limits_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Of 3, 0.1 and -4 two are where |tanh| > 0.99, beyond 2.65."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    nn.init.eye_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    watch = LayerWatch(every_steps=1)
    with Trainer(model, F.mse_loss, STILL, callbacks=[watch], console=False) as trainer:
        batch = torch.tensor([[3.0, 0.1, -4.0]]), torch.zeros(1, 1)
        trainer.fit([batch] * 3, max_epochs=1)
    assert watch.rows["1"]["saturated"] == pytest.approx(2 / 3)
    (message,) = (m for m in caplog.messages if "Tanh" in m)
    assert "step 2: 1 (Tanh): 67% of its outputs are within 0.01 of their limits" in message


def facts(**gradients: float) -> list[TensorFacts]:
    """Matrices of one number, 1.0, that are not updated."""
    return [
        TensorFacts(name, 1, True, {"gradient": g**2, "weight": 1.0})
        for name, g in gradients.items()
    ]


def updated(*ratios: float) -> list[TensorFacts]:
    sums = [{"gradient": 1.0, "weight": 4.0, "updated": 4.0, "update": 4 * r**2} for r in ratios]
    return [TensorFacts(f"{i}.weight", 4, True, s) for i, s in enumerate(sums)]


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (updated(1e-3, 1e-3, 0.3), "update/weight of 2.weight is 0.3 (usual: 1e-4 to 1e-2)"),
        (updated(1e-3, 1e-3, 1e-7), "update/weight of 2.weight is 1e-07, but 0.001 in the middle"),
        (facts(a=1.0, b=0.0), "b gets no gradient"),
        # 1e-6, 1e-4, 1e-2, 1: the first is of the first third, the last of the last, 3 layers on.
        (facts(a=1e-6, b=1e-4, c=1e-2, d=1.0), "vanish on their way from the last layers to the"),
        (facts(a=1e-6, b=1e-4, c=1e-2, d=1.0), "a factor of 0.01 a layer"),
        (facts(a=1.0, b=1e-2, c=1e-4, d=1e-6), "explode on their way"),
    ],
)
def test_what_is_wrong_is_told_when_it_was_seen_twice(
    tensors: Sequence[TensorFacts], expected: str
) -> None:
    findings = Findings()
    assert findings.look(tensors, {}, 1) == []
    findings.look(updated(1e-3), {}, 1)  # in order again
    assert findings.look(tensors, {}, 1) == []
    (text,) = findings.look(tensors, {}, 1)
    assert expected in text
    assert findings.look(tensors, {}, 1) == []


def test_what_is_in_order_is_not_told() -> None:
    findings = Findings()
    small = updated(1e-3, 2e-3, 5e-4)
    not_finite = facts(a=math.inf, b=1.0, c=0.5)
    for tensors in (small, not_finite, facts(a=0.0, b=0.0), []) * 4:
        assert findings.look(tensors, {}, 1) == []


def test_a_gradient_is_known_also_out_of_turn() -> None:
    """What was measured of b is its gradient: none, one, and none again, not twice on end."""
    findings = Findings()
    for b in (0.0, 1.0) * 4:
        assert findings.look(facts(a=1.0, b=b), {}, 1) == []
    stuck = updated(1e-3, 1e-3, 0.3)
    assert findings.look(stuck, {}, 1) == []
    waits = [TensorFacts(t.name, 4, True, {"gradient": 1.0, "weight": 4.0}) for t in stuck]
    assert findings.look(waits, {}, 1) == []  # says nothing of its update
    assert "update/weight of 2.weight" in findings.look(stuck, {}, 1)[0]


def test_a_loss_scale_that_falls_and_falls_is_told() -> None:
    """Halved in each step from 2^16: after 11 of them it is 32, after 16 it is 1, its floor."""
    watch = ScaleWatch(floor=1.0, told=set())
    said = {n: list(watch.look({"loss_scale": 2.0 ** (16 - n), "overflows": n})) for n in range(17)}
    assert [n for n, texts in said.items() if texts] == [11, 16]
    assert "overflowed in 11 of the last 11 steps" in said[11][0]
    assert "the loss scale is 32 now" in said[11][0]
    assert "down to 1, the least it may be" in said[16][0]
    calm = ScaleWatch(floor=1.0, told=set())  # 10 in 100 steps, for ever
    for step in range(1000):
        assert not list(calm.look({"loss_scale": 8.0, "overflows": step // 10}))


def test_the_overflows_of_a_run_are_seen_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """From 2^60 down by halves: gradients of about 1 fit into float16 at about 2^15."""
    state: dict[str, Any] | None = None
    for _ in range(2):  # the second goes on from what the first said
        precision = Precision("fp16-mixed", loss_scale=LossScale(initial=2.0**60))
        watch = LayerWatch(every_steps=1000)
        if state is not None:
            watch.load_state_dict(state)
        with Trainer(
            wide(), F.mse_loss, SGD, precision=precision, callbacks=[watch], console=False
        ) as trainer:
            trainer.fit(samples(20), max_epochs=1)
        state = watch.state_dict()
        assert sum("overflowed in 11 of the last" in m for m in caplog.messages) == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16-mixed", "gradient_accumulation_steps": 2},
        {"precision": "bf16-true"},
        {"activation_checkpointing": CheckpointSqrt()},
        {"watch": Watch(on_nonfinite="skip"), "max_grad_norm": 0.1},
        {"strategy": ParameterServer},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_run_has_the_same_bits_with_it_and_without(options: dict[str, Any]) -> None:
    """With dropout and running statistics."""

    def bits(watches: list[LayerWatch]) -> str:
        made = {k: v() if isinstance(v, type) else v for k, v in options.items()}
        model = wide(dropout=0.3)
        with Trainer(model, F.mse_loss, SGD, callbacks=watches, console=False, **made) as trainer:
            trainer.fit(samples(), max_epochs=2)
            buffers = [b.double().sum().item() for b in model.buffers()]
            return f"{trainer.replica.sha256()} {buffers}"

    assert bits([LayerWatch(every_steps=1)]) == bits([])


def of_two(link: Link, strategy: type, watched: bool) -> tuple[str, dict[str, Any]]:
    watch = LayerWatch(every_steps=1)
    with Trainer(
        copy.deepcopy(MODEL), F.mse_loss, SGD, strategy=strategy(), link=link,
        callbacks=[watch] if watched else [], console=False,
    ) as trainer:  # fmt: skip
        trainer.fit(samples(), max_epochs=1)
        return trainer.replica.sha256(), watch.rows


MODEL = wide()


class EverySecond(LocalSGD):
    """Replicas meet after every second step."""

    def __init__(self) -> None:
        super().__init__(sync_every=2)


@pytest.mark.parametrize("strategy", [Sync, EverySecond])
def test_of_several_replicas_the_first_one_tells(strategy: type) -> None:
    (bits, rows), (bits_there, none) = World(2).run(of_two, strategy, True)
    assert rows["5"]["grad_norm"] > 0
    assert none == {}
    assert (bits, bits_there) == tuple(b for b, _ in World(2).run(of_two, strategy, False))


def test_a_resumed_run_goes_on_measuring(tmp_path: Path) -> None:
    """Saved after step 3, of steps 1, 3, 5 are measured; units have been zero for 8, then 12."""

    def fit(folder: str, *ends: int) -> LayerWatch:
        for end in ends:
            model = wide()
            plant_dead(model[2][0], 2)
            watch = LayerWatch(every_steps=2, dead_after_samples=12)
            with Trainer(
                model, F.mse_loss, STILL, callbacks=[watch], console=False, resume="auto",
                run_dir=tmp_path / folder, checkpointing=Checkpointing(every_steps=3),
            ) as trainer:  # fmt: skip
                trainer.fit(samples(), max_steps=end)
        return watch

    whole, parts = fit("whole", 6), fit("parts", 3, 6)
    assert whole.rows == parts.rows
    assert parts.rows["2.1"]["dead"] == 2


def test_a_step_that_was_taken_back_is_not_told(tmp_path: Path) -> None:
    """Step 5 has NaN, and the run goes back to the copy after step 4."""
    given = samples()
    given[4][0][0, 0] = math.nan
    watch = Watch(on_nonfinite="rollback", copy_every=2)
    with Trainer(
        wide(), F.mse_loss, SGD, callbacks=[LayerWatch(every_steps=1)], watch=watch,
        run_dir=tmp_path, console=False,
    ) as trainer:  # fmt: skip
        trainer.fit(given, max_epochs=1)
    lines = map(json.loads, (tmp_path / "metrics-rank0.jsonl").read_text().splitlines())
    assert [r["step"] for r in lines if r["kind"] == "layers"] == [1, 2, 3, 4, 5]


def test_compiled_models_are_told_to_have_no_activations(
    capsys: pytest.CaptureFixture[str],
) -> None:
    watch = LayerWatch(every_steps=1)
    rows_of(watch, compile="eager", console=True)
    assert "activations are not" in capsys.readouterr().err
    assert list(watch.rows["2"]) == ["grad_norm", "weight_norm", "update_ratio"]


def test_no_hook_is_left_on_the_model() -> None:
    model = two_layers()

    class Stop(Exception):
        pass

    def fails(outputs: Tensor, targets: Tensor) -> Tensor:
        raise Stop

    watch = LayerWatch(every_steps=1)
    with pytest.raises(Stop), Trainer(model, fails, SGD, callbacks=[watch], console=False) as t:
        t.fit(BATCHES, max_epochs=1)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_steps": 0}, "layers.every_steps is 0; it is a number >= 1"),
        ({"max_rows": 0}, "layers.max_rows is 0"),
        ({"copy_size": "much"}, "layers.copy_size of 'much' is not understood"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LayerWatch(**options)


def test_a_large_model_has_few_rows() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(9)))
    watch = LayerWatch(every_steps=1, max_rows=12)
    with Trainer(model, F.mse_loss, SGD, callbacks=[watch], console=False) as trainer:
        trainer.fit([(torch.randn(4, 2), torch.zeros(4, 2))], max_steps=1)
    assert list(watch.rows) == [str(i) for i in range(9)]
    assert watch.rows["0"]["units"] == 2
