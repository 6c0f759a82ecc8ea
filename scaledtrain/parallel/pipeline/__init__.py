"""Pipelines: a model in stages, one after another on different ranks."""

from scaledtrain.parallel.pipeline.execute import PipelineSchedule
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
from scaledtrain.parallel.pipeline.tied import TiedGroup

__all__ = [
    "SCHEDULES",
    "Action",
    "PipelineOrder",
    "breadth_first",
    "check_order",
    "peak_live",
    "pipeline_order",
    "simulate",
    "Timed",
    "Timetable",
    "PipelineSchedule",
    "TiedGroup",
    "AsynchronousName",
    "PipeDreamSchedule",
    "asynchronous_order",
    "delays",
    "PipeMare",
    "pipemare",
    "draw_pipeline",
    "pipeline_text",
    "write_pipeline_trace",
]
