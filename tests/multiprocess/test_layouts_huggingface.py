"""Hugging Face models, made from their configs, train with their own loss in every layout."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scaledtrain import Mesh, Trainer, connect
from scaledtrain.parallel import FullyShard, Pipeline
from scaledtrain.recompute import CheckpointEvery, MemoryBudget
from tests.ranks import run_ranks

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 19, "hidden_size": 12, "num_attention_heads": 2}
NAMES = ("gpt2", "llama", "bert")
BLOCKS = {"gpt2": "GPT2Block", "llama": "LlamaDecoderLayer", "bert": "BertLayer"}


def make(name: str, n_layers: int) -> nn.Module:
    torch.manual_seed(1)
    if name == "gpt2":  # the embedding is the head, too
        config = transformers.GPT2Config(
            vocab_size=19,
            n_positions=8,
            n_embd=12,
            n_layer=n_layers,
            n_head=2,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        return transformers.GPT2LMHeadModel(config)
    if name == "llama":
        config = transformers.LlamaConfig(
            **SMALL,
            num_hidden_layers=n_layers,
            intermediate_size=24,
            max_position_embeddings=8,
            use_cache=False,
        )
        return transformers.LlamaForCausalLM(config)
    config = transformers.BertConfig(
        **SMALL,
        num_hidden_layers=n_layers,
        intermediate_size=24,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config)


def batches() -> list[dict[str, Tensor]]:
    """Five of four samples, with padding; the last step has none for the second of two ranks."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(19, (5, 4, 8), generator=generator)
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[1, 6:] = 0
    return [{"input_ids": t, "attention_mask": mask, "labels": t} for t in tokens]


def train(
    runs: list[tuple[str, Mesh, dict[str, Any]]], n_layers: int = 3
) -> list[tuple[dict[str, Tensor], float, int]]:
    found = []
    with connect(transport="torch", timeout_seconds=100) as link:
        for name, mesh, options in runs:
            with Trainer(
                make(name, n_layers),
                None,
                partial(torch.optim.SGD, lr=0.1, momentum=0.9),
                mesh=mesh,
                console=False,
                link=link,
                **options,
            ) as trainer:
                result = trainer.fit(batches(), max_epochs=2, eval=batches()[:1])
                if mesh.pipe > 1:  # each rank has its stage's
                    whole = {key: v.clone() for key, v in trainer.model.state_dict().items()}
                else:
                    whole = trainer.full_state_dict()
            found.append((whole, result.evaluation["loss"], result.step))
    return found


# Nobody changes what BERT returns.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_a_sharded_model_is_trained_as_a_plain_one() -> None:
    sharded = Mesh(shard=2)
    runs: list[tuple[str, Mesh, dict[str, Any]]] = []
    for name in NAMES:
        runs += [
            (name, Mesh(), {}),
            (name, sharded, {}),
            (name, sharded, {"engine": FullyShard(block_classes=[BLOCKS[name]])}),
            (name, sharded, {"activation_checkpointing": CheckpointEvery(1)}),
            (name, sharded, {"activation_checkpointing": MemoryBudget("80KiB")}),
        ]
    first, second = run_ranks(train, 2, runs, timeout_seconds=240)
    for place, name in enumerate(NAMES):
        (expected, loss, steps), *others = first[5 * place : 5 * place + 5]
        assert steps == 6  # 3 of each epoch
        untrained = make(name, 3).state_dict()
        assert list(expected) == list(untrained)
        assert any((expected[key] - untrained[key]).abs().max() > 1e-3 for key in expected)
        for whole, own_loss, own_steps in others:
            assert list(whole) == list(expected)
            for key, value in whole.items():
                torch.testing.assert_close(value, expected[key], atol=2e-5, rtol=0.0)
            assert own_loss == pytest.approx(loss, abs=1e-5)
            assert own_steps == steps
        # Recomputing changes no bit.
        for recomputed in others[2:]:
            for key, value in recomputed[0].items():
                assert torch.equal(value, others[0][0][key])
    assert all(
        whole == {}
        for (whole, _, _), (_, mesh, _) in zip(second, runs, strict=True)
        if mesh.shard > 1
    )


@pytest.mark.timeout(300)
def test_a_traced_model_in_stages_is_trained_as_a_plain_one() -> None:
    """GPT-2's embedding is in the first stage and, as the head, in the last."""
    plain = train([(name, Mesh(), {}) for name in NAMES], 2)
    options = {"pipeline": Pipeline("1F1B", n_microbatches=2, example=batches()[0])}
    staged = [(name, Mesh(pipe=2), options) for name in NAMES]
    stages = run_ranks(train, 2, staged, 2, timeout_seconds=240)
    for place, (expected, loss, steps) in enumerate(plain):
        names: set[str] = set()
        for own, own_loss, own_steps in (rank[place] for rank in stages):
            names |= own.keys()
            assert own_steps == steps == 10
            assert own_loss == pytest.approx(loss, abs=1e-5)
            for name, value in own.items():
                torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0.0)
        assert names == expected.keys()
