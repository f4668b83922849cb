"""The recursive model as ONNX graphs: one supervision step for a host that loops, and the whole solve as one graph.

Shapes: B batch (any), L cells, S positions, D hidden, V symbols, H heads, K head dim, T supervision steps taken.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tafkir.export.graph import Graph, Signature, Value
from tafkir.export.weights import WeightFormat, decoded, emit_matrix
from tafkir.models.trm import Trm
from tafkir.ops.rope import rope_table

__all__ = ["build_solve", "build_step", "with_format"]

_INT32 = 6


class _Step(NamedTuple):
    y: Value
    z: Value
    logits: Value
    q: Value


def build_step(model: Trm, format: WeightFormat) -> Any:
    """One supervision step: (tokens int32 [B, L], y and z float32 [B, S, D]) to (y, z, logits [B, L, V], q_halt [B]).

    Where the model has vectors of several puzzle ids, `puzzle_ids` int32 [B] comes after the tokens. Before the first
    step y and z are the vectors `y_init` and `z_init` at every position.
    """
    shape = model.shape
    graph = Graph()
    network = _Network(graph, model, format)
    step = network.step(graph, network.embed("tokens", "puzzle_ids"), "y", "z")
    names = {"y_next": step.y, "z_next": step.z, "logits": step.logits, "q_halt": step.q}
    for name, value in names.items():
        graph.rename(value, name)
    state: list[str | int] = ["batch", shape.num_positions, shape.hidden_size]
    outputs: Signature = [
        ("y_next", "float32", state),
        ("z_next", "float32", state),
        ("logits", "float32", ["batch", shape.sequence_length, shape.vocab_size]),
        ("q_halt", "float32", ["batch"]),
    ]
    inputs: Signature = [*network.inputs(), ("y", "float32", state), ("z", "float32", state)]
    return graph.model(
        "trm_step", inputs, outputs, "One supervision step of a tiny recursive model (arXiv 2510.04871)."
    )


def build_solve(model: Trm, format: WeightFormat) -> Any:
    """Supervision steps until every puzzle's q is or was above a threshold, or `max_steps` are taken.

    (tokens int32 [B, L], max_steps int64 [], halt_threshold float32 []) to (answers int32 [T, B, L], q_halt float32
    [T, B]) of every step taken; `puzzle_ids` as in `build_step`. An infinite threshold never halts.
    """
    shape = model.shape
    graph = Graph()
    network = _Network(graph, model, format)
    x = network.embed("tokens", "puzzle_ids")
    batch = graph.op("Shape", "tokens", start=0, end=1)
    state_size = graph.op(
        "Concat", batch, graph.constant([shape.num_positions]), graph.constant([shape.hidden_size]), axis=0
    )
    starts = [
        graph.op("Expand", graph.constant(_array(init).reshape(1, 1, -1)), state_size)
        for init in (model.y_init, model.z_init)
    ]
    halted = graph.op("Expand", graph.constant(np.array([False])), batch)
    body = Graph(graph)
    step = network.step(body, x, "y_before", "z_before")
    done = body.op("Or", "halted_before", body.op("Greater", step.q, "halt_threshold"))
    running = body.op("Cast", body.op("Not", done), to=_INT32)
    left = body.op("ReduceSum", running, body.constant([0]), keepdims=0)
    zero = body.constant(np.array(0, dtype=np.int32))
    answer = body.op("Cast", body.op("ArgMax", step.logits, axis=-1, keepdims=0), to=_INT32)
    for value, name in (
        (body.op("Greater", left, zero), "go_on"), (step.y, "y"), (step.z, "z"), (done, "halted"), (answer, "answer"),
        (step.q, "q"),
    ):  # fmt: skip
        body.rename(value, name)
    size: list[str | int] = ["batch", shape.num_positions, shape.hidden_size]
    signature: Signature = [
        ("go_on", "bool", []), ("y", "float32", size), ("z", "float32", size), ("halted", "bool", ["batch"]),
        ("answer", "int32", ["batch", shape.sequence_length]), ("q", "float32", ["batch"]),
    ]  # fmt: skip
    *_, answers, q = graph.loop("max_steps", body, [*starts, halted], 2, signature)
    graph.rename(answers, "answers")
    graph.rename(q, "q_halt")
    inputs: Signature = [*network.inputs(), ("max_steps", "int64", []), ("halt_threshold", "float32", [])]
    outputs: Signature = [
        ("answers", "int32", ["steps", "batch", shape.sequence_length]),
        ("q_halt", "float32", ["steps", "batch"]),
    ]
    return graph.model(
        "trm_solve", inputs, outputs, "A tiny recursive model (arXiv 2510.04871), all supervision steps."
    )


def with_format(model: Trm, format: WeightFormat) -> Trm:
    """A model whose weights are what a format makes of them: the arithmetic that a graph has to equal."""
    copy = Trm(model.shape)
    copy.load_state_dict(
        {
            name: decoded(value, format if ".layers." in name else _table_format(format)) if value.dim() == 2 else value
            for name, value in model.state_dict().items()
        }
    )
    return copy.eval()


def _table_format(format: WeightFormat) -> WeightFormat:
    """Tables and heads are small, and what they lose is lost in every step."""
    return "float32" if format == "float32" else "float16"


def _array(tensor: Tensor) -> Any:
    return tensor.detach().float().cpu().numpy()


class _Network:
    """Writes the parts of a model; its matrices stand in the outermost graph, so that a loop unpacks them once."""

    def __init__(self, graph: Graph, model: Trm, format: WeightFormat) -> None:
        self.graph, self.model, self.shape, self.format = graph, model, model.shape, format
        self._matrices: dict[str, Value] = {}
        state = model.state_dict()
        for name, weight in state.items():
            if name.endswith(".filters"):
                self._matrices[name] = graph.constant(_array(weight.unsqueeze(1)))
            elif ".layers." in name:
                left = ".token_mlp." in name
                self._matrices[name] = emit_matrix(graph, weight, format, transposed=not left)
        small = _table_format(format)
        self._table = emit_matrix(graph, state["embed_tokens.weight"], small, transposed=False)
        self._lm_head = emit_matrix(graph, state["lm_head.weight"], small, transposed=True)
        self._q_head = emit_matrix(graph, state["q_head.weight"], small, transposed=True)

    def inputs(self) -> Signature:
        """What a puzzle is given as."""
        tokens: Signature = [("tokens", "int32", ["batch", self.shape.sequence_length])]
        return [*tokens, ("puzzle_ids", "int32", ["batch"])] if self._has_ids else tokens

    @property
    def _has_ids(self) -> bool:
        return self.model.puzzle_table is not None and self.shape.num_puzzle_ids > 1

    def embed(self, tokens: Value, puzzle_ids: Value) -> Value:
        """x [B, S, D]."""
        graph, shape = self.graph, self.shape
        x = graph.op("Gather", self._table, tokens)
        if shape.prefix_length:
            x = graph.op("Concat", self._prefix(tokens, puzzle_ids), x, axis=1)
        if self.model.embed_positions is not None:
            weight = self.model.embed_positions.weight
            positions = emit_matrix(graph, weight, _table_format(self.format), transposed=False)
            x = graph.op("Mul", graph.op("Add", x, positions), graph.constant(math.sqrt(0.5)))
        return graph.op("Mul", x, graph.constant(math.sqrt(shape.hidden_size)))

    def _prefix(self, tokens: Value, puzzle_ids: Value) -> Value:
        """Positions before the grid [B, P, D]: a row of the table of puzzles' vectors, filled up with zeros."""
        graph, shape, table = self.graph, self.shape, self.model.puzzle_table
        vectors = torch.zeros(1, 1) if table is None else table.weight
        filled = torch.zeros(len(vectors), shape.prefix_length * shape.hidden_size)
        filled[:, : vectors.shape[1]] = vectors
        rows = emit_matrix(graph, filled, _table_format(self.format), transposed=False)
        if self._has_ids:
            found = graph.op("Gather", rows, puzzle_ids)
        else:
            batch = graph.op("Shape", tokens, start=0, end=1)
            found = graph.op("Expand", rows, graph.op("Concat", batch, graph.constant([filled.shape[1]]), axis=0))
        return graph.op("Reshape", found, graph.constant([-1, shape.prefix_length, shape.hidden_size]))

    def step(self, graph: Graph, x: Value, y: Value, z: Value) -> _Step:
        """One supervision step, its passes one after the other."""
        shape = self.shape
        for _ in range(shape.num_recursions):
            injected = x if shape.latents == "z" else graph.op("Add", y, x)
            for _ in range(shape.num_latent_steps):
                z = self._pass(graph, "network", graph.op("Add", z, injected))
            if shape.latents == "z":
                y = z = self._pass(graph, "network", z)
            else:
                which = "answer_network" if shape.separate_networks else "network"
                y = self._pass(graph, which, graph.op("Add", y, z))
        cells = y
        if shape.prefix_length:
            start, end, axis = (graph.constant([n]) for n in (shape.prefix_length, shape.num_positions, 1))
            cells = graph.op("Slice", y, start, end, axis)
        logits = graph.op("MatMul", cells, self._lm_head)
        if shape.mixer == "neighbours":
            told = graph.op("ReduceMax", y, graph.constant([1]), keepdims=0)
        else:
            told = graph.op("Gather", y, graph.constant(np.array(0)), axis=1)
        bias = self.model.q_head.bias
        assert bias is not None
        both = graph.op("Add", graph.op("MatMul", told, self._q_head), graph.constant(_array(bias)))
        return _Step(y, z, logits, graph.op("Gather", both, graph.constant(np.array(0)), axis=1))

    def _pass(self, graph: Graph, network: str, x: Value) -> Value:
        for number in range(self.shape.num_hidden_layers):
            layer = f"{network}.layers.{number}"
            if self.shape.mixer == "attention":
                x = self._norm(graph, graph.op("Add", x, self._attend(graph, f"{layer}.attention", x)), axis=2)
            elif self.shape.mixer == "neighbours":
                x = self._norm(graph, graph.op("Add", x, self._look_around(graph, f"{layer}.neighbours", x)), axis=2)
            else:
                x = self._norm(graph, graph.op("Add", x, self._swiglu(graph, f"{layer}.token_mlp", x, axis=1)), axis=1)
            x = self._norm(graph, graph.op("Add", x, self._swiglu(graph, f"{layer}.mlp", x, axis=2)), axis=2)
        return x

    def _multiply(self, graph: Graph, name: str, x: Value, axis: int) -> Value:
        """Along D from the right, along S from the left, where nothing has to be transposed."""
        matrix = self._matrices[f"{name}.weight"]
        return graph.op("MatMul", matrix, x) if axis == 1 else graph.op("MatMul", x, matrix)

    def _swiglu(self, graph: Graph, name: str, x: Value, axis: int) -> Value:
        gate_up = self._multiply(graph, f"{name}.gate_up_proj", x, axis)
        gate, up = graph.ops("Split", gate_up, outputs=2, axis=axis, num_outputs=2)
        hidden = graph.op("Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), up)
        return self._multiply(graph, f"{name}.down_proj", hidden, axis)

    def _norm(self, graph: Graph, x: Value, axis: int) -> Value:
        mean = graph.op("ReduceMean", graph.op("Mul", x, x), graph.constant([axis]), keepdims=1)
        root = graph.op("Sqrt", graph.op("Add", mean, graph.constant(self.shape.rms_norm_eps)))
        return graph.op("Div", x, root)

    def _look_around(self, graph: Graph, name: str, x: Value) -> Value:
        """A filter over every cell and the eight around it, for each feature."""
        shape = self.shape
        grid = graph.op("Reshape", x, graph.constant([0, -1, shape.columns, shape.hidden_size]))
        grid = graph.op("Transpose", grid, perm=[0, 3, 1, 2])
        mixed = graph.op("Conv", grid, self._matrices[f"{name}.filters"], group=shape.hidden_size, pads=[1, 1, 1, 1])
        mixed = graph.op("Transpose", mixed, perm=[0, 2, 3, 1])
        return graph.op("Reshape", mixed, graph.constant([0, shape.num_positions, shape.hidden_size]))

    def _attend(self, graph: Graph, name: str, x: Value) -> Value:
        """Every position to every other one."""
        heads, width = self.shape.num_attention_heads, self.shape.head_dim
        qkv = self._multiply(graph, f"{name}.qkv_proj", x, axis=2)
        split = graph.op("Reshape", qkv, graph.constant([0, 0, 3 * heads, width]))
        q, k, v = graph.ops("Split", split, outputs=3, axis=2, num_outputs=3)
        if self.shape.position_encoding == "rope":
            q, k = self._rotate(graph, q), self._rotate(graph, k)
        q, v = (graph.op("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v))
        scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 2, 3, 1]))
        weights = graph.op("Softmax", graph.op("Mul", scores, graph.constant(width**-0.5)), axis=-1)
        mixed = graph.op("Transpose", graph.op("MatMul", weights, v), perm=[0, 2, 1, 3])
        flat = graph.op("Reshape", mixed, graph.constant([0, 0, heads * width]))
        return self._multiply(graph, f"{name}.o_proj", flat, axis=2)

    def _rotate(self, graph: Graph, x: Value) -> Value:
        positions = torch.arange(self.shape.num_positions)
        cos, sin = (
            graph.constant(_array(table.unsqueeze(1)))
            for table in rope_table(positions, self.shape.head_dim, self.shape.rope_theta)
        )
        first, second = graph.ops("Split", x, outputs=2, axis=3, num_outputs=2)
        low = graph.op("Sub", graph.op("Mul", first, cos), graph.op("Mul", second, sin))
        high = graph.op("Add", graph.op("Mul", second, cos), graph.op("Mul", first, sin))
        return graph.op("Concat", low, high, axis=3)
