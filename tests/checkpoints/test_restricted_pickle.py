"""Pickles of the release load as plain settings; other pickles are rejected before any code runs."""

import os
import pickle
import time

import pytest

from EasyLM import checkpoints
from EasyLM.checkpoints import restricted_pickle
from EasyLM.errors import UserError


def load(path):
    return checkpoints.load_metadata(str(path))


def is_plain(value):
    if isinstance(value, dict):
        return all(type(key) in (str, int) and is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


@pytest.mark.parametrize("run", ["init", "step15", "final"])
def test_golden_pickles_are_plain_settings(golden, run):
    steps = {"init": 0, "step15": 15, "final": 30}[run]
    metadata = load(golden / "lvm_tiny" / run / "metadata.pkl")
    data = load(golden / "lvm_tiny" / run / "dataset.pkl")
    assert is_plain(metadata) and is_plain(data)
    assert metadata["step"] == steps and metadata["llama_config"]["hidden_size"] == 64
    assert metadata["flags"]["optimizer"]["adamw_optimizer"]["lr"] == 3e-3
    assert metadata["flags"]["logger"]["entity"] is None  # a FieldReference
    assert data["total_tokens"] == steps * 4 * 128 and data["config"]["seq_length"] == 128


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    "function, arguments", [(os.system, ("touch hacked",)), (eval, ("1",)), (getattr, (1, "real")), (bytearray, (5,))]
)
def test_pickles_with_other_classes_are_rejected(tmp_path, monkeypatch, protocol, function, arguments):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "metadata.pkl"
    path.write_bytes(pickle.dumps({"step": 3, "flags": Evil(function, *arguments)}, protocol))
    with pytest.raises(UserError, match=rf"{path}: refused: .*{function.__name__}"):
        load(path)
    assert os.listdir(tmp_path) == ["metadata.pkl"]


def test_broken_pickles_are_rejected(tmp_path, golden):
    data = (golden / "lvm_tiny" / "final" / "metadata.pkl").read_bytes()
    path = tmp_path / "metadata.pkl"
    for size in (0, 1, 10, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match="not a readable pickle"):
            load(path)


SETTINGS = b"cml_collections.config_dict.config_dict\nConfigDict\n"
NESTED = b"(lp0\n" + b"".join(b"(l%sp%d\n" % (b"g%d\na" % (i - 1) * 10, i) for i in range(1, 12))
HOSTILE = {
    "nested references": (NESTED + b".", "more than 100000 values"),
    "text of nested references": (b"cbuiltins\nstr\n(" + NESTED + b"tR.", "not callable"),
    "slots of the shared class": (SETTINGS + b"(N(S'_fields'\nS'x'\ndtb.", "cannot be changed"),
    "constructor of a type": (b"cbuiltins\nint\n(S'9'\ntR.", "not callable"),
    "memo with a gap": (b"\x80\x02K\x01r\xff\xff\xff\x7f.", "LONG_BINPUT 2147483647 after"),
    "memo with a gap, as text": (b"I1\np2147483647\n.", "PUT 2147483647 after"),
    "a list": (b"(l.", "must be an object, not a list"),
    "settings as a key": (b"}" + SETTINGS + b")\x81K\x01s.", "a _Settings in place of a plain value"),
    "a class as a value": (b"}U\x01a" + SETTINGS + b"s.", "in place of a plain value"),
    "a set": (b"\x80\x04}\x8c\x01a\x8fs.", "a set in place of a plain value"),
    "a cycle": (b"(dp0\nS'a'\ng0\ns.", "RecursionError|more than"),
    "depth": (b"(l" * 5000 + b"a" * 4999 + b".", "RecursionError|more than|must be an object"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_at_once(tmp_path, name):
    data, message = HOSTILE[name]
    path = tmp_path / "metadata.pkl"
    path.write_bytes(data)
    begin = time.monotonic()
    with pytest.raises(UserError, match=message):
        load(path)
    assert time.monotonic() - begin < 5
    assert not hasattr(restricted_pickle._Settings, "_fields")


def test_a_large_pickle_is_refused(tmp_path):
    path = tmp_path / "metadata.pkl"
    path.write_bytes(pickle.dumps({"step": bytes(5 << 20)}))
    with pytest.raises(UserError, match="it has more than 4 MiB"):
        load(path)
