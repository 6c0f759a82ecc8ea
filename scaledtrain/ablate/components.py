"""What a training may have, and what takes it away: a line for each component."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scaledtrain.command_line import compose

__all__ = ["COMPONENTS", "Component", "components_in"]

_IDENTITY = ("_target_", "name")  # what a choice of a group is known by


@dataclass(frozen=True)
class Component:
    """Something that a config may have on.

    Args:
        name: as in ``ablate.only``.
        off: ``key=value``, what takes it away; or ``group=choice``, which takes the choice's own
            settings, as those of the one before may mean nothing to it.
        only_if: ``key=value``: it is this component only if that is so (a class by its last name);
            empty: always.
    """

    name: str
    off: str
    only_if: str = ""

    def taken_from(self, config: DictConfig) -> DictConfig | None:
        """The config without it; None if the config does not have it on."""
        if self.only_if:
            key, _, value = self.only_if.partition("=")
            if str(OmegaConf.select(config, key)).rpartition(".")[2] != value:
                return None
        key, _, value = self.off.partition("=")
        now: Any = OmegaConf.select(config, key)
        if now is None or now == {}:
            return None
        if "." not in key and isinstance(now, DictConfig) and value != "null":  # of a group
            then: Any = OmegaConf.select(compose([self.off]), key)
            if all(now.get(name) == then.get(name) for name in _IDENTITY):
                return None
        else:
            then = OmegaConf.select(OmegaConf.from_dotlist([self.off]), key)
            if now == then:
                return None
        without = deepcopy(config)
        OmegaConf.update(without, key, then, merge=False)
        return without


COMPONENTS = [
    Component("warmup", "lr_scheduler.warmup=0"),
    Component("warmup", "lr_scheduler.pct_start=0.0"),
    Component("lr_scheduler", "lr_scheduler=null"),
    Component("lr_scaling", "lr_scaling.rule=none"),
    Component("lars", "optimizer=sgd", "optimizer._target_=LARS"),
    Component("lamb", "optimizer=adamw", "optimizer._target_=LAMB"),
    Component("momentum", "optimizer.momentum=0.0"),
    Component("weight_decay", "optimizer.weight_decay=0.0"),
    Component("decay_of_matrices_only", "weight_decay_on=all"),
    Component("clipping", "max_grad_norm=null"),
    Component("clipping", "optimizer.max_grad_norm=null"),
    Component("zero_gamma", "zero_gamma=false"),
    Component("dropout", "model.dropout=0.0"),
    Component("tied_embedding", "model.tied_embedding=false"),
    Component("mixed_precision", "precision=fp32"),
    Component("recompute", "activation_checkpointing=null"),
    Component("compile", "compile=null"),
    Component("compression", "strategy.compression=null"),
    Component("staleness_correction", "strategy.correction=null"),
    Component("overlap", "strategy.overlap=false"),
    Component("drop_compute", "drop_compute.threshold_seconds=.inf"),
    Component("balance", "balance=even"),
    Component("growing_batch", "batch.grow=null"),
    Component("whitening", "data.normalize=standardize", "data.normalize=whiten"),
    Component("whitening", "data.normalize=standardize", "data.normalize.kind=whiten"),
    Component("normalization", "data.normalize=null"),
    Component("class_balance", "data.balance_classes=null"),
]


def components_in(config: DictConfig) -> dict[str, DictConfig]:
    """Name -> the config without it, of each component that a config has on.

    Args:
        config: composed by Hydra.
    """
    found: dict[str, DictConfig] = {}
    for component in COMPONENTS:
        source = found.get(component.name, config)  # one of two lines: both are taken away
        without = component.taken_from(source)
        if without is not None:
            found[component.name] = without
    return found
