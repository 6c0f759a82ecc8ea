"""The ladder of checks that a model climbs before it is trained at scale."""

from scaledtrain.check.ladder import LADDER, Rung, climb
from scaledtrain.check.own import check
from scaledtrain.check.subject import Plan, Subject
from scaledtrain.check.verdict import Verdict

__all__ = ["LADDER", "Plan", "Rung", "Subject", "Verdict", "check", "climb"]
