"""Model files that are missing, damaged or hostile: one clear line each, and no memory spent on them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from rerampile import ModelError, UnsupportedModelError, compile_model
from rerampile.onnx_file import load_model_file

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'


@pytest.fixture
def external_model(parse_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> Path:
    """A MatMul whose weight, 5 x 3 float32 in 60 bytes, lies in `w.bin` beside the model."""
    model = parse_model(
        f"{HEADER} g (float[2,5] x) => (float[2,3] y) {{ y = MatMul (x, W) }}", W=np.ones((5, 3), np.float32)
    )
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    return folder / "m.onnx"


def change_entry(path: Path, **entries: str | None) -> None:
    """Set or remove entries of the external weight."""
    model = onnx.load(path, load_external_data=False)
    found = {e.key: e.value for e in model.graph.initializer[0].external_data} | entries
    del model.graph.initializer[0].external_data[:]
    for key, value in found.items():
        if value is not None:
            model.graph.initializer[0].external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


def refusal(path: Path | onnx.ModelProto, kind: type[ModelError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        load_model_file(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_is_read_as_it_is(small_model_file: Path) -> None:
    model = load_model_file(small_model_file)
    data = small_model_file.read_bytes()
    assert model.proto.SerializeToString() == onnx.load(small_model_file).SerializeToString()
    assert (model.name, model.size, model.opset) == ("small.onnx", len(data), 17)
    assert model.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("content", [b"", b"not onnx", b"\x00" * 100, b"\x89PNG\r\n\x1a\n" + b"\xff" * 50])
def test_not_onnx(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    assert "m.onnx: not an ONNX model, or a truncated one" in refusal(path)


def test_every_truncation_is_refused(small_model_file: Path, tmp_path: Path) -> None:
    """At every length a cut file is refused, or what is missing is optional (a tail of small fields)."""
    whole = small_model_file.read_bytes()
    cut = tmp_path / "cut.onnx"
    for length in [*range(120), *range(120, len(whole) - 60, 97)]:
        cut.write_bytes(whole[:length])
        assert refusal(cut)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: a folder, expected an ONNX model file"
    assert refusal(tmp_path / "none.onnx") == f"{tmp_path / 'none.onnx'}: cannot be read: No such file or directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission(small_model_file: Path) -> None:
    small_model_file.chmod(0)
    assert "cannot be read: Permission denied" in refusal(small_model_file)


def test_what_the_checker_refuses(small_model: onnx.ModelProto) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(small_model)
    model.graph.node[1].op_type = "Releu"
    assert "small: ONNX's checker refuses it: No Op registered for Releu" in refusal(model)
    model.graph.node[1].op_type, model.graph.node[1].input[0] = "Relu", "nowhere"
    assert "ONNX's checker refuses it" in refusal(model)


def test_external_data_are_mapped(external_model: Path) -> None:
    model = load_model_file(external_model)
    weight = model.array(model.proto.graph.initializer[0])
    np.testing.assert_array_equal(weight, np.ones((5, 3), np.float32))
    assert not weight.flags.writeable
    data = (external_model.parent / "w.bin").read_bytes()
    assert model.external == {"w.bin": hashlib.sha256(data).hexdigest()}
    assert model.size == external_model.stat().st_size + len(data)


def test_external_data_missing(external_model: Path) -> None:
    (external_model.parent / "w.bin").unlink()
    assert refusal(external_model) == "m.onnx: tensor 'W': external data file 'w.bin' is missing beside the model"


def test_external_data_too_short(external_model: Path) -> None:
    os.truncate(external_model.parent / "w.bin", 59)
    message = "m.onnx: tensor 'W': external data file 'w.bin' has 59 bytes, expected at least 60"
    assert refusal(external_model) == message


@pytest.mark.parametrize("location", ["../w.bin", "sub/../../w.bin", "", None, "."])
def test_external_data_outside(location: str | None, external_model: Path) -> None:
    shutil.copy(external_model.parent / "w.bin", external_model.parent.parent / "w.bin")
    change_entry(external_model, location=location)
    message = refusal(external_model)
    assert message.startswith(f"m.onnx: tensor 'W': external data {'file ' if location == '.' else 'at '}")
    assert "outside the model's folder" in message or location == "."


@pytest.mark.parametrize("location", ["w\0.bin", "a" * 5000, "d/" * 3000, "a" * 300, "\xff\xfe"])
def test_external_data_at_what_is_no_name(location: str, external_model: Path) -> None:
    """One line whatever it is, and one that can be read."""
    change_entry(external_model, location=location)
    if location == "\xff\xfe":  # what protobuf cannot decode
        raw = external_model.read_bytes()
        external_model.write_bytes(raw.replace(location.encode(), b"\xff\xfe\xff\xfe"))
    message = refusal(external_model)
    assert message.startswith("m.onnx: tensor 'W': external data ")
    assert len(message) < 500
    message.encode()


def test_external_data_behind_links_in_a_circle(external_model: Path) -> None:
    data = external_model.parent / "w.bin"
    data.unlink()
    data.symlink_to("w.bin")
    assert "m.onnx: tensor 'W': external data file 'w.bin' " in refusal(external_model)


@pytest.mark.parametrize("name", ["pipe", "link"])
def test_devices_and_pipes_are_not_opened(name: str, external_model: Path, tmp_path: Path) -> None:
    """A pipe would wait forever, a device may never end; a link to one is one."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    message = f"{tmp_path / name}: cannot be read: a device or a pipe, expected a regular file"
    assert refusal(tmp_path / name) == message
    (external_model.parent / "w.bin").unlink()
    os.mkfifo(external_model.parent / "w.bin")
    assert "external data file 'w.bin' is missing beside the model" in refusal(external_model)


def test_external_data_at_an_absolute_path(external_model: Path) -> None:
    change_entry(external_model, location=str(external_model.parent / "w.bin"))
    assert "outside the model's folder; expected a relative path that stays inside it" in refusal(external_model)


def test_external_data_behind_a_link_that_leaves(external_model: Path) -> None:
    data = external_model.parent / "w.bin"
    data.rename(external_model.parent.parent / "elsewhere.bin")
    data.symlink_to("../elsewhere.bin")
    assert "external data at 'w.bin', outside the model's folder" in refusal(external_model)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"length": "56"}, "external data of 56 bytes at offset 0, expected 60 bytes at an offset of 0 or more"),
        ({"offset": "-4"}, "at offset -4, expected 60 bytes at an offset of 0 or more"),
        ({"offset": "four"}, "external data offset or length is not a number"),
        ({"offset": "4"}, "has 60 bytes, expected at least 64"),
        ({"offset": str(2**70)}, "expected at least"),
        ({"offset": "9" * 5000}, "external data offset or length is not a number"),
    ],
)
def test_external_data_described_wrongly(entries: dict[str, str], message: str, external_model: Path) -> None:
    change_entry(external_model, **entries)
    assert message in refusal(external_model)


def test_external_data_without_a_folder(external_model: Path) -> None:
    model = onnx.load(external_model, load_external_data=False)
    assert "the model came without a folder; pass its path" in refusal(model)


def weight_only(tensor: TensorProto) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", tensor.name], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [tensor],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_data_that_do_not_fill_their_shape() -> None:
    tensor = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[5, 3], raw_data=b"\0" * 56)
    assert refusal(weight_only(tensor)) == (
        "g: tensor 'W' has 56 bytes, expected 60 for shape [5, 3]; the file is damaged"
    )


def test_typed_data_that_do_not_fill_their_shape() -> None:
    tensor = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[5, 3], float_data=[1.0] * 14)
    assert "tensor 'W' has 14 values, expected 15 for shape [5, 3]; the file is damaged" in refusal(weight_only(tensor))


def test_no_data_at_all() -> None:
    tensor = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[2**20, 2**20])
    assert "tensor 'W' has 0 values, expected" in refusal(weight_only(tensor))


@pytest.mark.parametrize("raw", [b"\0" * 60, None])
@pytest.mark.parametrize(
    ("dims", "kind", "message"),
    [
        ([-1, 3], TensorProto.FLOAT, "tensor 'W': dimension -1, expected 0 or more"),
        ([5, 3], 99, "tensor 'W': unknown element type 99"),
        ([5, 3], 0, "tensor 'W': unknown element type 0"),
    ],
)
def test_shapes_and_types_that_do_not_exist(dims: list[int], kind: int, message: str, raw: bytes | None) -> None:
    assert refusal(weight_only(TensorProto(name="W", data_type=kind, dims=dims, raw_data=raw))) == message


@pytest.mark.parametrize("kind", [t for t in TensorProto.DataType.values() if t != TensorProto.UNDEFINED])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_every_element_type_may_be_typed_data(kind: int, count: int, small_model: onnx.ModelProto) -> None:
    """The count of values that each type packs into its field is right: a true tensor is never called damaged."""
    values = [b"1"] * count if kind == TensorProto.STRING else [1] * count
    model = onnx.ModelProto()
    model.CopyFrom(small_model)
    model.ir_version, model.opset_import[0].version = onnx.IR_VERSION, onnx.defs.onnx_opset_version()
    model.graph.node.append(helper.make_node("Constant", [], ["c"]))
    tensor = helper.make_tensor("t", kind, [count], values)
    model.graph.node[-1].attribute.append(helper.make_attribute("value", tensor))
    load_model_file(model)


@pytest.mark.parametrize("size", [2**20, 2**31])
def test_a_constant_of_absurd_size_takes_no_memory(size: int, tmp_path: Path) -> None:
    """A few bytes can ask for terabytes: ConstantOfShape, and chains that multiply on the way."""
    shape = numpy_helper.from_array(np.array([size, 2**20], np.int64), "shape")
    graph = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["shape"], ["W"]), helper.make_node("MatMul", ["x", "W"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2**20])],
        [shape],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    tracemalloc.start()
    with pytest.raises(
        ModelError, match=rf"constant 'W' of shape \[{size}, 1048576\] has .* elements, expected at most"
    ):
        compile_model(model, out=tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


def test_an_operator_set_too_old_to_convert(tmp_path: Path) -> None:
    node = helper.make_node("LpPool", ["x"], ["y"], kernel_shape=[1, 1])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 2, 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 1)], ir_version=3)
    message = refusal(model, UnsupportedModelError)
    assert "g: operator set 1, expected 7 or newer" in message
    assert message.endswith("export it again")


def test_a_function_that_calls_itself() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[2] x) => (float[2] y) { y = local.f (x) }
        <domain: "local", opset_import: ["" : 17, "local" : 1]> f (a) => (b) { b = local.f (a) }"""
    )
    assert "Cycle detected in model-local function references: local::f" in refusal(model)


def test_metadata_are_kept(small_model: onnx.ModelProto, tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(small_model)
    model.producer_name, model.domain, model.model_version, model.doc_string = "trainer", "org.example", 7, "what it is"
    model.metadata_props.add(key="classes", value="cat,dog")
    model.graph.doc_string = "the graph"
    deployment = compile_model(model, out=tmp_path / "out")
    found = onnx.load(deployment.model_path, load_external_data=False)
    for name in ("producer_name", "domain", "model_version", "doc_string"):
        assert getattr(found, name) == getattr(model, name)
    assert {p.key: p.value for p in found.metadata_props}["classes"] == "cat,dog"
    assert found.graph.doc_string == "the graph"
    assert [v.SerializeToString() for v in found.graph.input] == [v.SerializeToString() for v in model.graph.input]
    assert [v.SerializeToString() for v in found.graph.output] == [v.SerializeToString() for v in model.graph.output]


@pytest.mark.parametrize("name", [b"conv_weight", b"features"])
def test_a_name_that_is_no_text(name: bytes, small_model_file: Path) -> None:
    damaged = small_model_file.read_bytes().replace(name, b"\xff" + name[1:])
    small_model_file.write_bytes(damaged)
    assert "is not UTF-8 text; the file is damaged" in refusal(small_model_file)


def test_a_weight_that_hides_another() -> None:
    """ONNX forbids it and its checker does not look: which of the two a node reads would be anybody's guess."""
    model = onnx.parser.parse_model(
        f"""{HEADER} g (float[2,2] x, bool c) => (float[2,2] y) <float[2,2] W = {{1,2,3,4}}> {{
            p = MatMul (x, W)
            y = If (c) <then_branch = t () => (float[2,2] a) <float[2,2] W = {{5,6,7,8}}> {{ a = MatMul (p, W) }},
                        else_branch = e () => (float[2,2] b) {{ b = MatMul (p, W) }}> }}"""
    )
    onnx.checker.check_model(model)
    assert "initializer 'W' of graph 't' has the name of a tensor around that graph" in refusal(model)


@pytest.mark.parametrize("field", ["producer_name", "doc_string", "domain"])
def test_texts_that_are_not_utf8(field: str, small_model: onnx.ModelProto, tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(small_model)
    setattr(model, field, "§§§")
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString().replace("§§§".encode(), b"\xff\xc2\xa7\xc2\xa7\xff"))
    assert refusal(path) == "m.onnx: a text in it is not UTF-8; the file is damaged"


def test_declared_types_that_do_not_exist(small_model: onnx.ModelProto) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(small_model)
    model.graph.input[0].type.tensor_type.elem_type = 65
    assert refusal(model) == "small: tensor 'image': unknown element type 65"


@pytest.mark.parametrize("text", ["image", "Relu", "batch_size", "conv_weight"])
def test_names_that_are_not_utf8(text: str, small_model: onnx.ModelProto, tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(small_model)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch_size"
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString().replace(text.encode(), b"\xff" * len(text)))
    assert "is not UTF-8 text; the file is damaged" in refusal(path)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Types that numpy lacks make graphsurgeon talk; stdout belongs to the user's data."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]> g (float[2,4] x) => (float[2,3] y) {
            q = Cast <to=17> (W) \n d = Cast <to=1> (q) \n y = MatMul (x, d) }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 3), np.float32), "W"))
    model.graph.value_info.append(helper.make_tensor_value_info("q", TensorProto.FLOAT8E4M3FN, [4, 3]))
    compile_model(model, out=tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def test_an_operator_set_from_the_future(small_model: onnx.ModelProto) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(small_model)
    model.opset_import[0].version = 99
    with pytest.raises(
        UnsupportedModelError, match=r"operator set 99, expected at most .*; upgrade onnx and onnxruntime"
    ):
        load_model_file(model)
