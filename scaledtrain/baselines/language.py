"""Baselines that say what token is next."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from scaledtrain.baselines.baseline import Baseline, LeftOut, check_targets
from scaledtrain.errors import ConfigError

__all__ = ["LanguageLearner"]

_BATCH_TOKENS = 2**18  # counted at once: sorting more pairs at a time is not much faster


class LanguageLearner:
    """Counts tokens and pairs of tokens that follow each other, c(b) and c(a, b).

    * ``random``: every token with the same probability: ln V nats a token.
    * ``unigram``: ``p(b) = (c(b) + 1) / (n + V)``, whatever is before it (Laplace's rule).
    * ``bigram``: ``p(b | a) = (c(a, b) + p(b)) / (c(a) + 1)``, which is the unigram after a token
      that was never seen, and ever less of it the more often it was (MacKay and Peto, 1995, with
      one pseudo-count).

    The memory is that of the pairs that there are, 24 bytes each, not of all V x V.

    Args:
        vocab_size: V.

    References:
        MacKay and Peto, "A hierarchical Dirichlet language model", Natural Language Engineering
        1(3), 1995.
    """

    names = ("random", "unigram", "bigram")

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._samples = 0
        self._counts = torch.zeros(vocab_size, dtype=torch.int64)
        self._pairs = _empty(vocab_size)
        self._waiting: list[Tensor] = []

    def see(self, inputs: Tensor, targets: Tensor) -> None:
        """Count a batch's tokens; targets below 0 are left out, as torch's losses do."""
        if inputs.shape != targets.shape or inputs.is_floating_point():
            raise ConfigError(
                f"baselines of text need a token at each place and the next one as its target, and "
                f"got {inputs.dtype} {list(inputs.shape)} and {targets.dtype} "
                f"{list(targets.shape)}; set baselines.kind if this is another kind of task"
            )
        self._samples += len(inputs)
        there = targets.flatten() >= 0
        before, after = inputs.flatten()[there].long(), targets.flatten()[there].long()
        for tokens in (before, after):
            check_targets(tokens, self._vocab_size, "tokens")
        self._counts += torch.bincount(after, minlength=self._vocab_size)
        self._waiting.append(torch.stack([before, after]))
        if sum(pairs.shape[1] for pairs in self._waiting) >= _BATCH_TOKENS:
            self._count_pairs()

    def _count_pairs(self) -> None:
        if self._waiting:
            pairs = torch.cat(self._waiting, dim=1)
            ones = torch.ones(pairs.shape[1], dtype=torch.float64)
            found = torch.sparse_coo_tensor(pairs, ones, self._pairs.shape, check_invariants=False)
            self._pairs = (self._pairs + found).coalesce()
            self._waiting = []

    def baselines(self, names: Iterable[str]) -> list[Baseline | LeftOut]:
        """Those of these names."""
        self._count_pairs()
        made = {"random": self._random, "unigram": self._unigram, "bigram": self._bigram}
        return [made[name]() for name in names]

    @property
    def _probabilities(self) -> Tensor:
        return (self._counts + 1).double() / (self._counts.sum() + self._vocab_size)

    def _random(self) -> Baseline:
        def outputs(inputs: Tensor) -> Tensor:
            return torch.zeros(*inputs.shape, self._vocab_size)

        return Baseline("random", "a token drawn at random", outputs, 0, is_trivial=True)

    def _unigram(self) -> Baseline:
        logits = self._probabilities.log().float()

        def outputs(inputs: Tensor) -> Tensor:
            return logits.expand(*inputs.shape, -1)

        says = "how frequent each token is"
        return Baseline("unigram", says, outputs, self._samples, is_trivial=True)

    def _bigram(self) -> Baseline:
        alone, pairs = self._probabilities, self._pairs

        def outputs(inputs: Tensor) -> Tensor:
            before, places = torch.unique(inputs.long(), return_inverse=True)
            counts = pairs.index_select(0, before).to_dense()
            shares = (counts + alone) / (counts.sum(1, keepdim=True) + 1)
            return shares.log().float()[places]

        return Baseline("bigram", "the bigram model", outputs, self._samples)


def _empty(size: int) -> Tensor:
    none = torch.zeros(2, 0, dtype=torch.int64)
    values = torch.zeros(0, dtype=torch.float64)
    return torch.sparse_coo_tensor(none, values, (size, size), check_invariants=False).coalesce()
