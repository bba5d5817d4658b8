"""Invalid input raises a one-line error that names it, before the first step, and leaves no partial files."""

import base64
import json

import numpy as np
import pytest
from tiny_run import GOLDEN, metrics, train

from EasyLM.checkpoints import streaming
from EasyLM.errors import UserError
from EasyLM.training import compilation

JSON = "train_dataset.json_dataset"
STATE = f"{GOLDEN}/init/streaming_train_state"
INVALID = {
    "half precision": ({"dtype": "fp16"}, "--dtype=fp16: small gradients underflow to zero.*use bf16"),
    "preset": ({"load_llama_config": "vqlm_8b"}, "^--load_llama_config='vqlm_8b': choose one of 'vqlm_debug'"),
    "config file": ({"load_llama_config": "json::missing.json"}, "^--load_llama_config=json::missing.json: no such"),
    "setting": ({"update_llama_config": "dict(hiden_size=64)"}, "unknown setting hiden_size; choose from vocab_size"),
    "code in settings": ({"update_llama_config": "__import__('os').abort()"}, "not a Python dict literal"),
    "remat policy": ({"llama.remat_block": "some"}, "llama.remat_block='some': choose one of"),
    "heads": ({"llama.num_attention_heads": 7, "update_llama_config": ""}, "^--llama.num_attention_heads=7: must be"),
    "rope": ({"llama.rope_scaling": "8"}, "^--llama.rope_scaling: not a Python dict literal"),
    "optimizer": ({"optimizer.type": "sgd"}, "choose one of 'adamw', 'palm'"),
    "accumulation": ({"optimizer.accumulate_gradient_steps": 0}, "accumulate_gradient_steps=0: must be at least 1"),
    "mesh size": ({"mesh_dim": "3,1,1"}, "--mesh_dim=3,1,1: is for 3 devices, but this run has 8; a size of -1 takes"),
    "two wildcards": ({"mesh_dim": "-1,-1,1"}, "--mesh_dim=-1,-1,1: only one size may be -1"),
    "mesh axis": ({"mesh_dim": "dp:1,fsdp:-1,tp:2"}, "--mesh_dim=dp:1,fsdp:-1,tp:2: .* each of the axes dp, fsdp, mp"),
    "mesh text": ({"mesh_dim": "1,all,1"}, "each size is a positive integer"),
    "batch": ({f"{JSON}.batch_size": 6}, f"--{JSON}.batch_size=6: must be a positive multiple of 4"),
    "sequence": ({f"{JSON}.seq_length": 5000}, f"--{JSON}.seq_length=5000: longer than the model's"),
    "log frequency": ({"log_freq": 0}, "--log_freq=0: must be at least 1"),
    "evaluation": ({"eval_steps": -1}, "--eval_steps=-1: must be at least 0"),
    "patience": ({"max_nonfinite_steps": 0}, "--max_nonfinite_steps=0: must be at least 1"),
    "no metadata": ({"load_metadata": "missing.json"}, "--load_metadata=missing.json: no such file"),
    "no data state": (
        {"load_checkpoint": f"trainstate::{STATE}", "load_dataset_state": f"{GOLDEN}/init/metadata.pkl"},
        "not a data state",
    ),
    "held-out data": (
        {"eval_steps": 1, "eval_dataset.json_dataset.path": "missing.jsonl"},
        r"--eval_dataset\.json_dataset\.path=missing\.jsonl: no such file",
    ),
    "no data": ({f"{JSON}.path": "missing.jsonl"}, f"--{JSON}.path=missing.jsonl: no such file"),
    "data directory": ({f"{JSON}.path": str(GOLDEN)}, f"--{JSON}.path={GOLDEN}: is a directory"),
    "field": (
        {"train_dataset.text_processor.fields": "{codes}"},
        rf"{GOLDEN}/dataset\.jsonl:1: lacks the field 'codes' \(fields here: tokens, id\)",
    ),
    "vocabulary": (
        {"update_llama_config": "dict(vocab_size=500)"},
        rf"{GOLDEN}/dataset\.jsonl:1: id 503 is outside the vocabulary 0\.\.499",
    ),
    "checkpoint prefix": ({"load_checkpoint": f"weights::{STATE}"}, "choose one of 'trainstate'"),
    "no prefix": ({"load_checkpoint": STATE}, "PREFIX::PATH"),
    "no checkpoint": ({"load_checkpoint": "trainstate::missing"}, "there is no missing"),
    "other shape": (
        {
            "load_checkpoint": f"params::{GOLDEN}/streaming_params_bf16",  # without metadata
            "update_llama_config": "dict(vocab_size=512,hidden_size=32)",
        },
        rf"{GOLDEN}/streaming_params_bf16: params/lm_head/kernel has shape \(64, 512\), expected \(32, 512\)",
    ),
    "unknown protocol": (
        {"load_checkpoint": "params::foo://a/b"},
        "^--load_checkpoint=params::foo://a/b: unknown protocol foo://; known are gs, s3",
    ),
    "protocol without its package": (
        {"load_checkpoint": "params::gs://a/b"},
        "^--load_checkpoint=params::gs://a/b: gs:// needs a package that is not installed: pip install gcsfs",
    ),
    "data on a protocol without its package": (
        {f"{JSON}.path": "s3://a/b.jsonl"},
        rf"--{JSON}\.path=s3://a/b\.jsonl: s3:// needs a package that is not installed: pip install s3fs",
    ),
    "run directory on a protocol without its package": (
        {"logger.output_dir": "gs://a"},
        "^--logger.output_dir=gs://a: gs:// needs a package that is not installed: pip install gcsfs",
    ),
    "metadata on an unknown protocol": (
        {"load_checkpoint": f"trainstate::{STATE}", "load_metadata": "foo://a.json"},
        r"^--load_metadata=foo://a\.json: unknown protocol foo://",
    ),
    "wandb's files on an object store": (
        {"logger.wandb_dir": "memory://a"},
        "^--logger.wandb_dir=memory://a: must be a local path",
    ),
    "seed": ({"seed": 2**70}, f"--seed={2**70}: must be a 64-bit integer"),
    "seed of 33 bits": ({"seed": 2**32}, r"--seed=4294967296: must be -2147483648\.\.4294967295"),
    "seed of the order": ({f"{JSON}.shuffle_seed": 2**64}, f"--{JSON}.shuffle_seed={2**64}: must be a 64-bit integer"),
    "steps": ({"total_steps": 2**63}, f"--total_steps={2**63}: must be a 64-bit integer"),
    "other settings": (
        {
            "load_checkpoint": f"trainstate::{STATE}",
            "load_metadata": f"{GOLDEN}/init/metadata.pkl",
            "llama.rms_norm_eps": 1e-5,
        },
        r"other settings: rms_norm_eps=1e-05 \(saved: 1e-06\)",
    ),
}


def files_of_the_run(output_dir) -> list:
    return sorted(output_dir.glob("run/**/*"))


@pytest.mark.parametrize("name", INVALID)
def test_invalid_setting_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(compilation, "trace_step", lambda *_: pytest.fail("compiled before the check"))
    settings, message = INVALID[name]
    with pytest.raises((UserError, FileNotFoundError), match=message) as caught:
        train(tmp_path, **settings)
    assert "\n" not in str(caught.value)
    assert not files_of_the_run(tmp_path), "written before the checks"


def test_starting_files_are_checked_before_data_is_indexed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "EasyLM.data.dataset.make_dataset", lambda *_: pytest.fail("the data was indexed before the check")
    )
    for name in ("checkpoint prefix", "no prefix", "no checkpoint", "no metadata", "log frequency", "held-out data"):
        with pytest.raises(UserError, match=INVALID[name][1]):
            train(tmp_path, **INVALID[name][0])


def record(tokens) -> str:
    return json.dumps({"tokens": base64.b64encode(np.asarray(tokens, "<i4").tobytes()).decode()})


GOOD = record(range(200))
BAD_LINES = {
    "not JSON": ("{'tokens': 3}", r"not JSON \("),
    "no field": ('{"codes": "AAAA"}', r"lacks the field 'tokens' \(fields here: codes\)"),
    "not base64": ('{"tokens": "A?A="}', r"field 'tokens' is not base64"),
    "odd length": ('{"tokens": "AAAA"}', r"field 'tokens' has 3 bytes, not a multiple of 4"),
    "id outside": (record([3, 512]), r"id 512 is outside the vocabulary 0\.\.511"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_named_by_file_and_number(tmp_path, name):
    path = tmp_path / "bad.jsonl"
    line, message = BAD_LINES[name]
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(UserError, match=rf"{path}:2: {message}") as caught:
        train(tmp_path / "out", **{f"{JSON}.path": str(path)})
    assert "\n" not in str(caught.value)
    assert not files_of_the_run(tmp_path / "out")


@pytest.mark.slow
def test_bad_lines_are_skipped_and_counted_on_request(tmp_path):
    path = tmp_path / "bad.jsonl"
    bad = [line for name, (line, _) in BAD_LINES.items() if name != "id outside"]
    path.write_text("\n".join([GOOD, *bad, GOOD]) + "\n")
    run = train(tmp_path / "out", total_steps=1, **{f"{JSON}.path": str(path), f"{JSON}.skip_bad_lines": True})
    assert metrics(run, "dataset_skipped_lines") == {0: (len(bad),)}


@pytest.mark.parametrize("content", ["", "\n\n", record([]) + "\n"])
def test_empty_data_is_refused(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=f"{path}: holds no tokens"):
        train(tmp_path / "out", **{f"{JSON}.path": str(path)})
    assert not files_of_the_run(tmp_path / "out")


def test_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "state"
    path.write_bytes((GOLDEN / "init" / "streaming_train_state").read_bytes()[:-1000])
    with pytest.raises(UserError, match=rf"{path}: opt_state/.*/embedding: byte \d+: the file is truncated") as caught:
        train(tmp_path / "out", load_checkpoint=f"trainstate::{path}")
    assert str(caught.value).endswith(f"the file ends at {path.stat().st_size}")
    assert not files_of_the_run(tmp_path / "out")


def test_output_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(UserError, match=r"--logger\.output_dir=.*out: cannot write"):
        train(tmp_path / "out")


@pytest.mark.slow
def test_another_start_in_the_same_directory_is_refused(tmp_path):
    train(tmp_path, total_steps=1, save_model_freq=1)
    with pytest.raises(UserError, match="already holds a run that started from ''"):
        train(tmp_path, total_steps=2, load_checkpoint=f"trainstate::{STATE}")


@pytest.mark.slow
def test_nonfinite_loss_updates_nothing_saves_the_batch_and_stops(tmp_path):
    run = train(tmp_path, total_steps=2, save_model_freq=1)
    before = {entry.key: entry.read() for entry in streaming.read_streaming(str(run / "streaming_train_state"))}
    poisoned = tmp_path / "poisoned"
    with open(poisoned, "wb") as file:
        for key, value in before.items():
            streaming.write_entry(
                file, key, np.full_like(value, np.nan) if "lm_head" in key and "mu" not in key else value
            )
    settings = {"load_checkpoint": f"trainstate::{poisoned}", "max_nonfinite_steps": 3, "total_steps": 30}
    with pytest.raises(UserError, match="not finite 3 steps in a row"):
        train(tmp_path, **settings, **{"logger.experiment_id": "nan"})
    rows = metrics(tmp_path / "nan", "loss", "skipped_update")
    assert rows == dict.fromkeys((2, 3, 4, 5), (None, True))  # the last step was in progress
    batches = sorted((tmp_path / "nan" / "nonfinite_batches").iterdir())
    assert len(batches) == 4
    assert set(np.load(batches[0])) == {"input_tokens", "target_tokens", "loss_masks"}
    after = {e.key: e.read() for e in streaming.read_streaming(str(tmp_path / "nan" / "streaming_train_state"))}
    for key, value in before.items():
        if key != ("step",) and "lm_head" not in key:
            assert after[key].tobytes() == value.tobytes(), key


@pytest.mark.slow
def test_changed_settings_are_logged_when_a_run_starts_from_parameters(tmp_path, caplog):
    run = train(tmp_path, total_steps=1, save_model_freq=1)
    caplog.clear()
    settings = {"load_checkpoint": f"trainstate_params::{run}/streaming_train_state", "logger.experiment_id": "new"}
    train(tmp_path, total_steps=1, **settings, **{"llama.rope_theta": 500.0})
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("was trained with other settings: rope_theta=500.0 (saved: 10000.0)" in line for line in warnings), (
        warnings
    )


@pytest.mark.slow
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, caplog):
    run = train(tmp_path, total_steps=2, save_model_freq=1)
    write_rows = streaming.write_rows

    def full(file, layout, *rows):
        if layout.key[0] == "opt_state":
            raise OSError(28, "No space left on device")
        write_rows(file, layout, *rows)

    monkeypatch.setattr(streaming, "write_rows", full)
    with pytest.raises(UserError, match="No space left on device"):
        train(tmp_path, total_steps=6, save_model_freq=1)
    monkeypatch.undo()
    # The run ended one or more steps after the save failed. Those are repeated.
    caplog.clear()
    train(tmp_path, total_steps=6, save_model_freq=1)
    assert "resuming after step 2" in caplog.text
    assert sorted(metrics(run, "loss")) == list(range(6))
