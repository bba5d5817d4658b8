"""Rows, batches and the data's state, against packings made here by a plain json and base64 loop."""

import base64
import fractions
import gc
import json
import os
import pathlib
import shutil
import time
import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM import flags
from EasyLM.data import jsonl_file, line_index, packed_file, permutation, records, token_rows
from EasyLM.data.dataset import DATASET_FLAGS, make_dataset
from EasyLM.errors import UserError
from EasyLM.storage import columns
from EasyLM.training import batches


def dataset(path, seq_length=128, vocab_size=512, fields=",{tokens},", **settings):
    """A json row source; `settings` are those of json_dataset."""
    config = flags.defaults(DATASET_FLAGS)
    config.text_processor.fields = fields
    config.json_dataset.update(path=str(path), seq_length=seq_length, batch_size=4, **settings)
    flags.validate(DATASET_FLAGS, config)
    return make_dataset(config, None, vocab_size)


def plain_stream(*paths):
    """All tokens, by a plain loop."""
    tokens = []
    for path in paths:
        with open(path) as lines:
            for line in lines:
                tokens += np.frombuffer(base64.b64decode(json.loads(line)["tokens"]), "<i4").tolist()
    return np.array(tokens)


def plain_rows(stream, seq_length, start, count, begin=0):
    """The release's packing: the endless stream, cut into rows; targets are one further."""
    index = begin + np.arange(start * seq_length, (start + count) * seq_length + 1)
    tokens = stream[index % len(stream)]
    return tokens[:-1].reshape(count, seq_length), tokens[1:].reshape(count, seq_length)


def assert_rows(got, inputs, targets, masks=None):
    np.testing.assert_array_equal(got["input_tokens"], inputs)
    np.testing.assert_array_equal(got["target_tokens"], targets)
    np.testing.assert_array_equal(got["loss_masks"], np.ones_like(inputs) if masks is None else masks)
    assert [array.dtype for array in got.values()] == [np.int32, np.int32, np.float32]


def base64_line(ids, template='{"tokens": "%s"}', dtype="<i4"):
    return template % base64.b64encode(np.asarray(ids).astype(dtype).tobytes()).decode()


@pytest.fixture
def sentences(golden, tmp_path):
    """The golden data set in a directory of its own, where an index may be put beside it."""
    return shutil.copy(golden / "lvm_tiny" / "dataset.jsonl", tmp_path / "dataset.jsonl")


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    """Files with lines of many lengths (an empty sentence and single tokens among them), in several spellings."""
    directory, rng = tmp_path_factory.mktemp("two"), np.random.default_rng(1)
    spellings = [
        '{"tokens": "%s"}',
        '{"tokens":"%s"}',
        '{"tokens": "%s", "label": "cat"}',
        '{"other": {"tokens": "AAAA"}, "tokens" :  "%s" }\r',
        '{"tokens": "%s"}',
    ]
    for name in ("b", "a"):
        lines = []
        for number in range(300):
            line = base64_line(rng.integers(0, 512, rng.integers(0, 12)), spellings[number % 5])
            lines.append(line.replace("/", r"\/") if number % 7 == 0 else line)  # as PHP writes base64
        # No newline after the last line.
        (directory / f"{name}.jsonl").write_text("\n\n".join(lines))
    return directory


class TestRows:
    @pytest.mark.parametrize("seq_length, count", [(1, 5), (7, 40), (128, 4), (1000, 9)])
    def test_reference_packing(self, sentences, seq_length, count):
        source, stream = dataset(sentences, seq_length), plain_stream(sentences)
        assert source.num_tokens == len(stream) == 25896
        assert source.rows_per_epoch == -(-len(stream) // seq_length)
        last = source.rows_per_epoch - count // 2 - 1
        for start in (0, 3, last, 10**9):  # `last`: runs from the end of the file into its beginning
            assert_rows(source.rows(start, count), *plain_rows(stream, seq_length, start, count))

    def test_a_row_may_be_longer_than_the_data(self, tmp_path):
        (tmp_path / "short.jsonl").write_text(base64_line([5, 6, 7]))
        assert_rows(
            dataset(tmp_path / "short.jsonl", 8).rows(1, 2),
            [[7, 5, 6, 7, 5, 6, 7, 5], [6, 7, 5, 6, 7, 5, 6, 7]],
            [[5, 6, 7, 5, 6, 7, 5, 6], [7, 5, 6, 7, 5, 6, 7, 5]],
        )

    @pytest.mark.parametrize("window", [1, jsonl_file.WINDOW_BYTES])
    @pytest.mark.parametrize("order", ["b.jsonl a.jsonl", "a.jsonl b.jsonl", "*.jsonl"])
    def test_several_files_in_the_order_given(self, two_files, monkeypatch, order, window):
        monkeypatch.setattr(jsonl_file, "WINDOW_BYTES", window)
        names = ["a.jsonl", "b.jsonl"] if order == "*.jsonl" else order.split()
        without_blanks = []
        for name in names:
            lines = [line for line in (two_files / name).read_text().split("\n") if line]
            (two_files / f"{name}.plain").write_text("\n".join(lines))
            without_blanks.append(two_files / f"{name}.plain")
        stream = plain_stream(*without_blanks)
        source = dataset(", ".join(str(two_files / name) for name in order.split()), 33)
        for start in range(0, 2 * source.rows_per_epoch, 5):
            assert_rows(source.rows(start, 5), *plain_rows(stream, 33, start, 5))

    def test_a_file_is_two_open_files(self, tmp_path):
        """Itself and its index: what the limit of open files is raised for, where a data set has many files."""
        for number in range(10):
            (tmp_path / f"{number}.jsonl").write_text(base64_line([number]))
        kept = [dataset(tmp_path / "*.jsonl")]  # what stays open from the first time on is open
        gc.collect()  # what earlier tests left is closed now, or not before the end
        before = len(os.listdir("/proc/self/fd"))
        kept.append(dataset(tmp_path / "*.jsonl"))
        assert len(os.listdir("/proc/self/fd")) - before == 2 * 10 and kept[1].num_tokens == 10

    @pytest.mark.parametrize(
        "fields, head, body_mask, tail",
        [
            ("{tokens}", [], 1, []),
            ("[{tokens}]", [], 0, []),
            ("<|300|>,{tokens},<|301|>", [(300, 1)], 1, [(301, 1)]),
            ("[<|300|>],[<|301|>],{tokens}", [(300, 0), (301, 0)], 1, []),
            ("<|300|>,[{tokens}],[<|301|>],<|302|>", [(300, 1)], 0, [(301, 0), (302, 1)]),
        ],
    )
    def test_fields_and_masks(self, two_files, fields, head, body_mask, tail):
        ids, masks = [], []
        for line in (two_files / "a.jsonl").read_text().split("\n"):
            if line:
                body = np.frombuffer(base64.b64decode(json.loads(line)["tokens"]), "<i4").tolist()
                record = [*head, *((token, body_mask) for token in body), *tail]
                ids += [token for token, _ in record]
                masks += [mask for _, mask in record]
        source = dataset(two_files / "a.jsonl", 9, fields=fields)
        for start, count in ((0, 30), (source.rows_per_epoch - 3, 6)):
            inputs, targets = plain_rows(np.array(ids), 9, start, count)
            _, target_masks = plain_rows(np.array(masks), 9, start, count)
            assert_rows(source.rows(start, count), inputs, targets, target_masks)

    def test_a_nested_field_of_the_same_name_is_another_field(self, tmp_path):
        nested = '{"more": ' + base64_line([9]) + ", "
        lines = [nested + base64_line([1, 2])[1:], nested + '"tokens": ""}', base64_line([3])]
        (tmp_path / "nested.jsonl").write_text("\n".join(lines))
        np.testing.assert_array_equal(dataset(tmp_path / "nested.jsonl", 3).rows(0, 1)["input_tokens"], [[1, 2, 3]])

    def test_two_token_fields_need_no_slicing(self, tmp_path):
        line = json.dumps({"a": base64_line([1, 2], "%s"), "b": base64_line([3], "%s")})
        (tmp_path / "two.jsonl").write_text(f"{line}\n{line}\n")
        got = dataset(tmp_path / "two.jsonl", 5, fields="{a},[{b}]").rows(0, 1)
        assert_rows(got, [[1, 2, 3, 1, 2]], [[2, 3, 1, 2, 3]], [[1, 0, 1, 1, 0]])

    @pytest.mark.parametrize("dtype", ["u2", "i8"])
    def test_item_types(self, tmp_path, dtype):
        ids = np.arange(500)
        (tmp_path / "ids.jsonl").write_text(base64_line(ids, dtype=f"<{dtype}"))
        config = flags.defaults(DATASET_FLAGS)
        config.text_processor.update(fields="{tokens}", base64_token_dtype=dtype)
        config.json_dataset.update(path=str(tmp_path / "ids.jsonl"), seq_length=7)
        source = make_dataset(config, None, 512)
        for start in range(0, 71, 3):
            assert_rows(source.rows(start, 2), *plain_rows(ids, 7, start, 2))

    def test_always_start_with_bos(self, sentences):
        source = dataset(sentences, vocab_size=8292, always_start_with_bos=True)
        inputs, targets = plain_rows(plain_stream(sentences), 128, 2, 3)
        inputs = inputs.copy()
        inputs[:, 0] = 8192
        assert_rows(source.rows(2, 3), inputs, targets)

    def test_start_seek_loc_and_counters(self, sentences):
        lines = sentences.read_bytes().splitlines(keepends=True)
        source = dataset(
            sentences, start_seek_loc=len(lines[0] + lines[1]), example_index_at_start=50, tokens_count_at_start=7000
        )
        stream = plain_stream(sentences)
        ends = np.cumsum([len(base64.b64decode(json.loads(line)["tokens"])) // 4 for line in lines])
        begin = ends[1]
        assert_rows(source.rows(0, 300), *plain_rows(stream, 128, 0, 300, begin))
        assert source.metrics(10)["dataset_total_tokens"] == 7000 + 10 * 128
        for consumed, expected in (
            (0, 50),
            (100, 50 - 2 + np.searchsorted(ends, begin + 100 * 128, side="right")),
            (200, np.searchsorted(ends, begin + 200 * 128 - len(stream), side="right")),  # the second pass: from 0 on
        ):
            assert source.metrics(consumed)["dataset_example_index"] == expected

    def test_throughput_window(self, sentences, monkeypatch):
        clock = iter([0.0, 10.0, 11.0, 12.0])
        monkeypatch.setattr(token_rows, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
        source = dataset(sentences, throughput_average_window_size=2)  # 2 batches of 4 rows of 128 tokens
        figures = [source.metrics(consumed) for consumed in (0, 4, 8, 12)]
        assert figures[-1]["dataset_average_tps"] == 8 * 128 / 2
        assert figures[-1]["dataset_accumulated_tps"] == 12 * 128 / 12

    def test_reads_only_the_bytes_of_its_rows(self, sentences):
        source = dataset(sentences)
        source.rows(50, 4)
        assert 513 * 16 / 3 <= source.bytes_read <= 513 * 16 / 3 + 16 * 3 + 200  # whole quads; what is between lines


class TestShuffle:
    @pytest.mark.parametrize("seq_length", [25896, 5000, 100])
    def test_an_epoch_is_a_permutation_of_all_rows(self, sentences, seq_length):
        source, stream = dataset(sentences, seq_length, shuffle_seed=3), plain_stream(sentences)
        epoch = source.rows_per_epoch
        inputs, targets = plain_rows(stream, seq_length, 0, epoch)
        orders = []
        for number in range(3):
            order = [source.shuffled(row) for row in range(number * epoch, (number + 1) * epoch)]
            assert sorted(order) == list(range(epoch))
            assert_rows(source.rows(number * epoch, epoch), inputs[order], targets[order])
            orders.append(order)
        assert epoch < 6 or (orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0]))

    def test_the_seed_decides(self, sentences):
        first, again, other = (dataset(sentences, shuffle_seed=seed).rows(0, 60) for seed in (3, 3, 4))
        assert_rows(first, *(again[name] for name in ("input_tokens", "target_tokens")))
        assert (first["input_tokens"] != other["input_tokens"]).any(axis=1).mean() > 0.9

    def test_masks_follow_their_rows(self, sentences):
        fields = "[<|300|>],{tokens}"
        plain = dataset(sentences, 50, fields=fields).rows(0, 520)
        source = dataset(sentences, 50, fields=fields, shuffle_seed=0)
        got, order = source.rows(0, 100), [source.shuffled(row) for row in range(100)]
        assert_rows(got, *(plain[name][order] for name in plain))
        assert got["loss_masks"].min() == 0

    @pytest.mark.parametrize("count", [2, 5, 64, 65, 1000])
    def test_every_place_is_as_likely(self, count):
        """Chi-square of the numbers that come at the first, a middle and the last place, over many seeds and epochs."""
        draws = 20 * count
        for place in (0, count // 2, count - 1):
            seen = [permutation.permuted(place, count, seed, epoch) for seed in range(draws // 4) for epoch in range(4)]
            expected = len(seen) / count
            chi_square = ((np.bincount(seen, minlength=count) - expected) ** 2 / expected).sum()
            assert abs(chi_square - (count - 1)) < 5 * np.sqrt(2 * (count - 1))  # 5 standard deviations

    def test_neighbours_are_separated(self):
        """In a random order, the distance of rows that were neighbours averages a third of the range."""
        order = np.array([permutation.permuted(place, 5000, 7, 0) for place in range(5000)])
        assert abs(np.abs(np.diff(order)).mean() - 5000 / 3) < 100
        assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.06

    def test_huge_ranges_take_no_memory(self):
        numbers = {permutation.permuted(place, 10**12, 1, 0) for place in range(100)}
        assert len(numbers) == 100 and max(numbers) > 10**11


class TestIndex:
    def test_kept_beside_the_file_and_used_again(self, sentences, monkeypatch):
        dataset(sentences)
        indexes = [name for name in os.listdir(sentences.parent) if name.endswith(".index")]
        assert len(indexes) == 1 and len(os.listdir(sentences.parent)) == 2
        monkeypatch.setattr(line_index, "scan_range", None)
        dataset(sentences, seq_length=64)
        with pytest.raises(TypeError):  # other settings have their own
            dataset(sentences, fields="<|5|>,{tokens}")

    def test_made_anew_when_the_file_changes(self, sentences):
        dataset(sentences)
        lines = sentences.read_text().splitlines(keepends=True)
        sentences.write_text("".join(lines[:5]))
        assert dataset(sentences).num_tokens == len(plain_stream(sentences))
        text = "".join(lines[5:10])[: len("".join(lines[:5]))]
        sentences.write_text(base64_line([1] * 50) + "\n" * (len("".join(lines[:5])) - len(base64_line([1] * 50))))
        os.utime(sentences, ns=(1, 1))  # the same size, another time
        assert text and dataset(sentences).num_tokens == 50

    def test_a_damaged_index_is_replaced(self, sentences):
        dataset(sentences)
        (index,) = sentences.parent.glob("*.index")
        index.write_bytes(b"half an index")
        assert dataset(sentences).num_tokens == 25896

    def test_in_the_users_cache_where_the_directory_cannot_be_written(self, sentences, tmp_path_factory, monkeypatch):
        cache = tmp_path_factory.mktemp("cache")
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setattr(columns, "_is_writable", lambda path: not path.startswith(str(sentences.parent)))
        assert dataset(sentences).num_tokens == 25896
        assert len(list(cache.rglob("*.index"))) == 1 and os.listdir(sentences.parent) == ["dataset.jsonl"]

    @pytest.mark.parametrize("block", [1, 100, 5000])
    def test_lines_across_blocks_and_ranges(self, two_files, tmp_path, monkeypatch, block):
        whole = dataset(two_files / "a.jsonl", 50).rows(0, 60)
        monkeypatch.setattr(line_index, "BLOCK_BYTES", block)
        monkeypatch.setattr(line_index, "RANGE_BYTES", 777)
        copied = shutil.copy(two_files / "a.jsonl", tmp_path / "a.jsonl")
        assert_rows(dataset(copied, 50).rows(0, 60), whole["input_tokens"], whole["target_tokens"])

    def test_any_number_of_processes_makes_the_same_index(self, two_files, tmp_path, monkeypatch):
        monkeypatch.setattr(line_index, "RANGE_BYTES", 1000)
        found = []
        for processes in (1, 2):
            copied = shutil.copy2(two_files / "a.jsonl", tmp_path / "a.jsonl")
            dataset(copied, tokenizer_processes=processes)
            (index,) = tmp_path.glob("*.index")
            found.append(index.read_bytes())
            index.unlink()
        assert found[0] == found[1]

    def test_remote_paths(self, golden, tmp_path, monkeypatch):
        import fsspec

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        local = golden / "lvm_tiny" / "dataset.jsonl"
        with fsspec.open("memory://bucket/part-0.jsonl", "wb") as file:
            file.write(local.read_bytes())
        source = dataset("memory://bucket/*.jsonl")
        assert_rows(source.rows(200, 5), *plain_rows(plain_stream(local), 128, 200, 5))
        with pytest.raises(UserError, match=r"path=memory://bucket/no.jsonl: no such file"):
            dataset("memory://bucket/no.jsonl")

    def test_a_file_that_changes_while_it_is_read(self, sentences):
        source = dataset(sentences)
        sentences.write_text("?" * sentences.stat().st_size)
        with pytest.raises(UserError, match=f"{sentences}: changed since it was indexed"):
            source.rows(0, 1)


BAD = {
    "{tokens": r"not JSON \(",
    "[1]": "not a JSON object",
    '{"token": ""}': r"lacks the field 'tokens' \(fields here: token\)",
    '{"tokens": "A"}': "field 'tokens' is not base64",
    '{"tokens": "AAAAAAA="}': "field 'tokens' has 5 bytes, not a multiple of 4",
    base64_line([3, 512]): r"id 512 is outside the vocabulary 0\.\.511",
    base64_line([-1]): r"id -1 is outside the vocabulary 0\.\.511",
}


class TestBadInput:
    @pytest.mark.parametrize("others", ["", ', "id": 3'])
    @pytest.mark.parametrize("bad", list(BAD)[2:])
    def test_among_lines_that_are_checked_together(self, tmp_path, bad, others):
        good = base64_line(range(20), '{"tokens": "%s"' + others + "}")
        path = tmp_path / "bad.jsonl"
        path.write_text("\n".join([good, good, bad.replace("}", others + "}"), good]))
        with pytest.raises(UserError, match=f"^{path}:3: {BAD[bad]}".partition(r"\(fields")[0]):
            dataset(path)

    @pytest.mark.parametrize("bad, processes", [*((bad, 1) for bad in BAD), ("[1]", 2)])
    def test_the_first_bad_line_is_named(self, tmp_path, monkeypatch, bad, processes):
        monkeypatch.setattr(line_index, "RANGE_BYTES", 100)
        good = base64_line(range(20))
        path = tmp_path / "bad.jsonl"
        path.write_text("\n".join([good, "", good, good, good, good, bad, good, "[]", good]))
        with pytest.raises(UserError, match=f"^{path}:7: {BAD[bad]}"):
            dataset(path, tokenizer_processes=processes)
        assert os.listdir(tmp_path) == ["bad.jsonl"]  # nothing half-written

    def test_bad_lines_can_be_skipped_and_are_counted(self, sentences):
        stream = plain_stream(sentences)
        lines = sentences.read_text().splitlines()
        bad = list(BAD)
        sentences.write_text("\n".join(x for pair in zip(bad, lines, strict=False) for x in pair) + "\n" + lines[7])
        source = dataset(sentences, skip_bad_lines=True)
        count = sum(len(base64.b64decode(json.loads(line)["tokens"])) // 4 for line in lines[:8])
        assert source.skipped_lines == source.metrics(0)["dataset_skipped_lines"] == 7
        assert source.num_tokens == count
        assert_rows(source.rows(0, 90), *plain_rows(stream[:count], 128, 0, 90))
        with pytest.raises(UserError, match=f"^{sentences}:1: not JSON"):  # also from the kept index
            dataset(sentences)

    def test_another_vocabulary_finds_another_bad_line(self, sentences):
        assert dataset(sentences, vocab_size=512).num_tokens == 25896
        with pytest.raises(UserError, match=rf"{sentences}:1: id \d+ is outside the vocabulary 0\.\.299"):
            dataset(sentences, vocab_size=300)

    @pytest.mark.parametrize(
        "path, said",
        [
            ("", r"--train_dataset.json_dataset.path is empty: give a file, a glob"),
            ("DIR/no.jsonl", r"--train_dataset.json_dataset.path=DIR/no.jsonl: no such file"),
            ("DIR/good.jsonl,DIR/no.jsonl", r"no such file: DIR/no.jsonl"),
            ("DIR", r"--train_dataset.json_dataset.path=DIR: is a directory \(name files, or a glob such as DIR/\*"),
            ("DIR/*.txt", r"--train_dataset.json_dataset.path=DIR/\*.txt: no file matches"),
            ("DIR/empty.jsonl", r"DIR/empty.jsonl: holds no tokens \(the file is empty\)"),
            ("DIR/blank.jsonl", r"DIR/blank.jsonl: holds no tokens"),
        ],
    )
    def test_paths(self, tmp_path, path, said):
        (tmp_path / "good.jsonl").write_text(base64_line([1]))
        (tmp_path / "empty.jsonl").write_text("")
        (tmp_path / "blank.jsonl").write_text("\n\n")
        with pytest.raises(UserError, match=said.replace("DIR", str(tmp_path))):
            dataset(path.replace("DIR", str(tmp_path)))

    def test_odd_lengths_that_add_up(self, tmp_path):
        (tmp_path / "odd.jsonl").write_text('{"tokens": "AAAAAAA="}\n{"tokens": "AAAA"}\n')
        with pytest.raises(UserError, match=r"odd.jsonl:1: field 'tokens' has 5 bytes, not a multiple of 4"):
            dataset(tmp_path / "odd.jsonl")

    def test_only_bad_lines(self, tmp_path):
        (tmp_path / "bad.jsonl").write_text("?\n?\n")
        with pytest.raises(UserError, match=r"bad.jsonl: holds no tokens; .*bad.jsonl:1: not JSON"):
            dataset(tmp_path / "bad.jsonl", skip_bad_lines=True)

    @pytest.mark.parametrize(
        "settings, said",
        [
            ({"seq_length": 0}, "--json_dataset.seq_length=0: must be at least 1"),
            ({"tokenizer_parallel_chunk_size": 0}, "json_dataset.tokenizer_parallel_chunk_size=0: must be at least 1"),
            ({"start_seek_loc": 5}, r"start_seek_loc=5: no line of .*dataset.jsonl \(138734 bytes\) starts at byte 5"),
            ({"start_seek_loc": -1}, "no line of"),
            ({"start_seek_loc": 10**9}, "no line of"),
            ({"always_start_with_bos": True}, r"always_start_with_bos: bos id 8192 is not in 0\.\.511"),
            ({"fields": ""}, "--train_dataset.text_processor.fields: '' names no field"),
        ],
    )
    def test_settings(self, sentences, settings, said):
        with pytest.raises(UserError, match=said):
            dataset(sentences, **settings)


class TestState:
    @pytest.mark.parametrize("shuffle_seed", [-1, 5])
    def test_a_resume_at_any_row_continues_the_stream(self, sentences, shuffle_seed):
        whole = dataset(sentences, 1000, shuffle_seed=shuffle_seed)
        expected = whole.rows(0, 80)  # three epochs
        for row in range(0, 79, 6):
            state = json.loads(json.dumps(batches.dataset_state(whole, row)))
            again = dataset(sentences, 1000, shuffle_seed=shuffle_seed)
            start = batches.rows_consumed(state, again)
            assert start == row
            assert_rows(again.rows(start, 80 - row), *(array[row:] for array in expected.values()))

    def test_the_files_may_have_moved(self, sentences):
        state = batches.dataset_state(dataset(sentences), 5)
        moved = sentences.parent / "elsewhere.jsonl"
        shutil.move(sentences, moved)
        assert batches.rows_consumed(state, dataset(moved)) == 5

    def test_rows_of_another_length_continue_where_they_can(self, sentences):
        state = batches.dataset_state(dataset(sentences, 128), 6)
        assert batches.rows_consumed(state, dataset(sentences, 256)) == 3
        with pytest.raises(UserError, match=r"after token 768 .* rows of 128; no row of seq_length=100"):
            batches.rows_consumed(state, dataset(sentences, 100))
        shuffled = batches.dataset_state(dataset(sentences, 128, shuffle_seed=1), 6)
        with pytest.raises(UserError, match="no row of seq_length=256, shuffle_seed=1"):
            batches.rows_consumed(shuffled, dataset(sentences, 256, shuffle_seed=1))

    @pytest.mark.parametrize(
        "changes, said",
        [
            ({"shuffle_seed": 2}, "shuffle_seed changed"),
            ({"fields": "<|3|>,{tokens}"}, "processing changed"),
            ({"start_seek_loc": 5300}, "first_token changed"),
        ],
    )
    def test_another_stream_is_refused(self, sentences, changes, said):
        state = batches.dataset_state(dataset(sentences), 6)
        if "start_seek_loc" in changes:
            changes = {"start_seek_loc": sentences.read_bytes().index(b"\n") + 1}
        with pytest.raises(UserError, match=said):
            batches.rows_consumed(state, dataset(sentences, **changes))

    def test_other_data_is_refused(self, sentences):
        state = batches.dataset_state(dataset(sentences), 6)
        first, second, *others = sentences.read_text().splitlines(keepends=True)
        sentences.write_text("".join([second, first, *others]))
        os.utime(sentences, ns=(1, 1))  # the clock of files may not have ticked since they were copied
        with pytest.raises(UserError, match="files changed"):
            batches.rows_consumed(state, dataset(sentences))

    def test_states_of_the_release(self, sentences):
        source = dataset(sentences)
        state = {"config": {"seq_length": 128, "tokens_count_at_start": 0}, "index": 7, "total_tokens": 7680}
        assert batches.rows_consumed(state, source) == 60
        state["config"]["tokens_count_at_start"] = 128
        assert batches.rows_consumed(state, source) == 59
        assert batches.rows_consumed({"total_tokens": 256}, source) == 2
        with pytest.raises(UserError, match=r"after token 100 .* no row of seq_length=128"):
            batches.rows_consumed({"total_tokens": 100}, source)
        with pytest.raises(UserError, match="shuffle_seed=4"):
            batches.rows_consumed(state, dataset(sentences, shuffle_seed=4))


class Counting:
    """A row source whose rows hold their number; notes what it was asked for."""

    def __init__(self, fails_at=10**9):
        self.asked, self._fails_at = [], fails_at

    def rows(self, start, count):
        self.asked.append((start, count))
        if start >= self._fails_at:
            raise UserError("the disk is gone")
        return {"images": np.arange(start, start + count)[:, None, None] + np.zeros((1, 2, 3))}


def mesh(shape, devices=None):
    return Mesh(np.array(devices or jax.devices()).reshape(shape), ("dp", "fsdp", "mp"))


class TestBatches:
    @pytest.mark.parametrize("shape", [(8, 1, 1), (1, 2, 4), (2, 2, 2), (1, 1, 8)])
    def test_global_batches_in_order(self, shape):
        source = Counting()
        sharding = NamedSharding(mesh(shape), P(("dp", "fsdp")))
        made = batches.Batches(source, 16, sharding, start_row=3)
        try:
            for number in range(4):
                assert made.position == 3 + 16 * number
                batch = next(made)["images"]
                np.testing.assert_array_equal(batch[:, 1, 2], np.arange(3 + 16 * number, 19 + 16 * number))
                assert batch.sharding == sharding
            assert made.wait_seconds >= 0
        finally:
            made.close()

    def test_rows_of_a_process_that_are_not_together(self, monkeypatch):
        source = Counting()
        monkeypatch.setattr(batches, "_local_ranges", lambda size, sharding: [(0, 4), (4, 10), (10, 16)])
        made = batches.Batches(source, 16, NamedSharding(mesh((8, 1, 1)), P("dp")))
        np.testing.assert_array_equal(next(made)["images"][:, 0, 0], np.arange(16))
        made.close()
        assert source.asked[:3] == [(0, 4), (4, 6), (10, 6)]

    def test_tokens_may_be_sharded_along_the_sequence(self, sentences):
        source = dataset(sentences)
        made = batches.Batches(source, 4, NamedSharding(mesh((2, 2, 2)), P("dp", "mp")), 9)
        assert_rows(next(made), *plain_rows(plain_stream(sentences), 128, 9, 4))
        made.close()

    def test_a_process_reads_only_its_rows(self, monkeypatch):
        devices = jax.devices()
        sharding = NamedSharding(mesh((4, 1, 2), devices), P(("dp", "fsdp")))
        assert batches._local_ranges(16, sharding) == [(0, 16)]
        everywhere = NamedSharding.addressable_devices_indices_map

        def of_two_hosts(self, shape):  # this process has the devices of dp 0 and 2
            return {device: index for device, index in everywhere(self, shape).items() if device.id in (0, 1, 4, 5)}

        monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", of_two_hosts)
        assert batches._local_ranges(16, sharding) == [(0, 4), (8, 12)]

    def test_two_batches_ahead_and_no_more(self):
        source = Counting()
        made = batches.Batches(source, 8, NamedSharding(mesh((8, 1, 1)), P("dp")))
        next(made)
        deadline = time.monotonic() + 60
        while len(source.asked) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert source.asked == [(0, 8), (8, 8), (16, 8), (24, 8)]  # one yielded, two ready, one waiting for room
        assert made.position == 8
        made.close()
        assert not made._thread.is_alive()

    def test_errors_reach_the_consumer(self):
        made = batches.Batches(Counting(fails_at=8), 8, NamedSharding(mesh((8, 1, 1)), P("dp")))
        next(made)
        for _ in range(2):
            with pytest.raises(UserError, match="the disk is gone"):
                next(made)
        assert made.position == 8
        made.close()


class TestMixedRows:
    """Weighted parts: whose turn it is, follows from the row number; each part goes through its own epochs."""

    @pytest.fixture
    def parts(self, tmp_path):
        """Three files, the second one of two that a glob names; every id says which part it is of."""
        for name, part, lengths in (("a", 0, [900]), ("b1", 1, [300, 41]), ("b2", 1, [7, 120]), ("c", 2, [64] * 10)):
            lines = [base64_line(part * 100 + np.arange(n) % 100) for n in lengths]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        return ",".join(str(tmp_path / name) for name in ("a.jsonl", "b*.jsonl", "c.jsonl"))

    @pytest.mark.parametrize("seed", [-1, 0, 7])
    @pytest.mark.parametrize("weights", ["1,1,1", "2,1,0", "0.7,0.2,0.1", "0.001,0.5,0.499", "1/3,2/3,5"])
    def test_every_window_has_its_proportions(self, parts, weights, seed):
        source = dataset(parts, 16, weights=weights, shuffle_seed=seed)
        turns = source.sources_of(0, 20000)
        shares = np.array([float(fractions.Fraction(weight)) for weight in weights.split(",")])
        shares /= shares.sum()
        had = np.stack([np.cumsum(turns == part) for part in range(3)], axis=1)
        for length in (1, 3, 10, 100, 517, 5000):
            counts = had[length:] - had[:-length]
            # Up to a row, the parts' own unevenness, at each end of the window.
            assert (np.abs(counts - length * shares) <= 2 * (1 + 3 * shares)).all()

    @pytest.mark.parametrize("seed", [-1, 3])
    def test_rows_are_those_of_the_parts_in_turn(self, parts, seed):
        """Each part's rows come in its own order, of which none is missing or comes twice in one of its epochs."""
        source = dataset(parts, 16, weights="3,2,1", shuffle_seed=seed)
        got, turns = source.rows(0, 600), source.sources_of(0, 600)
        for part, paths in enumerate(parts.split(",")):
            alone = dataset(paths, 16, shuffle_seed=-1 if seed < 0 else seed + (part << 32))
            expected = alone.rows(0, 600)
            mine = {name: array[turns == part] for name, array in got.items()}
            assert_rows(mine, *(array[: (turns == part).sum()] for array in expected.values()))
        assert (got["input_tokens"] // 100 == turns[:, None]).all()

    def test_the_seed_decides_the_turns(self, parts):
        turns = [dataset(parts, 16, weights="3,2,1", shuffle_seed=seed).sources_of(0, 3000) for seed in (-1, 3, 3, 4)]
        assert (turns[1] == turns[2]).all()
        assert (turns[0] != turns[1]).any() and (turns[1] != turns[3]).any()
        first, second = np.reshape([order[:1032] for order in turns], (4, 2, 516))[:2].swapaxes(1, 0)
        np.testing.assert_array_equal(first[0], second[0])  # regular: a block of 516 rows again and again
        assert (first[1] != second[1]).any()  # at random: each block in another order

    def test_any_range_and_resume(self, parts):
        whole = dataset(parts, 16, weights="5,2,1", shuffle_seed=1)
        expected = whole.rows(0, 1200)
        for start, count in ((0, 1), (511, 3), (700, 500), (1199, 1)):
            state = json.loads(json.dumps(batches.dataset_state(whole, start)))
            again = dataset(parts, 16, weights="5,2,1", shuffle_seed=1)
            assert batches.rows_consumed(state, again) == start
            assert_rows(again.rows(start, count), *(array[start : start + count] for array in expected.values()))

    @pytest.mark.parametrize(
        "changes, said",
        [
            ({"weights": "5,1,1"}, "weights changed"),
            ({"shuffle_seed": 2}, "shuffle_seed, sources changed"),
            ({"seq_length": 32}, "sources changed"),
            ({"weights": ""}, "files, processing changed"),
        ],
    )
    def test_another_mixture_is_refused(self, parts, changes, said):
        settings = {"seq_length": 16, "weights": "5,2,1", "shuffle_seed": 1}
        state = batches.dataset_state(dataset(parts, **settings), 6)
        with pytest.raises(UserError, match=said):
            batches.rows_consumed(state, dataset(parts, **(settings | changes)))

    def test_masks_and_metrics(self, parts):
        source = dataset(parts, 16, fields="[<|300|>],{tokens}", weights="1,1,2")
        assert set(np.unique(source.rows(0, 100)["loss_masks"])) == {0, 1}
        figures = source.metrics(400)
        assert figures["dataset_total_tokens"] == 6400
        sizes = [901, 472, 650]
        for part, (rows_had, size) in enumerate(zip((100, 100, 200), sizes)):
            assert figures[f"dataset_epoch_{part}"] == rows_had * 16 / size

    @pytest.mark.parametrize(
        "settings, said",
        [
            ({"weights": "1,2"}, r"--train_dataset.json_dataset.weights=1,2: 2 numbers for 3 inputs \(a glob is one"),
            ({"weights": "1,2,x"}, "weights=1,2,x: not a comma list of numbers"),
            ({"weights": "1,2,1/0"}, "weights=1,2,1/0: not a comma list of numbers"),
            ({"weights": "0,0,0"}, "each must be 0 or more, one of them more than 0"),
            ({"weights": "1,1,0.1234567"}, "exact proportions need .* rows; give fewer digits"),
            ({"weights": "1,1,1", "start_seek_loc": 3}, "start_seek_loc=3: has no effect with .*weights"),
        ],
    )
    def test_settings(self, parts, settings, said):
        with pytest.raises(UserError, match=said):
            dataset(parts, **settings)


class TestPacked:
    """A packed file in place of the JSONL that it was made of: the same rows, and a run goes on from either."""

    @pytest.fixture
    def packed_files(self, two_files, tmp_path):
        """(JSONL paths, packed path): both files in one; what the lines hold besides ids comes along."""
        paths = [str(two_files / name) for name in ("b.jsonl", "a.jsonl")]
        sources = [(path, records.read_records(path, 512)) for path in paths]
        facts = packed_file.write(str(tmp_path / "both.packed"), sources, keep_others=True)
        assert facts["sentences"] == 600
        return ",".join(paths), str(tmp_path / "both.packed")

    @pytest.mark.parametrize("seed", [-1, 4])
    @pytest.mark.parametrize("fields", [",{tokens},", "[{tokens}]", "<|300|>,[{tokens}],[<|301|>],<|302|>"])
    def test_the_same_rows(self, packed_files, fields, seed):
        plain, one = (dataset(path, 33, fields=fields, shuffle_seed=seed) for path in packed_files)
        assert (one.num_tokens, one.fingerprint) == (plain.num_tokens, plain.fingerprint)
        for start in range(0, 2 * plain.rows_per_epoch, 7):
            assert_rows(one.rows(start, 7), *plain.rows(start, 7).values())
            if seed < 0:
                examples = [source.metrics(start)["dataset_example_index"] for source in (plain, one)]
                assert examples[0] == examples[1]
        assert batches.rows_consumed(batches.dataset_state(plain, 5), one) == 5

    @pytest.mark.parametrize("weights", ["", "2,1"])
    def test_beside_jsonl_and_in_a_mixture(self, packed_files, two_files, tmp_path, weights):
        more, alone = two_files / "a.jsonl", tmp_path / "a.packed"
        packed_file.write(str(alone), [(str(more), records.read_records(str(more), 512))], keep_others=False)
        first, second = (dataset(f"{path},{packed_files[1]}", 20, weights=weights) for path in (more, alone))
        assert first.fingerprint == second.fingerprint
        assert_rows(second.rows(3, 90), *first.rows(3, 90).values())

    def test_reads_only_its_tokens(self, packed_files):
        source = dataset(packed_files[1], 33)
        source.rows(5, 2)
        assert source.bytes_read == 2 * 67

    def test_what_is_no_packed_file(self, packed_files, tmp_path):
        data = pathlib.Path(packed_files[1]).read_bytes()
        bad = tmp_path / "bad.packed"
        renamed = [data.replace(name, b"x" * len(name), 1) for name in (b"largest_id", b"columns", b"ends", b"<u2")]
        for contents in (b"", b"{}", b"[]", base64_line([1]).encode(), data[:4096], data[:-100], data[100:], *renamed):
            bad.write_bytes(contents)
            with pytest.raises(UserError, match=r"bad.packed: is truncated, or not of the format"):
                dataset(bad)

    @pytest.mark.parametrize(
        "settings, said",
        [
            ({"fields": "{other}"}, r"both.packed: a packed file has one field, \{tokens\}"),
            ({"fields": "{tokens},{other}"}, "a packed file has one field"),
            ({"vocab_size": 300}, r"both.packed: id 511 is outside the vocabulary 0\.\.299"),
            ({"start_seek_loc": 5}, "start_seek_loc=5: .*both.packed is packed"),
        ],
    )
    def test_settings(self, packed_files, settings, said):
        with pytest.raises(UserError, match=said):
            dataset(packed_files[1], **settings)

    def test_compressed_files_are_refused(self, tmp_path):
        (tmp_path / "a.jsonl.gz").write_bytes(b"")
        with pytest.raises(UserError, match=r"a.jsonl.gz is compressed, .* tokenizer.mix or tokenizer.pack"):
            dataset(tmp_path / "a.jsonl.gz")
