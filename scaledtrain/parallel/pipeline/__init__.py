"""Pipelines: a model in stages, one after another on different ranks."""
