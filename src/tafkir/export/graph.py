"""Writes ONNX graphs node by node: names are made up, constants are shared, a loop's body sees what stands outside."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["OPSET", "Graph", "Signature", "Value"]

OPSET = 18
"""The newest set of operators whose every operator here runs in onnxruntime and onnxruntime-web since 2023."""

_IR_VERSION = 8

Value = str
"""The name of a value in a graph."""

_TYPES = {
    "float32": TensorProto.FLOAT,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}

Signature = Sequence[tuple[Value, str, Sequence[str | int]]]
"""Name, type and dims of inputs or outputs; a dim that is a word may have any size."""


class Graph:
    """Nodes in order, and the constants that they use.

    Args:
        outer: the graph around this one, which is then a loop's body: its values may be used here, and constants of the
            body stand there.
    """

    def __init__(self, outer: Graph | None = None) -> None:
        self.outer = outer
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._names: list[int] = outer._names if outer else [0]

    def op(self, kind: str, *inputs: Value, **attributes: Any) -> Value:
        """Add a node with one output, and name that."""
        return self.ops(kind, *inputs, outputs=1, **attributes)[0]

    def ops(self, kind: str, *inputs: Value, outputs: int, **attributes: Any) -> list[Value]:
        """Add a node with several outputs, and name them."""
        names = [self._fresh(kind.lower()) for _ in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names

    def constant(self, value: NDArray[Any] | Sequence[int] | float) -> Value:
        """A constant; equal ones are one. Whole numbers become int64, others float32 where they are no array."""
        if self.outer is not None:
            return self.outer.constant(value)
        if not isinstance(value, np.ndarray):
            value = np.asarray(value, dtype=np.float32 if isinstance(value, float) else np.int64)
        value = np.array(value, order="C")
        content = f"{value.dtype}{value.shape}".encode() + value.tobytes()
        name = "c_" + hashlib.blake2b(content, digest_size=8).hexdigest()
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(value, name)
        return name

    def rename(self, value: Value, name: str) -> Value:
        """The value under a name that others rely on."""
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        return name

    def loop(
        self, max_steps: Value, body: Graph, carried: Sequence[Value], scanned: int, signature: Signature
    ) -> list[Value]:
        """Repeat a body; its outputs are whether to go on, what is carried, and what every step adds to a list.

        Args:
            max_steps: int64 [].
            carried: values before the first step.
            scanned: how many outputs are lists.
            signature: of the body's outputs, in order; its inputs are the step, whether to go on, and what is carried.
        """
        inputs: list[tuple[Value, str, Sequence[str | int]]] = [("step", "int64", []), ("go", "bool", [])]
        inputs += [(f"{name}_before", kind, list(dims)) for name, kind, dims in signature[1 : 1 + len(carried)]]
        proto = body._proto("body", inputs, signature)
        go = self.constant(np.array(True))
        return self.ops("Loop", max_steps, go, *carried, outputs=len(carried) + scanned, body=proto)

    def model(self, name: str, inputs: Signature, outputs: Signature, about: str) -> onnx.ModelProto:
        """The finished file's content, checked against the operators' definitions."""
        opset = [helper.make_opsetid("", OPSET)]
        proto = self._proto(name, inputs, outputs)
        model = helper.make_model(proto, opset_imports=opset, producer_name="tafkir", doc_string=about)
        model.ir_version = _IR_VERSION
        onnx.checker.check_model(model, full_check=True)
        return cast(onnx.ModelProto, model)

    def _proto(self, name: str, inputs: Signature, outputs: Signature) -> onnx.GraphProto:
        infos = [
            [helper.make_tensor_value_info(value, _TYPES[kind], list(dims)) for value, kind, dims in side]
            for side in (inputs, outputs)
        ]
        return helper.make_graph(self._nodes, name, *infos, initializer=list(self._constants.values()))

    def _fresh(self, stem: str) -> Value:
        self._names[0] += 1
        return f"{stem}_{self._names[0]}"
