"""Verification: it passes what is right, and sees what is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from rerampile import (
    PASSES,
    FaultRunError,
    InternalError,
    Target,
    UnsupportedModelError,
    compile_model,
    verify_deployment,
)
from rerampile.runtime.compare import output_error, require_tolerance
from rerampile.tensor_file import TensorFile
from rerampile.unit import Unit

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("found", "reference", "error", "relative"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0, 0),
        ([1.5, -4.0], [1.0, -4.0], 0.5, 0.125),
        ([0.5], [0.0], 0.5, 0.5),  # nothing to compare with: the error itself
        ([NAN, 1.0], [NAN, 1.0], 0, 0),
        ([INF, 1.0], [INF, 2.0], 1, 0.5),
        ([NAN], [1.0], -1, -1),
        ([1.0], [NAN], -1, -1),
        ([INF], [-INF], -1, -1),
        ([1.0, 2.0], [1.0], -1, -1),
        ([], [], 0, 0),
        ([True, False], [True, True], 1, 1),
        ([2**62], [2**62], 0, 0),
    ],
)
def test_output_error(found: list[Any], reference: list[Any], error: float, relative: float) -> None:
    result = output_error("y", np.array(found), np.array(reference))
    assert (result.output, result.max_abs_error, result.relative_error) == ("y", error, relative)
    assert result.numbers == len(reference)


def test_outputs_of_other_kinds() -> None:
    """Sequences, maps and text are compared as well."""
    assert output_error("y", [np.ones(2), np.zeros(1)], [np.ones(2), np.zeros(1)]).relative_error == 0
    assert output_error("y", [np.ones(2)], [np.ones(2), np.zeros(1)]).relative_error == -1
    assert output_error("y", [{1: 0.5, 2: 0.25}], [{1: 0.5, 2: 0.5}]).relative_error == 0.125
    assert output_error("y", np.array(["cat"], object), np.array(["cat"], object)).relative_error == 0
    assert output_error("y", np.array(["cat"], object), np.array(["cow"], object)).relative_error > 0


def test_tolerance() -> None:
    error = output_error("y", np.array([1.5, -4.0]), np.array([1.0, -4.0]))
    require_tolerance([error], 0.125, "m.onnx")
    with pytest.raises(FaultRunError, match=r"m.onnx: output 'y' of the deployed model is off by 0.125 of its largest"):
        require_tolerance([error], 0.12, "m.onnx")
    with pytest.raises(FaultRunError, match="another shape, or is not finite where the reference is"):
        require_tolerance([output_error("y", np.array([NAN]), np.array([1.0]))], INF, "m.onnx")


@dataclass(frozen=True)
class Spoil:
    """A pass that changes what the map pass has found: what a bug would do."""

    factor: float
    name: str = "spoil"

    def run(self, unit: Unit) -> Unit:
        mapped = {k: replace(m, gain=(m.gain * np.float32(self.factor))) for k, m in unit.mapped.items()}
        return replace(unit, mapped=mapped)

    def summary(self, unit: Unit) -> Mapping[str, Any]:
        return {}


def test_a_wrong_weight_is_a_bug_that_is_seen(small_model: onnx.ModelProto, tmp_path: Path) -> None:
    passes = (*PASSES[:3], Spoil(0.5), *PASSES[3:])  # full scale is then clipped away
    with pytest.raises(InternalError, match=r"layer 'conv_weight': a decoded weight is .* off \(bound"):
        compile_model(small_model, out=tmp_path / "out", passes=passes)
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Program:
    """A pass behind emit that writes another value into one cell: what a bug of the encoder would do."""

    place: tuple[int, int, int, int]
    change: Callable[[Any], Any]
    name: str = "program"

    def run(self, unit: Unit) -> Unit:
        path = unit.folder / "conductances.safetensors"
        spec = TensorFile(path).specs[f"{unit.layers[0].name}.cells"]
        cells = np.memmap(path, spec.dtype, "r+", spec.offset, spec.shape)
        cells[self.place] = self.change(cells[self.place])
        cells.flush()
        return unit

    def summary(self, unit: Unit) -> Mapping[str, Any]:
        return {}


def product(parse_model: Callable[..., onnx.ModelProto], weights: list[list[float]]) -> onnx.ModelProto:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[2, 2] x) => (float[2, 2] y) { y = MatMul (x, w) }'
    return parse_model(text, w=np.array(weights, np.float32))


def test_a_zero_has_to_decode_to_zero(parse_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    """The last bit of a cell is well within what analog cells allow, but not where a weight was pruned."""
    model = product(parse_model, [[1, 2], [0, 4]])
    for place, refused in (((0, 0, 1, 1), False), ((0, 0, 0, 1), True)):
        program = Program(place, lambda cell: np.nextafter(cell, np.float32(0)))
        passes = (*PASSES[:5], program, PASSES[5])
        if not refused:
            compile_model(model, out=tmp_path / "out", passes=passes)
            continue
        with pytest.raises(InternalError, match=r"layer 'w': .*, or a pruned weight is not zero"):
            compile_model(model, out=tmp_path / "out", passes=passes)


def test_a_level_off_is_more_than_half_a_level(parse_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    """A weight of a quarter of a step is held as none; held as one it is three quarters off."""
    cell = {"g_off": 1e-6, "g_on": 1e-4, "levels": 4}
    target = Target.from_dict({"name": "coarse", "rows": 8, "columns": 8, "cell": cell})
    options: dict[str, Any] = {"target": target, "mapping": "two_column", "out": tmp_path / "out"}
    model = product(parse_model, [[3, 3], [0.25, 1]])
    compile_model(model, **options)
    program = Program((0, 0, 0, 1), lambda code: code + 1)
    with pytest.raises(InternalError, match=r"layer 'w': a decoded weight is 0.75 off \(bound 0.5"):
        compile_model(model, passes=(*PASSES[:5], program, PASSES[5]), **options)


def test_verification_before_emit_is_a_bug(small_model: onnx.ModelProto, tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="verify runs before emit"):
        compile_model(small_model, out=tmp_path / "out", passes=(PASSES[0], PASSES[-1]))


def test_what_the_plan_records(small_model: onnx.ModelProto, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", image=rng.standard_normal((7, 3, 4, 4), dtype=np.float32))
    deployment = compile_model(small_model, out=tmp_path / "out", inputs=tmp_path / "real.npz", tolerance=0.01)
    found = deployment.plan.verification
    assert found is not None
    assert (found.inputs, found.tolerance) == ("real.npz", 0.01)
    assert 0 < found.max_weight_error_of_bound <= 1
    assert [o.output for o in found.outputs] == ["scores"]
    (tmp_path / "real.npz").unlink()
    again = verify_deployment(deployment.folder)
    assert again.outputs[0].relative_error <= 1e-6
    assert again.tolerance == 0.01


def test_discrete_levels_are_compared_with_what_they_hold(small_model: onnx.ModelProto, tmp_path: Path) -> None:
    """Coarse levels change what the model says; that error is told apart from an error of the compiler."""
    cell = {"g_off": 1e-6, "g_on": 1e-4, "levels": 4}
    target = Target.from_dict({"name": "coarse", "rows": 64, "columns": 64, "cell": cell})
    found = compile_model(small_model, out=tmp_path / "out", target=target).plan.verification
    assert found is not None
    assert found.outputs[0].relative_error < 1e-5
    assert found.outputs_unquantised[0].relative_error > 0.01


def test_a_model_that_draws_random_numbers_says_so(parse_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    model = parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[64, 4] x) => (float[64, 4] y) '
        "{ d = Dropout(x, ratio, training) y = MatMul(d, w) }",
        w=np.eye(4, dtype=np.float32),
        ratio=np.array(0.5, np.float32),
        training=np.array(True),
    )
    with pytest.raises(UnsupportedModelError, match=r"\(Dropout\) draws random numbers: no two runs agree"):
        compile_model(model, out=tmp_path / "out")


def test_outputs_of_nothing_but_nan_prove_nothing(parse_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    model = parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1, 4] x) => (float[1, 4] y) '
        "{ p = MatMul(x, w) a = Abs(p) n = Neg(a) y = Log(n) }",
        w=np.eye(4, dtype=np.float32),
    )
    with pytest.raises(FaultRunError, match="every output is NaN, so that nothing can be compared"):
        compile_model(model, out=tmp_path / "out")


def test_inputs_that_give_no_outputs_prove_nothing(small_model: onnx.ModelProto, tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", image=np.zeros((0, 3, 4, 4), np.float32))
    with pytest.raises(FaultRunError, match=r"none\.npz: every output is empty for these inputs"):
        compile_model(small_model, out=tmp_path / "out", inputs=tmp_path / "none.npz")
    assert not (tmp_path / "out").exists()
