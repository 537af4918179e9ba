"""What the layers of a deployed model see on calibration images, and which of them have a bias to shift."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from rerampile.deployment import Deployment
from rerampile.digital_bias import own_tensors
from rerampile.editable_model import BIAS, can_shift
from rerampile.errors import DataError
from rerampile.graph import ModelGraph
from rerampile.onnx_file import load_model_file
from rerampile.passes.find_layers import find_layers
from rerampile.runtime.dataset import Dataset, spread
from rerampile.runtime.plain_model import plain_model
from rerampile.runtime.second_moments import second_moments

__all__ = ["Calibration", "LayerBias", "calibrate"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class LayerBias:
    """A bias that is added digitally to a layer's products, for it alone.

    Attributes:
        name: Its initializer in the deployed model.
        scale: What products are multiplied by before it is added: ``alpha`` of a Gemm, else 1.
        mean: Mean of the layer's inputs, float32 [groups, inputs].
    """

    name: str
    scale: float
    mean: Floats


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What layers see on calibration images.

    Attributes:
        name: The data.
        images: How many images.
        moments: By position of the layer in the plan: mean of x x^T, float32 [groups, inputs, inputs].
        biases: The same of layers that have a bias of their own.
    """

    name: str
    images: int
    moments: Mapping[int, Floats]
    biases: Mapping[int, LayerBias]


def calibrate(
    deployment: Deployment, data: Dataset, images: int, progress: Callable[[int, int], None] | None = None
) -> Calibration:
    """Run calibration images through a deployed model without faults; layers that cannot be observed are left out.

    Args:
        deployment: The deployment.
        data: Images; targets are not needed.
        images: How many of them to use at most.
        progress: Called with (images done, all images).

    Raises:
        DataError: No layer can be observed on these images.
    """
    plain = plain_model(deployment)
    for tensor in plain.proto.graph.initializer:
        if tensor.name in plain.weights:
            mapped = deployment.plan.layers[plain.weights.index(tensor.name)]
            weights = np.ascontiguousarray(mapped.view.tensor(deployment.weights(mapped)), "<f4")
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = weights.tobytes()
    graph = ModelGraph(load_model_file(plain.proto))
    numbers = {name: number for number, name in enumerate(plain.weights)}
    layers = [layer for layer in find_layers(graph)[0] if layer.name in numbers]
    chosen = spread(len(data), min(images, len(data)))
    found, reasons = second_moments(graph, layers, data, chosen, progress=progress)
    if not found:
        raise DataError(f"{data.name}: nothing to learn for any layer: {'; '.join(sorted(set(reasons.values())))}")
    own = own_tensors(onnx.load_model(deployment.model_path, load_external_data=False))
    shared: dict[int, Floats] = {}  # by identity: layers that see the same share one result
    moments: dict[int, Floats] = {}
    biases: dict[int, LayerBias] = {}
    for layer in layers:
        number = numbers[layer.name]
        plan, seen = deployment.plan.layers[number], found.get(layer.name)
        if seen is None or seen.moment.shape != (plan.groups, plan.inputs, plan.inputs) or not seen.count:
            continue
        if id(seen) not in shared:
            shared[id(seen)] = (seen.moment / seen.count).astype(np.float32)
        moments[number] = shared[id(seen)]
        node = layer.uses[0][0]
        bias = node.input(BIAS) if can_shift(graph, layer) else None
        if bias is not None and bias.name in own:
            mean = (seen.total / seen.count).astype(np.float32)
            biases[number] = LayerBias(name=bias.name, scale=float(node.attribute("alpha", 1.0)), mean=mean)
    return Calibration(name=data.name, images=len(chosen), moments=moments, biases=biases)
