"""When a store, a package or disk space is not there, the command ends. No input counts as damaged."""

import hashlib
import importlib.util
import itertools
import pathlib
import sqlite3

import pytest
from build_kit import build_records, report_of
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from source_kit import files_of, structs, tar_bytes, write_parquet, write_remote
from tokenizer_kit import run_main

from EasyLM.errors import UnavailableError
from EasyLM.skipped_inputs import SkippedInputs
from tokenizer import build
from tokenizer.builders import file_index, image_ref
from tokenizer.builders.file_index import FileIndex
from tokenizer.filter import measuring
from tokenizer.filter.listing import Listing
from tokenizer.sources import container_files, detection, reading, table_files
from tokenizer.sources.keep_list import KeptItems, keep_list_writer, read_keep_list


def _folder(files, url):
    return write_remote(url, files)


def _tars(files, url):
    names = list(files)
    parts = {f"{i}.tar": tar_bytes({name: files[name] for name in names[i::2]}) for i in range(2)}
    return write_remote(url, parts) + "/{0..1}.tar"


def _table(files, url):
    local = pathlib.Path(url.removeprefix("memory:/") + ".parquet")
    write_parquet(local, {"image": structs(files)})
    return write_remote(url, {"0.parquet": local.read_bytes()}) + "/{0..0}.parquet"


SOURCES = pytest.mark.parametrize("source", [_folder, _tars, _table])


def _three_images(tree) -> dict[str, bytes]:
    return dict(itertools.islice(files_of(tree / "image").items(), 3))


def fail_at(patch, number: int) -> list[str]:
    """Makes one call of the store fail, the `number`-th from 0. Returns a list that collects the calls."""
    calls = []

    def failing(name, method):
        def call(*arguments, **options):
            calls.append(name)
            if len(calls) == number + 1:
                raise ConnectionResetError("connection reset")
            return method(*arguments, **options)

        return call

    for owner, names in {MemoryFileSystem: ("info", "ls", "cat_file", "_open"), MemoryFile: ("read",)}.items():
        for name in names:
            patch.setattr(owner, name, failing(name, getattr(owner, name)))
    return calls


def assert_each_outage_ends(monkeypatch, use) -> None:
    """Asserts that `use` ends with an UnavailableError, whichever call of the store fails."""
    for number in itertools.count():
        table_files._open_table.cache_clear()
        table_files._read_chunk.cache_clear()
        with monkeypatch.context() as patch:
            calls = fail_at(patch, number)
            try:
                use()
            except UnavailableError as error:
                assert "not reachable (ConnectionResetError" in str(error)
                continue
        assert len(calls) <= number and number > 2, f"the failed {calls[number]} was passed over"
        return


@SOURCES
def test_an_outage_while_a_source_is_listed_and_read_is_no_damage(tree, tmp_path, monkeypatch, source):
    value = source(_three_images(tree), f"memory:/{tmp_path}/in").replace("{0..1}", "*").replace("{0..0}", "*")
    # It says "no" for any error. A glob is no folder, whether the store answers or not.
    monkeypatch.setattr(MemoryFileSystem, "isdir", lambda system, path: False)

    def use():
        listed = detection.find_source(value, "input_dir", (".png",))
        index = FileIndex(file_index.by_name, [listed], SkippedInputs(99))
        for item in range(len(index)):
            (row,) = index.rows(item)
            assert len([*image_ref.read([*row], 8)]) == len(row)
        assert len(index) == 3

    assert_each_outage_ends(monkeypatch, use)


@SOURCES
def test_an_outage_while_images_are_measured_is_no_damage(tree, tmp_path, monkeypatch, source):
    value = source(_three_images(tree), f"memory:/{tmp_path}/in")
    listed = detection.find_source(value, "input_dir", (".png",))

    def use():
        listing = Listing(listed, None, SkippedInputs(99), 0, 1)
        measured = measuring.measure(list(listing.entries(listing.numbers)), ())
        assert len(measured) == 3 and not any(isinstance(one, str) for one in measured)

    assert_each_outage_ends(monkeypatch, use)


def test_an_outage_while_a_keep_list_is_checked_does_not_pass_for_its_source(tree, tmp_path, monkeypatch):
    value = _tars(_three_images(tree), f"memory:/{tmp_path}/in")
    listed = detection.find_source(value, "input_dir", (".png",))
    listing = Listing(listed, None, SkippedInputs(0), 0, 1)
    entries = list(listing.entries(listing.numbers))
    samples = {entry.name: hashlib.sha256(reading.read_bytes(*entry[1:3])).hexdigest() for entry in entries}
    with keep_list_writer(f"{tmp_path}/keep.jsonl") as writer:
        for entry in entries:
            writer.add(entry.name)
        writer.finish(listing.names.files(), samples)
    keep_list = read_keep_list(f"{tmp_path}/keep.jsonl")

    def use():
        kept_items = KeptItems(keep_list, container_files.names_of(listed), is_whole=True)
        FileIndex(file_index.by_name, [listed], SkippedInputs(99), kept_items)

    assert_each_outage_ends(monkeypatch, use)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "source"), [("images", _tars), ("images", _table), ("video", _tars)])
def test_an_outage_ends_a_build_which_then_resumes(tree, tiny, tmp_path, monkeypatch, kind, source):
    """Each container is a part. An outage leaves no part that is finished without its images."""
    value = source(files_of(tree / ("image" if kind == "images" else "videos")), f"memory:/{tmp_path}/in")
    settings = {"kind": kind, "n_frames": 2, "input_dir": value, "batch_size": 8, "workers": 1, "vqgan": tiny}
    settings |= {"shard": "auto", "parts": "files", "max_errors": 99}
    run_main(build, **settings, output_file=f"{tmp_path}/whole_{{i}}.jsonl")
    whole = [path.read_bytes() for path in sorted(tmp_path.glob("whole_*.jsonl"))]

    def use():
        run_main(build, **settings, output_file=f"{tmp_path}/out_{{i}}.jsonl")

    # A range of files is no folder, whether the store answers or not.
    monkeypatch.setattr(MemoryFileSystem, "isdir", lambda system, path: False)
    assert_each_outage_ends(monkeypatch, use)
    assert [path.read_bytes() for path in sorted(tmp_path.glob("out_*.jsonl"))] == whole and all(whole)
    assert not any(report_of(path)["skipped"] for path in tmp_path.glob("out_*.jsonl"))


def test_a_missing_package_is_no_damage_of_a_table(tree, tmp_path, monkeypatch):
    write_parquet(tmp_path / "in.parquet", {"image": structs(files_of(tree / "image"))})
    source = detection.find_source(f"{tmp_path}/in.parquet", "input_dir", (".png",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"in\.parquet needs the package pyarrow"):
        FileIndex(file_index.by_name, [source], SkippedInputs(99))


def test_a_full_disk_is_no_damage_of_a_tar(tree, tiny, tmp_path, monkeypatch):
    (tmp_path / "in.tar").write_bytes(tar_bytes(files_of(tree / "image")))

    def fill_disk(path):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(sqlite3, "connect", fill_disk)
    settings = {"input_dir": f"{tmp_path}/in.tar", "shard": "auto", "parts": "files", "max_errors": 99}
    with pytest.raises(UnavailableError, match=r"the index of the files does not fit in .*disk is full"):
        build_records("", tiny, tmp_path / "out_{i}.jsonl", kind="images", **settings)
    assert not list(tmp_path.glob("out_*"))
