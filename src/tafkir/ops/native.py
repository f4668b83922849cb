"""How ops call the compiled kernels: whether they are used, which tensors they take, and the call itself."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from tafkir.errors import BackendUnavailable
from tafkir.native.build import torch_blas
from tafkir.native.compiled import BUILD_COMMAND, KernelChoice, kernels_path, resolve_kernels

__all__ = [
    "MatmulPrecision",
    "call",
    "has_tiles",
    "is_bfloat16_enough",
    "kernels_in_use",
    "rows_alone",
    "rows_are_alone",
    "select_kernels",
    "set_matmul_precision",
    "takes",
]

MatmulPrecision = Literal["highest", "high", "medium"]
"""As `torch.set_float32_matmul_precision` names them: an activation in 24 bits, in 16, or as one bfloat16 number."""

# i: int, l: int64, f: float, p: a tensor's address. The first argument of each is the number of threads, except for
# sort_pairs. Each returns 0, or another number where it cannot do what was asked.
_SIGNATURES = {
    "tafkir_rms_norm": "ippfllpp",
    "tafkir_rms_norm_backward": "ippppllpp",
    "tafkir_split_norm_rope": "ipppfpplllllpppp",
    "tafkir_split_norm_rope_backward": "ippppppppplllllppp",
    "tafkir_attention": "ippppplllllpp",
    "tafkir_attention_backward": "ippppppplllllppp",
    "tafkir_swiglu": "ipllp",
    "tafkir_swiglu_backward": "ippllp",
    "tafkir_choose_experts": "ipplllllp",
    "tafkir_sort_pairs": "pllppp",
    "tafkir_experts": "ippppppplllllppp",
    "tafkir_experts_backward": "ipppppppplllllpppppp",
    "tafkir_softmax_minus_onehot": "ipplllp",
    "tafkir_read_streams": "ipplllp",
    "tafkir_write_streams": "ipppplllp",
    "tafkir_write_streams_backward": "ippppplllpppp",
    "tafkir_project_and_read": "ippppfflllppppp",
    "tafkir_project_and_read_backward": "ipppppppppplllppp",
    "tafkir_write_and_read": "ipppppppfflllpppppp",
    "tafkir_write_and_read_backward": "ipppppppppppppplllpppppp",
    "tafkir_sinkhorn": "iplllp",
    "tafkir_sinkhorn_backward": "ipplllp",
    "tafkir_block_amax": "ipllp",
    "tafkir_encode_e2m1": "ipllpp",
    "tafkir_quantize_nvfp4": "ipllfpp",
    "tafkir_pick_step": "ipllppp",
    "tafkir_sweep_scales": "ipllfp",
    "tafkir_round_nvfp4": "iplllpplp",
    "tafkir_wide_swiglu": "iipllp",
    "tafkir_wide_swiglu_backward": "iippllpp",
    "tafkir_post_norm": "iiippfllpp",
    "tafkir_post_norm_backward": "iiipppllp",
    "tafkir_split_heads": "iipppllllp",
    "tafkir_split_heads_backward": "iipppppllllp",
    "tafkir_packed_linear": "iplpllp",
    "tafkir_packed_values": "ipp",
    "tafkir_use_tiles": "il",
    "tafkir_tile_pieces": "il",
    "tafkir_rows_alone": "il",
    "tafkir_decode_qkv": "ipplppppp",
    "tafkir_decode_mlp": "ipplpp",
    "tafkir_decode_layers": "iplplppppppplp",
    "tafkir_draft": "ippplllpppflfll",
    "tafkir_paged_attention": "ippppppppllllllfp",
    "tafkir_row_linear": "ippllllp",
}
_PASSED = (torch.float32, torch.int64, torch.bfloat16, torch.uint8)
_TYPES = {"i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float, "p": ctypes.c_void_p}


class _State:
    """The process's choice; not made yet, the first op makes it."""

    chosen: Literal["native", "torch"] | None = None
    library: ctypes.CDLL | None = None
    precision: MatmulPrecision = "highest"


class _Here(threading.local):
    """What holds on this thread alone."""

    rows_alone = False


_here = _Here()


@contextmanager
def rows_alone() -> Iterator[None]:
    """On this thread, kernels whose sums depend on how many rows there are take nothing (`takes(mixes_rows=True)`), and
    those of stored weights sum in one order."""
    before = _here.rows_alone
    _set_rows_alone(True)
    try:
        yield
    finally:
        _set_rows_alone(before)


def _set_rows_alone(alone: bool) -> None:
    _here.rows_alone = alone
    if kernels_in_use() == "native":
        call("tafkir_rows_alone", int(alone))


def select_kernels(choice: KernelChoice) -> Literal["native", "torch"]:
    """Choose the arithmetic of this process's float32 ops on the CPU, and say what it is.

    Raises:
        BackendUnavailable: "native", and the kernels are not built or cannot be loaded.
    """
    chosen = resolve_kernels(choice)
    if chosen == "native" and _State.library is None:
        _State.library = _load()
    _State.chosen = chosen
    return chosen


def kernels_in_use() -> Literal["native", "torch"]:
    """What `select_kernels` chose; "auto" where nobody has asked yet."""
    return _State.chosen or select_kernels("auto")


def rows_are_alone() -> bool:
    """Whether `rows_alone` holds on this thread."""
    return _here.rows_alone


def has_tiles() -> bool:
    """Whether the kernels are in use, and the processor's matrix unit (AMX) with them."""
    return kernels_in_use() == "native" and bool(call("tafkir_use_tiles", -1))


def set_matmul_precision(precision: MatmulPrecision) -> None:
    """How exactly the matrix unit takes activations, from now on and in all of the process.

    It concerns products of stored weights with nine tokens or more where `has_tiles` holds, and at "medium" a prompt's
    attention; everything else, and all under `rows_alone`, is computed in float32 as ever.
    """
    _State.precision = precision
    if kernels_in_use() == "native":
        call("tafkir_tile_pieces", {"highest": 3, "high": 2, "medium": 1}[precision])


def is_bfloat16_enough() -> bool:
    """Whether activations may be one bfloat16 number here: "medium", a matrix unit, and no `rows_alone`."""
    return _State.precision == "medium" and not _here.rows_alone and has_tiles()


def takes(*tensors: Tensor, dtypes: Collection[torch.dtype] = (torch.float32,), mixes_rows: bool = False) -> bool:
    """Whether the kernels are in use and the tensors are what they read: plain, on the CPU, not empty, of one dtype.

    Subclasses (the shards of tensor parallelism, say) have no address of their own; nor have the stand-ins of tracing.

    Args:
        dtypes: those that the kernel reads.
        mixes_rows: its sums depend on how many rows there are; it is not wanted where `rows_alone` holds.
    """
    if mixes_rows and _here.rows_alone:
        return False
    return kernels_in_use() == "native" and all(
        x.dtype == tensors[0].dtype
        and x.dtype in dtypes
        and x.device.type == "cpu"
        and x.numel() > 0
        and type(x) in (Tensor, nn.Parameter)
        for x in tensors
    )


def call(name: str, *args: Tensor | float | None, threads: bool = True) -> int:
    """Run one kernel on torch's number of threads. Tensors go by address: contiguous, float32 or int64.

    Number formats and residual sublayers also read bfloat16, and the former write bytes; None is no address.
    """
    assert _State.library is not None
    plain: list[float | None] = [torch.get_num_threads()] if threads else []
    for arg in args:
        if isinstance(arg, Tensor):
            assert arg.is_contiguous() and arg.dtype in _PASSED, name
            plain.append(arg.data_ptr())
        else:
            plain.append(arg)
    status: int = getattr(_State.library, name)(*plain)
    return status


def _load() -> ctypes.CDLL:
    """The library with its functions' types.

    Raises:
        BackendUnavailable: it cannot be loaded, or lacks a kernel: it is damaged, or made from other sources.
    """
    fix = f"delete it and build it again: {BUILD_COMMAND}"
    try:
        library = ctypes.CDLL(str(kernels_path()))
        for name, signature in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = [_TYPES[letter] for letter in signature]
            function.restype = ctypes.c_int
        library.tafkir_use_sgemm.argtypes = [ctypes.c_void_p]
        library.tafkir_use_sgemm(torch_blas())
    except (OSError, AttributeError) as error:
        raise BackendUnavailable(str(error), where=str(kernels_path()), fix=fix) from error
    return library
