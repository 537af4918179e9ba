"""The tree of errors, each with one message that says what, where, expected against found, and how to mend it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import rerampile
from rerampile import errors
from rerampile.errors import did_you_mean
from rerampile.tensor_file import TensorWriter

MISTAKES = {
    "ModelError": lambda model, folder: rerampile.compile_model(folder / "none.onnx", out=folder / "out"),
    "UnsupportedModelError": lambda model, folder: rerampile.compile_model(
        onnx.parser.parse_model('<ir_version: 8, opset_import: ["":17]> g (float[2] x) => (float[2] y) {y = Relu(x)}'),
        out=folder / "out",
    ),
    "ConfigError": lambda model, folder: rerampile.compile_model(model, out=folder / "out", mapping="none"),
    "CapacityError": lambda model, folder: rerampile.compile_model(
        model, out=folder / "out", target=target(arrays_per_core=1)
    ),
    "PlanFormatError": lambda model, folder: rerampile.load_deployment(folder),
    "DataError": lambda model, folder: rerampile.compile_model(model, out=folder / "out", inputs=folder / "none.npz"),
    "FaultRunError": lambda model, folder: rerampile.compile_model(model, out=folder / "out", tolerance=1e-30),
}


def target(**keys: Any) -> rerampile.Target:
    cell = {"g_off": 1e-6, "g_on": 1e-4}
    return rerampile.Target.from_dict({"name": "small", "rows": 16, "columns": 16, "cell": cell, **keys})


@pytest.mark.parametrize("name", MISTAKES)
def test_every_error_is_one_clear_line(name: str, small_model: onnx.ModelProto, tmp_path: Path) -> None:
    kind: type[Exception] = getattr(errors, name)
    with pytest.raises(kind) as caught:
        MISTAKES[name](small_model, tmp_path)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    assert 30 < len(message) < 700
    assert any(word in message for word in ("expected", "cannot be read", "not a readable", "no such", "needs"))
    assert "{" not in message
    assert "  " not in message


def test_every_class_has_a_mistake() -> None:
    """No error class is without a message test."""
    raised = {name for name in errors.__all__ if name.endswith("Error")}
    assert raised == {*MISTAKES, "RerampileError", "InternalError"}


def test_internal_errors_are_bugs_not_mistakes(tmp_path: Path) -> None:
    assert not issubclass(errors.InternalError, errors.RerampileError)
    with (
        pytest.raises(errors.InternalError, match="tensor 'a' was never written"),
        TensorWriter(tmp_path / "t", [("a", np.float32, (1,))], {}),
    ):
        pass


def test_the_tree() -> None:
    for name in MISTAKES:
        assert issubclass(getattr(errors, name), errors.RerampileError)
    assert issubclass(errors.UnsupportedModelError, errors.ModelError)
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.PlanFormatError, ValueError)


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("papper", ["paper", "puma"], " (did you mean paper?)"),
        ("fc_wieght", ["conv_weight", "fc_weight"], " (did you mean fc_weight, conv_weight?)"),
        ("zzz", ["b", "a"], " (known: a, b)"),
        ("zzz", [], " (known: none)"),
        ("", ["a"], " (known: a)"),
    ],
)
def test_did_you_mean(word: str, known: list[str], expected: str) -> None:
    assert did_you_mean(word, known) == expected


def test_did_you_mean_does_not_list_thousands() -> None:
    """A model of many layers must not answer a wrong name with all of them."""
    hint = did_you_mean("zzz", [f"layer{n}" for n in range(5000)])
    assert hint.startswith(" (known: layer0, layer1, ")
    assert hint.endswith(" and 4980 more)")
    assert len(hint) < 500
