"""scripts/demo_model/lookup.py: its sentences and their measurement."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from demo_model import lookup

from tokenizer.mappings import held_out
from tokenizer.mappings.steps import Geometry

MOVING = next(level for level in lookup.LEVELS if level.moves)
LEVELS = [lookup.LEVELS[2], lookup.Level(64, 8, 32, 8, 128), lookup.Level(1024, 8, 64, 16, 128)]


def values(level):
    return {name: jnp.int32(value) for name, value in lookup.traced(level).items()}


def draw(level, test="", count=32):
    make = jax.jit(lookup.sentences, static_argnums=(1, 2, 4))
    tokens_BT, is_answer_T = make(jax.random.key(3), count, level.length, values(level), test)
    pictures = np.asarray(tokens_BT).reshape(count, -1, 2, level.size)
    assert (np.asarray(is_answer_T).reshape(-1, 2, level.size) == [[[False], [True]]]).all()
    return pictures[:, :, 0].reshape(count, -1), pictures[:, :, 1].reshape(count, -1)


@pytest.mark.parametrize("level", LEVELS)
def test_the_answers_of_a_sentence_permute_its_symbols(level):
    shares = []
    for inputs, answers in zip(*draw(level), strict=True):
        mapping = dict(zip(inputs.tolist(), answers.tolist(), strict=True))
        assert [mapping[code] for code in inputs.tolist()] == answers.tolist()
        assert len(set(mapping.values())) == len(mapping) <= level.most
        assert max(mapping) < level.symbols
        shares.append(np.mean(inputs == answers))
    assert min(shares) < 0.2 and max(shares) > 0.8  # from all to no symbols are exchanged


def test_all_symbols_are_exchanged_for_a_measurement():
    inputs, answers = draw(lookup.LEVELS[2], lookup.EXCHANGE)
    assert abs(np.mean(inputs == answers) - 1 / 12) < 0.03  # the fixed points of a random permutation


def geometry_of(inputs, answers):
    """Returns the geometry [symmetry, down, right] that makes the answers [n,64] from the inputs, or None."""
    for geometry in np.ndindex(*held_out.GEOMETRIES.shape):
        cells = Geometry(*geometry).apply(np.arange(64).reshape(8, 8), {}).ravel()
        if (inputs[:, cells] == answers).all():
            return geometry
    return None


def test_cells_move_by_geometries_that_training_may_use():
    sentences = zip(*(part.reshape(32, -1, 64) for part in draw(MOVING, lookup.MOVE)), strict=True)
    geometries = [geometry_of(*sentence) for sentence in sentences]
    assert not any(held_out.GEOMETRIES[geometry] for geometry in geometries)
    assert len(set(geometries)) > 10
    assert 6 <= sum(geometry[1:] == (0, 0) for geometry in geometries) <= 26  # half of 32, within 3.5 standard errors


def test_cells_of_half_of_the_sentences_move():
    """Then the positions of the input's symbols are not those of their images."""
    inputs, answers = (part.reshape(256, -1, 64) for part in draw(MOVING, count=256))
    stays = [
        len(set(zip(i.ravel().tolist(), a.ravel().tolist(), strict=True))) == len(set(i.ravel().tolist()))
        for i, a in zip(inputs, answers, strict=True)
    ]
    assert 100 <= sum(stays) <= 156
    unchanged = [np.array_equal(np.sort(i.ravel()), np.sort(a.ravel())) for i, a in zip(inputs, answers, strict=True)]
    assert np.mean(np.array(unchanged)[~np.array(stays)]) > 0.4  # half of the moved sentences exchange nothing


def test_the_accuracy_is_that_of_the_answers():
    level = lookup.LEVELS[2]

    def perfect(params, tokens_BT):
        return jax.nn.one_hot(jnp.roll(tokens_BT, -1, 1), 1024)

    def copies(params, tokens_BT):  # the input of each cell
        return jax.nn.one_hot(jnp.roll(tokens_BT, level.size - 1, 1), 1024)

    arguments = None, jax.random.key(5), 64, level.length, values(level), lookup.EXCHANGE
    measure = [jax.jit(partial(lookup.accuracy, f), static_argnums=(2, 3, 5))(*arguments) for f in (perfect, copies)]
    assert measure[0] == (1, 1)
    assert all(abs(float(part) - 1 / 12) < 0.05 for part in measure[1])
