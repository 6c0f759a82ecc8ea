"""Models as chains of parts, and stages cut from them, against the models themselves."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from scaledtrain.errors import ConfigError
from scaledtrain.models import GPT, MLP, ConvNet, next_token_loss
from scaledtrain.parallel.pipeline import (
    Cut,
    Held,
    ModelParts,
    Stage,
    check_parts,
    find_parts,
    find_tied,
    make_stage,
)
from scaledtrain.recompute import CheckpointEvery, checkpoint_activations


def gpt(**options: Any) -> GPT:
    return GPT(vocab_size=32, sequence_length=8, n_layers=3, n_heads=2, d_model=16, **options)


def tokens(batch: int = 3, time: int = 8) -> Tensor:
    return torch.randint(0, 32, (batch, time))


def stages_of(parts: ModelParts, *counts: int) -> list[Stage]:
    cut = Cut(counts)
    return [make_stage(parts, cut, index) for index in range(len(cut))]


def run(stages: Sequence[Callable[..., Any]], x: Any) -> Any:
    for stage in stages:
        x = stage(x)
    return x


def assert_same_gradients(
    model: nn.Module, stages: Sequence[nn.Module], loss: Callable[[Callable[..., Any]], Tensor]
) -> None:
    """Bit for bit, as are losses, and random numbers drawn on the way."""
    found = []
    for called in (model, lambda x: run(stages, x)):
        model.zero_grad()
        torch.manual_seed(5)
        value = loss(called)
        value.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((value, torch.rand(1), gradients))
    (value, drawn, expected), (other, drawn_too, gradients) = found
    assert value.isfinite()
    assert torch.equal(value, other)
    assert torch.equal(drawn, drawn_too)
    for name, gradient in expected.items():
        other_gradient = gradients[name]
        assert (gradient is None) == (other_gradient is None), name
        if gradient is not None and other_gradient is not None:
            assert torch.equal(gradient, other_gradient), name
    assert any(g is not None and g.any() for g in gradients.values())


def assert_all_state(model: nn.Module, stages: Sequence[nn.Module]) -> None:
    """Every name of the model's state dict in some stage, with the model's tensor."""
    together = {k: v for stage in stages for k, v in stage.state_dict(keep_vars=True).items()}
    own = model.state_dict(keep_vars=True)
    assert together.keys() == own.keys()
    assert all(together[name] is own[name] for name in own)


@pytest.mark.parametrize("tied_embedding", [True, False])
def test_a_gpt_in_stages(tied_embedding: bool) -> None:
    model = gpt(dropout=0.1, tied_embedding=tied_embedding)
    parts = find_parts(model)
    assert parts.names == ("token_embedding", "blocks.0", "blocks.1", "blocks.2", "norm")
    stages = stages_of(parts, 2, 2, 1)
    x, y = tokens(), tokens()
    assert_same_gradients(model, stages, lambda called: next_token_loss(called(x), y))
    assert_all_state(model, stages)
    middle = [name for name, _ in stages[1].named_parameters()]
    assert middle == [n for n, _ in model.named_parameters() if n[:8] in ("blocks.1", "blocks.2")]
    for stage in stages:
        stage.eval()
    model.eval()
    assert torch.equal(run(stages, x), model(x))


@pytest.mark.parametrize(
    ("model", "x", "names"),
    [
        (MLP(12, [8, 7], 5), torch.randn(4, 3, 2, 2), ("layers.0", "layers.2", "layers.4")),
        (
            ConvNet(channels=3, n_classes=5, width=8),
            torch.randn(2, 3, 8, 8),
            ("stem", "stages.0", "stages.1", "head"),
        ),
        (
            nn.Sequential(
                nn.Flatten(),
                nn.Sequential(nn.Linear(12, 8), nn.ReLU(inplace=True), nn.BatchNorm1d(8)),
                nn.Dropout(0.2),
                nn.Sequential(nn.Sequential(nn.Linear(8, 5)), nn.Softmax(-1)),
            ),
            torch.randn(4, 3, 2, 2),
            ("0", "1.2", "3.0.0"),
        ),
    ],
    ids=["mlp", "convnet", "sequential"],
)
def test_other_models_in_stages(model: nn.Module, x: Tensor, names: tuple[str, ...]) -> None:
    parts = find_parts(model)
    assert parts.names == names
    stages = stages_of(parts, *[1] * len(names))
    targets = torch.arange(len(x))
    loss = nn.functional.cross_entropy
    buffers = copy.deepcopy(dict(model.named_buffers()))
    assert_same_gradients(model, stages, lambda called: loss(called(x), targets))
    assert_all_state(model, stages)
    assert dict(model.named_buffers()).keys() == buffers.keys()
    assert all(not torch.equal(buffers[n], b) for n, b in model.named_buffers())


def test_tied_weights_are_known_by_stage_and_name() -> None:
    model = gpt()
    parts = find_parts(model)
    name = "token_embedding.weight"
    assert find_tied(parts, Cut((2, 2, 1))) == [(Held(0, name), Held(2, name))]
    first, _, last = stages_of(parts, 2, 2, 1)
    assert first.get_parameter(name) is last.get_parameter(name)
    assert last.get_parameter("head.weight") is last.get_parameter(name)
    assert [n for n, _ in last.named_parameters()] == [name, "norm.weight", "norm.bias"]
    assert find_tied(parts, Cut((5,))) == []
    assert find_tied(find_parts(gpt(tied_embedding=False)), Cut((2, 3))) == []


def test_a_module_that_comes_twice_is_in_both_stages() -> None:
    twice = nn.Linear(4, 4)
    model = nn.Sequential(twice, nn.Tanh(), nn.Linear(4, 4), twice)
    parts = find_parts(model)
    assert parts.names == ("0", "2", "3")
    stages = stages_of(parts, 1, 2)
    assert find_tied(parts, Cut((1, 2))) == [
        (Held(0, "0.weight"), Held(1, "0.weight")),
        (Held(0, "0.bias"), Held(1, "0.bias")),
    ]
    x = torch.randn(3, 4)
    assert_same_gradients(model, stages, lambda called: called(x).square().sum())
    assert_all_state(model, stages)


def test_a_stage_holds_nothing_of_the_others() -> None:
    model = gpt()
    parts = find_parts(model)
    stage = make_stage(parts, Cut((2, 2, 1)), 1)
    others = [weakref.ref(p) for n, p in model.named_parameters() if n not in stage.state_dict()]
    assert len(others) == 2 + 12 + 2  # embeddings, a block, the norm
    del model, parts
    gc.collect()
    assert [ref() for ref in others] == [None] * len(others)


class Vision(nn.Module):
    """Parameters of its own, a buffer that is not saved, two tensors between its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(4))
        self.scale: Tensor
        self.register_buffer("scale", torch.full((4,), 0.5), persistent=False)
        self.unused = nn.Linear(2, 2)
        self.encoder = nn.ModuleList(_Pair() for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, y = (x + self.token) * self.scale, x * self.token
        for layer in self.encoder:
            x, y = layer(x, y)
        return self.head(x + y)

    def pipeline_parts(self) -> list[nn.Module]:
        return [_Begin(self.token, self.scale), *self.encoder, _End(self.head)]


class _Begin(nn.Module):
    def __init__(self, token: nn.Parameter, scale: Tensor) -> None:
        super().__init__()
        self.token = token
        self.scale: Tensor
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x + self.token) * self.scale, x * self.token


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(y).tanh(), x


class _End(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(x + y)


def test_a_model_with_parameters_of_its_own() -> None:
    model = Vision()
    parts = find_parts(model)
    assert parts.names == ("token", "encoder.0", "encoder.1", "encoder.2", "head")
    stages = stages_of(parts, 1, 2, 2)
    x = torch.randn(3, 4)
    check_parts(parts, x)
    assert_same_gradients(model, stages, lambda called: called(x).square().sum())
    assert_all_state(model, stages)
    assert "unused.weight" in stages[-1].state_dict()  # of no part, but of the model's state
    assert [name for name, _ in stages[0].named_buffers()] == ["scale"]
    # What stands where the model has it is what the part computes with.
    swapped = functional_call(stages[0], {"token": torch.zeros(4)}, (x,))
    assert torch.equal(swapped[0], x / 2)
    wide = stages[0].double()
    assert [t.dtype for t in wide(x.double())] == [torch.float64] * 2


def test_a_copy_of_a_stage_is_a_stage() -> None:
    stage = stages_of(find_parts(gpt()), 2, 3)[0]
    other = copy.deepcopy(stage)
    with torch.no_grad():
        other.get_parameter("token_embedding.weight").zero_()
        other.get_parameter("position_embedding.weight").zero_()
    x = tokens()
    assert stage(x).any()
    assert not other(x)[:, 0].isnan().any()
    first = other.get_submodule("blocks.0")(torch.zeros(3, 8, 16))
    assert torch.equal(other(x), first)


def test_blocks_of_a_stage_are_found_and_computed_again() -> None:
    model = gpt()
    stages = stages_of(find_parts(model), 3, 2)
    ran: list[nn.Module] = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda module, _: ran.append(module))
    handle = checkpoint_activations(stages[0], CheckpointEvery(1))
    x, y = tokens(), tokens()
    assert_same_gradients(model, stages, lambda called: next_token_loss(called(x), y))
    assert len(ran) == 2 * (3 + 2)  # the first two, which model and stage share, run once more
    handle.remove()


def test_what_has_no_chain_is_told_what_was_tried() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x) if x.sum() > 0 else x
            return x

    with pytest.raises(ConfigError, match=r"no pipeline_parts\(\).*no nn.Sequential, and no input"):
        find_parts(Opaque())
    with pytest.raises(ConfigError, match=r"torch.export cannot trace it .*Give the model pipelin"):
        find_parts(Opaque(), torch.ones(2, 2))
    with pytest.raises(ConfigError, match="not known where to cut it: Linear has no"):
        find_parts(nn.Linear(2, 2), torch.ones(2, 2))
    with pytest.raises(ConfigError, match="only one part"):
        find_parts(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))


def test_wrong_parts_are_refused() -> None:
    class Forgets(nn.Module):
        def __init__(self, parts: Callable[[Forgets], list[nn.Module]]) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
            self.parts = parts

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh())

        def pipeline_parts(self) -> list[nn.Module]:
            return self.parts(self)

    model = Forgets(lambda own: [own.first, own.second])
    with pytest.raises(ConfigError, match=r"first, second, .* do not return what Forgets returns"):
        check_parts(find_parts(model), torch.randn(3, 2))
    foreign = find_parts(Forgets(lambda own: [own.first, _Begin(own.first.weight, own.first.bias)]))
    with pytest.raises(ConfigError, match="the part _Begin has token, which Forgets has not"):
        make_stage(foreign, Cut((1, 1)), 1)
    with pytest.raises(ConfigError, match="for 3 parts, but the model has 2"):
        make_stage(find_parts(model), Cut((2, 1)), 0)
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="has hooks"):
        find_parts(model)
