"""A SLURM cluster on hosts of this machine: its controller on the first one, a node on each."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from namespaces import HostProcess, Hosts, Unavailable

_NEEDED = ("munged", "slurmctld", "slurmd", "sinfo", "srun", "sbatch")
_START_S = 60.0

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={first}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
NodeName={nodes} CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class SlurmCluster:
    """SLURM's daemons on `hosts`, which end them; commands run on the first host.

    Raises:
        Unavailable: SLURM is not installed.
    """

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        missing = [name for name in _NEEDED if shutil.which(name) is None]
        if missing:
            raise Unavailable(f"no program {', '.join(missing)}; install slurm-wlm and munge")
        self._hosts, self._folder = hosts, folder
        self._environ = {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
        self._daemons: list[HostProcess] = []
        self._start()

    def run(self, command: Sequence[str], log: Path) -> HostProcess:
        """A command on the first host, from which it can submit jobs."""
        return self._hosts.run(0, command, log, **self._environ)

    def logs(self) -> str:
        """What the daemons said."""
        return "\n".join(daemon.output() for daemon in self._daemons)

    def _start(self) -> None:
        folder, names = self._folder, self._hosts.names
        for name in ("state", *(f"spool-{name}" for name in names)):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(
            _CONFIGURATION.format(first=names[0], folder=folder, nodes=",".join(names)).lstrip()
        )
        # Nothing of SLURM uses control groups here, and newer ones want systemd.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{kind}={folder}/munge.{kind.split('-')[0]}" for kind in ("socket", "pid-file", "log-file")]
        self._daemon(
            0, ["munged", "--foreground", "--force", f"--key-file={key}", f"--seed-file={folder}/seed", *files]
        )
        self._wait((folder / "munge.socket").exists)
        self._daemon(0, ["slurmctld", "-D"])
        for host, name in enumerate(names):
            self._daemon(host, ["slurmd", "-D", "-N", name])
        self._wait(self._all_idle)

    def _daemon(self, host: int, command: Sequence[str]) -> None:
        log = self._folder / f"{command[0]}-{host}.out"
        self._daemons.append(self._hosts.run(host, command, log, **self._environ))

    def _all_idle(self) -> bool:
        log = self._folder / "sinfo.out"
        log.unlink(missing_ok=True)
        self.run(["sinfo", "--noheader", "--Node", "--format=%T"], log).wait(_START_S)
        return log.read_text().split() == ["idle"] * len(self._hosts.names)

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_S
        while not condition():
            ended = [daemon for daemon in self._daemons if daemon.poll() is not None]
            assert not ended, f"a daemon ended:\n{self.logs()}"
            assert time.monotonic() < deadline, f"SLURM did not start within {_START_S:.0f} s:\n{self.logs()}"
            time.sleep(0.1)


def python_module(*arguments: str) -> list[str]:
    """The command line of a module under this interpreter."""
    return [sys.executable, "-m", *arguments]
