"""Checkpoints: what is saved is what is loaded, whatever happens in between."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import flax.serialization
import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_kit import (
    METADATA,
    assert_equal,
    contents,
    file_content,
    golden_state,
    make_checkpointer,
    save,
    small_state,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_run import finish

from EasyLM import checkpoints, flags
from EasyLM.checkpoints import stacking, streaming
from EasyLM.errors import UserError
from EasyLM.parallel import make_mesh
from EasyLM.training import metrics_log
from EasyLM.training.step import TrainState


@pytest.mark.parametrize("run", ["init", "step15", "final"])
def test_golden_state_is_saved_again_byte_for_byte(golden, tmp_path, run):
    saver = make_checkpointer(tmp_path)
    saver.save(jax.tree.map(jnp.asarray, golden_state(golden, run)), 30, {}, METADATA)
    saver.wait()
    expected = (golden / "lvm_tiny" / run / "streaming_train_state").read_bytes()
    assert (tmp_path / "streaming_train_state").read_bytes() == expected


def test_keys_are_those_of_flax(tmp_path):
    """Including optimizers whose states nest differently."""
    params = jax.tree.map(jnp.asarray, small_state(1).params)
    optimizer = optax.MultiSteps(optax.chain(optax.adafactor(1e-3), optax.trace(0.9)), 2)
    opt_state = optimizer.init(params)
    expected = flax.serialization.to_state_dict({"opt_state": opt_state, "params": params})

    def flatten(tree, path=()):
        if not isinstance(tree, dict):
            return {path}
        return set().union(*(flatten(value, (*path, key)) for key, value in tree.items()))

    assert {leaf.key for leaf in stacking.stacked_arrays({"opt_state": opt_state, "params": params})} == flatten(
        expected
    )


def test_float_dtype_casts_parameters_and_nothing_else(golden, tmp_path):
    state, tiny = golden_state(golden), golden / "lvm_tiny"
    reference = file_content(tiny / "final" / "streaming_train_state")
    for float_dtype, whole in (("", False), ("bf16", False), ("fp32", False), ("bf16", True), ("fp16", True)):
        run = tmp_path / f"{float_dtype}{whole}"
        saver = make_checkpointer(str(run), float_dtype, whole)
        saver.save(state, 30, {}, METADATA)
        saver.wait()
        saved = file_content(run / ("streaming_train_state" if whole else "streaming_params"))
        expected = {key if whole else key[2:]: x for key, x in reference.items() if whole or key[0] == "params"}
        assert list(saved) == list(expected)
        dtype = checkpoints.FLOAT_DTYPES[float_dtype or "bf16"]
        for key, array in expected.items():
            wanted = array.astype(dtype) if not whole or key[0] == "params" else array
            assert saved[key].dtype == wanted.dtype and saved[key].tobytes() == wanted.tobytes(), key
    released = (tiny / "streaming_params_bf16").read_bytes()
    assert (tmp_path / "False" / "streaming_params").read_bytes() == released
    with pytest.raises(UserError, match=r"float_dtype='int8': choose one of '', 'fp32'"):
        make_checkpointer(str(tmp_path), "int8")


@pytest.mark.parametrize("mesh_dim", ["1,1,1", "1,8,1", "2,2,2"])
def test_the_copy_is_real(tmp_path, mesh_dim):
    """The step that follows gives the arrays away while they are still being written."""
    mesh = make_mesh(mesh_dim, jax.devices()[: int(np.prod([int(n) for n in mesh_dim.split(",")]))])
    places = {3: P(None, "fsdp", "mp"), 2: P("fsdp"), 1: P(), 0: P()}

    def put(x):
        return jax.device_put(x, NamedSharding(mesh, places[x.ndim]))

    params = {"params": {"h": {"w": np.zeros((2, 512, 128), np.float32)}, "b": np.zeros((64, 3), np.float32)}}
    state = jax.tree.map(put, TrainState(np.zeros((), np.int32), params, {"mu": params}))
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    saver = make_checkpointer(tmp_path)
    saver.prepare(state)
    for i in range(4):
        saver.save(state, i, {}, METADATA, milestone=True)
        state = step(step(state))
    saver.wait()
    for i in range(4):
        saved = file_content(tmp_path / f"streaming_train_state_{i}")
        assert all(np.all(array == 2 * i) for array in saved.values())


def test_layout_milestones_and_pruning(tmp_path):
    saver = make_checkpointer(tmp_path)
    assert checkpoints.latest_checkpoint(str(tmp_path)) is None
    for step in range(1, 7):
        save(saver, step, milestone=step in (2, 4))
        assert contents(str(tmp_path)) == (step, step, step)
    names = {"streaming_train_state", "dataset.json", "metadata.json"}
    milestones = {f"streaming_train_state_{n}" for n in (2, 4)} | {
        f"{name}_{n}.json" for n in (2, 4) for name in ("dataset", "metadata")
    }
    assert set(os.listdir(tmp_path)) == {"checkpoints", "latest"} | names | milestones
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000002", "step_00000004", "step_00000006"]
    assert set(os.listdir(tmp_path / "latest")) == names
    for step in (2, 4):
        milestone = checkpoints.load(f"trainstate::{tmp_path}/streaming_train_state_{step}", small_state(0))
        assert_equal(milestone, small_state(step))
        beside = checkpoints.sidecar_path(f"{tmp_path}/streaming_train_state_{step}", "metadata")
        assert checkpoints.load_metadata(beside)["step"] == step
    assert (
        checkpoints.load_metadata(checkpoints.sidecar_path(f"{tmp_path}/streaming_train_state", "dataset"))["step"] == 6
    )


def test_a_run_directory_that_was_moved_still_works(tmp_path):
    save(make_checkpointer(str(tmp_path / "a")), 3, milestone=True)
    os.rename(tmp_path / "a", tmp_path / "b")
    assert contents(str(tmp_path / "b")) == (3, 3, 3)
    saver = make_checkpointer(str(tmp_path / "b"))
    save(saver, 4)
    assert contents(str(tmp_path / "b")) == (4, 4, 4)
    assert os.path.exists(tmp_path / "b" / "streaming_train_state_3")


def test_a_step_may_be_saved_again(tmp_path):
    """A run that went back to a milestone comes past the later ones once more."""
    for _ in range(3):
        saver = make_checkpointer(tmp_path)
        for step in (5, 6):
            save(saver, step, milestone=True)
            assert contents(str(tmp_path)) == (step, step, step)
    assert len(os.listdir(tmp_path / "checkpoints")) == 2


@pytest.mark.parametrize("kept", [True, False])
def test_a_load_never_mixes_two_checkpoints(tmp_path, kept):
    """Its file's name leads to the next checkpoint before all is read, as evaluations of a run at work meet it."""
    saver = make_checkpointer(tmp_path)
    save(saver, 1, milestone=kept)
    entries = checkpoints.open_checkpoint(f"trainstate::{tmp_path}/streaming_train_state")
    save(saver, 2)
    if kept:
        assert all(np.all(entry.read() == 1) for entry in entries)
    else:
        with pytest.raises(UserError, match="step_00000001/streaming_train_state: was deleted during the load"):
            entries[0].read()


def test_a_run_may_change_what_it_saves(tmp_path):
    save(make_checkpointer(tmp_path), 1)
    save(make_checkpointer(str(tmp_path), save_optimizer_state=False), 2)
    assert not os.path.lexists(tmp_path / "streaming_train_state")
    saved = checkpoints.latest_checkpoint(str(tmp_path))
    assert saved.spec.startswith("params::") and checkpoints.load_metadata(saved.metadata)["step"] == 2
    params = checkpoints.load(saved.spec)
    assert np.all(params["params"]["transformer"]["ln_f"] == 2)


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    save(make_checkpointer(tmp_path), 1)
    leftover = tmp_path / "checkpoints" / ".tmp-7"
    leftover.mkdir()
    (leftover / "streaming_train_state").write_bytes(b"half")
    os.symlink("nowhere", tmp_path / ".tmp-link")
    save(make_checkpointer(tmp_path), 2)
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000002"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tmp")]


def test_disk_full_leaves_the_previous_checkpoint(tmp_path, monkeypatch, caplog):
    saver = make_checkpointer(tmp_path)
    save(saver, 1)
    written, write_entry = [], streaming.write_entry

    def full(file, key, array):
        written.append(key)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_entry(file, key, array)

    monkeypatch.setattr(streaming, "write_entry", full)
    before = sorted(os.walk(tmp_path))
    saver.save(small_state(2), 2, {"step": 2}, {"step": 2}, milestone=True)
    with pytest.raises(UserError, match=rf"{tmp_path}: the checkpoint was not saved \(No space left on device\)"):
        saver.save(small_state(3), 3, {}, METADATA)
    assert sorted(os.walk(tmp_path)) == before and contents(str(tmp_path)) == (1, 1, 1)
    save(saver, 4)
    assert contents(str(tmp_path)) == (4, 4, 4)


def test_a_file_size_limit_leaves_the_previous_checkpoint(tmp_path):
    """The real thing: the kernel refuses to write on."""
    program = f"""
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        from checkpoint_kit import make_checkpointer, save
        from EasyLM.errors import UserError
        saver = make_checkpointer({str(tmp_path)!r})
        save(saver, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        try:
            save(saver, 2)
        except UserError as error:
            print(error)
    """
    said = run_python(program)
    assert "the checkpoint was not saved (File too large)" in said
    assert contents(str(tmp_path)) == (1, 1, 1) and os.listdir(tmp_path / "checkpoints") == ["step_00000001"]


def run_python(program: str) -> str:
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("milestone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, milestone):
    """Kills a save of step 2 before its first, second, ... change to the disk, until one gets through."""
    program = f"""
        import os, signal, sys
        from checkpoint_kit import contents, make_checkpointer, save, streaming

        def killed_at(moment, run_dir):
            count = 0

            def tick(event, arguments=()):
                nonlocal count
                names = ("os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir", "open", "write")
                if event in names:
                    count += 1
                    if count == moment:
                        os.kill(os.getpid(), signal.SIGKILL)

            write_entry = streaming.write_entry

            def write(file, key, array):
                write_entry(file, key, array)
                file.flush()
                tick("write")

            streaming.write_entry = write
            saver = make_checkpointer(run_dir)
            sys.addaudithook(tick)
            save(saver, 2, {milestone})

        old = new = 0
        for moment in range(1, 100):
            run_dir = os.path.join({str(tmp_path)!r}, str(moment))
            save(make_checkpointer(run_dir), 1, True)
            child = os.fork()
            if child == 0:
                killed_at(moment, run_dir)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            state, data, metadata = contents(run_dir)
            assert state == data == metadata and state in (1, 2), (moment, state, data, metadata)
            old, new = old + (state == 1), new + (state == 2)
            save(make_checkpointer(run_dir), 3)
            assert contents(run_dir) == (3, 3, 3)
            assert not [name for name in os.listdir(run_dir + "/checkpoints") if "tmp" in name]
            if status == 0:
                break
        print(old, new, status)
    """
    old, new, status = map(int, run_python(program).split())
    assert status == 0 and old > 10 and new >= 2  # kills before and after the one move that counts


def test_the_first_process_of_a_run_says_where_it_cannot_write(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=rf"{blocked}/run: cannot write checkpoints there \(Not a directory\)"):
        make_checkpointer(str(blocked / "run"))
    (tmp_path / "copied" / "latest").mkdir(parents=True)
    with pytest.raises(UserError, match="copied without its links"):
        make_checkpointer(str(tmp_path / "copied"))


def test_other_failures_are_not_hidden(tmp_path, monkeypatch):
    saver = make_checkpointer(tmp_path)
    monkeypatch.setattr(streaming, "write_entry", lambda *_: 1 / 0)
    saver.save(small_state(1), 1, {}, METADATA)
    with pytest.raises(ZeroDivisionError):
        saver.wait()
    saver.wait()


def test_a_remote_run_directory(monkeypatch):
    run_dir = "memory://bucket/run"
    saver = make_checkpointer(run_dir)
    assert checkpoints.latest_checkpoint(run_dir) is None
    for step in range(1, 5):
        save(saver, step, milestone=step == 2)
        assert contents(run_dir) == (step, step, step)
    files = saver._directory._files
    steps = sorted(name.rsplit("/", 1)[1] for name in files.ls("/bucket/run/checkpoints", detail=False))
    assert steps == ["step_00000002", "step_00000004"]
    path = f"{run_dir}/checkpoints/step_00000002/streaming_train_state"
    assert checkpoints.load_metadata(checkpoints.sidecar_path(path, "metadata"))["step"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "write_entry", lambda *_: os.close(-1))  # an OSError
        with pytest.raises(UserError, match="was not saved"):
            save(saver, 5)
    assert contents(run_dir) == (4, 4, 4)
    save(saver, 6)
    assert contents(run_dir) == (6, 6, 6)
    back = make_checkpointer(run_dir)  # of a run that went back to the milestone
    save(back, 3)
    assert contents(run_dir) == (3, 3, 3)


def test_a_remote_step_that_is_saved_again_is_there_until_the_new_one_is(monkeypatch):
    """As when the command of a finished run is repeated."""
    run_dir = "memory://bucket/again"
    save(make_checkpointer(run_dir), 4)
    again = make_checkpointer(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "write_entry", lambda *_: os.close(-1))  # an OSError
        with pytest.raises(UserError, match="the previous one is intact"):
            save(again, 4)
    assert contents(run_dir) == (4, 4, 4)
    for _ in range(3):
        save(again, 4)
        assert contents(run_dir) == (4, 4, 4)
        assert len(again._directory._files.ls("/bucket/again/checkpoints", detail=False)) == 1


def test_the_figures_of_a_remote_run_lie_beside_its_checkpoints(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = flags.defaults(metrics_log.LOGGER_FLAGS)
    for step in (1, 2):
        figures = metrics_log.Logger(config, "memory://bucket/figures", {})
        figures.log({"step": step})
        figures.close()
    with fsspec.open("memory://bucket/figures/metrics.jsonl") as file:
        assert file.read() == b'{"step": 1}\n{"step": 2}\n'


def test_metadata(tmp_path, golden):
    metadata = checkpoints.make_metadata(7, {"seed": 1}, llama_config={"hidden_size": 4}, mesh={"dp": 2})
    assert metadata["step"] == 7 and metadata["llama_config"] == {"hidden_size": 4} and metadata["mesh"] == {"dp": 2}
    assert metadata["versions"]["jax"] == jax.__version__ and len(metadata["git_revision"]) >= 40
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps(metadata))
    assert checkpoints.load_metadata(str(path)) == metadata
    path.write_text('{"step": ')
    with pytest.raises(UserError, match=rf"{path}: not JSON"):
        checkpoints.load_metadata(str(path))
    released = str(golden / "lvm_tiny" / "step15" / "streaming_train_state")
    assert checkpoints.load_metadata(checkpoints.sidecar_path(released, "metadata"))["step"] == 15
    assert checkpoints.load_dataset_state(checkpoints.sidecar_path(released, "dataset"))["total_tokens"] == 7680
    assert checkpoints.sidecar_path(str(golden / "lvm_tiny" / "streaming_params_bf16"), "metadata") is None


@pytest.mark.slow
def test_two_processes_save_what_they_share(tmp_path, port):
    """Process 0 writes; arrays spread over both are brought to it layer by layer; a failure stops both."""
    program = """
        import os, sys
        os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        import jax
        process, port, run_dir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
        jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
        import errno
        import numpy as np
        from EasyLM.errors import UserError
        from EasyLM import checkpoints
        from EasyLM.checkpoints import streaming
        from EasyLM.parallel import make_mesh
        from EasyLM.training.step import TrainState
        from jax.sharding import NamedSharding, PartitionSpec as P

        mesh = make_mesh("1,4,1")
        def make(shape, spec):
            values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
            return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), lambda index: values[index])
        layers = {"w": make((3, 8, 4), P(None, "fsdp"))}
        params = {"params": {"h": layers, "b": make((5,), P()), "c": make((8, 2), P("fsdp"))}}
        state = TrainState(make((), P()).astype("int32"), params, {"mu": params})
        saver = checkpoints.Checkpointer(run_dir, save_optimizer_state=True)
        saver.prepare(state)
        saver.save(state, 1, {}, {})
        saver.wait()
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        loaded = checkpoints.load(f"trainstate::{run_dir}/streaming_train_state", target)
        for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(state)):
            assert x.sharding == y.sharding
            for a, b in zip(x.addressable_shards, y.addressable_shards):
                np.testing.assert_array_equal(np.asarray(a.data), np.asarray(b.data))
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")
        streaming.write_entry = full
        saver.save(state, 2, {}, {})
        try:
            saver.wait()
        except UserError as error:
            print("stopped:", error)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    processes = [
        subprocess.Popen([*command, f"{i}", f"{port}", tmp_path], env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said = finish(*processes)
    assert "No space left" in said[0] and "process 0 could not save" in said[1]
    saved = file_content(tmp_path / "streaming_train_state")
    for layer in range(3):
        expected = np.arange(96, dtype=np.float32).reshape(3, 8, 4)[layer]
        np.testing.assert_array_equal(saved["params", "params", "h", str(layer), "w"], expected)
    np.testing.assert_array_equal(saved["opt_state", "mu", "params", "c"], np.arange(16).reshape(8, 2))
