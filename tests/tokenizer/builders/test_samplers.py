"""Every epoch samples items once, in a new order that depends on the seed."""

import collections
import types

import pytest
from index_kit import make_index

from tokenizer.builders import file_index, samplers
from tokenizer.builders.file_index import FileIndex


def test_every_epoch_of_shots_uses_items_once_in_a_new_order():
    names = [f"{i:02d}.png" for i in range(11)]
    index, _ = make_index(names, file_index.by_name)
    sampler = samplers.Shots(index, types.SimpleNamespace(n_shots=3, seed=1))
    assert sampler.num_examples == 3
    epochs = [[ref.path for example in range(3) for (ref,) in sampler.rows(epoch, example)] for epoch in range(60)]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and len(set(map(tuple, epochs))) == 60
    left_over = collections.Counter(f"0/{name}" for name in names for epoch in epochs if f"0/{name}" not in epoch)
    assert len(left_over) == 11 and max(left_over.values()) < 25  # 11 of 60 each, on average
    other = samplers.Shots(index, types.SimpleNamespace(n_shots=3, seed=2))
    assert other.rows(0, 0) != sampler.rows(0, 0)


def test_every_epoch_of_classes_uses_as_many_images_as_possible_once(monkeypatch):
    sizes = {"a": 7, "b": 6, "c": 4, "d": 2, "e": 1}
    names = [f"{name}/{i}.png" for name, size in sizes.items() for i in range(size)]
    index, _ = make_index(names, file_index.by_class)
    sampler = samplers.Classes(index, types.SimpleNamespace(n_shots=2, images_per_shot=2, seed=1))
    monkeypatch.setattr(FileIndex, "sizes", lambda _: pytest.fail("an example reads all sizes"))
    # Rounds of two images of each class: a b c d, a b c, a b.
    assert sampler.num_examples == 2 + 1 + 1
    sampled = set()
    for epoch in range(40):
        used = []
        for example in range(sampler.num_examples):
            rows = [row[0].path for row in sampler.rows(epoch, example)]
            names = [path.split("/")[1] for path in rows]
            assert names[0] == names[1] != names[2] == names[3]
            used += rows
        assert len(set(used)) == len(used)
        sampled |= set(used)
    assert sampled == {f"0/{name}/{i}.png" for name, size in sizes.items() if size > 1 for i in range(size)}
