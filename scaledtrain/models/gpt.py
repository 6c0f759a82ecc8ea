"""A decoder-only transformer in the manner of GPT-2, and its loss."""

from __future__ import annotations

import math
from typing import Final, TypedDict, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaledtrain.errors import ConfigError

__all__ = ["GPT", "GPT_10M", "GPTArguments", "next_token_loss"]

INIT_STD = 0.02


class GPTArguments(TypedDict):
    """The sizes that :class:`GPT` needs, as a plain dict that a type checker understands."""

    vocab_size: int
    sequence_length: int
    n_layers: int
    n_heads: int
    d_model: int


GPT_10M: Final[GPTArguments] = {
    "vocab_size": 256,
    "sequence_length": 128,
    "n_layers": 6,
    "n_heads": 6,
    "d_model": 384,
}


@final
class GPT(nn.Module):
    """A causal language model: pre-norm blocks of attention and a GELU MLP of width 4·d_model.

    Weights start as N(0, 0.02²) and biases at 0; the two projections of each block that write into
    the residual stream start as N(0, 0.02² / (2·n_layers)), so that the stream's variance does not
    grow with depth. The loss of a fresh model is close to ``ln(vocab_size)``.

    With ``V, T, L, d`` for vocabulary, sequence length, layers and d_model it has
    ``V·d + T·d + L·(12d² + 13d) + 2d`` parameters, and ``V·d`` more with an untied head.

    ``GPT_10M`` holds the arguments of the model that the benchmarks train: a vocabulary of 256
    bytes, 128 positions, 6 layers of 6 heads, d_model 384. ``GPT(**GPT_10M)`` has 10,795,008
    parameters.

    Args:
        vocab_size: Number of token ids.
        sequence_length: Most tokens in one sequence; each position has a learned vector.
        n_layers: Number of blocks, found in the ``nn.ModuleList`` named ``blocks``.
        n_heads: Attention heads; they divide ``d_model``.
        d_model: Width of the residual stream.
        dropout: Probability, in [0, 1), of zeroing a number after the embedding, in the attention
            weights and at the end of each residual branch; in training mode only.
        tied_embedding: Whether the output layer shares its weight with the token embedding.

    Raises:
        ConfigError: A size is below 1, ``n_heads`` does not divide ``d_model``, or ``dropout`` is
            outside [0, 1).

    Example:
        >>> model = GPT(**GPT_10M)
        >>> sum(parameter.numel() for parameter in model.parameters())
        10795008
        >>> small = GPT(vocab_size=16, sequence_length=8, n_layers=2, n_heads=2, d_model=32)
        >>> tuple(small(torch.zeros(3, 8, dtype=torch.int64)).shape)
        (3, 8, 16)

    References:
        Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2);
        Press and Wolf, "Using the Output Embedding to Improve Language Models", 2016
        (arXiv:1608.05859), for the tied embedding.
    """

    def __init__(
        self,
        vocab_size: int,
        sequence_length: int,
        n_layers: int,
        n_heads: int,
        d_model: int,
        dropout: float = 0.0,
        tied_embedding: bool = True,
    ) -> None:
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "sequence_length": sequence_length,
            "n_layers": n_layers,
            "n_heads": n_heads,
            "d_model": d_model,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"GPT got {name}={value}; give a size of at least 1")
        if d_model % n_heads:
            raise ConfigError(
                f"GPT got d_model={d_model} and n_heads={n_heads}, but heads of equal width need "
                f"d_model % n_heads == 0 (here {d_model % n_heads}): try d_model="
                f"{math.ceil(d_model / n_heads) * n_heads} or another n_heads"
            )
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(
                f"GPT got dropout={dropout}, which is no probability in [0, 1): "
                "give 0.0 for none, or a fraction such as 0.1"
            )
        self.sequence_length = sequence_length
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(sequence_length, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(d_model, n_heads, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        if tied_embedding:
            self.head.weight = self.token_embedding.weight
        self._initialise(residual_std=INIT_STD / math.sqrt(2 * n_layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict, at each position, the token that follows it.

        Args:
            tokens: int64 ``[batch, time]`` with ids in ``[0, vocab_size)`` and
                ``time <= sequence_length``.

        Returns:
            Logits, float ``[batch, time, vocab_size]``; those at position ``t`` depend on
            ``tokens[:, :t + 1]`` alone.

        Raises:
            ConfigError: ``tokens`` has not two dims, or is longer than ``sequence_length``.
        """
        x = _embed(tokens, self.token_embedding, self.position_embedding, self.dropout)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(self.norm(x)))

    def pipeline_parts(self) -> list[nn.Module]:
        """The embedding, each block, and norm and head, to be cut into stages."""
        embedding = _Embedding(self.token_embedding, self.position_embedding, self.dropout)
        return [embedding, *self.blocks, nn.Sequential(self.norm, self.head)]

    @torch.no_grad()
    def _initialise(self, residual_std: float) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("projection.weight"):
                parameter.normal_(std=residual_std)
            elif name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                parameter.normal_(std=INIT_STD)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy over every position of every sequence, in nats per token.

    Args:
        logits: Float ``[batch, time, vocab]``.
        targets: int64 ``[batch, time]``: the ids that should follow. They are already shifted by
            one against the model's input.

    Returns:
        A scalar of the logits' dtype (float32 under autocast).

    Raises:
        ConfigError: The shapes do not belong together.

    Example:
        >>> loss = next_token_loss(torch.zeros(2, 3, 256), torch.zeros(2, 3, dtype=torch.int64))
        >>> round(loss.item(), 4)  # ln 256
        5.5452
    """
    if logits.shape[:-1] != targets.shape:
        raise ConfigError(
            f"next_token_loss got logits {tuple(logits.shape)} and targets "
            f"{tuple(targets.shape)}, but each position needs one target: "
            "give [batch, time, vocab] and [batch, time]"
        )
    return F.cross_entropy(logits.flatten(end_dim=-2), targets.flatten())


def _embed(
    tokens: Tensor,
    token_embedding: nn.Embedding,
    position_embedding: nn.Embedding,
    dropout: nn.Module,
) -> Tensor:
    if tokens.dim() != 2:
        raise ConfigError(
            f"GPT got tokens of shape {tuple(tokens.shape)}, but takes [batch, time]: "
            "add a batch dim of 1 to a single sequence"
        )
    time = tokens.shape[1]
    sequence_length = position_embedding.num_embeddings
    if time > sequence_length:
        raise ConfigError(
            f"GPT got sequences of {time} tokens, but has learned positions for only "
            f"sequence_length={sequence_length}: cut the input or build a longer model"
        )
    positions = torch.arange(time, device=tokens.device)
    return cast(Tensor, dropout(token_embedding(tokens) + position_embedding(positions)))


class _Embedding(nn.Module):
    """The first part of a model that is cut into stages."""

    def __init__(
        self, token_embedding: nn.Embedding, position_embedding: nn.Embedding, dropout: nn.Module
    ) -> None:
        super().__init__()
        self.token_embedding = token_embedding
        self.position_embedding = position_embedding
        self.dropout = dropout

    def forward(self, tokens: Tensor) -> Tensor:
        return _embed(tokens, self.token_embedding, self.position_embedding, self.dropout)


class _Block(nn.Module):
    """Pre-norm: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, d_model: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = _CausalSelfAttention(d_model, n_heads, dropout)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = _FeedForward(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class _CausalSelfAttention(nn.Module):
    def __init__(self, d_model: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.projection = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        # [batch, time, 3 * d_model] -> three of [batch, n_heads, time, d_model / n_heads]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        return cast(Tensor, self.projection(heads.transpose(1, 2).flatten(start_dim=2)))


class _FeedForward(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.expand = nn.Linear(d_model, 4 * d_model)
        self.projection = nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.projection(F.gelu(self.expand(x), approximate="tanh")))
