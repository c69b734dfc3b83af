"""A training step of any variant in plain PyTorch: as `steps.PlainStep`, with the variant's own code and loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..steps import PlainStep, auxk_loss


class VariantStep(PlainStep):
    """Autograd over the dense (B, M) code in float32, Adam, unit rows, then the variant's thresholds."""

    def __init__(self, sae, variance: float, window: int) -> None:
        if sae.config.products == "bf16":
            raise ValueError(f"variant {sae.config.variant!r} trains in float32; products='auto' would do")
        super().__init__(sae, variance, window)
        self.products = "float32"

    def __call__(self, x: torch.Tensor, lr: float) -> None:
        sae = self.sae
        forward = sae.forward_loss(x, self.steps)
        loss, squared_error = forward.loss, forward.residual.detach().square().sum()
        if sae.auxk and len(self.dead) and self.config.aux_alpha:
            rows = (sae.encoder[self.dead], sae.encoder_bias[self.dead], sae.rows()[self.dead])
            loss = loss + self.auxk(x - sae.pre_bias, forward.residual, *rows)
        self.adam.zero_grad()
        (loss / (len(x) * self.variance)).backward()
        with torch.no_grad():
            n_rows = torch.full_like(loss, len(x))
            self.totals += torch.stack([n_rows, loss.detach(), squared_error, forward.fired.sum()])
            self.idle.add_(1).masked_fill_(forward.fired > 0, 0)
            if (gradient := sae.decoder.grad) is not None:
                gradient -= (gradient * sae.decoder).sum(1, keepdim=True) * sae.decoder  # that changes the length only
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            sae.decoder.copy_(F.normalize(sae.decoder, dim=1))
            sae.after_step(x, forward, self.steps)
        self.steps += 1
        self.update_average()

    def auxk(self, centred, residual, encoder, bias, decoder) -> torch.Tensor:
        """AuxK on the dead; or on latents that fire too seldom, none of which is left out for having fired since."""
        if not hasattr(self.sae, "underused"):
            return super().auxk(centred, residual, encoder, bias, decoder)
        k, n = self.config.aux_k or max(1, centred.shape[1] // 2), self.aux_rows(len(centred))
        share = self.aux_share(len(centred), residual.detach().square().sum())
        return share * auxk_loss(centred[:n], residual[:n], encoder, bias, decoder, k)

    def find_dead(self) -> None:
        super().find_dead()
        if hasattr(self.sae, "underused") and self.steps:
            self.dead = self.sae.underused()

    def read(self) -> dict[str, float]:
        dead = (self.idle >= self.window).double().mean().item()
        return super().read() | {"dead_fraction": dead}  # `dead` may hold latents that are not dead

    @torch.no_grad()
    def update_average(self) -> None:
        super().update_average()
        if self.average is not None:
            for mean, own in zip(self.average.buffers(), self.sae.buffers(), strict=True):
                mean.copy_(own)

    def calibrate(self, rows: torch.Tensor) -> None:
        if hasattr(sae := self.result(), "calibrate"):
            sae.calibrate(rows)

    def encode(self, sae, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As at inference: what held-out rows are measured with."""
        return sae.code(x)
