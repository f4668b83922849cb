"""A system-call filter for untrusted programs, as the bytes of a seccomp program: no processes, sockets or mounts.

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

# Audit number of the architecture, and its numbers of: (fork, vfork,) clone, socket, socketpair, ptrace, unshare,
# setns, mount, umount2, pivot_root, chroot, add_key, request_key, keyctl, bpf, userfaultfd, perf_event_open,
# process_vm_readv, process_vm_writev, open_by_handle_at, io_uring_setup.
_NUMBERS: Final = {
    "x86_64": (
        0xC000_003E,
        (57, 58, 56, 41, 53, 101, 272, 308, 165, 166, 155, 161, 248, 249, 250, 321, 323, 298, 310, 311, 304, 425),
    ),
    "aarch64": (
        0xC000_00B7,
        (220, 198, 199, 117, 97, 268, 40, 39, 41, 51, 217, 218, 219, 280, 282, 241, 270, 271, 265, 425),
    ),
}


def build_filter(machine: str | None = None) -> bytes | None:
    """The filter for this machine (or another, by its `uname -m`); None where its system-call numbers are not known.

    Denied calls fail with EPERM; calls of another architecture's ABI end the process.
    """
    known = _NUMBERS.get(machine or platform.machine())
    if known is None:
        return None
    architecture, denied = known
    program = [
        _step(_LOAD, 4),
        _step(_EQUAL, architecture, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, 0),
        _step(_AT_LEAST, _X32_BIT, 0, 1),
        _step(_RETURN, _KILL),
        _step(_EQUAL, _CLONE3, 0, 1),
        _step(_RETURN, _ERRNO | _ENOSYS),
    ]
    for number in denied:
        program += [_step(_EQUAL, number, 0, 1), _step(_RETURN, _ERRNO | _EPERM)]
    return b"".join([*program, _step(_RETURN, _ALLOW)])


def _step(code: int, value: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jump_true, jump_false, value)
