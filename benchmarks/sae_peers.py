"""Top-k SAE trainers of other libraries behind one signature, on any device, fed from one tensor.

    trained = TRAINERS["sae-lens"](x, config)         # x (N, d) normalised rows on the device that is to be used
    trained.seconds, trained.apply(rows)              # its loop alone; rows (n, d) -> code (n, M), x_hat (n, d)

Each library's own model, loss, optimiser and step are used; only the data comes from a tensor, in batches of equal size
and in a new random order each epoch, as in `capsae.train_sae`. What has to be set for a short training:

- The learning rate rises and falls over `config.warmup` and `config.decay` of the steps where the library can do so.
- Latents count as dead after DEAD_EPOCHS passes: the defaults (10 million samples, 1000 steps) never come here.
- sparsify: without its Triton kernel on a CPU; "signum" is its default optimiser, with AuxK off as is its default.
- sae-lens: `lr_end` must be given; progress bars are off everywhere.
- overcomplete: its own AuxK loss; no monitoring.

A peer that does not import is left out with the reason: `available()`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version

import torch
import torch.nn.functional as F

from capsae.sae import SAEConfig, TopKSAE, train_sae
from capsae.sae.train import schedule

DEAD_EPOCHS = 5


@dataclass(frozen=True)
class Trained:
    """What a trainer leaves: the seconds of its loop, and rows (n, d) -> dense code (n, M), x_hat (n, d)."""

    seconds: float
    apply: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


Trainer = Callable[[torch.Tensor, SAEConfig], Trained]


def batches_per_epoch(x: torch.Tensor, config: SAEConfig) -> int:
    """Batches of an epoch, of equal size to one row."""
    return -(-len(x) // config.batch_size)


def epoch(x: torch.Tensor, config: SAEConfig) -> Iterator[torch.Tensor]:
    """The rows of x in a random order, in batches."""
    for rows in torch.randperm(len(x), device=x.device).tensor_split(batches_per_epoch(x, config)):
        yield x[rows]


def all_batches(x: torch.Tensor, config: SAEConfig) -> Iterator[torch.Tensor]:
    """The batches of all epochs."""
    for _ in range(config.epochs):
        yield from epoch(x, config)


def now(device: torch.device) -> float:
    """The clock, after the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def ours(x: torch.Tensor, config: SAEConfig) -> Trained:
    """capsae.train_sae as everybody calls it."""
    sae, history = train_sae(x, replace(config, normalize="none"), device=x.device, progress=False)

    def apply(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = sae.encode(rows)
        return codes.dense(), sae.decode(codes)

    return Trained(float(history.seconds.sum()), apply)


def plain(x: torch.Tensor, config: SAEConfig) -> Trained:
    """The loop that one writes first: float32, torch.topk, embedding_bag, autograd, Adam; unit decoder rows."""
    torch.manual_seed(config.seed)
    sae = TopKSAE.untrained(x.shape[1], config).to(x.device)
    sae.pre_bias.data = x.mean(0)
    variance = (x - x.mean(0)).square().sum(1).mean()
    adam = torch.optim.Adam(sae.parameters(), lr=config.peak_lr)
    n_steps = config.epochs * batches_per_epoch(x, config)
    began = now(x.device)
    for step, batch in enumerate(all_batches(x, config)):
        adam.param_groups[0]["lr"] = config.peak_lr * schedule(step, n_steps, config.warmup, config.decay)
        values, indices = torch.topk(sae.preactivations(batch).relu(), config.k, dim=1)
        x_hat = F.embedding_bag(indices, sae.decoder, per_sample_weights=values, mode="sum") + sae.pre_bias
        loss = (batch - x_hat).square().sum(1).mean() / variance
        adam.zero_grad()
        loss.backward()
        adam.step()
        sae.decoder.data = F.normalize(sae.decoder.data, dim=1)

    def apply(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = torch.topk(sae.preactivations(rows).relu(), config.k, dim=1)
        code = torch.zeros(len(rows), config.latents, device=rows.device).scatter(1, indices, values)
        return code, code @ sae.decoder + sae.pre_bias

    return Trained(now(x.device) - began, apply)


def overcomplete(x: torch.Tensor, config: SAEConfig) -> Trained:
    """overcomplete's TopKSAE and train_sae with its own AuxK loss."""
    from overcomplete.sae import TopKSAE as Model
    from overcomplete.sae import train_sae as fit
    from overcomplete.sae.losses import top_k_auxiliary_loss

    torch.manual_seed(config.seed)
    model = Model(x.shape[1], config.latents, top_k=config.k, device=str(x.device))
    adam = torch.optim.Adam(model.parameters(), lr=config.peak_lr)
    n_steps = config.epochs * batches_per_epoch(x, config)
    rate = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: schedule(min(step, n_steps - 1), n_steps, config.warmup, config.decay)
    )

    class Loader:
        def __iter__(self) -> Iterator[torch.Tensor]:
            return epoch(x, config)

    began = now(x.device)
    fit(model, Loader(), top_k_auxiliary_loss, adam, rate, config.epochs, monitoring=0, device=str(x.device))
    seconds = now(x.device) - began
    model.eval()
    return Trained(seconds, lambda rows: model(rows)[1:])


def sae_lens(x: torch.Tensor, config: SAEConfig) -> Trained:
    """sae-lens' TopKTrainingSAE and SAETrainer."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(config.seed)
    n_batches = batches_per_epoch(x, config)
    n_steps, size = config.epochs * n_batches, len(x) // n_batches
    model = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=config.latents, k=config.k, device=str(x.device))
    )
    settings = SAETrainerConfig(
        total_training_samples=n_steps * size,
        train_batch_size_samples=size,
        lr=config.peak_lr,
        lr_end=config.peak_lr / 10,  # asserted to be given; the constant schedule does not read it
        lr_warm_up_steps=round(config.warmup * n_steps),
        lr_decay_steps=round(config.decay * n_steps),
        device=str(x.device),
        autocast=x.device.type == "cuda",
        dead_feature_window=DEAD_EPOCHS * n_batches,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(settings, model, all_batches(x, config))
    began = now(x.device)
    with contextlib.suppress(StopIteration):
        trainer.fit()
    seconds = now(x.device) - began
    model.eval()

    def apply(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        code = model.encode(rows)
        return code, model.decode(code)

    return Trained(seconds, apply)


def dictionary_learning(x: torch.Tensor, config: SAEConfig) -> Trained:
    """dictionary_learning's AutoEncoderTopK and TopKTrainer."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    n_batches = batches_per_epoch(x, config)
    n_steps = config.epochs * n_batches
    warmup = round(config.warmup * n_steps)
    decay = n_steps - round(config.decay * n_steps)
    trainer = TopKTrainer(
        steps=n_steps,
        activation_dim=x.shape[1],
        dict_size=config.latents,
        k=config.k,
        layer=0,
        lm_name="none",
        lr=config.peak_lr,
        warmup_steps=warmup,
        decay_start=decay if warmup < decay < n_steps else None,
        seed=config.seed,
        device=str(x.device),
    )
    trainer.dead_feature_threshold = DEAD_EPOCHS * len(x)
    began = now(x.device)
    for step, batch in enumerate(all_batches(x, config)):
        trainer.update(step, batch)

    def apply(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_hat, code = trainer.ae(rows, output_features=True)
        return code, x_hat

    return Trained(now(x.device) - began, apply)


def sparsify(x: torch.Tensor, config: SAEConfig, optimizer: str) -> Trained:
    """sparsify's SparseCoder in the step of its Trainer, which itself takes a language model alone."""
    if x.device.type == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    with contextlib.redirect_stdout(io.StringIO()):
        from sparsify import SparseCoder, SparseCoderConfig
        from sparsify.sign_sgd import SignSGD
    from schedulefree import ScheduleFreeWrapper
    from transformers import get_linear_schedule_with_warmup

    torch.manual_seed(config.seed)
    n_steps = config.epochs * batches_per_epoch(x, config)
    aux_alpha = 1 / 32 if optimizer == "adam" else 0.0
    settings = SparseCoderConfig(num_latents=config.latents, k=config.k)
    sae = SparseCoder(x.shape[1], settings, device=x.device, dtype=torch.float32)
    if optimizer == "adam":
        steps = torch.optim.Adam(sae.parameters(), lr=config.peak_lr)
        rate = get_linear_schedule_with_warmup(steps, round(config.warmup * n_steps), n_steps)
    else:
        steps, rate = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=config.peak_lr), momentum=0.95), None
        steps.train()
    idle = torch.zeros(config.latents, dtype=torch.long, device=x.device)
    began = now(x.device)
    for step, batch in enumerate(all_batches(x, config)):
        if step == 0:
            sae.b_dec.data = batch.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        out = sae(batch, dead_mask=idle > DEAD_EPOCHS * len(x) if aux_alpha else None)
        fired = torch.zeros_like(idle, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())  # the Trainer reads it in each step
        (out.fvu + aux_alpha * out.auxk_loss).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        steps.step()
        steps.zero_grad()
        if rate is not None:
            rate.step()
        idle += len(batch)
        idle[fired] = 0
    seconds = now(x.device) - began
    if rate is None:
        steps.eval()  # the averaged weights

    def apply(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices, dense = sae.encode(rows)
        return torch.zeros_like(dense).scatter(1, indices, values), sae.decode(values, indices)

    return Trained(seconds, apply)


TRAINERS: dict[str, Trainer] = {
    "capsae": ours,
    "capsae-bf16": lambda x, config: ours(x, replace(config, products="bf16")),  # the others multiply float32
    "plain": plain,
    "overcomplete": overcomplete,
    "sae-lens": sae_lens,
    "dictionary-learning": dictionary_learning,
    "sparsify-signum": lambda x, config: sparsify(x, config, "signum"),
    "sparsify-adam": lambda x, config: sparsify(x, config, "adam"),
}
# trainer: its distribution, the module that must import
LIBRARIES = {
    "overcomplete": ("overcomplete", "overcomplete.sae"),
    "sae-lens": ("sae-lens", "sae_lens"),
    "dictionary-learning": ("dictionary-learning", "dictionary_learning.trainers.top_k"),
    "sparsify-signum": ("eai-sparsify", "sparsify"),
    "sparsify-adam": ("eai-sparsify", "sparsify"),
}


def available(*names: str) -> tuple[dict[str, str], dict[str, str]]:
    """Versions of the peers (or of the named) that import, and the reason of each that does not, by trainer."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # before the libraries import tqdm
    if not torch.cuda.is_available():
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    versions, missing = {}, {}
    for name, (distribution, module) in LIBRARIES.items():
        if names and name not in names:
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                importlib.import_module(module)
            versions[name] = f"{distribution} {version(distribution)}"
        except Exception as error:  # a library may fail to import in any way
            missing[name] = f"{type(error).__name__}: {error}"
    return versions, missing


@torch.no_grad()
def quality(trained: Trained, held_out: torch.Tensor, train: torch.Tensor, size: int = 2048) -> tuple[float, float]:
    """FVU about the mean on held-out rows, and the share of latents that fire for no row of `train`."""
    rows = held_out.double()
    error = sum((part.double() - trained.apply(part)[1]).square().sum() for part in held_out.split(size))
    fired = torch.stack([(trained.apply(part)[0] > 0).any(0) for part in train.split(size)]).any(0)
    return (error / (rows - rows.mean(0)).square().sum()).item(), 1 - fired.double().mean().item()
