"""The images of prompts, as indices."""

from evaluation.tasks.prompt_layout import analogy_prompts, sequential_prompts


def test_analogy_prompt_is_shots_then_query_and_the_answer_is_its_annotation():
    prompts = analogy_prompts(["a"] * 4, [1, 3], shots=2, seed=0)
    for row, query, answer in zip(prompts.images(2), (1, 3), prompts.answer_Q, strict=True):
        inputs, targets = row[:-1:2], row[1:-1:2]
        assert (targets == inputs + 1).all() and (inputs % 2 == 0).all()
        assert query not in inputs // 2 and len(set(inputs)) == 2
        assert row[-1] == 2 * query and answer == 2 * query + 1
    assert prompts.images(0).tolist() == [[2], [6]]


def test_fewer_shots_are_the_last_ones_of_more():
    prompts = analogy_prompts(["a"] * 9, range(9), shots=4, seed=1)
    assert prompts.images(2).tolist() == prompts.images(4)[:, 4:].tolist()
    clips = sequential_prompts(3, 5)
    assert clips.images(4)[1].tolist() == [5, 6, 7, 8] and clips.answer_Q.tolist() == [4, 9, 14]
    assert clips.images(2)[1].tolist() == [7, 8]


def test_shots_have_the_querys_group_and_depend_on_the_seed():
    groups = ["cat", "dog"] * 5
    prompts = analogy_prompts(groups, range(10), shots=3, seed=1)
    for query, row in enumerate(prompts.images(3)):
        assert {groups[index // 2] for index in row} == {groups[query]}
    assert prompts.images(3).tolist() != analogy_prompts(groups, range(10), 3, seed=2).images(3).tolist()
