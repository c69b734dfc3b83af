"""A fast step that is broken in any way: the plain one trains, and one warning names what failed."""

from __future__ import annotations

import pytest
import torch

from capsae.sae import SAEConfig, train_saes
from capsae.sae import train as training
from capsae.sae.steps import PlainStep

CONFIGS = [SAEConfig(latents=40, k=4, epochs=2, batch_size=100, lr=1e-3, seed=seed) for seed in (0, 1)]
X = torch.randn(230, 12, generator=torch.Generator().manual_seed(0)) @ torch.randn(
    12, 12, generator=torch.Generator().manual_seed(1)
)


class Fast(PlainStep):
    """The plain step, as a fast one that nobody has proven."""

    proven = False


class Compiling(Fast):
    def __init__(self, *of):
        raise SyntaxError("ptxas: unknown instruction")


class Launching(Fast):
    def __call__(self, x, lr):
        raise RuntimeError("CUDA error: invalid\nconfiguration argument")


class Recording(Fast):
    """Fails where it records, on the third step, or warns and goes on where that is no check."""

    @classmethod
    def together(cls, steps):
        inner = super().together(steps)

        def take(batches, lrs):
            if steps[0].steps == 2 and take.strict:
                raise RuntimeError("capture_end: operation not permitted")
            inner(batches, lrs)

        take.strict = False
        return take


class Constant(Fast):
    """Adam with beta1 = .85."""

    def __init__(self, *of):
        super().__init__(*of)
        self.adam.param_groups[0]["betas"] = (0.85, 0.999)


class Silent(Fast):
    """One weight of the second step becomes NaN, and no exception comes."""

    def __call__(self, x, lr):
        super().__call__(x, lr)
        if self.steps == 2:
            self.sae.encoder.data[3, 2] = torch.nan


class AuxK(Fast):
    """Right until latents are dead: then AuxK counts three times."""

    def aux_share(self, *of):
        return 3 * super().aux_share(*of)


class HeldOut(Fast):
    """Right in training, wrong where the epoch to keep is chosen."""

    def squared_error(self, x):
        return 1.2 * super().squared_error(x)


class Second(Fast):
    """Several SAEs side by side: the second one's batch is read from the first one's memory."""

    @classmethod
    def together(cls, steps):
        inner = super().together(steps)
        return lambda batches, lrs: inner([batches[0], *[b.roll(1, 1) for b in batches[1:]]], lrs)


def trained(monkeypatch, kind, **options):
    monkeypatch.setattr(training, "_step_kind", lambda compiled, device: kind)
    return train_saes(X, CONFIGS, device="cpu", progress=False, **options)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (Compiling, "SyntaxError: ptxas: unknown instruction"),
        (Launching, "RuntimeError: CUDA error: invalid configuration argument"),
        (Recording, "RuntimeError: capture_end: operation not permitted"),
        (Constant, "first moments are"),
        (Silent, "encoder's weights are nan % off"),
        (AuxK, "SAE 0, with dead latents, encoder"),
        (HeldOut, "held-out errors are 20 % off"),
        (Second, "SAE 1, encoder's weights are"),
    ],
)
def test_a_broken_step_ends_with_the_plain_ones_weights_and_one_warning(monkeypatch, caplog, kind, named):
    wanted = trained(monkeypatch, PlainStep)
    caplog.clear()
    found = trained(monkeypatch, kind)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1 and named in warnings[0] and kind.__name__ in warnings[0] and "report" in warnings[0]
    for (sae, history), (plain, _) in zip(found, wanted, strict=True):
        assert history.attrs["step"] == "PlainStep"
        assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), plain.parameters(), strict=True))


def test_a_sound_step_trains_and_nothing_is_changed_by_the_check(monkeypatch, caplog):
    wanted, found = trained(monkeypatch, PlainStep), trained(monkeypatch, Fast)
    assert not caplog.records
    for (sae, history), (plain, _) in zip(found, wanted, strict=True):
        assert history.attrs["step"] == "Fast"
        assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), plain.parameters(), strict=True))


def test_want_of_memory_is_no_fault_of_the_step(monkeypatch):
    class Large(Fast):
        def __init__(self, *of):
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        trained(monkeypatch, Large)
