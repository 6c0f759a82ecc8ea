"""The ladder finds each planted bug, on the rung where it belongs, and names the place."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from scaledtrain import ParameterServer
from scaledtrain.check import LADDER, Plan, Verdict, check
from scaledtrain.errors import ConfigError
from tests import planted
from tests.planted import Net

ADAM = partial(torch.optim.Adam, lr=0.01)
CHEAP = [rung.name for rung in LADDER if rung.name != "cost"]


def climbed(
    model: Any, loss_fn: Any = F.cross_entropy, loader: Any = None, **options: Any
) -> dict[str, Verdict]:
    loader = planted.loader() if loader is None else loader
    options = {"optimizer": ADAM, "only": CHEAP, "told": lambda verdict: None, **options}
    optimizer = options.pop("optimizer")
    return {v.rung: v for v in check(model, loss_fn, loader, optimizer, **options)}


def failing(verdicts: dict[str, Verdict]) -> set[str]:
    return {name for name, verdict in verdicts.items() if verdict.status == "failed"}


def text(**options: Any) -> dict[str, Verdict]:
    return climbed(
        partial(planted.Text, **options.pop("model", {})),
        planted.token_loss,
        options.pop("loader", planted.tokens()),
        **options,
    )


class TestWithoutBugs:
    def test_a_classifier_with_dropout_and_batch_norm_passes_every_rung(self) -> None:
        verdicts = climbed(Net, only=None)
        assert {v.status for v in verdicts.values()} == {"passed"}, verdicts
        # ln 4 = 1.3863
        assert verdicts["initial_loss"].measured["expected"] == pytest.approx(1.3863, abs=1e-4)
        assert "dropout and batch norm differ by rank" in verdicts["ranks"].found

    def test_a_language_model_passes_every_rung(self) -> None:
        verdicts = text()
        assert {v.status for v in verdicts.values()} == {"passed"}, verdicts
        # ln 16 = 2.7726
        assert verdicts["initial_loss"].measured["expected"] == pytest.approx(2.7726, abs=1e-4)
        assert "no position sees later ones" in verdicts["samples"].found

    def test_a_regression_is_expected_to_begin_at_the_variance_of_its_targets(self) -> None:
        x, _ = planted.samples()
        y = x @ torch.ones(planted.FEATURES, 1)
        batches = list(zip(x.split(16), y.split(16), strict=True))
        verdicts = climbed(
            partial(nn.Linear, planted.FEATURES, 1), F.mse_loss, batches, only=["initial_loss"]
        )
        variances = [float(part.var(unbiased=False)) for part in y.split(16)]
        expected = verdicts["initial_loss"].measured["expected"]
        assert expected == pytest.approx(sum(variances) / 4, rel=1e-5)


class TestPlantedBugs:
    def test_a_softmax_before_the_cross_entropy(self) -> None:
        verdicts = climbed(planted.Softmaxed)
        assert failing(verdicts) == {"shapes", "overfit"}
        assert "softmax in probabilities" in verdicts["shapes"].found

    def test_labels_from_one(self) -> None:
        x, y = planted.samples()
        verdicts = climbed(Net, loader=planted.loader(x, y + 1))
        assert failing(verdicts) == {"shapes"}
        assert "targets go from 1 to 4, but the model has 4 outputs" in verdicts["shapes"].found
        assert "subtract 1" in verdicts["shapes"].advice
        assert verdicts["overfit"].status == "skipped"

    @pytest.mark.parametrize(
        ("shift", "what"),
        [(0, "the inputs themselves"), (-1, "the tokens before them"), (2, "two tokens ahead")],
    )
    def test_tokens_that_are_shifted_wrongly(self, shift: int, what: str) -> None:
        verdicts = text(loader=planted.tokens(shift), only=["shapes"])
        assert failing(verdicts) == {"shapes"}
        assert what in verdicts["shapes"].found

    def test_a_layer_that_is_frozen_by_mistake_and_one_that_is_meant_to_be(self) -> None:
        verdicts = climbed(planted.Frozen)
        assert failing(verdicts) == {"gradients"}
        assert "frozen (requires_grad=False): hidden.weight" in verdicts["gradients"].found
        assert "check.frozen=[hidden]" in verdicts["gradients"].advice
        meant = climbed(planted.Frozen, only=["gradients"], frozen=["hidden"])
        assert meant["gradients"].status == "passed"

    def test_a_branch_that_is_detached(self) -> None:
        verdicts = climbed(planted.Detached)
        assert failing(verdicts) == {"gradients"}
        assert "no gradient for branch.weight, branch.bias" in verdicts["gradients"].found

    def test_a_parameter_that_the_optimizer_was_not_given(self) -> None:
        def forgets(named: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for name, p in named if "norm" not in name], lr=0.1)

        verdicts = climbed(Net, only=["gradients"], optimizer=forgets)
        assert "not given norm.weight, norm.bias" in verdicts["gradients"].found

    def test_rectifiers_that_are_dead(self) -> None:
        verdicts = climbed(planted.Dead)
        assert failing(verdicts) == {"gradients", "units", "overfit"}
        assert "the model itself (32 of 32)" in verdicts["units"].found
        assert "only zeros as gradient for first.weight" in verdicts["gradients"].found
        # 20 units have the bias; of the other 12 some may be dead by chance.
        some = climbed(partial(planted.Dead, 20), only=["units", "gradients"])
        assert (some["units"].status, some["gradients"].status) == ("warning", "passed")

    def test_dead_channels_of_a_convolution_over_time(self) -> None:
        class Convolved(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv1d(1, 8, 3, padding=1)
                self.head = nn.Linear(8 * planted.FEATURES, planted.CLASSES)
                with torch.no_grad():
                    self.conv.bias[:5] = -1e4  # type: ignore[index]

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.head(F.relu(self.conv(x[:, None])).flatten(1))
                return out

        verdict = climbed(Convolved, only=["units"])["units"]
        assert "the model itself (5 of 8)" in verdict.found

    def test_what_is_below_zero_is_not_dead(self) -> None:
        # Hardtanh leaves -1 to 1 as they are; |w x| < 0.01 |x|, so all of its outputs are near -0.5
        model = nn.Sequential(nn.Linear(planted.FEATURES, 8), nn.Hardtanh(), nn.Linear(8, 4))
        with torch.no_grad():
            model[0].weight.fill_(0.001)
            model[0].bias.fill_(-0.5)
        verdict = climbed(model, only=["units"])["units"]
        assert (verdict.status, verdict.measured["dead"]) == ("passed", 0)

    def test_a_view_that_mixes_the_samples(self) -> None:
        verdicts = climbed(planted.Mixed)
        assert failing(verdicts) == {"samples", "ranks"}
        assert "first in turn: samples mix" in verdicts["samples"].found

    def test_a_prediction_without_eval_and_one_that_stays_in_it(self) -> None:
        verdicts = climbed(planted.PredictsInTrainMode)
        assert failing(verdicts) == {"modes"}
        assert "norm, drop in train mode" in verdicts["modes"].found or (
            "drop, norm in train mode" in verdicts["modes"].found
        )
        stays = climbed(planted.StaysInEvalMode)
        assert failing(stays) == {"modes"}
        assert "in eval mode, and training goes on in it" in stays["modes"].found

    def test_dropout_that_does_not_know_the_mode(self) -> None:
        verdicts = climbed(planted.AlwaysDrops)
        assert failing(verdicts) == {"modes"}
        assert "differ, first in always" in verdicts["modes"].found
        assert verdicts["samples"].status == "skipped"

    @pytest.mark.parametrize(
        ("model", "data", "place"),
        [
            (planted.Unseeded, None, "noise returns other values"),
            (planted.UnseededWeights, None, "head.bias begins with other values"),
            (Net, planted.UnseededData(), "batch 0 holds other values"),
        ],
    )
    def test_random_numbers_that_nobody_seeds(self, model: Any, data: Any, place: str) -> None:
        loader = planted.loader() if data is None else DataLoader(data, 16, shuffle=True)
        verdicts = climbed(model, loader=loader)
        assert failing(verdicts) == {"seed"}
        assert place in verdicts["seed"].found
        assert verdicts["resume"].status == "skipped"

    def test_state_that_is_not_saved(self) -> None:
        verdicts = climbed(planted.Counting)
        assert failing(verdicts) == {"resume"}
        assert "fading.calls of the model is not in its state dict" in verdicts["resume"].found
        assert verdicts["resume"].measured["step"] == 4  # saved after 3

    def test_state_that_is_not_saved_by_a_server_which_is_saved_a_step_later(self) -> None:
        # A worker knows of update 3 when it pulls for step 4, behind which all is saved.
        options: dict[str, Any] = {"only": ["seed", "resume"]}
        found = climbed(planted.Counting, trainer={"strategy": ParameterServer()}, **options)
        assert failing(found) == {"resume"}
        assert "fading.calls of the model is not in its state dict" in found["resume"].found
        assert found["resume"].measured["step"] == 5
        without = climbed(Net, trainer={"strategy": ParameterServer()}, **options)
        assert without["resume"].found == (
            "6 steps, saved and resumed after 4, are equal to 6 steps"
        )

    def test_a_loss_that_is_summed(self) -> None:
        verdicts = climbed(Net, planted.summed_loss)
        assert failing(verdicts) == {"initial_loss", "ranks"}
        # 16 samples x ln 4 = 22.18
        assert "22.18 = 16 x 1.386" in verdicts["initial_loss"].found
        # (a + b) / 2 of the halves' sums, against a + b
        assert verdicts["ranks"].measured["ratio"] == pytest.approx(0.5, abs=1e-3)

    def test_attention_without_a_mask(self) -> None:
        verdicts = text(model={"causal": False})
        assert failing(verdicts) == {"samples"}
        assert "position 0 change with tokens from position 4 on" in verdicts["samples"].found

    def test_positions_may_be_the_last_dim(self) -> None:
        class Turned(planted.Text):
            def forward(self, tokens: Tensor) -> Tensor:
                return super().forward(tokens).transpose(1, 2)

        for causal, status in ((True, "passed"), (False, "failed")):
            model = partial(Turned, causal)
            found = climbed(model, loader=planted.tokens(), only=["samples"])["samples"]
            assert found.status == status, found

    def test_outputs_may_have_one_dim(self) -> None:
        class Squeezed(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).squeeze(1)

        x, _ = planted.samples()
        model = partial(Squeezed, planted.FEATURES, 1)
        data = planted.loader(x, x.sum(1))
        assert climbed(model, F.mse_loss, data, only=["samples"])["samples"].status == "passed"

    def test_gradients_of_ranks_that_are_no_numbers(self) -> None:
        class Rooted(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + torch.sqrt(0 * self.weight).sum()  # slope: inf * 0

        x, y = planted.samples()
        one_batch = [(x[:16], y[:16])]
        model = partial(Rooted, planted.FEATURES, planted.CLASSES)
        assert failing(climbed(model, loader=one_batch, only=["ranks"])) == {"ranks"}

    def test_numbers_beyond_float16(self) -> None:
        verdicts = climbed(planted.Overflowing, only=["precision"], precision="fp16-mixed")
        assert failing(verdicts) == {"precision"}
        assert "large returns numbers beyond its range" in verdicts["precision"].found
        # It is no bug of a run in float32.
        assert climbed(planted.Overflowing, only=["precision"])["precision"].status == "warning"

    def test_a_loss_that_leaves_all_numbers_in_float32(self) -> None:
        wild = partial(torch.optim.SGD, lr=1e38)
        verdict = climbed(Net, only=["precision"], optimizer=wild)["precision"]
        assert verdict.status == "failed"
        assert "in fp32, too, the loss is not finite" in verdict.found


class TestShapes:
    def found(self, x: Tensor, y: Tensor, model: Any = Net, loss_fn: Any = F.cross_entropy) -> str:
        verdict = climbed(model, loss_fn, planted.loader(x, y), only=["shapes"])["shapes"]
        assert verdict.status in ("failed", "warning")
        return f"{verdict.found}; {verdict.advice}"

    def test_what_is_not_finite(self) -> None:
        x, y = planted.samples()
        x[3, 2] = torch.nan
        assert "inputs of 1 of 64 samples hold NaN" in self.found(x, y)

    def test_images_of_bytes(self) -> None:
        _, y = planted.samples()
        x = torch.randint(256, (64, 1, 3, 4)).float()
        model = partial(nn.Sequential, nn.Flatten(), nn.Linear(12, 4))
        assert "bytes that were not normalised" in self.found(x, y, model)
        both = self.found(x, y + 1, model)
        assert both.startswith("targets go from 1 to 4, but the model has 4 outputs")
        assert "bytes that were not normalised" in both

    def test_a_batch_that_is_not_first(self) -> None:
        x, y = planted.samples()

        class Turned(Net):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).t()

        assert "outputs of shape (4, 16) have not 16" in self.found(x, y, Turned)

    def test_outputs_and_targets_that_broadcast(self) -> None:
        x, y = planted.samples()
        model = partial(nn.Linear, planted.FEATURES, 1)
        found = self.found(x, y.float(), model, F.mse_loss)
        assert "outputs (16, 1) and targets (16,) are not of one shape" in found

    def test_a_loss_that_is_no_number_and_a_model_that_raises(self) -> None:
        unreduced = partial(F.cross_entropy, reduction="none")
        verdicts = climbed(Net, unreduced)
        assert "the loss must be one number" in verdicts["shapes"].found
        assert {v.status for n, v in verdicts.items() if n != "shapes"} == {"skipped"}
        broken = climbed(partial(nn.Linear, 3, 4), only=["shapes"])
        assert "RuntimeError at" in broken["shapes"].found


class TestOverfit:
    def test_a_learning_rate_that_is_too_small_is_told_from_a_model_that_cannot_learn(self) -> None:
        slow = partial(torch.optim.SGD, lr=1e-5)
        verdict = climbed(Net, only=["overfit"], optimizer=slow)["overfit"]
        assert verdict.status == "warning"
        assert "with Adam at 0.001, but only to" in verdict.found
        x, y = planted.samples()
        contradictory = climbed(
            Net, only=["overfit"], loader=planted.loader(torch.zeros_like(x), y), steps=30
        )["overfit"]
        assert contradictory.status == "failed"

    def test_a_learning_rate_that_is_a_tensor_stays(self) -> None:
        lr = torch.tensor(1e-5)
        slow = partial(torch.optim.SGD, lr=lr)
        climbed(Net, only=["overfit"], optimizer=slow, steps=2)
        assert lr == torch.tensor(1e-5)


class TestCost:
    @pytest.mark.parametrize(
        ("limit", "told", "seconds"), [(1e-6, "ends after 1e-06 s", 1e-6), (1e6, "", None)]
    )
    def test_the_time_is_that_of_the_limit_that_comes_first(
        self, limit: float, told: str, seconds: float | None
    ) -> None:
        plan = Plan(max_steps=1000, max_seconds=limit)
        cost = climbed(Net, only=["cost"], plan=plan)["cost"]
        assert "for 1,000 steps" in cost.found
        assert ("ends after" in cost.found) == bool(told)
        assert told in cost.found
        of_steps = 1000 * cost.measured["step_seconds"]
        assert cost.measured["seconds"] == (of_steps if seconds is None else seconds)

    def test_all_batches_of_a_step_take_memory(self) -> None:
        bytes_of_batch = sum(t.nbytes for t in next(iter(planted.loader())))
        two, five = (
            climbed(Net, only=["cost"], trainer={"gradient_accumulation_steps": n})["cost"].measured
            for n in (2, 5)
        )
        assert five["memory_bytes"] - two["memory_bytes"] == 3 * bytes_of_batch


class TestAsking:
    def test_an_unknown_rung_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"'overfitt' \(did you mean 'overfit'\?\)"):
            climbed(Net, only=["overfitt"])

    def test_a_generator_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="can be read only once"):
            climbed(Net, loader=iter([planted.samples()]))

    def test_no_rung_at_all_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"check\.only is empty; name some rungs: shapes,"):
            climbed(Net, only=[])

    @pytest.mark.parametrize(
        ("option", "why"),
        [
            ("run_dir", "which the check sets itself"),
            ("fast_dev_run", "which the check sets itself"),
            ("seed", r"give it to check itself: check\(\.\.\., seed="),
            ("max_grad_nrm", r"\(did you mean 'max_grad_norm'\?\), which Trainer does not take"),
        ],
    )
    def test_arguments_of_the_trainer_that_cannot_be_are_refused(
        self, option: str, why: str
    ) -> None:
        with pytest.raises(ConfigError, match=f"trainer has '?{option}'?.*{why}"):
            climbed(Net, trainer={option: 1})

    def test_one_process_of_several_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="this is rank 1 of 2, .* without a launcher"):
            climbed(Net, only=["shapes"])

    def test_the_model_given_is_left_as_it_is(self) -> None:
        model = Net().eval()
        before = {name: t.clone() for name, t in model.state_dict().items()}
        climbed(model, only=["gradients", "overfit", "seed"])
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        assert not model.training
