"""Seeds of training scenes and of held-out scenes are disjoint."""

import pathlib
import re

import pytest

from tokenizer.synthetic import seed_ranges

COMMANDS = re.compile(r"tokenizer\.(render|mappings)\b|^write ")


@pytest.mark.parametrize("seed", [0, 1, 399, 400, 10**6])
def test_benchmark_seeds_are_disjoint_from_training_seeds(seed):
    last_training = seed_ranges.training_seed(seed_ranges.FIRST_HELD_OUT - 1) + seed_ranges.SEEDS_PER_BLOCK - 1
    assert min(seed_ranges.benchmark_seeds(seed, 64)) > last_training
    assert seed_ranges.page_example_seed(0) > last_training
    assert not set(seed_ranges.benchmark_seeds(seed, 64)) & set(seed_ranges.benchmark_seeds(seed + 1, 64))
    assert seed_ranges.page_example_seed(0) not in seed_ranges.benchmark_seeds(seed, 64)


def test_seeds_of_training_the_benchmark_and_the_page_are_those_of_earlier_releases():
    """Other seeds would change published results and the data of the shipped models."""
    assert [seed_ranges.training_seed(block) for block in (0, 2, 499)] == [0, 2 * 10**6, 499 * 10**6]
    assert seed_ranges.benchmark_seeds(3, 2) == range(503 * 10**6, 503 * 10**6 + 2)
    assert seed_ranges.page_example_seed(1003) == 9 * 10**8 + 1003


def test_scripts_and_documents_render_seeds_that_are_not_reserved():
    root = pathlib.Path(__file__).parents[3]
    paths = [*root.glob("scripts/*.sh"), root / "DATASET.md", root / "evaluation" / "EVAL.md"]
    commands = [line for path in paths for line in path.read_text().replace("\\\n", " ").splitlines()]
    seeds = [seed for line in commands if COMMANDS.search(line) for seed in re.findall(r"--seed=(\d+)", line)]
    seeds += [match[1] for line in commands if (match := re.search(r"demo_sentences\.sh \"\S+ (\d+)", line))]
    assert len(seeds) >= 9
    for seed in seeds:
        seed_ranges.training_seed(int(seed))
