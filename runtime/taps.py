"""Tensors inside models, watched while calibration images run: one or more models side by side, batch by batch.

Only what the watched tensors depend on is run. The images at once follow from the size of what is watched, so that
large models process few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper

from rerampile.errors import ConfigError, DataError
from rerampile.onnx_file import ModelFile, copy_without, iter_graphs
from rerampile.runtime.dataset import Batch, Dataset, Indices
from rerampile.runtime.session import open_session, run

__all__ = ["Progress", "Tap", "Watched"]

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]

_AT_ONCE = 256 << 20  # bytes of watched tensors of one batch
_LARGEST_BATCH = 64


@dataclass(frozen=True)
class Tap:
    """A tensor of the main graph to watch, as float32.

    Attributes:
        tensor: Its name.
        zero_point: A tensor to subtract from it, for quantised numbers; "" for none.
    """

    tensor: str
    zero_point: str = ""

    @property
    def output(self) -> str:
        """Name of the output that shows it."""
        return f"ai.rerampile/{self.tensor}" + (f"/less/{self.zero_point}" if self.zero_point else "")

    def nodes(self) -> list[NodeProto]:
        """Return the nodes that make the output."""
        if not self.zero_point:
            return [_cast(self.tensor, self.output)]
        value, zero = f"{self.output}/value", f"{self.output}/zero"
        return [
            _cast(self.tensor, value),
            _cast(self.zero_point, zero),
            helper.make_node("Sub", [value, zero], [self.output]),
        ]


def _cast(tensor: str, output: str) -> NodeProto:
    return helper.make_node("Cast", [tensor], [output], to=TensorProto.FLOAT)


class Watched:
    """Models whose tensors are watched.

    Args:
        models: The models, each with the tensors to watch.
        taps: What to watch in each of them.
        data: Images.
        images: Which of them to run, in this order.
        batch: Images at once, or None for as many as 256 MiB of watched tensors allow, at most 64.
        extra: Nodes to add to each model, which make further tensors.

    Attributes:
        batch: Images at once. Only a model with a fixed batch runs another number.

    Raises:
        ConfigError: ``batch`` is less than one.
        DataError: There are no images.
        FaultRunError: ONNX Runtime refuses a model or its inputs.
    """

    def __init__(
        self,
        models: Sequence[ModelFile],
        taps: Iterable[Tap],
        data: Dataset,
        images: Indices,
        batch: int | None = None,
        extra: Sequence[NodeProto] = (),
    ) -> None:
        if len(images) == 0:
            raise DataError("no images to calibrate with, expected one or more")
        if batch is not None and batch < 1:
            raise ConfigError(f"--batch: {batch}, expected 1 or more")
        self._taps = list(dict.fromkeys(taps))
        self._sessions = [_open(model, self._taps, extra) for model in models] if self._taps else []
        self._data, self._images = data, images
        self.batch = batch if batch is not None else self._fitting_batch()

    def _fitting_batch(self) -> int:
        first = next(iter(self._data.batches(1, self._images)))
        size = sum(array.nbytes for result in self._run(first.inputs) for array in result.values())
        return max(1, min(_LARGEST_BATCH, _AT_ONCE // max(size, 1)))

    def results(self, progress: Progress | None = None, skip: int = 0) -> Iterator[list[dict[Tap, Floats]]]:
        """Yield what each model shows of each batch.

        A batch that was filled up, because a model's batch is fixed, is left out: its last image would count more than
        once.

        Args:
            progress: Called with (images done, all images) after each batch has been used.
            skip: Batches that are not run: those of an earlier start.

        Raises:
            DataError: An image cannot be read, or there are fewer than a model runs at once.
            FaultRunError: ONNX Runtime cannot run the inputs.
        """
        used = done = 0
        batches = iter(self._data.batches(self.batch, self._images))
        for batch in islice(batches, skip):
            done += len(batch.indices)
            used += not _filled_up(batch)
        if progress is not None:
            progress(done, len(self._images))
        for batch in batches:
            filled = _filled_up(batch)
            used += not filled
            done += len(batch.indices)
            yield [] if filled else self._run(batch.inputs)
            if progress is not None:
                progress(done, len(self._images))
        if not used:
            raise DataError(
                f"{self._data.name}: {len(self._images)} images, fewer than the model runs at once; give more of them"
            )

    def _run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> list[dict[Tap, Floats]]:
        results = []
        for session in self._sessions:
            needed = {value.name for value in session.get_inputs()}
            found = run(session, {name: array for name, array in inputs.items() if name in needed})
            results.append(dict(zip(self._taps, found, strict=True)))
        return results


def _filled_up(batch: Batch) -> bool:
    """Whether a batch holds more rows than images; inputs of different lengths are one image and no rows."""
    rows = {np.shape(array)[:1] for array in batch.inputs.values()}
    return len(rows) == 1 and rows != {()} and len(batch.indices) < rows.pop()[0]


def _open(model: ModelFile, taps: Sequence[Tap], extra: Sequence[NodeProto]) -> Any:
    proto = _tapped(model.proto, taps, extra)
    for tensor in proto.graph.initializer:
        model.put_back(tensor)
    options = ort.SessionOptions()
    if model.folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.folder))
    return open_session(proto.SerializeToString(), options)


def _tapped(proto: onnx.ModelProto, taps: Sequence[Tap], extra: Sequence[NodeProto]) -> onnx.ModelProto:
    """Return a model whose outputs are the taps, and of which only what they depend on is left."""
    nodes = [*proto.graph.node, *extra, *(node for tap in taps for node in tap.nodes())]
    read = {tap.output for tap in taps}
    kept = []
    for node in reversed(nodes):
        if read.intersection(node.output):
            kept.append(node)
            read |= _reads(node)
    model: onnx.ModelProto = copy_without(proto, "graph")
    model.graph.CopyFrom(copy_without(proto.graph, "node", "input", "output", "initializer", "sparse_initializer"))
    model.graph.node.extend(reversed(kept))
    for field in ("input", "initializer"):
        getattr(model.graph, field).extend(value for value in getattr(proto.graph, field) if value.name in read)
    model.graph.sparse_initializer.extend(t for t in proto.graph.sparse_initializer if t.values.name in read)
    model.graph.output.extend(helper.make_tensor_value_info(tap.output, TensorProto.FLOAT, None) for tap in taps)
    return model


def _reads(node: NodeProto) -> set[str]:
    """Return every name that a node reads, in its subgraphs too."""
    inner = [g for a in node.attribute if a.HasField("g") for g in iter_graphs(a.g)]
    read = {name for graph in inner for n in graph.node for name in n.input}
    return read.union(node.input, (value.name for graph in inner for value in graph.output))
