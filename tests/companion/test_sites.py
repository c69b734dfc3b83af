"""Features of many sites: right, from one pass, resumable, with errors that name what there is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import small_experiment
import torch
from PIL import Image

from capsae.data.open import open_source
from capsae.data.sources import ImageSource
from capsae.features.backbone import Backbone, load_backbone
from capsae.features.extract import extract
from capsae.pipeline.packs import load_pack
from capsae.pipeline.run import Run
from companion.chapters.layers import sites as sites_module
from companion.chapters.layers.sites import FINAL, SiteReader, run_sites, site_names

SHARED = Path(os.environ.get("CAPSAE_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
WEIGHTS = SHARED / "deit_tiny_patch16_224.fb_in1k.fp16.safetensors"
needs_images = pytest.mark.skipif(
    not WEIGHTS.is_file(),
    reason=f"no images and weights under {SHARED}: set CAPSAE_SHARED to the folder that holds data/",
)


def extract_sites(source, backbone, out, sites=None, **options):
    reader = SiteReader(backbone, sites)
    return reader.split(extract(source, reader, out, **options))


WANTED = ("block07/cls", "block03/attn", FINAL, "block12/patches")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(net.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def backbone(checkpoint):
    return load_backbone({"model": "vit_tiny_patch16_224", "image_size": 32, "checkpoint": checkpoint})


@pytest.fixture(scope="module")
def source():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 35, 39, 3), dtype=np.uint8)
    ids = np.array([f"{i:04d}.png" for i in range(20)])
    return ImageSource(
        "memory", np.arange(20) % 5, ids, (), lambda row: Image.fromarray(pixels[row]), np.arange(20), "seed 0"
    )


def _by_hand(net, x):
    """All sites, block by block, from the parts of each block; its attention without timm's forward of the block."""
    tokens, found = net._pos_embed(net.patch_embed(x)), {}
    for number, block in enumerate(net.blocks, start=1):
        attended = block.attn(block.norm1(tokens))
        tokens = tokens + attended
        tokens = tokens + block.mlp(block.norm2(tokens))
        found[f"block{number:02d}/attn"] = attended[:, 0]
        found[f"block{number:02d}/cls"] = tokens[:, 0]
        found[f"block{number:02d}/patches"] = tokens[:, 1:].mean(dim=1)
    return found | {FINAL: net.norm(tokens)[:, 0]}


def _pixels(backbone, source):
    x = np.stack([backbone.prepare(source.image(i)) for i in range(len(source))])
    x = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(backbone.mean).view(3, 1, 1)) / torch.tensor(backbone.std).view(3, 1, 1)


def test_sites_are_what_the_blocks_compute(backbone, source, tmp_path):
    found = extract_sites(source, backbone, tmp_path, batch_size=8, shard_size=12, progress=False)
    assert tuple(found) == site_names(backbone) and len(found) == 37
    with torch.inference_mode():
        expected = _by_hand(backbone.net, _pixels(backbone, source))
        blocks = backbone.net.get_intermediate_layers(_pixels(backbone, source), n=12, return_prefix_tokens=True)
    for site, features in found.items():
        assert features.cls.shape == (20, 192) and features.cls.flags["C_CONTIGUOUS"]
        np.testing.assert_allclose(features.cls, expected[site].numpy(), atol=1e-5, err_msg=site)
        assert features.labels.tolist() == source.labels.tolist() and features.meta["site"] == site
        assert features.logits.shape == (20, 1000)
    for number, (patches, prefix) in enumerate(blocks, start=1):  # timm's own way to the same
        np.testing.assert_allclose(found[f"block{number:02d}/cls"].cls, prefix[:, 0].numpy(), atol=1e-5)
        np.testing.assert_allclose(found[f"block{number:02d}/patches"].cls, patches.mean(1).numpy(), atol=1e-5)
    assert np.abs(found["block06/attn"].cls - found["block06/cls"].cls).max() > 0.01


def test_the_end_is_what_extract_gives_and_an_order_is_kept(backbone, source, tmp_path):
    found = extract_sites(source, backbone, tmp_path / "sites", WANTED, progress=False)
    assert tuple(found) == WANTED
    plain = extract(source, backbone, tmp_path / "plain", progress=False)
    np.testing.assert_array_equal(found[FINAL].cls, plain.cls)
    np.testing.assert_array_equal(found["block07/cls"].logits, plain.logits)


def test_one_pass_gives_all_sites_and_leaves_no_hook(backbone, source, tmp_path):
    passes = []
    handle = backbone.net.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    extract_sites(source, backbone, tmp_path, batch_size=8, shard_size=16, progress=False)
    handle.remove()
    assert len(passes) == 3  # 8 + 8 images in the first shard, 4 in the second
    assert not any(len(module._forward_hooks) for module in backbone.net.modules())
    assert backbone.dim == 192 and type(backbone) is Backbone


def test_a_failed_pass_leaves_no_hook(backbone):
    with pytest.raises(RuntimeError):
        SiteReader(backbone).forward(torch.zeros(1, 32, 32, 5, dtype=torch.uint8))
    assert not any(len(module._forward_hooks) for module in backbone.net.modules())


def test_finished_shards_are_kept_and_those_of_other_sites_are_not(backbone, source, tmp_path, monkeypatch):
    passes, forward = [], SiteReader.forward
    monkeypatch.setattr(SiteReader, "forward", lambda self, batch, logits=True: (
        passes.append(len(batch)), forward(self, batch, logits))[1])  # fmt: skip
    given = {"batch_size": 8, "shard_size": 8, "progress": False}
    first = extract_sites(source, backbone, tmp_path, WANTED, **given)
    (tmp_path / "shard-00001.safetensors").unlink()
    assert passes == [8, 8, 4]
    again = extract_sites(source, backbone, tmp_path, WANTED, **given)
    assert passes == [8, 8, 4, 8]
    assert all(first[site].digest() == again[site].digest() for site in WANTED)
    extract_sites(source, backbone, tmp_path, WANTED[:1], **given)
    assert passes == [8, 8, 4, 8, 8, 8, 4], "other sites, other shards"


def test_errors_name_what_there_is(backbone, source, tmp_path):
    with pytest.raises(ValueError, match=r"no site 'block13/cls'; vit_tiny_patch16_224 has block01/attn, .*final/cls"):
        extract_sites(source, backbone, tmp_path, ["block13/cls"])
    with pytest.raises(ValueError, match="each once"):
        SiteReader(backbone, ["block01/cls", "block01/cls"])
    with pytest.raises(ValueError, match="one or more"):
        SiteReader(backbone, [])
    with pytest.raises(ValueError, match=r"'swin_tiny.*' is a SwinTransformer, which has no blocks .* vision transf"):
        site_names({"model": "swin_tiny_patch4_window7_224", "pooling": "avg"})
    with pytest.raises(ValueError, match=r"cls has shape \(20, 192\), expected \(N, 768\) of 4 sites"):
        SiteReader(backbone, WANTED).split(extract(source, backbone, tmp_path, progress=False))


def test_registers_are_no_patches():
    registers = {"model": "vit_small_patch14_reg4_dinov2", "image_size": 28, "pooling": "token"}
    reader = SiteReader(registers, ["block02/patches", "block02/cls"])
    x = torch.randint(0, 256, (2, 28, 28, 3), dtype=torch.uint8)
    with torch.inference_mode():
        vectors, _ = reader.forward(x)
        scaled = (x.permute(0, 3, 1, 2) / 255 - torch.tensor(reader.mean).view(3, 1, 1)) / torch.tensor(
            reader.std
        ).view(3, 1, 1)
        patches, prefix = reader.net.get_intermediate_layers(scaled, n=[1], return_prefix_tokens=True)[0]
    assert prefix.shape[1] == 5, "CLS and four registers"
    np.testing.assert_allclose(vectors[:, :384], patches.mean(1), atol=1e-5)
    np.testing.assert_allclose(vectors[:, 384:], prefix[:, 0], atol=1e-5)


def test_the_digits_vit_has_sites():
    from capsae.features import tinyvit
    from capsae.features.backbone import BackboneSpec

    torch.manual_seed(0)
    backbone = Backbone(tinyvit._build(), BackboneSpec(model="capsae/digits_vit"))
    assert site_names(backbone)[:3] == ("block01/attn", "block01/cls", "block01/patches")
    assert len(site_names(backbone)) == 13


def test_sites_of_a_experiment_have_its_rows_and_are_stored(checkpoint, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for folder, classes in {"train": "abcd", "test": "abcd", "shifted": "x", "noise": "y"}.items():
        for name in classes:
            (tmp_path / folder / name).mkdir(parents=True)
            for row in range(10):
                image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                image.save(tmp_path / folder / name / f"{row}.png")
    path = tmp_path / "folders.toml"
    settings = f'model = "vit_tiny_patch16_224"\nimage_size = 32\ncheckpoint = {json.dumps(checkpoint)}'
    path.write_text(small_experiment.TOML.format(pack='"none"').replace('model = "vit_tiny_patch16_224"', settings))
    run = Run(path, store=tmp_path / "store", device="cpu", progress=False)
    sites = ("block05/cls", FINAL)
    found = {name: run_sites(run, name, sites) for name in ("train", "val", "near/shifted")}
    for name, of in found.items():
        expected = run.features(name)
        assert of[FINAL].ids.tolist() == of["block05/cls"].ids.tolist() == expected.ids.tolist()
        np.testing.assert_array_equal(of["block05/cls"].logits, expected.logits)
        np.testing.assert_allclose(of[FINAL].cls, expected.cls, rtol=2**-10, atol=1e-6)
        assert np.abs(of["block05/cls"].cls - expected.cls).max() > 0.1
    monkeypatch.setattr(sites_module.SiteReader, "forward", None)  # read, not made again
    run = Run(path, store=tmp_path / "store", device="cpu", progress=False)
    np.testing.assert_allclose(run_sites(run, "train", sites)[FINAL].cls, found["train"][FINAL].cls, rtol=2**-10)


@needs_images
def test_the_end_of_the_network_is_the_packs_feature(tmp_path):
    source = open_source({"kind": "parquet", "path": str(SHARED / "imagenet20" / "validation.parquet")})
    rows = np.linspace(0, len(source) - 1, 16).round().astype(int)
    settings = {"model": "deit_tiny_patch16_224", "checkpoint": str(WEIGHTS), "crop": 1.0}
    found = extract_sites(source.take(rows), settings, tmp_path, ["block12/cls", FINAL], progress=False)
    packed = load_pack("imagenet20", "test").take(rows)
    assert found[FINAL].ids.tolist() == packed.ids.tolist()
    np.testing.assert_allclose(packed.cls, found[FINAL].cls, rtol=2**-10, atol=2e-3)
    assert np.abs(found["block12/cls"].cls - packed.cls).max() > 0.5, "without the last norm it is another vector"
