r"""Train a small BERT to tell which package of Python's standard library a passage is from, and write it as ONNX.

The text is what every Python brings along: the sources of eight families of modules, read as lower-case words
(comments, docstrings and names alike). A passage is 32 words in a row; every eighth one is held out and never trained
on. Which passages there are depends on the Python that runs this; the test file holds the ones that were measured.

Example:
    python models/train_bert.py --out models/bert_stdlib.onnx --test models/bert_stdlib_test.npz \
        --calibration models/bert_stdlib_calibration.npz

Torch is an extra dependency: ``pip install 'rerampile[train]'``.
"""

from __future__ import annotations

import argparse
import re
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from bert import EPSILON, Shape, build, parameter_shapes
from model_graph import write

from rerampile.errors import ConfigError, DataError, RerampileError

if TYPE_CHECKING:
    import torch

FAMILIES = {
    "asyncio": ("asyncio", "concurrent", "selectors.py", "threading.py"),
    "email": ("email", "smtplib.py", "imaplib.py", "mailbox.py"),
    "http": ("http", "urllib", "socketserver.py", "wsgiref"),
    "idlelib": ("idlelib",),
    "logging": ("logging", "warnings.py", "argparse.py", "configparser.py"),
    "tkinter": ("tkinter", "turtle.py"),
    "unittest": ("unittest", "doctest.py"),
    "xml": ("xml", "html", "xmlrpc"),
}
UNKNOWN = 0  # the token of a word that the table does not have
HELD_OUT = 8  # every so many-th passage
CALIBRATION = 512  # passages of the training that are written, too
WEIGHT_DECAY, WARM_UP = 0.01, 0.1


def read_words(library: Path) -> dict[str, list[str]]:
    """Return the words of each family, in the order of its files.

    Raises:
        DataError: A family has no source files there.
    """
    found: dict[str, list[str]] = {}
    for family, places in FAMILIES.items():
        files = [file for place in places for file in _sources(library / place)]
        text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
        found[family] = re.findall(r"[a-z]{2,}", re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower())
        if not found[family]:
            raise DataError(f"{library}: no sources of {', '.join(places)}, expected Python's standard library")
    return found


def _sources(place: Path) -> list[Path]:
    return [place] if place.is_file() else [p for p in sorted(place.rglob("*.py")) if "test" not in str(p.name)]


def passages(words: dict[str, list[str]], shape: Shape, each: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return tokens int64 [passages, length], families int64 [passages], and the table of words.

    Args:
        words: The words of each family.
        shape: Length of a passage, and size of the table: the commonest words of all families, each family counting
            alike, without the families' own names.
        each: Passages of a family at most, from places spread evenly over its text.
    """
    names = {part for family in FAMILIES for part in (family, family.removesuffix("lib"))}
    shares: Counter[str] = Counter()
    for text in words.values():
        for word, count in Counter(text).items():
            shares[word] += count / len(text)
    known = [word for word, _ in sorted(shares.items(), key=lambda item: (-item[1], item[0])) if word not in names]
    table = ["", *known[: shape.words - 1]]
    number = {word: k for k, word in enumerate(table)}
    tokens, labels = [], []
    for label, text in enumerate(words.values()):
        coded = np.array([number.get(word, UNKNOWN) for word in text])
        starts = np.linspace(0, len(coded) - shape.length, min(each, len(coded) // shape.length)).astype(int)
        tokens.append(coded[starts[:, None] + np.arange(shape.length)])
        labels.append(np.full(len(starts), label))
    return np.concatenate(tokens), np.concatenate(labels), table


def initial(shape: Shape, seed: int) -> dict[str, torch.Tensor]:
    """Return parameters to begin with: normal matrices that keep the variance, ones and zeros."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, sizes in parameter_shapes(shape).items():
        spread = sizes[0] ** -0.5 if name.endswith("weight") else 0.1
        value = torch.randn(sizes, generator=generator) * spread if len(sizes) > 1 else torch.zeros(sizes)
        if "norm" in name and name.endswith("weight"):
            value = torch.ones(sizes)
        found[name] = value.requires_grad_()
    return found


def logits(tokens: torch.Tensor, p: dict[str, torch.Tensor], shape: Shape, dropout: float = 0.0) -> torch.Tensor:
    """Return the logits [n, classes] of tokens [n, length]: what :func:`bert.build` writes as ONNX, with dropout."""
    import torch
    from torch.nn import functional

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (shape.width,), p[f"{name}.weight"], p[f"{name}.bias"], EPSILON)

    def dropped(x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(x, dropout, training=dropout > 0)

    x = dropped(norm("norm", p["words"][tokens] + p["places"]))
    for name in (f"block{k}" for k in range(shape.blocks)):
        parts = (
            linear(f"{name}.{part}", x).unflatten(-1, (shape.heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        attended = functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        x = norm(f"{name}.norm1", x + dropped(linear(f"{name}.mix", attended)))
        x = norm(f"{name}.norm2", x + dropped(linear(f"{name}.down", functional.gelu(linear(f"{name}.up", x)))))
    return torch.as_tensor(linear("classes", x.mean(1)))


def write_passages(options: argparse.Namespace, tokens: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> None:
    """Write the passages that were held out, and some of the others, for pruning to learn from."""
    np.savez_compressed(options.test, tokens=tokens[held_out], labels=labels[held_out])
    trained = np.flatnonzero(~held_out)
    some = np.random.default_rng(options.seed).choice(trained, min(CALIBRATION, len(trained)), replace=False)
    np.savez_compressed(options.calibration, tokens=tokens[np.sort(some)], labels=labels[np.sort(some)])
    print(f"{held_out.sum():,} passages in {options.test}, {len(some)} others in {options.calibration}", flush=True)


def train(options: argparse.Namespace) -> None:
    """Train, report the accuracy, and write the model and the held-out passages."""
    import torch

    if min(options.epochs, options.batch, options.passages) < 1:
        raise ConfigError("--epochs, --batch and --passages: expected 1 or more")
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    shape = Shape(classes=len(FAMILIES))
    tokens, labels, table = passages(read_words(options.stdlib), shape, options.passages)
    held_out = np.arange(len(labels)) % HELD_OUT == 0
    write_passages(options, tokens, labels, held_out)
    x, y = torch.from_numpy(tokens[~held_out]), torch.from_numpy(labels[~held_out])
    p = initial(shape, options.seed)
    groups = [
        {"params": [v for v in p.values() if v.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [v for v in p.values() if v.ndim == 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=options.lr)
    steps = options.epochs * -(-len(y) // options.batch)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / (WARM_UP * steps), (steps - step) / ((1 - WARM_UP) * steps), 1.0)
    )
    start = time.perf_counter()
    for epoch in range(options.epochs):
        total = 0.0
        for chosen in torch.randperm(len(y)).split(options.batch):
            loss = torch.nn.functional.cross_entropy(logits(x[chosen], p, shape, dropout=0.1), y[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
            total += float(loss.detach()) * len(chosen)
        with torch.inference_mode():
            found = logits(torch.from_numpy(tokens[held_out]), p, shape).argmax(1).numpy()
        right = (found == labels[held_out]).mean()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}  loss {total / len(y):.4f}  held out {right:.2%}  {seconds:.0f} s", flush=True)
    metadata = {"classes": list(FAMILIES), "words": table}
    write(options.out, build(shape, {name: value.detach().numpy() for name, value in p.items()}, metadata))
    print(f"{options.out}: trained on {len(y):,} passages", flush=True)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="ONNX file to write")
    parser.add_argument("--test", type=Path, required=True, help=".npz file to write: tokens and labels held out")
    parser.add_argument(
        "--calibration", type=Path, required=True, help=".npz file to write: some passages of the training"
    )
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")), help="where the text is")
    parser.add_argument("--passages", type=int, default=2048, help="of a family, at most")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="greatest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    try:
        train(parser.parse_args())
    except RerampileError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
