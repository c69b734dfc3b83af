"""Small images that need no download: handwritten digits, drawn letters, patches of photographs, noise.

All of them are made to look alike in everything but what they show: scikit-learn's digits were bitmaps of 32 x 32
pixels, of which blocks of 4 x 4 were counted (8 x 8 values from 0 to 16). Letters, patches and noise go the same way,
and all are then enlarged to 32 x 32. So neither resolution, blur nor the number of grey levels tells OOD from ID.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 32  # pixels of every image here
CELLS = 8  # values a side of scikit-learn's digits
LEVELS = 16
N_TEST, N_VAL = 450, 200  # the other 1,147 digits train

LETTERS = "ACEFHKMNPRTVWXYadefhkmnrtuwxy"
"""Letters that no digit looks like. Left out, because a drawn one is often a digit: O o Q D U (0), I i l J j L (1), Z
z (2), B (3 or 8), S s (5), G b (6), q g p (9), and c v, which are parts of digits."""

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono"),
    *("STIXGeneral", "STIXGeneralItalic", "cmss10"),
)
"""Fonts that matplotlib carries."""

N_PATCHES = 600
N_NOISE = 100  # of each kind
Images = tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]


def load(name: str, seed: int = 0) -> Images:
    """Images of a built-in set, one of ``NAMES``: (N, 32, 32, 3) uint8, labels (N,) int64, ids (N,) str, class names.

    ``seed`` is of drawing and cutting. The split of the digits does not depend on it: nobody should test on what
    another run trained on.
    """
    if name not in _MAKERS:
        raise ValueError(f"no built-in set {name!r}; there are {', '.join(NAMES)}")
    return _MAKERS[name](seed)


def enlarge(cells: np.ndarray) -> np.ndarray:
    """Values (N, 8, 8) in [0, 16] -> images (N, 32, 32, 3) uint8, bicubic."""
    grey = np.round(np.asarray(cells, dtype=np.float64) * (255 / LEVELS)).clip(0, 255).astype(np.uint8)
    large = [np.asarray(Image.fromarray(each).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for each in grey]
    return np.repeat(np.stack(large)[..., None], 3, axis=3)


def count_cells(grey: np.ndarray) -> np.ndarray:
    """Grey images (N, 32, 32) in [0, 1] -> mean of each 4 x 4 block in steps of 1/16, as whole numbers (N, 8, 8) from
    0 to 16."""
    block = SIDE // CELLS
    means = grey.reshape(-1, CELLS, block, CELLS, block).mean(axis=(2, 4))
    return np.round(means * LEVELS)


# --- digits ---------------------------------------------------------------------------------------


def _digits(part: str) -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    rest, test = train_test_split(np.arange(len(data.target)), test_size=N_TEST, stratify=data.target, random_state=0)
    # validation rows that the backbone never saw: a threshold set on rows it was trained on would be too tight
    train, val = train_test_split(rest, test_size=N_VAL, stratify=data.target[rest], random_state=0)
    rows = np.sort({"train": train, "val": val, "test": test}[part])
    labels = data.target[rows].astype(np.int64)
    ids = np.array([f"digit-{row:04d}" for row in rows])
    return enlarge(data.images[rows]), labels, ids, tuple(str(digit) for digit in range(10))


# --- letters --------------------------------------------------------------------------------------


def _letters(seed: int, variants: int = 3) -> Images:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    rng = np.random.default_rng(seed)
    drawn, labels, ids = [], [], []
    for file in FONTS:
        font = ImageFont.truetype(str(folder / f"{file}.ttf"), 96)
        for label, letter in enumerate(LETTERS):
            for variant in range(variants):
                hand = {"angle": rng.uniform(-12, 12), "slant": rng.uniform(-0.2, 0.2), "narrow": rng.uniform(0.7, 1.0)}
                drawn.append(_draw(letter, font, stroke=int(rng.integers(0, 5)), **hand))
                labels.append(label)
                ids.append(f"{letter}-{file}-{variant}")
    return enlarge(count_cells(np.stack(drawn))), np.array(labels, dtype=np.int64), np.array(ids), tuple(LETTERS)


def _draw(letter: str, font, stroke: int, angle: float, slant: float, narrow: float) -> np.ndarray:
    """A letter as bitmap (32, 32) of 0 and 1, as high as the frame and centred, as the digits were."""
    canvas = Image.new("L", (256, 256))
    ImageDraw.Draw(canvas).text((128, 128), letter, fill=255, font=font, anchor="mm", stroke_width=stroke)
    slanted = (1, slant, -128 * slant, 0, 1, 0)
    canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, slanted, Image.Resampling.BILINEAR)
    canvas = canvas.rotate(angle, Image.Resampling.BILINEAR)
    canvas = canvas.crop(canvas.getbbox())
    width, height = canvas.size
    scale = SIDE / max(height, width * narrow)
    small = canvas.resize((max(1, round(width * narrow * scale)), max(1, round(height * scale))), Image.Resampling.BOX)
    frame = Image.new("L", (SIDE, SIDE))
    frame.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    return (np.asarray(frame) >= 96).astype(np.float64)


# --- patches and noise ----------------------------------------------------------------------------


def photographs() -> dict[str, np.ndarray]:
    """Grey photographs and one relief that scikit-learn and matplotlib carry, ``{name: (H, W) float in [0, 1]}``."""
    import matplotlib
    from sklearn.datasets import load_sample_images

    sample = load_sample_images()
    found = {Path(name).stem: _grey(image) for name, image in zip(sample.filenames, sample.images, strict=True)}
    folder = Path(matplotlib.get_data_path()) / "sample_data"  # some distributions of matplotlib leave it out
    if (folder / "grace_hopper.jpg").is_file():
        with Image.open(folder / "grace_hopper.jpg") as image:
            found["grace_hopper"] = _grey(np.asarray(image.convert("RGB")))
    if (folder / "jacksboro_fault_dem.npz").is_file():
        with np.load(folder / "jacksboro_fault_dem.npz") as file:  # heights of a mountain range: a natural texture
            height = file["elevation"].astype(np.float64)
        found["relief"] = (height - height.min()) / np.ptp(height)
    return dict(sorted(found.items()))


def _grey(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255


def _patches(seed: int) -> Images:
    """Random squares of 32 to 96 pixels, not blank, stretched to the whole grey scale."""
    rng = np.random.default_rng(seed)
    photos = photographs()
    names = tuple(photos)
    taken, labels, ids = [], [], []
    places: set[str] = set()
    while len(taken) < N_PATCHES:
        label = len(taken) % len(names)
        grey = photos[names[label]]
        side = int(rng.choice((32, 64, 96)))
        y, x = (int(rng.integers(0, size - side + 1)) for size in grey.shape)
        patch = grey[y : y + side, x : x + side]
        patch = patch.reshape(SIDE, side // SIDE, SIDE, side // SIDE).mean(axis=(1, 3))
        low, high = np.percentile(patch, (1, 99))
        place = f"{names[label]}-{y}-{x}-{side}"
        if high - low < 0.1 or place in places:  # sky and other blank places
            continue
        places.add(place)
        taken.append(((patch - low) / (high - low)).clip(0, 1))
        labels.append(label)
        ids.append(place)
    return enlarge(count_cells(np.stack(taken))), np.array(labels, dtype=np.int64), np.array(ids), names


def _noise(seed: int) -> Images:
    """Uniform, salt and pepper, and smooth noise; the smooth kind has about the digits' blur."""
    rng = np.random.default_rng(seed)
    shape = (N_NOISE, CELLS, CELLS)
    coarse = rng.uniform(size=(N_NOISE, 4, 4)).astype(np.float32)
    small = [Image.fromarray(each).resize((CELLS, CELLS), Image.Resampling.BICUBIC) for each in coarse]
    smooth = np.stack([np.asarray(each) for each in small])
    kinds: dict[str, np.ndarray] = {
        "uniform": rng.uniform(size=shape),
        "salt and pepper": (rng.uniform(size=shape) < rng.uniform(0.2, 0.6, size=(N_NOISE, 1, 1))).astype(np.float64),
        "smooth": smooth.clip(0, 1),
    }
    cells = np.round(np.concatenate(list(kinds.values())) * LEVELS)
    labels = np.repeat(np.arange(len(kinds)), N_NOISE)
    ids = np.array([f"{kind}-{i:03d}" for kind in kinds for i in range(N_NOISE)])
    return enlarge(cells), labels, ids, tuple(kinds)


_MAKERS: dict[str, Callable[[int], Images]] = {
    "digits/train": lambda seed: _digits("train"),
    "digits/val": lambda seed: _digits("val"),
    "digits/test": lambda seed: _digits("test"),
    "letters": _letters,
    "patches": _patches,
    "noise": _noise,
}
NAMES = tuple(_MAKERS)
