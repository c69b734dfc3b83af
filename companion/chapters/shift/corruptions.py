"""Covariate shift made by us: blur, noise, JPEG and contrast at five strengths, image -> image.

Constants are those of ImageNet-C (Hendrycks, Dietterich, arXiv 1903.12261) [s] for its Gaussian blur (one of its extra
corruptions), Gaussian noise, JPEG and contrast. What differs [r]:

- blur is Pillow's, three box blurs in place of a Gaussian, and its width grows with the image: ImageNet-C's sigma is
  for 224 pixels, so an image whose shorter side has s gets sigma s / 224;
- noise is drawn from seed and image id, one pattern for all strengths, so that strengths of one image are paired;
- values are rounded, not cut off, and nothing is stored: ImageNet-C kept every image as a JPEG of quality 85, so all of
  its corruptions hold some JPEG and ours do not;
- ImageNet-C cut 224 pixels out of the full ImageNet image; ours start from what the backbone sees.

Higher strength = more of it; 0 leaves the image as it is. Needs Pillow and numpy alone.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

VERSION = 1  # raised whenever the same image would come out otherwise: packs of another number are not comparable
STRENGTHS = (1, 2, 3, 4, 5)
SIDE = 224  # pixels that the constants are meant for

SIGMA = (1, 2, 3, 4, 6)  # blur, pixels of 224
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation, share of white
QUALITY = (25, 18, 15, 10, 7)  # of the JPEG
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # share of each value's distance from its channel's mean that is left


def blur(image: Image.Image, strength: int, id: str = "", seed: int = 0) -> Image.Image:
    """Gaussian blur with a standard deviation of 1, 2, 3, 4, 6 pixels of 224; ``id`` and ``seed`` are not used."""
    radius = SIGMA[strength - 1] * min(image.size) / SIDE
    return image.filter(ImageFilter.GaussianBlur(radius))


def noise(image: Image.Image, strength: int, id: str = "", seed: int = 0) -> Image.Image:
    """Gaussian noise on each value, standard deviation .08, .12, .18, .26, .38 of white, from ``seed`` and ``id``."""
    seeds = hashlib.sha256(json.dumps([seed, str(id)]).encode()).digest()
    rng = np.random.default_rng(np.frombuffer(seeds, np.uint32))
    values = np.asarray(image, np.float32)
    return _image(values + 255 * NOISE[strength - 1] * rng.standard_normal(values.shape, np.float32))


def jpeg(image: Image.Image, strength: int, id: str = "", seed: int = 0) -> Image.Image:
    """JPEG of quality 25, 18, 15, 10, 7, decoded again; ``id`` and ``seed`` are not used."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY[strength - 1])
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def contrast(image: Image.Image, strength: int, id: str = "", seed: int = 0) -> Image.Image:
    """Values drawn to their channel's mean: .4, .3, .2, .1, .05 of the distance is left; no use of ``id``, ``seed``."""
    values = np.asarray(image, np.float32)
    mean = values.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
    return _image(mean + CONTRAST[strength - 1] * (values - mean))


CORRUPTIONS: dict[str, Callable[..., Image.Image]] = {"blur": blur, "noise": noise, "jpeg": jpeg, "contrast": contrast}


def corrupt(image: Image.Image, name: str, strength: int, id: str = "", seed: int = 0) -> Image.Image:
    """One corruption of an 8-bit RGB image, at its own size; strength 0 leaves it, ``id`` and ``seed`` draw noise."""
    check(name, strength)
    if image.mode != "RGB":
        raise ValueError(f"image has mode {image.mode}, expected RGB: capsae.data.images.decode_image gives it")
    return CORRUPTIONS[name](image, strength, id, seed) if strength else image


def corrupted(
    source, name: str, strength: int, seed: int = 0, prepare: Callable[[Image.Image], Image.Image] | None = None
):
    """A source whose images are corrupted as they are read, with a digest of its own.

    ``prepare``, image -> image, comes first: noise on 4000 pixels would be gone once the backbone sees 224 of them.

    Returns
    -------
    ImageSource
        The same ids, labels and class names.
    """
    check(name, strength)
    place = {row: i for i, row in enumerate(source.rows.tolist())}  # read counts rows of the whole source

    def read(row: int) -> Image.Image:
        image = source.image(place[row])
        return corrupt(prepare(image) if prepare else image, name, strength, str(source.ids[place[row]]), seed)

    made = {"corruption": name, "strength": strength, "seed": seed, "version": VERSION, "prepared": prepare is not None}
    fingerprint = hashlib.sha256(json.dumps([source.fingerprint, made]).encode()).hexdigest()
    spec = dict(source.spec) | made
    return replace(source, name=f"{source.name}, {name}/{strength}", read=read, fingerprint=fingerprint, spec=spec)


def check(name: str, strength: int) -> None:
    """Raise ValueError for an unknown corruption or strength."""
    if name not in CORRUPTIONS:
        raise ValueError(f"no corruption {name!r}; there are {', '.join(CORRUPTIONS)}")
    if strength not in (0, *STRENGTHS):
        raise ValueError(f"strength of {name} is {strength!r}, expected 0 (none) or one of {STRENGTHS}")


def _image(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))
