"""torchvision's ViT through timm gives the same numbers."""

from __future__ import annotations

import pytest
import torch

from capsae.features.backbone import load_backbone
from capsae.features.convert import convert_torchvision_vit, load_torchvision_vit


@pytest.fixture
def pair():
    """A small torchvision ViT with random weights (biases and token too, which are zero at birth) and its timm twin."""
    from timm.models.vision_transformer import VisionTransformer as TimmViT
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    theirs = VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=7
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours = TimmViT(img_size=32, patch_size=8, depth=3, num_heads=4, embed_dim=64, mlp_ratio=2, num_classes=7).eval()
    return theirs, ours


def test_small_model_is_equal(pair):
    theirs, ours = pair
    ours.load_state_dict(convert_torchvision_vit(theirs.state_dict()), strict=True)
    x = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        tokens = ours.forward_features(x)
        expected = theirs.encoder(torch.cat([theirs.class_token.expand(4, -1, -1), theirs._process_input(x)], dim=1))
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.forward_head(tokens, pre_logits=True), expected[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)


def test_old_names_of_the_mlp_and_unknown_keys(pair):
    theirs, ours = pair
    old = {
        key.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): value
        for key, value in theirs.state_dict().items()
    }
    new = convert_torchvision_vit(theirs.state_dict())
    assert convert_torchvision_vit(old).keys() == new.keys() == ours.state_dict().keys()
    with pytest.raises(ValueError, match="'cls_token' is no parameter of torchvision's VisionTransformer"):
        convert_torchvision_vit(ours.state_dict())


def test_vit_b_16_from_a_file(tmp_path):
    """The real model, one image, through the backbone that the experiment names."""
    from torchvision.models import vit_b_16

    torch.manual_seed(0)
    theirs = vit_b_16(weights=None).eval()
    torch.nn.init.normal_(theirs.heads.head.weight, std=0.02)  # zero at birth
    torch.save(theirs.state_dict(), tmp_path / "vit_b_16.pth")
    backbone = load_backbone({"model": "torchvision/vit_b_16", "checkpoint": str(tmp_path / "vit_b_16.pth")})
    assert (backbone.size, backbone.dim, backbone.n_logits) == (224, 768, 1000)
    assert (backbone.crop, backbone.interpolation, backbone.mean[0]) == (224 / 256, "bilinear", 0.485)
    image = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8)
    x = (image.permute(0, 3, 1, 2) / 255 - torch.tensor(backbone.mean).view(3, 1, 1)) / torch.tensor(backbone.std).view(
        3, 1, 1
    )
    with torch.inference_mode():
        cls, logits = backbone.forward(image)
        expected = theirs.encoder(torch.cat([theirs.class_token, theirs._process_input(x)], dim=1))[:, 0]
        torch.testing.assert_close(cls, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(logits, theirs(x), atol=1e-5, rtol=0)


def test_what_cannot_be_loaded_is_said(tmp_path, pair):
    with pytest.raises(ValueError, match="'resnet50' cannot be converted; these can: vit_b_16"):
        load_torchvision_vit("resnet50")
    with pytest.raises(ValueError, match="no weights 'IMAGENET9' for vit_b_16, .* torchvision has IMAGENET1K_V1"):
        load_torchvision_vit("vit_b_16", "IMAGENET9")
    torch.save(pair[0].state_dict(), tmp_path / "small.pth")
    with pytest.raises(ValueError, match="does not fit vit_b_16"):
        load_torchvision_vit("vit_b_16", tmp_path / "small.pth")
