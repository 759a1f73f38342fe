"""What a reward worker may know and reach: its environment variables, and namespaces of its own.

Reward functions run code of users and, often, of models. Nothing here needs root, but the kernel has to permit
unprivileged user namespaces.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import select
import struct
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mrl.launch.lifeline import die_with_parent

_CLUSTER = re.compile(
    r"(MASTER|RAY|SLURM|SRUN|SBATCH|TORCHELASTIC|PET|MRL|NCCL|GLOO|SGLANG|PMI|PMIX|OMPI|KUBERNETES)_|"
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$"
)
"""Where a job's processes find each other."""
_SECRET = re.compile(
    r"(^|_)(TOKEN|API_?KEY|KEY|SECRET|PASSPHRASE|CREDENTIAL|AUTH)S?(_|$)|PASSW(OR)?D(_|$)", re.IGNORECASE
)

_NAMESPACES = os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWPID | os.CLONE_NEWIPC | os.CLONE_NEWNS
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 18
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_AUDIT_ARCH_AND_CONNECT = {"x86_64": (0xC000003E, 42), "aarch64": (0xC00000B7, 203)}
_IO_URING_SETUP = 425


def clean_environment(environ: Mapping[str, str], keep: Collection[str] = ()) -> dict[str, str]:
    """The variables without the cluster's addresses and what is named like a secret, except for those in `keep`."""
    return {name: value for name, value in environ.items() if name in keep or not _is_private(name)}


def _is_private(name: str) -> bool:
    return _CLUSTER.match(name) is not None or _SECRET.search(name) is not None


def check_permitted() -> None:
    """Raise ValueError if this host does not let a process enter the sandbox."""
    program = f"import sys; sys.path[:] = {sys.path!r}; from mrl.rewards.sandbox import enter; enter()"
    probe = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if probe.returncode:
        lines = probe.stderr.strip().splitlines() or [f"exit status {probe.returncode}"]
        raise ValueError(
            f"reward.sandbox = True, but this host does not permit it ({lines[-1]}); allow unprivileged user "
            "namespaces (sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns, a container's "
            "seccomp profile and masked /proc), or set reward.sandbox=False"
        )


def enter(lifeline: int | None = None) -> None:
    """Go on in a child process that has no network and sees no process but its own; this one waits for it and exits.

    The child can connect to no socket, not even one with a name in the file system, and has no way to get a privilege.
    Files are what they were. Only for a process with a single thread.

    Args:
        lifeline: descriptor that becomes readable when the parent is gone.

    Raises:
        OSError: the kernel does not permit it.
    """
    user, group = os.geteuid(), os.getegid()
    os.unshare(_NAMESPACES)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    child = os.fork()
    if child:
        _leave_with(child)
    die_with_parent(None)
    if lifeline is not None and select.select([lifeline], [], [], 0)[0]:
        os._exit(1)
    libc = ctypes.CDLL(None, use_errno=True)
    _call(libc.mount, b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    _call(libc.mount, b"proc", b"/proc", b"proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None)
    _drop_privileges(libc)
    _forbid_connections(libc)


def _leave_with(child: int) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(128 - status if status < 0 else status)


def _drop_privileges(libc: ctypes.CDLL) -> None:
    """Give up the new namespaces' capabilities for good: with them the old /proc could be uncovered."""
    header, none = struct.pack("=II", _CAPABILITY_VERSION_3, 0), bytes(24)
    _call(libc.capset, header, none)
    _call(libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _forbid_connections(libc: ctypes.CDLL) -> None:
    """Have connect() fail: sockets in the file system, such as Ray's, belong to no network namespace."""
    if platform.machine() not in _AUDIT_ARCH_AND_CONNECT:
        raise OSError(f"no system call filter for {platform.machine()}")
    arch, connect = _AUDIT_ARCH_AND_CONNECT[platform.machine()]
    load, equal, greater, end = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | 1, 0x80000000
    # Each line: code, jump if true, jump if not, value. Another architecture's calls would have other numbers.
    lines = (
        (load, 0, 0, 4),
        (equal, 1, 0, arch),
        (end, 0, 0, kill),
        (load, 0, 0, 0),
        (greater, 3, 0, 0x40000000),
        (equal, 2, 0, connect),
        (equal, 1, 0, _IO_URING_SETUP),
        (end, 0, 0, allow),
        (end, 0, 0, refuse),
    )
    content = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    program = struct.pack("@HP", len(lines), ctypes.addressof(content))
    _call(libc.prctl, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0)


def _call(function: Any, *arguments: int | bytes | None) -> None:
    typed = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    if function(*typed):
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")
