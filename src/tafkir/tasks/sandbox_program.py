"""Runs somebody's programs inside a sandbox: a JSON request in, one JSON line a call out.

Run as a script that imports nothing of Tafkir. It knows no expected value, and judges nothing: whatever the program
does to this process, all that it can change is what it answers. As a server (`serve`) it forks a process for each
program, which takes milliseconds where an interpreter of its own takes a tenth of a second.
"""

from __future__ import annotations

import base64
import builtins
import itertools
import json
import os
import re
import signal
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 50
MAX_ERROR_LENGTH = 200

_TAGS: dict[type, str] = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset"}
_DICTS = (dict, defaultdict, Counter, OrderedDict)
# Above this many bits a number is written in base 16: Python refuses longer ones in base 10.
_LONG_BITS = 12_000


# Of numbers and texts, whose bytes say all: an array of objects would need a pickle.
_DTYPE = re.compile(r"[<>|=][biufcUS][0-9]{1,6}")
_SPARSE, _KINDS = ("bsr", "coo", "csc", "csr", "dia"), ("matrix", "array")


def encode(value: Any, depth: int = 0, *, arrays: bool = False) -> Any:
    """A value of plain types as JSON; exact types only, so that no method of the program's own classes counts.

    Args:
        arrays: also numpy's arrays, scipy's sparse matrices, and sympy's symbols (their names). A number of numpy's
            is Python's own number in any case.

    Raises:
        TypeError: another type, or nested too deeply.
    """
    kind = type(value)
    if kind is int and int.bit_length(value) > _LONG_BITS:
        return ["int", hex(value)]
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is complex:
        return ["complex", [value.real, value.imag]]
    if depth == MAX_DEPTH:
        raise TypeError("nested too deeply")
    if kind in _TAGS:
        return [_TAGS[kind], [encode(item, depth + 1, arrays=arrays) for item in value]]
    if kind in _DICTS:
        pairs = [(encode(k, depth + 1, arrays=arrays), v) for k, v in dict.items(value)]
        return ["dict", [[key, encode(item, depth + 1, arrays=arrays)] for key, item in pairs]]
    numpy = sys.modules.get("numpy")
    if numpy is not None and issubclass(kind, numpy.generic) and kind.__module__ == "numpy":
        if type(plain := value.item()) in (bool, int, float, complex, str):
            return encode(plain)
    elif arrays and (foreign := _encode_array(value, kind)) is not None:
        return foreign
    raise TypeError(f"a value of type {kind.__name__}")


def _encode_array(value: Any, kind: type) -> Any:
    """A value of numpy's, scipy's or sympy's; None for any other. None of them is imported here."""
    numpy, sparse, symbol = map(sys.modules.get, ("numpy", "scipy.sparse", "sympy.core.symbol"))
    if numpy is not None and kind in (numpy.ndarray, numpy.matrix):
        array = numpy.ndarray.view(value, numpy.ndarray)
        if _DTYPE.fullmatch(array.dtype.str):
            return ["array", [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode("ascii")]]
    elif sparse is not None and kind in {getattr(sparse, f"{name}_{own}") for name in _SPARSE for own in _KINDS}:
        coo = value.tocoo()
        shape = tuple(map(int, coo.shape))
        return ["sparse", [encode(part, arrays=True) for part in (coo.data, coo.row, coo.col, shape)]]
    elif symbol is not None and kind is symbol.Symbol:
        return str(value.name)
    return None


def decode(value: Any, *, arrays: bool = False) -> Any:
    """The value that `encode` wrote. Raises ValueError, TypeError, OverflowError or RecursionError for anything else.

    Args:
        arrays: take what `encode` wrote with `arrays`. Only inside a sandbox: what is compared outside is to be plain,
            for comparing arrays makes arrays, of whatever size a program likes.
    """
    if not isinstance(value, list):
        return value
    tag, items = value
    if tag == "dict":
        return {decode(k, arrays=arrays): decode(v, arrays=arrays) for k, v in items}
    if tag == "int":
        return int(items, 16)
    if tag == "complex":
        return complex(*items)
    if arrays and tag == "array":
        return _decode_array(*items)
    if arrays and tag == "sparse":
        import scipy.sparse

        data, row, column, shape = (decode(item, arrays=True) for item in items)
        return scipy.sparse.coo_matrix((data, (row, column)), shape=shape)
    kinds: dict[str, Callable[[list[Any]], Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    if tag not in kinds:
        raise ValueError(f"unknown tag {tag!r}")
    return kinds[tag]([decode(item, arrays=arrays) for item in items])


def _decode_array(dtype: str, shape: list[int], data: str) -> Any:
    import numpy

    if not _DTYPE.fullmatch(dtype):
        raise ValueError(f"an array of {dtype!r}")
    return numpy.frombuffer(base64.b64decode(data, validate=True), dtype=numpy.dtype(dtype)).reshape(shape).copy()


class _LateError(BaseException):
    """A call used up its own time."""


def _limit(request: dict[str, Any]) -> None:
    import resource

    # The soft limit's signal tells what happened; a program that ignores it is killed a second later.
    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_s"], request["cpu_s"] + 1))
    limits = [
        (resource.RLIMIT_AS, request["memory_bytes"]),
        (resource.RLIMIT_FSIZE, request["file_bytes"]),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ]
    for limit, value in limits:
        resource.setrlimit(limit, (value, value))


def _install(program: bytes) -> None:
    """Put this process under a system-call filter for good. Raises OSError where the kernel refuses."""
    import ctypes

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)
    own = Filter(len(program) // 8, program)
    no_new_privileges, seccomp, by_filter = 38, 22, 2
    for option, value, pointer in ((no_new_privileges, 1, None), (seccomp, by_filter, ctypes.addressof(own))):
        if libc.prctl(option, value, pointer, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")


def _explain(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "MemoryError"
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_LENGTH]


def run(request: dict[str, Any], output: int) -> None:
    """Run one program in this process, under limits; its results go to the file `output`."""

    def reply(message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[os.write(output, data) :]

    def late(*_: Any) -> None:
        raise _LateError

    _limit(request)
    if request["filter"]:
        _install(bytes.fromhex(request["filter"]))
    if request["call_s"]:
        signal.signal(signal.SIGVTALRM, late)
    reply({"ready": True})
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # which `site` does, too
    if "numpy.random" in sys.modules:  # which all programs would else share, as it was when it was imported
        sys.modules["numpy.random"].seed()
    scope: dict[str, Any] = {"__name__": "program"}
    number = -1
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, request["call_s"])
        exec(compile(request["program"], "program.py", "exec", dont_inherit=True), scope)
        if request["entry"].isidentifier() and not callable(scope.get(request["entry"])):
            raise NameError(request["entry"])
        entry = eval(request["entry"], scope)
    except _LateError:
        return reply({"late": number})
    except BaseException as error:
        missing = isinstance(error, NameError) and request["entry"] == str(error)
        return reply({"failed": f"there is no function {request['entry']}" if missing else _explain(error)})
    for number, arguments in enumerate(request["calls"]):
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, request["call_s"])
            value = encode(entry(*decode(arguments, arrays=True)))
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            reply({"call": number, "value": value})
        except _LateError:
            return reply({"late": number})
        except BaseException as error:
            reply({"call": number, "error": _explain(error)})


def once() -> None:
    """One request on stdin, results on stdout."""
    request = json.loads(sys.stdin.read())
    output = os.dup(1)
    _silence()
    run(request, output)


def _silence() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)


def serve(packages: list[str]) -> None:
    """Requests on stdin, a socket; after each, its process's exit status and whether all is as clean as before.

    `packages` are folders to import from, and then names of modules that every program is to find imported.

    Results go to stdout from the program's own process, which has nothing else in hand. Only one runs at a time.
    """
    control = _adopt(0)
    for given in packages:
        if os.sep in given:
            sys.path.append(given)
        else:
            __import__(given)
    _harden()
    control.sendall(b'{"serving": true}\n')
    for runs in itertools.count():
        head = _receive(control, 8)
        body = _receive(control, int.from_bytes(head, "big"))
        child = os.fork()
        if child == 0:
            try:
                output = os.dup(1)
                control.detach()
                _silence()
                run(json.loads(body), output)
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        control.sendall(json.dumps({"status": status, "clean": _is_clean()}).encode() + b"\n")
        if runs == 0:
            _warm_up()


def _adopt(number: int) -> Any:
    import _socket  # `socket` takes as long to import as all else here

    return _socket.socket(fileno=number)


def _receive(control: Any, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = control.recv(min(size - len(data), 1 << 20))
        if not piece:  # the parent is gone, or done
            sys.exit(0)
        data += piece
    return bytes(data)


def _harden() -> None:
    """No process of the same user may look into this one, nor take files from it. Imports what every run needs, too."""
    import resource  # noqa: F401

    try:
        import ctypes

        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
    except (ImportError, OSError, AttributeError):  # not Linux: the tier without isolation
        return


def _warm_up() -> None:
    """Import what programs import, once for all; after the first run, which is not to wait for it.

    Not `random`: all programs would draw the same numbers.
    """
    for name in ("bisect", "copy", "datetime", "heapq", "math", "string", "typing"):
        __import__(name)


def _is_clean() -> bool:
    """Nothing is left in the one folder that a program may write to."""
    folder = os.environ.get("TMPDIR", "")
    try:
        return not folder or (not os.listdir(folder) and os.stat(folder).st_mode & 0o777 == 0o755)
    except OSError:
        return False


if __name__ == "__main__":
    serve(sys.argv[2:]) if sys.argv[1:2] == ["serve"] else once()
