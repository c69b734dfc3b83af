"""One encoded image -> one 8-bit RGB image, or a :class:`BadImage` that says why not.

The rules, the same for every source:

=====================  =======================================================================================
what was found         what happens
=====================  =======================================================================================
RGB                    as it is
grey, 1-bit, CMYK,     converted by Pillow (CMYK without a colour profile)
YCbCr, LAB, HSV
palette                converted to its colours
alpha, transparency    composited on white (dropping alpha would show colours that nobody was meant to see)
16-bit grey            value // 256; 16-bit RGB is reduced by Pillow in the same way
animated               the first frame
floating point         bad: its scale is unknown
empty, truncated,      bad
not an image
over ``MAX_PIXELS``    bad, refused before it is decoded
=====================  =======================================================================================

EXIF orientation is *not* applied: neither torchvision's ``ImageFolder`` nor timm's reader does, and features are only
comparable with theirs if the pixels are.
"""

from __future__ import annotations

import io
import os

import numpy as np
from PIL import Image

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels (268 MB as RGB); it is Pillow's own line against decompression bombs."""

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class BadImage(ValueError):
    """An image that cannot be used.

    Attributes
    ----------
    id : str
        Name of the image in its source.
    why : str
        What is wrong with it, in one line.
    """

    def __init__(self, id: str, why: str):
        super().__init__(f"image {id!r}: {why}")
        self.id, self.why = id, why

    def __reduce__(self):
        return type(self), (self.id, self.why)


def decode_image(data: bytes | str | os.PathLike | Image.Image, id: str = "image") -> Image.Image:
    """Decode one image to 8-bit RGB by the rules of this module.

    Parameters
    ----------
    data : bytes, path or PIL image
        Encoded bytes, a file to read them from, or an image that is opened already.
    id : str
        The name that an error carries.

    Returns
    -------
    PIL.Image.Image
        Mode ``RGB``, its own size.

    Raises
    ------
    BadImage
        If the image is empty, truncated, too large, of an unknown kind or cannot be read.
    """
    if not isinstance(data, Image.Image):
        if not isinstance(data, bytes | bytearray | memoryview):
            try:
                with open(data, "rb") as file:
                    data = file.read()
            except OSError as error:
                raise BadImage(id, f"cannot be read: {error.strerror or error}") from None
        if not data:
            raise BadImage(id, "empty file")
        data = _open(bytes(data), id)
    width, height = data.size
    if width * height > MAX_PIXELS:
        raise BadImage(id, f"huge: {width} x {height} pixels, the limit is {MAX_PIXELS} pixels in all")
    try:
        data.load()
        return _to_rgb(data, id)
    except BadImage:
        raise
    except (
        Exception
    ) as error:  # on a damaged file Pillow's plugins raise OSError, SyntaxError, struct.error, EOFError ...
        raise BadImage(id, f"truncated or damaged: {error}") from None


def _open(data: bytes, id: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(id, f"huge: {error}; the limit is {MAX_PIXELS} pixels") from None
    except Exception:
        raise BadImage(
            id, f"not an image that Pillow can read ({len(data)} bytes, beginning with {data[:8]!r})"
        ) from None


def _to_rgb(image: Image.Image, id: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT:
        values = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage(id, "floating-point pixels, whose scale is unknown: store them as 8 or 16 bit")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
