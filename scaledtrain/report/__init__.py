"""What runs wrote down, read back: tables and pictures."""

from scaledtrain.report.runs import RunLog, read_run

__all__ = ["RunLog", "read_run"]
