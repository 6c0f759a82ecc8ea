"""Models and data with one classic bug each, and the same without."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from scaledtrain.tasks import Task

CLASSES, FEATURES, N = 4, 12, 64


def samples(n: int = N) -> tuple[Tensor, Tensor]:
    """Four clouds of twelve numbers, and which one each sample is of."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (n,), generator=generator)
    centres = torch.randn(CLASSES, FEATURES, generator=generator)
    return centres[y] + 0.3 * torch.randn(n, FEATURES, generator=generator), y


def loader(x: Tensor | None = None, y: Tensor | None = None) -> DataLoader[Any]:
    usual = samples()
    data = TensorDataset(usual[0] if x is None else x, usual[1] if y is None else y)
    return DataLoader(data, batch_size=16, shuffle=True)


class Net(nn.Module):
    """Without a bug: two layers, batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, 32)
        self.norm = nn.BatchNorm1d(32)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(32, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.relu(self.norm(self.hidden(x))))
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


class Softmaxed(Net):
    """The loss makes a softmax of probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.probabilities = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.probabilities(super().forward(x))
        return out


class Frozen(Net):
    """One layer is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden.requires_grad_(False)


class Detached(Net):
    """A branch that no gradient enters."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(FEATURES, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x) + self.branch(x).detach())
        return out


class Dead(nn.Module):
    """A huge negative bias before a rectifier, called as a function."""

    def __init__(self, units: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 32)
        self.second = nn.Linear(32, 32)
        self.head = nn.Linear(32, CLASSES)
        with torch.no_grad():
            self.second.bias[:units] = -1e4

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.second(torch.tanh(self.first(x)))))
        return out


class Mixed(Net):
    """Features go through a view that mixes the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = Turn()

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.turn(super().features(x))
        return out


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.t().contiguous().view(x.shape)


class PredictsInTrainMode(Net):
    def predict(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = self(x)
        return out


class StaysInEvalMode(Net):
    def predict(self, x: Tensor) -> Tensor:
        self.eval()
        with torch.no_grad():
            out: Tensor = self(x)
        return out


class Unseeded(Net):
    """Noise in train mode, from a generator that nobody seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = Noise()

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.noise(super().features(x))
        return out


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * random.SystemRandom().uniform(0.9, 1.1) if self.training else x


class UnseededWeights(Net):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.head.bias += random.SystemRandom().uniform(0.0, 0.01)


class UnseededData(Dataset[Any]):
    def __init__(self) -> None:
        self.x, self.y = samples()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + random.SystemRandom().uniform(0.0, 0.01), self.y[index]


class Counting(Net):
    """Its noise fades with a count that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fading = Fading()

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.fading(super().features(x))
        return out


class Fading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            return x * (1 + 0.1 / self.calls)
        return x


class AlwaysDrops(Net):
    """F.dropout without training=self.training."""

    def __init__(self) -> None:
        super().__init__()
        self.always = Always()

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.always(super().features(x))
        return out


class Always(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3)


class Overflowing(Net):
    """Beyond 65504, the largest number of float16, inside a layer whose output is small again."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(32, 32)
        with torch.no_grad():
            self.large.weight.fill_(1e5)

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = super().features(x) + 1e-6 * self.large(super().features(x))
        return out


class Text(nn.Module):
    """Attention over eight tokens."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 32)
        self.positions = nn.Embedding(8, 32)
        self.qkv = nn.Linear(32, 96)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 16)
        self._causal = causal
        for embedding in (self.embedding, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=self._causal)
        out: Tensor = self.head(x + self.mlp(x))
        return out


def tokens(shift: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Batches of eight tokens and those that come so many places later."""
    text = torch.randint(16, (32, 12), generator=torch.Generator().manual_seed(1))
    pairs = text[:, 2:10], text[:, 2 + shift : 10 + shift]
    return list(zip(pairs[0].split(8), pairs[1].split(8), strict=True))


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def summed_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


def task() -> Task:
    """For a config."""
    return Task(TensorDataset(*samples()))
