"""Orbax checkpoints: of any devices, of a CheckpointManager, on object stores."""

import os
import subprocess
import sys
import textwrap

import fsspec
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from checkpoint_kit import assert_equal, golden_state
from fsspec.implementations.local import LocalFileSystem

from EasyLM import checkpoints
from EasyLM.checkpoints import orbax_directory
from EasyLM.errors import UnavailableError, UserError


@pytest.fixture
def state(golden) -> dict:
    state = golden_state(golden)
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def save_managed(directory, steps, arguments, **options) -> None:
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(**options)) as manager:
        for step in steps:
            manager.save(step, args=arguments(step))
        manager.wait_until_finished()


@pytest.mark.slow
def test_a_state_of_four_devices_loads_on_one(tmp_path):
    """The eight devices of this process saved it; a process with one device loads it."""
    mesh = jax.make_mesh((8,), ("x",))
    values = np.arange(64, dtype=np.float32).reshape(2, 8, 4)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    params = {"params": {"transformer": {"h": {"w": jax.device_put(values, sharding)}}}}
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "params", params)
        saver.save(tmp_path / "state", {"step": jax.numpy.int32(3), "params": params, "opt_state": {}})
    program = f"""
        import jax
        import numpy as np
        from EasyLM import checkpoints
        assert jax.device_count() == 1
        for name in ("params", "state"):
            tree = checkpoints.load(f"orbax::{tmp_path}/{{name}}")
            np.testing.assert_array_equal(tree["params"]["transformer"]["h"]["w"], np.arange(64.0).reshape(2, 8, 4))
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("prefix", [None, "checkpoint"])
def test_the_newest_step_of_a_manager_is_loaded(tmp_path, state, caplog, prefix):
    caplog.set_level("INFO")

    def arguments(step):
        tree = jax.tree.map(lambda x: np.full_like(x, step), state)
        return ocp.args.StandardSave(tree)

    save_managed(tmp_path / "manager", (9, 10), arguments, step_prefix=prefix)
    assert int(np.max(jax.tree.leaves(checkpoints.load(f"orbax::{tmp_path}/manager"))[0])) == 10
    assert "reading step 10" in caplog.text
    step = f"{prefix}_9" if prefix else "9"
    for path in (f"manager/{step}", f"manager/{step}/default"):
        assert int(np.max(jax.tree.leaves(checkpoints.load(f"orbax::{tmp_path}/{path}"))[0])) == 9


def test_an_incomplete_step_is_passed_over(tmp_path, state, caplog):
    save_managed(tmp_path / "manager", (9,), lambda step: ocp.args.StandardSave(state))
    (tmp_path / "manager" / "12" / "default").mkdir(parents=True)
    assert_equal(checkpoints.load(f"orbax::{tmp_path}/manager"), state["params"])
    assert "step 12 is passed over" in caplog.text


def test_the_highest_step_of_a_run_is_found(tmp_path):
    """A step that the run has saved again has a number behind the step."""
    names = ["step_00000009", "step_00000040", "step_00000040_9", "step_00000040_10", "kept_00000030"]
    for name in names:
        (tmp_path / name / "orbax_train_state").mkdir(parents=True)
        (tmp_path / name / "orbax_train_state" / "_METADATA").touch()
    for name in ("step_00000040_10", "step_00000040_9", "step_00000040", "kept_00000030", "step_00000009"):
        assert orbax_directory._find_item(tmp_path) == tmp_path / name / "orbax_train_state"
        (tmp_path / name / "orbax_train_state" / "_METADATA").unlink()


def test_the_item_with_the_state_is_chosen(tmp_path, state):
    def arguments(step):
        return ocp.args.Composite(state=ocp.args.StandardSave(state), averages=ocp.args.StandardSave({"a": np.ones(2)}))

    save_managed(tmp_path / "manager", (9,), arguments)
    assert_equal(checkpoints.load(f"orbax::{tmp_path}/manager"), state["params"])


def test_unknown_items_are_listed(tmp_path, state):
    def arguments(step):
        return ocp.args.Composite(model=ocp.args.StandardSave(state), other=ocp.args.StandardSave(state))

    save_managed(tmp_path / "manager", (9,), arguments)
    with pytest.raises(UserError, match=r"name one: orbax::.*/manager/9/model, orbax::.*/manager/9/other$"):
        checkpoints.load(f"orbax::{tmp_path}/manager")


def test_other_directories_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=f"orbax::{tmp_path}: no Orbax checkpoint"):
        checkpoints.load(f"orbax::{tmp_path}")
    (tmp_path / "_METADATA").write_text("damaged")
    with pytest.raises(UserError, match=f"orbax::{tmp_path}: Orbax cannot read it") as caught:
        checkpoints.load(f"orbax::{tmp_path}")
    assert "\n" not in str(caught.value)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The parameters in gs://bucket/run/9. A folder stands in for the store, for fsspec and for TensorStore."""
    params = {"params": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "bucket/run/9", params)

    class Store(LocalFileSystem):
        protocol = ("gs", "gcs")

        @classmethod
        def _strip_protocol(cls, path):
            return str(path).replace("gs://bucket", str(tmp_path / "bucket"))

    open_array = tensorstore.open

    def open_in_folder(spec, *arguments, **options):
        values = tensorstore.Spec(spec).to_json()
        store = values["kvstore"]["base"]
        assert (store["driver"], store["bucket"]) == ("gcs", "bucket")
        values["kvstore"]["base"] = {"driver": "file", "path": f"{tmp_path}/bucket/{store['path']}"}
        return open_array(values, *arguments, **options)

    for name in Store.protocol:
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, name, Store)
    monkeypatch.setattr(tensorstore, "open", open_in_folder)
    return params


def test_a_checkpoint_in_a_bucket_is_read_from_the_store(bucket, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_equal(checkpoints.load("orbax::gs://bucket/run/9"), bucket)
    assert_equal(checkpoints.load("orbax::gs://bucket/run"), bucket)
    assert not os.listdir(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://bucket/run/9", "gs:// needs a package that is not installed: pip install gcsfs"),
        ("s3://bucket/run/9", "s3:// needs a package that is not installed: pip install s3fs"),
        ("memory://bucket/run/9", "Orbax reads local paths and gs:// only; copy the directory to a local path"),
        ("foo://bucket/run/9", "unknown protocol foo://"),
    ],
)
def test_stores_that_cannot_be_read_are_named_in_one_line(tmp_path, monkeypatch, path, message):
    for package in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, package, None)  # an import of it raises
    fsspec.filesystem("memory").makedirs("/bucket/run/9", exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnavailableError, match=f"{path}: {message}") as caught:
        checkpoints.load(f"orbax::{path}")
    assert "\n" not in str(caught.value) and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "error, kind",
    [
        (ValueError('DATA_LOSS: Error reading "zarr" chunk'), UserError),
        (FileNotFoundError("manifest.ocdbt"), UserError),
        (KeyError("tree_metadata"), UserError),
        (ValueError("UNAVAILABLE: Error reading gs://bucket/run/9/manifest.ocdbt: CURL error"), UnavailableError),
        (ValueError("PERMISSION_DENIED: Error reading gs://bucket/run/9"), UnavailableError),
        (ConnectionResetError("connection reset"), UnavailableError),
        (OSError(5, "Input/output error"), UnavailableError),
        (type("HttpError", (Exception,), {})("503"), UnavailableError),
    ],
)
def test_an_outage_of_a_store_is_no_damage(tmp_path, monkeypatch, error, kind):
    """A run passes over a damaged checkpoint, and would resume from an older one."""
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "params", {"w": np.zeros(3)})
    (entry,) = checkpoints.open_checkpoint(f"orbax::{tmp_path}/params")

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(tensorstore, "open", fail)
    with pytest.raises(kind, match=f"^{tmp_path}/params: the array w cannot be read") as caught:
        entry.read()
    assert type(caught.value) is kind
    monkeypatch.setattr(orbax_directory, "_find_item", fail)
    with pytest.raises(kind, match=r"^orbax::gs://bucket/run/9: Orbax cannot read it") as caught:
        orbax_directory.read_orbax("gs://bucket/run/9")
    assert type(caught.value) is kind
