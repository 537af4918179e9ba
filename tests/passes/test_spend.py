"""`compile --spend-spare-arrays`: which copies are made, what they are expected to save beside chips, and the plan."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from rerampile import ConfigError, Deployment, PlanFormatError, Target, verify_deployment
from rerampile.array_plan import Partition
from rerampile.checks import check_placement
from rerampile.cli import main
from rerampile.layer_plan import CopiesPlan
from rerampile.passes.bins import Bin, Grid, Piece
from rerampile.passes.spend import MOST_COPIES, further_copies
from rerampile.plan import decode_plan, encode_plan
from rerampile.programmer import ChipSource, program_chip
from rerampile.recount import check_sums
from rerampile.runtime.dataset import ArrayDataset
from rerampile.runtime.fault_map import ChipGeometry
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.runtime.inject import Injector
from rerampile.target import Cell

Compile = Callable[..., Deployment]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
ONE = f"{HEADER} g (float[N,24] x) => (float[] y) {{ y = Gemm <transB=1> (x, W) }}"
TWO = f"{HEADER} g (float[N,24] x) => (float[] z) {{ y = Gemm <transB=1> (x, W) z = MatMul (y, V) }}"
FAULTS = FaultModel(stuck_off=0.005, stuck_on=0.03)
GRID = Grid(rows=16, outputs=8, width=2, slices=1, roles=(("plus", "minus"),))


def on_arrays(layer: int, *sizes: tuple[int, int], grid: Grid = GRID) -> list[Bin]:
    """The arrays of one copy of a layer, with one piece of (rows, outputs) on each."""
    made = []
    for rows, outputs in sizes:
        partition = Partition(layer=layer, row=0, column=0, groups=(0, 1), inputs=(0, rows), outputs=(0, outputs))
        made.append(Bin(grid))
        made[-1].add(Piece(partition, rows, outputs, 0))
    return made


def whole(*counts: int) -> list[list[Bin]]:
    return [on_arrays(layer, *[(16, 8)] * count) for layer, count in enumerate(counts)]


def left(noise: Sequence[float], copies: Sequence[int]) -> float:
    return sum(each / count for each, count in zip(noise, copies, strict=True))


@settings(max_examples=60)
@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=4), st.integers(0, 6))
def test_layers_of_one_size_get_the_best_of_all_choices(noise: list[float], idle: int) -> None:
    copies, further = further_copies(whole(*[1] * len(noise)), noise, idle, pack=False)
    counts = itertools.product(range(1, idle + 2), repeat=len(noise))
    best = min(left(noise, each) for each in counts if sum(each) - len(noise) <= idle)
    assert left(noise, copies) <= best * (1 + 1e-9)
    assert len(further) == sum(copies) - len(noise) == idle


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5)), min_size=1, max_size=5), st.integers(0, 40), st.booleans()
)
def test_nothing_that_would_help_is_left_out(layers: list[tuple[float, int]], idle: int, pack: bool) -> None:
    """Never more arrays than there are; none idle that a copy would fit on; nothing for layers without noise."""
    noise, sizes = [n for n, _ in layers], [size for _, size in layers]
    copies, further = further_copies(whole(*sizes), noise, idle, pack=pack)
    used = sum(size * (count - 1) for size, count in zip(sizes, copies, strict=True))
    assert len(further) == used <= idle
    for each, size, count in zip(noise, sizes, copies, strict=True):
        if each and size:
            assert count == MOST_COPIES or size > idle - used
        else:
            assert count == 1


def test_a_copy_goes_where_it_saves_most_for_each_array() -> None:
    """Of 0.5 and 1.0 on one and three arrays: 0.25 for one array, 0.083, then 0.5 for three, 0.042."""
    bins, noise = whole(1, 3), [0.5, 1.0]
    chosen = [further_copies(bins, noise, idle, pack=False)[0] for idle in range(6)]
    assert chosen == [[1, 1], [2, 1], [3, 1], [4, 1], [2, 2], [3, 2]]


def test_twins_count_both_arrays() -> None:
    twins = Grid(rows=16, outputs=8, width=1, slices=1, roles=(("plus",), ("minus",)))
    copies, further = further_copies([on_arrays(0, (4, 4), (4, 4), grid=twins)], [1.0], 11, pack=False)
    assert (copies, len(further)) == ([3], 4)


def test_packed_copies_of_different_layers_share_arrays() -> None:
    """Two of one layer never do, so that its stuck cells stay apart; nor do pairs and single cells."""
    single = Grid(rows=16, outputs=16, width=1, slices=1, roles=(("plus",),))
    bins = [on_arrays(0, (4, 2)), on_arrays(1, (4, 2)), on_arrays(2, (4, 2), grid=single)]
    copies, further = further_copies(bins, [1.0, 1.0, 1e-9], 3, pack=True)
    assert copies == [4, 4, 1]
    assert [bin_.layers for bin_ in further] == [{0, 1}] * 3
    assert sorted((piece.partition.layer, piece.partition.copy) for b in further for piece, _, _ in b.pieces) == [
        (layer, copy) for layer in (0, 1) for copy in (1, 2, 3)
    ]
    assert all((b.rows, b.outputs) == (8, 4) for b in further)
    assert further_copies(bins, [1.0, 1.0, 1e-9], 3, pack=False)[0] == [3, 2, 1]


# What is expected of them.


def small(**keys: Any) -> Target:
    return Target(**{"name": "small", "rows": 32, "columns": 32, "cell": Cell(g_off=1e-6, g_on=1e-4), **keys})


def outliers(*shape: int) -> Floats:
    return np.random.default_rng([0, *shape]).standard_t(3, shape).astype(np.float32)


def images(*shape: int) -> ArrayDataset:
    """Inputs that are not centred, and not all alike."""
    rng = np.random.default_rng(5)
    values = (np.maximum(rng.standard_normal(shape), 0) * rng.uniform(0.2, 2, shape[1:])).astype(np.float32)
    return ArrayDataset(
        name="images",
        count=len(values),
        rows=None,
        fetch=lambda indices: {"x": values[indices]},
        hash_data=lambda found: found.update(values.tobytes()),
    )


def inputs_of(data: ArrayDataset) -> Doubles:
    (batch,) = data.batches(len(data))
    return batch.inputs["x"].astype(np.float64)


def copies_of(deployment: Deployment, number: int = 0) -> CopiesPlan:
    copies = deployment.plan.layers[number].copies
    assert isinstance(copies, CopiesPlan)
    return copies


def weights_of_chips(deployment: Deployment, chips: int) -> Doubles:
    """What chips hold in the first layer, [chips, outputs, inputs]."""
    injector, geometry = Injector(deployment), ChipGeometry.of(deployment)
    held = deployment.weights(deployment.plan.layers[0])
    found = np.repeat(held[None].astype(np.float64), chips, axis=0).reshape(chips, -1)
    for number in range(chips):
        for layer in injector.faults(draw_faults(geometry, FAULTS, deployment.target, seed=1, run=number)):
            if layer.layer == 0:
                found[number, layer.index] = layer.value
    return found.reshape(chips, *held.shape)


@pytest.mark.parametrize("given", ["nothing", "images", "clip and correct", "partitions"])
@pytest.mark.parametrize("mapping", ["differential", "offset"])
def test_the_expected_error_is_that_of_many_chips(given: str, mapping: str, compile_text: Compile) -> None:
    """Around their mean; of the weights, or of the products on the images. The mean is that of one copy."""
    weights, data = outliers(16, 24), images(50, 24)
    x = np.eye(24) if given == "nothing" else inputs_of(data)
    options: dict[str, Any] = {} if given == "nothing" else {"calibration": data}
    options |= {"scale": "partition"} if given == "partitions" else {}
    options |= {"clip": True, "correct": True} if given == "clip and correct" else {}
    energy = np.sum((x @ weights.T) ** 2)
    means = []
    for count in (1, 4):
        cut = {"rows": 16, "arrays_per_core": 2 * count}  # two pieces of the inputs
        target = small(**(cut if given == "partitions" else {"arrays_per_core": count}))
        deployment = compile_text(
            ONE,
            {"W": weights},
            target=target,
            mapping=mapping,
            faults=FAULTS,
            spend_spare_arrays=True,
            **options,
        )
        copies, found = copies_of(deployment), weights_of_chips(deployment, 500)
        means.append(found.mean(axis=0))
        spread = np.sum(((found - means[-1]) @ x.T) ** 2, axis=(1, 2)).mean() / energy * 500 / 499
        assert copies.count == count
        assert copies.error == copies.error_single / count == pytest.approx(spread, rel=0.06)
    noise = np.sqrt(copies.error_single * energy / np.sum(x**2) * 2 / 500)
    assert np.sqrt(np.mean((means[0] - means[1]) ** 2)) < 3 * noise


def test_layers_whose_inputs_are_not_seen_count_as_if_all_were_alike(
    compile_text: Compile, discrete_target: Callable[..., Any]
) -> None:
    text = (
        f"{HEADER} g (uint8[N,8] x) => (float[] z) {{"
        " y = MatMulInteger (x, whole) f = Cast <to=1> (y) z = MatMul (f, W) }"
    )
    weights = {"whole": np.arange(-16, 16, dtype=np.int8).reshape(8, 4), "W": outliers(4, 30)}
    data = images(20, 8)
    rng = np.random.default_rng(1)
    data.fetch = lambda indices: {"x": rng.integers(0, 250, (len(indices), 8), np.uint8)}
    options = {"target": discrete_target(levels=64, arrays_per_core=12), "spend_spare_arrays": True, "faults": FAULTS}
    seen = compile_text(text, weights, calibration=data, **options)
    alike = compile_text(text, weights, **options)
    assert copies_of(seen).error_single == copies_of(alike).error_single > 0
    assert copies_of(seen, 1).error_single != copies_of(alike, 1).error_single > 0


# The plan.


@pytest.fixture
def copied(compile_text: Compile) -> Deployment:
    """A layer of one array and one of two, on a target with eight arrays."""
    weights = {"W": outliers(16, 24), "V": outliers(16, 20)}
    return compile_text(TWO, weights, target=small(arrays_per_core=8), spend_spare_arrays=True, faults=FAULTS)


def test_the_plan_says_what_was_spent(copied: Deployment) -> None:
    plan = copied.plan
    counts = [layer.copy_count for layer in plan.layers]
    assert counts[0] + 2 * counts[1] == len(plan.arrays)
    assert min(counts) > 1
    assert plan.totals.arrays_spent == len(plan.arrays) - 3
    assert plan.totals.cells_used == 2 * (16 * 24 * counts[0] + 16 * 20 * counts[1])
    assert plan.options["spend_spare_arrays"] is True
    assert plan.options["stuck_off"] == FAULTS.stuck_off
    assert decode_plan(encode_plan(plan), "plan.json") == plan
    means = [layer.mean_cell_conductance for layer in plan.layers]
    on_arrays = [384 * counts[0], 320 * counts[1]]
    assert plan.totals.mean_pair_conductance == pytest.approx(2 * np.average(means, weights=on_arrays))


def test_without_the_option_nothing_is_said(compile_text: Compile) -> None:
    deployment = compile_text(ONE, {"W": outliers(16, 24)}, target=small(arrays_per_core=8))
    plan = json.loads((deployment.folder / "plan.json").read_text())
    assert "copies" not in plan["layers"][0]
    assert "arrays_spent" not in plan["totals"]
    assert not {"spend_spare_arrays", "calibration"} & plan["options"].keys()
    assert all("copy" not in partition for array in plan["arrays"] for partition in array["partitions"])


def test_a_full_target_and_layers_of_zeros_get_no_copies(compile_text: Compile) -> None:
    weights = {"W": outliers(16, 24), "V": np.zeros((16, 20), np.float32)}
    full = compile_text(TWO, weights, target=small(arrays_per_core=1), spend_spare_arrays=True)
    roomy = compile_text(TWO, weights, target=small(arrays_per_core=100), spend_spare_arrays=True)
    assert [layer.copy_count for layer in full.plan.layers] == [1, 1]
    assert [layer.copy_count for layer in roomy.plan.layers] == [MOST_COPIES, 1]
    assert (full.plan.totals.arrays_spent, roomy.plan.totals.arrays_spent) == (0, MOST_COPIES - 1)
    assert copies_of(full, 1) == CopiesPlan(count=1, error=0.0, error_single=0.0)


def changed(deployment: Deployment, **fields: Any) -> Deployment:
    return msgspec_replace(deployment, msgspec.structs.replace(deployment.plan, **fields))


def msgspec_replace(deployment: Deployment, plan: Any) -> Deployment:
    return Deployment(
        folder=deployment.folder, plan=plan, target=deployment.target, conductances=deployment.conductances
    )


def with_count(deployment: Deployment, count: int) -> Deployment:
    first, *others = deployment.plan.layers
    copies = CopiesPlan(count=count, error=copies_of(deployment).error_single / count, error_single=1.0)
    return changed(deployment, layers=[msgspec.structs.replace(first, copies=copies), *others])


def with_copies(deployment: Deployment, copy: Callable[[Partition], int]) -> Deployment:
    arrays = [
        msgspec.structs.replace(a, partitions=[msgspec.structs.replace(p, copy=copy(p)) for p in a.partitions])
        for a in deployment.plan.arrays
    ]
    return changed(deployment, arrays=arrays)


def test_copies_that_are_not_what_the_plan_says_are_refused(copied: Deployment) -> None:
    count = copied.plan.layers[0].copy_count
    cases = [
        (with_count(copied, count + 1), f"layer 'W': copy {count} of {count + 1} sits on no array, expected some"),
        (with_count(copied, 10**12), f"layer 'W': copy {count} of 1000000000000 sits on no array"),
        (with_count(copied, count - 1), rf"\]: copy {count - 1}, expected 0 to {count - 2}"),
        (with_count(with_copies(copied, lambda p: p.copy % (count - 1)), count - 1), "sits in 2 places, expected 1"),
        (with_copies(copied, lambda p: p.copy or int(p.layer == 0)), "layer 'W': copy 0 of .* sits on no array"),
        (with_copies(copied, lambda p: 1 if p.outputs == (16, 20) else p.copy), "layer 'V': weight .* in 0 places"),
    ]
    for deployment, message in cases:
        with pytest.raises(PlanFormatError, match=message):
            check_placement(deployment)
    totals = msgspec.structs.replace(copied.plan.totals, arrays_spent=1)
    with pytest.raises(PlanFormatError, match=r"totals.arrays_spent: 1, expected 5; the plan was changed"):
        check_sums(changed(copied, totals=totals))


def test_an_expected_error_that_does_not_fit_the_copies_is_found(copied: Deployment) -> None:
    first, *others = copied.plan.layers
    copies = msgspec.structs.replace(copies_of(copied), error=0.5)
    plan = msgspec.structs.replace(copied.plan, layers=[msgspec.structs.replace(first, copies=copies), *others])
    (copied.folder / "plan.json").write_bytes(encode_plan(plan))
    with pytest.raises(PlanFormatError, match=r"layers\[0\].copies.error: 0.5, expected 0"):
        verify_deployment(copied.folder)


# What goes along, and what does not.


def test_copies_cannot_be_programmed_for_one_chip(copied: Deployment, tmp_path: Path) -> None:
    faults = draw_faults(ChipGeometry.of(copied), FAULTS, copied.target, seed=0, run=0)
    source = ChipSource(path=copied.folder / "plan.json", number=0, faults=faults)
    with pytest.raises(ConfigError, match=r"layer 'W' is held in \d copies, of which each would need cells of its own"):
        program_chip(copied, source, tmp_path / "chip", steps=("compensate",))
    assert not (tmp_path / "chip").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target": small()},
            "--spend-spare-arrays: target 'small' has unlimited arrays_per_core, so that none of its arrays is spare, "
            "expected a number; give one with --set arrays_per_core=N",
        ),
        ({"target": "isaac"}, "target 'isaac' has unlimited chips, .* with --set chips=N"),
        ({"faults": FaultModel.of_rate(0)}, "--spend-spare-arrays: 0 of all cells stuck, expected more than 0"),
        (
            {"spend_spare_arrays": False, "calibration": images(5, 24)},
            "calibration images without effect, expected clip, correct or spend_spare_arrays with them",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str, compile_text: Compile) -> None:
    given = {"target": small(arrays_per_core=4), "spend_spare_arrays": True, **options}
    with pytest.raises(ConfigError, match=message):
        compile_text(ONE, {"W": outliers(16, 24)}, **given)


def test_the_command_line(model_of: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    onnx.save(model_of(TWO, {"W": outliers(16, 24), "V": outliers(16, 20)}), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=inputs_of(images(50, 24)).astype(np.float32))
    out = str(tmp_path / "out")

    def call(*arguments: str) -> str:
        done = CliRunner().invoke(main, list(arguments), env={"COLUMNS": "160"})
        assert done.exit_code == 0, done.stderr
        return done.stdout + done.stderr

    spend = ["compile", str(tmp_path / "m.onnx"), "-o", out, "--spend-spare-arrays", "--set", "rows=32"]
    refused = CliRunner().invoke(main, spend)
    assert refused.exit_code == 1
    assert "has unlimited arrays_per_core" in refused.stderr
    assert not Path(out).exists()

    spend += ["--set", "columns=32", "--failure-rate", "0.03", "--calibration", f"npz:{tmp_path / 'x.npz'}"]
    said = call(*spend, "--set", "arrays_per_core=9")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert (plan["totals"]["arrays"], plan["totals"]["arrays_spent"]) == (9, 6)
    assert plan["options"]["calibration"]["images"] == 50
    assert plan["options"]["stuck_on"] == pytest.approx(0.03 * 5.2 / 6.2)
    assert "arrays 9, saved by pruning 0, saved by packing 0, spent on copies 6" in said
    copies = [layer["copies"] for layer in plan["layers"]]
    before, after = (np.mean([each[key] for each in copies]) for key in ("error_single", "error"))
    most = max(each["count"] for each in copies)
    assert f"6 arrays for 2 of 2 layers, held up to {most} times" in said
    assert f"expected squared error of a layer {after:.2%}, without {before:.2%}" in said
    assert "704 weights in one place of each copy, none shared" in call("verify", out)
    shown = call("show", out, "-v")
    assert any(line.split() == ["W", str(copies[0]["count"]), *_errors(copies[0])] for line in shown.splitlines())
    assert "W, copy 1, inputs 0-23" in shown
    assert "W, copy 1" in call("show", out, "--array", "3") + call("show", out, "--array", "4")
    call("validate", out, "--runs", "2", "--images", "4", "--failure-rate", "0.01", "-q", "-o", str(tmp_path / "v"))

    assert "copies no array was left that a further copy" in " ".join(
        call(*spend, "--set", "arrays_per_core=3").split()
    )
    assert "place, none shared" in call("verify", out)


def _errors(copies: dict[str, float]) -> list[str]:
    return [f"{copies['error']:.3%}", f"{copies['error_single']:.3%}"]
