"""Masks by magnitude and from files, and every way in which they do not fit."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy

from rerampile import ConfigError, Deployment, compile_model, load_deployment

# Layers of the small model: conv_weight [8, 3, 3, 3] in block 8, fc_weight [10, 128] in block 10.
CONV, FC = "conv_weight", "fc_weight"


@pytest.fixture
def pruned(small_model: onnx.ModelProto, tmp_path: Path) -> Callable[..., Deployment]:
    return lambda **options: compile_model(small_model, out=tmp_path / "out", **options)


def zeros(deployment: Deployment) -> dict[str, int]:
    """Zero weights a layer, counted on what the cells hold."""
    return {p.name: int((deployment.weights(p) == 0).sum()) for p in deployment.plan.layers}


@pytest.mark.parametrize(
    ("prune", "expected"),
    [
        (None, {CONV: 0, FC: 0}),
        (0.6, {CONV: 130, FC: 768}),
        ({"8": 0.25}, {CONV: 54, FC: 0}),
        ({"*": 0.5, "10": 0.9}, {CONV: 108, FC: 1152}),
        ({"10": 0.9, "*": 0.5}, {CONV: 108, FC: 640}),  # the later one wins
        ({"conv_*": 0.1, "fc_weight": 0.2}, {CONV: 22, FC: 256}),
        ({"*": 0.5, "Gemm_scores": 0}, {CONV: 108, FC: 0}),  # by the name of the node; nothing is a ratio too
    ],
)
def test_ratios(prune: Any, expected: dict[str, int], pruned: Callable[..., Deployment]) -> None:
    deployment = pruned(prune=prune)
    assert zeros(deployment) == expected
    assert {p.name: p.zeros for p in deployment.plan.layers} == expected
    assert deployment.plan.totals.zeros == sum(expected.values())
    recorded = {p.name: (p.mask.kept, p.mask.total) for p in deployment.plan.layers if p.mask is not None}
    sizes = {CONV: 216, FC: 1280}
    assert recorded == {name: (sizes[name] - zeros_, sizes[name]) for name, zeros_ in expected.items() if zeros_}


def test_masks_are_saved_in_the_shape_of_the_weights(pruned: Callable[..., Deployment]) -> None:
    deployment = pruned(prune=0.5)
    masks = safetensors.numpy.load_file(deployment.folder / "masks.safetensors")
    assert {name: mask.shape for name, mask in masks.items()} == {CONV: (8, 3, 3, 3), FC: (10, 128)}
    for plan in deployment.plan.layers:
        np.testing.assert_array_equal(deployment.weights(plan) != 0, masks[plan.name].reshape(plan.outputs, -1))
        assert plan.mask is not None
        assert plan.mask.source == "magnitude 0.5"


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
@pytest.mark.parametrize("key", [FC, "Gemm_scores"], ids=["initializer", "node"])
@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.float32])
def test_masks_from_a_file(
    ending: str, key: str, dtype: Any, pruned: Callable[..., Deployment], tmp_path: Path
) -> None:
    mask = (np.arange(1280).reshape(10, 128) % 3 != 0).astype(dtype)
    path = tmp_path / f"masks.{ending}"
    if ending == "npz":
        np.savez(path, **{key: mask})
    else:
        safetensors.numpy.save_file({key: mask}, path)

    deployment = pruned(masks=path)

    assert zeros(deployment) == {CONV: 0, FC: 427}
    np.testing.assert_array_equal(deployment.weights(deployment.layer(FC)) != 0, mask != 0)
    assert [p.mask.source for p in deployment.plan.layers if p.mask is not None] == [path.name]


def test_saved_masks_can_be_given_again(pruned: Callable[..., Deployment], small_model: onnx.ModelProto) -> None:
    first = pruned(prune=0.5)
    again = compile_model(small_model, out=first.folder.parent / "again", masks=first.folder / "masks.safetensors")
    assert (first.folder / "conductances.safetensors").read_bytes() == (
        again.folder / "conductances.safetensors"
    ).read_bytes()
    assert load_deployment(again.folder).plan.layers[0].zeros == first.plan.layers[0].zeros


FULL = np.ones((10, 128), np.float32)

BAD_MASKS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "shape": ({FC: FULL.T}, r"mask 'fc_weight': shape \[128, 10\], expected \[10, 128\], the shape of its weights"),
    "name": ({"fc_weigth": FULL}, r"mask 'fc_weigth': no layer or initializer of that name \(did you mean fc_weight"),
    "values": ({FC: FULL * 0.5}, "mask 'fc_weight': values other than 0 and 1, expected 1 to keep and 0 to prune"),
    "negative": ({FC: -FULL}, "values other than 0 and 1"),
    "nan": ({FC: FULL * np.nan}, "values other than 0 and 1"),
    "structured": ({FC: np.zeros((10, 128), [("a", "i4")])}, "values other than 0 and 1"),
    "text": ({FC: np.full((10, 128), "1")}, "mask 'fc_weight'"),
    "twice": ({FC: FULL, "Gemm_scores": FULL}, "layer 'fc_weight' has a mask already; keep one of the two"),
    "objects": ({FC: np.full((10, 128), None)}, "type object, expected numbers of at most 1280 elements"),
    "oversized": ({FC: np.zeros((2000, 2000), np.bool_)}, r"shape \[2000, 2000\] of type bool, expected numbers"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_masks_that_do_not_fit(case: str, pruned: Callable[..., Deployment], tmp_path: Path) -> None:
    arrays, message = BAD_MASKS[case]
    np.savez_compressed(tmp_path / "masks.npz", **arrays)
    with pytest.raises(ConfigError, match=message) as caught:
        pruned(masks=tmp_path / "masks.npz")
    assert str(tmp_path / "masks.npz") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_masks(pruned: Callable[..., Deployment], tmp_path: Path) -> None:
    text, npy, missing = tmp_path / "masks.txt", tmp_path / "array.npz", tmp_path / "none.npz"
    text.write_text("fc_weight: 1")
    np.save(tmp_path / "array.npy", FULL)
    (tmp_path / "array.npy").rename(npy)
    foreign = tmp_path / "foreign.npz"
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("fc_weight.npy", b"no array")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"\xff" * 40)
    float8 = tmp_path / "float8.safetensors"
    header = b'{"fc_weight":{"dtype":"F8_E4M3","shape":[10,128],"data_offsets":[0,1280]}}'
    float8.write_bytes(len(header).to_bytes(8, "little") + header + bytes(1280))
    for path, message in (
        (text, "ending '.txt', expected .npz or .safetensors"),
        (npy, "not a readable masks file"),
        (missing, "not a readable masks file: .*No such file"),
        (foreign, "not a readable masks file"),
        (torn, "not a readable masks file"),
        (tmp_path, "ending ''"),
        (float8, "not a readable masks file: .*unreadable header entry"),
    ):
        with pytest.raises(ConfigError, match=message):
            pruned(masks=path)


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        (1.0, r"--prune 1: expected a ratio of 0 or more and less than 1"),
        (-0.1, "expected a ratio of 0 or more"),
        (float("nan"), "expected a ratio of 0 or more"),
        ({"64": 0.5}, r"64=0.5: no block and no layer of that name; expected a number of output channels or"),
        ({"fc_wieght": 0.5}, r"did you mean fc_weight"),
    ],
)
def test_ratios_that_do_not_fit(prune: Any, message: str, pruned: Callable[..., Deployment]) -> None:
    with pytest.raises(ConfigError, match=message):
        pruned(prune=prune)


def test_masks_or_ratios_not_both(pruned: Callable[..., Deployment], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both masks and pruning ratios were given, expected one of the two"):
        pruned(prune=0.5, masks=tmp_path / "masks.npz")


def test_a_weight_that_is_two_layers(
    parse_model: Callable[..., onnx.ModelProto], tmp_path: Path, weight: Callable[..., np.ndarray]
) -> None:
    """Read as it is and transposed: a mask or a ratio under the initializer's name is for both."""
    model = parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[2,4] x) => (float[2,4] y) {
            a = Gemm (x, W) y = Gemm <transB = 1> (a, W) }""",
        W=weight(4, 3),
    )
    keep = np.arange(12).reshape(4, 3) % 3 > 0
    np.savez(tmp_path / "masks.npz", W=keep)
    both = compile_model(model, out=tmp_path / "both", masks=tmp_path / "masks.npz")
    assert zeros(both) == {"W": 4, "W#2": 4}
    assert zeros(compile_model(model, out=tmp_path / "ratio", prune={"W": 0.5})) == {"W": 6, "W#2": 6}
    np.savez(tmp_path / "masks.npz", **{"W": keep, "W#2": keep > -1})
    own = compile_model(model, out=tmp_path / "own", masks=tmp_path / "masks.npz")
    assert zeros(own) == {"W": 4, "W#2": 0}


def test_a_name_with_brackets_is_no_pattern(
    parse_model: Callable[..., onnx.ModelProto], tmp_path: Path, weight: Callable[..., np.ndarray]
) -> None:
    model = parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[2,4] x) => (float[2,3] y) { y = MatMul (x, W) }""",
        W=weight(4, 3),
    )
    model.graph.node[0].input[1] = model.graph.initializer[0].name = "layers[0].weight"
    deployment = compile_model(model, out=tmp_path / "out", prune={"layers[0].weight": 0.5})
    assert zeros(deployment) == {"layers[0].weight": 6}
