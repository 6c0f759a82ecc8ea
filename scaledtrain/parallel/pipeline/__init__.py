"""A model cut into stages that run one after another on several ranks."""

from scaledtrain.parallel.pipeline.costs import PartCost, measure_parts
from scaledtrain.parallel.pipeline.execute import PipelineSchedule
from scaledtrain.parallel.pipeline.measured import planned_and_measured
from scaledtrain.parallel.pipeline.partition import describe_cut, partition
from scaledtrain.parallel.pipeline.parts import ModelParts, NamesParts, check_parts, find_parts
from scaledtrain.parallel.pipeline.pictures import (
    draw_pipeline,
    pipeline_text,
    write_pipeline_trace,
)
from scaledtrain.parallel.pipeline.pipedream import (
    AsynchronousName,
    PipeDreamSchedule,
    asynchronous_order,
    delays,
)
from scaledtrain.parallel.pipeline.pipeline import Pipeline
from scaledtrain.parallel.pipeline.pipemare import PipeMare, pipemare
from scaledtrain.parallel.pipeline.schedules import (
    SCHEDULES,
    Action,
    PipelineOrder,
    breadth_first,
    pipeline_order,
)
from scaledtrain.parallel.pipeline.simulate import (
    Timed,
    Timetable,
    check_order,
    peak_live,
    simulate,
)
from scaledtrain.parallel.pipeline.split_points import Cut, given_cut
from scaledtrain.parallel.pipeline.stage import Held, Stage, find_tied, make_stage
from scaledtrain.parallel.pipeline.tied import TiedGroup

__all__ = [
    "Action",
    "AsynchronousName",
    "Cut",
    "Held",
    "ModelParts",
    "NamesParts",
    "PartCost",
    "PipeDreamSchedule",
    "PipeMare",
    "Pipeline",
    "PipelineOrder",
    "PipelineSchedule",
    "SCHEDULES",
    "Stage",
    "TiedGroup",
    "Timed",
    "Timetable",
    "asynchronous_order",
    "breadth_first",
    "check_order",
    "check_parts",
    "delays",
    "describe_cut",
    "draw_pipeline",
    "find_parts",
    "find_tied",
    "given_cut",
    "make_stage",
    "measure_parts",
    "partition",
    "peak_live",
    "pipeline_order",
    "pipeline_text",
    "pipemare",
    "planned_and_measured",
    "simulate",
    "write_pipeline_trace",
]
