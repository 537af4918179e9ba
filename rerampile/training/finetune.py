"""Training of a pruned model's weights: with masks, towards sparsity by ADMM, and with random defects.

The loss is the cross-entropy of the labels; Adam, with a learning rate that rises for a tenth of the steps and falls to
zero along a cosine. Batch normalisation is constant here, or folded into the weights, so that gradients have a size of
their own in each model, and so would the learning rate of SGD. Three things can be combined:

* Weights that masks say, and those that are zero already, stay exactly zero.
* ADMM with backpropagation (Zhang et al. 2018, the pruning of Yuan et al. 2021) for the first half of the epochs:
  weights are drawn to the nearest sparse ones, ``rho / 2 |W - Z + U|^2``, with ``Z`` and ``U`` renewed again and again
  and a growing ``rho``; then the smallest go, and the other half trains what is left. ``U`` is the multiplier over
  ``rho``, so it shrinks as that grows (Boyd et al. 2011, section 3.4.1). The pull is a step of its own beside Adam's,
  as decay is in AdamW (Loshchilov and Hutter 2019): Adam would divide it by the size of gradients, and no ``rho`` would
  fit two models.
* Random defects at every step (Kim et al. 2020): the loss is that of a chip with stuck cells, and its gradients go to
  the weights as if these had been read (:mod:`rerampile.training.stuck_weights`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto
from torch.nn import functional

from rerampile.editable_model import EditableModel
from rerampile.errors import ConfigError, DataError, ModelError
from rerampile.graph import ModelGraph
from rerampile.layer import Layer
from rerampile.onnx_file import ModelFile
from rerampile.passes.find_layers import find_layers
from rerampile.passes.pruning.constraint import Sparsity
from rerampile.passes.pruning.ratios import asked_ratios, protected_layers
from rerampile.runtime.dataset import Batch, Dataset
from rerampile.tensor_file import TensorFile, TensorWriter
from rerampile.training.stuck_weights import Defects, StuckWeights
from rerampile.training.torch_graph import TorchGraph

__all__ = ["Epoch", "FinetuneRequest", "Finetuned", "finetune"]

_RISE = 0.1  # share of a phase in which the learning rate rises: Adam's first steps move every weight by all of it
_PULL = 5.0  # of ADMM in all: what nothing holds back ends at exp(-5) of its distance
_GROWTH = 10.0  # of rho, from the first pull of ADMM to the last one
_RENEWALS = 10  # of Z and U, at least
_FORMAT = "rerampile-training"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what Adam knows of a parameter
_SHIFT = 8  # images are moved by up to this part of their height and width

Masks = Mapping[str, npt.NDArray[np.bool_]]
Progress = Callable[[int, int, int, int, float], None]


@dataclass(frozen=True, kw_only=True)
class FinetuneRequest:
    """What is asked of a training.

    Attributes:
        epochs: Passes over the images.
        batch: Images a step.
        learning_rate: The largest.
        augment: Whether images are mirrored at random, and moved by up to an eighth.
        seed: Of the order of the images, of that, and of defects.
        ratios: Share of the weights that goes by ADMM, by block or layer name pattern; empty for none.
        protect: Layers that ADMM leaves whole, as of :class:`rerampile.pruning.PruneRequest`.
        defects: What is drawn at every step, or None.
    """

    epochs: int = 5
    batch: int = 128
    learning_rate: float = 3e-4
    augment: bool = False
    seed: int = 0
    ratios: Mapping[str, float] = field(default_factory=dict)
    protect: tuple[str, ...] = ("first", "last")
    defects: Defects | None = None


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One pass over the images.

    Attributes:
        loss: Mean cross-entropy, with defects where they were drawn.
        accuracy: Share of the images whose greatest output was the label's, percent, in training.
        distance: While ADMM lasts, how far the weights are from the nearest sparse ones, over their own length: what
            would go if it ended here. None afterwards, and without it.
    """

    loss: float
    accuracy: float
    distance: float | None


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """A trained model.

    Attributes:
        model: The model, with other weights and biases.
        kept: Which weights are not pruned, by the name of their tensor, in its shape; of layers with any that are.
        epochs: What each epoch came to.
    """

    model: ModelFile
    kept: dict[str, npt.NDArray[np.bool_]]
    epochs: list[Epoch]


def finetune(
    graph: ModelGraph,
    data: Dataset,
    request: FinetuneRequest,
    *,
    masks: Masks | None = None,
    images: int | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Finetuned:
    """Train the weights of a model's layers, and the biases that they have or may have.

    Args:
        graph: The model, which stays as it is. Everything else of it, batch normalisation too, is constant.
        data: Labelled images.
        request: What is asked.
        masks: Which weights to keep, by layer name, [groups * outputs, inputs]; zeros of the model stay in any case.
        images: How many of the images to use, the first ones; None for all.
        checkpoint: A file that takes where the training stands after each epoch; the same call goes on from it, to the
            same weights on the same machine.
        progress: Called with (epoch, epochs, images done in it, images, mean loss in it).

    Raises:
        ConfigError: The request does not fit the model, or the loss is no longer finite.
        DataError: The images have no labels or do not fit the model, or the checkpoint is of another training.
        ModelError: The model cannot be trained through.
    """
    training = _Training(graph, data, request, masks or {}, images)
    epochs = [] if checkpoint is None else _restore(training, checkpoint)
    for number in range(len(epochs), request.epochs):
        epochs.append(training.epoch(number, progress))
        if checkpoint is not None:
            _save(training, epochs, checkpoint)
    return training.result(epochs)


class _Training:
    """Weights, and what trains them.

    Attributes:
        experiment: A hash of everything that the result depends on.
        parameters: What is trained, by the name of its tensor in the model.
        kept: Which weights are not pruned, by the same names.
        admm: What draws weights to sparse ones; None where nothing does.
        optimiser: What moves them; every parameter has a gradient, of zeros where the loss does not depend on it.
    """

    def __init__(
        self, graph: ModelGraph, data: Dataset, request: FinetuneRequest, masks: Masks, images: int | None
    ) -> None:
        _check(request, data)
        found, _ = find_layers(graph)
        self._layers = [layer for layer in found if not layer.integer]
        _check_types(graph, self._layers)
        self._graph, self._data, self._request = graph, data, request
        self._images = min(len(data), images or len(data))
        self._editable = EditableModel(graph, self._layers)
        self._function = TorchGraph(self._editable.model)
        self._input = _image_input(self._function, data)
        self._names = {layer.name: self._editable.weight_name(layer) for layer in self._layers}
        self.parameters = self._initial()
        self.kept = {self._names[layer.name]: self._mask(layer, masks) for layer in self._layers}
        self._zero()
        self.admm = _Admm(request, found, self.parameters, self._names) if request.ratios else None
        self._stuck = (
            {self._names[layer.name]: StuckWeights(request.defects, layer) for layer in self._layers}
            if request.defects is not None
            else {}
        )
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimiser = torch.optim.Adam(self.parameters.values(), lr=request.learning_rate)
        self.experiment = self._hash(masks)

    def _initial(self) -> dict[str, torch.Tensor]:
        """Return weights and biases as they are in the model."""
        stored = {tensor.name: tensor for tensor in self._editable.model.proto.graph.initializer}
        names = [name for layer in self._layers for name in (self._names[layer.name], self._editable.bias_name(layer))]
        arrays = {name: self._editable.model.array(stored[name]) for name in names if name is not None}
        return {name: torch.from_numpy(array.astype(np.float32)).requires_grad_() for name, array in arrays.items()}

    def _mask(self, layer: Layer, masks: Masks) -> torch.Tensor:
        """Return which weights to keep, in the shape of the layer's tensor."""
        kept = self.parameters[self._names[layer.name]].detach().numpy() != 0
        if layer.name in masks:
            kept &= layer.view.tensor(masks[layer.name])
        return torch.from_numpy(kept)

    def _zero(self) -> None:
        with torch.no_grad():
            for name, kept in self.kept.items():
                self.parameters[name].mul_(kept)

    def _hash(self, masks: Masks) -> str:
        model, request = self._graph.model, self._request
        defects = request.defects
        drawn = None if defects is None else [defects.target.to_dict(), defects.coding.scheme, defects.faults.key]
        parts: list[Any] = [model.sha256, sorted(model.external.items()), self._data.digest, self._images, drawn]
        parts += [None if defects is None else defects.scale, asdict(replace(request, defects=None)), torch.__version__]
        hashed = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        for name in sorted(masks):
            hashed.update(name.encode() + np.packbits(masks[name]).tobytes())
        return hashed.hexdigest()

    def epoch(self, number: int, progress: Progress | None) -> Epoch:
        """Go over the images once."""
        request = self._request
        random = np.random.default_rng((request.seed, number))
        alternating = self.admm is not None and number < self.admm.epochs
        first, last = (0, request.epochs) if self.admm is None else self.admm.phase(number)
        total = right = done = 0.0
        for batch in self._data.batches(request.batch, random.permutation(self._images)):
            share = (number - first + done / self._images) / (last - first)
            rise = min(1.0, (share + len(batch.indices) / self._images / (last - first)) / _RISE)
            self._learn_at(request.learning_rate * rise * (1 + math.cos(math.pi * share)) / 2)
            logits, labels = self._logits(batch, random)
            loss = functional.cross_entropy(logits, labels)
            found = float(loss.detach())
            if not math.isfinite(found):
                raise ConfigError(
                    f"the loss is {found} in epoch {number + 1}; use a smaller --learning-rate, or look for inputs "
                    f"that are too large"
                )
            self.optimiser.zero_grad(set_to_none=False)
            loss.backward()
            self.optimiser.step()
            total += found * len(labels)
            right += int((logits.argmax(1) == labels).sum())
            before, done = done, done + len(labels)
            if self.admm is not None and alternating:
                self.admm.pull(self.parameters, number + before / self._images, number + done / self._images)
            self._zero()
            if progress is not None:
                progress(number, request.epochs, int(done), self._images, total / done)
        for name, parameter in self.parameters.items():
            if not torch.isfinite(parameter).all():
                raise ConfigError(f"'{name}' is not finite after epoch {number + 1}; use a smaller --learning-rate")
        distance = None
        if self.admm is not None and alternating:
            distance = self.admm.distance(self.parameters)
            if number == self.admm.epochs - 1:
                self.kept.update(self.admm.supports(self.parameters, self.kept))
                self._zero()
        return Epoch(loss=total / done, accuracy=100 * right / done, distance=distance)

    def _learn_at(self, rate: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def _logits(self, batch: Batch, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of a batch, with stuck cells where they are asked for, and its labels."""
        count = len(batch.indices)
        inputs = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.inputs.items()}
        fed = len(inputs[self._input])  # more than there are where a fixed batch is filled up
        if self._request.augment:
            inputs[self._input] = _augmented(inputs[self._input], random)
        output = self._function.run(inputs, {name: self._read(name, random) for name in self.parameters})
        labels = torch.from_numpy(np.asarray(batch.targets)[:count].astype(np.int64))
        if output.ndim != 2 or len(output) != fed or int(labels.max()) >= output.shape[1]:
            raise DataError(
                f"{self._data.name}: labels up to {int(labels.max())} of {count} images, but the model's first output "
                f"is {list(output.shape)}, expected [images, classes]"
            )
        output = output[:count]
        return (torch.log(output.clamp_min(1e-12)) if self._function.output_operator == "Softmax" else output), labels

    def _read(self, name: str, random: np.random.Generator) -> torch.Tensor:
        """Return a parameter as the chip of this step reads it; its gradient is that of the parameter."""
        parameter = self.parameters[name]
        if name not in self._stuck:
            return parameter
        plain = parameter.detach()
        index, value = self._stuck[name].draw(plain.numpy(), random)
        change = torch.zeros_like(plain).reshape(-1)
        change[index] = torch.from_numpy(value) - plain.reshape(-1)[index]
        return parameter + change.reshape(plain.shape)

    def result(self, epochs: list[Epoch]) -> Finetuned:
        """Return the model as it is now."""
        before = self._initial()
        for layer in self._layers:
            name, bias = self._names[layer.name], self._editable.bias_name(layer)
            matrix, factor = layer.view.matrix(self.parameters[name].detach().numpy()), layer.fold_factor()
            self._editable.set_weights(layer, matrix if factor is None else matrix * factor)
            if bias is not None:
                shift = (self.parameters[bias] - before[bias]).detach().numpy().astype(np.float64)
                self._editable.shift(layer, shift if layer.output_factor is None else shift * layer.output_factor)
        kept = {name: mask.numpy() for name, mask in self.kept.items() if not mask.all()}
        return Finetuned(model=self._editable.model, kept=kept, epochs=epochs)


class _Admm:
    """The alternating direction method of multipliers: weights, their sparse neighbours Z, and the duals U.

    Attributes:
        epochs: How many it takes; the others train what is left.
        sparse: Z by the name of the tensor.
        duals: U.
    """

    def __init__(
        self,
        request: FinetuneRequest,
        layers: Sequence[Layer],
        parameters: Mapping[str, torch.Tensor],
        names: Mapping[str, str],
    ) -> None:
        protected = protected_layers(request.protect, layers)
        ratios = asked_ratios(request.ratios, layers)
        self._ratios = {
            names[name]: ratio for name, ratio in ratios.items() if name in names and name not in protected and ratio
        }
        self._last, self.epochs = request.epochs, request.epochs // 2
        self.sparse = {name: self._nearest(name, parameters[name].detach()) for name in self._ratios}
        self.duals = {name: torch.zeros_like(sparse) for name, sparse in self.sparse.items()}

    def phase(self, number: int) -> tuple[int, int]:
        """Return the first epoch of the phase of an epoch, and the first one after it."""
        return (0, self.epochs) if number < self.epochs else (self.epochs, self._last)

    def _nearest(self, name: str, weights: torch.Tensor) -> torch.Tensor:
        """Return the nearest tensor with the asked share of zeros."""
        flat = weights.numpy().reshape(1, 1, -1)
        found = Sparsity(self._ratios[name]).project(flat, np.ones((1, flat.size), np.float32))
        return torch.from_numpy(found.astype(np.float32).reshape(weights.shape))

    def pull(self, parameters: Mapping[str, torch.Tensor], begin: float, end: float) -> None:
        """Draw weights to ``Z - U`` as much as a part of the epochs asks for, and renew both where it is time."""
        renewals = max(_RENEWALS, self.epochs)
        first, last = (math.floor(renewals * epoch / self.epochs + 1e-9) for epoch in (begin, end))
        growth = _GROWTH ** (1 / (renewals - 1))
        rho = _PULL * growth**first * (growth - 1) / (growth**renewals - 1)  # of all renewals together: _PULL
        share = -math.expm1(-rho * renewals * (end - begin) / self.epochs)
        with torch.no_grad():
            for name, sparse in self.sparse.items():
                parameters[name].lerp_(sparse - self.duals[name], share)
        if last > first:
            self._renew(parameters, growth ** (last - first))

    def _renew(self, parameters: Mapping[str, torch.Tensor], growth: float) -> None:
        """Renew Z and U when rho grows."""
        for name, duals in self.duals.items():
            far = parameters[name].detach() + duals
            self.sparse[name] = self._nearest(name, far)
            self.duals[name] = (far - self.sparse[name]) / growth

    def distance(self, parameters: Mapping[str, torch.Tensor]) -> float:
        """Return how far the weights are from sparse ones (:class:`Epoch`)."""
        weights = {name: parameters[name].detach() for name in self.sparse}
        far = sum(float(torch.sum((w - self._nearest(name, w)) ** 2)) for name, w in weights.items())
        length = sum(float(torch.sum(w**2)) for w in weights.values())
        return math.sqrt(far / length) if length else 0.0

    def supports(
        self, parameters: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return which weights are left in the end."""
        return {name: kept[name] & (self._nearest(name, parameters[name].detach()) != 0) for name in self.sparse}


def _check(request: FinetuneRequest, data: Dataset) -> None:
    if data.kind != "labels":
        raise DataError(f"{data.name}: has no labels, expected labelled images to train with")
    if request.epochs < 1 or request.batch < 1 or not 0 < request.learning_rate <= 1:
        raise ConfigError("expected at least one epoch, one image a step and a learning rate in (0, 1]")
    if request.ratios and request.epochs < 2:
        raise ConfigError("--prune: takes at least two epochs, one to draw the weights and one to train what is left")


def _check_types(graph: ModelGraph, layers: Sequence[Layer]) -> None:
    for layer in layers:
        if layer.element_type != TensorProto.FLOAT:
            kind = TensorProto.DataType.Name(layer.element_type).lower()
            raise ModelError(
                f"{graph.model.name}: layer '{layer.name}' computes in {kind}, expected float32; export the model in "
                f"float32 (weights may be stored in other types, and cast)"
            )


def _image_input(function: TorchGraph, data: Dataset) -> str:
    """Return the name of the model's only input."""
    if len(function.inputs) != 1:
        raise DataError(f"{data.name}: the model has {len(function.inputs)} inputs, expected one, of images")
    return function.inputs[0]


def _augmented(images: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Return images [n, channels, height, width], half of them mirrored, each moved, with a reflected border."""
    if images.ndim != 4 or images.shape[1] > 4:
        raise ConfigError(f"--augment: inputs are {list(images.shape)}, expected [images, channels, height, width]")
    count, _, height, width = images.shape
    room = height // _SHIFT, width // _SHIFT
    padded = functional.pad(images, (room[1], room[1], room[0], room[0]), mode="reflect")
    mirrored = random.random(count) < 0.5
    rows = random.integers(2 * room[0] + 1, size=count)[:, None] + np.arange(height)
    columns = random.integers(2 * room[1] + 1, size=count)[:, None] + np.arange(width)
    columns = np.where(mirrored[:, None], columns[:, ::-1], columns)
    moved = padded[
        torch.arange(count)[:, None, None], :, torch.from_numpy(rows)[:, :, None], torch.from_numpy(columns)[:, None, :]
    ]
    return moved.permute(0, 3, 1, 2).contiguous()


# where a training stands ----------------------------------------------------------------------------


def _tensors(training: _Training) -> dict[str, torch.Tensor]:
    """Return everything that the next epoch starts from, by name."""
    found = {f"parameter/{name}": parameter.detach() for name, parameter in training.parameters.items()}
    found |= {f"kept/{name}": kept for name, kept in training.kept.items()}
    for name, parameter in training.parameters.items():
        state = training.optimiser.state[parameter]
        found |= {f"{key}/{name}": state[key] for key in _MOMENTS}
    if training.admm is not None:
        found |= {f"sparse/{name}": sparse for name, sparse in training.admm.sparse.items()}
        found |= {f"dual/{name}": dual for name, dual in training.admm.duals.items()}
    return found


def _save(training: _Training, epochs: Sequence[Epoch], path: Path) -> None:
    """Write where the training stands, whole or not at all."""
    tensors = {name: tensor.numpy() for name, tensor in _tensors(training).items()}
    metadata = {"format": _FORMAT, "experiment": training.experiment, "epochs": json.dumps([asdict(e) for e in epochs])}
    temporary = path.with_name(f".{path.name}")
    temporary.unlink(missing_ok=True)
    specs = [(name, array.dtype, array.shape) for name, array in tensors.items()]
    with TensorWriter(temporary, specs, metadata) as writer:
        for name in writer.specs:
            writer.write(name, tensors[name])
    temporary.replace(path)


def _restore(training: _Training, path: Path) -> list[Epoch]:
    """Go back to where a training stood; return its epochs, none where nothing was written.

    Raises:
        DataError: The file is of another training.
    """
    if not path.exists():
        return []
    file = TensorFile(path)
    if (file.metadata.get("format"), file.metadata.get("experiment")) != (_FORMAT, training.experiment):
        raise DataError(f"{path}: belongs to another training; remove it to start anew, or name another folder with -o")
    for parameter in training.parameters.values():
        training.optimiser.state[parameter] = {
            key: torch.tensor(0.0) if key == "step" else torch.zeros_like(parameter, requires_grad=False)
            for key in _MOMENTS
        }
    with torch.no_grad():
        for name, tensor in _tensors(training).items():
            tensor.copy_(torch.from_numpy(file.read(name).copy()))
    return [Epoch(**epoch) for epoch in json.loads(file.metadata["epochs"])]
