"""Searches for settings: trials that are trainings, samplers and pruners by Optuna."""
