"""Models of Hugging Face, made small of their configs, whose activations are computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scaledtrain.recompute import (
    CheckpointEvery,
    CheckpointPolicy,
    CheckpointSqrt,
    MemoryBudget,
    Selective,
    checkpoint_activations,
)
from scaledtrain.recompute.apart import peak_bytes

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
TOKENS = torch.arange(2 * 24).view(2, 24) % 61
MASK = torch.ones(2, 24, dtype=torch.long).index_fill(1, torch.arange(20, 24), 0)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=61,
        bos_token_id=0,
        eos_token_id=0,
        n_positions=24,
        n_embd=32,
        n_layer=4,
        n_head=2,
        use_cache=False,
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=61, intermediate_size=64, num_key_value_heads=1, use_cache=False, **SIZES
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def bert() -> nn.Module:
    config = transformers.BertConfig(vocab_size=61, intermediate_size=64, **SIZES)
    model: nn.Module = transformers.BertForMaskedLM(config)
    return model


def sample(called: Callable[..., Any]) -> Tensor:
    loss: Tensor = called(input_ids=TOKENS, attention_mask=MASK, labels=TOKENS).loss
    return loss


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().train()


def gradients(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(1)  # GPT-2 and BERT drop out
    for _ in range(2):
        sample(model).backward()  # type: ignore[no-untyped-call]
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("make", [gpt2, llama, bert])
def test_gradients_have_the_same_bits_under_every_policy(make: Callable[[], nn.Module]) -> None:
    expected = gradients(made(make))
    everything = peak_bytes(made(make), sample)
    policies: list[CheckpointPolicy] = [CheckpointEvery(), Selective()]
    # Two of Hugging Face's blocks can be run again together only where nothing else is between.
    policies += [CheckpointEvery(2), CheckpointSqrt()]
    policies += [MemoryBudget(int(share * everything)) for share in (0.5, 0.8)]
    for policy in policies:
        model = made(make)
        checkpoint_activations(model, policy, sample)
        found = gradients(model)
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected)), policy
        peak = peak_bytes(model, sample)
        assert peak <= (policy.n_bytes if isinstance(policy, MemoryBudget) else 0.9 * everything)
