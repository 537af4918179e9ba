"""What folds into a layer and what stays. Each model is compiled, so compared with the unfolded one in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from rerampile import Deployment, compile_model

Compile = Callable[..., Deployment]
Weight = Callable[..., np.ndarray]

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
BN = "BatchNormalization (a, s, b, m, v)"
IMAGE, MATRIX = "N,3,6,6", "N,5"
CONV, GEMM = {"W": (4, 3, 3, 3)}, {"W": (5, 4)}
VECTOR, COLUMN, PER_INPUT = {"k": (4,)}, {"k": (4, 1, 1)}, {"k": (1, 3, 1, 1)}
NORM = {"s": (4,), "b": (4,), "m": (4,), "v": (4,)}
INPUT_NORM = {"s": (3,), "b": (3,), "m": (3,), "v": (3,)}

# Body, shape of x, weights, folds as (op, side). `a` is what follows the first node.
FIRES: dict[str, tuple[str, str, dict[str, tuple[int, ...]], list[tuple[str, str]]]] = {
    "BN after Conv": (f"a = Conv (x, W) y = {BN}", IMAGE, CONV | NORM, [("BatchNormalization", "after")]),
    "BN after Conv with bias, then Relu": (
        f"a = Conv <pads=[1,1,1,1]> (x, W, B) c = {BN} y = Relu (c)",
        IMAGE,
        CONV | NORM | {"B": (4,)},
        [("BatchNormalization", "after")],
    ),
    "BN after grouped Conv": (
        f"a = Conv <group=2> (x, W) y = {BN}",
        "1,4,5,5",
        {"W": (4, 2, 3, 3)} | NORM,
        [("BatchNormalization", "after")],
    ),
    "BN after ConvTranspose": (
        f"a = ConvTranspose <group=2, strides=[2]> (x, W, B) y = {BN}",
        "1,4,5",
        {"W": (4, 2, 3), "B": (4,)} | NORM,
        [("BatchNormalization", "after")],
    ),
    "BN after Gemm": (
        f"a = Gemm <alpha=0.5, beta=3.0> (x, W, B) y = {BN}",
        MATRIX,
        GEMM | NORM | {"B": (4,)},
        [("BatchNormalization", "after")],
    ),
    "BN after MatMul": (f"a = MatMul (x, W) y = {BN}", MATRIX, GEMM | NORM, [("BatchNormalization", "after")]),
    "Add after MatMul": ("a = MatMul (x, W) y = Add (k, a)", "2,3,5", GEMM | VECTOR, [("Add", "after")]),
    "Mul, Add, Sub, Div after Conv": (
        "a = Conv (x, W) c = Mul (a, k) d = Add (j, c) e = Sub (d, k) y = Div (e, j)",
        IMAGE,
        CONV | COLUMN | {"j": (1, 4, 1, 1)},
        [("Mul", "after"), ("Add", "after"), ("Sub", "after"), ("Div", "after")],
    ),
    "constant minus Conv": ("a = Conv (x, W) y = Sub (k, a)", IMAGE, CONV | COLUMN, [("Sub", "after")]),
    "a scalar after Gemm": (
        "a = Gemm (x, W, B) y = Mul (a, k)",
        MATRIX,
        GEMM | {"B": (1, 4), "k": ()},
        [("Mul", "after")],
    ),
    "Mul before padded Conv": (
        "a = Mul (x, k) y = Conv <pads=[1,1,1,1]> (a, W)",
        IMAGE,
        CONV | PER_INPUT,
        [("Mul", "before")],
    ),
    "BN before Conv": (
        f"a = Identity (x) c = {BN} y = Conv (c, W)",
        IMAGE,
        CONV | INPUT_NORM,
        [("BatchNormalization", "before")],
    ),
    "Sub and Div before Conv": (
        "a = Sub (x, j) c = Div (a, k) y = Conv (c, W)",
        IMAGE,
        CONV | PER_INPUT | {"j": (3, 1, 1)},
        [("Div", "before"), ("Sub", "before")],
    ),
    "Mul and Add before grouped Conv": (
        "a = Mul (x, k) c = Add (a, j) y = Conv <group=2> (c, W)",
        "1,4,5,5",
        {"W": (6, 2, 3, 3)} | {"k": (4, 1, 1), "j": (4, 1, 1)},
        [("Add", "before"), ("Mul", "before")],
    ),
    "Mul before ConvTranspose": (
        "a = Mul (x, k) y = ConvTranspose (a, W)",
        "1,4,5",
        {"W": (4, 2, 3), "k": (4, 1)},
        [("Mul", "before")],
    ),
    "Add before Gemm with alpha": (
        "a = Add (x, k) y = Gemm <alpha=0.5, beta=2.0> (a, W, B)",
        MATRIX,
        GEMM | {"k": (5,), "B": (4,)},
        [("Add", "before")],
    ),
    "Mul and Add before MatMul": (
        "a = Mul (x, k) c = Add (a, j) y = MatMul (c, W)",
        "2,3,5",
        GEMM | {"k": (5,), "j": (5,)},
        [("Add", "before"), ("Mul", "before")],
    ),
    "before and after": (
        f"p = Mul (x, k) a = Conv (p, W) y = {BN}",
        IMAGE,
        CONV | NORM | PER_INPUT,
        [("BatchNormalization", "after"), ("Mul", "before")],
    ),
    "Add before and Mul after": (
        "p = Add (x, k) a = Conv (p, W) y = Mul (a, j)",
        IMAGE,
        CONV | PER_INPUT | {"j": (4, 1, 1)},
        [("Mul", "after"), ("Add", "before")],
    ),
    "a zero factor after": ("a = Conv (x, W) y = Mul (a, zero)", IMAGE, CONV | {"zero": (4, 1, 1)}, [("Mul", "after")]),
    "one fold between two layers": (
        "a = MatMul (x, W) c = Mul (a, k) y = MatMul (c, U)",
        MATRIX,
        GEMM | VECTOR | {"U": (4, 3)},
        [("Mul", "after")],
    ),
}

# What must not be folded; `y` is always the output.
STAYS: dict[str, tuple[str, str, dict[str, tuple[int, ...]]]] = {
    "another consumer": (f"a = Conv (x, W) c = {BN} y = Add (a, c)", IMAGE, CONV | NORM),
    "read twice by the same node": ("a = MatMul (x, W) y = Mul (a, a)", MATRIX, GEMM),
    "weight shared": (f"a = MatMul (x, W) c = {BN} y = MatMul (c, W)", "2,4", {"W": (4, 4)} | NORM),
    "spatial constant": ("a = Conv (x, W) y = Add (a, k)", IMAGE, CONV | {"k": (4, 4, 4)}),
    "along the width": ("a = Conv (x, W) y = Mul (a, k)", IMAGE, CONV | {"k": (4,)}),
    "raises the rank": ("a = Conv (x, W) y = Mul (a, k)", IMAGE, CONV | {"k": (1, 1, 4, 1, 1)}),
    "widens the channels": ("a = Conv (x, W) y = Mul (a, k)", IMAGE, {"W": (1, 3, 3, 3), "k": (4, 1, 1)}),
    "computed": ("c = ReduceMean <keepdims=1> (x) a = Conv (x, W) y = Mul (a, c)", IMAGE, CONV),
    "constant divided by the layer": ("a = MatMul (x, W) y = Div (k, a)", MATRIX, GEMM | VECTOR),
    "full C of Gemm": ("a = Gemm (x, W, C) y = Mul (a, k)", "2,5", GEMM | VECTOR | {"C": (2, 4)}),
    "constant on the left": ("a = MatMul (W, x) y = Mul (a, k)", "5,3", {"W": (4, 5), "k": (3,)}),
    "batched weights": ("a = MatMul (x, W) y = Mul (a, k)", "2,3,5", {"W": (2, 5, 4), "k": (4,)}),
    "BN along another axis": (f"a = MatMul (x, W) y = {BN}", "2,4,5", GEMM | NORM),
    "BN in training": (
        "a = Conv (x, W) y, rm, rv = BatchNormalization <training_mode=1> (a, s, b, m, v)",
        "2,3,6,6",
        CONV | NORM,
    ),
    "Add before padded Conv": ("a = Add (x, k) y = Conv <pads=[0,0,1,1]> (a, W)", IMAGE, CONV | PER_INPUT),
    "Add before SAME Conv": ('a = Add (x, k) y = Conv <auto_pad="SAME_LOWER"> (a, W)', IMAGE, CONV | PER_INPUT),
    "Add before ConvTranspose": ("a = Add (x, k) y = ConvTranspose (a, W)", "1,4,5", {"W": (4, 2, 3), "k": (4, 1)}),
    "before, another consumer": (
        "a = Mul (x, k) c = Conv (a, W) d = ReduceMax <keepdims=0> (a) y = Add (c, d)",
        IMAGE,
        CONV | PER_INPUT,
    ),
    "before, widens one channel": ("a = Mul (x, k) y = Conv (a, W)", "N,1,6,6", CONV | PER_INPUT),
    "before, widens an unknown number of channels": (
        "i = Identity (x) a = Mul (i, k) y = Conv (a, W)",
        "N,1,6,6",
        CONV | PER_INPUT,
    ),
    "before, raises the rank": ("a = Mul (x, k) y = MatMul (a, W)", "5", GEMM | {"k": (1, 5)}),
    "before, a zero factor with an addend": (
        "p = Mul (x, zero) a = Add (p, k) y = Conv (a, W)",
        IMAGE,
        CONV | PER_INPUT | {"zero": (3, 1, 1)},
    ),
    "before, transposed data": ("a = Mul (x, k) y = Gemm <transA=1> (a, W)", "5,5", GEMM | {"k": (5,)}),
}


def tensors(shapes: dict[str, tuple[int, ...]], weight: Weight) -> dict[str, np.ndarray]:
    """Weights of the shapes; a variance is positive, and `zero` has a zero in the middle."""
    made = {name: weight(*shape) for name, shape in shapes.items()}
    if "v" in made:
        made["v"] = np.abs(made["v"])
    if "zero" in made:
        made["zero"][1] = 0
    return made


def folds(deployment: Deployment) -> list[tuple[str, str]]:
    return [(fold.op, fold.side) for layer in deployment.plan.layers for fold in layer.folds]


@pytest.mark.parametrize("options", [{}, {"prune": 0.5}, {"discrete": True}], ids=["plain", "pruned", "discrete"])
@pytest.mark.parametrize("case", FIRES)
def test_fires(
    case: str, options: dict[str, Any], compile_text: Compile, weight: Weight, discrete_target: Callable[..., Any]
) -> None:
    """Pruned and with coarse levels too: what an addend before a layer adds depends on its weights."""
    body, shape, shapes, expected = FIRES[case]
    if "discrete" in options:
        options = {"target": discrete_target(levels=16)}
    rank = "<float[N,4] a>" if case == "BN after MatMul" else ""  # an image or a sequence: nothing else tells
    text = f"{HEADER} g (float[{shape}] x) => (float[] y) {rank} {{ {body} }}"
    deployment = compile_text(text, tensors(shapes, weight), **options)
    assert folds(deployment) == expected
    folded = {fold.node for layer in deployment.plan.layers for fold in layer.folds}
    assert not folded & {operation.node for operation in deployment.plan.digital}
    deployed = onnx.load(deployment.model_path, load_external_data=False)
    assert not {op for op, _ in expected} & {node.op_type for node in deployed.graph.node}
    assert max(o.relative_error for o in deployment.plan.verification.outputs) < 2e-6


@pytest.mark.parametrize("case", STAYS)
def test_stays(case: str, compile_text: Compile, weight: Weight) -> None:
    body, shape, shapes = STAYS[case]
    deployment = compile_text(f"{HEADER} g (float[{shape}] x) => (float[] y) {{ {body} }}", tensors(shapes, weight))
    assert folds(deployment) == []


def test_an_output_in_between_stays(compile_text: Compile, weight: Weight) -> None:
    deployment = compile_text(
        f"{HEADER} g (float[2,5] x) => (float[] y, float[] a) {{ a = MatMul (x, W) y = Mul (a, k) }}",
        {"W": weight(5, 4), "k": weight(4)},
    )
    assert folds(deployment) == []


def test_a_consumer_in_a_subgraph_counts(compile_text: Compile, weight: Weight) -> None:
    deployment = compile_text(
        f"""{HEADER} g (float[2,5] x, bool c) => (float[2,4] y, float[2,4] z) {{
            a = MatMul (x, W)
            y = Mul (a, k)
            z = If (c) <then_branch = t () => (float[2,4] p) {{ p = Relu (a) }},
                        else_branch = e () => (float[2,4] q) {{ q = Identity (a) }}>
        }}""",
        {"W": weight(5, 4), "k": weight(4)},
    )
    assert folds(deployment) == []


def test_folds_inside_a_subgraph(compile_text: Compile, weight: Weight) -> None:
    deployment = compile_text(
        f"""{HEADER} g (float[2,5] x, bool c) => (float[2,4] z) {{
            z = If (c) <then_branch = t () => (float[2,4] p) {{ a = MatMul (x, W) p = Add (a, k) }},
                        else_branch = e () => (float[2,4] q) {{ b = MatMul (x, V) q = Mul (b, k) }}>
        }}""",
        {"W": weight(5, 4), "V": weight(5, 4), "k": weight(4)},
    )
    assert sorted(folds(deployment)) == [("Add", "after"), ("Mul", "after")]


@pytest.mark.parametrize(("kind", "dtype"), [("float16", np.float16), ("double", np.float64)])
def test_other_types_fold(
    kind: str, dtype: Any, weight: Weight, model_of: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    shapes = GEMM | NORM | {"B": (4,)}
    model = model_of(
        f"{HEADER} g ({kind}[2,5] x) => ({kind}[] y) {{ a = Gemm (x, W, B) y = {BN} }}",
        {name: value.astype(dtype) for name, value in tensors(shapes, weight).items()},
    )
    assert folds(compile_model(model, out=tmp_path / "out")) == [("BatchNormalization", "after")]


def test_a_fold_that_overflows_stays(compile_text: Compile, weight: Weight) -> None:
    """A variance of zero over a tiny epsilon gives factors that no weight survives."""
    norm = {name: weight(4) for name in NORM} | {"v": np.zeros(4, np.float32)}
    deployment = compile_text(
        f"{HEADER} g (float[2,5] x) => (float[] y, float[] z) {{ a = MatMul (x, W)"
        " y = BatchNormalization <epsilon=0.0> (a, s, b, m, v) z = Neg (x) }",
        {"W": weight(5, 4)} | norm,
    )
    assert folds(deployment) == []


def test_a_vector_that_raises_a_scalar_stays(compile_text: Compile, weight: Weight) -> None:
    """The product of two vectors has no axis; times [1] it has one, which what follows needs."""
    deployment = compile_text(
        f"{HEADER} g (float[4] x) => (float[] y) {{ a = MatMul (x, W) b = Mul (a, k) y = Concat <axis=0> (b, b) }}",
        {"W": weight(4), "k": weight(1)},
    )
    assert not deployment.plan.layers[0].folds
