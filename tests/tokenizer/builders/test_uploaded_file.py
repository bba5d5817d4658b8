"""Builds whose output is on an object store: the bytes of a local build, complete or not there, resumed by parts."""

import contextlib
import json
import tempfile

import fsspec
import pytest
import tokenizer_kit
from build_kit import build_records
from fsspec.implementations.memory import MemoryFileSystem

from EasyLM.errors import UnavailableError, UserError
from EasyLM.storage import HeartbeatLock, LockedError, heartbeat_lock, processes
from tokenizer import build, mix
from tokenizer.builders.uploaded_file import UploadedFile

SETTINGS = {"kind": "images", "batch_size": 8, "workers": 1}


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch):
    """Nobody else writes to the store of this process."""
    monkeypatch.setattr(heartbeat_lock, "_SETTLE_SECONDS", 0)


@pytest.fixture
def store(tmp_path) -> str:
    """The URL of an empty folder."""
    return f"memory:/{tmp_path}"


def contents(url: str) -> dict[str, bytes]:
    """Returns the files in a folder by name."""
    system, root = fsspec.url_to_fs(url)
    return {name.removeprefix(f"{root}/"): system.cat_file(name) for name in system.find(root)}


def write(path: str, lines: list[bytes], fresh=False, **fingerprint) -> bool:
    """Writes a file as a build does. Returns False if it is finished already."""
    with contextlib.closing(UploadedFile(path, fingerprint, fresh)) as file:
        file.claim()
        if file.finished_report is not None:
            return False
        for line in lines:
            file.write(line)
        file.finish({"sentences": len(lines)})
    return True


def test_parts_on_a_store_have_the_bytes_of_a_local_file(tree, tiny, tmp_path, store, capsys):
    build_records(tree, tiny, tmp_path / "whole.jsonl", input_dir="image", **SETTINGS)
    settings = SETTINGS | {"vqgan": tiny, "input_dir": f"{tree}/image", "shard": "auto", "parts": "3"}
    tokenizer_kit.run_main(build, **settings, output_file=f"{store}/{{i}}.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    names = [f"{i}.jsonl" for i in range(3)]
    files = contents(store)
    assert files.keys() == {*names, *(f"{name}.report.json" for name in names)}  # no lock remains
    assert whole and b"".join(files[name] for name in names) == whole
    fsspec.filesystem("memory").rm_file(f"{tmp_path}/1.jsonl")
    with pytest.raises(UserError, match="1 are missing: 1"):
        tokenizer_kit.run_main(mix, inputs=f"{store}/*.jsonl", output_file=f"{tmp_path}/mixed.jsonl")
    capsys.readouterr()
    tokenizer_kit.run_main(build, **settings, output_file=f"{store}/{{i}}.jsonl")
    assert capsys.readouterr().out.count(" sentences of ") == 1 and contents(store).keys() == files.keys()
    tokenizer_kit.run_main(mix, inputs=f"{store}/*.jsonl", output_file=f"{tmp_path}/mixed.jsonl")
    assert sorted((tmp_path / "mixed.jsonl").read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_file_counts_when_its_report_is_there(store, monkeypatch):
    """An upload that fails leaves no report, also not that of an earlier file of the same size."""
    path = f"{store}/out.jsonl"
    assert write(path, [b"a\n", b"b\n"], seed=0) and not write(path, [], seed=0)
    put_file = MemoryFileSystem.put_file

    def lose_connection(*arguments, **options):
        put_file(*arguments, **options)
        raise ConnectionResetError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", lose_connection)
        with pytest.raises(UserError, match=r"out\.jsonl: cannot be read or written \(.*connection reset"):
            write(path, [b"c\n", b"d\n"], seed=1)
    assert contents(store) == {"out.jsonl": b"c\nd\n"}
    assert write(path, [b"a\n", b"b\n"], seed=0)
    assert contents(store)["out.jsonl"] == b"a\nb\n"
    assert json.loads(contents(store)["out.jsonl.report.json"])["bytes"] == 4
    assert write(path, [b"e\n"], seed=0, fresh=True) and contents(store)["out.jsonl"] == b"e\n"


def test_a_finished_file_is_not_built_again_because_its_report_cannot_be_read(store, monkeypatch):
    path = f"{store}/out.jsonl"
    assert write(path, [b"a\n"])

    def lose_connection(*arguments, **options):
        raise ConnectionResetError("connection reset")

    monkeypatch.setattr(MemoryFileSystem, "info", lose_connection)
    with pytest.raises(UnavailableError, match=r"out\.jsonl: not reachable \(ConnectionResetError"):
        UploadedFile(path, {}, False)


def test_one_process_writes_a_file(store):
    path = f"{store}/out.jsonl"
    file = UploadedFile(path, {}, False)
    with HeartbeatLock(path, is_output=True), pytest.raises(LockedError, match="in use by process"):
        file.claim()
    write(path, [b"a\n"])
    file.claim()  # it was finished in the meantime
    assert file.finished_report == {"sentences": 1, "bytes": 2, "identity": {}}
    file.close()
    file = UploadedFile(path, {"seed": 1}, False)
    file.write(b"b\n")
    lock = heartbeat_lock.LockFile(path, is_output=True)
    lock.write(lock.read() | {"token": "other"})
    with pytest.raises(LockedError, match=r"was suspended, .* took over the output"):
        file.finish({})
    file.close()
    assert contents(store)["out.jsonl"] == b"a\n"


def test_the_growing_file_is_deleted_also_that_of_a_killed_process(store, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tag = processes.owner_tag()
    gone = f"{tag.rpartition('-')[0]}-17"  # this process has another start
    for name in (gone, tag):
        (tmp_path / f".out.jsonl.{name}.ab.partial").mkdir()
    file = UploadedFile(f"{store}/out.jsonl", {}, False)
    file.write(b"a\n")
    assert len(list(tmp_path.iterdir())) == 2
    file.finish({})
    assert [path.name for path in tmp_path.iterdir()] == [f".out.jsonl.{tag}.ab.partial"]  # another process's


def test_a_store_that_cannot_be_reached_is_named(tree, tiny):
    settings = SETTINGS | {"vqgan": tiny, "input_dir": f"{tree}/image"}
    with pytest.raises(UserError, match=r"s3://bucket/out\.jsonl: .* pip install s3fs"):
        tokenizer_kit.run_main(build, **settings, output_file="s3://bucket/out.jsonl")
