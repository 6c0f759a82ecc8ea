"""The command that looks at checkpoints; weights in and out; what launch/slurm.sh does."""

from __future__ import annotations

import json
import os
import re
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from scaledtrain import Checkpointing, Trainer
from scaledtrain.checkpoint.export import export, model_state, newest_intact
from scaledtrain.checkpoint.folder import Manifest
from scaledtrain.checkpoint.part import CheckpointReader, Owner, Part, files_of
from scaledtrain.checkpoint.program import export_program
from scaledtrain.checkpoint.weights import load_weights
from scaledtrain.checkpoints import run
from scaledtrain.command_line import compose
from scaledtrain.config import check
from scaledtrain.connection import connect
from scaledtrain.errors import ConfigError
from scaledtrain.train import run as train

ROOT = Path(__file__).parents[2]


class Config:
    """As transformers has it."""

    def to_json_string(self) -> str:
        return '{"model_type": "tiny"}'


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.inside = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight = self.inside.weight  # tied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inside(x))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run with two checkpoints, of steps 2 and 3."""
    torch.manual_seed(0)
    options = Checkpointing(every_steps=2)
    sgd = partial(torch.optim.SGD, lr=0.1)
    run_dir = tmp_path / "run"
    with Trainer(
        Tiny(), F.mse_loss, sgd, run_dir=run_dir, checkpointing=options, console=False
    ) as trainer:
        trainer.fit([(torch.ones(4, 2), torch.zeros(4, 2))] * 3, max_steps=3)
    return run_dir


def test_list_and_verify(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", str(saved)]) == run(["verify", str(saved)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "step-000000002" in lines[0]
    assert "1 rank  Tiny, Sync" in lines[1]
    assert lines[2:] == ["step-000000002  intact", "step-000000003  intact"]
    damaged = saved / "checkpoints" / "step-000000003" / "rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert run(["verify", str(saved)]) == 1
    assert "instead of" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="has no checkpoint"):
        run(["list", str(saved / "nowhere")])


def test_diff(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two, three = sorted((saved / "checkpoints").glob("step-*"))
    assert run(["diff", str(two), str(two)]) == 0
    assert re.fullmatch(
        r"0 of \d+ tensors and 0 of \d+ other values differ\n", capsys.readouterr().out
    )
    assert run(["diff", str(two), str(three)]) == 1
    told = capsys.readouterr().out
    assert "model/inside.bias  differs by at most" in told
    assert "rank-00000/strategy/step  2 and 3\n" in told


def test_export_is_what_from_pretrained_reads(saved: Path, tmp_path: Path) -> None:
    assert run(["export", str(saved), str(tmp_path / "out")]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(weights) == ["head.weight", "inside.bias", "inside.weight"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "model_type": "tiny",
        "architectures": ["Tiny"],
    }
    for source in (tmp_path / "out", saved, saved / "checkpoints" / "step-000000003"):
        model = Tiny()
        load_weights(model, source)
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="is there already"):
        export(saved / "checkpoints" / "step-000000003", tmp_path / "out")


def test_where_replicas_differ_their_mean_is_exported(tmp_path: Path) -> None:
    """Of 1 and 4: 2.5. A count is the first one's."""
    for rank, value in enumerate([1.0, 4.0]):
        state = {"model": {"w": torch.tensor([value]), "n": torch.tensor(rank)}}
        Part(Owner(rank, 2, rank), state).write(tmp_path)
    files = {**files_of(tmp_path, 0), **files_of(tmp_path, 1)}
    Manifest(7, [0, 1], files).write(tmp_path)
    state = model_state(CheckpointReader(tmp_path))
    assert (state["w"].item(), state["n"].item()) == (2.5, 0)


def test_others_weights(tmp_path: Path) -> None:
    """In two files, of tied weights one only."""
    given = {"inside.weight": torch.ones(2, 2), "inside.bias": torch.full((2,), 3.0)}
    for name, tensor in given.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in given}}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    model = Tiny()
    load_weights(model, tmp_path)
    assert model.inside.bias.tolist() == [3.0, 3.0]
    assert model.head.weight is model.inside.weight
    assert model.head.weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    with pytest.raises(ConfigError, match=r"lacks head\.weight, inside\.weight, .* no nothing"):
        load_weights(Tiny(), tmp_path / "inside.bias.safetensors")
    load_weights(model, tmp_path / "inside.bias.safetensors", partial=True)
    save_file({"inside.bias": torch.ones(3)}, tmp_path / "wrong.safetensors")
    with pytest.raises(ConfigError, match=r"inside\.bias is of shape \(3,\)"):
        load_weights(model, tmp_path / "wrong.safetensors", partial=True)
    path.write_text(json.dumps({"weight_map": {"inside.bias": "../elsewhere.safetensors"}}))
    with pytest.raises(ConfigError, match="names a file elsewhere"):
        load_weights(model, tmp_path)
    path.write_text("no json")
    with pytest.raises(ConfigError, match="is damaged"):
        load_weights(model, tmp_path)
    with pytest.raises(ConfigError, match="no safetensors file that can be read"):
        load_weights(model, path)


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "module._orig_mod.", ""])
def test_names_of_wrappers_are_understood(prefix: str, tmp_path: Path) -> None:
    given = {"inside.weight": torch.ones(2, 2), "inside.bias": torch.full((2,), 3.0)}
    save_file({prefix + name: tensor for name, tensor in given.items()}, tmp_path / "a.safetensors")
    bare, wrapped = Tiny(), nn.ModuleDict({"model": Tiny()})
    for model in (bare, wrapped):
        load_weights(model, tmp_path / "a.safetensors")
        assert all(p.flatten()[0] == (3.0 if p.dim() == 1 else 1.0) for p in model.parameters())
    save_file({"inside.bias": torch.ones(2), "model.inside.bias": torch.ones(2)}, tmp_path / "b")
    with pytest.raises(ConfigError, match=r"two tensors for inside\.bias, one of them as model"):
        load_weights(bare, tmp_path / "b", partial=True)


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(
            ConfigError, match=r"pytorch_model\.bin is a pickle, which can run code"
        ):
            load_weights(Tiny(), path)
    with pytest.raises(ConfigError, match="has no checkpoint"):
        run(["export", str(tmp_path), str(tmp_path / "out")])


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class Drawing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


def test_a_model_is_exported_as_a_program(tmp_path: Path) -> None:
    """In eval mode, for any number of samples, also if the example has one."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9))
    for number, batch in enumerate([(torch.ones(1, 2), None), {"input": torch.ones(3, 2)}]):
        of = model if number == 0 else model[0]
        program = torch.export.load(export_program(of, batch, tmp_path / str(number))).module()
        x = torch.randn(5, 2)
        assert torch.equal(program(x) if number == 0 else program(input=x), model[0](x))
    assert model.training
    for wrong, why in ((Branching(), "cannot be exported as a program"), (Drawing(), "draw at")):
        with pytest.raises(ConfigError, match=why):
            export_program(wrong, torch.ones(3, 2), tmp_path)
    with pytest.raises(ConfigError, match="first dims are"):
        export_program(model, (torch.tensor(1.0),), tmp_path)
    with pytest.raises(ConfigError, match="is there already"):
        export_program(model, torch.ones(3, 2), tmp_path / "0")
    assert not list(tmp_path.glob("*model.pt2"))


def test_a_run_of_the_command_goes_out_as_a_program_and_comes_in_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model.hidden=[4]", "console=false", "checkpointing=steps", "max_steps=2"]
    with connect() as link:
        first = train(check(compose(words, "train")), link, tmp_path / "run")
        assert run(["export", "--program", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
        again = [*words[:2], f"init_from={tmp_path / 'out'}", "max_steps=1", "optimizer.lr=1e-30"]
        second = train(check(compose(again, "train")), link, tmp_path / "again")
    assert capsys.readouterr().out.split()[-2] == str(tmp_path / "out" / "model.pt2")
    assert second.evaluation == first.evaluation


def fake(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (1, False)])
def test_a_slurm_job_that_was_saved_is_queued_again(
    code: int, requeued: bool, tmp_path: Path
) -> None:
    fake(tmp_path, "srun", f'echo "$@" > {tmp_path}/srun.txt; exit {code}')
    fake(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/scontrol.txt')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12"}
    command = [str(ROOT / "launch" / "slurm.sh"), "strategy=async"]
    done = subprocess.run(command, env=environment, check=False, timeout=30)
    assert done.returncode == (0 if requeued else code)
    assert (tmp_path / "srun.txt").read_text().split()[-5:] == [
        "scaledtrain.train",
        "checkpointing=minutes",
        "strategy=async",
        "run_dir=runs/slurm-12",
        "resume=auto",
    ]
    assert (tmp_path / "scontrol.txt").exists() is requeued


def test_models_of_hugging_face_go_out_and_come_in(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 16, "n_positions": 8}
    config = transformers.GPT2Config(**sizes, use_cache=False, bos_token_id=0, eos_token_id=0)
    ids = torch.arange(8).reshape(2, 4)
    batch = {"input_ids": ids, "labels": ids}
    sgd, options = partial(torch.optim.SGD, lr=0.1), Checkpointing(every_steps=2)
    model = transformers.GPT2LMHeadModel(config)
    with Trainer(
        model, None, sgd, run_dir=tmp_path / "run", checkpointing=options, console=False
    ) as trainer:
        trainer.fit([batch] * 2, max_steps=2)
    export(newest_intact(tmp_path / "run"), tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs) is transformers.GPT2LMHeadModel
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="2KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    again = transformers.GPT2LMHeadModel(config)
    load_weights(again, tmp_path / "parts")
    for name, value in model.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value)
        assert torch.equal(again.state_dict()[name], value)
    program = torch.export.load(export_program(again, batch, tmp_path / "out")).module()
    three = torch.ones(3, 4, dtype=torch.int64)
    torch.testing.assert_close(program(input_ids=three).logits, theirs(input_ids=three).logits)
