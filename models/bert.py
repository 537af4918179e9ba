"""A small BERT: an encoder over words whose mean is classified, as ONNX (Devlin et al. 2019, without pre-training).

Each block is self-attention and a two-layer perceptron with GELU, a layer normalisation behind each residual sum. The
matrices are MatMul nodes with constant weights, which the compiler maps; attention itself has no weights and stays
digital, as does the table of words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from model_graph import ModelGraph

from rerampile.errors import ModelError

EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a network.

    Attributes:
        words: Entries of the table of words.
        length: Words of a passage.
        width: Numbers that stand for a word.
        heads: Heads of an attention; they divide the width.
        inner: Width inside the perceptrons.
        blocks: Encoder blocks.
        classes: Classes.
    """

    words: int = 1024
    length: int = 32
    width: int = 128
    heads: int = 4
    inner: int = 256
    blocks: int = 2
    classes: int = 8


def parameter_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name; matrices are [inputs, outputs], as MatMul reads them."""
    w, shapes = shape.width, {"words": (shape.words, shape.width), "places": (shape.length, shape.width)}
    norms = ["norm"]
    for k in range(shape.blocks):
        matrices = {**dict.fromkeys(("query", "key", "value", "mix"), (w, w)), "up": (w, shape.inner)}
        for name, (inputs, outputs) in (matrices | {"down": (shape.inner, w)}).items():
            shapes[f"block{k}.{name}.weight"] = (inputs, outputs)
            shapes[f"block{k}.{name}.bias"] = (outputs,)
        norms += [f"block{k}.norm1", f"block{k}.norm2"]
    shapes |= {f"{norm}.{part}": (w,) for norm in norms for part in ("weight", "bias")}
    return shapes | {"classes.weight": (w, shape.classes), "classes.bias": (shape.classes,)}


def build(
    shape: Shape, weights: Mapping[str, np.ndarray], metadata: Mapping[str, Any] | None = None
) -> onnx.ModelProto:
    """Return the network: input ``tokens`` int64 [N, length], output ``logits`` float32 [N, classes].

    Args:
        shape: Its sizes.
        weights: Its parameters, float32, named and shaped as :func:`parameter_shapes` says.
        metadata: Metadata properties.

    Raises:
        ModelError: A parameter is missing or of another shape.
    """
    for name, expected in parameter_shapes(shape).items():
        if name not in weights or weights[name].shape != expected:
            found = list(weights[name].shape) if name in weights else "none"
            raise ModelError(f"parameter '{name}': {found}, expected {list(expected)}")
    graph = ModelGraph("bert", "tokens", [shape.length], dtype=np.int64)
    x = graph.node("Gather", "words.read", graph.constant("words", weights["words"]), graph.input)
    x = graph.node("Add", "places.add", x, graph.constant("places", weights["places"]))
    x = _norm(graph, "norm", x, weights)
    for k in range(shape.blocks):
        name = f"block{k}"
        attended = _linear(graph, f"{name}.mix", _attention(graph, name, x, shape, weights), weights)
        x = _norm(graph, f"{name}.norm1", graph.node("Add", f"{name}.sum1", x, attended), weights)
        inner = _linear(graph, f"{name}.down", _gelu(graph, name, _linear(graph, f"{name}.up", x, weights)), weights)
        x = _norm(graph, f"{name}.norm2", graph.node("Add", f"{name}.sum2", x, inner), weights)
    mean = graph.node("ReduceMean", "mean", x, axes=[1], keepdims=0)
    return graph.export({"logits": (_linear(graph, "classes", mean, weights), [shape.classes])}, metadata or {})


def _linear(graph: ModelGraph, name: str, x: Any, weights: Mapping[str, np.ndarray]) -> Any:
    product = graph.node("MatMul", name, x, graph.constant(f"{name}.weight", weights[f"{name}.weight"]))
    return graph.node("Add", f"{name}.add", product, graph.constant(f"{name}.bias", weights[f"{name}.bias"]))


def _norm(graph: ModelGraph, name: str, x: Any, weights: Mapping[str, np.ndarray]) -> Any:
    scale, bias = (graph.constant(f"{name}.{part}", weights[f"{name}.{part}"]) for part in ("weight", "bias"))
    return graph.node("LayerNormalization", name, x, scale, bias, axis=-1, epsilon=EPSILON)


def _attention(graph: ModelGraph, name: str, x: Any, shape: Shape, weights: Mapping[str, np.ndarray]) -> Any:
    size = shape.width // shape.heads
    split = graph.constant(f"{name}.split", np.array([0, shape.length, shape.heads, size]))
    joined = graph.constant(f"{name}.join", np.array([0, shape.length, shape.width]))

    def heads(part: str, order: list[int]) -> Any:
        parts = graph.node("Reshape", f"{name}.{part}.split", _linear(graph, f"{name}.{part}", x, weights), split)
        return graph.node("Transpose", f"{name}.{part}.heads", parts, perm=order)

    scores = graph.node("MatMul", f"{name}.scores", heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1]))
    scale = graph.constant(f"{name}.scale", np.array(1 / math.sqrt(size), np.float32))
    shares = graph.node("Softmax", f"{name}.shares", graph.node("Mul", f"{name}.scaled", scores, scale), axis=-1)
    seen = graph.node("MatMul", f"{name}.seen", shares, heads("value", [0, 2, 1, 3]))
    return graph.node(
        "Reshape", f"{name}.joined", graph.node("Transpose", f"{name}.back", seen, perm=[0, 2, 1, 3]), joined
    )


def _gelu(graph: ModelGraph, name: str, x: Any) -> Any:
    root, half, one = (
        graph.constant(f"{name}.{what}", np.array(value, np.float32))
        for what, value in (("root", math.sqrt(0.5)), ("half", 0.5), ("one", 1.0))
    )
    erf = graph.node("Erf", f"{name}.erf", graph.node("Mul", f"{name}.rooted", x, root))
    gate = graph.node("Mul", f"{name}.gate", graph.node("Add", f"{name}.shifted", erf, one), half)
    return graph.node("Mul", f"{name}.gelu", x, gate)
