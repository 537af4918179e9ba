"""Rewriting a graph node by node on ONNX's own messages, so that everything that is not rewritten stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import onnx

from rerampile.onnx_file import copy_without, iter_graphs

__all__ = ["UnusedNames", "rewrite_graph"]

Rewrite = Callable[[onnx.NodeProto], onnx.NodeProto | None]


class UnusedNames:
    """Names that no tensor of a model has yet."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._used = {
            name
            for graph in iter_graphs(proto.graph)
            for names in (
                (v.name for v in graph.input),
                (t.name for t in graph.initializer),
                (o for n in graph.node for o in n.output),
            )
            for name in names
        }

    def new(self, name: str) -> str:
        """Return ``name`` where it is free, else one like it; it is taken from now on."""
        while name in self._used:
            name += "_"
        self._used.add(name)
        return name


def rewrite_graph(graph: onnx.GraphProto, rewrite: Rewrite, freed: Collection[str]) -> onnx.GraphProto:
    """Return a copy of a graph, its subgraphs included, with nodes replaced or left out.

    Args:
        graph: The graph; it is not changed.
        rewrite: Gives the replacement of a node, the node itself to keep it, or None to leave it out.
        freed: Tensors that replaced nodes no longer read. Initializers and constant nodes that nobody else reads are
            left out too (and never copied), with what the graph says about them.
    """
    copy = onnx.GraphProto()
    pairs: list[tuple[onnx.GraphProto, onnx.GraphProto]] = []
    _fill(copy, graph, rewrite, pairs)
    copies = [inner for inner, _ in pairs]
    freed = set(freed)
    read = _read(copies)
    while dead := [(inner, node) for inner in copies for node in inner.node if _is_dead(node, read, freed)]:
        for inner, node in dead:
            freed.update(node.input)
            inner.node.remove(node)
        read = _read(copies)
    for inner, original in pairs:
        inner.initializer.extend(t for t in original.initializer if t.name in read or t.name not in freed)
        _drop_mentions(inner, freed - read, {t.name for t in original.initializer})
    return copy


def _fill(
    copy: onnx.GraphProto,
    graph: onnx.GraphProto,
    rewrite: Rewrite,
    pairs: list[tuple[onnx.GraphProto, onnx.GraphProto]],
) -> None:
    """Fill ``copy`` with everything but the initializers, and note which graph it is a copy of."""
    pairs.append((copy, graph))
    copy.CopyFrom(copy_without(graph, "node", "initializer"))
    for node in graph.node:
        new = rewrite(node)
        if new is None:
            continue
        if not any(a.HasField("g") for a in new.attribute):
            copy.node.append(new)
            continue
        added = copy.node.add()
        added.CopyFrom(copy_without(new, "attribute"))
        for attribute in new.attribute:
            added.attribute.add().CopyFrom(copy_without(attribute, "g"))
            if attribute.HasField("g"):
                _fill(added.attribute[-1].g, attribute.g, rewrite, pairs)


def _read(graphs: Collection[onnx.GraphProto]) -> set[str]:
    """Return the names of all tensors that a node reads or a graph gives back."""
    read = {name for graph in graphs for node in graph.node for name in node.input}
    return read | {value.name for graph in graphs for value in graph.output}


def _is_dead(node: onnx.NodeProto, read: set[str], freed: set[str]) -> bool:
    """Whether nobody reads a node's outputs any more, and a replaced node did before."""
    return any(o in freed for o in node.output) and not any(o in read for o in node.output if o)


def _drop_mentions(graph: onnx.GraphProto, unread: set[str], initialized: set[str]) -> None:
    """Remove what a graph says of tensors that it no longer has; other inputs stay, read or not: a Loop passes them."""
    made = {o for n in graph.node for o in n.output} | {t.name for t in graph.initializer}
    _remove(graph.input, lambda value: value.name in unread & initialized)
    _remove(graph.value_info, lambda value: value.name not in made)
    _remove(graph.quantization_annotation, lambda note: note.tensor_name in unread)


def _remove(values: Any, unwanted: Callable[[Any], bool]) -> None:
    for value in [value for value in values if unwanted(value)]:
        values.remove(value)
