"""Processors whose int8 products overflow, and what sessions ask for there."""

from __future__ import annotations

import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from rerampile.runtime import processor
from rerampile.runtime.session import open_session

EXACT = "session.x64quantprecision"


@pytest.mark.parametrize(
    ("machine", "features", "saturates"),
    [
        ("x86_64", {"avx2"}, True),
        ("AMD64", {"avx2", "avx512_vnni"}, False),
        ("x86_64", {"avx2", "avx_vnni"}, False),
        ("aarch64", set(), False),
    ],
)
def test_sessions_ask_for_exact_products_where_int8_saturates(
    machine: str, features: set[str], saturates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere the same question would make int8 models slow."""
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(processor, "_features", lambda: frozenset(features))
    assert processor.int8_saturates() is saturates
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    open_session(model.SerializeToString(), options)
    if saturates:
        assert options.get_session_config_entry(EXACT) == "1"
    else:
        with pytest.raises(RuntimeError, match=EXACT):
            options.get_session_config_entry(EXACT)
