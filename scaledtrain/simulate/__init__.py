"""``scaledtrain.simulate(...)``, and the command ``python -m scaledtrain.simulate``."""

from scaledtrain.sim.simulate import Simulation, simulate
from scaledtrain.sim.times import Times, simulate_times

__all__ = ["Simulation", "Times", "simulate", "simulate_times"]
