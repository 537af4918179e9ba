"""Train ResNet18 on CIFAR-10 and write it as ONNX.

The recipe: random crop of the image padded by 4 pixels (reflected), horizontal flip, SGD with Nesterov momentum, a
one-cycle learning rate (linear up over the first fifth, linear down to zero), label smoothing 0.1, weight decay 5e-4
on the convolution and classifier weights only, channels-last memory, bfloat16 autocast (1.7 times as fast as float32
on a CPU with AVX512-BF16). ``--small-epochs N`` trains the first N epochs on 24 × 24 crops, at 0.6 of the price each.

data_batch_1..4 are trained on; data_batch_5 is never trained on, so that with test_batch there are two held-out sets.

Example:
    python models/train_resnet18.py data/cifar-10-batches-bin --epochs 12 --small-epochs 5 \
        --checkpoint resnet18.pt --out models/resnet18_cifar10.onnx

Torch is an extra dependency: ``pip install 'rerampile[train]'``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
import resnet18
from model_graph import write

from rerampile.errors import ConfigError, DataError, RerampileError

if TYPE_CHECKING:
    import torch
    from torch import nn

PAD = 4
RECORD = 1 + 3 * 32 * 32
MOMENTUM, WEIGHT_DECAY, SMOOTHING, WARM_UP = 0.9, 5e-4, 0.1, 0.2


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one file of the CIFAR-10 binary layout: images uint8 [n, 32, 32, 3], labels int64 [n]."""
    try:
        raw = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; expected CIFAR-10's binary layout") from error
    if raw.size == 0 or raw.size % RECORD:
        raise DataError(f"{path}: {raw.size} bytes, expected a multiple of {RECORD} (1 label + 3,072 pixels an image)")
    records = raw.reshape(-1, RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0].astype(np.int64)


def network(width: int, classes: int = 10) -> nn.Module:
    """Build ResNet18 with the CIFAR-10 stem; its state dict has the names that ``resnet18.build`` expects."""
    import torch
    from torch import nn

    def conv_bn(inputs: int, outputs: int, kernel: int, stride: int) -> tuple[nn.Module, nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        return conv, nn.BatchNorm2d(outputs)

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = conv_bn(inputs, outputs, 3, stride)
            self.conv2, self.bn2 = conv_bn(outputs, outputs, 3, 1)
            self.downsample = nn.Sequential(*(conv_bn(inputs, outputs, 1, stride) if stride > 1 else ()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.bn2(self.conv2(torch.relu_(self.bn1(self.conv1(x)))))
            return torch.relu_(y + self.downsample(x))

    class ResNet18(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = conv_bn(3, width, 3, 1)
            for k in range(4):
                inputs, outputs = width << max(k - 1, 0), width << k
                stage = nn.Sequential(Block(inputs, outputs, 2 if k else 1), Block(outputs, outputs, 1))
                setattr(self, f"layer{k + 1}", stage)
            self.fc = nn.Linear(8 * width, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu_(self.bn1(self.conv1(x)))
            for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
                x = stage(x)
            return self.fc(x.mean((2, 3)))

    return ResNet18()


class Trainer:
    """A network, its optimiser and where they stand; survives interruption through its checkpoint."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        torch.manual_seed(options.seed)
        if options.threads:
            torch.set_num_threads(options.threads)
        self.options = options
        self.device = torch.device(options.device)
        self.epoch, self.seconds = 0, 0.0
        self.network = network(options.width).to(self.device, memory_format=torch.channels_last)
        weights = [p for p in self.network.parameters() if p.ndim > 1]
        others = [p for p in self.network.parameters() if p.ndim <= 1]
        groups = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.SGD(groups, lr=options.lr, momentum=MOMENTUM, nesterov=True)
        statistics = (resnet18.CIFAR10_MEAN, resnet18.CIFAR10_STD)
        self.mean, self.std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in statistics)

    def recipe(self) -> dict[str, Any]:
        """Return the options that a checkpoint must share with the run that resumes it."""
        return {key: getattr(self.options, key) for key in ("epochs", "small_epochs", "batch", "lr", "width", "seed")}

    def save(self, path: Path) -> None:
        """Write the checkpoint to a sibling and rename it, so that an interruption leaves the old one whole."""
        import torch

        state = {
            "recipe": self.recipe(),
            "epoch": self.epoch,
            "seconds": self.seconds,
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        sibling = path.with_name(path.name + ".part")
        torch.save(state, sibling)
        sibling.replace(path)

    def resume(self, path: Path) -> None:
        """Take up the training where the checkpoint left it."""
        import torch

        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
            raise DataError(f"{path}: not a whole checkpoint of this trainer; delete it to start anew") from error
        if state["recipe"] != self.recipe():
            raise ConfigError(
                f"{path}: checkpoint of recipe {state['recipe']}, expected {self.recipe()}; use another --checkpoint"
            )
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.epoch, self.seconds = state["epoch"], state["seconds"]

    def start_from(self, path: Path) -> None:
        """Take the weights of another training's checkpoint, to train them through a further cycle."""
        import torch

        try:
            self.network.load_state_dict(torch.load(path, map_location=self.device, weights_only=True)["network"])
        except (OSError, EOFError, RuntimeError, KeyError, UnpicklingError) as error:
            raise DataError(f"{path}: no whole checkpoint of this trainer and width; name another --start") from error

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn uint8 images [n, h, w, 3] into the network's input [n, 3, h, w], channels last in memory."""
        return (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std

    def autocast(self) -> torch.autocast:
        """Return the bfloat16 context, or one that does nothing."""
        import torch

        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16)

    def learning_rate(self, progress: float) -> float:
        """Return the one-cycle learning rate at a progress in [0, 1)."""
        return float(self.options.lr * min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP)))

    def train_epoch(self, padded: torch.Tensor, labels: torch.Tensor) -> float:
        """Train once over all images, uint8 [n, 32 + 2 PAD, 32 + 2 PAD, 3]; return the mean loss.

        The generator is seeded by the epoch, so a resumed run sees the images of an uninterrupted one.
        """
        import torch
        from torch.nn.functional import cross_entropy

        options, count = self.options, len(labels)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + self.epoch)
        size = 24 if self.epoch < options.small_epochs else 32
        order = torch.randperm(count, generator=generator).split(options.batch)
        total = torch.zeros((), device=self.device)
        self.network.train()
        for step, chosen in enumerate(order):
            images = self.normalised(crop_and_flip(padded, chosen, size, generator).to(self.device))
            wanted = labels[chosen].to(self.device)
            for group in self.optimiser.param_groups:
                group["lr"] = self.learning_rate((self.epoch + step / len(order)) / options.epochs)
            with self.autocast():
                logits = self.network(images)
            loss = cross_entropy(logits.float(), wanted, label_smoothing=SMOOTHING)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            total += loss.detach() * len(chosen)
        self.epoch += 1
        return float(total) / count

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Return the logits [n, classes] of images, uint8 [n, 32, 32, 3], by the network as it stands."""
        import torch

        self.network.eval()
        with torch.inference_mode(), self.autocast():
            images = self.normalised(torch.tensor(pixels).to(self.device))
            return self.network(images).float().cpu().numpy()


def accuracy(logits: Callable[[np.ndarray], np.ndarray], images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of images, uint8 [n, 32, 32, 3], whose greatest logit is the label's."""
    starts = range(0, len(labels), 500)
    found = [logits(images[start : start + 500]).argmax(1) for start in starts]
    return float((np.concatenate(found) == labels).mean())


def file_logits(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Return what computes the logits of images, uint8 [n, 32, 32, 3], with a written model in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    mean, std = np.float32(resnet18.CIFAR10_MEAN), np.float32(resnet18.CIFAR10_STD)

    def logits(pixels: np.ndarray) -> np.ndarray:
        images = ((pixels.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
        return np.asarray(session.run(["logits"], {"input": np.ascontiguousarray(images)})[0])

    return logits


def crop_and_flip(padded: torch.Tensor, chosen: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Cut one random window [size, size] from each chosen image and mirror half of them, all in one gather.

    A window smaller than 32 is cut from the unpadded image: there is nothing to gain from its reflected border.
    """
    import torch

    border = PAD if size < 32 else 0
    room = padded.shape[1] - 2 * border - size + 1
    span = torch.arange(size)
    top, left = torch.randint(room, (2, len(chosen), 1), generator=generator) + border
    mirrored = torch.rand(len(chosen), 1, generator=generator) < 0.5
    rows, columns = top + span, left + torch.where(mirrored, size - 1 - span, span)
    return padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]


def check(options: argparse.Namespace) -> None:
    """Refuse options out of range before any work is done."""
    import torch

    for name, least in (
        ("epochs", 1),
        ("batch", 1),
        ("width", 1),
        ("small_epochs", 0),
        ("stop_after", 0),
        ("threads", 0),
    ):
        if (value := getattr(options, name)) < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected {least} or more")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {options.device}: torch finds no GPU; use --device cpu")


def train(options: argparse.Namespace) -> None:
    """Train, or take a checkpoint to its end; report the accuracy; write the model where asked."""
    import torch

    check(options)
    parts = [read_batch(options.data / f"data_batch_{k}.bin") for k in (1, 2, 3, 4)]
    held_out = {name: read_batch(options.data / f"{name}.bin") for name in ("data_batch_5", "test_batch")}
    border = ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0))
    padded = torch.from_numpy(np.pad(np.concatenate([images for images, _ in parts]), border, "reflect"))
    labels = torch.from_numpy(np.concatenate([labels for _, labels in parts]))

    trainer = Trainer(options)
    if options.checkpoint and options.checkpoint.exists():
        trainer.resume(options.checkpoint)
        print(f"resumed {options.checkpoint} after epoch {trainer.epoch}")
    elif options.start:
        trainer.start_from(options.start)
    last = min(options.epochs, trainer.epoch + (options.stop_after or options.epochs))
    while trainer.epoch < last:
        start = time.perf_counter()
        loss = trainer.train_epoch(padded, labels)
        seconds = time.perf_counter() - start
        trainer.seconds += seconds
        if options.checkpoint:
            trainer.save(options.checkpoint)
        quick = accuracy(trainer.logits, *held_out["test_batch"])
        print(f"epoch {trainer.epoch}/{options.epochs}  loss {loss:.4f}  test {quick:.2%}  {seconds:.0f} s", flush=True)
    if trainer.epoch < options.epochs:
        return
    report("torch", trainer.logits, held_out)
    print(f"trained for {trainer.seconds:.0f} s")
    if options.out:
        state = {name: value.float().cpu().numpy() for name, value in trainer.network.state_dict().items()}
        model = resnet18.build(width=options.width, weights=state, half=True, metadata=resnet18.CIFAR10_METADATA)
        write(options.out, model)
        report(f"{options.out} in ONNX Runtime", file_logits(options.out), held_out)


def report(
    what: str, logits: Callable[[np.ndarray], np.ndarray], held_out: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """Print the accuracy on each held-out set."""
    for name, (images, labels) in held_out.items():
        print(f"{what}: {accuracy(logits, images, labels):.2%} of {len(labels):,} images of {name}", flush=True)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder cifar-10-batches-bin")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--small-epochs", type=int, default=0, help="first epochs, trained on 24 × 24 crops")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1, help="greatest learning rate of the cycle")
    parser.add_argument("--checkpoint", type=Path, help="written after each epoch; resumed where it exists")
    parser.add_argument("--start", type=Path, help="checkpoint of an earlier training whose weights to begin with")
    parser.add_argument("--stop-after", type=int, default=0, help="epochs to train now; resume for the others")
    parser.add_argument("--out", type=Path, help="ONNX file to write, weights in float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage (64 is ResNet18)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch decides)")
    try:
        train(parser.parse_args())
    except RerampileError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
