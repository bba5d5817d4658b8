"""Invalid exports and imports fail with one clear line and leave no files."""

import errno
import json
import os
import pathlib

import numpy as np
import pytest
from convert_kit import export, import_, run, tiny_state
from safetensors.numpy import load_file, save_file

from EasyLM import checkpoints
from EasyLM.checkpoints import streaming
from EasyLM.errors import UserError
from EasyLM.models.llama import convert_easylm_to_hf


def test_invalid_exports_fail_and_leave_no_files(golden, tmp_path, monkeypatch):
    out, state = tmp_path / "out", golden / "lvm_tiny" / "final" / "streaming_train_state"
    bf16 = f"params::{golden}/lvm_tiny/streaming_params_bf16"
    for values, message in (
        ({"load_checkpoint": ""}, "--load_checkpoint is missing"),
        ({"output_dir": ""}, "--output_dir is missing"),
        ({"load_checkpoint": "params::missing", "model_size": "vqlm_7b"}, "there is no missing"),
        ({"load_checkpoint": bf16}, "--model_size is empty, and there is no metadata.json beside .*vqlm_7b"),
        ({"load_checkpoint": bf16, "model_size": "7b"}, "--model_size='7b': choose one of 'vqlm_debug'"),
        (
            {"load_checkpoint": bf16, "model_size": "vqlm_debug"},
            r"lm_head/kernel has shape \(64, 512\), expected \(128, 8292\)",
        ),
        ({"load_checkpoint": f"trainstate::{state}"}, "only parameters are exported: use trainstate_params::"),
    ):
        with pytest.raises(UserError, match=message):
            run(convert_easylm_to_hf, **{"load_checkpoint": tiny_state(golden), "output_dir": str(out)} | values)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raise_disk_full)
        with pytest.raises(UserError, match=rf"--output_dir={out}: cannot be written \(No space left on device\)"):
            export(tiny_state(golden), out)
    assert os.listdir(tmp_path) == []
    export(tiny_state(golden), out)
    with pytest.raises(UserError, match=rf"--output_dir={out}: already holds a model \(config.json\)"):
        export(tiny_state(golden), out)


def test_integers_are_no_weights(golden, tmp_path):
    """Such as those of a model that was quantized."""
    directory = pathlib.Path(export(tiny_state(golden), tmp_path / "hf"))
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = np.ones_like(tensors["lm_head.weight"], np.int8)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match=f"^{directory}: lm_head.weight has the type int8, not a floating-point type"):
        import_(directory, tmp_path / "out" / "params")


def raise_disk_full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_invalid_imports_fail_and_leave_no_files(golden, tmp_path, monkeypatch):
    directory = export(tiny_state(golden), tmp_path / "hf")
    weights, config = tmp_path / "hf" / "model.safetensors", tmp_path / "hf" / "config.json"
    good_weights, good_config = weights.read_bytes(), json.loads(config.read_text())
    with pytest.raises(UserError, match="no Hugging Face model"):
        import_(tmp_path, tmp_path / "out" / "params")
    for change, message in (
        (
            {"model_type": "mistral"},
            r"LLaMA and Qwen3 .* supported, not model_type='mistral'",
        ),
        ({"hidden_act": "gelu_new"}, "supported, not hidden_act='gelu_new'"),
        ({"num_key_value_heads": 2}, r"attention/wk/kernel has shape \(64, 64\), expected \(64, 32\)"),
        ({"hidden_act": "gelu"}, "supported, not hidden_act='gelu'"),
        ({"num_hidden_layers": 3}, r"missing \['model.layers.2.input_layernorm.weight'"),
        ({"num_hidden_layers": 1}, r"unknown \['model.layers.1.input_layernorm.weight'"),
        ({"intermediate_size": 64}, r"feed_forward/w1/kernel has shape \(64, 128\), expected \(64, 64\)"),
    ):
        config.write_text(json.dumps(good_config | change))
        with pytest.raises(UserError, match=message):
            import_(directory, tmp_path / "out" / "params")
    config.write_text(json.dumps(good_config))
    for data in (b"", b"x" * 100, good_weights[:500], good_weights[:-1]):
        weights.write_bytes(data)
        with pytest.raises(UserError, match=f"{weights}: not a complete safetensors file"):
            import_(directory, tmp_path / "out" / "params")
    weights.write_bytes(good_weights)
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "write_entry", raise_disk_full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            import_(directory, tmp_path / "out" / "params")
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []
    import_(directory, tmp_path / "out" / "params")
    for name in ("params", "others"):  # `others` would take the metadata of `params`
        with pytest.raises(UserError, match=r"exists; name a file in a directory of its own"):
            import_(directory, tmp_path / "out" / name)


@pytest.mark.parametrize("name", ["metadata.json", "checksums.json", "params"])
def test_a_killed_import_is_completed_by_the_next(golden, tmp_path, monkeypatch, name):
    """It is killed before one of its files has its name."""
    directory, output = export(tiny_state(golden), tmp_path / "hf"), tmp_path / "out" / "params"
    replace = os.replace

    def killed(source, target):
        if os.path.basename(target) == name:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        import_(directory, output)
    assert not output.exists()
    if name == "params":
        with pytest.raises(UserError, match=r"metadata\.json exists; name a file in a directory of its own"):
            import_(directory, tmp_path / "out" / "others")
    import_(directory, output)
    assert {path.name for path in output.parent.iterdir()} == {"params", "metadata.json", "checksums.json"}


@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_killed_export_into_a_directory_is_replaced_by_the_next(golden, tmp_path, monkeypatch, number):
    """It is killed before it moves a file, the `number`-th from 0. The next one has other shards."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    replace, moved = os.replace, []

    def killed(source, target):
        if os.path.dirname(target) == str(out) and not target.endswith("unfinished_export.json"):
            if len(moved) == number:
                raise KeyboardInterrupt
            moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        export(tiny_state(golden), out, max_shard_mb=0.1)
    (out / "README.md").write_text("my card")
    export(tiny_state(golden), out)
    export(tiny_state(golden), tmp_path / "whole")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    expected |= {"notes.txt": b"mine", "README.md": b"my card"}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
    with pytest.raises(UserError, match=rf"--output_dir={out}: already holds a model \(config.json\)"):
        export(tiny_state(golden), out)


def test_tensors_of_two_models_are_refused(golden, tmp_path):
    """The shards of two exports in one directory, without an index."""
    directory = pathlib.Path(export(tiny_state(golden), tmp_path / "hf"))
    data = (directory / "model.safetensors").read_bytes()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (directory / name).write_bytes(data)
    os.remove(directory / "model.safetensors")
    with pytest.raises(UserError, match=r"00001-of-00002\.safetensors and .*00002-of-00002\.safetensors both contain"):
        import_(directory, tmp_path / "out" / "params")


@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.parametrize("left_out", [0, 2, -1])
def test_a_missing_shard_is_named(golden, tmp_path, has_index, left_out):
    """Of a copy or a download that was interrupted."""
    directory = pathlib.Path(export(tiny_state(golden), tmp_path / "hf", max_shard_mb=0.1))
    shard = sorted(directory.glob("*.safetensors"))[left_out]
    shard.unlink()
    if not has_index:
        (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=f"^{shard}: missing, so the model is incomplete: copy or download it again$"):
        import_(directory, tmp_path / "out" / "params")


def test_a_flipped_bit_of_an_export_is_named(golden, tmp_path):
    weights = pathlib.Path(export(tiny_state(golden), tmp_path / "hf")) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=rf"{weights}: the array model.embed_tokens.weight is damaged"):
        import_(tmp_path / "hf", tmp_path / "out" / "params")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("as_stream", [True, False])
def test_a_flipped_bit_of_an_import_is_named(golden, tmp_path, as_stream):
    import_(export(tiny_state(golden), tmp_path / "hf"), tmp_path / "out" / "params", streaming=as_stream)
    spec = f"{'params' if as_stream else 'flax_params'}::{tmp_path}/out/params"
    assert len(checkpoints.load(spec)) == 1
    data = bytearray((tmp_path / "out" / "params").read_bytes())
    data[-1] ^= 1
    (tmp_path / "out" / "params").write_bytes(data)
    with pytest.raises(checkpoints.DamagedArrayError, match=f"{tmp_path}/out/params: the array .* is damaged"):
        checkpoints.load(spec)


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.slow
def test_pickle_with_code_is_rejected(golden, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    directory = export(tiny_state(golden), tmp_path / "hf")
    os.remove(os.path.join(directory, "model.safetensors"))
    with pytest.raises(UserError, match="no weights: neither"):
        import_(directory, tmp_path / "out" / "params")
    torch.save({"a": Evil()}, os.path.join(directory, "pytorch_model.bin"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: not a file of tensors"):
        import_(directory, tmp_path / "out" / "params")
    assert not os.path.exists("hacked")
