"""Corruptions do what they say, the same way each time, and can be made into a pack."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from capsae.data.open import open_source
from capsae.features.backbone import load_backbone
from capsae.pipeline import packs
from capsae.pipeline.packs import load_pack
from capsae.pipeline.run import Run
from companion.chapters.shift import corruptions
from companion.chapters.shift import make_pack as shift_pack


@pytest.fixture(scope="module")
def image():
    """Smooth hills with an edge and some texture, 224 pixels."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:224, :224] / 224
    planes = [128 + 80 * np.sin(5 * x + c) * np.cos(7 * y) + 40 * (x > 0.5) for c in range(3)]
    return Image.fromarray((np.stack(planes, -1) + 4 * rng.normal(size=(224, 224, 3))).clip(0, 255).astype(np.uint8))


def _values(image):
    return np.asarray(image, np.float64)


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_strengths_grow_and_zero_leaves_the_image(name, image):
    assert corruptions.corrupt(image, name, 0) is image
    made = [corruptions.corrupt(image, name, s, "a.png") for s in corruptions.STRENGTHS]
    assert all(one.mode == "RGB" and one.size == image.size for one in made)
    distance = [np.abs(_values(one) - _values(image)).mean() for one in made]
    assert distance[0] > 1 and np.all(np.diff(distance) > 0)
    again = corruptions.corrupt(image, name, 3, "a.png")
    assert again.tobytes() == made[2].tobytes(), "the same image, id and seed: the same pixels"


def test_noise_is_drawn_from_seed_and_id_and_is_as_large_as_it_says(image):
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    one = corruptions.corrupt(grey, "noise", 1, "a", seed=0)
    others = [corruptions.corrupt(grey, "noise", 1, "b", seed=0), corruptions.corrupt(grey, "noise", 1, "a", seed=1)]
    assert all(other.tobytes() != one.tobytes() for other in others)
    assert _values(one).std() / 255 == pytest.approx(0.08, rel=0.03)
    stronger = corruptions.corrupt(grey, "noise", 2, "a", seed=0)
    weak, strong = ((_values(each) - 128).ravel() for each in (one, stronger))
    assert np.corrcoef(weak, strong)[0, 1] > 0.99, "one pattern for all strengths"
    for name in ("blur", "jpeg", "contrast"):
        assert corruptions.corrupt(image, name, 2, "a").tobytes() == corruptions.corrupt(image, name, 2, "b").tobytes()


def test_contrast_keeps_the_mean_and_a_share_of_the_distance(image):
    made = _values(corruptions.corrupt(image, "contrast", 4))
    np.testing.assert_allclose(made.mean((0, 1)), _values(image).mean((0, 1)), atol=0.3)
    assert made.std() / _values(image).std() == pytest.approx(0.1, rel=0.1)


def test_blur_has_the_width_that_it_says_and_grows_with_the_image():
    for side in (224, 448):
        line = np.zeros((side, side, 3), np.uint8)
        line[:, side // 2] = 255
        row = _values(corruptions.corrupt(Image.fromarray(line), "blur", 4))[side // 2, :, 0]
        place = np.arange(side) - side // 2
        assert np.sqrt((row * place**2).sum() / row.sum()) == pytest.approx(4 * side / 224, rel=0.1)


def test_what_cannot_be_corrupted_is_named(image):
    with pytest.raises(ValueError, match="no corruption 'fog'; there are blur, noise, jpeg, contrast"):
        corruptions.corrupt(image, "fog", 1)
    with pytest.raises(ValueError, match="strength of blur is 6"):
        corruptions.corrupt(image, "blur", 6)
    with pytest.raises(ValueError, match="image has mode L, expected RGB"):
        corruptions.corrupt(image.convert("L"), "blur", 1)


def test_a_corrupted_source_keeps_names_and_has_a_digest_of_its_own():
    source = open_source({"kind": "builtin", "name": "digits/test", "limit": 12})
    some = source.take([7, 2, 2])
    made = corruptions.corrupted(some, "noise", 2, seed=3)
    assert made.ids.tolist() == some.ids.tolist() and made.labels.tolist() == some.labels.tolist()
    for i in range(3):
        assert made.image(i).tobytes() == corruptions.corrupt(some.image(i), "noise", 2, str(some.ids[i]), 3).tobytes()
    assert made.take([1]).image(0).tobytes() == made.image(1).tobytes()
    digests = {some.digest(), made.digest()}
    digests |= {
        corruptions.corrupted(some, *which).digest() for which in (("noise", 3, 3), ("noise", 2, 4), ("blur", 2, 3))
    }
    assert len(digests) == 5
    assert made.spec["corruption"] == "noise" and made.spec["strength"] == 2
    flat = corruptions.corrupted(some, "contrast", 1, prepare=lambda image: image.resize((16, 16)))
    assert flat.image(0).size == (16, 16)


def test_balanced_rows():
    labels = np.array([0] * 10 + [1] * 3 + [2] * 4)
    rows = shift_pack.balanced_rows(labels, 4)
    assert np.bincount(labels[rows]).tolist() == [4, 3, 4] and rows[:4].tolist() == [0, 3, 6, 9]


def test_a_pack_of_ones_own_images(tmp_path):
    """The digits with their own small ViT, from the command line; features are those of the corrupted images."""
    from capsae.features.tinyvit import train_digits_vit

    vit = train_digits_vit({"kind": "builtin", "name": "digits/train", "limit": 50}, epochs=1, progress=False)
    path = vit.save(tmp_path / "vit.safetensors")
    run = Run("digits", store=tmp_path / "store", progress=False)
    out = shift_pack.make_shift_pack(
        run, tmp_path / "pack", names=("contrast",), strengths=(1, 5), per_class=2, checkpoint=path, progress=False
    )
    assert packs.pack_sets(out) == ["contrast/1", "contrast/5"]
    assert "after ImageNet-C" in packs.pack_info(out)["notes"]
    found, source = load_pack(out, "contrast/5"), run.inputs.source("test")
    assert np.bincount(found.labels).tolist() == [2] * 10
    backbone = load_backbone({"model": "capsae/digits_vit", "checkpoint": str(path)})
    rows = [int(np.flatnonzero(source.ids == id)[0]) for id in found.ids]
    seen = [corruptions.corrupt(Image.fromarray(backbone.prepare(source.image(row))), "contrast", 5) for row in rows]
    import torch

    with torch.inference_mode():
        cls = backbone.forward(torch.from_numpy(np.stack([np.asarray(each) for each in seen])))[0].numpy()
    np.testing.assert_allclose(found.cls, cls, rtol=2**-10, atol=2e-3)
