from __future__ import annotations

import numpy as np
import pytest
import torch

from capsae import detectors
from capsae.detectors.hooks import observe_module


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.Dropout(0.9), torch.nn.Linear(5, 3))


def test_any_network_gives_what_detectors_need():
    net, x, y = network().train(), torch.randn(20, 3, 4), torch.arange(20) % 3
    seen = observe_module(net, [(x[:8], y[:8]), (x[8:], y[8:])], head="3")
    with torch.no_grad():
        features = net.eval()[1](x.flatten(1))
        np.testing.assert_allclose(seen.cls, features, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(seen.logits, net(x), rtol=1e-5, atol=1e-6)
    assert seen.labels.tolist() == y.tolist() and not net[3]._forward_hooks
    assert observe_module(net.train(), [x], head=net[3]).labels is None and net.training, "as it was"
    for name in ("msp", "mds", "react", "vim"):  # logits, features and labels, the head's weights, both
        assert np.isfinite(detectors.create(name).fit(seen).score(seen)).all()


@pytest.mark.parametrize(
    ("net", "head", "batches", "message"),
    [
        (network(), "fc", [torch.zeros(1, 12)], "no Linear of this network; its last are 1, 3"),
        (network(), "0", [torch.zeros(1, 12)], "no Linear"),
        (network(), "3", [], "batches is empty"),
        (torch.nn.Sequential(torch.nn.Linear(4, 2)), "0", [torch.zeros(2, 3, 4)], r"read \[\(2, 3, 4\)\]"),
    ],
)
def test_what_is_no_head_is_refused(net, head, batches, message):
    with pytest.raises(ValueError, match=message):
        observe_module(net, batches, head)
    assert not any(each._forward_hooks for each in net.modules())
