"""Training a small model: masks, ADMM, defects, and going on after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from rerampile.cli import main
from rerampile.errors import ConfigError, DataError, ModelError
from rerampile.graph import ModelGraph
from rerampile.onnx_file import load_model_file, write_model_file
from rerampile.runtime.dataset import ArrayDataset
from rerampile.runtime.faults import FaultModel
from rerampile.runtime.session import open_session, run
from rerampile.training.stuck_weights import Defects

torch = pytest.importorskip("torch", reason="the extra rerampile[train] is not installed")
from rerampile.training import finetune as module  # noqa: E402
from rerampile.training.finetune import Finetuned, FinetuneRequest, finetune  # noqa: E402

REQUEST = FinetuneRequest(epochs=3, batch=16, learning_rate=0.01)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Images whose class is the quarter that is bright, as .npz."""
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=160)
    images = 0.3 * rng.standard_normal((160, 3, 4, 4)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[:, 2 * (label // 2) :][:, :2, 2 * (label % 2) :][:, :, :2] += 1
    path = tmp_path / "task.npz"
    np.savez(path, image=images, labels=labels)
    return path


@pytest.fixture
def graph(small_model: onnx.ModelProto) -> ModelGraph:
    """The small model, with weights as small as those that a training starts from."""
    model = onnx.ModelProto()
    model.CopyFrom(small_model)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(array / np.sqrt(array[0].size).astype(np.float32), tensor.name))
    return ModelGraph(load_model_file(model))


def open_task(graph: ModelGraph, path: Path) -> Any:
    from rerampile.runtime.data import open_dataset

    return open_dataset(f"npz:{path}", open_session(graph.model.proto.SerializeToString()))


def trained(graph: ModelGraph, task: Path, request: FinetuneRequest, **more: Any) -> Finetuned:
    return finetune(graph, open_task(graph, task), request, **more)


def weights(found: Finetuned) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in found.model.proto.graph.initializer}


def accuracy(model: onnx.ModelProto, task: Path) -> float:
    data = np.load(task)
    scores = run(open_session(model.SerializeToString()), {"image": data["image"]})[0]
    return float((scores.argmax(1) == data["labels"]).mean())


def test_the_loss_falls_and_onnx_runtime_agrees(graph: ModelGraph, task: Path) -> None:
    before = accuracy(graph.model.proto, task)
    found = trained(graph, task, replace(REQUEST, epochs=8))
    losses = [epoch.loss for epoch in found.epochs]
    assert losses[-1] < 0.2 * losses[0]
    assert before < 0.5
    assert accuracy(found.model.proto, task) > 0.95
    assert not found.kept
    names = [(n.op_type, *n.output) for n in graph.model.proto.graph.node]
    assert [(n.op_type, *n.output) for n in found.model.proto.graph.node] == names


def test_masks_and_zeros_stay_zero(graph: ModelGraph, task: Path) -> None:
    from rerampile.passes.find_layers import find_layers

    layers = {layer.name: layer for layer in find_layers(graph)[0]}
    conv, gemm = layers["conv_weight"], layers["fc_weight"]
    rng = np.random.default_rng(0)
    mask = rng.random(conv.view.shape) < 0.5
    found = trained(graph, task, REQUEST, masks={conv.name: mask})
    np.testing.assert_array_equal(weights(found)[conv.name] != 0, conv.view.tensor(mask))
    np.testing.assert_array_equal(found.kept[conv.name], conv.view.tensor(mask))
    assert gemm.name not in found.kept
    again = finetune(ModelGraph(found.model), open_task(graph, task), REQUEST)
    np.testing.assert_array_equal(weights(again)[conv.name] != 0, conv.view.tensor(mask))
    assert not np.array_equal(weights(again)[conv.name], weights(found)[conv.name])


def test_admm_reaches_the_ratio(graph: ModelGraph, task: Path) -> None:
    request = replace(REQUEST, epochs=8, ratios={"*": 0.75}, protect=())
    found = trained(graph, task, request)
    for name, kept in found.kept.items():
        assert (~kept).sum() == round(0.75 * kept.size)
        np.testing.assert_array_equal(weights(found)[name] != 0, kept)
    assert len(found.kept) == 2
    distances = [epoch.distance for epoch in found.epochs]
    assert distances[4:] == [None] * 4
    assert distances[3] < distances[0] < 0.6  # type: ignore[operator]
    assert accuracy(found.model.proto, task) > 0.9
    protected = trained(graph, task, replace(request, protect=("first",)))
    assert len(protected.kept) == 1


@pytest.mark.parametrize(("epochs", "steps"), [(2, 10), (2, 70), (8, 20), (40, 60)])
def test_pulls_of_admm_add_up(graph: ModelGraph, epochs: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their number, they bring weights that nothing holds back to exp(-5) of their distance."""
    from rerampile.passes.find_layers import find_layers

    layers, _ = find_layers(graph)
    weights = {layer.name: torch.from_numpy(layer.matrix(graph).copy()) for layer in layers}
    request = replace(REQUEST, epochs=epochs, ratios={"*": 0.75}, protect=())
    admm = module._Admm(request, layers, weights, {layer.name: layer.name for layer in layers})
    monkeypatch.setattr(admm, "_renew", lambda *_: None)

    def distance() -> float:
        return float(sum((w - admm.sparse[name]).square().sum() for name, w in weights.items()) ** 0.5)

    far = [distance()]
    for step in range(steps):
        admm.pull(weights, step * admm.epochs / steps, (step + 1) * admm.epochs / steps)
        far.append(distance())
    pulls = np.log(np.array(far[:-1]) / far[1:])
    assert pulls.sum() == pytest.approx(5, rel=1e-3)
    assert pulls[-1] / pulls[0] == pytest.approx(10, rel=1e-2)


def test_what_is_trained_with_defects_tolerates_them(graph: ModelGraph, task: Path) -> None:
    """The same chips, of stuck cells drawn apart from those of the training."""
    defects = Defects(faults=FaultModel.of_rate(0.2), mapping="two_column", scale="tensor")
    plain, hard = (trained(graph, task, replace(REQUEST, epochs=12, defects=d)) for d in (None, defects))

    def faulty(found: Finetuned) -> float:
        from rerampile.passes.find_layers import find_layers
        from rerampile.training.stuck_weights import StuckWeights

        seen = ModelGraph(found.model)
        layers, rng, scores = find_layers(seen)[0], np.random.default_rng(99), []
        for _ in range(30):
            proto = onnx.ModelProto()
            proto.CopyFrom(found.model.proto)
            for tensor in proto.graph.initializer:
                layer = next((layer for layer in layers if layer.tensor.name == tensor.name), None)
                if layer is not None:
                    array = numpy_helper.to_array(tensor).copy()
                    index, value = StuckWeights(defects, layer).draw(array, rng)
                    array.reshape(-1)[index] = value
                    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            scores.append(accuracy(proto, task))
        return float(np.mean(scores))

    wrong = 1 - faulty(plain)
    assert wrong > 0.02
    assert 1 - faulty(hard) < 0.5 * wrong
    assert hard.epochs[0].loss > plain.epochs[0].loss


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"augment": True, "seed": 3},
        {"ratios": {"*": 0.5}, "protect": (), "epochs": 4},
        {"defects": Defects(faults=FaultModel.of_rate(0.05))},
    ],
)
def test_a_stopped_training_goes_on_to_the_same_bytes(
    graph: ModelGraph, task: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    request, path = replace(REQUEST, **more), tmp_path / "unfinished.safetensors"
    whole = trained(graph, task, request)

    def stop(epoch: int, epochs: int, done: int, images: int, loss: float) -> None:
        if epoch == 1 and done == images:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(graph, task, request, checkpoint=path, progress=stop)
    again = trained(graph, task, request, checkpoint=path)
    assert again.model.proto.SerializeToString() == whole.model.proto.SerializeToString()
    assert again.epochs == whole.epochs
    other = replace(request, seed=request.seed + 1)
    assert trained(graph, task, other).model.proto.SerializeToString() != whole.model.proto.SerializeToString()
    with pytest.raises(
        DataError, match=r"unfinished\.safetensors: belongs to another training; remove it to start anew"
    ):
        trained(graph, task, other, checkpoint=path)


def test_what_the_first_output_does_not_depend_on_stays(
    parse_model: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    """A second head is no part of the loss: its weights stay, pruned ones apart, also after going on."""
    rng = np.random.default_rng(0)
    heads = {name: rng.standard_normal((4, 3), dtype=np.float32) for name in ("first", "second")}
    model = parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        heads (float[N, 4] x) => (float[N, 3] y, float[N, 3] z) { y = MatMul (x, first)  z = MatMul (x, second) }
        """,
        **heads,
    )
    task = tmp_path / "heads.npz"
    np.savez(task, x=rng.standard_normal((32, 4), dtype=np.float32), labels=rng.integers(3, size=32))
    graph, path = ModelGraph(load_model_file(model)), tmp_path / "unfinished.safetensors"
    found = trained(graph, task, REQUEST, checkpoint=path)
    assert trained(graph, task, REQUEST, checkpoint=path).epochs == found.epochs
    np.testing.assert_array_equal(weights(found)["second"], heads["second"])
    assert not np.array_equal(weights(found)["first"], heads["first"])


def test_a_fixed_batch_that_does_not_divide_the_images(
    parse_model: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    """What the last batch is filled up with counts for nothing: the accuracy is of all images, each once."""
    rng = np.random.default_rng(0)
    model = parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[7, 4] x) => (float[7, 3] y) <int64[2] s = {7, 3}> { z = MatMul (x, w)  y = Reshape (z, s) }
        """,
        w=rng.standard_normal((4, 3), dtype=np.float32),
    )
    task = tmp_path / "task.npz"
    images = rng.standard_normal((17, 4), dtype=np.float32)
    np.savez(task, x=images, labels=rng.integers(3, size=17))
    seen: list[int] = []
    found = trained(
        ModelGraph(load_model_file(model)),
        task,
        replace(REQUEST, epochs=1),
        progress=lambda epoch, epochs, done, images, loss: seen.append(done),
    )
    assert seen == [7, 14, 17]
    assert (found.epochs[0].accuracy * 17 / 100) == pytest.approx(round(found.epochs[0].accuracy * 17 / 100))


def test_float16(parse_model: Callable[..., onnx.ModelProto]) -> None:
    """What is stored in float16 and cast is trained; what computes in it is refused."""
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float16)
    text = '<ir_version: 8, opset_import: ["" : 17]> g '
    half = parse_model(text + "(float16[N, 4] x) => (float16[N, 3] y) { y = MatMul (x, w) }", w=weight)
    cast = parse_model(
        text + "(float[N, 4] x) => (float[N, 3] y) { v = Cast <to = 1> (w)  y = MatMul (x, v) }", w=weight
    )
    rng = np.random.default_rng(1)
    arrays = {"x": rng.standard_normal((32, 4), dtype=np.float32)}
    for model, kind in ((half, np.float16), (cast, np.float32)):
        data = ArrayDataset(
            name="d",
            count=32,
            rows=None,
            fetch=lambda indices, kind=kind: {"x": arrays["x"][indices].astype(kind)},
            hash_data=lambda found: None,
            labels=rng.integers(3, size=32),
        )
        graph = ModelGraph(load_model_file(model))
        if model is half:
            with pytest.raises(ModelError, match="g: layer 'w' computes in float16, expected float32; export the"):
                finetune(graph, data, REQUEST)
        else:
            found = finetune(graph, data, REQUEST)
            assert found.epochs[-1].loss < found.epochs[0].loss


def test_augmented_images_are_moved_and_mirrored() -> None:
    images = torch.arange(2 * 16 * 16, dtype=torch.float32).reshape(1, 2, 16, 16).expand(200, -1, -1, -1)
    found = module._augmented(images, np.random.default_rng(0)).numpy()
    assert found.shape == (200, 2, 16, 16)
    plain, padded = images[0].numpy(), np.pad(images[0].numpy(), ((0, 0), (2, 2), (2, 2)), "reflect")
    windows = [padded[:, r : r + 16, c : c + 16] for r in range(5) for c in range(5)]
    allowed = {part.tobytes() for window in windows for part in (window, window[:, :, ::-1])}
    assert {image.tobytes() for image in found} <= allowed
    assert len({image.tobytes() for image in found}) > 30
    assert plain.tobytes() in allowed


def test_what_does_not_fit(graph: ModelGraph, task: Path) -> None:
    with pytest.raises(ConfigError, match="--prune: takes at least two epochs, one to draw the weights"):
        trained(graph, task, replace(REQUEST, epochs=1, ratios={"*": 0.5}))
    with pytest.raises(ConfigError, match="expected at least one epoch, one image a step and a learning rate in"):
        trained(graph, task, replace(REQUEST, learning_rate=0.0))
    data = open_task(graph, task)
    huge = replace(data, fetch=lambda indices: {"image": np.full((len(indices), 3, 4, 4), 1e38, np.float32)})
    with pytest.raises(ConfigError, match=r"the loss is (nan|inf) in epoch 1; use a smaller --learning-rate, or look"):
        finetune(graph, huge, REQUEST)
    unlabelled = replace(data, name="plain", labels=None)
    with pytest.raises(DataError, match="plain: has no labels, expected labelled images to train with"):
        finetune(graph, unlabelled, REQUEST)
    many = replace(data, name="many", labels=data.labels + 20)
    with pytest.raises(
        DataError, match=r"many: labels up to 23 of 16 images, but the model's first output is \[16, 10\]"
    ):
        finetune(graph, many, REQUEST)


def test_the_command(graph: ModelGraph, task: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "small.onnx", tmp_path / "out"
    write_model_file(graph.model, model)
    words = ["finetune", str(model), "--data", f"npz:{task}", "--epochs", "2", "--prune", "0.5", "--protect", ""]
    found = CliRunner().invoke(main, [*words, "--failure-rate", "0.01", "-o", str(out)])
    assert found.exit_code == 0, found.output
    assert sorted(path.name for path in out.iterdir()) == ["masks.safetensors", "model.onnx", "training.json"]
    record = json.loads((out / "training.json").read_text())
    assert [epoch["distance"] is None for epoch in record["epochs"]] == [False, True]
    assert sum(record["zeros"].values()) == (216 + 1280) // 2
    compiled = CliRunner().invoke(
        main, ["compile", str(out / "model.onnx"), "--masks", str(out / "masks.safetensors"), "-o", str(tmp_path / "d")]
    )
    assert compiled.exit_code == 0, compiled.output
    assert record["data"]["images"] == 160
    assert record["request"]["ratios"] == {"*": 0.5}
    assert record["request"]["defects"]["stuck_on"] == pytest.approx(0.01 * 5.2 / 6.2)
    (out / ".unfinished.safetensors").write_bytes(b"cut short")  # as a kill in the middle of writing leaves it
    again = CliRunner().invoke(main, [*words[:6], "--images", "1000", "--json", "-o", str(out)])
    assert again.exit_code == 0, again.output
    record = json.loads(again.stdout)
    assert (record["data"]["images"], record["request"]["defects"]) == (160, None)
    assert sorted(path.name for path in out.iterdir()) == ["masks.safetensors", "model.onnx", "training.json"]


def test_the_split_that_is_named_is_the_one_that_trains(
    parse_model: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    """Five training files of two images and one of five: without a split it is the five."""
    rng = np.random.default_rng(0)
    model = parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 32, 32] x) => (float[N, 10] y) { h = GlobalAveragePool (x)  f = Flatten (h)  y = MatMul (f, w) }
        """,
        w=rng.standard_normal((3, 10), dtype=np.float32),
    )
    onnx.save(model, tmp_path / "m.onnx")
    for name, count in {**{f"data_batch_{n}": 2 for n in range(1, 6)}, "test_batch": 5}.items():
        records = rng.integers(256, size=(count, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
    words = [
        "finetune",
        str(tmp_path / "m.onnx"),
        "--epochs",
        "1",
        "-q",
        "--json",
        "-o",
        str(tmp_path / "out"),
        "--data",
    ]
    for split, images in (("", 10), ("@data_batch_5", 2), ("@test", 5)):
        found = CliRunner().invoke(main, [*words, f"cifar10:{tmp_path}{split}"])
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)["data"]["images"] == images
