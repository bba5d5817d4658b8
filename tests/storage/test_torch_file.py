"""Files of `torch.save` are read without torch: the same tensors, and no code of the file runs."""

import collections
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from EasyLM.errors import UserError
from EasyLM.storage import TorchTensor, read_torch_file

torch = pytest.importorskip("torch")


class RunsCode:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Callback:
    """An object as training programs save it, with a class as a key and with state."""

    def __init__(self):
        self.best = {Callback: torch.zeros(2), "path": "best.ckpt"}


def _content():
    matrix = torch.arange(12.0).reshape(3, 4)
    return collections.OrderedDict(
        {
            "float32": matrix,
            "transposed": matrix.T,  # shares the storage
            "slice": matrix[1:, 1:3],
            "bfloat16": matrix.to(torch.bfloat16) / 3,
            "float16": matrix.half(),
            "int64": torch.tensor([2**40, -1]),
            "bool": torch.tensor([True, False]),
            "scalar": torch.tensor(3.5),
            "empty": torch.zeros(0, 4),
            "parameter": torch.nn.Parameter(torch.ones(2)),
        }
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_those_of_torch(tmp_path, zipped):
    path = tmp_path / "file.pt"
    torch.save({"state_dict": _content(), "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    content = read_torch_file(path)
    assert content["epoch"] == 3
    assert list(content["state_dict"]) == list(_content())
    for name, tensor in _content().items():
        ours = content["state_dict"][name]
        array = ours.read()
        assert ours.shape == array.shape == tuple(tensor.shape), name
        if tensor.dtype == torch.bfloat16:
            assert array.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())
        else:
            np.testing.assert_array_equal(array, tensor.detach().numpy(), err_msg=name)
            assert array.dtype == tensor.detach().numpy().dtype, name


def test_other_objects_are_passed_over(tmp_path):
    path = tmp_path / "last.ckpt"
    others = {"callbacks": {Callback: Callback()}, "device": torch.device("cpu"), "list": [Callback(), {Callback()}]}
    torch.save({"state_dict": {"x": torch.ones(2)}, **others}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # torch reads all or nothing
    np.testing.assert_array_equal(read_torch_file(path)["state_dict"]["x"].read(), [1, 1])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "arguments"),
    [(os.system, ("touch hacked",)), (eval, ("open('hacked', 'w')",)), (os.mkdir, ("hacked",))],
)
def test_no_code_runs(tmp_path, monkeypatch, zipped, function, arguments):
    monkeypatch.chdir(tmp_path)
    content = {"x": torch.ones(2), "code": RunsCode(function, *arguments), RunsCode(function, *arguments): 1}
    torch.save(content, "file.pt", _use_new_zipfile_serialization=zipped)
    loaded = read_torch_file("file.pt")
    np.testing.assert_array_equal(loaded["x"].read(), [1, 1])
    assert not isinstance(loaded["code"], TorchTensor)
    assert os.listdir() == ["file.pt"]


def _replace(path, name, data):
    """Replaces a member of an archive; checksums are those of the new bytes."""
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, old in members.items():
            archive.writestr(member, data if member.endswith(name) else old)


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"x": torch.arange(1000.0)}, path)
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"^{path}: not a file of tensors"):
            read_torch_file(path)
    place = whole.index(np.arange(1000, dtype=np.float32).tobytes()) + 2000
    path.write_bytes(whole[:place] + b"\x55" + whole[place + 1 :])
    with pytest.raises(UserError, match=r"damaged \(BadZipFile: Bad CRC-32"):
        read_torch_file(path)["x"].read()
    path.write_bytes(whole)
    _replace(path, "data/0", b"\0" * 3996)
    with pytest.raises(UserError, match="truncated"):
        read_torch_file(path)["x"].read()


def _tensor(numbers: str) -> bytes:
    """Returns a pickle of a tensor; `numbers` are the offset, the shape and the strides of a storage of 4 items."""
    storage = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers.encode() + b"I00\nNtR."


HOSTILE = {
    "beyond the storage": (_tensor("I1\n(I4\nt(I1\nt"), r"a tensor \(4,\) beyond its storage of 4 items"),
    "huge by strides of 0": (_tensor("I0\n(I4000000000\nt(I0\nt"), "beyond its storage"),
    "negative offset": (_tensor("I-4\n(I4\nt(I1\nt"), "a tensor of an unknown form"),
    "memo with a gap": (b"\x80\x02K\x01r\xff\xff\xff\x7f.", "LONG_BINPUT 2147483647 after"),
    "attribute of a class": (b"ctorch._utils\n_rebuild_parameter\n(N}S'x'\nNstb.", "cannot be changed"),
    "cut off": (b"(dp0\nS'x'\n", "not a file of tensors"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(tmp_path, name):
    data, message = HOSTILE[name]
    path = tmp_path / "file.pt"
    torch.save({"x": torch.arange(4.0)}, path)
    _replace(path, "data.pkl", data)
    with pytest.raises(UserError, match=message):
        read_torch_file(path)


def test_compressed_members_are_refused(tmp_path):
    path = tmp_path / "file.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("file/data.pkl", pickle.dumps({"x": "y" * 10**6}))
    with pytest.raises(UserError, match="compressed"):
        read_torch_file(path)
