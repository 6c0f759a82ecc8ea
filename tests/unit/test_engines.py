"""What Accelerate's files and DeepSpeed's files say in our words, and what of it is refused."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scaledtrain import Trainer, connect
from scaledtrain.command_line import compose
from scaledtrain.config import check
from scaledtrain.data.steps import StepBatch
from scaledtrain.errors import ConfigError
from scaledtrain.loss_scale import LossScale
from scaledtrain.parallel import FullyShard
from scaledtrain.parallel.accelerate import with_accelerate, words_of_environment
from scaledtrain.parallel.deepspeed import swapping as swapping_module
from scaledtrain.parallel.deepspeed.engine import DeepSpeed
from scaledtrain.parallel.deepspeed.settings import BatchCheck, check_optimizer, ds_config
from scaledtrain.parallel.deepspeed.swapping import prepare_swapping
from scaledtrain.parallel.deepspeed.zero import ZeroScaler
from scaledtrain.parallel.engine import Engine, Recipe
from scaledtrain.precision import Precision
from scaledtrain.replica import Replica

CPU_FILE = """
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MULTI_CPU
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 4
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: true
"""
DEEPSPEED_FILE = """
compute_environment: LOCAL_MACHINE
deepspeed_config:
  gradient_accumulation_steps: 4
  gradient_clipping: 1.0
  offload_optimizer_device: cpu
  offload_param_device: none
  zero3_init_flag: false
  zero_stage: 3
distributed_type: DEEPSPEED
mixed_precision: 'no'
num_machines: 1
num_processes: 2
"""
FSDP_FILE = """
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_reshard_after_forward: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: Block
  fsdp_state_dict_type: SHARDED_STATE_DICT
dynamo_config: {dynamo_backend: INDUCTOR, dynamo_mode: default}
num_processes: 2
mixed_precision: fp16
"""


def words(tmp_path: Path, text: str, *own: str, env: dict[str, str] | None = None) -> list[str]:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return with_accelerate([f"accelerate={file}", *own], env or {})


def test_a_file_of_accelerate_config_is_said_in_our_words(tmp_path: Path) -> None:
    found = words(tmp_path, CPU_FILE, "max_steps=3")
    assert found == ["precision=bf16-mixed", "workers=4", "device=cpu", "max_steps=3"]
    config = check(compose(words(tmp_path, DEEPSPEED_FILE, "optimizer=adamw")))
    assert config.workers == config.mesh.shard == 2
    assert config.gradient_accumulation_steps == 4
    assert config.max_grad_norm == 1.0
    assert config.engine is not None
    assert config.engine["zero_stage"] == 3
    assert config.engine["offload"] == "cpu"
    config = check(compose(words(tmp_path, FSDP_FILE)))
    assert config.engine is not None
    assert config.engine["reshard_after_forward"] is False
    assert config.engine["block_classes"] == ["Block"]
    assert (config.precision.name, config.compile) == ("fp16-mixed", "inductor")


def test_the_command_line_counts_more_than_the_file(tmp_path: Path) -> None:
    found = words(tmp_path, CPU_FILE, "precision=fp32", "workers=2")
    assert found == ["device=cpu", "precision=fp32", "workers=2"]
    # Whoever launched the ranks has said how many there are.
    launched = {"RANK": "0", "WORLD_SIZE": "2"}
    assert words(tmp_path, CPU_FILE, env=launched) == ["precision=bf16-mixed", "device=cpu"]


def test_what_accelerate_launch_leaves_in_the_environment() -> None:
    plain = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_CPU": "False",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    }
    assert words_of_environment(plain) == []
    deepspeed = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
        "WORLD_SIZE": "8",
    }
    assert words_of_environment({**plain, **deepspeed}) == [
        "gradient_accumulation_steps=2",
        "mesh.shard=8",
        "engine=deepspeed",
        "engine.zero_stage=1",
    ]


NVME_FILE = """
distributed_type: DEEPSPEED
deepspeed_config:
  offload_optimizer_device: nvme
  offload_optimizer_nvme_path: /disk
  offload_param_device: nvme
  offload_param_nvme_path: /disk
  zero_stage: 3
num_processes: 2
"""


def test_a_file_of_accelerate_config_names_a_disk(tmp_path: Path) -> None:
    config = check(compose(words(tmp_path, NVME_FILE, "optimizer=adamw")))
    assert config.engine is not None
    assert (config.engine["offload"], config.engine["offload_parameters"]) == ("nvme", "nvme")
    assert config.engine["nvme_path"] == Path("/disk")
    assert words_of_environment(
        {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme",
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": "/disk",
        }
    ) == ["mesh.shard=1", "engine=deepspeed", "engine.offload=nvme", "engine.nvme_path=/disk"]


NVME = "distributed_type: DEEPSPEED\ndeepspeed_config:\n  offload_"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{NVME}optimizer_device: disk\n", "optimizer_device is 'disk'.*none, cpu, nvme"),
        (
            f"{NVME}optimizer_nvme_path: /a\n  offload_param_nvme_path: /b\n",
            "two folders for NVMe.*nvme_path=/a, engine.nvme_path=/b",
        ),
        ("distributed_type: MEGATRON_LM\n", "distributed_type is MEGATRON_LM"),
        ("distributed_type: 'NO'\nmixed_precision: fp8\n", "mixed_precision is 'fp8'.*no, bf16"),
        ("distributed_type: 'NO'\nnum_machines: 2\n", "num_machines is 2.*torchrun"),
        ("distributed_type: 'NO'\nnum_proceses: 2\n", "num_proceses is 2.*no counterpart"),
        ("workers: 2\n", "no file of `accelerate config`"),
        ("{", "cannot be read"),
    ],
)
def test_what_has_no_counterpart_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        words(tmp_path, text)


def recipe(**options: Any) -> Recipe:
    precision = Precision(**options.pop("precision", {}))
    return Recipe(precision, partial(torch.optim.SGD, lr=0.1), True, **options)


def config_of(source: Path | None = None, **options: Any) -> dict[str, Any]:
    words = {"zero_stage": None, "offload": None, "offload_parameters": False, "nvme_path": None}
    sizes = {"n_elements": 100, "largest_part": 40}
    ours = {**words, **sizes}
    own = {name: options.pop(name) for name in list(options) if name in ours}
    return ds_config(source, recipe(**options), **{**ours, **own})


@pytest.mark.parametrize(
    ("section", "offloads"),
    [
        ({}, False),
        ({"offload_optimizer": {"device": "none"}, "offload_param": None}, False),
        ({"offload_param": {"device": "auto"}}, False),
        ({"offload_optimizer": {"device": "cpu"}}, True),
    ],
)
def test_one_rank_may_have_what_offloads(
    section: dict[str, Any], offloads: bool, tmp_path: Path
) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({"zero_optimization": section}))
    assert DeepSpeed(config=path).offloads is offloads
    if not offloads:
        refuse(DeepSpeed(config=path), r"mesh.shard is 1: .* and offloads nothing")


def refuse(engine: Engine, message: str, **options: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(
            torch.nn.Linear(1, 1), None, torch.optim.SGD, engine=engine, console=False, **options
        )
    assert not torch.distributed.is_initialized()


def test_one_rank_has_no_engine_that_does_nothing() -> None:
    assert DeepSpeed(offload_parameters=True).offloads
    refuse(FullyShard(), r"mesh.shard is 1: .* and offloads nothing; .*engine.offload")
    # What is refused later, with a process group, leaves none.
    refuse(FullyShard(offload=True), "the model is in the host's memory already")
    refuse(DeepSpeed(offload="cpu"), "compile is 'eager'", compile="eager")


def test_jobs_of_one_process_share_a_process_group_up_to_the_last() -> None:
    with connect(device="cpu") as first:
        first.process_group()
        second = connect(device="cpu")
        assert second.transport == "local"
        second.process_group()
    assert torch.distributed.is_initialized()
    second.close()
    assert not torch.distributed.is_initialized()


def test_our_words_become_deepspeeds() -> None:
    assert config_of()["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 100}
    for way in (True, "cpu"):
        found = config_of(zero_stage=3, offload="cpu", offload_parameters=way)["zero_optimization"]
        assert found == {
            "stage": 3,
            "reduce_bucket_size": 100,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
        }
    nvme = config_of(zero_stage=3, offload="nvme", offload_parameters="nvme", nvme_path="/disk")
    assert nvme["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 100,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/disk"},
        "offload_param": {
            "device": "nvme",
            "nvme_path": "/disk",
            "buffer_size": 40,  # the largest that goes through one
            "max_in_cpu": 0,
        },
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    large = config_of(n_elements=7 * 10**9)["zero_optimization"]
    assert large["reduce_bucket_size"] == 500_000_000  # DeepSpeed's own
    mixed = config_of(precision={"name": "bf16-mixed"})
    assert mixed["torch_autocast"]["dtype"] == "bfloat16"
    scale = LossScale(initial=1024.0, growth_interval=7)
    half = config_of(precision={"name": "fp16-true", "loss_scale": scale})["fp16"]
    assert half == {
        "enabled": True,
        "initial_scale_power": 10,  # 2^10 = 1024
        "loss_scale_window": 7,
        "min_loss_scale": 1.0,
        "hysteresis": 1,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_stage": 4}, "engine.zero_stage is 4"),
        ({"offload": "disk"}, "'disk'.*cpu, or nvme"),
        ({"offload": "nvme", "nvme_path": "/disk"}, "offload is nvme.*zero_stage is 2.*stage 3"),
        ({"zero_stage": 3, "offload": "nvme"}, "nvme, but not into which folder.*nvme_path"),
        (
            {"zero_stage": 3, "offload_parameters": "nvme"},
            "offload_parameters is nvme.*which folder",
        ),
        ({"zero_stage": 3, "offload": "cpu", "nvme_path": "/disk"}, "nvme_path is /disk.*nothing"),
        ({"zero_stage": 2, "offload_parameters": True}, "take stage 3"),
        ({"precision": {"name": "fp16-mixed"}}, "precision=fp16-true"),
        ({"precision": {"name": "bf16-true"}}, "stochastic.*precision.update=master"),
        (
            {"precision": {"name": "fp16-true", "loss_scale": LossScale(initial=1000.0)}},
            "power of two",
        ),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**options)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"gradient_accumulation_steps": 4}, {}, "says 4 .* gradient_accumulation_steps=1 says"),
        ({"gradient_clipping": 1.0}, {}, "says 1.0 .* max_grad_norm=null"),
        ({"gradient_clipping": 1.0}, {"max_grad_norm": 0.5}, "says 1.0 .* max_grad_norm=0.5"),
        ({"zero_optimization": {"stage": 1}}, {"zero_stage": 3}, "says 1 .* engine.zero_stage=3"),
        ({"bf16": {"enabled": True}}, {}, "bf16.enabled=True .* precision=fp32"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "lr_scheduler"),
        ({"zero_optimisation": {}}, {}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"mics_shard_size": 2}}, {}, "say mesh.shard"),
        ({"zero_optimization": {"round_robin_gradients": True}}, {}, "not where DeepSpeed says"),
        (
            {"zero_optimization": {"cpu_offload_param": True}},
            {},
            "cpu_offload_param, which DeepSpeed has given up; say .offload_param.: ",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            {"offload": "cpu"},
            "says 'nvme' .* engine.offload='cpu'",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "none"}}},
            {"offload": "cpu"},
            "says 'none' .* engine.offload='cpu'",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            {"offload_parameters": "nvme"},
            "says 'cpu' .* engine.offload_parameters='nvme'",
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "nvme", "nvme_path": "/a"},
                }
            },
            {"nvme_path": "/b"},
            "says '/a' .* engine.nvme_path='/b'",
        ),
    ],
)
def test_a_file_that_says_something_else_is_refused(
    tmp_path: Path, content: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        config_of(file, **options)


def test_a_file_that_agrees_is_passed_on(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    content = {
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0,
        "wall_clock_breakdown": True,
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "sub_group_size": 1000},
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": 0.9}},
    }
    file.write_text(json.dumps(content))
    made = config_of(file, max_grad_norm=1.0)
    assert made["wall_clock_breakdown"] is True
    assert made["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 100,  # all parameters
        "sub_group_size": 1000,
    }
    content["zero_optimization"] = {"reduce_bucket_size": 7}
    file.write_text(json.dumps(content))
    zero = config_of(file, max_grad_norm=1.0)["zero_optimization"]
    assert zero == {"stage": 2, "reduce_bucket_size": 7}
    optimizer = {"device": "nvme", "nvme_path": "/disk", "pipeline_read": True}
    parameters = {"device": "nvme", "nvme_path": "/other", "buffer_size": 50}
    ahead = {"stage3_max_reuse_distance": 5, "stage3_prefetch_bucket_size": 6}
    nowhere = {"device": "none"}
    content["zero_optimization"] = {
        "stage": 3,
        "offload_optimizer": {**optimizer, "buffer_count": None},  # as if it were not there
        "offload_param": parameters,
        **ahead,
    }
    content["aio"] = {"queue_depth": 16}
    file.write_text(json.dumps(content))
    of_file = config_of(file, max_grad_norm=1.0)
    assert of_file["aio"] == {"queue_depth": 16}
    assert of_file["zero_optimization"]["offload_optimizer"] == optimizer
    assert of_file["zero_optimization"]["offload_param"] == parameters
    assert {name: of_file["zero_optimization"][name] for name in ahead} == ahead
    content["zero_optimization"] = {"offload_optimizer": nowhere, "offload_param": nowhere}
    file.write_text(json.dumps(content))
    zero = config_of(file, max_grad_norm=1.0)["zero_optimization"]
    assert zero == {"stage": 2, "reduce_bucket_size": 100}
    assert made["gradient_clipping"] == 0.0  # that is done here, over all ranks
    parameters = torch.nn.Linear(2, 1).parameters()
    check_optimizer(file, torch.optim.SGD(parameters, lr=3.0, momentum=0.9))
    with pytest.raises(ConfigError, match="optimizer.momentum=0.9 .* optimizer.momentum=0.5"):
        check_optimizer(file, torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), momentum=0.5))
    with pytest.raises(ConfigError, match="type=SGD .* optimizer=AdamW"):
        check_optimizer(file, torch.optim.AdamW(torch.nn.Linear(2, 1).parameters()))
    check_batch = BatchCheck(file, recipe())
    check_batch(StepBatch([None], [3], 0.375, 3), 2)  # the end of an epoch says nothing
    with pytest.raises(ConfigError, match="says 8 .* data.local_batch_size=4"):
        check_batch(StepBatch([None], [4], 1.0, 4), 2)


def test_a_norm_that_is_not_finite_clips_nothing() -> None:
    model = torch.nn.Linear(2, 1)
    replica = Replica(model, partial(torch.optim.SGD, lr=0.1))
    weight, bias = replica.parameters
    weight.grad, bias.grad = torch.tensor([[math.inf, 3.0]]), torch.tensor([4.0])
    scaler = ZeroScaler(SimpleNamespace(fp16_enabled=lambda: False), None)  # type: ignore[arg-type]
    finite, norm = scaler.check_and_clip(replica, 1.0, measure=False)
    assert (finite, norm) == (True, math.inf)
    assert (weight.grad.tolist(), bias.grad.tolist()) == ([[math.inf, 3.0]], [4.0])
    weight.grad = torch.tensor([[0.0, 3.0]])  # sqrt(3^2 + 4^2) = 5
    assert scaler.check_and_clip(replica, 1.0, measure=False) == (True, 5.0)
    assert weight.grad[0, 1].item() == pytest.approx(0.6, rel=1e-5)


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'scaledtrain\[deepspeed\]'"):
        group: Any = SimpleNamespace(size=lambda: 1)
        DeepSpeed().apply([torch.nn.Linear(2, 1)], group, recipe())


class Operators:
    """DeepSpeed's, on a host on which they can, or cannot, be compiled."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def AsyncIOBuilder(self) -> Operators:
        return self

    def load(self, verbose: bool) -> None:
        if self._error is not None:
            raise self._error


def replace_operators(patch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
    patch.setitem(sys.modules, "deepspeed.ops.op_builder", Operators(error))  # type: ignore[misc]


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    tried = tmp_path / "tried"
    try:
        os.close(os.open(tried, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except (AttributeError, OSError) as error:
        pytest.skip(f"files cannot go past the system's cache here: {error}")
    tried.unlink()
    replace_operators(monkeypatch)
    return monkeypatch


def swapping(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "offload_optimizer": {"device": "nvme", "nvme_path": str(folder), **options},
        "offload_param": {"device": "nvme", "nvme_path": str(folder), "buffer_size": 8},
    }


def matrix(rows: int, columns: int) -> torch.nn.Linear:
    """Which takes no memory."""
    return torch.nn.Linear(columns, rows, bias=False, device="meta")


def prepare(
    zero: dict[str, Any],
    optimizer: Any,
    files: ExitStack,
    model: torch.nn.Module | None = None,
    aio: dict[str, Any] | None = None,
) -> None:
    group: Any = SimpleNamespace(size=lambda: 1)
    config = {"zero_optimization": zero, "aio": aio}
    prepare_swapping(config, model or matrix(5, 2), optimizer, group, files)


@pytest.mark.parametrize(
    ("optimizer", "options", "buffers"),
    [
        # The parameters, their gradient, and: m, v; momentum; nothing; m, v, the largest v.
        (torch.optim.AdamW, {}, 4),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), {}, 3),
        (partial(torch.optim.SGD, lr=0.1), {}, 2),
        (partial(torch.optim.AdamW, amsgrad=True), {}, 5),
        (torch.optim.AdamW, {"pipeline_read": True}, 8),
        (torch.optim.AdamW, {"pipeline_read": True, "pipeline_write": True}, 12),
        (torch.optim.AdamW, {"buffer_count": 6}, 6),
        (torch.optim.AdamW, {"buffer_count": 1e1}, 10),
    ],
)
def test_each_process_has_its_own_folder_and_enough_buffers(
    optimizer: Any,
    options: dict[str, Any],
    buffers: int,
    tmp_path: Path,
    operators: pytest.MonkeyPatch,
) -> None:
    zero = swapping(tmp_path, **options)
    with ExitStack() as files:
        prepare(zero, optimizer, files)
        (own,) = tmp_path.iterdir()
        assert {Path(zero[name]["nvme_path"]) for name in swapping(tmp_path)} == {own}
        count = zero["offload_optimizer"]["buffer_count"]
        assert (count, type(count)) == (buffers, int)
    assert list(tmp_path.iterdir()) == []


def test_two_paths_are_two_folders(tmp_path: Path, operators: pytest.MonkeyPatch) -> None:
    zero = swapping(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    zero["offload_param"]["nvme_path"] = str(other)
    with ExitStack() as files:
        prepare(zero, torch.optim.AdamW, files)
        assert Path(zero["offload_optimizer"]["nvme_path"]).parent == tmp_path
        assert Path(zero["offload_param"]["nvme_path"]).parent == other


class Owner(torch.nn.Module):
    """Has two matrices of its own, three in a list, and one in a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = matrix(512, 512).weight, matrix(512, 512).weight
        self.others = torch.nn.ParameterList(matrix(512, 512).weight for _ in range(3))
        self.inside = matrix(512, 512)


LSTM = torch.nn.LSTM(512, 512, num_layers=4, device="meta")
EIGHT = torch.nn.Sequential(*(matrix(512, 512) for _ in range(8)))


@pytest.mark.parametrize(
    ("model", "aio", "buffers"),
    [
        (EIGHT, None, 5),  # one after the other
        (torch.nn.Sequential(Owner(), Owner()), None, 6),  # of one of them
        (LSTM, None, 8),  # two of 4 x 512 x 512 for each layer
        (LSTM, {"block_size": 1 << 22}, 8),  # they have 4 MiB
        (LSTM, {"block_size": 1 << 23}, 5),
    ],
)
def test_what_a_module_computes_with_has_buffers(
    model: torch.nn.Module,
    aio: dict[str, Any] | None,
    buffers: int,
    tmp_path: Path,
    operators: pytest.MonkeyPatch,
) -> None:
    operators.setattr(swapping_module, "_can_lock", lambda _: True)
    with ExitStack() as files:
        zero = swapping(tmp_path)
        prepare(zero, torch.optim.AdamW, files, model, aio)
        assert zero["offload_param"]["buffer_count"] == buffers
        if buffers > 5:
            zero["offload_param"]["buffer_count"] = buffers - 1
            message = f"offload_param.buffer_count is {buffers - 1}, .* need {buffers};"
            with pytest.raises(ConfigError, match=message):
                prepare(zero, torch.optim.AdamW, files, model, aio)


class Forgetful(torch.optim.SGD):
    """Keeps a new tensor after each step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["before"] = parameter.detach().clone()


def by_name(named_parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([dict(named_parameters)["weight"]], lr=0.1)


def unknown_name(named_parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([dict(named_parameters)["head"]], lr=0.1)


def test_the_optimizer_is_tried_out_on_the_models_names(
    tmp_path: Path, operators: pytest.MonkeyPatch
) -> None:
    zero = swapping(tmp_path)
    with ExitStack() as files:
        prepare(zero, by_name, files)
    assert zero["offload_optimizer"]["buffer_count"] == 2


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (torch.optim.Adagrad, {}, "Adagrad makes its state before .*take another"),
        (Forgetful, {}, "Forgetful makes its state .*anew"),
        (unknown_name, {}, "tried out .* fails .KeyError: 'head'"),
        (torch.optim.AdamW, {"buffer_count": 3}, "buffer_count is 3, .* need 4"),
        (torch.optim.AdamW, {"buffer_count": "many"}, "buffer_count is 'many' .*whole number"),
        (torch.optim.AdamW, {"buffer_count": 4.5}, "buffer_count is 4.5 .*whole number"),
        (torch.optim.AdamW, {"nvme_path": "/no/such/folder"}, "nvme_path is /no/such/folder"),
        (torch.optim.AdamW, {"nvme_path": "/proc"}, "nvme_path is /proc.*may write"),
    ],
)
def test_what_cannot_be_kept_in_files_is_refused(
    optimizer: Any,
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
    operators: pytest.MonkeyPatch,
) -> None:
    zero = swapping(tmp_path, **options)
    with ExitStack() as files, pytest.raises(ConfigError, match=message):
        prepare(zero, optimizer, files)
    assert list(tmp_path.iterdir()) == []


def test_files_need_linux_and_buffers_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_operators(monkeypatch)
    with ExitStack() as files:
        monkeypatch.setattr(sys, "platform", "linux")
        with pytest.raises(ConfigError, match="aio.use_gds is true .*remove it"):
            prepare(swapping(tmp_path), torch.optim.AdamW, files, aio={"use_gds": True})
        monkeypatch.setattr(sys, "platform", "darwin")
        with pytest.raises(ConfigError, match="needs Linux, but this is darwin"):
            prepare(swapping(tmp_path), torch.optim.AdamW, files)


def test_files_need_a_compiler_and_libaio(tmp_path: Path, operators: pytest.MonkeyPatch) -> None:
    def refused(error: Exception, message: str) -> None:
        replace_operators(operators, error)
        with ExitStack() as files, pytest.raises(ConfigError, match=message):
            prepare(swapping(tmp_path), torch.optim.AdamW, files)

    refused(
        RuntimeError("Unable to JIT load the async_io op\nand so on"),
        r"load the async_io op\).*libaio-dev.*ninja",
    )
    refused(AttributeError("no such name"), r"no such name\).*libaio-dev")
    assert list(tmp_path.iterdir()) == []
    replace_operators(operators, TypeError("expected str, bytes or os.PathLike, not NoneType"))
    operators.setattr(torch.cuda, "is_available", lambda: True)
    operators.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    with pytest.raises(ConfigError, match="CUDA_HOME is not set"):
        swapping_module._load_operator()


def test_files_need_page_locked_memory_for_what_is_trained(
    tmp_path: Path, operators: pytest.MonkeyPatch
) -> None:
    operators.setattr(swapping_module, "_can_lock", lambda n_bytes: False)
    model = torch.nn.Sequential(matrix(10, 20), matrix(30, 10), matrix(10, 30), matrix(1000, 10))
    model[3].requires_grad_(False)

    def refused(**options: Any) -> str:
        zero = {**swapping(tmp_path), **options}
        with ExitStack() as files, pytest.raises(ConfigError) as caught:
            prepare(zero, torch.optim.AdamW, files, model)
        return str(caught.value)

    # 4 buffers for the optimizer, 5 for parameters, and all parameters of a sub-group once, of 4
    # bytes: 4 x 800 + 5 x 8 + 800 = 4040
    assert "16160 bytes of page-locked" in refused()
    # At most 100, and one of 300 with which they are more: 4 x 400 + 5 x 8 + 400 = 2040
    told = refused(sub_group_size=1e2)
    assert "8160 bytes of page-locked" in told
    assert "ulimit" in told


NOBODY_ELSE = 77  # exit status, where root cannot become another user


def lock_with_limit() -> None:
    """What a process may lock that has no rights, and a limit of 64 KiB."""
    try:
        if os.getuid() == 0:
            os.setuid(65534)
    except OSError:
        os._exit(NOBODY_ELSE)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
    assert swapping_module._can_lock(1 << 13)
    assert not swapping_module._can_lock(1 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="locks as Linux does")
def test_the_kernel_says_what_may_be_locked() -> None:
    child = multiprocessing.get_context("fork").Process(target=lock_with_limit)
    child.start()
    child.join()
    status = child.exitcode
    child.close()
    if status == NOBODY_ELSE:
        pytest.skip("there is no user without rights here")
    assert status == 0


def test_parameters_in_files_have_no_sum() -> None:
    replica = Replica(torch.nn.Linear(2, 1), torch.optim.AdamW, in_memory=False)
    with pytest.raises(ConfigError, match="in files.*full_state_dict"):
        replica.sha256()
