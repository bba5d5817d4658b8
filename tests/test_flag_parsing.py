"""How flags are read: ranges, choices, help, variables of the environment, and errors of one line."""

import gc
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

import EasyLM
from EasyLM import flags
from EasyLM.errors import UserError
from EasyLM.flags import Flag, Required
from EasyLM.interrupt import raises_interrupts

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLE = {
    "rate": Flag(0.5, "A number.", least=0, below=1),
    "port": Flag(80, "A port.", least=0, most=65535),
    "size": Flag(2.0, "A size.", above=0),
    "count": Flag(None, "A count.", type=int, least=1),
    "group": {
        "output_dir": Flag("", "Where to write.", required=True),
        "mode": Flag("a", "A mode.", choices=("a", "b")),
        "input_dir": Flag("", "Where to read.", required=True),
    },
}


def example(**values):
    config = flags.defaults(EXAMPLE)
    config.group.output_dir = config.group.input_dir = "somewhere"
    for name, value in values.items():
        config[name] = value
    return config


def test_a_number_outside_its_range_is_refused():
    flags.validate(EXAMPLE, example(rate=0.0, port=65535, size=math.inf, count=1))
    flags.validate(EXAMPLE, example(count=None))
    for name, value, rule in [
        ("rate", -0.1, "at least 0 and below 1"),
        ("rate", 1.0, "at least 0 and below 1"),
        ("rate", math.nan, "at least 0 and below 1"),
        ("port", -1, "0..65535"),
        ("port", 65536, "0..65535"),
        ("size", 0.0, "above 0"),
        ("size", math.nan, "above 0"),
        ("count", 2**63, "a 64-bit integer"),
        ("count", 0, "at least 1"),
    ]:
        with pytest.raises(UserError, match=re.escape(f"--{name}={value}: must be {rule}")):
            flags.validate(EXAMPLE, example(**{name: value}))


def test_nan_is_refused_without_a_range():
    definitions = {"x": Flag(0.0, "A number.")}
    config = flags.defaults(definitions)
    config.x = math.nan
    with pytest.raises(UserError, match="--x=nan: must be a number"):
        flags.validate(definitions, config)


def test_all_missing_flags_are_named_at_once():
    with pytest.raises(UserError, match=r"^--group\.output_dir, --group\.input_dir are missing$"):
        flags.validate(EXAMPLE, flags.defaults(EXAMPLE))


def test_a_flag_can_be_required_because_of_other_flags():
    definitions = {
        "file": Flag("", "A file.", required=Required("unless --list is given", lambda config: not config.list)),
        "list": Flag("", "A list."),
        "output": Flag("", "Where to write.", required=True),
    }
    config = flags.defaults(definitions)
    with pytest.raises(UserError, match=r"^--output, --file \(required unless --list is given\) are missing$"):
        flags.validate(definitions, config)
    config.output = "somewhere"
    with pytest.raises(UserError, match=r"^--file \(required unless --list is given\) is missing$"):
        flags.validate(definitions, config)
    config.list = "a list"
    flags.validate(definitions, config)
    text = flags.help_text(test_a_flag_can_be_required_because_of_other_flags, definitions)
    assert re.findall("--(.*)=TEXT", text) == ["file", "output", "list"]  # what can be required comes first
    assert "--file=TEXT  (required unless --list is given)\n" in text


def test_a_value_outside_the_choices_is_refused():
    config = example()
    config.group.mode = "c"
    with pytest.raises(UserError, match=r"--group\.mode='c': choose one of 'a', 'b'"):
        flags.validate(EXAMPLE, config)


def test_help_shows_groups_defaults_ranges_and_required_flags_first():
    assert flags.help_text(test_help_shows_groups_defaults_ranges_and_required_flags_first, EXAMPLE).endswith(
        """
How flags are read: ranges, choices, help, variables of the environment, and errors of one line.

flags:
  --rate=NUMBER  (default: 0.5; at least 0 and below 1)
      A number.
  --port=INTEGER  (default: 80; 0..65535)
      A port.
  --size=NUMBER  (default: 2.0; above 0)
      A size.
  --count=INTEGER  (default: none; at least 1)
      A count.

group flags:
  --group.output_dir=TEXT  (required)
      Where to write.
  --group.input_dir=TEXT  (required)
      Where to read.
  --group.mode=TEXT  (default: a; one of: a, b)
      A mode.

--flagfile=FILE reads flags from FILE, one per line; lines that start with # are comments."""
    )


def test_help_shows_a_space_and_lists_an_alias_once():
    definitions = {
        "separator": Flag(" ", "A separator."),
        "dtype": Flag("", "A type.", choices=("", "fp32", "float32"), aliases={"float32": "fp32"}),
    }
    text = flags.help_text(test_help_shows_a_space_and_lists_an_alias_once, definitions)
    assert "--separator=TEXT  (default: ' ')" in text
    assert "--dtype=TEXT  (default: empty; one of: empty, fp32; float32 means fp32)" in text


def test_help_is_silent_when_its_reader_has_closed_the_pipe():
    """As `head` does."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "tokenizer.pack", "--help"]
    completed = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write_end)
    assert (completed.returncode, completed.stderr) == (0, "")


def test_the_version_is_printed(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exited:
        flags.run(test_the_version_is_printed, EXAMPLE, ["program", "--version"])
    assert exited.value.code == 0
    assert capsys.readouterr().out == f"EasyLM-LVM {EasyLM.__version__}\n"


def test_environment_variables_expand(monkeypatch):
    monkeypatch.setenv("LVM_NODES", "4")
    assert flags.expand_variables("mesh_dim", "$LVM_NODES,-1,${LVM_NODES}") == "4,-1,4"
    assert flags.expand_variables("total_steps", 3) == 3
    monkeypatch.setenv("HOME", "/home/me")
    assert flags.expand_variables("path", "~/a.jsonl,~/b/*.jsonl,c~/d") == "/home/me/a.jsonl,/home/me/b/*.jsonl,c~/d"
    assert flags.expand_variables("load_checkpoint", "params::~/run/params") == "params::/home/me/run/params"
    assert flags.expand_variables("notes", "~ 3 runs, ~/ and a~b") == "~ 3 runs, ~/ and a~b"
    with pytest.raises(UserError, match=r"--mesh_dim=\$LVM_UNSET: the environment variable LVM_UNSET is not set"):
        flags.expand_variables("mesh_dim", "$LVM_UNSET")


def test_the_path_of_an_existing_file_is_taken_literally(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LVM_NODES", "4")
    for name in ("a$LVM_UNSET.jsonl", "$LVM_NODES"):
        assert flags.expand_variables("new", "$LVM_NODES") == "4"
        (tmp_path / name).touch()
        assert flags.expand_variables("path", name) == name
        assert flags.expand_variables("path", str(tmp_path / name)) == str(tmp_path / name)


PROGRAM = """
from EasyLM.flags import Flag, run
def main(config):
    print(config.group.text, config.steps)
run(main, {"steps": Flag(3, "Steps.", least=1), "group": {"text": Flag("", "A text.", required=True)},
           "rate": Flag(0.1, "A rate."), "is_on": Flag(False, "A switch."),
           "dtype": Flag("fp32", "A type.", choices=("fp32", "bf16"))})
"""


@pytest.mark.parametrize(
    "arguments, code, parts",
    [
        (["--group.text=a$LVM_NAME"], 0, ["ab 3"]),
        (["--flagfile=FLAGFILE", "--steps=5"], 0, ["from a file 5"]),
        (["--flagfile=missing"], 2, ["error: Unable to open flagfile", "missing"]),
        (["--stepz=3"], 2, ["error: --stepz: no such flag; did you mean --steps?"]),
        (["--steps=many"], 2, ["error: --steps=many: must be an integer"]),
        (["--steps=1e3"], 2, ["error: --steps=1e3: must be an integer"]),
        (["--rate=1,5"], 2, ["error: --rate=1,5: must be a number"]),
        (["--is_on=maybe"], 2, ["error: --is_on=maybe: must be True or False"]),
        (["--rate=1\n5"], 2, [r"error: --rate=1\n5: must be a number"]),
        (["--v=many"], 2, ["verbosity", "many"]),  # absl's own
        (["--dtype=fp8"], 2, ["dtype", "fp8", "fp32|bf16"]),
        (["--group.text=x", "--steps=0"], 2, ["error: --steps=0: must be at least 1"]),
        (["--steps=3"], 2, ["error: --group.text is missing"]),
        (["3"], 2, ["unexpected argument '3'"]),
    ],
)
def test_command_line(arguments, code, parts, tmp_path, monkeypatch):
    """A valid command line runs; an invalid one prints one line and exits with the right code."""
    monkeypatch.setenv("LVM_NAME", "b")
    (tmp_path / "FLAGFILE").write_text("# a comment\n\n--group.text=from a file\n--steps=4\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    completed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    output = completed.stdout + completed.stderr
    assert completed.returncode == code, output
    assert len(output.splitlines()) == 1, output
    assert all(part in output for part in parts), output


def test_ctrl_c_ends_a_command_with_one_line():
    """And after the `finally` blocks of its main function."""
    program = """
import os, signal
from EasyLM import flags
def main(config):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        print("cleaned up")
flags.run(main, {}, ["program"])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    completed = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert completed.returncode == 130
    assert (completed.stdout, completed.stderr) == ("cleaned up\n", "\ninterrupted\n")


def test_ctrl_c_is_not_lost_in_a_callback_of_the_garbage_collector(monkeypatch):
    """Python drops an exception there. JAX has such a callback."""
    unraisable, interrupts = [], [signal.SIGINT]

    def callback(phase, info):
        while interrupts:
            os.kill(os.getpid(), interrupts.pop())

    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    gc.callbacks.append(callback)
    try:
        with pytest.raises(KeyboardInterrupt), raises_interrupts():
            gc.collect()
            time.sleep(30)
    finally:
        gc.callbacks.remove(callback)
    assert not unraisable and signal.getsignal(signal.SIGINT) is signal.default_int_handler
