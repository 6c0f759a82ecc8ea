"""Where the time of a step goes: every second counts once."""

from __future__ import annotations

from scaledtrain.timeline import Span, Timeline


def test_what_lies_inside_a_span_counts_to_the_inner_phase_only() -> None:
    """Computing from 1 to 6, meanwhile communicating from 2 to 3 and waiting from 3 to 4."""
    timeline = Timeline(keep=True)
    timeline.add("data", 0.0, 1.0)
    timeline.add("communication", 2.0, 3.0)
    timeline.add("waiting", 3.0, 4.0)
    timeline.add("compute", 1.0, 6.0)
    timeline.add("communication", 6.0, 8.0)
    seconds, spans = timeline.drain()
    assert seconds == {"data": 1.0, "communication": 3.0, "waiting": 1.0, "compute": 3.0}
    assert sum(seconds.values()) == 8.0
    assert spans[3] == Span("compute", 1.0, 6.0)  # as it was


def test_a_span_in_a_span_in_a_span() -> None:
    timeline = Timeline()
    timeline.add("waiting", 3.0, 4.0)
    timeline.add("communication", 2.0, 5.0)
    timeline.add("compute", 0.0, 6.0)
    assert timeline.drain()[0] == {"waiting": 1.0, "communication": 2.0, "compute": 3.0}
    timeline.add("compute", 6.0, 7.0)
    assert timeline.drain()[0] == {"compute": 1.0}
