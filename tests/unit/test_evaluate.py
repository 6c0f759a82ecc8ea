"""A saved run evaluated, exported with its card, and served by torch alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from sklearn import metrics as reference
from torchmetrics.functional.classification import multiclass_calibration_error

from scaledtrain import cli
from scaledtrain.baselines import BaselineOptions, measure_baselines, write_baselines
from scaledtrain.checkpoint.export import newest_intact
from scaledtrain.checkpoint.weights import load_weights
from scaledtrain.checkpoints import run as checkpoints
from scaledtrain.command_line import compose
from scaledtrain.config import check
from scaledtrain.connection import connect
from scaledtrain.errors import ConfigError
from scaledtrain.evaluate import (
    EvaluateConfig,
    coverage_curve,
    evaluate_run,
    expected_calibration_error,
    read_evaluated,
    reliability,
    thresholds,
)
from scaledtrain.evaluate.card import write_card
from scaledtrain.models import MLP
from scaledtrain.report.evaluated import section
from scaledtrain.report.page import write_report
from scaledtrain.tasks import digits
from scaledtrain.train import run as train

ROOT = Path(__file__).parents[2]


class TestCalibration:
    def test_bins_by_hand(self) -> None:
        """Of 0.62 and 0.78 one is right, of 0.95 and 1 both; nothing is below 0.5."""
        confidence = torch.tensor([0.62, 0.78, 0.95, 1.0])
        right = torch.tensor([1, 0, 1, 1])
        low, high = reliability(confidence, right, n_bins=4)[-2:]
        assert (low.low, low.count, low.confidence, low.accuracy) == (0.5, 1, 0.62, 1.0)
        assert (high.low, high.high, high.count) == (0.75, 1.0, 3)
        assert (high.confidence, high.accuracy) == (0.91, 0.6667)  # (0.78 + 0.95 + 1) / 3

    def test_the_error_is_that_of_the_bins_and_of_all_classes(self) -> None:
        torch.manual_seed(0)
        probabilities, labels = torch.randn(500, 3).softmax(1), torch.randint(3, (500,))
        confidence, answers = probabilities.max(1)
        right = (answers == labels).long()
        found = expected_calibration_error(confidence, right, n_bins=10)
        by_hand = sum(
            b.count / 500 * abs(b.accuracy - b.confidence)
            for b in reliability(confidence, right, n_bins=10)
        )
        assert found == pytest.approx(by_hand, abs=1e-4)  # they are rounded
        # In the last bin are 0.95 and 1, of which one is right: |1 - 1.95| / 2.
        last = torch.tensor([1.0, 0.95]), torch.tensor([0, 1])
        assert expected_calibration_error(*last, n_bins=10) == pytest.approx(0.475)
        of_all = multiclass_calibration_error(probabilities, labels, 3, n_bins=10).item()
        assert found == pytest.approx(of_all, rel=1e-6)


class TestCoverage:
    def test_equally_certain_answers_are_given_together(self) -> None:
        curve = coverage_curve(torch.tensor([0.9, 0.8, 0.8, 0.7]), torch.tensor([1, 0, 1, 1]))
        # 1 / 1, then (1 + 1) / 3, then 3 / 4
        assert curve[:, 1].tolist() == [0.25, 0.75, 1.0]
        assert curve[:, 2].tolist() == [1.0, 2 / 3, 0.75]

    def test_the_threshold_that_answers_most(self) -> None:
        """Of 100 answers, from the most certain on, the 61st and all after the 84th are wrong."""
        confidence = torch.linspace(0.995, 0.005, 100)
        right = torch.ones(100)
        right[60] = 0
        right[84:] = 0
        (found,) = thresholds(confidence, right, [0.98])
        assert found.coverage == 0.84  # 83 of 84 are right; 83 of 85 is 0.976
        assert found.accuracy == pytest.approx(83 / 84)
        assert found.confidence == pytest.approx(confidence[83].item(), abs=1e-6)
        assert str(found).startswith("for 98 % accuracy answer 84% of cases, those of confidence")
        assert 0.5 < found.held_out_coverage < 0.95
        other = torch.randperm(100, generator=torch.Generator().manual_seed(1))
        assert thresholds(confidence[other], right[other], [0.98]) == [found]

    def test_where_nothing_is_good_enough_that_is_said(self) -> None:
        (found,) = thresholds(torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), [0.9])
        assert (found.confidence, found.coverage, found.accuracy) == (None, 0.0, None)
        assert "there is no threshold" in str(found)
        with pytest.raises(ConfigError, match="accuracies has 99"):
            thresholds(torch.ones(1), torch.ones(1), [99])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on digits that was saved, with baselines."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    words = ["model.hidden=[32]", "console=false", "checkpointing=steps", "max_steps=150"]
    with connect() as link:
        train(check(compose(words)), link, folder)
    only = BaselineOptions(human=0.98, only=["random", "most_frequent"])
    write_baselines(folder, measure_baselines(digits(), only))
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["scaledtrain", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def model_of(run: Path) -> MLP:
    model = MLP(64, [32], 10)
    load_weights(model, run)
    return model.eval()


def test_a_run_from_its_evaluation_to_its_service(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, "evaluate", str(run_dir), "accuracies=[0.97]", "batch_size=100") == 0
    told = capsys.readouterr().out
    found = read_evaluated(run_dir)
    assert found is not None
    assert (found.step, found.samples, found.kind) == (150, 360, "classification")

    images, targets = digits().test[:]  # type: ignore[index]
    with torch.no_grad():
        probabilities = model_of(run_dir)(images).softmax(1)
    confidence, answers = probabilities.max(1)
    labels, said = targets.numpy(), answers.numpy()
    expected = reference.f1_score(labels, said, average="macro")
    assert found.values["f1"] == pytest.approx(expected, rel=1e-5)
    assert found.values["accuracy"] == reference.accuracy_score(labels, said)
    expected = reference.roc_auc_score(labels, probabilities.double().numpy(), multi_class="ovr")
    assert found.values["auroc"] == pytest.approx(expected, rel=1e-5)
    matrix = reference.confusion_matrix(labels, said)
    assert found.tables["confusion_matrix"] == matrix.tolist()
    calibration = found.calibration
    assert calibration is not None
    of_all = multiclass_calibration_error(probabilities, targets, 10, n_bins=15).item()
    assert calibration.expected_error == pytest.approx(of_all, rel=1e-5)
    assert calibration.answers == sum(b.count for b in calibration.bins) == 360
    (threshold,) = calibration.thresholds
    assert threshold.confidence is not None
    given = confidence >= threshold.confidence - 1e-6
    assert given.double().mean().item() == pytest.approx(threshold.coverage)
    assert (answers == targets)[given].double().mean().item() >= 0.97
    assert f"for 97 % accuracy answer {threshold.coverage:.0%} of cases" in told
    assert "below people" in told or "above people" in told

    page = write_report(tmp_path / "report.html", [run_dir]).read_text(encoding="utf-8")
    assert "Expected calibration error" in page
    assert "answering only when confident" in page
    assert "Rows: true classes; columns: answers." in page

    out = tmp_path / "out"
    assert checkpoints(["export", "--program", str(run_dir), str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "MODEL_CARD.md", "model.pt2", "model.safetensors",
    ]  # fmt: skip
    card = ModelCard.load(out / "MODEL_CARD.md")
    results = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert results == pytest.approx(dict(found.values))
    assert {each.dataset_name for each in card.data.eval_results} == {"digits"}
    text = card.text
    for part in (
        "MLP", "after 150 updates", "| train samples | `1437` |", "## Baselines",
        "most frequent", "human", "## Calibration", str(threshold), "| torch |", "| commit |",
        "hidden:\n  - 32", 'torch.export.load("model.pt2")',
    ):  # fmt: skip
        assert part in text
    with pytest.raises(ConfigError, match=r"MODEL_CARD\.md is there already"):
        checkpoints(["export", str(run_dir), str(out)])

    # The documented script, where scaledtrain cannot be imported.
    script = re.search(r"```py\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
    assert script is not None
    hidden = "import sys; sys.modules['scaledtrain'] = None\n"
    (tmp_path / "serve.py").write_text(hidden + script[1])
    torch.save(images[:20], tmp_path / "inputs.pt")
    command = [sys.executable, "-I", "serve.py", "out", "inputs.pt", str(threshold.confidence)]
    shown = subprocess.run(
        command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60
    )
    lines = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [line["confidence"] for line in lines] == pytest.approx(confidence[:20].tolist())
    given_answers = [
        int(a) if c >= threshold.confidence else None
        for a, c in zip(answers[:20], confidence[:20].tolist(), strict=True)
    ]
    assert [line["answer"] for line in lines] == given_answers


def test_numbers_and_tokens_are_evaluated_too(tmp_path: Path) -> None:
    words = [
        "model=gpt", "data=stdlib_text", "data.sequence_length=16", "data.max_train_bytes=4000",
        "data.max_test_bytes=600", "model.n_layers=1", "model.d_model=16", "model.n_heads=2",
        "console=false", "checkpointing=steps", "max_steps=2",
    ]  # fmt: skip
    with connect() as link:
        result = train(check(compose(words)), link, tmp_path / "text")
        found = evaluate_run(tmp_path / "text", EvaluateConfig(), link)
        assert found.kind == "language_model"
        assert found.values["loss"] == pytest.approx(result.evaluation["loss"], rel=1e-6)
        perplexity = torch.tensor(result.evaluation["loss"]).exp().item()
        assert found.values["perplexity"] == pytest.approx(perplexity, rel=1e-4)
        assert found.calibration is not None
        assert found.samples is not None
        assert found.calibration.answers == found.samples * 16  # every token


def test_the_metrics_of_a_run_keep_their_arguments_and_a_damaged_file_costs_no_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "model.hidden=[8]", "eval_metrics=classification", "eval_metrics.f1.average=micro",
        "console=false", "checkpointing=steps", "max_steps=9",
    ]  # fmt: skip
    with connect() as link:
        train(check(compose(words)), link, tmp_path)
    (tmp_path / "baselines.json").write_text("{")
    monkeypatch.chdir(newest_intact(tmp_path))
    assert call(monkeypatch, "evaluate", ".") == 2
    told = capsys.readouterr()
    assert "baselines.json does not hold baselines" in told.err
    found = read_evaluated(tmp_path)
    assert found is not None
    assert found.checkpoint == "step-000000009"
    assert str(tmp_path / "evaluation.json") in told.out
    assert found.values["f1"] == pytest.approx(found.values["accuracy"])  # micro; macro is less
    per_class = replace(found, tables={"f1_of_each": [0.25, 1.0]})
    assert section(per_class).tables == [("f1 of each", [["0.25", "1"]])]


def test_one_logit_has_a_loss_and_no_calibration(tmp_path: Path) -> None:
    words = [
        "data=tests.tasks.signs_by_one_logit", "data.local_batch_size=32", "model.hidden=[8]",
        "console=false", "checkpointing=steps", "max_steps=2",
    ]  # fmt: skip
    with connect() as link:
        result = train(check(compose(words)), link, tmp_path)
        found = evaluate_run(tmp_path, EvaluateConfig(), link)
    assert found.values == pytest.approx(dict(result.evaluation), rel=1e-6)
    assert list(found.values) == ["loss"]
    assert found.calibration is None
    assert found.tables == {}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no runs were given"),
        (["nowhere"], "has no checkpoint"),
        ([".", "accuracies=[99]"], "accuracies has 99"),
        ([".", "n_bins=0"], "n_bins is 0"),
        ([".", "bins=3"], "no key 'bins'"),
    ],
)
def test_what_does_not_fit_is_told(
    words: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "evaluate", *words) == 2
    assert told in capsys.readouterr().err


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text('{"checkpoint": 3}')
    with pytest.raises(ConfigError, match=r"evaluation\.json does not hold an evaluation"):
        read_evaluated(tmp_path)


def test_a_card_keeps_no_secret(run_dir: Path, tmp_path: Path) -> None:
    """Neither options of a storage nor a password in a URL; a run without an evaluation has one."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text(
        "name: x\ndata:\n  _target_: scaledtrain.tasks.sharded\n"
        "  path: https://me:hunter2@host/set\n  storage_options: {key: hunter3}\n"
        "  more: ['https://me:hunter4@host/b', 'https://host/c?X-Amz-Signature=hunter5']\n"
    )
    text = write_card(newest_intact(run_dir), tmp_path, other).read_text(encoding="utf-8")
    assert "hunter" not in text
    for address in ("https://host/set", "https://host/b", "https://host/c?(left out)"):
        assert address in text
    assert "The run's last evaluation before it was saved." in text
    assert ModelCard(text).data.to_dict()["model-index"][0]["name"] == "x"
