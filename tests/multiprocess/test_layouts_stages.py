"""What a Trainer offers whose model is in stages: the whole of it, its outputs, equal copies."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import Callback, Mesh, ParameterServer, Sync, Trainer, connect
from scaledtrain.comm.compress import PowerSGD, TopK
from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ConfigError
from scaledtrain.models import GPT
from scaledtrain.models.gpt import next_token_loss
from scaledtrain.parallel import Pipeline
from scaledtrain.strategies import Gossip, PushSum
from tests.ranks import run_ranks

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
TOKENS = torch.randint(11, (16, 7), generator=torch.Generator().manual_seed(2))
TIED = "token_embedding.weight"


def net(tied: bool = True) -> nn.Module:
    torch.manual_seed(1)
    sizes = {"vocab_size": 11, "sequence_length": 6, "n_layers": 3, "n_heads": 2, "d_model": 10}
    return GPT(**sizes, tied_embedding=tied)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(TOKENS[:, :-1], TOKENS[:, 1:]), batch_size=4)


class Offered(NamedTuple):
    own: dict[str, Tensor]
    whole: dict[str, Tensor]
    predicted: list[Tensor]
    predicted_pairs: list[Tensor]


def offered(link: Link, mesh: Mesh, tied: bool, schedule: str, **options: Any) -> Offered:
    with Trainer(
        net(tied),
        next_token_loss,
        SGD,
        mesh=mesh,
        pipeline=Pipeline(schedule, n_microbatches=2),
        console=False,
        link=link,
        **options,
    ) as trainer:
        trainer.fit(loader(), max_epochs=1)
        inputs = [TOKENS[:5, :-1], TOKENS[5:6, :-1]]
        predicted, pairs = trainer.predict(inputs), trainer.predict(loader())
        own = trainer.state_dict()["model"]
        return Offered(own, trainer.full_state_dict(), predicted, pairs)


def offered_by_all() -> list[Offered]:
    with connect(transport="torch", timeout_seconds=60) as link:
        return [
            offered(link, Mesh(pipe=2), True, "1F1B", precision="bf16-mixed"),
            offered(link, Mesh(pipe=2), True, "ZBVZeroBubble"),
            offered(link, Mesh(pipe=2), True, "1F1B", strategy=Sync(compression=TopK(0.2))),
            offered(link, Mesh(pipe=2), True, "GPipe", strategy=Sync(compression=PowerSGD(1))),
            offered(link, Mesh(pipe=2), True, "1F1B", strategy=Gossip()),
            offered(link, Mesh(pipe=2), True, "1F1B", strategy=PushSum()),
            offered(link, Mesh(pipe=2, shard=2), False, "Interleaved1F1B"),
        ]


def test_the_whole_model_and_its_outputs_come_out_of_stages() -> None:
    found = run_ranks(offered_by_all, 4, timeout_seconds=120)
    # Of 4 ranks the first and the third begin a replica; sharded, they are one replica.
    firsts = [(0, 2)] * 6 + [(0,)]
    lasts = [(1, 3), (0, 2), *[(1, 3)] * 4, (2, 3)]  # who has the last stage
    for case, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
        of_ranks = [of_rank[case] for of_rank in found]
        model = net(tied=case < 6).eval()
        assert list(of_ranks[0].whole) == list(model.state_dict())
        model.load_state_dict(of_ranks[0].whole)
        with torch.no_grad():
            expected = model(TOKENS[:, :-1])
        tolerance = 2e-2 if case == 0 else 1e-6
        for rank, got in enumerate(of_ranks):
            assert bool(got.whole) == (rank in first)
            assert bool(got.predicted) == bool(got.predicted_pairs) == (rank in last)
            if rank in last:
                assert [len(outputs) for outputs in got.predicted] == [5, 1]
                assert [len(outputs) for outputs in got.predicted_pairs] == [4, 4, 4, 4]
                for outputs, inputs in (
                    (got.predicted, slice(6)),
                    (got.predicted_pairs, slice(16)),
                ):
                    torch.testing.assert_close(
                        torch.cat(outputs).float(), expected[inputs], atol=tolerance, rtol=0.0
                    )
            if case < 6:  # plain tensors: the same bits in every copy, tied ones included
                for name, value in got.own.items():
                    assert torch.equal(value, of_ranks[0].whole[name]), (case, rank, name)


class Seen(Callback):
    """After each step: the first parameter, and the learning rate."""

    def __init__(self) -> None:
        self.values: list[tuple[float, float]] = []

    def on_step_end(self, trainer: Trainer) -> None:
        (parameter,) = trainer.replica.parameters
        self.values.append((parameter.item(), trainer.strategy.learning_rate))


def chain() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    return model


def late(run_dir: Any) -> tuple[list[tuple[float, float]], list[str]]:
    refused = []
    with connect(transport="torch", timeout_seconds=60) as link:
        seen = Seen()
        make = partial(
            Trainer, loss_fn=nn.functional.mse_loss, mesh=Mesh(pipe=2), console=True, link=link
        )
        asynchronous = Pipeline("PipeDream", n_microbatches=1)
        told = io.StringIO()
        with (
            redirect_stderr(told),
            make(
                chain(),
                optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=0.5),
                lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
                pipeline=asynchronous,
                callbacks=[seen],
                run_dir=run_dir,
                log_every=1,
            ) as trainer,
        ):
            x = torch.ones(1, 1)
            trainer.fit([(x, 2 * x)] * 2, max_epochs=1)
        frozen = chain()
        frozen[0].requires_grad_(False)
        sgd = partial(torch.optim.SGD, lr=0.1)
        for model, options in (
            (chain(), {"pipeline": asynchronous, "strategy": ParameterServer()}),
            (frozen, {}),
        ):
            with pytest.raises(ConfigError) as caught:
                make(model, optimizer=sgd, **options)
            refused.append(str(caught.value))
        if link.group.rank == 0:
            assert "scaledtrain: Sequential, 2 trainable parameters; 1 replica" in told.getvalue()
    return seen.values, refused


def test_no_update_is_made_before_a_gradient_has_come(tmp_path: Any) -> None:
    """Loss (a b - 2)^2, a = b = 1, gradients -2: stage 0 has none in its first step, in which its
    weight does not decay and its schedule does not go on; stage 1 has one in each.

    a: 1, then 1 - 0.1 (-2 + 0.5 x 1) = 1.15, and the learning rate is halved once;
    b: 1.15; then of a = 1, b = 1.15: db = 2 (1.15 - 2) = -1.7, b = 1.15 - 0.05 (-1.7 + 0.575).
    """
    (first, refused), (last, also) = run_ranks(late, 2, tmp_path, timeout_seconds=100)
    assert first == [pytest.approx((1.0, 0.1)), pytest.approx((1.15, 0.05))]
    assert last == [pytest.approx((1.15, 0.05)), pytest.approx((1.20625, 0.025))]
    assert refused == also
    assert "stages have the gradient of a batch some steps later" in refused[0]
    assert "rank 0 of the pipeline would have nothing to train: none of its parts (0)" in refused[1]


def masked_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def unmasked(batch: Any) -> int:
    return int((batch[1] != -100).sum())


def train_masked(mesh: Mesh, schedules: list[str]) -> list[tuple[dict[str, Tensor], float]]:
    """A step on 8 sequences of which 1, 2, 3, 4, 5, 1, 2 and 3 tokens have a target."""
    inputs = torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(4))
    targets = torch.arange(40).reshape(8, 5) % 4
    for i in range(8):
        targets[i, 1 + i % 5 :] = -100
    found = []
    with connect(transport="torch", timeout_seconds=60) as link:
        for schedule in schedules:
            torch.manual_seed(0)
            with Trainer(
                nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)),
                masked_loss,
                partial(torch.optim.SGD, lr=0.5),
                loss_weight=unmasked,
                mesh=mesh,
                pipeline=Pipeline(schedule, n_microbatches=4) if mesh.pipe > 1 else None,
                console=False,
                link=link,
            ) as trainer:
                trainer.fit([(inputs, targets)], max_epochs=1)
                evaluated = trainer.evaluate([(inputs[:3], targets[:3]), (inputs[3:], targets[3:])])
                found.append((trainer.full_state_dict(), evaluated["loss"]))
    return found


def test_microbatches_count_by_the_terms_of_their_loss() -> None:
    """Microbatches of two sequences have 3, 7, 6 and 5 tokens of 21; their losses are means. An
    asynchronous pipeline has after one step, drained, computed with the first weights, too."""
    [[(expected, loss)]] = run_ranks(train_masked, 1, Mesh(), ["none"], timeout_seconds=60)
    schedules = ["1F1B", "PipeDream"]
    first, last = run_ranks(train_masked, 2, Mesh(pipe=2), schedules, timeout_seconds=60)
    for (found, evaluated), (_, also) in zip(first, last, strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        assert evaluated == also == pytest.approx(loss, rel=1e-5)
