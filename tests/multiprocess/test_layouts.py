"""A replica laid out over ranks computes what a replica on one rank does.

The composition matrix: layouts, with and without recomputation, in float32 and bf16-mixed, under
four strategies, on 2 x 2 ranks, against two plain ranks with the same data; of two layouts that are
much like others half of it. A pipeline adds
up microbatches as gradient accumulation does, shards in another order, so that float32 agrees to
rounding; bfloat16 rounds each of those sums to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import DiLoCo, LocalSGD, Mesh, ParameterServer, Strategy, Sync, Trainer, connect
from scaledtrain.comm.protocols import Link
from scaledtrain.models import GPT
from scaledtrain.models.gpt import next_token_loss
from scaledtrain.parallel import FullyShard, Pipeline
from scaledtrain.recompute import CheckpointEvery
from scaledtrain.server import Synchronous
from tests.ranks import run_ranks

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "sync": Sync,
    "local_sgd": lambda: LocalSGD(sync_every=3),  # an epoch of two steps ends within a period
    "diloco": lambda: DiLoCo(sync_every=3),
    "server": lambda: ParameterServer(Synchronous()),
}
PRECISIONS = ["fp32", "bf16-mixed"]
TOLERANCES = {"fp32": 1e-5, "bf16-mixed": 1e-2}
MATRIX = list(product(STRATEGIES, [False, True], PRECISIONS))
# Each strategy once with and once without recomputation, once in each precision.
HALF = [c for c in MATRIX if c[1] == ((c[2] == "fp32") == (c[0] in ("sync", "diloco")))]


class Layout(NamedTuple):
    mesh: Mesh
    options: Mapping[str, Any] = {}
    cases: Sequence[tuple[str, bool, str]] = MATRIX


LAYOUTS = {
    "shard": Layout(Mesh(shard=2)),
    "gathered once": Layout(
        Mesh(shard=2), {"engine": FullyShard(reshard_after_forward=False)}, HALF
    ),
    "GPipe": Layout(Mesh(pipe=2), {"pipeline": Pipeline("GPipe", n_microbatches=4)}),
    "1F1B": Layout(Mesh(pipe=2), {"pipeline": Pipeline("1F1B", n_microbatches=4)}),
    "interleaved": Layout(Mesh(pipe=2), {"pipeline": Pipeline("Interleaved1F1B", 4)}),
    "zero bubble": Layout(Mesh(pipe=2), {"pipeline": Pipeline("ZBVZeroBubble", 4)}, HALF),
}


class Trained(NamedTuple):
    parameters: dict[str, Tensor]
    loss: float | None
    """Of the evaluation, where there is one."""
    step: int
    norm: float


def net(tied: bool = True) -> nn.Module:
    torch.manual_seed(1)
    sizes = {"vocab_size": 11, "sequence_length": 6, "n_layers": 3, "n_heads": 2, "d_model": 10}
    return GPT(**sizes, tied_embedding=tied)


def data(n: int) -> TensorDataset:
    tokens = torch.randint(11, (n, 7), generator=torch.Generator().manual_seed(2))
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


def train(
    link: Link, strategy: str, recompute: bool, precision: Any, layout: Layout, shards: int
) -> Trained:
    """On batches of four samples for each replica, or as many of one for each of its shards."""
    if strategy == "server":  # in step with no other, a replica takes every other batch
        local, accumulation, n = 2, 2 // shards, 16
    else:  # 14 samples: steps of 8 and 6, in the second of which one of four ranks has none
        local, accumulation, n = 4 // shards, 1, 14
    trainer = Trainer(
        net(),
        next_token_loss,
        SGD,
        strategy=STRATEGIES[strategy](),
        mesh=layout.mesh,
        precision=precision,
        activation_checkpointing=CheckpointEvery(1) if recompute else None,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.5,
        console=False,
        log_every=1,
        link=link,
        **layout.options,
    )
    loader = DataLoader(data(n), batch_size=local, shuffle=True)
    result = trainer.fit(loader, max_epochs=2, eval=DataLoader(data(9), batch_size=2))
    parameters = {
        name: getattr(value, "full_tensor", lambda value=value: value)().clone()
        for name, value in trainer.model.state_dict().items()
    }
    norm = float(trainer.replica.gradient_norm())
    return Trained(parameters, result.evaluation.get("loss"), result.step, norm)


def train_all(layout: Layout, shards: int) -> list[Trained]:
    with connect(transport="torch", timeout_seconds=60) as link:
        return [train(link, *case, layout, shards) for case in layout.cases]


@lru_cache(maxsize=1)
def plain() -> list[list[Trained]]:
    return run_ranks(train_all, 2, Layout(Mesh()), 1, timeout_seconds=170)


def compared(
    cases: Sequence[tuple[str, bool, str]], found: list[list[Trained]]
) -> Iterator[tuple[str, Trained, Trained]]:
    for rank, of_rank in enumerate(found):
        expected = dict(zip(MATRIX, plain()[rank // 2], strict=True))
        for case, got in zip(cases, of_rank, strict=True):
            yield case[2], got, expected[case]


@pytest.mark.timeout(360)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_replica_on_two_ranks_computes_what_one_on_one_rank_does(name: str) -> None:
    layout = LAYOUTS[name]
    found = run_ranks(train_all, 4, layout, layout.mesh.shard, timeout_seconds=170)
    names: set[str] = set()
    for precision, got, expected in compared(layout.cases, found):
        tolerance = TOLERANCES[precision]
        names |= got.parameters.keys()
        for key, value in got.parameters.items():
            torch.testing.assert_close(
                value, expected.parameters[key], atol=tolerance, rtol=0.0, msg=key
            )
        assert got.step == expected.step == 4
        assert got.norm == pytest.approx(expected.norm, rel=10 * tolerance)
        assert got.loss == (expected.loss and pytest.approx(expected.loss, abs=tolerance))
    assert names == plain()[0][0].parameters.keys()


def train_both(mesh: Mesh, options: Mapping[str, Any], local: int) -> Trained:
    """A model without tied weights, which could not be shared by stages that are sharded."""
    with connect(transport="torch", timeout_seconds=60) as link:
        trainer = Trainer(
            net(tied=False),
            next_token_loss,
            SGD,
            mesh=mesh,
            max_grad_norm=0.5,
            console=False,
            log_every=1,
            link=link,
            **options,
        )
        loader = DataLoader(data(21), batch_size=local, shuffle=True)
        result = trainer.fit(loader, max_epochs=2, eval=DataLoader(data(9), batch_size=2))
        shards = trainer.layout.named_parameters()
        parameters = {name: p.detach().clone() for name, p in shards}
        norm = float(trainer.replica.gradient_norm())
        return Trained(parameters, result.evaluation.get("loss"), result.step, norm)


def test_stages_that_are_sharded_compute_what_the_whole_does() -> None:
    """21 samples: two steps of 8 and one of 5, two times, by one rank or by 2 x 2 with half of each
    step's samples for each shard; of the last one's 5 the first has 4, and the second one, that
    cannot be cut into two microbatches."""
    (expected,) = run_ranks(train_both, 1, Mesh(), {}, 8, timeout_seconds=100)
    options = {"pipeline": Pipeline("1F1B", n_microbatches=2)}
    found = run_ranks(train_both, 4, Mesh(pipe=2, shard=2), options, 4, timeout_seconds=100)
    assert {got.step for got in found} == {expected.step} == {6}
    for got in found:
        assert got.norm == pytest.approx(expected.norm, rel=1e-4)
        assert got.loss == pytest.approx(expected.loss, abs=1e-5)
    for stage in (found[:2], found[2:]):  # ranks 0 and 1 have the first stage, 2 and 3 the second
        for name in stage[0].parameters:
            whole = torch.cat([shard.parameters[name] for shard in stage])
            torch.testing.assert_close(whole, expected.parameters[name], atol=1e-5, rtol=0.0)


def train_late(options: Mapping[str, Any], mesh: Mesh) -> Trained:
    with connect(transport="torch", timeout_seconds=60) as link:
        trainer = Trainer(
            nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)),
            nn.functional.mse_loss,
            partial(torch.optim.SGD, lr=0.1),
            mesh=mesh,
            console=False,
            link=link,
            **options,
        )
        with torch.no_grad():
            for parameter in trainer.replica.parameters:
                parameter.fill_(1.0)
        x = torch.ones(1, 1)
        result = trainer.fit([(x, 2 * x)] * 3, max_epochs=1)
        parameters = {name: p.detach().clone() for name, p in trainer.layout.named_parameters()}
        return Trained(parameters, None, result.step, 0.0)


def test_an_asynchronous_pipeline_updates_with_late_gradients_and_drains_at_the_end() -> None:
    r"""Loss (a b - 2)^2 of stages a = b = 1; PipeDream with one microbatch in a step: stage 0 is
    late by one update, stage 1 by none. Gradients: da = 2 b (a b - 2), db = 2 a (a b - 2), of the a
    and b with which the batch went forward; lr 0.1.

    | batch | a    | b      | a b - 2 | da      | db      | a after      | b after |
    |-------|------|--------|---------|---------|---------|--------------|---------|
    | 0     | 1    | 1      | -1      | -2      | -2      | 1 (none yet) | 1.2     |
    | 1     | 1    | 1.2    | -0.8    | -1.92   | -1.6    | 1 + 0.2      | 1.36    |
    | 2     | 1.2  | 1.36   | -0.368  | -1.00096| -0.8832 | 1.2 + 0.192  | 1.44832 |

    and, drained, a = 1.392 + 0.100096.
    """
    options = {"pipeline": Pipeline("PipeDream", n_microbatches=1)}
    first, last = run_ranks(train_late, 2, options, Mesh(pipe=2), timeout_seconds=100)
    assert first.step == last.step == 3
    assert first.parameters["0.weight"].item() == pytest.approx(1.492096, abs=1e-6)
    assert last.parameters["1.weight"].item() == pytest.approx(1.44832, abs=1e-6)


def train_unevenly(mesh: Mesh, batches: list[list[float]]) -> dict[str, float]:
    with connect(transport="torch", timeout_seconds=30) as link:
        torch.manual_seed(0)
        trainer = Trainer(
            nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)),
            nn.functional.mse_loss,
            partial(torch.optim.SGD, lr=0.1),
            mesh=mesh,
            pipeline=Pipeline("PipeDream", n_microbatches=1),
            console=False,
            link=link,
        )
        given = [torch.tensor(batch).unsqueeze(1) for batch in batches]
        trainer.fit([(x, 2 * x) for x in given], max_epochs=2)
        return {name: p.item() for name, p in trainer.layout.named_parameters()}


def test_late_gradients_of_replicas_count_with_the_weight_of_their_own_batch() -> None:
    """Three batches for two replicas: the second has none in the last step, which a pipeline that
    has the whole steps sees as one of two samples and one of one."""
    alone = run_ranks(train_unevenly, 2, Mesh(pipe=2), [[1.0, 0.5], [2.0]], timeout_seconds=60)
    each = [[1.0], [0.5], [2.0]]
    found = run_ranks(train_unevenly, 4, Mesh(replicate=2, pipe=2), each, timeout_seconds=60)
    for rank, parameters in enumerate(found):
        assert parameters == pytest.approx(alone[rank % 2], abs=1e-6)


def train_locally() -> float:
    with connect(transport="torch", timeout_seconds=30) as link:
        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        for parameter in model.parameters():
            nn.init.ones_(parameter)
        trainer = Trainer(
            model,
            nn.functional.mse_loss,
            partial(torch.optim.SGD, lr=0.1),
            strategy=LocalSGD(sync_every=1),
            mesh=Mesh(replicate=2, pipe=2),
            pipeline=Pipeline("PipeDream", n_microbatches=1),
            console=False,
            link=link,
        )
        x = [torch.full((1, 1), 1.0), torch.full((1, 1), 0.5)]  # of each replica one
        trainer.fit([(each, 2 * each) for each in x], max_steps=1)
        (parameter,) = trainer.replica.parameters
        return parameter.item()


def test_replicas_are_equal_in_the_end_also_by_updates_after_the_last_period() -> None:
    """Loss x^2 (a b - 2)^2, a = b = 1: da = db = -2 x^2, which makes 1.2 where x = 1 and 1.05 where
    it is 0.5, 1.125 on average. Stage 1 has its gradient in the step, which ends a period; stage 0
    only when the pipeline is drained."""
    found = run_ranks(train_locally, 4, timeout_seconds=60)
    assert found == pytest.approx([1.125] * 4, abs=1e-6)
