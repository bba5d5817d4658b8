"""scripts/tpu on an imitated Google Cloud: each of the two workers of a slice is a directory."""

import os
import pathlib
import subprocess

import pytest

SCRIPTS = pathlib.Path(__file__).parent.parent / "scripts" / "tpu"

# One slice. Its state is a file, and `capacity` holds the answers to requests for it, one line each.
GCLOUD = """#!/usr/bin/env bash
echo "$3 $4 ${*:5}" >> "$CLOUD/calls"
case $4 in
create)
    answer=$(head -n 1 "$CLOUD/capacity"); sed -i 1d "$CLOUD/capacity"
    [ "$answer" != none ] || { echo "no capacity" >&2; exit 1; }
    mkdir -p "$CLOUD/worker0" "$CLOUD/worker1"; echo READY > "$CLOUD/state" ;;
describe) cat "$CLOUD/state" ;;
delete) [ -e "$CLOUD/state" ] || exit 1; rm -r "$CLOUD/state" "$CLOUD/worker0" "$CLOUD/worker1" ;;
ssh)
    for argument; do case $argument in --command=*) command=${argument#--command=} ;; esac; done
    code=0 workers=0
    [[ " $* " = *" --worker=all "* ]] && workers="0 1"
    for worker in $workers; do
        (cd "$CLOUD/worker$worker" && WORKER=$worker HOME=$PWD bash -c "$command") || code=$?
    done
    exit $code ;;
*) exit 64 ;;
esac
"""
# The set-up of an imitated project, whose python notes its arguments and ends as the next line of `codes` says.
SETUP = """mkdir -p .venv/bin
echo 'PATH=$PWD/.venv/bin:$PATH' > .venv/bin/activate
cat > .venv/bin/python <<'EOF'
#!/usr/bin/env bash
[ "$2" = pip ] && exit
{ echo -n "$WORKER:"; printf ' [%s]' "$@"; echo; } >> "$CLOUD/trainings"
line=$(head -n 1 "$CLOUD/codes"); [ "$WORKER" = 0 ] || sed -i 1d "$CLOUD/codes"
if [ "$line" = preempted ]; then echo PREEMPTED > "$CLOUD/state"; exit 255; fi
exit "$line"
EOF
chmod +x .venv/bin/python
"""
FLAGS = ["--logger.output_dir=gs://bucket/my runs", "--logger.experiment_id=a"]


def write_program(path: pathlib.Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cloud(tmp_path: pathlib.Path) -> pathlib.Path:
    """The imitated cloud's directory. Its programs, `gcloud` among them, are in `bin`."""
    (tmp_path / "bin").mkdir()
    write_program(tmp_path / "bin" / "gcloud", GCLOUD)
    write_program(tmp_path / "bin" / "curl", "#!/bin/sh\necho true\n")  # the installer of uv
    write_program(tmp_path / "bin" / "uv", "#!/bin/sh\n")
    (tmp_path / "capacity").write_text("yes\n" * 5)
    repository = tmp_path / "repository"
    (repository / "scripts").mkdir(parents=True)
    write_program(repository / "scripts" / "setup.sh", SETUP)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], [*identity, "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    return tmp_path


def run(cloud: pathlib.Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PATH": f"{cloud / 'bin'}:{os.environ['PATH']}",
        "CLOUD": str(cloud),
        "REPOSITORY": str(cloud / "repository"),
        "BRANCH": "main",
        "RETRY_SECONDS": "0",
        "MAX_STARTS": "6",
    }
    command = ["bash", str(SCRIPTS / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def calls(cloud: pathlib.Path, verb: str) -> list[str]:
    return [line for line in (cloud / "calls").read_text().splitlines() if line.startswith(f"tpu-vm {verb} ")]


def test_create_installs_on_every_host_and_run_passes_the_flags(cloud):
    created = run(cloud, "create.sh", "lvm", "us-east5-a", "v5p-16")
    assert created.returncode == 0, created.stderr
    assert "--accelerator-type=v5p-16 --version=v2-alpha-tpuv5" in calls(cloud, "create")[0]
    (cloud / "codes").write_text("75\n")
    assert run(cloud, "run.sh", "lvm", "us-east5-a", *FLAGS).returncode == 75
    trainings = (cloud / "trainings").read_text().splitlines()
    assert [line[:2] for line in trainings] == ["0:", "1:"]
    assert all(line.endswith("".join(f" [{flag}]" for flag in FLAGS).strip()) for line in trainings)
    assert all("--jax_distributed.initialize_jax_distributed=True" in line for line in trainings)


def test_resume_goes_on_after_a_stop_a_preemption_and_missing_capacity(cloud):
    (cloud / "capacity").write_text("none\nyes\nyes\n")
    (cloud / "codes").write_text("75\npreempted\n70\n0\n")
    result = run(cloud, "resume.sh", "lvm", "us-east5-a", "v6e-64", *FLAGS)
    assert result.returncode == 0, result.stderr
    assert len(calls(cloud, "create")) == 3  # none, the first slice, the one after the preemption
    assert len((cloud / "trainings").read_text().splitlines()) == 2 * 4


def test_resume_ends_at_an_error_of_the_training_and_keeps_the_slice(cloud):
    (cloud / "codes").write_text("2\n")
    assert run(cloud, "resume.sh", "lvm", "us-east5-a", "v4-8", *FLAGS).returncode == 2
    assert (cloud / "state").read_text() == "READY\n"
    assert len(calls(cloud, "create")) == 1


def test_resume_refuses_flags_that_would_begin_at_0_each_time(cloud):
    result = run(cloud, "resume.sh", "lvm", "us-east5-a", "v4-8", FLAGS[0])
    assert result.returncode == 2
    assert "--logger.experiment_id is missing" in result.stderr


def test_create_names_the_valid_types(cloud):
    result = run(cloud, "create.sh", "lvm", "us-east5-a", "h100-8")
    assert result.returncode == 2
    assert "v5p-N" in result.stderr and not (cloud / "calls").exists()
