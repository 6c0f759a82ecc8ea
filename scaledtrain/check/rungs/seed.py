"""Whether the same seed gives the same run."""

from __future__ import annotations

from scaledtrain.check.modules import differing_module, outputs_by_module, same
from scaledtrain.check.subject import Recorder, Subject
from scaledtrain.check.verdict import Verdict, failed, passed
from scaledtrain.seeding import seed_everything

__all__ = ["seed"]

_STEPS = 4
_RESUME = ("resume",)  # it compares runs with the same seed


def seed(subject: Subject) -> Verdict:
    """Two runs of a few steps, from the first initial value on, must be equal bit for bit.

    Names what differs first: initial parameters, batches, a module in the forward pass, or the
    backward pass and the update.
    """
    runs = []
    for _ in range(2):
        recorder = Recorder()
        with subject.training(recorder) as (trainer, loader):
            trainer.fit(loader, max_steps=_STEPS)
        runs.append(recorder)
    one, two = runs
    if same(one.ended, two.ended) and same(one.losses, two.losses):
        return passed(f"two runs of {len(one.losses)} steps with seed {subject.seed} are equal")
    begun = [name for name, t in one.begun.items() if not same(t, two.begun[name])]
    if begun:
        return failed(
            f"with the same seed {begun[0]} begins with other values each time",
            "draw initial values from torch's, NumPy's or Python's global generator, which are "
            "seeded, or seed your own",
            undermines=_RESUME,
            differs="initial values",
        )
    for i, (a, b) in enumerate(zip(one.batches, two.batches, strict=False)):
        if not same(a, b):
            return failed(
                f"with the same seed batch {i} holds other values each time",
                "draw what data sets and transforms draw from the global generators, or from one "
                "with a seed; give a sampler of your own a generator with a seed",
                undermines=_RESUME,
                differs="batches",
            )
    if place := _forward(subject):
        return failed(
            f"with the same seed {place} returns other values each time in train mode",
            "draw from the global generators, or seed your own",
            undermines=_RESUME,
            differs=place,
        )
    return failed(
        "with the same seed the forward passes are equal, but gradients or updates are not",
        "use deterministic kernels (deterministic=true), and keep no state outside of the model",
        undermines=_RESUME,
        differs="update",
    )


def _forward(subject: Subject) -> str:
    (batch,) = subject.batches(1)
    passes = []
    for _ in range(2):
        model = subject.model()
        seed_everything(subject.seed)
        passes.append(outputs_by_module(model, lambda m=model: subject.loss(m, batch)))  # type: ignore[misc]
    return differing_module(*passes)
