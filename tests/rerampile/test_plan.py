"""Plans and deployment folders that were changed, cut or made up: what reads them finds it and says where."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from rerampile import (
    Deployment,
    FaultRunError,
    PlanFormatError,
    RerampileError,
    Target,
    compile_model,
    load_deployment,
    verify_deployment,
)
from rerampile.plan import FORMAT_VERSION, NO_SHA256, decode_plan, encode_plan
from rerampile.target import Cell

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def compiled(small_model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, pruned, on twin arrays of 64 x 64 four-level cells."""
    target = Target(
        name="small",
        rows=64,
        columns=64,
        slices=2,
        pair_layout="twin",
        cell=Cell(g_off=1e-6, g_on=1e-4, levels=4),
    )
    return compile_model(small_model, out=tmp_path_factory.mktemp("plan") / "out", target=target, prune=0.9).folder


@pytest.fixture
def folder(compiled: Path, tmp_path: Path) -> Path:
    """A copy of the deployment to change."""
    copy = tmp_path / "out"
    copy.mkdir()
    for path in compiled.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def change(folder: Path, edit: Change, seal: bool = True) -> None:
    """Change the plan, and its own hash with it: whoever tampers can do that as well."""
    plan = json.loads((folder / "plan.json").read_bytes())
    edit(plan)
    if seal:
        plan["plan_sha256"] = NO_SHA256
        digest = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
        plan["plan_sha256"] = digest
    (folder / "plan.json").write_text(json.dumps(plan))


def refusal(folder: Path, what: Callable[[Path], object] = verify_deployment) -> str:
    with pytest.raises(PlanFormatError) as caught:
        what(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_deployment_passes(folder: Path) -> None:
    verification = verify_deployment(folder)
    assert [o.relative_error for o in verification.outputs] == [0.0]
    assert load_deployment(folder / "plan.json").plan == load_deployment(folder).plan


def test_json_round_trip(folder: Path) -> None:
    data = (folder / "plan.json").read_bytes()
    plan = decode_plan(data, "plan.json")
    assert encode_plan(plan) == data
    assert json.loads(data)["format"] == "rerampile-plan"
    assert all(len(line) < 2000 for line in data.decode().splitlines())


def set_to(*path: Any, value: Any) -> Change:
    def edit(plan: dict[str, Any]) -> None:
        for key in path[:-1]:
            plan = plan[key]
        plan[path[-1]] = value

    return edit


def both(**fields: Any) -> Change:
    """Change the first partition alike on the first array and its twin."""

    def edit(plan: dict[str, Any]) -> None:
        for array in plan["arrays"][:2]:
            array["partitions"][0].update(fields)

    return edit


MALFORMED: dict[str, tuple[Change, str]] = {
    "newer version": (
        set_to("format_version", value=FORMAT_VERSION + 1),
        f"$.format_version: {FORMAT_VERSION + 1}, expected at most {FORMAT_VERSION}; it was written by a newer",
    ),
    "much newer version": (set_to("format_version", value=10**30), "$.format_version: 1000"),
    "older version": (set_to("format_version", value=0), "$.format_version"),
    "another format": (set_to("format", value="tiles"), "$.format"),
    "missing field": (lambda plan: plan.pop("layers"), "missing required field `layers`"),
    "missing inner field": (lambda plan: plan["layers"][1].pop("scheme"), "field `scheme` - at `$.layers[1]`"),
    "unknown field": (set_to("colour", value="red"), "unknown field `colour`"),
    "unknown inner field": (set_to("arrays", 0, "colour", value=1), "unknown field `colour` - at `$.arrays[0]`"),
    "wrong type": (set_to("layers", 0, "groups", value="1"), "`$.layers[0].groups`"),
    "negative": (set_to("arrays", 0, "partitions", 0, "row", value=-1), "`$.arrays[0].partitions[0].row`"),
    "fraction": (set_to("layers", 0, "outputs", value=1.5), "`$.layers[0].outputs`"),
    "unknown scheme": (set_to("layers", 0, "scheme", value="spiral"), "`$.layers[0].scheme`"),
    "hash": (set_to("model", "sha256", value="0" * 63), "`$.model.sha256`"),
    "range of three": (set_to("arrays", 0, "partitions", 0, "groups", value=[0, 1, 2]), "partitions[0].groups"),
    "path": (
        lambda plan: plan["files"].update({"../../etc/passwd": plan["files"]["deployed.onnx"]}),
        "$.files: '../../etc/passwd' is a path, expected the name of a file beside it",
    ),
    "absolute path": (
        lambda plan: plan["files"].update({"/etc/passwd": plan["files"]["deployed.onnx"]}),
        "$.files: '/etc/passwd' is a path",
    ),
    "parent": (lambda plan: plan["files"].update({"..": plan["files"]["deployed.onnx"]}), "'..'"),
    "target": (set_to("target", "cell", "g_on", value=0), "$.target: cell.g_on: expected"),
    "target key": (set_to("target", "colour", value=0), "$.target: colour: unknown key"),
    "not completed": (set_to("verification", value=None), "$.verification: missing, the folder was never completed"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_plans(case: str, folder: Path) -> None:
    edit, message = MALFORMED[case]
    change(folder, edit)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"format": "rerampile-plan"',
        b"\xff\xfe{}",
        b'{"format": "\xff"}',
        b'{"target": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"target": {"rows": ' + b"9" * 100_000 + b"}}",
        b'{"format_version": ' + b"9" * 4000 + b"}",
        b'{"totals": {"layers": 1e999}}',
    ],
)
def test_hostile_json(content: bytes, folder: Path) -> None:
    (folder / "plan.json").write_bytes(content)
    assert len(refusal(folder)) < 5000


MISPLACED: dict[str, tuple[Change, str]] = {
    "overlapping": (
        lambda plan: [array["partitions"].append(array["partitions"][0]) for array in plan["arrays"][:2]],
        "$.arrays[0]: two partitions share a row",
    ),
    "sharing a column": (
        lambda plan: [a["partitions"].append(a["partitions"][0] | {"row": 40}) for a in plan["arrays"][:2]],
        "$.arrays[0]: two partitions share a column",
    ),
    "too low": (both(row=60), "$.arrays[0]: partitions reach row "),
    "too far right": (both(column=60), "$.arrays[0]: partitions reach column "),
    "missing array": (lambda plan: plan["arrays"].pop(), "$.arrays[4]: twin 5, expected an array of the plan"),
    "missing set of arrays": (
        lambda plan: (plan["arrays"].pop(), plan["arrays"].pop()),
        "layer 'fc_weight': weight [",
    ),
    "missing region": (lambda plan: plan["skipped"].pop(), "sits in 0 places, expected 1"),
    "region twice": (lambda plan: plan["skipped"].append(plan["skipped"][0]), "sits in 2 places, expected 1"),
    "id": (set_to("arrays", 1, "id", value=0), "$.arrays[1]: id 0 with 1 partitions, expected id 1"),
    "empty array": (set_to("arrays", 0, "partitions", value=[]), "$.arrays[0]: id 0 with 0 partitions"),
    "layer": (set_to("arrays", 0, "partitions", 0, "layer", value=2), "$.arrays[0]: layer 2, expected 0 to 1"),
    "layer of a region": (set_to("skipped", 0, "layer", value=2), "$.skipped[0]: layer 2, expected 0 to 1"),
    "group": (set_to("arrays", 0, "partitions", 0, "groups", value=[1, 2]), "$.arrays[0]"),
    "group of a region": (set_to("skipped", 0, "group", value=1), "$.skipped[0]: group 1, expected 0 to 0"),
    "too many groups": (both(groups=[0, 10**15]), "$.arrays[0]: groups [0, 1000000000000000), expected some of 1"),
    "groups backwards": (both(groups=[1, 0]), "$.arrays[0]: groups [1, 0), expected some of 1"),
    "too many inputs": (both(inputs=[0, 10**15], input_index=None), "$.arrays[0]: partitions reach row 10000000"),
    "no inputs": (both(inputs=[3, 3], input_index=None), "$.arrays[0]: inputs [3, 3], expected some of 0 to "),
    "backwards": (both(inputs=[3, 1], input_index=None), "$.arrays[0]: inputs [3, 1], expected some of 0 to"),
    "beyond the matrix": (both(inputs=[100, 129], input_index=None), "expected some of 0 to "),
    "neither range nor list": (both(inputs=None, input_index=None), "expected either 'inputs' or 'input_index'"),
    "both range and list": (both(inputs=[0, 2], input_index=[0, 1]), "expected either 'inputs' or 'input_index'"),
    "listed twice": (both(inputs=None, input_index=[1, 1, 2]), "$.arrays[0]: input_index lists one twice"),
    "too few rows": (set_to("arrays", 0, "partitions", 0, "input_rows", value=[0, 1]), "input_rows [0, 1], expected"),
    "slots in no order": (
        both(outputs=[0, 2], output_index=None, output_slots=[1, 0]),
        "$.arrays[0]: output_slots [1, 0], expected 2 numbers, ascending",
    ),
    "slots beyond the array": (
        both(outputs=[0, 2], output_index=None, output_slots=[0, 10**6]),
        "$.arrays[0]: partitions reach column",
    ),
    "roles": (set_to("arrays", 0, "roles", value=["minus"]), "$.arrays[0]: roles"),
    "no roles": (set_to("arrays", 0, "roles", value=[]), "$.arrays[0]: "),
    "slices": (set_to("arrays", 0, "slices", value=[0]), "$.arrays[0]: roles"),
    "slices twice": (set_to("arrays", 0, "slices", value=[0, 0]), "$.arrays[0]: roles ['plus', 'minus'] and slices"),
    "twins that differ": (set_to("arrays", 1, "partitions", 0, "column", value=2), "differs from its twin, array 1"),
    "no twin": (set_to("arrays", 0, "twin", value=None), "$.arrays[0]: roles"),
    "its own twin": (set_to("arrays", 0, "twin", value=0), "$.arrays[0]"),
    "address": (set_to("arrays", 1, "array", value=0), "$.arrays[1]: has the address of an earlier array"),
    "no such address": (set_to("arrays", 1, "chip", value=1), "$.arrays[1]: target small: chip 1 does not exist"),
    "huge layer": (set_to("layers", 0, "inputs", value=10**15), "conv_weight.cells': uint8 [2, 2, 8, 27], expected"),
    "slices of a layer": (set_to("layers", 0, "slices", value=1), "conv_weight.cells': uint8 [2, 2, 8, 27], expected"),
    "scheme": (set_to("layers", 0, "scheme", value="two_column"), "layer 'conv_weight': "),
    "significances": (set_to("layers", 0, "significances", value=[1, 2]), "significances [1.0, 2.0], expected [1.0, 4"),
    "unit": (set_to("layers", 0, "unit", value="S"), "unit S, expected level, as scheme differential and the target"),
    "zero cells": (set_to("layers", 0, "zero_cells", value=[[0, 0]] * 2), "zero_cells [[0, 0], [0, 0]], expected [[3"),
    "reference": (set_to("layers", 0, "reference", value=5.0), "reference 5.0, expected None, as scheme differential"),
    "common modes": (
        set_to("layers", 0, "common_modes", value=[1.0, 1.0]),
        "layer 'conv_weight': 2 common modes, expected 0 for scheme differential in 2 slices; the plan was changed",
    ),
    "no common modes": (
        set_to("layers", 0, "scheme", value="optimal"),
        "layer 'conv_weight': 0 common modes, expected 2 for scheme optimal in 2 slices",
    ),
    "cells of a weight": (set_to("layers", 0, "cells", value=1), "$.arrays[0]: roles ['plus', 'minus'] and slices"),
    "tensor": (set_to("layers", 0, "cells_tensor", value="x"), "no tensor 'x'; it belongs to another plan"),
    "another layer's tensor": (set_to("layers", 0, "cells_tensor", value="fc_weight.cells"), "fc_weight.cells': uint8"),
    "another layer's gain": (set_to("layers", 0, "gain_tensor", value="fc_weight.gain"), "fc_weight.gain': float32"),
    "weight shape": (set_to("layers", 0, "weight_shape", value=[8, 27]), "bool [8, 3, 3, 3], expected bool [8, 27]"),
    "weight shape of other weights": (
        set_to("layers", 0, "weight_shape", value=[9, 27]),
        "and weight_shape [9, 27] are",
    ),
    "stored shape": (set_to("layers", 0, "stored_shape", value=[8, 28]), "stored_shape [8, 28], permutation None and"),
    "permutation": (
        set_to("layers", 0, "permutation", value=[0, 1, 1, 2]),
        "permutation [0, 1, 1, 2] and weight_shape",
    ),
    "file not listed": (lambda plan: plan["files"].pop("deployed.onnx"), "$.files: 'deployed.onnx' is missing"),
    "masks not listed": (
        lambda plan: plan["files"].pop("masks.safetensors"),
        "$.files: 'masks.safetensors' is missing",
    ),
    "checksum": (set_to("files", "deployed.onnx", "sha256", value="0" * 64), "deployed.onnx: sha256"),
    "decoded": (set_to("layers", 0, "decoded_sha256", value="0" * 64), "layer 'conv_weight': decoded weights differ"),
}


@pytest.mark.parametrize("case", MISPLACED)
def test_plans_that_do_not_hold_together(case: str, folder: Path) -> None:
    edit, message = MISPLACED[case]
    change(folder, edit)
    assert message in refusal(folder)


def add(*path: Any, by: float = 1) -> Change:
    def edit(plan: dict[str, Any]) -> None:
        for key in path[:-1]:
            plan = plan[key]
        plan[path[-1]] += by

    return edit


RECOUNTED: dict[str, tuple[Change, str]] = {
    **{
        f"totals.{field}": (add("totals", field), rf"$.totals.{field}: ")
        for field in ("layers", "weights", "zeros", "arrays", "partitions", "cells", "cells_used")
    },
    **{
        f"totals.{field}": (add("totals", field), rf"$.totals.{field}: ")
        for field in ("arrays_saved_by_pruning", "arrays_saved_by_packing", "weights_without_cells")
    },
    "totals.sparsity": (set_to("totals", "sparsity", value=0.25), "$.totals.sparsity: 0.25, expected 0.899"),
    "totals.utilisation": (set_to("totals", "utilisation", value=0.25), "$.totals.utilisation: 0.25, expected 0."),
    "totals.mean_pair_conductance": (add("totals", "mean_pair_conductance", by=1e-6), "$.totals.mean_pair_cond"),
    "totals.digital_operations": (add("totals", "digital_operations"), "digital_operations: 3, expected 2; the plan"),
    "conventions": (
        set_to("conventions", "rows", value="bit lines"),
        "$.conventions.rows: bit lines, expected word lines; inputs of a matrix",
    ),
    "fewer zeros than were pruned": (add("layers", 0, "zeros", by=-1), "$.layers[0].zeros: 193, expected 194 to "),
    "more zeros than there are": (set_to("layers", 0, "zeros", value=216), "$.layers[0].zeros: 216, expected 194 to "),
    "sparsity": (set_to("layers", 1, "sparsity", value=0.1), "$.layers[1].sparsity: 0.1, expected 0."),
    "kept": (add("layers", 0, "mask", "kept"), "$.layers[0].mask.kept: 23, expected 22; the plan was changed"),
    "total": (add("layers", 0, "mask", "total"), "$.layers[0].mask.total: 217, expected 216; the plan was changed"),
    "mean cell": (add("layers", 0, "mean_cell_conductance", by=1e-7), "$.layers[0].mean_cell_conductance: "),
    "digital node": (
        set_to("digital", 0, "node", value="Relu_passive"),
        "$.digital[0]: 'Relu_passive' (Relu), expected 'Relu_active' (Relu) as in deployed.onnx",
    ),
    "digital operator": (
        set_to("digital", 0, "op", value="Sin"),
        "'Relu_active' (Sin), expected 'Relu_active' (Relu)",
    ),
    "digital node left out": (
        lambda plan: (plan["digital"].pop(), plan["totals"].update(digital_operations=1)),
        "$.digital[1]: none, expected 'Flatten_flat' (Flatten) as in deployed.onnx",
    ),
    "operator of a use": (
        set_to("layers", 0, "uses", 0, "op", value="Gemm"),
        "$.layers[0].uses: 'Conv_features' (Gemm), expected 'Conv_features' (Conv) as in deployed.onnx",
    ),
    "one use more": (
        lambda plan: plan["layers"][0]["uses"].append(plan["layers"][0]["uses"][0]),
        "'Conv_features' (Conv), 'Conv_features' (Conv), expected 'Conv_features' (Conv) as in deployed.onnx",
    ),
}


@pytest.mark.parametrize("case", RECOUNTED)
def test_what_a_plan_says_twice(case: str, folder: Path) -> None:
    edit, message = RECOUNTED[case]
    change(folder, edit)
    assert message in refusal(folder)


def test_names_of_nodes_and_the_cells_that_they_read(small_model: onnx.ModelProto, tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(small_model)
    for node in model.graph.node:
        node.name = f"my {node.op_type}"
    folder = compile_model(model, out=tmp_path / "out").folder
    verify_deployment(folder)
    change(folder, set_to("layers", 0, "uses", 0, "node", value="my Konv"))
    assert "$.layers[0].uses: 'my Konv' (Conv), expected 'my Conv' (Conv) as in deployed.onnx" in refusal(folder)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every number, text and truth of a plan with its place, of long lists the first two entries."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value[:2]):
            yield from leaves(inner, (*path, number))
    else:
        yield path, value


def test_the_plan_has_a_checksum_of_its_own(folder: Path) -> None:
    """Whatever is changed without it is seen, what nothing else depends on too."""
    whole = (folder / "plan.json").read_bytes()
    seen = set()
    for path, value in leaves(json.loads(whole)):
        if isinstance(value, bool | None):
            other: Any = not value if value is not None else 1
        else:
            other = f"{value}x" if isinstance(value, str) else value + 1
        change(folder, set_to(*path, value=other), seal=False)
        with pytest.raises(PlanFormatError) as caught:
            verify_deployment(folder)
        if re.search(r"plan.json: sha256 \w{16}…, expected \w{16}…; it was changed after", str(caught.value)):
            seen.add(".".join(str(key) for key in path if not isinstance(key, int)))
        (folder / "plan.json").write_bytes(whole)
    assert {"producer.version", "model.name", "options.seed", "target.rows", "layers.block", "digital.reason"} <= seen
    assert {"totals.arrays_without_pruning", "verification.tolerance", "skipped.group", "arrays.core"} <= seen
    verify_deployment(folder)


def test_the_checksum_of_a_plan_needs_no_parser(folder: Path) -> None:
    data = (folder / "plan.json").read_bytes()
    digits = re.findall(rb'"plan_sha256": "(\w{64})"', data)
    assert len(digits) == 1
    assert hashlib.sha256(data.replace(digits[0], b"0" * 64)).hexdigest().encode() == digits[0]


def test_swapped_partitions(folder: Path) -> None:
    """Two pieces that change places leave their layer's matrix covered, but not where the arrays are large enough."""

    def swap(plan: dict[str, Any]) -> None:
        first, second = (plan["arrays"][n]["partitions"][0] for n in (0, 2))
        first["layer"], second["layer"] = second["layer"], first["layer"]

    change(folder, swap)
    assert re.search(r"\$\.arrays\[0\]|layer '", refusal(folder))


def resize(path: Path, by: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:by] if by < 0 else data + b"\0" * by)


@pytest.mark.parametrize(
    "name", ["conductances.safetensors", "deployed.onnx", "masks.safetensors", "verification.safetensors"]
)
def test_files_that_changed(name: str, folder: Path) -> None:
    whole = (folder / name).read_bytes()
    for by in (-1, 1):
        resize(folder / name, by)
        assert re.search(rf"{name}: \d+ bytes, expected {len(whole)}; it was truncated or changed", refusal(folder))
        (folder / name).write_bytes(whole)
    for place in (0, len(whole) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        (folder / name).write_bytes(flipped)
        if place:
            load_deployment(folder)  # only verify compares checksums
            assert f"{name}: sha256" in refusal(folder)
        else:
            assert name in refusal(folder)
    (folder / name).unlink()
    assert f"file '{name}' of the plan is missing; copy the whole folder" in refusal(folder)


def rehash(folder: Path, name: str) -> None:
    """Make the plan agree with a changed file: whoever tampers can do that as well."""
    from rerampile.onnx_file import file_sha256

    change(folder, set_to("files", name, "sha256", value=file_sha256(folder / name)))


def test_cells_that_no_cell_can_hold(folder: Path) -> None:
    deployment = load_deployment(folder)
    offset = deployment.conductances.specs["conv_weight.cells"].offset
    data = bytearray((folder / "conductances.safetensors").read_bytes())
    data[offset] = 4
    (folder / "conductances.safetensors").write_bytes(data)
    rehash(folder, "conductances.safetensors")
    assert "tensor 'conv_weight.cells' holds 0 to 4, expected 0 to 3" in refusal(folder)


def test_cells_changed_together_with_their_checksum(folder: Path) -> None:
    deployment = load_deployment(folder)
    offset = deployment.conductances.specs["conv_weight.cells"].offset
    data = bytearray((folder / "conductances.safetensors").read_bytes())
    data[offset] ^= 1
    (folder / "conductances.safetensors").write_bytes(data)
    rehash(folder, "conductances.safetensors")
    assert "layer 'conv_weight': decoded weights differ from those that were compiled" in refusal(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gains_that_are_no_numbers(value: float, folder: Path) -> None:
    offset = load_deployment(folder).conductances.specs["conv_weight.gain"].offset
    data = bytearray((folder / "conductances.safetensors").read_bytes())
    data[offset : offset + 4] = np.float32(value).tobytes()
    (folder / "conductances.safetensors").write_bytes(data)
    rehash(folder, "conductances.safetensors")
    assert "tensor 'conv_weight.gain' holds what is no finite number" in refusal(folder)


def test_a_model_changed_together_with_its_checksum(folder: Path) -> None:
    model = onnx.load(folder / "deployed.onnx", load_external_data=False)
    bias = next(t for t in model.graph.initializer if t.name == "fc_bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(10, 5, np.float32), "fc_bias"))
    (folder / "deployed.onnx").write_bytes(model.SerializeToString())
    rehash(folder, "deployed.onnx")
    change(folder, set_to("files", "deployed.onnx", "bytes", value=(folder / "deployed.onnx").stat().st_size))
    with pytest.raises(FaultRunError, match="output 'scores' of the deployed model is"):
        verify_deployment(folder)


def test_folders_that_are_no_deployments(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert refusal(path, load_deployment) == (
            f"{path}: no plan.json in it, expected a deployment folder written by 'rerampile compile'"
        )


def test_arrays_and_layers_are_found_by_name(folder: Path) -> None:
    deployment: Deployment = load_deployment(folder)
    with pytest.raises(RerampileError, match=r"no array 6, expected 0 to 5"):
        deployment.array(6)
    with pytest.raises(RerampileError, match=r"no layer 'fc'"):
        deployment.layer("fc")
