"""Small reference models: what the examples, the tests and the benchmarks train."""

from __future__ import annotations

from scaledtrain.models.convnet import ConvNet
from scaledtrain.models.gpt import GPT, GPT_10M, GPTArguments, next_token_loss
from scaledtrain.models.mlp import MLP

__all__ = ["GPT", "GPT_10M", "MLP", "ConvNet", "GPTArguments", "next_token_loss"]
