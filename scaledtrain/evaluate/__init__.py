"""What a saved model is worth: metrics, calibration, and what can be answered at which accuracy."""

from scaledtrain.evaluate.calibration import expected_calibration_error, reliability
from scaledtrain.evaluate.coverage import Threshold, coverage_curve, thresholds
from scaledtrain.evaluate.measure import EvaluateConfig, calibrate, evaluate_run
from scaledtrain.evaluate.results import Calibration, Evaluated, read_evaluated, write_evaluated

__all__ = [
    "Calibration",
    "EvaluateConfig",
    "Evaluated",
    "Threshold",
    "calibrate",
    "coverage_curve",
    "evaluate_run",
    "expected_calibration_error",
    "read_evaluated",
    "reliability",
    "thresholds",
    "write_evaluated",
]
