"""The reference models: sizes by hand, shapes, causality, and that each of them learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaledtrain.errors import ConfigError
from scaledtrain.models import GPT, GPT_10M, MLP, ConvNet, GPTArguments, next_token_loss

TINY: GPTArguments = {
    "vocab_size": 64,
    "sequence_length": 16,
    "n_layers": 2,
    "n_heads": 2,
    "d_model": 32,
}


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def n_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def losses_on_one_batch(
    model: nn.Module, inputs: Tensor, targets: Tensor, steps: int
) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(end_dim=-2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_mlp_has_the_parameters_of_its_layers() -> None:
    # (64 + 1) * 32 = 2,080;  (32 + 1) * 16 = 528;  (16 + 1) * 10 = 170
    assert n_parameters(MLP(64, [32, 16], 10)) == 2_080 + 528 + 170


def test_mlp_without_hidden_layers_is_linear() -> None:
    model = MLP(3, [], 2)
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(model(x) + model(y), model(x + y) + model(torch.zeros(4, 3)))


def test_mlp_flattens_images() -> None:
    model = MLP(64, [32], 10)
    images = torch.rand(5, 1, 8, 8)
    assert model(images).shape == (5, 10)
    assert torch.equal(model(images), model(images.view(5, 64)))


@pytest.mark.parametrize(("in_features", "hidden", "out_features"), [(0, [4], 2), (4, [0], 2)])
def test_mlp_refuses_a_width_below_one(
    in_features: int, hidden: list[int], out_features: int
) -> None:
    with pytest.raises(ConfigError, match="widths of at least 1"):
        MLP(in_features, hidden, out_features)


def test_mlp_refuses_samples_of_another_size() -> None:
    with pytest.raises(ConfigError, match=r"\(5, 63\), 63 numbers a sample.*in_features=64"):
        MLP(64, [32], 10)(torch.zeros(5, 63))


def test_convnet_has_the_parameters_of_its_layers() -> None:
    # stem            1*16*9 + 2*16                               =    176
    # first stage     2 * (16*16*9 + 2*16)                        =  4,672
    # second stage    16*32*9 + 32*32*9 + 16*32 + 3 * 2*32        = 14,528
    # head            32*10 + 10                                  =    330
    assert n_parameters(ConvNet(1, 10, width=16)) == 176 + 4_672 + 14_528 + 330


@pytest.mark.parametrize("size", [1, 7, 8, 32])
def test_convnet_takes_images_of_any_size(size: int) -> None:
    assert ConvNet(3, 10, width=8)(torch.rand(2, 3, size, size)).shape == (2, 10)


def test_convnet_keeps_no_buffers() -> None:
    assert list(ConvNet(1, 10).buffers()) == []


def test_convnet_output_of_a_sample_does_not_depend_on_its_batch() -> None:
    model = ConvNet(1, 10, width=8)
    images = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(model(images)[:1], model(images[:1]))


@pytest.mark.parametrize("width", [0, 12, -8])
def test_convnet_refuses_a_width_without_whole_groups(width: int) -> None:
    with pytest.raises(ConfigError, match=f"width={width}.*multiple of 8"):
        ConvNet(1, 10, width=width)


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 3, 8, 8)])
def test_convnet_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"takes \[batch, 1, height, width\]"):
        ConvNet(1, 10)(torch.zeros(shape))


def test_gpt_has_the_parameters_of_its_layers() -> None:
    embeddings = 64 * 32 + 16 * 32  # tokens, positions
    norm = 2 * 32
    attention = (32 * 96 + 96) + (32 * 32 + 32)  # qkv, projection
    feed_forward = (32 * 128 + 128) + (128 * 32 + 32)
    expected = embeddings + 2 * (2 * norm + attention + feed_forward) + norm
    assert n_parameters(GPT(**TINY)) == expected == 28_032
    assert n_parameters(GPT(**TINY, tied_embedding=False)) == expected + 64 * 32


def test_gpt_10m_has_the_documented_size() -> None:
    # 256*384 + 128*384 + 6 * (12*384**2 + 13*384) + 2*384 = 98,304 + 49,152 + 10,646,784 + 768
    with torch.device("meta"):
        assert n_parameters(GPT(**GPT_10M)) == 10_795_008


def test_gpt_gives_logits_for_every_position_also_of_short_sequences() -> None:
    model = GPT(**TINY)
    for time in (1, 5, 16):
        assert model(torch.zeros(3, time, dtype=torch.int64)).shape == (3, time, 64)


def test_gpt_is_causal() -> None:
    model = GPT(**TINY).eval()
    tokens = torch.randint(64, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 64
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    # Every later position sees the change.
    assert (before[:, 9:] != after[:, 9:]).any(dim=-1).all()


def test_gpt_tied_embedding_is_one_storage() -> None:
    tied, untied = GPT(**TINY), GPT(**TINY, tied_embedding=False)
    assert tied.head.weight is tied.token_embedding.weight
    assert untied.head.weight.data_ptr() != untied.token_embedding.weight.data_ptr()


def test_gpt_starts_with_the_standard_deviations_of_gpt2() -> None:
    model = GPT(64, 16, n_layers=8, n_heads=2, d_model=128)
    for name, parameter in model.named_parameters():
        if name.endswith("projection.weight"):
            # 0.02 / sqrt(2 * 8 layers) = 0.005
            assert parameter.std().item() == pytest.approx(0.005, rel=0.05), name
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name


def test_gpt_dropout_acts_in_training_mode_only() -> None:
    model = GPT(**TINY, dropout=0.5)
    tokens = torch.randint(64, (2, 16))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_gpt_refuses_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="d_model=32 and n_heads=5.*try d_model=35"):
        GPT(64, 16, n_layers=2, n_heads=5, d_model=32)


def test_gpt_refuses_a_size_below_one() -> None:
    with pytest.raises(ConfigError, match="n_layers=0"):
        GPT(64, 16, n_layers=0, n_heads=2, d_model=32)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_gpt_refuses_a_dropout_that_is_no_probability(dropout: float) -> None:
    with pytest.raises(ConfigError, match=f"dropout={dropout}"):
        GPT(**TINY, dropout=dropout)


def test_gpt_refuses_sequences_beyond_its_positions() -> None:
    with pytest.raises(ConfigError, match="sequences of 17 tokens.*sequence_length=16"):
        GPT(**TINY)(torch.zeros(1, 17, dtype=torch.int64))


def test_gpt_refuses_tokens_without_a_batch_dim() -> None:
    with pytest.raises(ConfigError, match=r"\(16,\).*\[batch, time\]"):
        GPT(**TINY)(torch.zeros(16, dtype=torch.int64))


def test_next_token_loss_is_the_mean_over_all_positions() -> None:
    logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    by_hand = sum(
        -logits[b, t].log_softmax(dim=0)[targets[b, t]] for b in range(2) for t in range(3)
    )
    torch.testing.assert_close(next_token_loss(logits, targets), by_hand / 6)


def test_next_token_loss_refuses_targets_of_another_shape() -> None:
    with pytest.raises(ConfigError, match=r"\(2, 3, 5\) and targets \(2, 4\)"):
        next_token_loss(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.parametrize("model_class", ["mlp", "convnet"])
def test_a_classifier_starts_at_chance_and_overfits_one_batch(model_class: str) -> None:
    model = MLP(64, [64], 10) if model_class == "mlp" else ConvNet(1, 10, width=8)
    images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 10
    losses = losses_on_one_batch(model, images, labels, steps=150)
    assert losses[0] == pytest.approx(math.log(10), rel=0.05)
    assert losses[-1] < 0.2


def test_gpt_starts_at_chance_and_overfits_one_batch() -> None:
    tokens = torch.randint(64, (4, 17))
    losses = losses_on_one_batch(GPT(**TINY), tokens[:, :-1], tokens[:, 1:], steps=100)
    assert losses[0] == pytest.approx(math.log(64), rel=0.03)
    assert losses[-1] < 0.2
