"""Inputs that fit what a model declares, and files of inputs that do not."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from rerampile import DataError
from rerampile.runtime.inputs import fitting_inputs, inputs_from_file
from rerampile.runtime.session import open_session

Parse = Callable[..., onnx.ModelProto]


def session_of(text: str, parse_model: Parse, **weights: np.ndarray) -> Any:
    model = parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}', **weights)
    return open_session(model.SerializeToString())


KINDS = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_declared_type(kind: str, parse_model: Parse) -> None:
    session = session_of(f"g ({kind}[3,50] x) => ({kind}[3,50] y) {{ y = Identity (x) }}", parse_model)
    inputs, outputs = fitting_inputs(session, seed=0)
    assert inputs["x"].dtype == KINDS[kind]
    assert inputs["x"].shape == (3, 50)
    assert len(np.unique(inputs["x"])) > 1
    np.testing.assert_array_equal(outputs[0], inputs["x"])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("N,3", (2, 3)),
        ("2,T", (2, 32)),
        ("N,H,V,4", (2, 32, 32, 4)),
        ("N,N", (2, 2)),
        ("?,?", (2, 32)),
        ("0,3", (0, 3)),
    ],
)
def test_open_dimensions(shape: str, expected: tuple[int, ...], parse_model: Parse) -> None:
    """The first axis is a batch; the same symbol has one size."""
    session = session_of(f"g (float[{shape}] x) => (float[{shape}] y) {{ y = Identity (x) }}", parse_model)
    assert fitting_inputs(session, seed=0)[0]["x"].shape == expected


def test_a_symbol_that_two_inputs_share(parse_model: Parse) -> None:
    session = session_of("g (float[N,T] x, float[T] z) => (float[N,T] y) { y = Add (x, z) }", parse_model)
    inputs, _ = fitting_inputs(session, seed=0)
    assert (inputs["x"].shape, inputs["z"].shape) == ((2, 32), (32,)) or inputs["x"].shape[1:] == inputs["z"].shape


def test_sizes_are_tried_until_one_runs(parse_model: Parse) -> None:
    """Only one batch and a width of 16 fit the reshape."""
    session = session_of(
        "g (float[N,V] x) => (float[1,4,4] y) { s = Constant <value_ints=[1,4,4]> () y = Reshape (x, s) }", parse_model
    )
    inputs, _ = fitting_inputs(session, seed=0)
    assert inputs["x"].size == 16


def test_nothing_fits(parse_model: Parse) -> None:
    session = session_of(
        "g (float[N,V] x) => (float[7,11] y) { s = Constant <value_ints=[7,11]> () y = Reshape (x, s) }", parse_model
    )
    with pytest.raises(
        DataError, match=r"no generated inputs fit the model; give real ones with --inputs FILE.npz \("
    ) as e:
        fitting_inputs(session, seed=0)
    assert "\n" not in str(e.value)


def test_indices_stay_small(parse_model: Parse) -> None:
    session = session_of(
        "g (int64[5] x) => (float[5,2] y) { y = Gather (W, x) }", parse_model, W=np.ones((8, 2), np.float32)
    )
    inputs, _ = fitting_inputs(session, seed=0)
    assert inputs["x"].min() >= 0


def test_a_seed_repeats_and_another_differs(parse_model: Parse) -> None:
    session = session_of("g (float[9] x, float[9] z) => (float[9] y) { y = Add (x, z) }", parse_model)
    first, again, other = (fitting_inputs(session, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first["x"], again["x"])
    assert (first["x"] != other["x"]).all()
    assert (first["x"] != first["z"]).all()


def test_kinds_that_cannot_be_generated() -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [2]))
    graph = helper.make_graph(
        [helper.make_node("SequenceLength", ["x"], ["y"])],
        "g",
        [helper.make_value_info("x", kind)],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(DataError, match=r"input 'x' is a seq\(tensor\(float\)\), expected a tensor of numbers"):
        fitting_inputs(open_session(model.SerializeToString()), seed=0)


@pytest.fixture
def session(parse_model: Parse) -> Any:
    """Two inputs: float32 [N, 3] and int64 [2]."""
    return session_of(
        "g (float[N,3] x, int64[2] k) => (float[N,3] y, int64[2] z) { y = Relu (x) z = Abs (k) }", parse_model
    )


X, K = np.ones((5, 3), np.float32), np.array([1, 2])


def test_inputs_from_a_file(session: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=X, k=K)
    found = inputs_from_file(tmp_path / "in.npz", session)
    np.testing.assert_array_equal(found["x"], X)
    np.testing.assert_array_equal(found["k"], K)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, r"input 'k' is missing, expected an array of tensor\(int64\) \[2\]"),
        ({"x": X, "k": K, "q": K}, r"input 'q' is not one of the model's \(known: k, x\)"),
        ({"x": X.T, "k": K}, r"input 'x' is float32 \[3, 5\], expected float32 \['N', 3\]"),
        ({"x": X[0], "k": K}, r"input 'x' is float32 \[3\], expected float32 \['N', 3\]"),
        ({"x": X.astype(np.float64), "k": K}, r"input 'x' is float64 \[5, 3\], expected float32"),
        ({"x": X, "k": np.array([None, 1])}, "not a readable .npz file"),
    ],
)
def test_inputs_that_do_not_fit(arrays: dict[str, np.ndarray], message: str, session: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        inputs_from_file(tmp_path / "in.npz", session)
    assert str(caught.value).startswith(str(tmp_path / "in.npz"))
    assert "\n" not in str(caught.value)


def npz_with(path: Path, header: str, data: bytes = b"") -> None:
    """An .npz file with one member, x, of a header of our own."""
    head = header.encode().ljust(118) + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (f"({10**30}, 3)", rf"shape \[{10**30}, 3\] of type float32, expected numbers of at most 268435456 elements"),
        (f"({2**40}, 3)", "expected numbers of at most 268435456 elements"),
        ("(1000000, 3)", r"'x': shape \[1000000, 3\] of type float32, expected what \d+ bytes hold"),
        ("(-5, 3)", r"'x': shape \[-5, 3\] of type float32, expected what"),
        ("(" * 300, "not a readable .npz file"),
    ],
)
def test_headers_that_are_absurd(shape: str, message: str, session: Any, tmp_path: Path) -> None:
    npz_with(tmp_path / "in.npz", f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}")
    with pytest.raises(DataError, match=message) as caught:
        inputs_from_file(tmp_path / "in.npz", session)
    assert "\n" not in str(caught.value)


def test_nothing_is_read_before_names_and_shapes_fit(session: Any, tmp_path: Path) -> None:
    """A file of a few kilobytes may hold an array of gigabytes."""
    zeros = np.zeros(200_000_000, np.uint8)
    np.savez_compressed(tmp_path / "name.npz", x=X, k=K, huge=zeros)
    np.savez_compressed(tmp_path / "shape.npz", x=zeros, k=K)
    tracemalloc.start()
    with pytest.raises(DataError, match="input 'huge' is not one of the model's"):
        inputs_from_file(tmp_path / "name.npz", session)
    with pytest.raises(DataError, match=r"input 'x' is uint8 \[200000000\], expected float32"):
        inputs_from_file(tmp_path / "shape.npz", session)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.parametrize("offset", [4, 8, 60])
def test_a_file_with_a_changed_byte(offset: int, session: Any, tmp_path: Path) -> None:
    """The zip version, the way it is packed, its data: each makes zipfile raise something else."""
    path = tmp_path / "in.npz"
    np.savez_compressed(path, x=np.zeros((2, 4), np.float32))
    damaged = bytearray(path.read_bytes())
    damaged[offset] ^= 0xFF
    directory = damaged.find(b"PK\x01\x02") + 2
    if offset < 10:
        damaged[directory + offset] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"in.npz: not a readable .npz file"):
        inputs_from_file(path, session)


@pytest.mark.parametrize("content", [None, b"", b"x = 1", b"PK\x03\x04" + b"\0" * 30])
def test_files_that_are_no_inputs(content: bytes | None, session: Any, tmp_path: Path) -> None:
    path = tmp_path / "in.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"in.npz: not a readable .npz file"):
        inputs_from_file(path, session)
    np.save(tmp_path / "array.npy", X)
    with pytest.raises(DataError, match=r"array.npy: not a readable .npz file: .*; write one with numpy.savez"):
        inputs_from_file(tmp_path / "array.npy", session)


def test_a_declared_size_that_no_memory_holds(parse_model: Parse) -> None:
    model = parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[{2**40}] x) => (float[1] y) {{ y = ReduceSum (x) }}'
    )
    with pytest.raises(DataError, match=r"\(an input would have more than 268435456 elements\)"):
        fitting_inputs(open_session(model.SerializeToString()), 0)
