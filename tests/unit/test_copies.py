"""Copies that lie in the same memory again."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from scaledtrain import Callback, Checkpointing, Trainer
from scaledtrain.copies import Copies, Uncopied, copied
from tests.checkpoints import fit


def test_a_second_copy_lies_where_the_first_did() -> None:
    tensors = OrderedDict(
        a=torch.arange(4.0),
        b=torch.arange(4.0, 8.0),
        turned=torch.arange(6).reshape(2, 3).T,
        half=torch.ones(8, dtype=torch.bfloat16),  # 16 bytes, as a and b
        scalar=torch.tensor(5),
        none=torch.empty(0, 3),
    )
    copies = Copies()
    places = []
    for _ in range(2):
        with copies:
            made = copied({"model": tensors, "steps": [1, (2, None)]})
        for name, tensor in tensors.items():
            assert torch.equal(made["model"][name], tensor)
            assert made["model"][name].dtype is tensor.dtype
            assert tensor.numel() == 0 or made["model"][name].data_ptr() != tensor.data_ptr()
        assert made["steps"] == [1, (2, None)]
        places.append([tensor.data_ptr() for tensor in made["model"].values()])
        tensors["a"] += 1
    assert places[0] == places[1]
    assert len({place for place in places[0] if place}) == 5


def test_tied_weights_are_copied_once() -> None:
    weight = nn.Parameter(torch.ones(2))
    with Copies():
        made = copied({"a": weight, "b": weight, "one": weight[:1]})
    assert made["a"] is made["b"]
    assert made["one"].shape == (1,)
    with Uncopied():
        assert copied([weight])[0].data_ptr() == weight.data_ptr()
    apart = copied({"weight": weight})["weight"]  # elsewhere it is deepcopy's
    assert apart.data_ptr() != weight.data_ptr()


def test_saving_while_training_takes_no_more_memory_each_time(tmp_path: Path) -> None:
    """Of the parameters of the model that is trained by AdamW: 3 tensors of each."""
    places: list[set[int]] = []

    class Watch(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            assert trainer._saver is not None
            memory = trainer._saver._copies._memory  # type: ignore[union-attr]
            places.append({t.data_ptr() for each in memory.values() for t in each if t.numel()})

    fit(tmp_path, saved=Checkpointing(every_steps=2, asynchronous=True), callbacks=[Watch()])
    assert len(places[3]) >= 3 * 4
    assert places[3] == places[-1]
