"""Precisions in the Trainer: equal to loops written by hand, saved, resumed, recorded."""

from __future__ import annotations

import copy
import gc
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaledtrain import Precision, Replica, Trainer
from scaledtrain.data.steps import StepBatch
from scaledtrain.errors import ConfigError
from scaledtrain.faults import FaultInjector
from scaledtrain.loss_scale import LossScale
from scaledtrain.schedule import MicrobatchLoop
from tests.contract.training import (
    ADAMW,
    SGD,
    SaveAt,
    batches,
    flat,
    net,
    plain_training,
    trainer,
)

EVERY = [
    Precision("fp32"),
    Precision("bf16-mixed"),
    Precision("fp16-mixed"),
    Precision("bf16-true"),
    Precision("bf16-true", "kahan"),
    Precision("bf16-true", "master"),
    Precision("bf16-true", "nearest"),
    Precision("fp16-true"),
    Precision("fp16-true", "kahan"),
]
every_precision = pytest.mark.parametrize("precision", EVERY, ids=str)
every_optimizer = pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_mixed_is_plain_autocast(dtype: torch.dtype, optimizer: Any) -> None:
    """For float16 with torch's own scaler, and with steps that overflow; all bit for bit."""
    loader = batches(16)
    for accumulation, clip in [(1, None), (1, 0.1), (4, None)]:
        scaler, precision = None, Precision("bf16-mixed")
        if dtype is torch.float16:
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
            scale = LossScale(initial=2.0**20, growth_interval=3)
            precision = Precision("fp16-mixed", loss_scale=scale)
        t = trainer(
            optimizer=optimizer,
            precision=precision,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=clip,
        )
        t.fit(loader, max_epochs=8)
        plain = plain_training(
            loader,
            optimizer,
            epochs=8,
            accumulation=accumulation,
            clip=clip,
            autocast=dtype,
            scaler=scaler,
        )
        assert torch.equal(flat(t.model), plain)
        if scaler is not None:
            assert t.scaler.overflows > 1
            assert t.scaler.metrics()["loss_scale"] == scaler.get_scale()


@every_optimizer
def test_bf16_true_to_the_nearest_is_torch_as_it_is(optimizer: Any) -> None:
    t = trainer(optimizer=optimizer, precision=Precision("bf16-true", "nearest"))
    t.fit(batches(20), max_epochs=3)
    model = net().bfloat16()
    plain = optimizer(model.parameters())
    for _ in range(3):
        for x, y in batches(20):
            F.cross_entropy(model(x.bfloat16()).float(), y).backward()
            plain.step()
            plain.zero_grad()
    assert torch.equal(flat(t.model), flat(model))


@every_optimizer
def test_master_weights_are_those_of_a_loop_by_hand(optimizer: Any) -> None:
    t = trainer(optimizer=optimizer, precision=Precision("bf16-true", "master"))
    t.fit(batches(20), max_epochs=3)
    model = net().bfloat16()
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    plain = optimizer(masters)
    for _ in range(3):
        for x, y in batches(20):
            F.cross_entropy(model(x.bfloat16()).float(), y).backward()
            for master, p in zip(masters, model.parameters(), strict=True):
                master.grad, p.grad = p.grad.float(), None
            plain.step()
            with torch.no_grad():
                for master, p in zip(masters, model.parameters(), strict=True):
                    p.copy_(master)
    assert torch.equal(flat(t.model), flat(model))


@every_precision
def test_saved_inside_a_run_and_resumed_is_not_stopping(precision: Precision) -> None:
    """fp16 overflows before the 7th step and grows after it; rounding has drawn numbers."""
    if precision.loss_scale is None and precision.name.startswith("fp16"):
        options = LossScale(initial=2.0**18, growth_interval=4)
        precision = Precision(precision.name, precision.update, options)
    straight = resumed_is_not_stopping(precision, ADAMW)
    assert (straight.scaler.overflows > 0) == precision.name.startswith("fp16")


@pytest.mark.parametrize(
    "precision",
    [p for p in EVERY if p.name.endswith("true") and p.update != "nearest"],
    ids=str,
)
@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.Adafactor, lr=0.01),  # keeps means of rows and columns
        partial(torch.optim.NAdam, lr=0.01),  # and numbers beside tensors
        partial(torch.optim.ASGD, lr=0.01, t0=3),
    ],
    ids=lambda optimizer: optimizer.func.__name__,
)
def test_state_of_any_shape_is_resumed_with_all_its_bits(
    optimizer: Any, precision: Precision
) -> None:
    resumed_is_not_stopping(precision, optimizer)


def resumed_is_not_stopping(precision: Precision, optimizer: Any) -> Trainer:
    save = SaveAt(7)
    straight = trainer(precision=precision, optimizer=optimizer, callbacks=[save])
    straight.fit(batches(20), max_epochs=4)
    resumed = trainer(precision=precision, optimizer=optimizer)
    resumed.load_state_dict(save.state)
    resumed.fit(batches(20), max_epochs=4)
    assert torch.equal(flat(resumed.model), flat(straight.model))
    assert resumed.scaler.state_dict() == straight.scaler.state_dict()
    states = [resumed.state_dict(), straight.state_dict()]
    for state in states:
        del state["metrics"]  # the time that it took
        del state["callbacks"]  # one run has another than the other
    assert_same_state(*states)
    return straight


def assert_same_state(got: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_state(got[key], value)
    elif isinstance(expected, list):
        for one, other in zip(got, expected, strict=True):
            assert_same_state(one, other)
    elif isinstance(expected, np.ndarray):
        assert np.array_equal(got, expected)
    elif isinstance(expected, tuple):
        for one, other in zip(got, expected, strict=True):
            assert_same_state(one, other)
    elif isinstance(expected, Tensor):
        assert got.dtype is expected.dtype
        assert torch.equal(got, expected)
    else:
        assert got == expected


@every_precision
def test_recorded_loss_is_the_unscaled_one(precision: Precision, tmp_path: Path) -> None:
    """ln 2 of two classes at weights of zero, which no format rounds to another 3 digits."""
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    with Trainer(
        model,
        F.cross_entropy,
        partial(torch.optim.SGD, lr=0.0),
        precision=precision,
        run_dir=tmp_path,
        log_every=1,
        console=False,
        callbacks=[FaultInjector().nan_at(rank=0, step=2)],
    ) as t:
        t.fit(batches(4), max_steps=1)
        scaled = precision.name.startswith("fp16")
        if scaled:
            assert t.step_count == 1
            t.fit(batches(4), max_steps=3)
    first, *others = (
        json.loads(line)
        for line in (tmp_path / "metrics-rank0.jsonl").read_text(encoding="utf-8").splitlines()
    )
    assert first["loss"] == pytest.approx(0.693, abs=1e-3)
    assert 0.1 < first["grad_norm"] < 1.0
    assert ("loss_scale" in first) == scaled
    if scaled:
        assert (first["loss_scale"], first["overflows"]) == (65536.0, 0)
        overflow, clean = others
        assert (overflow["loss_scale"], overflow["overflows"]) == (32768.0, 1)
        assert "grad_norm" not in overflow
        assert (clean["step"], clean["overflows"]) == (3, 1)


def test_a_model_of_16_bits_takes_and_returns_float32() -> None:
    model = Precision("bf16-true").convert(net())
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16, torch.int64}
    assert model(torch.ones(4, 3)).dtype is torch.float32
    assert copy.deepcopy(model)(torch.ones(4, 3, dtype=torch.float64)).dtype is torch.float32


class OwnLoss(nn.Module):
    """As a model of Hugging Face."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, *, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        assert inputs.dtype is self.linear.weight.dtype
        assert labels.dtype is torch.int64
        outputs = self.linear(inputs).squeeze(1)
        return {"loss": ((outputs - labels) ** 2).mean()}


@every_precision
def test_a_model_with_its_own_loss(precision: Precision) -> None:
    model = OwnLoss()
    t = Trainer(model, None, partial(torch.optim.SGD, lr=0.1), precision=precision, console=False)
    batch = {"inputs": torch.eye(2).repeat(4, 1), "labels": torch.tensor([1, 3] * 4)}
    t.fit([batch], max_epochs=100)
    assert t.evaluate([batch])["loss"] < 0.01


def tensor_bytes() -> int:
    """Of all tensors that are alive in this process."""
    gc.collect()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided
    }
    return sum(storages.values())


def test_autocast_is_of_the_device_that_computes() -> None:
    """Of shards that wait in the host's memory the device is another one; here it is none."""
    shard, weight = nn.Parameter(torch.ones(1, device="meta")), torch.ones(2, 2, requires_grad=True)
    computed: list[torch.dtype] = []

    def model(x: Tensor) -> Tensor:
        product = x @ weight
        computed.append(product.dtype)
        return product.float().mean()

    loop = MicrobatchLoop(model, None, Precision("bf16-mixed"), [shard], device=torch.device("cpu"))
    batch = StepBatch([torch.ones(2, 2)], [2])
    loop.run(batch)
    assert loop.predict(batch)[1].item() == 2.0  # each product is 1 + 1
    loop.outputs(torch.ones(2, 2))
    assert computed == [torch.bfloat16] * 3


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        # parameter, gradient, two means of AdamW, and what the rounding keeps
        (Precision("fp32"), 4 + 4 + 8),
        (Precision("bf16-mixed"), 4 + 4 + 8),
        (Precision("fp16-mixed"), 4 + 4 + 8),
        (Precision("bf16-true"), 2 + 2 + 4),
        (Precision("bf16-true", "kahan"), 2 + 2 + 4 + 2),
        (Precision("bf16-true", "master"), 2 + 2 + 8 + 4),
        (Precision("bf16-true", "nearest"), 2 + 2 + 4),
        (Precision("fp16-true"), 2 + 4 + 8 + 4),
        (Precision("fp16-true", "kahan"), 2 + 4 + 8 + 2),
    ],
    ids=str,
)
def test_bytes_of_a_parameter(precision: Precision, expected: int) -> None:
    """Measured between steps; beside them there are a few bytes for each tensor."""
    before = tensor_bytes()
    model = precision.convert(nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(4))))
    adamw = partial(torch.optim.AdamW, lr=1e-3)
    replica = Replica(model, adamw, None, partial(precision.rounding, 0))
    scaler, updater = precision.scaler(replica), replica.updater()
    with precision.autocast(replica.device):
        loss = model(torch.ones(1, 128)).mean()
    scaler.backward(loss)
    updater.step()
    measured = (tensor_bytes() - before) / (4 * 128 * 128)
    assert measured == pytest.approx(expected, abs=0.03)


def test_norm_of_narrow_gradients_is_wide() -> None:
    """sqrt(2) 60000 is no number of float16, whose largest is 65504."""
    model = nn.Linear(2, 1, bias=False, dtype=torch.float16)
    replica = Replica(model, SGD)
    model.weight.grad = torch.full_like(model.weight, 60000.0)
    assert replica.gradient_norm().item() == pytest.approx(2**0.5 * 60000)
    assert replica.clip_gradients(1.0).item() == pytest.approx(2**0.5 * 60000)
    torch.testing.assert_close(
        model.weight.grad, torch.full((1, 2), 0.5**0.5).half(), rtol=1e-3, atol=0.0
    )


def test_float32_matmul_is_torchs_setting() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        Precision(float32_matmul="medium").convert(nn.Linear(1, 1))
        assert torch.get_float32_matmul_precision() == "medium"
        Precision().convert(nn.Linear(1, 1))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": "bf16_mixed"}, "did you mean 'bf16-mixed'"),
        ({"name": "fp32", "update": "kahan"}, "fp32 has no update 'kahan'; its parameters are"),
        ({"name": "fp16-true", "update": "stochastic"}, "it can be: 'master', 'kahan'"),
        ({"name": "bf16-true", "loss_scale": LossScale()}, "bf16-true scales no loss"),
        ({"float32_matmul": "tf32"}, "'tf32'; it can be: 'highest', 'high', 'medium'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_what_cannot_be_is_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Precision(**options)


def test_mixed_precision_wants_wide_parameters() -> None:
    with pytest.raises(ConfigError, match=r"0\.weight is torch.bfloat16; call model.float\(\)"):
        trainer_of = nn.Sequential(nn.Linear(1, 1, dtype=torch.bfloat16))
        Precision("bf16-mixed").convert(trainer_of)
