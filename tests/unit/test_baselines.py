"""Baselines: their values by hand and by scikit-learn, where they go, what is said with them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.metrics import accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.tree import DecisionTreeClassifier
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from scaledtrain import cli
from scaledtrain.baselines import (
    BaselineOptions,
    Baselines,
    Row,
    measure_baselines,
    read_baselines,
    verdict,
    write_baselines,
)
from scaledtrain.data import ShardWriter
from scaledtrain.errors import ConfigError
from scaledtrain.models import next_token_loss
from scaledtrain.report.page import write_report
from scaledtrain.tasks import Task, accuracy, digits, sharded
from tests.run_folders import evaluation, step_record, write
from tests.tasks import signs_by_one_logit


def task_of(x: Any, y: Any, test: tuple[Any, Any] | None = None, **options: Any) -> Task:
    sets = [TensorDataset(*map(torch.as_tensor, pair)) for pair in ((x, y), test or (x, y))]
    return Task(*sets, gathers=True, **options)


def values(task: Task, *only: str, **options: Any) -> dict[str, dict[str, float]]:
    found = measure_baselines(task, BaselineOptions(only=list(only) or None, **options))
    return {row.name: dict(row.values) for row in found.rows}


class TestValues:
    def test_the_most_frequent_class_and_chance(self) -> None:
        """Of 10 samples 6 are of class 1, 3 of class 0, 1 of class 2, none of class 3."""
        labels = torch.tensor([1] * 6 + [0] * 3 + [2])
        task = task_of(
            torch.zeros(10, 1),
            labels,
            (torch.zeros(4, 1), torch.tensor([1, 0, 0, 3])),
            metrics={"accuracy": accuracy},
            sizes={"n_classes": 4},
        )
        found = values(task, "random", "most_frequent")
        # (6 + 1, 3 + 1, 0 + 1) / 14 of the test classes 1, 0, 0, 3
        expected = -(math.log(7 / 14) + 2 * math.log(4 / 14) + math.log(1 / 14)) / 4
        assert found["most_frequent"] == {
            "loss": pytest.approx(expected, rel=1e-6),
            "accuracy": 0.25,
        }
        assert found["random"]["loss"] == pytest.approx(math.log(4), abs=1e-4)

    def test_chance_is_right_for_one_in_c(self) -> None:
        y = torch.zeros(40_000, dtype=torch.int64)
        task = task_of(
            torch.zeros(len(y), 1), y, metrics={"accuracy": accuracy}, sizes={"n_classes": 4}
        )
        # 1/4, with a deviation of sqrt(1/4 x 3/4 / 40,000) = 0.0022
        assert values(task, "random")["random"]["accuracy"] == pytest.approx(0.25, abs=0.009)

    def test_the_mean_has_the_variance_as_its_error(self) -> None:
        generator = np.random.default_rng(0)
        x = generator.normal(size=(300, 3)).astype(np.float32)
        y = (x @ [1.0, -2.0, 0.5] + generator.normal(size=300)).astype(np.float32)
        found = values(task_of(x, y, loss_fn=F.mse_loss), "random", "mean", "linear_regression")
        assert found["mean"]["loss"] == pytest.approx(y.var(), rel=1e-5)
        # Of two independent draws: twice the variance.
        assert found["random"]["loss"] == pytest.approx(2 * y.var(), rel=0.3)
        # R^2 = 1 - error / variance
        score = LinearRegression().fit(x, y).score(x, y)
        assert found["linear_regression"]["loss"] == pytest.approx((1 - score) * y.var(), rel=1e-4)

    def test_whole_numbers_may_be_numbers(self) -> None:
        x = torch.arange(6.0).view(6, 1)

        def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return F.mse_loss(outputs, targets.float())

        task = task_of(x, torch.arange(6) * 100, loss_fn=loss)
        found = values(task, "random", "mean", "decision_tree", kind="regression")
        assert found["mean"]["loss"] == pytest.approx(1e4 * 35 / 12)  # of 0 to 5: (6^2 - 1) / 12
        assert found["decision_tree"]["loss"] == 0

    def test_targets_of_several_numbers_keep_their_shape(self) -> None:
        x = torch.arange(12.0).view(6, 2)
        found = values(task_of(x, x.view(6, 1, 2) * 3, loss_fn=F.mse_loss), samples=6)
        assert set(found) == {
            "random", "mean", "linear_regression", "nearest_neighbour", "decision_tree",
        }  # fmt: skip
        for exact in ("linear_regression", "nearest_neighbour", "decision_tree"):
            assert found[exact]["loss"] == pytest.approx(0, abs=1e-8)

    def test_unigram_and_bigram_by_hand(self) -> None:
        """0 0 1 0: after 0 comes 0 once and 1 once, after 1 comes 0."""
        task = task_of(
            torch.tensor([[0, 0, 1]]),
            torch.tensor([[0, 1, 0]]),
            loss_fn=next_token_loss,
            sizes={"vocab_size": 2},
        )
        found = {name: each["loss"] for name, each in values(task).items()}
        # Unigram: (2 + 1) / 5 and (1 + 1) / 5, of the targets 0, 1, 0.
        unigram = -(2 * math.log(0.6) + math.log(0.4)) / 3
        # Bigram: (1 + 0.6) / 3, (1 + 0.4) / 3 and (1 + 0.6) / 2.
        bigram = -(math.log(1.6 / 3) + math.log(1.4 / 3) + math.log(0.8)) / 3
        assert found == pytest.approx(
            {"random": math.log(2), "unigram": unigram, "bigram": bigram}, rel=1e-6
        )

    def test_a_bigram_model_is_the_unigram_after_what_was_never_seen(self) -> None:
        task = task_of(
            torch.tensor([[0, 1]]),
            torch.tensor([[1, 0]]),
            (torch.tensor([[2, 2]]), torch.tensor([[0, 2]])),
            loss_fn=next_token_loss,
            sizes={"vocab_size": 3},
        )
        found = values(task, "unigram", "bigram")
        # (1 + 1) / 5 and (0 + 1) / 5
        assert found["unigram"]["loss"] == pytest.approx(-(math.log(0.4) + math.log(0.2)) / 2)
        assert found["bigram"] == pytest.approx(found["unigram"])

    def test_scikit_learn_says_the_same_of_its_models(self) -> None:
        task = digits(as_images=True)
        # All are sampled, so that it does not matter in which order.
        found = values(task, "nearest_neighbour", "decision_tree", samples=1437)
        x, y = (part.flatten(1).numpy() if part.dim() > 1 else part for part in task.train[:])
        test_x, test_y = task.test[:][0].flatten(1).numpy(), task.test[:][1]  # type: ignore[index]
        scaled = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
        test_scaled = (test_x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
        neighbour = KNeighborsClassifier(1).fit(scaled, y)
        expected = accuracy_score(test_y, neighbour.predict(test_scaled))
        assert found["nearest_neighbour"]["accuracy"] == pytest.approx(expected, abs=1 / 360)
        # A tree's ties depend on the order of its samples: within a few of the 360.
        tree = DecisionTreeClassifier(random_state=0).fit(x, y)
        assert found["decision_tree"]["accuracy"] == pytest.approx(
            tree.score(test_x, test_y), abs=0.05
        )

    def test_a_model_that_cannot_be_fitted_is_left_out(self) -> None:
        task = task_of(torch.zeros(4, 1), torch.ones(4, dtype=torch.int64), sizes={"n_classes": 2})
        found = measure_baselines(task)
        assert [row.name for row in found.rows] == [
            "random", "most_frequent", "nearest_neighbour", "decision_tree",
        ]  # fmt: skip
        assert list(found.left_out) == ["logistic_regression"]
        assert "class" in found.left_out["logistic_regression"]
        neighbour = found.rows[2].values["loss"]
        # 99 % and 1 % of (4 + 1) / 6
        assert neighbour == pytest.approx(-math.log(0.99 + 0.01 * 5 / 6), rel=1e-4)


def test_data_on_disk_are_counted_in_a_pass_and_sampled_within_a_limit(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", shard_samples=64) as writer:
        labels = torch.arange(1000) % 4 % 3  # a half of class 0, a quarter each of 1 and 2
        writer.write_batch({"x": torch.randn(1000, 5), "y": labels.to(torch.uint8)})
    path = str(tmp_path / "set")
    task = sharded(path, path, n_classes=3)
    found = measure_baselines(task, BaselineOptions(samples=50))
    by_name = {row.name: row for row in found.rows}
    assert by_name["most_frequent"].values["accuracy"] == 0.5
    assert by_name["most_frequent"].samples == found.counted_samples == 1000
    assert by_name["decision_tree"].samples == 50
    assert found.data["train_samples"] == 1000
    fewer = measure_baselines(task, BaselineOptions(count_samples=100, only=["most_frequent"]))
    assert (fewer.counted_samples, fewer.train_samples, fewer.test_samples) == (100, 1000, 1000)
    again = measure_baselines(task, BaselineOptions(samples=50))
    assert again == found  # seeded


FOUND = Baselines(
    "classification",
    [
        Row("most_frequent", "always saying 7", {"loss": 2.3, "accuracy": 0.11}, 100, True),
        Row("decision_tree", "a decision tree", {"loss": 0.9, "accuracy": 0.85}, 100),
        Row("human", "people", {"accuracy": 0.984}, 0),
    ],
    {"logistic_regression": "there is one class alone"},
    100,
    100,
    50,
    0,
)


class TestVerdict:
    def test_it_is_read_against_the_best_and_people(self) -> None:
        # 97.3 - 85 and 98.4 - 97.3
        assert verdict(FOUND, {"loss": 0.1, "accuracy": 0.973}) == (
            "By accuracy the model is 12.3 points above a decision tree and 1.1 below people."
        )

    def test_a_model_that_has_learnt_nothing_is_told_so(self) -> None:
        assert verdict(FOUND, {"loss": 2.4, "accuracy": 0.11}) == (
            "By accuracy the model is not better than always saying 7 (0.11 and 0.11)."
        )

    def test_a_loss_is_better_below(self) -> None:
        assert verdict(FOUND, {"loss": 0.5}) == "By loss the model is 0.4 below a decision tree."
        assert "not better than always saying 7" in verdict(FOUND, {"loss": 2.5})

    def test_nothing_is_said_of_what_cannot_be_compared(self) -> None:
        assert verdict(FOUND, {"f1": 0.5}) == verdict(FOUND, {}) == ""


def test_they_are_kept_whole_in_the_folder_of_a_run(tmp_path: Path) -> None:
    assert read_baselines(tmp_path) is None
    path = write_baselines(tmp_path / "run", FOUND)
    assert read_baselines(tmp_path / "run") == FOUND
    assert [p.name for p in path.parent.iterdir()] == ["baselines.json"]
    path.write_text(path.read_text()[:-10])
    with pytest.raises(ConfigError, match=r"baselines\.json does not hold baselines"):
        read_baselines(tmp_path / "run")


def test_the_report_shows_them(tmp_path: Path) -> None:
    line = step_record(
        step=10, seconds=1.0, steps=10, samples=320, samples_per_second=320,
        step_seconds=0.1, compute=0.1, waiting=0.0,
    )  # fmt: skip
    run = write(tmp_path / "run", [[line, evaluation(0.5, 0.9)]])
    write_baselines(run, FOUND)
    other = write(tmp_path / "other", [[line, evaluation(0.5, 0.9)]])
    text = write_report(tmp_path / "report.html", [run, other]).read_text(encoding="utf-8")
    assert "5.0 points above a decision tree and 8.4 below people" in text  # 90 of 85 and 98.4
    # A line and its name in the figures of accuracy and loss; the human figure has no loss.
    assert text.count("decision tree: 0.85") == text.count("decision tree: 0.9") == 1
    assert text.count("human: 0.984") == 1
    assert "<td>+0.0500</td>" in text  # 0.9 - 0.85
    assert "there is one class alone" in text
    assert "python -m scaledtrain.baselines" in text  # of the other run


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["scaledtrain", "baselines", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


class TestCommand:
    def test_of_a_config_and_of_a_run(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        only = ["baselines.only=[random,most_frequent]", "baselines.human=0.98"]
        assert call(monkeypatch, "experiment=digits_mlp", f"run_dir={run}", *only) == 0
        assert "always saying 1 (10.2% of the training data)" in capsys.readouterr().out
        found = json.loads((run / "baselines.json").read_text())
        assert [row["name"] for row in found["rows"]] == ["random", "most_frequent", "human"]
        assert call(monkeypatch, str(run), *only) == 2  # it has no config.yaml
        assert "there is no" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["baselines.only=[most_frequnt]"], "did you mean 'most_frequent'?"),
            (["baselines.human={acuracy: 0.9}"], "did you mean 'accuracy'?"),
            (["baselines.samples=0"], "baselines.samples is 0"),
            (["baselines.sampels=5"], "baselines.sampels"),
            (["baselines.kind=language_model"], "size of the vocabulary is not known"),
            ([".", "seed=1"], "beside a run give baselines.KEY=VALUE only"),
        ],
    )
    def test_what_does_not_fit_is_told(
        self,
        words: list[str],
        told: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert call(monkeypatch, *words) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (Task(TensorDataset(torch.zeros(2, 1), torch.zeros(2))), "nothing to evaluate on"),
        (task_of(torch.zeros(2, 1), torch.zeros(2), loss_fn=None), "makes its loss itself"),
        (
            task_of(torch.zeros(2, 1), torch.tensor([0, 5]), sizes={"n_classes": 3}),
            "go from 0 to 5, but there are 3 classes",
        ),
        (
            task_of(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)),
            "need one class a sample",
        ),
        (task_of(torch.zeros(2, 1), torch.tensor([-1, 2])), "go from -1 to 2, but there are 3"),
        (signs_by_one_logit(), r"the loss of the data cannot be had of outputs \[\d+, 2\]"),
    ],
)
def test_data_that_have_no_baselines_are_refused(task: Task, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        measure_baselines(task)


def test_text_needs_a_token_at_each_place() -> None:
    task = task_of(torch.zeros(2, 3), torch.tensor([0, 1]), sizes={"vocab_size": 2})
    with pytest.raises(ConfigError, match="need a token at each place"):
        measure_baselines(task, BaselineOptions(kind="language_model"))
