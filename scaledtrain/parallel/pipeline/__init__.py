"""A model cut into stages that run one after another on several ranks."""

from scaledtrain.parallel.pipeline.costs import PartCost, measure_parts
from scaledtrain.parallel.pipeline.partition import describe_cut, partition
from scaledtrain.parallel.pipeline.parts import ModelParts, NamesParts, check_parts, find_parts
from scaledtrain.parallel.pipeline.split_points import Cut, given_cut
from scaledtrain.parallel.pipeline.stage import Held, Stage, find_tied, make_stage

__all__ = [
    "Cut",
    "Held",
    "ModelParts",
    "NamesParts",
    "PartCost",
    "Stage",
    "check_parts",
    "describe_cut",
    "find_parts",
    "find_tied",
    "given_cut",
    "make_stage",
    "measure_parts",
    "partition",
]
