"""A model cut into stages that run one after another on several ranks."""

from scaledtrain.parallel.pipeline.cut import Cut, given_cut
from scaledtrain.parallel.pipeline.parts import ModelParts, NamesParts, check_parts, find_parts
from scaledtrain.parallel.pipeline.stage import Held, Stage, find_tied, make_stage

__all__ = [
    "Cut",
    "Held",
    "ModelParts",
    "NamesParts",
    "Stage",
    "check_parts",
    "find_parts",
    "find_tied",
    "given_cut",
    "make_stage",
]
