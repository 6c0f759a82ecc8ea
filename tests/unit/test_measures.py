"""Metrics with a state on several ranks: scikit-learn's values, no sample twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from sklearn import metrics as reference
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef, R2Score
from torchmetrics.retrieval import RetrievalMAP
from torchmetrics.text import Perplexity

from scaledtrain import Trainer
from scaledtrain.comm.protocols import Link
from scaledtrain.command_line import compose
from scaledtrain.config import check
from scaledtrain.connection import connect
from scaledtrain.errors import ConfigError
from scaledtrain.measures import Measures, gather_unequal
from scaledtrain.models import next_token_loss
from scaledtrain.sim import Cluster, Constant, Topology, Wire, simulate
from scaledtrain.tasks import accuracy
from scaledtrain.train import run

FREE = Topology(ranks_per_host=8, hosts=1, port=Wire(0.0, gigabits_per_second=math.inf))


def on_ranks(size: int, program: Callable[[Link], Any]) -> list[Any]:
    return simulate(program, Cluster(Constant(1.0), FREE), size, own_generators=False).results


def measured(
    size: int, make: Callable[[], Mapping[str, Any]], batches: Any, loss: Any = F.cross_entropy
) -> list[dict[str, Tensor]]:
    """What each rank says of a model that gives its inputs back."""

    def program(link: Link) -> dict[str, Tensor]:
        trainer = Trainer(
            Same(),
            loss,
            partial(torch.optim.SGD, lr=0.0),
            console=False,
            link=link,
        )
        return trainer.measure(batches, make())

    return on_ranks(size, program)


class Same(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x


def cut(x: Tensor, y: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


# Two batches for 3 ranks: the last has none; or five, of which the last is of one sample.
UNEVEN = [[20, 17], [12, 12, 7, 5, 1], [37]]


@pytest.mark.parametrize("sizes", UNEVEN, ids=str)
def test_classes_on_three_ranks_are_as_scikit_learn_says(sizes: list[int]) -> None:
    torch.manual_seed(0)
    logits, labels = torch.rand(37, 4) / 2, torch.arange(37) % 4  # all logits in [0, 1]

    def make() -> dict[str, Any]:
        return {
            "f1": MulticlassF1Score(4, average="macro"),
            "auroc": MulticlassAUROC(4),
            "matrix": MulticlassConfusionMatrix(4),
            "batchwise": accuracy,
        }

    probabilities, answers = logits.softmax(1).numpy(), logits.argmax(1)
    for found in measured(3, make, cut(logits, labels, sizes)):
        assert list(found) == ["loss", "f1", "auroc", "matrix", "batchwise"]
        assert found["loss"].item() == pytest.approx(F.cross_entropy(logits, labels).item())
        expected = reference.f1_score(labels.numpy(), answers.numpy(), average="macro")
        assert found["f1"].item() == pytest.approx(expected, rel=1e-6)
        expected = reference.roc_auc_score(labels.numpy(), probabilities, multi_class="ovr")
        assert found["auroc"].item() == pytest.approx(expected, rel=1e-6)
        expected = reference.confusion_matrix(labels.numpy(), answers.numpy())
        assert found["matrix"].tolist() == expected.tolist()
        assert found["batchwise"].item() == (answers == labels).double().mean().item()


def test_a_batch_that_counts_nothing_is_in_no_metric() -> None:
    """As one that a rank computes with only because others, who share its model, have one."""
    measures = Measures(
        {"mse": MeanSquaredError(), "error": lambda x, y: (x - y).abs().mean()}, torch.device("cpu")
    )
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 5.0])
    measures.add(torch.tensor(5.0), x, y, 2)
    measures.add(torch.tensor(math.nan), x + 9, y, 0)
    found = {name: value.item() for name, value in measures.values([]).items()}
    assert found == {"loss": 5.0, "mse": 5.0, "error": 2.0}  # (1 + 9) / 2, (1 + 3) / 2


@pytest.mark.parametrize("sizes", UNEVEN, ids=str)
def test_numbers_on_three_ranks_are_as_scikit_learn_says(sizes: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(37, 1)
    y = x + torch.randn(37, 1)

    def make() -> dict[str, Any]:
        return {"mse": MeanSquaredError(), "r2": R2Score(), "pearson": PearsonCorrCoef()}

    for found in measured(3, make, cut(x, y, sizes), F.mse_loss):
        assert found["mse"].item() == pytest.approx(found["loss"].item(), rel=1e-5)
        assert found["r2"].item() == pytest.approx(
            reference.r2_score(y.numpy(), x.numpy()), rel=1e-5
        )
        expected = torch.corrcoef(torch.cat([x, y], 1).T)[0, 1].item()
        assert found["pearson"].item() == pytest.approx(expected, rel=1e-4)


def test_perplexity_is_e_to_the_loss_also_of_bytes() -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(5, 3, 7), torch.randint(7, (5, 3)).to(torch.uint8)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return next_token_loss(outputs, targets.long())

    for found in measured(2, lambda: {"p": Perplexity()}, cut(logits, tokens, [2, 2, 1]), loss):
        assert found["p"].item() == pytest.approx(math.exp(found["loss"].item()), rel=1e-5)


def test_tensors_of_any_shape_and_type_come_as_they_are() -> None:
    own = [
        torch.tensor(True),
        torch.zeros(0, 3),
        torch.tensor([[1.5], [-2.0]], dtype=torch.bfloat16),
    ]
    for gathered in on_ranks(3, lambda link: gather_unequal(own[link.group.rank], link.group)):
        for there, expected in zip(gathered, own, strict=True):
            assert (there.dtype, there.shape) == (expected.dtype, expected.shape)
            assert torch.equal(there, expected)


def test_what_has_no_number_is_refused() -> None:
    metrics = {"matrix": MulticlassConfusionMatrix(2)}
    batches = [(torch.eye(2), torch.arange(2))]
    with Trainer(
        Same(), F.cross_entropy, torch.optim.SGD, eval_metrics=metrics, console=False
    ) as trainer:
        with pytest.raises(ConfigError, match=r"'matrix', whose value is no number but \(2, 2\)"):
            trainer.evaluate(batches)
        with pytest.raises(ConfigError, match="cannot be joined over ranks"):
            trainer.measure(batches, {"map": RetrievalMAP()})
        with pytest.raises(ConfigError, match=r"made of others \(MulticlassF1Score\)"):
            trainer.measure(batches, {"doubled": MulticlassF1Score(2) * 2})
        collection = MetricCollection([MulticlassF1Score(2)])
        with pytest.raises(ConfigError, match="'all' made dict of a batch"):
            trainer.measure(batches, {"all": collection})
        with pytest.raises(ConfigError, match=r"'each' made \(2,\) of a batch"):
            trainer.measure(batches, {"each": lambda outputs, targets: targets.double()})
        plain = {"acc": lambda outputs, targets: accuracy(outputs, targets).item()}
        assert trainer.measure(batches, plain)["acc"].item() == 1.0
        again = {"acc": MulticlassAccuracy(2)}
        first, second = (trainer.measure(batches, again)["acc"].item() for _ in range(2))
        assert first == second == 1.0  # nothing is kept from one evaluation to the next


def test_no_sample_has_no_value() -> None:
    measures = Measures({"acc": MulticlassAccuracy(2)}, torch.device("cpu"))
    with pytest.raises(ConfigError, match="no sample was evaluated, so that acc"):
        measures.values([])


def test_a_config_names_metrics_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "eval_metrics=classification", "model.hidden=[8]", "max_steps=2", "console=false",
        "eval_metrics.top2._target_=torchmetrics.classification.MulticlassAccuracy",
        "eval_metrics.top2.num_classes=10", "eval_metrics.top2.top_k=2",
        "eval_metrics.own._target_=scaledtrain.tasks.accuracy", "eval_metrics.own._partial_=true",
        "target.metric=auroc", "target.at_least=0.99",
    ]  # fmt: skip
    with connect() as link:
        result = run(check(compose(words)), link)
        assert set(result.evaluation) == {"loss", "accuracy", "f1", "auroc", "top2", "own"}
        assert result.evaluation["own"] == result.evaluation["accuracy"]
        assert result.evaluation["top2"] > result.evaluation["accuracy"]
        for word, told in (
            ("eval_metrics.f1.num_clases=3", "num_clases"),
            ("eval_metrics.f1.average=all", "eval_metrics.f1.*average"),
            ("eval_metrics.loss._target_=torchmetrics.MeanMetric", "rename it"),
            ("eval_metrics.x._target_=builtins.dict", "which made a dict"),
            ("eval_metrics.x._target_=scaledtrain.tasks.accuracy", "eval_metrics.x._partial_=true"),
        ):
            with pytest.raises(ConfigError, match=told):
                run(check(compose([*words, word])), link)
