"""Full scales of partitions: segments, what the plan says of them, and what the deployed model computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from rerampile import Deployment, PlanFormatError, Target, compile_model, load_deployment, verify_deployment
from rerampile.cli import main
from rerampile.commands.options import scale_option
from rerampile.layer_plan import LayerPlan
from rerampile.plan import Conventions, Plan, decode_plan, encode_plan
from rerampile.plan_schema import plan_schema
from rerampile.runtime.executor import open_executor
from rerampile.runtime.fault_map import ChipGeometry
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.runtime.inject import Injector
from rerampile.runtime.session import open_session, run
from rerampile.schemes import SCALES, SCHEMES
from rerampile.segments import Segments

Floats = npt.NDArray[np.float32]
ANALOG = {"g_off": 1e-6, "g_on": 1e-4}
needs = st.lists(st.booleans(), min_size=1, max_size=60).map(lambda flags: np.array(flags, np.bool_))


@given(needed=needs, rows=st.integers(1, 20))
def test_segments_are_the_fewest_that_fit_the_rows(needed: npt.NDArray[np.bool_], rows: int) -> None:
    segments = Segments.by_rows(needed, rows)

    joined = np.concatenate([np.arange(len(needed))[part] for part in segments.slices])
    np.testing.assert_array_equal(joined, np.arange(len(needed)))
    counts = [int(needed[part].sum()) for part in segments.slices]
    assert all(count == rows for count in counts[:-1])
    assert counts[-1] <= rows
    assert counts[-1] or len(counts) == 1


@given(needed=needs, rows=st.integers(1, 20), seed=st.integers(0, 99))
def test_what_belongs_to_segments(needed: npt.NDArray[np.bool_], rows: int, seed: int) -> None:
    """Beside loops over inputs."""
    segments, rng = Segments.by_rows(needed, rows), np.random.default_rng(seed)
    weights = rng.standard_normal((3, len(needed))).astype(np.float32) * (rng.random(len(needed)) < 0.5)
    number = [sum(start <= i for start in segments.starts) - 1 for i in range(len(needed))]
    values = rng.standard_normal((3, len(segments.starts)))

    np.testing.assert_array_equal(segments.number_of(np.arange(len(needed))), number)
    spread = np.broadcast_to(segments.spread(values), weights.shape)
    np.testing.assert_array_equal(spread, values[:, number])
    np.testing.assert_array_equal(segments.at(values, np.arange(weights.size)), spread.reshape(-1))
    largest = [[np.abs(row)[np.array(number) == k].max() for k in range(values.shape[1])] for row in weights]
    np.testing.assert_array_equal(segments.full_scale(weights), np.maximum(largest, np.finfo(np.float32).tiny))
    some = np.flatnonzero(rng.random(len(needed)) < 0.7)
    parts = list(segments.cut(some))
    assert [index for part in parts for index in part] == some.tolist()
    assert all(len(part) and len({number[i] for i in part}) == 1 for part in parts)


# Groups that take one array and several, a depthwise layer, rows and columns of zeros, and weights of all sizes.
TEXT = """
<ir_version: 8, opset_import: ["" : {opset}]>
small (float[N, 6, 4, 4] image) => (float[N, 21] scores) {{
    a = Conv <kernel_shape = [3, 3], group = 2, pads = [1, 1, 1, 1]> (image, grouped)
    b = Conv <kernel_shape = [3, 3], group = 8, pads = [1, 1, 1, 1]> (a, depthwise)
    c = Flatten (b)
    scores = MatMul (c, dense)
}}
"""


def weights() -> dict[str, Floats]:
    rng = np.random.default_rng(3)
    made = {
        "grouped": rng.standard_t(3, (8, 3, 3, 3)).astype(np.float32),
        "depthwise": rng.standard_normal((8, 1, 3, 3), np.float32),
        "dense": rng.standard_t(2, (128, 21)).astype(np.float32),
    }
    made["dense"][5:40:3] = 0
    made["dense"][:, 7] = 0
    made["dense"][60:, 3] = 0
    made["grouped"][6, 1] = 0
    return made


def target_of(rows: int = 20, columns: int = 44, **keys: Any) -> Target:
    return Target.from_dict({"name": "small", "rows": rows, "columns": columns, "cell": ANALOG, **keys})


@pytest.fixture(scope="module")
def model(parse_model: Callable[..., onnx.ModelProto]) -> onnx.ModelProto:
    return parse_model(TEXT.format(opset=17), **weights())


@pytest.fixture
def deployment(model: onnx.ModelProto, tmp_path: Path) -> Deployment:
    return compile_model(model, out=tmp_path / "out", target=target_of(), scale="partition")


def outputs(deployment: Deployment) -> Floats:
    image = np.random.default_rng(1).standard_normal((5, 6, 4, 4), np.float32)
    (found,) = run(open_session(deployment.model_path), {"image": image})
    return np.asarray(found, np.float32)


def layer_of(deployment: Deployment, name: str) -> LayerPlan:
    return deployment.layer(name)


def test_each_output_of_each_partition_fills_its_cells(deployment: Deployment) -> None:
    """What is decoded is what is held, and the largest weight of every column of an array takes all of a cell."""
    for layer in deployment.plan.layers:
        cells, original = deployment.cells(layer), weights()[layer.name]
        np.testing.assert_allclose(deployment.weights(layer), layer.view.matrix(original), rtol=0, atol=1e-5)
        for array in deployment.plan.arrays:
            for part in (p for p in array.partitions if p.layer == deployment.plan.layers.index(layer)):
                for group in range(*part.groups):
                    rows = group * layer.outputs + np.array(part.output_indices)
                    held = cells[0][:, rows][:, :, part.input_indices]
                    used = np.abs(held[0] - held[1]).max(axis=1)
                    muted = ~layer.view.matrix(original)[np.ix_(rows, part.input_indices)].any(axis=1)
                    np.testing.assert_allclose(used, np.where(muted, 0, 99e-6), rtol=1e-5)


def test_segments_are_what_arrays_hold(deployment: Deployment) -> None:
    assert [len(segments_of(layer)) for layer in deployment.plan.layers] == [2, 1, 6]
    assert segments_of(layer_of(deployment, "grouped")) == [(0, 20), (20, 27)]
    (_, first_end), *_ = segments_of(layer_of(deployment, "dense"))
    assert first_end == 28  # with eight rows of zeros among the first 28
    assert deployment.gain(layer_of(deployment, "dense")).shape == (21, 6)
    assert deployment.gain(layer_of(deployment, "depthwise")).shape == (8, 1)
    assert (deployment.gain(layer_of(deployment, "dense"))[3, 3:] < 1e-30).all()  # no weights, but cells


def segments_of(layer: LayerPlan) -> list[tuple[int, int]]:
    assert isinstance(layer.segments, list)
    return layer.segments


def test_segments_take_no_more_arrays(model: onnx.ModelProto, deployment: Deployment, tmp_path: Path) -> None:
    plain = compile_model(model, out=tmp_path / "plain", target=target_of())
    assert deployment.plan.totals.arrays == plain.plan.totals.arrays
    assert deployment.plan.totals.weights_without_cells == plain.plan.totals.weights_without_cells


@pytest.mark.parametrize("rows", [128, 20])
@pytest.mark.parametrize(
    "keys", [{}, {"cell": {**ANALOG, "levels": 16}}, {"cell": {**ANALOG, "levels": 4}, "slices": 3}]
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_are_those_of_the_weights(
    scheme: str, keys: dict[str, Any], rows: int, model: onnx.ModelProto, tmp_path: Path
) -> None:
    """Verified while compiling and again; analog cells give the same outputs as one scale a channel, to 1e-5."""
    target = target_of(rows, **keys)
    deployment, plain = (
        compile_model(model, out=tmp_path / scale, target=target, mapping=scheme, scale=scale, pack=True)  # type: ignore[arg-type]
        for scale in ("partition", "channel")
    )
    verify_deployment(deployment.folder)
    found, expected = outputs(deployment), outputs(plain)
    size = np.abs(expected).max()
    if not keys:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * size)
        return
    for layer, other in zip(deployment.plan.layers, plain.plan.layers, strict=True):
        original = layer.view.matrix(weights()[layer.name])
        rounding, coarser = (
            np.square(d.weights(p) - original).mean() for d, p in ((deployment, layer), (plain, other))
        )
        assert rounding <= coarser * (0.9 if len(segments_of(layer)) > 1 else 1)


@pytest.mark.parametrize("opset", [7, 8, 9, 13, 21])
def test_every_operator_set(opset: int, parse_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    deployment = compile_model(
        parse_model(TEXT.format(opset=opset), **weights()), out=tmp_path / "out", target=target_of(), scale="partition"
    )
    assert deployment.plan.verification is not None
    assert deployment.plan.verification.outputs[0].relative_error < 1e-5


def test_fast_and_slow_agree(parse_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    """Weights of chips set in the optimised graph, and a session for each chip."""
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 50] x) => (float[N, 6] y) { y = MatMul (x, W) }'
    model = parse_model(text, W=np.random.default_rng(0).standard_t(2, (50, 6)).astype(np.float32))
    deployment = compile_model(model, out=tmp_path / "out", target=target_of(8, 12), scale="partition", pack=True)
    fast, slow = (open_executor(deployment, method=method) for method in ("fast", "slow"))  # type: ignore[arg-type]
    inputs = {"x": np.random.default_rng(1).standard_normal((4, 50), np.float32)}
    for number in range(3):
        faults = draw_faults(ChipGeometry.of(deployment), FaultModel.of_rate(0.1), target_of(8, 12), seed=1, run=number)
        results = []
        for executor in (fast, slow):
            executor.apply(Injector(deployment).faults(faults))
            results.append(executor.run(inputs)[0])
            executor.restore()
        np.testing.assert_allclose(*results, rtol=0, atol=1e-5 * np.abs(results[1]).max())
        assert np.abs(results[0] - slow.run(inputs)[0]).max() > 0.01


def test_arithmetic_is_folded_away(deployment: Deployment, tmp_path: Path) -> None:
    """ONNX Runtime runs the operators alone: gains are spread over inputs when a session opens, not when it runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(deployment.model_path, options)
    nodes = onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node
    assert sorted(node.op_type for node in nodes) == ["Conv", "Conv", "Flatten", "MatMul"]


def test_the_plan_reads_back(deployment: Deployment) -> None:
    data = (deployment.folder / "plan.json").read_bytes()
    plan = decode_plan(data, "plan.json")
    assert encode_plan(plan) == data
    jsonschema.validate(json.loads(data), plan_schema())
    assert plan.options["scale"] == "partition"
    assert plan.conventions.weight.startswith("w = gain[output, segment of the input] * (")
    assert Conventions.of([]).weight.startswith("w = gain[output] * (")


def test_other_scales_have_no_segments(model: onnx.ModelProto, tmp_path: Path) -> None:
    plain = compile_model(model, out=tmp_path / "out", target=target_of())
    assert "segments" not in (plain.folder / "plan.json").read_text()


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"segments": msgspec.UNSET}, "scale partition with segments [], expected ranges one after another"),
    "for channels": ({"scale": "channel"}, "tensor 'grouped.gain': float32 [8, 2], expected float32 [8]"),
    "gap": (
        {"segments": [(0, 20), (21, 27)]},
        "segments [[0, 20], [21, 27]], expected ranges one after another from 0 to",
    ),
    "short": (
        {"segments": [(0, 20), (20, 26)]},
        "from 0 to 27 for scale partition, none for others; the plan was chan",
    ),
    "empty": ({"segments": [(0, 0), (0, 27)]}, "segments [[0, 0], [0, 27]], expected ranges one after another"),
    "too few": ({"segments": [(0, 27)]}, "tensor 'grouped.gain': float32 [8, 2], expected float32 [8, 1]"),
    "other": ({"segments": [(0, 9), (9, 27)]}, "inputs 0 to 19 on one array are of two segments, which have gains of"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_segments_that_do_not_hold_together(case: str, deployment: Deployment) -> None:
    change, message = CHANGES[case]

    def edited(plan: Plan) -> Plan:
        layer = msgspec.structs.replace(plan.layers[0], **change)
        return msgspec.structs.replace(plan, layers=[layer, *plan.layers[1:]])

    (deployment.folder / "plan.json").write_bytes(encode_plan(edited(deployment.plan)))
    with pytest.raises(PlanFormatError) as refused:
        verify_deployment(deployment.folder)
    assert message in str(refused.value)


def test_segments_of_another_scale(model: onnx.ModelProto, tmp_path: Path) -> None:
    plain = compile_model(model, out=tmp_path / "out", target=target_of())
    layer = msgspec.structs.replace(plain.plan.layers[0], segments=[(0, 27)])
    plan = msgspec.structs.replace(plain.plan, layers=[layer, *plain.plan.layers[1:]])
    (plain.folder / "plan.json").write_bytes(encode_plan(plan))
    with pytest.raises(
        PlanFormatError, match=r"scale channel with segments \[\[0, 27\]\], expected .* none for others"
    ):
        verify_deployment(plain.folder)


def test_auto_counts_segments(model: onnx.ModelProto, tmp_path: Path) -> None:
    """Less error is expected of smaller full scales, by each scheme, and the same where a layer takes one array."""
    errors = {}
    for scale in ("partition", "channel"):
        options: dict[str, Any] = {"mapping": "auto", "faults": FaultModel.of_rate(0.01), "scale": scale}
        deployment = compile_model(model, out=tmp_path / scale, target=target_of(), **options)
        choices = [layer.choice for layer in deployment.plan.layers if layer.choice is not None]
        errors[scale] = np.array([[estimate.error for estimate in choice.estimates] for choice in choices])
    assert errors["partition"].shape == (3, len(SCHEMES))
    assert (errors["partition"][[0, 2]] < 0.95 * errors["channel"][[0, 2]]).all()
    np.testing.assert_allclose(errors["partition"][1], errors["channel"][1], rtol=1e-12)


def test_the_scales_on_offer_are_those_there_are() -> None:
    def command() -> None: ...

    scale_option(command)
    (option,) = command.__click_params__  # type: ignore[attr-defined]
    assert tuple(option.type.choices) == SCALES


def test_the_command_line(model: onnx.ModelProto, tmp_path: Path) -> None:
    """Compiled, shown, verified, run with faults, predicted and programmed."""
    onnx.save(model, tmp_path / "m.onnx")

    def call(*words: object, code: int = 0) -> str:
        done = CliRunner().invoke(main, [str(word) for word in words], env={"COLUMNS": "200"})
        assert done.exit_code == code, done.output
        return done.output

    folder = tmp_path / "m"
    assert "scale partition" in call(
        "compile", tmp_path / "m.onnx", "-o", folder, "--scale", "partition", "--set", "rows=20"
    )
    assert load_deployment(folder).plan.target["rows"] == 20
    assert "one scale a partition" in call("show", folder)
    assert "m.onnx" in call("show", folder, "-v")
    call("show", folder, "--array", 0)
    assert "verified" in call("verify", folder)
    rates = ("--failure-rate", "0.05", "--images", 4, "-q")
    call("validate", folder, "--runs", 2, *rates, "-o", tmp_path / "r")
    assert "partition scale" in (tmp_path / "r" / "report.html").read_text()
    call("predict", folder, *rates, "-o", tmp_path / "p")
    call("faults", "draw", folder, "--failure-rate", "0.05", "-o", tmp_path / "chip.safetensors")
    call("program", folder, "--fault-map", tmp_path / "chip.safetensors", "-o", tmp_path / "chip", "-q")
    assert "verified" in call("verify", tmp_path / "chip")
