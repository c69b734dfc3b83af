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
EXIF orientation       applied, as any viewer does (``exif=False``: not, as torchvision's and timm's readers)
floating point,        bad: its scale is unknown
32-bit integers
empty, truncated,      bad
not an image
over ``MAX_PIXELS``    bad, refused before it is decoded
=====================  =======================================================================================
"""

from __future__ import annotations

import contextlib
import io
import os

import numpy as np
from PIL import ExifTags, Image, ImageOps

with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
with contextlib.suppress(ImportError):
    import pillow_jxl  # noqa: F401 (registers itself)

_UNREADABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows them, but hands them to other programs
IMAGE_SUFFIXES = frozenset(
    suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in _UNREADABLE
)
# Known by their first bytes, so that no text is taken for one.
_BY_CONTENT = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "JXL", "PNG", "QOI", "TIFF", "WEBP")

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels (268 MB as RGB); it is Pillow's own line against decompression bombs."""

PIXEL_STATISTICS = (
    "file_size",  # bytes of the encoded image; of its PNG where it never was a file
    "bytes_per_pixel",  # file_size / (width x height): how hard it was compressed, and how much it holds
    "image_size",  # width x height in pixels
    "aspect",  # width / height
    "sharpness",  # variance of the 4-neighbour Laplacian of the grey image: low where it was enlarged or blurred
    "brightness",  # mean of the grey image, 0..255
    "contrast",  # standard deviation of the grey image
    "colourfulness",  # Hasler and Suesstrunk 2003, equation 1: spread and mean of R - G and (R + G) / 2 - B
)
"""What :func:`pixel_statistics` measures of an image as it was found, before a backbone's resizing and cropping: what
could tell two data sets apart without a look at what they show."""

_STRIP = 2**15  # pixels measured at a time: they stay in a core's cache, and memory does not grow with the image
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


class BadImage(ValueError):
    """An image that cannot be used: its ``id`` in its source, and ``why``, in one line."""

    def __init__(self, id: str, why: str):
        super().__init__(f"image {id!r}: {why}")
        self.id, self.why = id, why

    def __reduce__(self):
        return type(self), (self.id, self.why)


def decode_image(data: bytes | str | os.PathLike | Image.Image, id: str = "image", exif: bool = True) -> Image.Image:
    """Decode one image to 8-bit RGB by the rules of this module.

    Parameters
    ----------
    data : bytes, path or PIL image
    id : str
        The name that an error carries.
    exif : bool
        Turn the image as its EXIF orientation says.

    Raises
    ------
    BadImage
        If the image is empty, truncated, too large, of an unknown kind or cannot be read.
    """
    if not isinstance(data, Image.Image):
        data = _open(read_encoded(data, id), id)
    width, height = data.size
    if width * height > MAX_PIXELS:
        raise BadImage(id, f"huge: {width} x {height} pixels, the limit is {MAX_PIXELS} pixels in all")
    try:
        data.load()
        return _to_rgb(_upright(data) if exif else data, data.format, id)
    except BadImage:
        raise
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, EOFError ... on damage
        raise BadImage(id, f"truncated or damaged: {error}") from None


def read_encoded(data: bytes | str | os.PathLike, id: str = "image") -> bytes:
    """Encoded bytes as they are, or those of a file; :class:`BadImage` if there are none."""
    if not isinstance(data, bytes | bytearray | memoryview):
        try:
            with open(os.fspath(data), "rb") as file:  # fspath: open would take a number for a file descriptor
                data = file.read()
        except (OSError, TypeError, ValueError) as error:  # ValueError: a null character in its name
            raise BadImage(id, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not data:
        raise BadImage(id, "empty file")
    return bytes(data)


def is_image(path: str | os.PathLike) -> bool:
    """Whether a file's first bytes are those of an image, whatever its name."""
    try:
        with Image.open(path, formats=[kind for kind in _BY_CONTENT if kind in Image.OPEN]):
            return True
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return True  # it is reported when it is decoded
    except Exception:  # of Pillow's plugins, as in decode_image
        return False


def measure_image(
    data: bytes | str | os.PathLike | Image.Image, id: str = "image", exif: bool = True
) -> tuple[Image.Image, np.ndarray]:
    """Decode one image as :func:`decode_image` does, and measure it; returns it and its :func:`pixel_statistics`."""
    encoded = None if isinstance(data, Image.Image) else read_encoded(data, id)
    image = decode_image(data if encoded is None else encoded, id, exif)
    if encoded is None:
        image.save(file := io.BytesIO(), "PNG")
        encoded = file.getbuffer()
    return image, pixel_statistics(image, len(encoded))


def pixel_statistics(image: Image.Image, n_bytes: int) -> np.ndarray:
    """What an image tells before anybody looks at what it shows: see :data:`PIXEL_STATISTICS`.

    Parameters
    ----------
    image : PIL image
        Mode ``RGB``, in the size it was stored in.
    n_bytes : int
        Size of the encoded file.

    Returns
    -------
    (P,) float32
        An image under 3 pixels wide or high has sharpness 0.

    Notes
    -----
    Sums are of whole numbers, hence exact: the same image gives the same bits on every machine.
    """
    width, height = image.size
    n = width * height
    grey, rgb = np.asarray(image.convert("L")), np.asarray(image)
    sums, squares = np.zeros(4), np.zeros(4)  # of grey, red - green, 2 (yellow - blue), Laplacian
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        g = grey[max(top - 1, 0) : top + rows + 1].astype(np.int16)  # with a row of the neighbours on either side
        laplacian = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
        red, green, blue = (rgb[top : top + rows, :, c].astype(np.int16) for c in range(3))
        for i, part in enumerate((grey[top : top + rows], red - green, red + green - 2 * blue, laplacian)):
            part = part.astype(np.float64).ravel()
            sums[i] += part.sum()
            squares[i] += np.einsum("i,i->", part, part)  # no BLAS: its threads would fight with the decoding ones
    counts = np.array([n, n, n, max((width - 2) * (height - 2), 1) if min(width, height) > 2 else 1])
    mean = sums / counts
    variance = np.maximum(squares / counts - mean**2, 0)
    opponent = np.hypot(variance[1] ** 0.5, variance[2] ** 0.5 / 2), np.hypot(mean[1], mean[2] / 2)
    values = (n_bytes, n_bytes / n, n, width / height, variance[3], mean[0], variance[0] ** 0.5)
    return np.array([*values, opponent[0] + 0.3 * opponent[1]], dtype=np.float32)


def _open(data: bytes, id: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(id, f"huge: {error}; the limit is {MAX_PIXELS} pixels") from None
    except Exception:
        found = f"{len(data)} bytes, beginning with {data[:8]!r}"
        raise BadImage(id, f"not an image that Pillow can read ({found})") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # damaged EXIF data turns nothing, and spoils no pixel
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _to_rgb(image: Image.Image, kind: str | None, id: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT or (image.mode == "I" and kind in ("PNG", "PPM")):  # whose values end at 65535
        values = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "I"):
        numbers = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise BadImage(id, f"{numbers} pixels, whose scale is unknown: store them as 8 or 16 bit")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
