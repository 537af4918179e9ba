"""Models read without their large data: what stays in the file comes back the same, odd data are left to the parser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from rerampile import ModelError, compile_model
from rerampile.detach import without_large_data
from rerampile.onnx_file import load_model_file

COUNT = 1 << 15
VALUES = np.random.default_rng(0).standard_normal(COUNT, np.float32)


def size_of(tensor: TensorProto) -> int:
    return 4 * int(np.prod(tensor.dims, dtype=np.int64))


def model_with(*initializers: TensorProto) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [COUNT]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="p")


def large(name: str = "w", **fields: Any) -> TensorProto:
    return TensorProto(**{"name": name, "data_type": 1, "dims": [COUNT], "raw_data": VALUES.tobytes()} | fields)


def detached(data: bytes) -> bytes:
    return bytes(without_large_data(memoryview(data), "here", size_of))


def test_large_data_stay_in_the_file() -> None:
    small = numpy_helper.from_array(np.ones(3, np.float32), "b")
    model = model_with(large("w", doc_string="of w"), small, large("v"))
    data = model.SerializeToString()
    parsed = onnx.ModelProto.FromString(detached(data))
    assert parsed.ByteSize() < 1000
    for tensor, original in zip(parsed.graph.initializer, model.graph.initializer, strict=True):
        if tensor.name == "b":
            assert tensor == original
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place.pop("location") == "here"
        offset, length = int(place.pop("offset")), int(place.pop("length"))
        assert not place
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = data[offset : offset + length]
    assert parsed == model


ODD = {
    "too short for its shape": large(dims=[COUNT + 1]),
    "data that are no raw data": TensorProto(name="w", data_type=1, dims=[COUNT], float_data=VALUES.tolist()),
    "external": large(data_location=TensorProto.EXTERNAL),
    "segmented": large(segment=TensorProto.Segment(begin=0, end=1)),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_tensors_are_left_to_the_parser(case: str) -> None:
    data = model_with(ODD[case]).SerializeToString()
    assert detached(data) == data


def test_a_graph_in_two_pieces_is_left_to_the_parser() -> None:
    """Two messages of one field are merged by a parser."""
    data = model_with(large("w")).SerializeToString() + model_with(large("v")).SerializeToString()
    assert detached(data) == data
    assert len(onnx.ModelProto.FromString(data).graph.initializer) == 2


def test_absurdly_many_fields_are_left_to_the_parser() -> None:
    data = model_with(large()).SerializeToString() + b"\x28\x01" * (1 << 20)
    assert detached(data) == data


@given(st.data())
def test_damage_is_never_hidden(data: st.DataObject) -> None:
    """A damaged model parses to what it parses to without us, or not at all."""
    whole = bytearray(model_with(large("w"), large("v")).SerializeToString())
    heads = [k + shift for k in (0, whole.index(VALUES.tobytes())) for shift in range(-24, 64)]
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.sampled_from([k for k in heads if k >= 0]))] = data.draw(st.integers(0, 255))
    damaged = bytes(whole[: data.draw(st.sampled_from([len(whole), len(whole) - 1, len(whole) // 2, 40]))])
    try:
        expected = onnx.ModelProto.FromString(damaged)
    except Exception:  # noqa: BLE001 -- the parser's own, which must come out here too
        with pytest.raises(Exception, match=r"."):
            onnx.ModelProto.FromString(detached(damaged))
        return
    found = onnx.ModelProto.FromString(detached(damaged))
    for tensor in found.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place.get("location") == "here":
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = damaged[int(place["offset"]) : int(place["offset"]) + int(place["length"])]
    assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


def test_a_model_read_from_its_file_is_the_model(tmp_path: Path) -> None:
    model = model_with(large("w"), large("v", data_type=TensorProto.INT32))
    onnx.save(model, tmp_path / "m.onnx")
    loaded = load_model_file(tmp_path / "m.onnx")
    assert loaded.proto.ByteSize() < 1000
    for tensor, original in zip(loaded.proto.graph.initializer, model.graph.initializer, strict=True):
        assert loaded.is_window(tensor)
        np.testing.assert_array_equal(loaded.array(tensor), numpy_helper.to_array(original))
        loaded.put_back(tensor)
    assert loaded.proto == model


def test_a_window_that_the_user_wrote_is_refused(tmp_path: Path) -> None:
    tensor = large(raw_data=b"", data_location=TensorProto.EXTERNAL)
    tensor.ClearField("raw_data")
    for key, value in (("location", "\0"), ("offset", 10**9), ("length", 4 * COUNT)):
        tensor.external_data.add(key=key, value=str(value))
    onnx.save(model_with(tensor, large("v")), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"tensor 'w': external data at .*, expected the name of a file"):
        load_model_file(tmp_path / "m.onnx")


def test_large_digital_tensors_are_in_the_deployed_model(tmp_path: Path) -> None:
    """As before they were windows: with their data, documentation and all, and in no file of their own."""
    nodes = [helper.make_node("Max", ["x", "d"], ["s"]), helper.make_node("Gemm", ["s", "w"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, COUNT])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])
    weights = numpy_helper.from_array(np.stack([VALUES, -VALUES], axis=1), "w")
    digital = large("d", doc_string="kept", dims=[1, COUNT])
    graph = helper.make_graph(nodes, "g", [x], [y], [weights, digital])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    deployments = [
        compile_model(source, out=tmp_path / name) for source, name in ((model, "a"), (tmp_path / "m.onnx", "b"))
    ]
    (carried,) = (t for t in onnx.load(deployments[1].model_path).graph.initializer if t.name == "d")
    assert carried == digital
    assert not (tmp_path / "b" / "digital.safetensors").exists()
    assert deployments[0].model_path.read_bytes() == deployments[1].model_path.read_bytes()
