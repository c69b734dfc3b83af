"""Sources of images: every kind the same, every bad input named."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capsae.data import images
from capsae.data.images import BadImage, decode_image
from capsae.data.open import open_source

COLOURS = {"blue": (10, 20, 200), "green": (10, 200, 20), "red": (200, 20, 10)}


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def solid(colour, size=(12, 10), mode="RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def write_parquet(path, blobs, labels, names, ids=None, row_group_size=4, **renamed):
    columns = {
        "image": pa.array(
            [{"bytes": blob, "path": None} for blob in blobs],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
        "label": pa.array(labels, pa.int64()),
    }
    if ids is not None:
        columns["source"] = pa.array(ids)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(names)}}
    features |= {"source": {"_type": "Value", "dtype": "string"}} if ids is not None else {}
    table = pa.table({renamed.get(key, key): value for key, value in columns.items()})
    features = {renamed.get(key, key): value for key, value in features.items()}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


@pytest.fixture
def dataset(tmp_path):
    """The same twelve images as parquet, folder and imglist: {kind: spec}."""
    blobs, labels, ids = [], [], []
    root = tmp_path / "folder"
    for label, (name, colour) in enumerate(COLOURS.items()):
        (root / name).mkdir(parents=True)
        for i in range(4):
            blobs.append(encode(solid(tuple(min(255, c + i) for c in colour))))
            labels.append(label)
            ids.append(f"{name}/{i}.png")
            (root / ids[-1]).write_bytes(blobs[-1])
    write_parquet(tmp_path / "train.parquet", blobs, labels, COLOURS, ids)
    (tmp_path / "list.txt").write_text("".join(f"{name} {label}\n" for name, label in zip(ids, labels, strict=True)))
    return {
        "parquet": {"kind": "parquet", "path": str(tmp_path / "train.parquet")},
        "folder": {"kind": "folder", "path": str(root)},
        "imglist": {
            "kind": "imglist",
            "list": str(tmp_path / "list.txt"),
            "root": str(root),
            "class_names": list(COLOURS),
        },
    }


@pytest.mark.parametrize("kind", ["parquet", "folder", "imglist"])
def test_kinds_agree(dataset, kind):
    source = open_source(dataset[kind])
    assert len(source) == 12
    assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert source.class_names == tuple(COLOURS)
    assert source.ids[5] == "green/1.png"
    assert source.image(5).mode == "RGB"
    assert source.image(5).getpixel((0, 0)) == (11, 201, 21)
    assert source.image(11).getpixel((3, 3)) == (203, 23, 13)


@pytest.mark.parametrize("kind", ["parquet", "folder", "imglist"])
def test_classes_and_limit(dataset, kind):
    source = open_source(dataset[kind] | {"classes": ["red", "blue"]})
    assert len(source) == 8
    assert source.class_names == ("red", "blue")
    assert source.labels.tolist() == [1] * 4 + [0] * 4
    assert source.image(7).getpixel((0, 0)) == (203, 23, 13)
    few = open_source(dataset[kind] | {"limit": 3})
    assert sorted(set(few.labels)) == [0, 1, 2], "a limit on a source sorted by class must not leave one class alone"
    assert len({source.digest(), few.digest(), open_source(dataset[kind]).digest()}) == 3
    with pytest.raises(ValueError, match=r"class 'purple' is not in .* its 3 classes are blue, green, red"):
        open_source(dataset[kind] | {"classes": ["red", "purple"]})


def test_digest_follows_content_not_place(dataset, tmp_path):
    import shutil

    before = open_source(dataset["parquet"]).digest()
    shutil.copy(dataset["parquet"]["path"], tmp_path / "elsewhere.parquet")
    assert open_source({"kind": "parquet", "path": str(tmp_path / "elsewhere.parquet")}).digest() == before
    folder = open_source(dataset["folder"]).digest()
    with open(f"{dataset['folder']['path']}/red/0.png", "ab") as file:
        file.write(b"more")
    assert open_source(dataset["folder"]).digest() != folder


def test_hub_reads_local_parquet_of_the_hubs_layout(tmp_path, dataset):
    datasets = pytest.importorskip("datasets")
    home = tmp_path / "hub" / "data"
    home.mkdir(parents=True)
    (home / "train-00000-of-00001.parquet").write_bytes((tmp_path / "train.parquet").read_bytes())
    old, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path / "cache"
    try:
        source = open_source({"kind": "hub", "name": str(tmp_path / "hub"), "split": "train"})
    finally:
        datasets.config.HF_DATASETS_CACHE = old
    same = open_source(dataset["parquet"])
    assert source.class_names == same.class_names
    assert source.labels.tolist() == same.labels.tolist()
    assert source.ids.tolist() == same.ids.tolist()
    assert all(np.array_equal(source.image(i), same.image(i)) for i in range(len(same)))


def test_parquet_in_shards_reads_few_row_groups(tmp_path):
    for shard in range(3):
        blobs = [encode(solid((shard * 10 + i, 0, 0))) for i in range(5)]
        write_parquet(tmp_path / f"train-{shard}.parquet", blobs, [shard] * 5, "abc", row_group_size=2)
    source = open_source({"kind": "parquet", "path": str(tmp_path)})
    assert [source.image(i).getpixel((0, 0))[0] for i in range(15)] == [
        shard * 10 + i for shard in range(3) for i in range(5)
    ]
    assert source.read.images.cache_info().currsize <= 2
    assert source.ids[6] == "train-1.parquet#1"
    assert len(open_source({"kind": "parquet", "path": str(tmp_path / "train-[01].parquet")})) == 10


def test_columns_are_found_or_named(tmp_path):
    blob = encode(solid((1, 2, 3)))
    cifar = write_parquet(tmp_path / "cifar.parquet", [blob], [1], "ab", image="img", label="fine_label")
    source = open_source({"kind": "parquet", "path": str(cifar)})
    assert (source.labels.tolist(), source.class_names, source.ids.tolist()) == ([1], ("a", "b"), ["cifar.parquet#0"])
    with pytest.raises(ValueError, match=r"no label column 'coarse'; its columns are img, fine_label"):
        open_source({"kind": "parquet", "path": str(cifar), "label": "coarse"})
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"image": [blob], "kind": ["cat"]}), plain)
    with pytest.raises(ValueError, match=r"no label column 'label'; its columns are image, kind"):
        open_source({"kind": "parquet", "path": str(plain)})
    with pytest.raises(ValueError, match=r"label column 'kind' .* holds 'cat', expected whole numbers"):
        open_source({"kind": "parquet", "path": str(plain), "label": "kind"})
    assert open_source({"kind": "parquet", "path": str(plain), "label": ""}).labels.tolist() == [-1]
    with pytest.raises(ValueError, match=r"image column 'kind' .* holds string"):
        open_source({"kind": "parquet", "path": str(plain), "image": "kind", "label": ""})


def test_imglist_of_openood(tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "x y.png").write_bytes(encode(solid((9, 9, 9))))
    (tmp_path / "list.txt").write_text("a b/x y.png -1\n\n")
    source = open_source({"kind": "imglist", "list": str(tmp_path / "list.txt"), "root": str(tmp_path)})
    assert (source.labels.tolist(), source.ids.tolist()) == ([-1], ["a b/x y.png"])
    (tmp_path / "list.txt").write_text("a b/x y.png 3\ngone/1.png 0\ngone/2.png 0\n")
    with pytest.raises(FileNotFoundError, match=r"2 of the 3 files .* the first is 'gone/1.png'"):
        open_source({"kind": "imglist", "list": str(tmp_path / "list.txt"), "root": str(tmp_path)})
    (tmp_path / "list.txt").write_text("a.png\n")
    with pytest.raises(ValueError, match=r"list.txt:1: expected 'relative/path label' .*, found 'a.png'"):
        open_source({"kind": "imglist", "list": str(tmp_path / "list.txt"), "root": str(tmp_path)})


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"kind": "zip"}, ValueError, "kind of source is 'zip', expected one of hub, parquet"),
        ({"kind": "folder", "path": "x", "pth": 1}, ValueError, "unknown key 'pth'"),
        ({"kind": "parquet"}, ValueError, "a parquet source needs 'path'"),
        ({"kind": "parquet", "path": "{tmp}/no.parquet"}, FileNotFoundError, "no parquet file or folder"),
        ({"kind": "parquet", "path": "{tmp}/no*.parquet"}, FileNotFoundError, "no parquet file matches"),
        ({"kind": "parquet", "path": "{tmp}"}, ValueError, "holds no .parquet file"),
        ({"kind": "parquet", "path": "{tmp}/text.parquet"}, ValueError, "not readable as parquet"),
        ({"kind": "folder", "path": "{tmp}/no"}, FileNotFoundError, "no folder"),
        ({"kind": "folder", "path": "{tmp}"}, ValueError, "holds no images"),
        ({"kind": "imglist", "list": "{tmp}/no.txt", "root": "{tmp}"}, FileNotFoundError, "no image list"),
        ({"kind": "builtin", "name": "cats"}, ValueError, "no built-in set 'cats'; there are digits/train"),
        ({"kind": "folder", "path": "{tmp}", "limit": 0}, ValueError, "limit is 0"),
    ],
)
def test_what_cannot_be_opened_is_an_error(tmp_path, spec, error, message):
    (tmp_path / "text.parquet").parent.mkdir(exist_ok=True)
    if "text.parquet" in str(spec):
        (tmp_path / "text.parquet").write_text("hello")
    spec = {
        key: value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value for key, value in spec.items()
    }
    with pytest.raises(error, match=message):
        open_source(spec)


# --- bad and odd images, through every kind of source ---------------------------------------------


def _grey16() -> bytes:
    ramp = np.linspace(0, 65535, 120).astype(np.uint16).reshape(10, 12)
    return encode(Image.fromarray(ramp))


def _palette_with_transparency() -> bytes:
    image = Image.new("P", (12, 10))
    image.putpalette([200, 30, 40, 0, 0, 0] + [0] * 762)
    image.putpixel((0, 0), 1)
    return encode(image, transparency=1)


def _animated() -> bytes:
    frames = [solid((i, 250, 0)) for i in (200, 100, 0)]
    return encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(solid((9, 9, 9), size=(12, 10)), exif=exif)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
USABLE = {  # name: (bytes, what to check of the RGB image as an array)
    "cmyk": (
        lambda: encode(solid((0, 255, 255, 0), mode="CMYK"), "JPEG"),
        lambda a: a[0, 0, 0] > 200 and a[0, 0, 1:].max() < 60,
    ),
    "palette": (
        _palette_with_transparency,
        lambda a: a[0, 0].tolist() == [255] * 3 and a[5, 5].tolist() == [200, 30, 40],
    ),
    "sixteen_bit": (_grey16, lambda a: a.min() == 0 and a.max() == 255 and a[5, 0, 0] == 60 * 65535 // 119 // 256),
    "grey": (lambda: encode(solid(77, mode="L")), lambda a: (a == 77).all()),
    "one_bit": (lambda: encode(solid(1, mode="1")), lambda a: (a == 255).all()),
    "grey_alpha": (lambda: encode(solid((0, 0), mode="LA")), lambda a: (a == 255).all()),
    "rgba": (lambda: encode(solid((0, 0, 255, 128), mode="RGBA")), lambda a: a[0, 0].tolist() == [127, 127, 255]),
    "animated": (_animated, lambda a: a[0, 0].tolist() == [200, 250, 0]),
    "turned_by_exif": (_rotated, lambda a: a.shape == (12, 10, 3)),
    "colour_key": (lambda: encode(solid((5, 6, 7)), transparency=(5, 6, 7)), lambda a: (a == 255).all()),
}
BAD = {  # name: (bytes, message)
    "empty": (lambda: b"", "empty file"),
    "wrong_bytes": (lambda: b"this is no image at all", "not an image that Pillow can read"),
    "truncated_jpeg": (lambda: (b := encode(NOISE, "JPEG"))[: len(b) // 2], "truncated or damaged"),
    "truncated_png": (lambda: (b := encode(NOISE))[: len(b) // 2], "truncated or damaged"),
    "truncated_webp": (lambda: (b := encode(NOISE, "WEBP"))[: len(b) // 2], "truncated or damaged|not an image"),
    "floating_point": (lambda: encode(Image.new("F", (4, 4)), "TIFF"), "floating-point pixels"),
    "huge": (lambda: encode(solid(0, size=(10_000, 9_000), mode="1")), "huge"),
    "bomb": (lambda: encode(solid(0, size=(20_000, 10_000), mode="1")), "huge"),
}


def as_source(kind: str, blob: bytes, tmp_path):
    """One blob as a source of one image."""
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "odd.png").write_bytes(blob)
    if kind == "parquet":
        return open_source(
            {"kind": kind, "path": str(write_parquet(tmp_path / "one.parquet", [blob], [0], "a", ["a/odd.png"]))}
        )
    if kind == "folder":
        return open_source({"kind": kind, "path": str(folder)})
    (tmp_path / "list.txt").write_text("a/odd.png 0\n")
    return open_source({"kind": kind, "list": str(tmp_path / "list.txt"), "root": str(folder)})


@pytest.mark.parametrize("kind", ["parquet", "folder", "imglist"])
@pytest.mark.parametrize("name", USABLE)
def test_odd_images_are_converted(name, kind, tmp_path):
    blob, right = USABLE[name]
    image = as_source(kind, blob(), tmp_path).image(0)
    assert image.mode == "RGB"
    assert right(np.asarray(image))


@pytest.mark.parametrize("kind", ["parquet", "folder", "imglist"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_named(name, kind, tmp_path):
    blob, message = BAD[name]
    with pytest.raises(BadImage, match=message) as caught:
        as_source(kind, blob(), tmp_path).image(0)
    assert caught.value.id == "a/odd.png"


def test_file_that_vanished_is_a_bad_image(dataset):
    import os

    source = open_source(dataset["folder"])
    os.remove(f"{dataset['folder']['path']}/blue/0.png")
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        source.image(0)


def test_limit_is_on_pixels_not_on_bytes(monkeypatch):
    blob = encode(solid((1, 2, 3), size=(20, 10)))
    monkeypatch.setattr(images, "MAX_PIXELS", 199)
    with pytest.raises(BadImage, match="huge: 20 x 10 pixels, the limit is 199"):
        decode_image(blob)
    monkeypatch.setattr(images, "MAX_PIXELS", 200)
    assert decode_image(blob).size == (20, 10)


# --- pixel statistics ------------------------------------------------------------------------------


def by_definition(rgb: np.ndarray, n_bytes: int) -> list[float]:
    from scipy.ndimage import convolve

    grey = np.asarray(Image.fromarray(rgb).convert("L")).astype(np.float64)
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    red, green, blue = rgb.astype(np.float64).transpose(2, 0, 1)
    rg, yb = red - green, (red + green) / 2 - blue
    colour = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
    height, width = grey.shape
    sharp = convolve(grey, kernel)[1:-1, 1:-1].var()
    return [n_bytes, n_bytes / grey.size, grey.size, width / height, sharp, grey.mean(), grey.std(), colour]


@pytest.mark.parametrize("shape", [(40, 30), (3, 3), (300, 250), (7, 900)])
def test_pixel_statistics_are_what_they_say(shape, monkeypatch):
    rgb = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8) // [[[1, 2, 3]]]
    rgb = rgb.astype(np.uint8)
    for strip in (images._STRIP, 1000):  # a large image is measured strip by strip
        monkeypatch.setattr(images, "_STRIP", strip)
        found = images.pixel_statistics(Image.fromarray(rgb), 1234)
        assert found.dtype == np.float32 and len(found) == len(images.PIXEL_STATISTICS)
        np.testing.assert_allclose(found, by_definition(rgb, 1234), rtol=1e-6)


def test_pixel_statistics_of_odd_sizes_are_finite():
    for size in ((1, 1), (2, 5), (1, 400)):
        found = dict(zip(images.PIXEL_STATISTICS, images.pixel_statistics(solid((1, 2, 3), size), 70), strict=True))
        assert np.isfinite(list(found.values())).all() and found["sharpness"] == found["contrast"] == 0


def test_an_image_is_measured_as_it_was_found(tmp_path):
    blob = encode(NOISE, "JPEG", quality=50)
    (tmp_path / "a.jpg").write_bytes(blob)
    source = open_source({"kind": "folder", "path": str(tmp_path)})
    image, found = source.measured(0)
    assert np.array_equal(image, source.image(0))
    assert found[:3].tolist() == [len(blob), np.float32(len(blob) / 1600), 1600]
    _, drawn = images.measure_image(NOISE)  # never a file: the size of its PNG
    assert drawn[0] == len(encode(NOISE))
    with pytest.raises(BadImage, match="empty file"):
        images.measure_image(b"")


def test_a_path_is_a_folder_of_images(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(NOISE))
    for given in (tmp_path, str(tmp_path)):
        assert open_source(given).digest() == open_source({"kind": "folder", "path": str(tmp_path)}).digest()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_source(tmp_path / "nowhere")
