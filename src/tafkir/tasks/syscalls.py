"""System-call filters for untrusted programs, as the bytes of a seccomp program: no processes, sockets or mounts.

A process limit does not hold for root, whose user id a namespace of root's is still counted on; a filter holds for all.
"""

from __future__ import annotations

import platform
import struct
from typing import Final

__all__ = ["build_filter"]

_ERRNO: Final = 0x0005_0000
_KILL: Final = 0x8000_0000
_ALLOW: Final = 0x7FFF_0000
_EPERM: Final = 1
_ENOSYS: Final = 38

_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K

# clone3 passes its flags in memory, where no filter can look: ENOSYS makes libc fall back to clone.
_CLONE3: Final = 435
_X32_BIT: Final = 0x4000_0000

# What neither the server of a sandbox nor a program in it needs: socket, socketpair, ptrace, unshare, setns, mount,
# umount2, pivot_root, chroot, add_key, request_key, keyctl, bpf, userfaultfd, perf_event_open, process_vm_readv,
# process_vm_writev, open_by_handle_at, memfd_create, shmget, semget, msgget, mq_open; and io_uring_setup,
# pidfd_open, pidfd_getfd, process_madvise, which have one number everywhere.
_EVERYWHERE: Final = (425, 434, 438, 440)
_DENIED: Final = {
    "x86_64": (41, 53, 101, 272, 308, 165, 166, 155, 161, 248, 249, 250, 321, 323, 298, 310, 311, 304, 319, 29,
               64, 68, 240),
    "aarch64": (198, 199, 117, 97, 268, 40, 39, 41, 51, 217, 218, 219, 280, 282, 241, 270, 271, 265, 279, 194,
                190, 186, 180),
}  # fmt: skip
# What the server may and a program may not: (fork, vfork,) clone, kill, tkill, tgkill, rt_sigqueueinfo,
# rt_tgsigqueueinfo, pidfd_send_signal, setpriority, sched_setaffinity, sched_setscheduler, sched_setparam; prlimit64,
# but for the process itself. A program that could end the server would have its own failure taken for the sandbox's.
_PROGRAM: Final = {
    "x86_64": ((57, 58, 56, 62, 200, 234, 129, 297, 424, 141, 203, 144, 142), 302),
    "aarch64": ((220, 129, 130, 131, 138, 240, 424, 140, 122, 119, 118), 261),
}
_AUDIT: Final = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}


def build_filter(machine: str | None = None, *, server: bool = False) -> bytes | None:
    """The filter for this machine (or another, by its `uname -m`); None where its system-call numbers are not known.

    Denied calls fail with EPERM; calls of another architecture's ABI end the process.

    Args:
        server: leave out what a process needs that starts and ends the programs.
    """
    machine = machine or platform.machine()
    if machine not in _AUDIT:
        return None
    program = [
        _step(_LOAD, 4),
        _step(_EQUAL, _AUDIT[machine], 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, 0),
        _step(_AT_LEAST, _X32_BIT, 0, 1),
        _step(_RETURN, _KILL),
        _step(_EQUAL, _CLONE3, 0, 1),
        _step(_RETURN, _ERRNO | _ENOSYS),
    ]
    alone, limit = _PROGRAM[machine]
    for number in (*_DENIED[machine], *_EVERYWHERE, *(() if server else alone)):
        program += [_step(_EQUAL, number, 0, 1), _step(_RETURN, _ERRNO | _EPERM)]
    if not server:  # the low half of the first argument, a process id, is at 16
        program += [
            _step(_EQUAL, limit, 0, 3),
            _step(_LOAD, 16),
            _step(_EQUAL, 0, 1, 0),
            _step(_RETURN, _ERRNO | _EPERM),
        ]
    return b"".join([*program, _step(_RETURN, _ALLOW)])


def _step(code: int, value: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jump_true, jump_false, value)
