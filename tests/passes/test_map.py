"""What the map pass decides: the coding, the full scale, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rerampile import ConfigError, Deployment, ModelError

Compile = Callable[..., Deployment]
TEXT = '<ir_version: 8, opset_import: ["" : 17]> g (float[2,3] x) => (float[] y) { y = Gemm <transB=1> (x, W) }'
WEIGHTS = {"W": np.array([[1, -2, 0.5], [0.25, 0, 0]], np.float32)}


def test_scale_a_channel_or_a_tensor(compile_text: Compile) -> None:
    span = 99e-6
    for scale, full_scales in (("channel", [2, 0.25]), ("tensor", [2, 2])):
        deployment = compile_text(TEXT, WEIGHTS, scale=scale)
        gain = deployment.gain(deployment.plan.layers[0])
        np.testing.assert_allclose(gain, np.array(full_scales) / span, rtol=1e-5)


def test_target_gives_the_default_mapping(compile_text: Compile, discrete_target: Callable[..., Any]) -> None:
    deployment = compile_text(TEXT, WEIGHTS, target=discrete_target(mapping="balanced"))
    assert deployment.plan.layers[0].scheme == "balanced"


def test_mean_pair_conductance(compile_text: Compile) -> None:
    """A pair conducts 2 * g_on - |w| with the differential scheme, 2 * g_off + |w| with two columns."""
    share = np.mean([0.5, 1, 0.25, 1, 0, 0]) * 99e-6
    for scheme, mean in (("differential", 200e-6 - share), ("two_column", 2e-6 + share), ("balanced", 101e-6)):
        deployment = compile_text(TEXT, WEIGHTS, mapping=scheme)
        assert deployment.plan.totals.mean_pair_conductance == pytest.approx(mean, rel=1e-5)


def test_one_cell_of_two_levels_holds_no_offset(compile_text: Compile, discrete_target: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="mapping 'offset': one cell of 2 levels holds zero and weights of one sign"):
        compile_text(TEXT, WEIGHTS, mapping="offset", target=discrete_target(levels=2))
    compile_text(TEXT, WEIGHTS, mapping="offset", target=discrete_target(levels=2, slices=2))


@pytest.mark.parametrize("largest", [1e-44, 1e-38, 1e30])
def test_extreme_weights(largest: float, compile_text: Compile, discrete_target: Callable[..., Any]) -> None:
    weights = {"W": np.array([[largest, -largest, 0], [1, 0.5, 0]], np.float32)}
    for options in ({}, {"scale": "tensor"}, {"target": discrete_target(levels=16)}):
        compile_text(TEXT, weights, **options)


def test_weights_beyond_float32_gains(compile_text: Compile, discrete_target: Callable[..., Any]) -> None:
    weights = {"W": np.array([[1e36, 1, 0], [1, 0.5, 0]], np.float32)}
    with pytest.raises(ModelError, match=r"layer 'W': weights of up to 1e\+36, expected at most 3.37e\+34"):
        compile_text(TEXT, weights)
    compile_text(TEXT, weights, target=discrete_target(levels=16))


def test_whole_numbers_beyond_the_levels_are_held_as_whole_numbers(
    compile_text: Compile, discrete_target: Callable[..., Any]
) -> None:
    """Fifteen steps for weights up to 95: each step is worth 7, the next whole number above 95 / 15."""
    text = '<ir_version: 8, opset_import: ["" : 17]> g (uint8[2,3] x) => (int32[] y) { y = MatMulInteger (x, W) }'
    values = np.array([[95, 14], [-50, 3], [7, -15]], np.int8)
    deployment = compile_text(text, {"W": values}, target=discrete_target(levels=16))
    (layer,) = deployment.plan.layers
    assert deployment.gain(layer).tolist() == [7, 1]
    assert deployment.weights(layer).tolist() == [[98, -49, 7], [14, 3, -15]]
