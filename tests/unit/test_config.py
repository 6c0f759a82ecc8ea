import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import scaledtrain
from scaledtrain import cli, tasks
from scaledtrain.build import build
from scaledtrain.command_line import compose, config_folder, read_command_line
from scaledtrain.config import BatchSizes, TrainConfig, check, to_yaml
from scaledtrain.connection import Connection, connect
from scaledtrain.data import (
    Column,
    Normalization,
    ShardedDataset,
    ShardWriter,
    compute_statistics,
)
from scaledtrain.errors import ConfigError
from scaledtrain.launching import workers_to_start
from scaledtrain.sweeps import split_sweeps
from scaledtrain.train import run

FILES = sorted(
    file.relative_to(config_folder())
    for file in config_folder().glob("*/**/*.yaml")
    if file.parent.name != "cluster"  # no part of a run on real processes
)

# What a choice needs beside it, where the defaults do not fit it.
COMPANIONS = {
    "activation_checkpointing/memory_budget": ["activation_checkpointing.size=1GiB"],
    "model/gpt": ["data=stdlib_text"],
    "data/stdlib_text": ["model=gpt"],
    "strategy/admission": ["strategy=async"],
    "strategy/compression": ["strategy=sync"],
    "strategy/correction": ["strategy=async"],
    "strategy/correction/dana": ["optimizer=plain_sgd"],  # it has the momentum
}
SMALL = ["console=false"]
SMALL_TEXT = ["data.max_train_bytes=20000", "data.max_test_bytes=20000"]

OWN_CLASSES = '''
from dataclasses import dataclass
from pathlib import Path

import torch

from scaledtrain.server import Asynchronous
from scaledtrain import Sync
from scaledtrain.tasks import Task


class Net(torch.nn.Sequential):
    def __init__(self, in_features: int, n_classes: int, width: int = 8, root: Path | None = None):
        layers = [torch.nn.Linear(in_features, width), torch.nn.Linear(width, n_classes)]
        super().__init__(torch.nn.Flatten(), *layers)
        self.root = root


class Strategy(Sync):
    def __init__(self, patience: float) -> None:
        super().__init__()
        self.patience = patience


@dataclass(frozen=True)
class Admission(Asynchronous):
    bound: int


class Descent(torch.optim.SGD):
    pass


def noise(n: int = 12, classes: int = 3) -> Task:
    """Gaussian samples with random labels."""
    data = torch.utils.data.TensorDataset(torch.randn(n, 5), torch.randint(classes, (n,)))
    return Task(data, data, sizes={"in_features": 5, "n_classes": classes})


def words() -> str:
    """Make what is no task."""
    return "words"
'''


@pytest.fixture
def link() -> Iterator[Connection]:
    with connect() as link:
        yield link


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a module with classes of a user's."""
    (tmp_path / "own_classes.py").write_text(OWN_CLASSES)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_classes"
    sys.modules.pop("own_classes", None)


def message(*overrides: str, **options: str) -> str:
    with pytest.raises(ConfigError) as error:
        check(compose(overrides, **options))
    return str(error.value)


def write_data(folder: Path, n: int = 50, classes: int = 5) -> list[str]:
    """Overrides for a data set of n samples of 6 features, the label in bytes."""
    with ShardWriter(folder, shard_samples=20) as writer:
        labels = torch.arange(n) % classes
        writer.write_batch({"x": torch.randn(n, 6), "y": labels.to(torch.uint8)})
    paths = [f"data.path={folder}", f"data.test_path={folder}"]
    return ["data=sharded", *paths, f"data.n_classes={classes}"]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_choice_composes_and_builds(file: Path, link: Connection, tmp_path: Path) -> None:
    group, choice = file.parent.as_posix(), file.stem
    companions = [*COMPANIONS.get(group, []), *COMPANIONS.get(f"{group}/{choice}", [])]
    if (group, choice) == ("data", "sharded"):
        companions += write_data(tmp_path)
    if group == "checkpointing" and choice != "none":
        companions.append(f"checkpointing.folder={tmp_path}")
    config = compose([f"{group}={choice}", *companions, *SMALL])
    if group == "engine" and choice != "none":  # which has to have several ranks
        config = compose([f"{group}={choice}", "mesh.shard=2", *SMALL])
        with pytest.raises(ConfigError, match="2 ranks for each replica, but the job has 1 rank"):
            build(config, link)
        return
    if "max_train_bytes" in config.data:
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(SMALL_TEXT))
    trainer, train, test = build(config, link)
    assert len(train) > 0
    assert test is not None
    assert trainer.replica.parameters
    trainer.close()


def test_train_yaml_has_exactly_the_keys_of_the_config() -> None:
    assert set(compose()) == {field.name for field in fields(TrainConfig)}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["max_step=3"],
            ["'max_step'", "did you mean 'max_steps'?", "the keys are: name, strategy"],
        ),
        (["model.hiden=[3]"], ["'model.hiden'", "'hidden'?", "MLP takes: in_features, hidden"]),
        (["lr=0.1"], ["'lr'", "did you mean 'optimizer.lr'?"]),
        (["global_batch_size=64"], ["did you mean 'data.global_batch_size'?"]),
        (["slowdown.factor={3: 4.0}"], ["'slowdown.factor'", "'factors'?"]),
        (["strategy/admision=asynchronous"], ["did you mean 'strategy/admission'?"]),
        (["strategy=asinc"], ["strategy is 'asinc'", "did you mean 'async'?", "async, async_"]),
        (
            ["model=resnet"],
            ["model is 'resnet'", "can be: convnet, gpt, mlp", "package.module.Class"],
        ),
        (["max_steps=many"], ["max_steps is 'many'", "a whole number or null"]),
        (["max_steps=1.5"], ["max_steps is 1.5", "a whole number"]),
        (["deterministic=1"], ["deterministic is 1", "true or false"]),
        (["optimizer.lr=fast"], ["optimizer.lr is 'fast'", "a number"]),
        (["model.hidden=64"], ["model.hidden is 64", "a list of whole numbers"]),
        (
            ["data=stdlib_text", "data.level=word"],
            ["data.level is 'word'", "one of 'byte', 'char'"],
        ),
        (["slowdown.factors={a: 4.0}"], ["a key of slowdown.factors is 'a'", "a whole number"]),
        (["slowdown.factors={3: 0.5}"], ["slowdown of rank 3 is 0.5"]),
        (["strategy=async", "strategy.admission=x"], ["to choose one write strategy/admission=x"]),
        (["strategy/admission=asynchronous"], ["strategy has no part 'admission'"]),
        (["strategy.admission=x"], ["Sync takes: overlap, bucket_bytes, compression"]),
        (["strategy=async", "strategy.correction.x=1"], ["Uncorrected takes no arguments"]),
        (["strategy/compression=topk"], ["did you mean 'top_k'?", "bf16, fp16, none, power_sgd"]),
        (["strategy/compression=top_k", "strategy.compression.fraction=x"], ["a number"]),
        (["precision.name=fp7"], ["'fp7'", "'fp32'"]),
        (["precision=bf16-mixd"], ["did you mean 'bf16-mixed'?", "bf16-true, fp16-mixed, fp16-t"]),
        (["precision=bf16-true", "precision.update=kahn"], ["'kahn'", "'kahan', 'master'"]),
        (["precision=bf16-mixed", "precision.update=kahan"], ["bf16-mixed has no update"]),
        (["precision=fp16-mixed", "precision.loss_scale.initial=0"], ["initial is 0.0; it is >="]),
        (["model=nowhere.Net"], ["'nowhere.Net'", "No module named 'nowhere'", "PYTHONPATH"]),
        (["model=torch.nn.Linea"], ["no attribute 'Linea'"]),
        (["~optimizer"], ["optimizer is missing"]),
        (["seed=${nothing}"], ["seed", "'nothing' not found"]),
        (["max_epochs=${max_seconds}", "seed=${max_seconds}"], ["seed is null", "${max_seconds}"]),
        (["optimizer.lr=0.1,0.2"], ["Ambiguous value", "[value1,value2]"]),
        (["steps"], ["'steps' is neither GROUP=CHOICE nor KEY=VALUE"]),
        (["hydra.run.dir=x"], ["have no effect"]),
        (["target.at_least=0.9"], ["set target.metric"]),
        (["data.local_batch_size=0"], ["data.local_batch_size is 0", ">= 1"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else "",
)
def test_a_mistake_is_told_with_what_there_is(overrides: list[str], parts: list[str]) -> None:
    told = message(*overrides)
    for part in parts:
        assert part in told
    assert "hydra.cc" not in told


def test_a_config_that_is_not_there_is_told() -> None:
    assert "there is no config named 'trian' (did you mean 'train'?)" in message(
        config_name="trian"
    )
    assert "which is no folder" in message(config_dir="nowhere")


def test_a_value_that_needs_quotes_is_told_how() -> None:
    given = "strategies=[sync,async strategy.overlap=true]"
    told = message(given)
    assert told.startswith(f"{given!r} cannot be read as KEY=VALUE; put quotes")
    assert "[sync,'async optimizer.lr=0.3']" in told
    compose(["strategies=[sync,'async optimizer.lr=0.3']"], config_name="compare")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["model=gpt"],
            ["GPT needs sequence_length and vocab_size", "in_features", "belong together"],
        ),
        (["data=stdlib_text", *SMALL_TEXT], ["MLP needs in_features and out_features"]),
        (["model=convnet", "data.as_images=false"], ["ConvNet needs channels"]),
        (
            ["target.metric=acuracy", "target.at_least=1"],
            ["did you mean 'accuracy'?", "loss, accuracy"],
        ),
        (["optimizer.lr=-1"], ["optimizer SGD: Invalid learning rate: -1"]),
        (["strategy=streaming_diloco", "strategy.fragments=9"], ["fragments is 9", "only 4 "]),
        (["lr_scheduler=cosine", "max_steps=null"], ["needs T_max", "set one"]),
        (["pipeline.schedule=GPipe"], ["pipeline is Pipeline(schedule='GPipe'", "mesh.pipe is 1"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else "",
)
def test_parts_that_do_not_fit_are_told(
    overrides: list[str], parts: list[str], link: Connection
) -> None:
    with pytest.raises(ConfigError) as error:
        build(compose([*SMALL, *overrides]), link)
    for part in parts:
        assert part in str(error.value)


class TestBatchSizes:
    def test_the_global_size_is_shared_by_replicas_and_accumulation(self) -> None:
        assert BatchSizes(global_batch_size=96).local(replicas=4, accumulation=2) == 12  # 96 / 8

    def test_a_size_that_does_not_divide_is_refused_with_the_nearest_that_do(self) -> None:
        with pytest.raises(ConfigError, match=r"100, which does not divide by 8 \(4 replicas x 2 "):
            BatchSizes(global_batch_size=100).local(replicas=4, accumulation=2)
        with pytest.raises(ConfigError, match="take 96 or 104"):
            BatchSizes(global_batch_size=100).local(replicas=4, accumulation=2)
        with pytest.raises(ConfigError, match="take 4$"):  # none below
            BatchSizes(global_batch_size=3).local(replicas=4, accumulation=1)

    def test_sizes_that_contradict_each_other_are_refused(self) -> None:
        sizes = BatchSizes(local_batch_size=32, global_batch_size=64)
        assert sizes.local(replicas=2, accumulation=1) == 32
        with pytest.raises(ConfigError, match=r"32 x 4 .* is not data.global_batch_size 64"):
            sizes.local(replicas=4, accumulation=1)

    def test_no_size_at_all_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="set data.local_batch_size"):
            BatchSizes().local(replicas=1, accumulation=1)


def test_on_the_command_line_one_of_two_alternatives_replaces_the_other() -> None:
    assert compose(["data.global_batch_size=64"]).data.local_batch_size is None
    assert compose(["max_epochs=2"]).max_steps is None
    both = compose(["max_epochs=2", "max_steps=7"])
    assert (both.max_epochs, both.max_steps) == (2, 7)


def test_an_experiment_gives_way_to_the_command_line() -> None:
    config = compose(["experiment=digits_convnet", "optimizer=sgd", "max_steps=3"])
    assert (config.optimizer.lr, config.max_steps, config.model.width) == (0.1, 3, 16)
    assert config.name == "digits_convnet-sync"


def test_a_part_can_be_a_factory_whose_arguments_are_set_like_any_other(link: Connection) -> None:
    config = compose([*SMALL, "strategy=diloco", "strategy.outer_optimizer.lr=0.5"])
    trainer, train, _ = build(config, link)
    assert trainer.fit(train, max_steps=50).step == 50
    outer = trainer.strategy.state_dict()["outer"][0]["updater"]["optimizer"]
    (settings,) = outer["param_groups"]
    assert (settings["lr"], settings["momentum"], settings["nesterov"]) == (0.5, 0.9, True)
    assert len(outer["state"]) == 4  # a momentum of each tensor: the one outer step was made
    assert check(OmegaConf.create(to_yaml(check(config)))) == check(config)
    trainer.close()
    assert "'strategy.outer_optimizer.lrr' (did you mean 'lr'?)" in message(
        "strategy=diloco", "+strategy.outer_optimizer.lrr=0.5"
    )


class TestShardedData:
    def test_trains_and_evaluates(self, link: Connection, tmp_path: Path) -> None:
        overrides = [*SMALL, *write_data(tmp_path), "max_steps=4", "data.local_batch_size=8"]
        trainer, train, test = build(compose(overrides), link)
        assert [p.shape for p in trainer.replica.parameters][-1] == (5,)
        result = trainer.fit(train, max_epochs=1, eval=test)
        assert result.step == 7  # 50 / 8
        assert set(result.evaluation) == {"loss", "accuracy"}
        trainer.close()

    @pytest.mark.parametrize("how", ["standardize", "{kind: whiten, method: pca, eps: 1e-3}"])
    def test_normalizes_also_test_data_with_the_training_datas_statistics(
        self, how: str, link: Connection, tmp_path: Path
    ) -> None:
        overrides = write_data(tmp_path / "train")
        [_, _, test_path, _] = write_data(tmp_path / "test", n=9)
        compute_statistics(tmp_path / "train", ["x"], covariance=["x"])
        paths = [*overrides, test_path, f"data.normalize={how}"]
        trainer, train, test = build(compose([*SMALL, *paths, "data.eval_batch_size=9"]), link)
        kind: Any = "standardize" if how == "standardize" else Normalization("whiten", "pca", 1e-3)
        expected = ShardedDataset(
            tmp_path / "test",
            normalize={"x": kind},
            statistics=ShardedDataset(tmp_path / "train").manifest.statistics,
        )
        assert test is not None
        [(x, _)] = list(test)
        assert torch.equal(x, expected[:]["x"])
        samples = torch.cat([x for x, _ in train])
        assert samples.mean(0).abs().max() < 1e-6
        trainer.close()

    def test_draws_classes_alike(self, link: Connection, tmp_path: Path) -> None:
        """Labels 0 to 3 once, and 4 of 496 samples: a fifth of the draws, 100 +- 5 * 9."""
        overrides = write_data(tmp_path)
        with ShardWriter(tmp_path, overwrite=True) as writer:
            labels = torch.full((500,), 4, dtype=torch.uint8)
            labels[:4] = torch.arange(4)
            writer.write_batch({"x": torch.randn(500, 6), "y": labels})
        _, train, test = build(compose([*SMALL, *overrides, "data.balance_classes=draws"]), link)
        assert 55 < sum(int((y == 4).sum()) for _, y in train) < 145
        assert test is not None
        assert sum(int((y == 4).sum()) for _, y in test) == 496, "tests see what is there"

    def test_weighs_rare_classes_more(self, tmp_path: Path) -> None:
        """3 samples of class 0 and 1 of class 1 weigh 4 / (2 * 3) and 4 / (2 * 1)."""
        with ShardWriter(tmp_path) as writer:
            writer.write_batch({"x": torch.zeros(4, 2), "y": [0, 0, 1, 0]})
        task = tasks.sharded(str(tmp_path), balance_classes="loss", n_classes=2)
        outputs, targets = torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 1])
        each = torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
        assert task.loss_fn is not None
        found = task.loss_fn(outputs, targets)
        assert found.item() == pytest.approx((each[0] * 2 / 3 + each[1] * 2).item() / 2)

    @pytest.mark.parametrize(
        ("override", "told"),
        [
            ("data.path=nowhere", "nowhere holds no data set"),
            ("data.normalize=standardize", "has no statistics; compute them once"),
            ("data.normalize=standardise", "one of 'zero_center', 'standardize', 'whiten'"),
            ("data.balance_classes=all", "one of 'draws', 'loss'"),
            ("data.targets=label", "no column 'label', only x, y"),
            ("data.n_classes=null", "MLP needs out_features, which data sharded does not say"),
            ("data.shuffle=yes please", "one of 'full', 'block', 'none'"),
            ("data.buffer_bytes=0", "buffer_bytes is 0"),
        ],
    )
    def test_a_mistake_is_told(
        self, override: str, told: str, link: Connection, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match=told):
            build(compose([*SMALL, *write_data(tmp_path), override]), link)

    def test_without_classes_there_is_nothing_to_balance(self, tmp_path: Path) -> None:
        write_data(tmp_path)
        with pytest.raises(ConfigError, match="loss 'mse' has no classes"):
            tasks.sharded(str(tmp_path), loss="mse", balance_classes="draws")
        with pytest.raises(ConfigError, match="path names several data sets"):
            tasks.sharded({str(tmp_path): 1.0}, balance_classes="draws")

    def test_several_have_no_statistics_together(self, tmp_path: Path) -> None:
        write_data(tmp_path)
        compute_statistics(tmp_path)
        with pytest.raises(ConfigError, match="each of which has statistics of its own"):
            tasks.sharded({str(tmp_path): 1.0}, normalize="standardize")

    def test_ragged_columns_are_refused_or_padded(self, link: Connection, tmp_path: Path) -> None:
        tokens = dict.fromkeys("xy", Column("int32", ragged=True))
        with ShardWriter(tmp_path, tokens) as writer:
            for i in range(1, 21):
                writer.write({"x": [1] * i, "y": [2] * i})
        with pytest.raises(ConfigError, match="column 'x' .* different lengths.* data.pad={x: 0}"):
            tasks.sharded(str(tmp_path))
        overrides = ["data=sharded", f"data.path={tmp_path}", "data.loss=next_token", "model=gpt",
                     "model.sequence_length=20", "data.n_classes=8", "data.pad={x: 0, y: 0}",
                     "data.bucket_by=x", "data.max_tokens=30"]  # fmt: skip
        trainer, train, _ = build(compose([*SMALL, *overrides]), link)
        sizes = [tuple(x.shape) for x, _ in train.batches(0)]
        assert sum(n for n, _ in sizes) == 20
        assert all(n * longest <= 30 for n, longest in sizes)
        assert trainer.fit(train, max_epochs=1).step == len(sizes)
        trainer.close()

    def test_several_are_mixed_without_an_end(self, link: Connection, tmp_path: Path) -> None:
        write_data(tmp_path / "a", n=50)
        overrides = [*write_data(tmp_path / "b", n=30),
                     f"data.path={{{tmp_path}/a: 3, {tmp_path}/b: 1}}"]  # fmt: skip
        trainer, train, _ = build(compose([*SMALL, *overrides]), link)
        # The 50 are 3/4 of 66.7: the 51st would come at position floor(p 3/4 + 1/2) = 51, p = 67.3
        assert len(train.dataset) == 67
        trainer.close()
        more = ["data.infinite=true", "data.stop=all_exhausted"]
        trainer, train, test = build(compose([*SMALL, *overrides, *more]), link)
        assert train.infinite
        assert len(train.dataset) > 67
        assert trainer.fit(train, max_steps=25, eval=test).step == 25
        trainer.close()


class TestOwnClasses:
    def test_in_place_of_every_choice(self, own: str, link: Connection) -> None:
        config = check(
            compose(
                [
                    *SMALL,
                    f"model={own}.Net",
                    "model.width=4",
                    "model.root=here",
                    f"strategy={own}.Strategy",
                    "strategy.patience=2",
                    f"optimizer={own}.Descent",
                    f"data={own}.noise",
                    "data.classes=7",
                    "data.local_batch_size=4",
                ]
            )
        )
        trainer, train, _ = build(config, link)
        assert [tuple(p.shape) for p in trainer.replica.parameters] == [(4, 5), (4,), (7, 4), (7,)]
        assert trainer.model.root == Path("here")
        assert trainer.strategy.patience == 2.0
        assert trainer.fit(train, max_epochs=1).step == 3  # 12 samples / 4
        trainer.close()
        assert check(OmegaConf.create(to_yaml(config))) == config

    def test_as_an_admission_policy(self, own: str, link: Connection) -> None:
        policy = [f"strategy/admission={own}.Admission", "strategy.admission.bound=3"]
        trainer, _, _ = build(compose([*SMALL, "strategy=async", *policy]), link)
        assert trainer.strategy.admission.bound == 3
        trainer.close()

    def test_in_a_folder_of_the_users(self, own: str, tmp_path: Path) -> None:
        (tmp_path / "configs" / "model").mkdir(parents=True)
        file = tmp_path / "configs" / "model" / "wide.yaml"
        file.write_text(f"_target_: {own}.Net\nwidth: 512\n")
        config = check(compose(["model=wide"], config_dir=tmp_path / "configs"))
        assert config.model == {"_target_": f"{own}.Net", "width": 512}

    def test_their_arguments_are_checked_by_their_own_signatures(self, own: str) -> None:
        told = message(f"model={own}.Net", "model.widht=3")
        assert "'model.widht' (did you mean 'width'?)" in told
        assert "model.width is 'x'" in message(f"model={own}.Net", "model.width=x")
        assert "needs strategy.patience" in message(f"strategy={own}.Strategy")

    def test_what_is_no_model_or_task_is_refused(self, own: str, link: Connection) -> None:
        with pytest.raises(ConfigError, match="returned a str; it must return a .*Task"):
            build(compose([f"data={own}.words"]), link)
        with pytest.raises(ConfigError, match="returned a str; it must return a torch.nn.Module"):
            build(compose([f"model={own}.words", "data.local_batch_size=8"]), link)


def test_the_learning_rate_follows_the_run_also_when_it_is_given_in_epochs(
    link: Connection,
) -> None:
    overrides = ["lr_scheduler=cosine", "max_epochs=2", "data.local_batch_size=512", *SMALL]
    trainer, train, _ = build(compose(overrides), link)
    assert trainer.fit(train, max_epochs=1).step == 3  # 1,437 samples / 512
    assert trainer.strategy.learning_rate == pytest.approx(0.05)  # half of 6 updates: half of 0.1
    trainer.fit(train, max_epochs=2)  # since training began
    assert trainer.strategy.learning_rate == pytest.approx(0.0)
    trainer.close()


def test_a_run_can_be_made_again_from_its_folder(tmp_path: Path, link: Connection) -> None:
    overrides = ["max_steps=4", "model.hidden=[16]", "slowdown.factors={3: 4.0}", *SMALL]
    first = run(compose(overrides), link, tmp_path)
    again = check(compose(config_name="config", config_dir=tmp_path))
    assert asdict(again.slowdown)["factors"] == {3: 4.0}
    assert again.model["in_features"] == 64  # complete
    second = run(again, link)
    assert second.evaluation == first.evaluation


class TestCommands:
    def call(self, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["scaledtrain", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    def test_help_shows_groups_keys_and_examples(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.call(monkeypatch, "--help") == 0
        assert "train " in capsys.readouterr().out
        assert self.call(monkeypatch, "train", "--help") == 0
        shown = capsys.readouterr().out
        assert "strategy/admission asynchronous, backup_workers" in " ".join(shown.split())
        assert "--config-dir" in shown
        assert "$" not in shown
        lines = [line.strip() for line in shown.splitlines()]
        examples = [line.split("  ")[0] for line in lines if line.startswith("scaledtrain ")]
        for example in examples[1:]:
            words = shlex.split(example)[2:]
            settings, sweeps = split_sweeps([word for word in words if word != "--multirun"])
            assert bool(sweeps) == ("--multirun" in words)
            check(compose([word for word in settings if "slowdown" not in word]))
        assert len(examples) == 6

    def test_cfg_prints_the_config(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.call(monkeypatch, "train", "--cfg", "job", "seed=7", "strategy=async") == 0
        printed = OmegaConf.create(capsys.readouterr().out)
        assert check(printed) == check(compose(["seed=7", "strategy=async"]))

    def test_version(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.call(monkeypatch, "--version") == 0
        assert capsys.readouterr().out == f"scaledtrain {scaledtrain.__version__}\n"

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["trian"], "error: there is no command 'trian' (did you mean 'train'?); commands: "),
            (
                ["train", "--cgf"],
                "error: unrecognized arguments: --cgf; see scaledtrain train --help",
            ),
            (["train", "modle=gpt"], "error: there is no key 'modle' (did you mean 'model'?)"),
            (["train", "workers=3", "data.global_batch_size=100"], "take 99 or 102"),
            (["train", "workers=0"], "error: workers is 0"),
            (["train", "workers=2", "mesh.replicate=3"], "error: mesh.replicate is 3"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_a_mistake_is_one_line_and_exit_code_2(
        self,
        arguments: list[str],
        told: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert self.call(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1


def test_flags_and_overrides_may_be_mixed() -> None:
    config = read_command_line(["seed=3", "-cn", "train", "max_steps=5"], "train", "train")
    assert config is not None
    assert (config.seed, config.max_steps) == (3, 5)


def test_workers_are_started_only_where_no_launcher_did(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers_to_start(None) == 0
    assert workers_to_start(1) == 0
    assert workers_to_start(4) == 4
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert workers_to_start(2) == 0
    with pytest.raises(ConfigError, match="workers is 4, but a launcher .* one of 2"):
        workers_to_start(4)


def test_the_optimizers_are_fused_by_default(link: Connection) -> None:
    for choice in ("sgd", "adamw"):
        trainer, _, _ = build(compose([f"optimizer={choice}", *SMALL]), link)
        optimizer = trainer.replica.updater(
            [torch.nn.Parameter(p) for p in trainer.replica.parameters]
        )
        assert optimizer.optimizer.defaults["fused"] is True
        trainer.close()
