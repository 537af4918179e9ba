"""Pruning a whole model: the layers towards the dense model's outputs, the command, its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.numpy import load_file

from rerampile import ConfigError, compile_model, load_deployment
from rerampile.cli import main
from rerampile.commands.prune import open_calibration
from rerampile.editable_model import EditableModel, can_shift
from rerampile.graph import ModelGraph
from rerampile.onnx_file import load_model_file
from rerampile.passes.find_layers import find_layers
from rerampile.pruner import prune_model, remove_checkpoint
from rerampile.pruning import PruneRequest
from rerampile.runtime.data import Dataset, open_dataset
from rerampile.runtime.preprocessing import Preprocessing
from rerampile.target import Target

IMAGES = 96


@pytest.fixture(scope="module")
def model(parse_model: Callable[..., onnx.ModelProto]) -> onnx.ModelProto:
    """Four layers: with BatchNormalization, with float16 weights behind a Cast, grouped, and a Gemm."""
    rng = np.random.default_rng(3)

    def weights(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) / np.float32(np.prod(shape[1:]) ** 0.5)

    return parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N, 3, 6, 6] image) => (float[N, 5] scores) {
            a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, first)
            b = BatchNormalization (a, scale, shift, mean, variance)
            c = Relu (b)
            half = Cast <to = 1> (second)
            d = Conv <kernel_shape = [3, 3]> (c, half, second_bias)
            e = Relu (d)
            f = Conv <kernel_shape = [1, 1], group = 2> (e, third)
            g = Relu (f)
            h = Flatten (g)
            scores = Gemm <transB = 1> (h, last, last_bias)
        }
        """,
        first=weights(8, 3, 3, 3),
        scale=rng.uniform(0.5, 2, 8).astype(np.float32),
        shift=weights(8),
        mean=weights(8),
        variance=rng.uniform(0.5, 2, 8).astype(np.float32),
        second=weights(12, 8, 3, 3).astype(np.float16),
        second_bias=weights(12),
        third=weights(8, 6, 1, 1),
        last=weights(5, 128),
        last_bias=weights(5),
    )


@pytest.fixture(scope="module")
def path(model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pruner") / "net.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def graph(path: Path) -> ModelGraph:
    return ModelGraph(load_model_file(path))


@pytest.fixture(scope="module")
def data(path: Path) -> Dataset:
    return open_dataset("generated", onnxruntime.InferenceSession(path), generate=IMAGES)


def outputs(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    (scores,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": images})
    return scores


def loaded(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["prune", *map(str, arguments)])


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(9).standard_normal((64, 3, 6, 6), np.float32)


def test_what_is_set_is_what_is_read(graph: ModelGraph, model: onnx.ModelProto, images: np.ndarray) -> None:
    layers, _ = find_layers(graph)
    copy = EditableModel(graph, layers)
    np.testing.assert_allclose(outputs(_whole(copy), images), outputs(model, images), atol=1e-5)
    layer = layers[0]
    assert can_shift(graph, layer)
    copy.shift(layer, np.full(8, 0.25))
    (found,) = _tensor(copy, "b", images)
    (before,) = _tensor(EditableModel(graph, layers), "b", images)
    np.testing.assert_allclose(found, before + 0.25, atol=1e-5)
    assert [copy.weight_name(layer) for layer in layers] == ["first", "second", "third", "last"]


def _whole(copy: EditableModel) -> onnx.ModelProto:
    """The copy with its large tensors in it."""
    proto = onnx.ModelProto()
    proto.CopyFrom(copy.model.proto)
    for tensor in proto.graph.initializer:
        copy.model.put_back(tensor)
    return proto


def _tensor(copy: EditableModel, name: str, images: np.ndarray) -> list[np.ndarray]:
    proto = _whole(copy)
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    return onnxruntime.InferenceSession(proto.SerializeToString()).run([name], {"image": images})


@pytest.mark.parametrize("ratio", [0.5, 0.8])
def test_the_default_engine_keeps_outputs_better_than_magnitude(
    graph: ModelGraph, data: Dataset, model: onnx.ModelProto, tmp_path: Path, path: Path, ratio: float
) -> None:
    shown = np.concatenate([batch.inputs["image"] for batch in data.batches(32, np.arange(IMAGES))])
    dense, errors = outputs(model, shown), {}
    for method in ("magnitude", "admm"):
        out = tmp_path / method
        arguments = [path, "--prune", ratio, "--calibration", "generated", "--images", IMAGES, "--method", method]
        done = run(*arguments, "-o", out, "-q", "--json")
        assert done.exit_code == 0, done.output
        record = json.loads(done.stdout)
        assert record["sparsity"] == pytest.approx(ratio, abs=0.01)
        errors[method] = float(np.square(outputs(loaded(out), shown) - dense).mean())
    assert errors["admm"] < errors["magnitude"]


def test_files_go_straight_to_compile(path: Path, tmp_path: Path, model: onnx.ModelProto) -> None:
    out = tmp_path / "out"
    done = run(path, "--prune", "0.6", "--calibration", "generated", "--images", "32", "-o", out)
    assert done.exit_code == 0, done.output
    assert {entry.name for entry in out.iterdir()} == {"model.onnx", "masks.safetensors", "pruning.json"}
    masks, weights = load_file(out / "masks.safetensors"), {t.name: t for t in loaded(out).graph.initializer}
    assert set(masks) == {"second", "third"}  # the first and the last layer are protected
    for name, mask in masks.items():
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(weights[name]) != 0, mask)
    deployment = compile_model(out / "model.onnx", out=tmp_path / "deployment", masks=out / "masks.safetensors")
    assert {layer.name: layer.mask is not None for layer in deployment.plan.layers} == {
        "first": False,
        "second": True,
        "third": True,
        "last": False,
    }


@pytest.mark.parametrize("structure", ["2:3", "rows", "columns"])
def test_structures(graph: ModelGraph, data: Dataset, structure: str) -> None:
    pruned = prune_model(graph, data, PruneRequest(ratios={"*": 0.25}, structure=structure), images=32)
    second = next(layer for layer in pruned.layers if layer.name == "second").kept.reshape(12, 72)
    if structure == "2:3":
        assert (second.reshape(12, 24, 3).sum(axis=2) == 2).all()
    elif structure == "rows":
        assert (~second.any(axis=0)).sum() == 18
    else:
        assert (~second.any(axis=1)).sum() >= 3  # and filters that nothing reads any more


def test_partitions_are_those_of_the_target(path: Path, tmp_path: Path) -> None:
    """Whole partitions go, so that the plan needs fewer arrays."""
    array = ["--set", "rows=24", "--set", "columns=8"]  # 24 inputs and 4 pairs: 3 x 3 partitions of 'second'
    calibration = ["--calibration", "generated", "--images", "16", "-q"]
    out = tmp_path / "out"
    done = run(path, "--prune", "second=0.34", "--structure", "partitions", *array, *calibration, "-o", out)
    assert done.exit_code == 0, done.output
    kept = load_file(out / "masks.safetensors")["second"].reshape(3, 4, 3, 24).any(axis=(1, 3))
    assert np.count_nonzero(~kept) == 3
    target = Target.load("paper", {"rows": 24, "columns": 8})
    masks = out / "masks.safetensors"
    plan = compile_model(out / "model.onnx", out=tmp_path / "deployment", masks=masks, target=target).plan
    assert plan.totals.arrays_without_pruning - plan.totals.arrays == 3


def test_levels_are_those_of_the_cells(path: Path, tmp_path: Path) -> None:
    """Weights that were fitted to levels lose nothing more when they are mapped to these."""
    cells = ["--set", "cell.levels=4"]
    calibration = ["--calibration", "generated", "--images", "32", "-q"]
    out = tmp_path / "out"
    done = run(path, "--prune", "second=0.25", "--values", "levels", *cells, *calibration, "-o", out)
    assert done.exit_code == 0, done.output
    weights = onnx.numpy_helper.to_array(next(t for t in loaded(out).graph.initializer if t.name == "second"))
    rows = weights.reshape(12, -1).astype(np.float64)
    assert (rows == 0).sum() >= 216
    steps = 3 * rows / np.abs(rows).max(axis=1, keepdims=True)
    full = np.isclose(steps, np.round(steps), atol=0.01).all(axis=1)
    assert full.sum() >= 9  # nearly all outputs keep a weight at full scale


@pytest.mark.parametrize(("values", "most"), [("clusters:4", 4), ("unified:1", None)])
def test_shared_values(graph: ModelGraph, data: Dataset, values: str, most: int | None) -> None:
    request = PruneRequest(ratios={"second": 0.5}, values=values, partition=(72, 12))
    if values == "unified:1":
        with pytest.raises(ConfigError, match="ratio of blocks 1: expected a ratio of 0 or more and less than 1"):
            prune_model(graph, data, request, images=16)
        request = replace(request, values="unified:0.9")
    pruned = prune_model(graph, data, request, images=32)
    weights = next(t for t in pruned.model.proto.graph.initializer if t.name == "second")
    found = onnx.numpy_helper.to_array(weights).reshape(12, 72)
    assert (found == 0).mean() == pytest.approx(0.5, abs=0.01)
    assert len(np.unique(found[found != 0] if most else np.abs(found[found != 0]))) <= (most or 2)


@pytest.mark.parametrize("allot", ["threshold", "sensitivity"])
def test_a_budget_for_all_layers(graph: ModelGraph, data: Dataset, allot: str) -> None:
    request = PruneRequest(ratios={"*": 0.5}, allot=allot, protect=("first",))
    pruned = prune_model(graph, data, request, images=32)
    assert pruned.sparsity == pytest.approx(0.5, abs=0.01)
    assert len({layer.ratio for layer in pruned.layers}) > 1
    assert pruned.left == {"first": "protected"}


def test_an_interrupted_pruning_goes_on_to_the_same_bytes(graph: ModelGraph, data: Dataset, tmp_path: Path) -> None:
    request = PruneRequest(ratios={"*": 0.5})

    def stop(done: int, count: int, name: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_model(graph, data, request, images=32, checkpoint=tmp_path, progress=stop)
    kept = {entry.name: entry.stat().st_mtime_ns for entry in tmp_path.iterdir()}
    assert len(kept) == 1
    resumed = prune_model(graph, data, request, images=32, checkpoint=tmp_path)
    whole = prune_model(graph, data, request, images=32)
    assert resumed.model.proto.SerializeToString() == whole.model.proto.SerializeToString()
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in kept.items())
    finished = {entry.name for entry in tmp_path.iterdir()}
    (tmp_path / "mine.safetensors").touch()
    remove_checkpoint(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.safetensors"]
    assert len(finished) == 3  # the last layer is protected, but gets a bias


def test_other_ratios_share_the_layers_before_them(graph: ModelGraph, data: Dataset, tmp_path: Path) -> None:
    first, other = {"second": 0.5, "third": 0.5}, {"second": 0.5, "third": 0.6}
    prune_model(graph, data, PruneRequest(ratios=first), images=32, checkpoint=tmp_path)
    before = {entry.name for entry in tmp_path.iterdir()}
    shared = prune_model(graph, data, PruneRequest(ratios=other), images=32, checkpoint=tmp_path)
    new = {entry.name for entry in tmp_path.iterdir()} - before
    assert (len(before), len(new)) == (3, 2)
    whole = prune_model(graph, data, PruneRequest(ratios=other), images=32)
    assert shared.model.proto.SerializeToString() == whole.model.proto.SerializeToString()


def test_compile_prunes_before(path: Path, tmp_path: Path, graph: ModelGraph, data: Dataset) -> None:
    """``compile --prune-method`` gives what ``prune`` and ``compile`` give, and the plan says how."""
    out = tmp_path / "net.deployment"
    calibration = ["--calibration", "generated", "--images", "32"]
    arguments = ["compile", path, "-o", out, "--prune", "0.5", "--prune-method", "admm", *calibration, "-q"]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert [entry.name for entry in tmp_path.iterdir()] == [out.name]
    plan = load_deployment(out).plan
    assert [None if layer.mask is None else layer.mask.source for layer in plan.layers] == [
        None,
        *["admm 0.5"] * 2,
        None,
    ]
    assert plan.options["pruning"]["engine"] == "admm"
    assert plan.model.sha256 == graph.model.sha256
    assert (plan.layers[1].zeros, plan.layers[2].zeros) == (432, 24)
    pruned = prune_model(graph, data, PruneRequest(ratios={"*": 0.5}), images=32)
    with pytest.raises(ConfigError, match="the model is pruned already, expected neither masks nor pruning ratios"):
        compile_model(pruned, out=tmp_path / "other", prune=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prune", "0.5", "--prune-method", "admm"], "--prune-method and --calibration: expected both"),
        (["--prune", "0.5", "--calibration", "generated"], "--calibration: no effect without --prune-method, --clip"),
        (["--prune-method", "admm", "--calibration", "generated"], "--prune-method: expected a ratio, --prune"),
    ],
)
def test_compile_says_what_pruning_needs(path: Path, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["compile", str(path), *arguments])
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--prune: expected a ratio, or --structure N:M, or --values"),
        (["--prune", "1"], 1, "--prune 1: expected a ratio of 0 or more and less than 1"),
        (["--prune", "sekond=0.5"], 1, "--prune sekond=0.5: no block and no layer of that name"),
        (["--prune", "0.5", "--method", "adm"], 1, "pruning method adm: no such engine (did you mean admm, "),
        (
            ["--prune", "0.5", "--structure", "row"],
            1,
            "--structure row: expected weights, rows, columns, channels, part",
        ),
        (["--values", "level"], 1, "--values level: expected any, levels, clusters:N as in clusters:16, or unified"),
        (["--values", "clusters:x"], 1, "--values clusters:x: expected any, levels, clusters:N"),
        (["--values", "clusters:9999"], 1, "9999 clusters: a layer of"),
        (["--values", "levels"], 1, "--values levels: the cells of target 'paper' are analog"),
        (["--structure", "5:4"], 1, "5:4 sparsity: expected N:M with 1 <= N <= M, as in 2:4"),
        (["--prune", "0.5", "--protect", "fist"], 1, "--protect fist: no block and no layer of that name"),
        (["--prune", "0.5", "--calibration", "cifar10:nowhere"], 1, "nowhere"),
    ],
)
def test_bad_requests(path: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    done = run(path, "--calibration", "generated", "--images", "8", "-o", tmp_path / "out", "-q", *arguments)
    assert done.exit_code == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_other_files_stay(path: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = run(path, "--prune", "0.5", "--calibration", "generated", "-o", tmp_path)
    assert done.exit_code == 1
    assert "holds 'mine.txt', expected a new or empty folder; name another one with -o" in done.stderr


def test_nothing_is_left_to_choose_for_an_unknown_engine(graph: ModelGraph, data: Dataset) -> None:
    with pytest.raises(ConfigError, match="pruning method obs: no such engine"):
        prune_model(graph, data, PruneRequest(ratios={"*": 0.5}, engine="obs"))


def test_calibration_is_the_split_that_is_named(small_model_file: Path, tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        for label in "ab":
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{number}.png")
    data = {"preprocessing": Preprocessing(), "images": None, "skip_bad": False}
    for end, count in (("", 6), ("@train", 6), ("@test", 4)):
        spec = f"imagefolder:{tmp_path / 'images'}{end}"
        assert len(open_calibration(small_model_file, {"data": spec, **data})) == count


def test_a_bias_behind_the_alpha_of_a_gemm(parse_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    """The mean of every output stays the dense model's."""
    rng = np.random.default_rng(5)
    net = parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N, 12] image) => (float[N, 4] scores) {
            shifted = Add (image, addend)
            scores = Gemm <transB = 1, alpha = 0.25> (shifted, W, bias)
        }
        """,
        addend=rng.standard_normal(12).astype(np.float32),
        W=rng.standard_normal((4, 12)).astype(np.float32),
        bias=rng.standard_normal(4).astype(np.float32),
    )
    images = rng.uniform(1, 2, (200, 12)).astype(np.float32)
    np.savez(tmp_path / "images.npz", image=images)
    data = open_dataset(f"npz:{tmp_path / 'images.npz'}", onnxruntime.InferenceSession(net.SerializeToString()))
    found = prune_model(ModelGraph(load_model_file(net)), data, PruneRequest(ratios={"*": 0.5}, protect=()))
    means = [outputs(proto, images).mean(axis=0) for proto in (net, found.model.proto)]
    np.testing.assert_allclose(means[1], means[0], atol=1e-4)
