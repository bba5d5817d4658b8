"""scripts/in_context/lookup.py: the sentences, and their measurement."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from in_context import lookup

LEVELS = [lookup.LEVELS[2], lookup.Level(64, 8, 32, 8, 128), lookup.Level(1024, 8, 64, 16, 128)]


def values(level):
    return {name: jnp.int32(value) for name, value in lookup.traced(level).items()}


def draw(level, exchange_all=False, count=32):
    make = jax.jit(lookup.sentences, static_argnums=(1, 2, 4))
    tokens_BT, is_answer_T = make(jax.random.key(3), count, level.length, values(level), exchange_all)
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
    inputs, answers = draw(lookup.LEVELS[2], exchange_all=True)
    assert abs(np.mean(inputs == answers) - 1 / 12) < 0.03  # the fixed points of a random permutation


def test_the_accuracy_is_that_of_the_answers():
    level = lookup.LEVELS[2]

    def perfect(params, tokens_BT):
        return jax.nn.one_hot(jnp.roll(tokens_BT, -1, 1), 1024)

    def copies(params, tokens_BT):  # the input of each cell
        return jax.nn.one_hot(jnp.roll(tokens_BT, level.size - 1, 1), 1024)

    arguments = None, jax.random.key(5), 64, level.length, values(level)
    measure = [jax.jit(partial(lookup.accuracy, f), static_argnums=(2, 3))(*arguments) for f in (perfect, copies)]
    assert measure[0] == (1, 1)
    assert all(abs(float(part) - 1 / 12) < 0.05 for part in measure[1])
