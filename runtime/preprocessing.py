"""How an image becomes an input of the model: geometry, channel order, pixel range, normalisation.

:class:`Preprocessing` is what a user asks for, any piece of it left open; :meth:`Preprocessing.pipeline` fills the rest
from the preset, the model's declared input and its metadata. The :class:`Pipeline` works in two steps, so that the
first can be kept for the next chip: an image to pixels of the model's size (uint8), and pixels to an input tensor.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rerampile.errors import ConfigError, DataError, did_you_mean
from rerampile.runtime.inputs import declared_dtype

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PRESETS", "Pipeline", "Placement", "Preprocessing"]

Pixels = npt.NDArray[np.uint8]

_CHOICES = {
    "resize": ("short", "stretch", "letterbox", "none"),
    "channels": ("rgb", "bgr"),
    "layout": ("nchw", "nhwc"),
}
_MOST_PIXELS = 1 << 14  # a side; larger sizes are slips of the keyboard
_GREY = 114  # of letterbox bars, as the YOLO family is trained with


class Placement(NamedTuple):
    """Where an image lies in the model's input: input x = image x · scale_x + left, and so for y."""

    scale_x: float
    scale_y: float
    left: float
    top: float

    def undo(self, boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return boxes, float32 [n, 4] as x1, y1, x2, y2 in pixels of the input, in pixels of the image."""
        shift = np.array([self.left, self.top] * 2, np.float32)
        return (boxes - shift) * np.array([1 / self.scale_x, 1 / self.scale_y] * 2, np.float32)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a user asks for; None leaves a piece to the preset, the model's declared input or its metadata.

    Attributes:
        preset: Name of a preset; by default the one that suits the kind of data.
        size: Height and width in pixels.
        resize: ``short``: scale until ``size`` / ``crop`` is covered and cut out the centre; ``stretch``;
            ``letterbox``: scale until it fits, with grey bars; ``none``: images have the right size.
        crop: Share of the scaled image's short side that ``short`` keeps.
        mean: Subtracted from each channel, in units of ``pixel_range``; in the order red, green, blue, or one for all.
        std: What each channel is then divided by, in the same order.
        channels: Order in which the model takes the channels, ``rgb`` or ``bgr``.
        layout: ``nchw`` or ``nhwc``.
        pixel_range: What black and white become before ``mean`` and ``std``.

    Raises:
        ConfigError: A piece is not one of the known words, or its numbers are out of range.
    """

    preset: str | None = None
    size: tuple[int, int] | None = None
    resize: str | None = None
    crop: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: str | None = None
    layout: str | None = None
    pixel_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise ConfigError(f"--preprocess: unknown preset '{self.preset}'{did_you_mean(self.preset, PRESETS)}")
        for name, known in _CHOICES.items():
            word = getattr(self, name)
            if word is not None and word not in known:
                raise ConfigError(f"--{name}: '{word}', expected {', '.join(known[:-1])} or {known[-1]}")
        if self.size is not None and not all(1 <= side <= _MOST_PIXELS for side in self.size):
            raise ConfigError(f"--size: {self.size[0]},{self.size[1]}, expected height,width of 1 to {_MOST_PIXELS}")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ConfigError(f"--crop: {self.crop:g}, expected a share above 0 and at most 1")
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError(f"--std: {_text(self.std)}, expected numbers above 0")
        if self.pixel_range is not None and not self.pixel_range[0] < self.pixel_range[1]:
            raise ConfigError(f"--pixel-range: {_text(self.pixel_range)}, expected low,high such as 0,1")

    @classmethod
    def parse(cls, **pieces: str | None) -> Preprocessing:
        """Read the pieces from the text of command-line options.

        Raises:
            ConfigError: A text is not what its option takes.
        """
        found: dict[str, Any] = {}
        for name, text in pieces.items():
            if text is None:
                continue
            if name in ("size", "pixel_range"):
                found[name] = _numbers(name, text, 2, int if name == "size" else float)
            elif name in ("mean", "std"):
                found[name] = _numbers(name, text, None, float)
            elif name == "crop":
                found[name] = _numbers(name, text, 1, float)[0]
            else:
                found[name] = text.lower()
        return cls(**found)

    def pipeline(self, session: Any, default_preset: str) -> Pipeline:
        """Fill what is left open.

        In this order: what the user gave, the preset that the user named, size and layout as the model declares them,
        mean and std of the model's metadata properties of these names, the preset that suits the kind of data. A model
        with raw heads (metadata property ``yolo``) is fed as darknet feeds it: stretched, unless it says ``letterbox``.

        Args:
            session: The ONNX Runtime session of the model.
            default_preset: The preset that suits the kind of data.

        Raises:
            ConfigError: A piece does not fit the model's channels.
            DataError: The model does not take one batch of images, or declares another size.
        """
        value = _image_input(session)
        layout, channels, size = _declared(value, self.layout)
        stated = Preprocessing(layout=layout, size=size)
        preset = PRESETS[self.preset or default_preset]
        learned = _from_metadata(session) if self.preset is None else stated
        # A declared size beats a preset's, and stands against the user's: a contradiction is refused.
        piece = _first(self, stated, learned, preset, PRESETS["raw"])
        if size is not None and piece["size"] != size:
            raise DataError(
                f"--size {_text(piece['size'])} does not fit the model: its input '{value.name}' is {value.shape}, "
                f"height,width {_text(size)}"
            )
        for name in ("mean", "std"):
            if len(piece[name]) not in (1, channels):
                raise ConfigError(
                    f"--{name}: {len(piece[name])} numbers for an input of {channels} channel(s), expected {channels}"
                )
        del piece["preset"]
        return Pipeline(input=value.name, dtype=declared_dtype(value.name, value.type), planes=channels, **piece)


_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

_UNIT = (0.0, 1.0)

PRESETS: Mapping[str, Preprocessing] = {
    "imagenet": Preprocessing(
        size=(224, 224), resize="short", mean=_IMAGENET_MEAN, std=_IMAGENET_STD, pixel_range=_UNIT
    ),
    "cifar10": Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), pixel_range=_UNIT),
    "yolo": Preprocessing(size=(416, 416), resize="letterbox", pixel_range=_UNIT),
    "raw": Preprocessing(
        resize="none", crop=0.875, mean=(0.0,), std=(1.0,), channels="rgb", layout="nchw", pixel_range=(0.0, 255.0)
    ),
}
"""By name; what a preset leaves open is taken from ``raw``."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Every piece decided: see :class:`Preprocessing` for their meaning.

    Attributes:
        input: Name of the model's input.
        dtype: Its element type.
        planes: Its channels, 1 (grey) or 3.
        size: Height and width, None where images keep their own.
    """

    input: str
    dtype: Any
    planes: int
    size: tuple[int, int] | None
    resize: str
    crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: str
    layout: str
    pixel_range: tuple[float, float]

    def place(self, image: Image.Image, where: str) -> tuple[Pixels, Placement]:
        """Bring an image to the model's size, channels and layout.

        Args:
            image: Any image.
            where: Its name, for messages.

        Returns:
            uint8 [C, H, W] or [H, W, C] by layout, and where the image lies in it.

        Raises:
            DataError: The image has another size and ``resize`` is ``none``.
        """
        image = image.convert("L" if self.planes == 1 else "RGB")
        placed, placement = self._resized(image, where)
        pixels = np.asarray(placed).reshape(placed.height, placed.width, self.planes)
        if self.channels == "bgr":
            pixels = pixels[:, :, ::-1]
        if self.layout == "nchw":
            pixels = pixels.transpose(2, 0, 1)
        return np.ascontiguousarray(pixels), placement

    def _resized(self, image: Image.Image, where: str) -> tuple[Image.Image, Placement]:
        from PIL import Image

        size, (width, height) = self.size or (image.height, image.width), image.size
        if (height, width) == size:
            return image, Placement(1, 1, 0, 0)
        if self.resize == "none":
            raise DataError(
                f"{where}: height,width {height},{width}, expected {_text(size)}; choose a --resize: short, stretch or "
                f"letterbox"
            )
        ratios = size[0] / height, size[1] / width
        if self.resize == "stretch":
            scaled = size
        elif self.resize == "letterbox":
            scaled = _scaled(image, min(ratios), least=(1, 1), most=size)
        else:
            scaled = _scaled(image, max(ratios) / self.crop, least=size)
        if scaled != (height, width):
            image = image.resize(scaled[::-1], Image.Resampling.BILINEAR)
        top, left = (int((outer - inner) / 2) for outer, inner in zip(size, scaled, strict=True))
        placement = Placement(scaled[1] / width, scaled[0] / height, left, top)
        if self.resize == "short":
            return image.crop((-left, -top, size[1] - left, size[0] - top)), placement
        canvas = Image.new(image.mode, size[::-1], (_GREY,) * self.planes)
        canvas.paste(image, (left, top))
        return canvas, placement

    def tensor(self, pixels: Pixels) -> npt.NDArray[Any]:
        """Return the input for pixels of a batch, uint8 [n, C, H, W] or [n, H, W, C] by layout."""
        scale, offset = self._affine()
        values = pixels * scale
        values += offset
        if np.dtype(self.dtype).kind in "iu":
            limits = np.iinfo(self.dtype)
            values = np.clip(np.rint(values), limits.min, limits.max)
        return values.astype(self.dtype, copy=False)

    def picture(self, tensor: npt.NDArray[Any]) -> Image.Image:
        """Return one image of an input, [C, H, W] or [H, W, C], as a picture: what the model sees, not normalised."""
        from PIL import Image

        scale, offset = self._affine()
        pixels = np.clip(np.rint((tensor.astype(np.float32) - offset) / scale), 0, 255).astype(np.uint8)
        if self.layout == "nchw":
            pixels = pixels.transpose(1, 2, 0)
        if self.channels == "bgr":
            pixels = pixels[:, :, ::-1]
        return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if self.planes == 1 else pixels))

    def describe(self) -> dict[str, Any]:
        """Return every piece in terms of JSON, for reports."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"dtype": str(np.dtype(self.dtype))}

    def _affine(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return scale and offset of each channel, float32, shaped for the layout: input = pixel · scale + offset."""
        low, high = self.pixel_range
        mean, std = (np.broadcast_to(np.array(v, np.float64), self.planes) for v in (self.mean, self.std))
        if self.channels == "bgr":
            mean, std = mean[::-1], std[::-1]
        shape = (-1, 1, 1) if self.layout == "nchw" else (-1,)
        scale, offset = (high - low) / 255 / std, (low - mean) / std
        return scale.astype(np.float32).reshape(shape), offset.astype(np.float32).reshape(shape)


def _scaled(
    image: Image.Image, ratio: float, least: tuple[int, int], most: tuple[int, int] = (_MOST_PIXELS,) * 2
) -> tuple[int, int]:
    """Return height and width times a ratio, within bounds."""
    sides = zip((image.height, image.width), least, most, strict=True)
    height, width = (min(max(round(side * ratio), low), high) for side, low, high in sides)
    return height, width


def _image_input(session: Any) -> Any:
    """Return the model's only input, which has to take a batch of images."""
    values = session.get_inputs()
    if len(values) != 1:
        names = ", ".join(f"'{value.name}'" for value in values) or "none"
        raise DataError(f"images fill one input, but the model has {len(values)} ({names}); use npz:FILE")
    if len(values[0].shape) != 4:
        raise DataError(
            f"images do not fit the model: its input '{values[0].name}' is {values[0].shape}, expected four "
            f"dimensions such as [N, 3, height, width]; use npz:FILE"
        )
    return values[0]


def _declared(value: Any, layout: str | None) -> tuple[str | None, int, tuple[int, int] | None]:
    """Return layout (None where the model leaves it open), channels and size of an input, as the model declares it."""
    axes = {"nchw": (1, 2, 3), "nhwc": (3, 1, 2)}
    dims = value.shape
    if layout is None:
        layout = next((name for name, (c, _, _) in axes.items() if dims[c] in (1, 3)), None)
    c, h, w = axes[layout or "nchw"]
    if isinstance(dims[c], int) and dims[c] not in (1, 3):
        raise DataError(
            f"images do not fit the model: its input '{value.name}' is {dims} with {dims[c]} channels, expected 3 or "
            f"1; give --layout, or use npz:FILE"
        )
    size = (dims[h], dims[w]) if isinstance(dims[h], int) and isinstance(dims[w], int) else None
    return layout, dims[c] if isinstance(dims[c], int) else 3, size


def _from_metadata(session: Any) -> Preprocessing:
    """Return what the model's metadata properties tell: mean and std of pixels in 0..1; how heads of YOLO are fed."""
    properties = {}
    for name, text in session.get_modelmeta().custom_metadata_map.items():
        with contextlib.suppress(ValueError):
            properties[name] = json.loads(text)
    if isinstance(heads := properties.get("yolo"), dict):
        return Preprocessing(resize="letterbox" if heads.get("letterbox") else "stretch")
    try:
        mean, std = (tuple(float(number) for number in properties[name]) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError):
        return Preprocessing()
    usable = mean and std and all(map(math.isfinite, mean + std)) and min(std) > 0
    return Preprocessing(mean=mean, std=std, pixel_range=_UNIT) if usable else Preprocessing()


def _first(*wishes: Preprocessing) -> dict[str, Any]:
    """Return, for each piece, the first that is given."""
    return {
        f.name: next((value for wish in wishes if (value := getattr(wish, f.name)) is not None), None)
        for f in fields(Preprocessing)
    }


def _numbers(name: str, text: str, count: int | None, kind: type[int] | type[float]) -> tuple[Any, ...]:
    option = name.replace("_", "-")
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or (count is not None and len(values) != count) or not all(map(math.isfinite, values)):
        wanted = {None: "numbers", 1: "one number", 2: "two numbers"}[count]
        raise ConfigError(f"--{option}: '{text}', expected {wanted} with commas between them")
    return values


def _text(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
