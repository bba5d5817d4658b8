"""A SLURM cluster of two nodes on one machine. Each node is a set of Linux namespaces with a network of its own."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterator

JOB_SECONDS = 240  # the longest wait for a job
NODES = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
CONFIG = """
ClusterName=tests
SlurmctldHost=node1
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
ReturnToService=2
KillWait=60
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmdParameters=config_overrides
NodeName=node1 NodeAddr=node1 Port=17001 CPUs=2 RealMemory=2000
NodeName=node2 NodeAddr=node2 Port=17001 CPUs=2 RealMemory=2000
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


def unavailable_reason() -> str:
    """Returns the reason why no cluster can be started here; empty if one can."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "unshare", "nsenter", "ip") if not shutil.which(name)]
    if missing:
        return f"needs {', '.join(missing)} (Debian: slurm-wlm munge iproute2)"
    if subprocess.run(["unshare", "-m", "-n", "-u", "true"], capture_output=True, check=False).returncode:
        return "needs permission to create namespaces (root)"
    return ""


class Cluster:
    """A running cluster. `root` holds its files and logs."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        self._holders: dict[str, subprocess.Popen] = {}

    def run(self, node: str, *command: str, **options) -> subprocess.CompletedProcess:
        """Runs a command on a node; raises CalledProcessError if it fails."""
        return subprocess.run(
            self._on(node, *command), check=True, text=True, capture_output=True, timeout=60, **options
        )

    def submit(self, *arguments: str, **options) -> str:
        """Submits a batch script with sbatch; returns the job id."""
        return self.run("node1", "sbatch", "--parsable", *arguments, **options).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Returns the fields of a job: JobState, ExitCode, Restarts, ..."""
        words = self.run("node1", "scontrol", "--oneliner", "show", "job", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def await_state(self, job: str, *states: str) -> dict[str, str]:
        """Waits until a job is in one of these states. Returns its fields."""
        deadline = time.monotonic() + JOB_SECONDS
        while (fields := self.job(job))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {job} is {fields['JobState']} ({fields['Reason']}), not {states}"
            time.sleep(0.2)
        return fields

    def start_requeued(self, job: str) -> None:
        """Starts a requeued job now; SLURM would wait two minutes."""
        self.await_state(job, "PENDING", "RUNNING")
        self.run("node1", "scontrol", "update", f"JobId={job}", "StartTime=now")

    def pids(self, node: str, text: str) -> list[int]:
        """Returns the ids of the processes on a node whose command line contains a text."""
        namespace = os.readlink(f"/proc/{self._holders[node].pid}/ns/uts")
        pids = []
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if text in command and os.readlink(path / "ns" / "uts") == namespace:
                    pids.append(int(path.name))
        return pids

    def start(self) -> None:
        """Creates the nodes and starts the daemons. Returns when both nodes are idle."""
        for name in ("state", "spool.node1", "spool.node2"):
            (self.root / name).mkdir()
        (self.root / "slurm.conf").write_text(CONFIG.format(root=self.root))
        (self.root / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {n}\n" for n, ip in NODES.items()))
        (self.root / "munge.key").write_bytes(os.urandom(128))
        (self.root / "munge.key").chmod(0o600)
        for node in NODES:
            script = (
                f"hostname {node}; ip link set lo up; mount --bind {self.root}/hosts /etc/hosts; echo ready; sleep inf"
            )
            command = ["unshare", "-m", "-n", "-u", "bash", "-c", script]
            self._holders[node] = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, text=True)
            assert self._holders[node].stdout.readline() == "ready\n"
        peer = str(self._holders["node2"].pid)
        self.run("node1", "ip", "link", "add", "v0", "type", "veth", "peer", "name", "v0", "netns", peer)
        for node, address in NODES.items():
            self.run(node, "ip", "addr", "add", f"{address}/24", "dev", "v0")
            self.run(node, "ip", "link", "set", "v0", "up")
        munge = [f"--{name.replace('_', '-')}={self.root}/munge.{end}" for name, end in MUNGE_FILES.items()]
        self._daemon("node1", "munged", "--force", *munge)
        self._daemon("node1", "slurmctld", "-c")
        for node in NODES:
            self._daemon(node, "slurmd", "-N", node)
        deadline = time.monotonic() + 30
        while self.run("node1", "sinfo", "-h", "-t", "idle", "-o", "%D").stdout.strip() != "2":
            assert time.monotonic() < deadline, f"the nodes did not come up: see {self.root}/*.log"
            time.sleep(0.1)

    def stop(self) -> None:
        """Kills all processes on the nodes, then the nodes."""
        for node, holder in self._holders.items():
            for pid in self.pids(node, ""):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            holder.wait()
            holder.stdout.close()

    def _daemon(self, node: str, *command: str) -> None:
        subprocess.run(
            self._on(node, *command), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60
        )

    def _on(self, node: str, *command: str) -> list[str]:
        enter = ["nsenter", "-t", str(self._holders[node].pid), "-m", "-n", "-u"]
        return [*enter, "env", f"SLURM_CONF={self.root}/slurm.conf", *command]


MUNGE_FILES = {"key_file": "key", "socket": "socket", "pid_file": "pid", "log_file": "log", "seed_file": "seed"}


@contextlib.contextmanager
def running_cluster(root: pathlib.Path) -> Iterator[Cluster]:
    """Yields a running cluster, and stops it at the end."""
    cluster = Cluster(root)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
