"""Models that do not say what their parts are: traced, and cut at their blocks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scaledtrain.errors import ConfigError
from scaledtrain.evaluation import eval_mode
from scaledtrain.parallel.pipeline import (
    Cut,
    Held,
    ModelParts,
    check_parts,
    find_parts,
    find_tied,
    make_stage,
    measure_parts,
)
from scaledtrain.parallel.pipeline.pipeline import OwnStages
from scaledtrain.recompute import CheckpointEvery, checkpoint_activations
from scaledtrain.recompute.blocks import find_blocks
from tests.unit.test_pipeline_parts import assert_all_state, assert_same_gradients, run, stages_of

pytestmark = pytest.mark.timeout(300)

VOCAB, WIDTH = 64, 32
SIZES = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 16}


def gpt2(transformers: Any) -> nn.Module:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    sizes = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends))


def llama(transformers: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def bert(transformers: Any) -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


NAMES = {
    gpt2: ("transformer.wte", "transformer.h.0", "transformer.h.1", "transformer.ln_f"),
    llama: ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"),
    bert: (
        "bert.embeddings",
        "bert.encoder.layer.0",
        "bert.encoder.layer.1",
        "cls.predictions.transform.dense",
    ),
}
TIED = {
    gpt2: ["transformer.wte.weight"],
    llama: [],
    bert: ["bert.embeddings.word_embeddings.weight"],
}


def batch(samples: int, time: int) -> dict[str, Tensor]:
    """With padding at the end of the first sample."""
    ids = torch.randint(0, VOCAB, (samples, time))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": mask}


@cache
def traced(make: Any) -> ModelParts:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    return find_parts(make(transformers).train(), batch(1, 8), own_loss=True)


@pytest.mark.slow  # torch.export takes seconds
@pytest.mark.parametrize("make", [gpt2, llama, bert])
class TestHuggingFace:
    def test_stages_compute_what_the_model_does(self, make: Any) -> None:
        parts = traced(make)
        assert parts.names == NAMES[make]
        stages = stages_of(parts, 1, 1, 2)
        for samples, time in ((3, 8), (1, 8), (2, 5)):  # traced with 2 of 8
            given = batch(samples, time)
            assert_same_gradients(
                parts.model,
                stages,
                lambda called, given=given: loss_of(called, given, stages),
            )
        assert_all_state(parts.model, stages)

    def test_in_evaluation_nothing_is_dropped(self, make: Any) -> None:
        parts = traced(make)
        stages, given = stages_of(parts, 2, 2), batch(2, 8)
        for module in (parts.model, *stages):
            module.eval()
        loss = run_batch(stages, given)
        assert torch.equal(loss, parts.model(**given).loss)
        for module in (parts.model, *stages):
            module.train()

    def test_under_autocast(self, make: Any) -> None:
        parts = traced(make)
        stages, given = stages_of(parts, 2, 2), batch(2, 8)
        found = []
        for called in (lambda: parts.model(**given).loss, lambda: run_batch(stages, given)):
            torch.manual_seed(3)
            with torch.autocast("cpu", torch.bfloat16):
                found.append(called())
        assert torch.equal(*found)

    def test_tied_weights(self, make: Any) -> None:
        parts = traced(make)
        found = find_tied(parts, Cut((2, 2)))
        assert found == [(Held(0, name), Held(1, name)) for name in TIED[make]]

    def test_blocks_are_computed_again(self, make: Any) -> None:
        parts = traced(make)
        stages, given = stages_of(parts, 3, 1), batch(2, 8)
        blocks = find_blocks(stages[0])
        assert len(blocks) == 2
        ran: list[int] = []
        for index, block in enumerate(blocks):
            block._part[0].register_forward_pre_hook(lambda *_, index=index: ran.append(index))
        handle = checkpoint_activations(stages[0], CheckpointEvery(1))
        assert_same_gradients(parts.model, stages, lambda called: loss_of(called, given, stages))
        assert ran == [0, 1, 1, 0]
        handle.remove()

    def test_costs(self, make: Any) -> None:
        parts = traced(make)
        costs = measure_parts(parts, batch(2, 8))
        assert costs[0].sent_bytes >= 2 * 8 * WIDTH * 4
        assert costs[-1].sent_bytes == 0
        trained = sum(p.numel() for p in parts.model.parameters())
        tied = sum(parts.model.get_parameter(name).numel() for name in TIED[make])
        assert sum(cost.state_bytes for cost in costs) >= 2 * 4 * (trained + tied)


def loss_of(called: Any, given: dict[str, Tensor], stages: Any) -> Tensor:
    return called(**given).loss if isinstance(called, nn.Module) else run_batch(stages, given)


def run_batch(stages: Any, given: dict[str, Tensor]) -> Tensor:
    loss = run(stages[1:], stages[0](**given))
    assert isinstance(loss, Tensor)
    return loss


class Residual(nn.Module):
    """Sizes, a mask made of them, dropout, a buffer that changes, and a skip past a block."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = nn.Linear(4, 4)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)) for _ in range(3)
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.begin(x)
        mask = torch.ones(x.shape[0], 1, device=x.device).tril(-1)
        for layer in self.layers:
            x = layer(x) + mask
        return self.head(x + first)


def test_a_model_of_our_own() -> None:
    torch.manual_seed(0)
    model = Residual()
    before = torch.get_rng_state()
    parts = find_parts(model, torch.randn(3, 4).requires_grad_(False), blocks=block_names(3))
    assert parts.names == ("begin", *block_names(3), "head")
    check_parts(parts, torch.randn(5, 4))
    torch.set_rng_state(before)
    stages = stages_of(parts, 1, 1, 1, 1, 1)
    x = torch.randn(6, 4)
    sent = stages[1](stages[0](x))
    assert [tuple(t.shape) for t in sent] == [(6, 4), (6, 4)]  # x and first; the mask is made again
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert_same_gradients(model, stages, lambda called: called(x).square().mean())
    assert_all_state(model, stages)
    assert all(not torch.equal(statistics[n], b) for n, b in model.named_buffers())
    assert int(model.layers[0][1].num_batches_tracked) == 3  # ours, the model's, the stages'
    moved = make_stage(parts, Cut((2, 3)), 0).to("meta")
    assert all(t.is_meta for t in moved(torch.randn(2, 4, device="meta")))


def block_names(n: int) -> list[str]:
    return [f"layers.{index}" for index in range(n)]


def test_other_inputs_than_those_traced_are_refused() -> None:
    parts = find_parts(Residual(), torch.randn(3, 4), blocks=block_names(3))
    stage = make_stage(parts, Cut((2, 3)), 0)
    with pytest.raises(ConfigError, match="traced with inputs of the form"):
        stage({"x": torch.randn(3, 4)})
    with pytest.raises(ConfigError, match=r"for inputs of sizes \[any, 4\], but is given \[3, 5\]"):
        stage(torch.randn(3, 5))


def test_a_size_that_the_code_fixes_is_told() -> None:
    class Fixed(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * len(x)

    parts = find_parts(Fixed(), torch.randn(3, 4), blocks=block_names(3))
    with pytest.raises(ConfigError, match=r"of sizes \[3, 4\], but is given \[2, 4\]; its code"):
        make_stage(parts, Cut((2, 3)), 0)(torch.randn(2, 4))


def test_blocks_that_make_no_chain_are_refused() -> None:
    class Twice(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](self.layers[1](x)))

    for names, told in (
        (["layers.0", "layers.1"], r"calls its block layers\.1 before layers\.0 is done"),
        (["layers.0", "layers.2"], "does not call its block layers.2"),
    ):
        with pytest.raises(ConfigError, match=told):
            find_parts(Twice(), torch.randn(3, 4), blocks=names)


def test_a_model_that_returns_what_its_blocks_made_is_refused() -> None:
    class Returns(Residual):
        def forward(self, x: Tensor) -> list[Tensor]:
            outputs = [self.begin(x)]
            for layer in self.layers:
                outputs.append(layer(outputs[-1]))
            return outputs

    with pytest.raises(ConfigError, match="returns 3 tensors that are made before its last part"):
        find_parts(Returns(), torch.randn(3, 4), blocks=block_names(3))


class _Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(8, 8), nn.Dropout()) for _ in range(2))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_a_traced_stage_drops_again_after_an_evaluation() -> None:
    model = _Dropping()
    parts = find_parts(model, torch.ones(2, 8))
    cut = Cut((len(parts),))
    stage = make_stage(parts, cut, 0)
    own = OwnStages({0: stage}, cut, [], [], "", [])
    x = torch.ones(4, 8)
    with eval_mode(own):
        assert torch.equal(stage(x), stage(x))
    assert not torch.equal(stage(x), stage(x))
