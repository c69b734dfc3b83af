"""Makes the folders beside this file: small SAEs as the libraries themselves write them, and the codes they give.

    pip install sae-lens==6.54.12 eai-sparsify==1.3.3 dictionary-learning==0.1.0
    python tests/sae/exchange/make.py

Run once; the files are committed, so that the tests need none of the libraries. `rows` holds the input; NAME.codes
(N, M) and NAME.out (N, d) are what the library's own float32 model makes of it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from dictionary_learning.trainers.top_k import TopKTrainer
from sae_lens import SAE, TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig

from capsae.sae.exchange.files import CONVERT

HERE = Path(__file__).parent
D, M, K, N = 6, 20, 3, 32
dice = torch.Generator().manual_seed(0)
found = {"rows": 2 + 3 * torch.randn(N, D, generator=dice)}


def shake(module: torch.nn.Module) -> None:
    """Weights that no symmetry hides an error in: encoder, decoder and biases apart, rows of several lengths."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=dice) * 0.5)


def note(name: str, codes: torch.Tensor, out: torch.Tensor) -> None:
    found[f"{name}.codes"], found[f"{name}.out"] = codes.detach().float().clone(), out.detach().float().clone()


def saelens(name: str) -> None:
    sae = SAE.load_from_disk(HERE / name, dtype="float32")
    note(name, sae.encode(found["rows"]), sae(found["rows"]))


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def main() -> None:
    for folder in HERE.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)

    sae = TopKSAE(TopKSAEConfig(d_in=D, d_sae=M, k=K, rescale_acts_by_decoder_norm=True))
    shake(sae)
    sae.save_model(HERE / "saelens-rescale")
    saelens("saelens-rescale")

    settings = {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False}
    trained = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=M, k=K, **settings))
    shake(trained)
    trained.save_inference_model(HERE / "saelens-layer-norm")
    saelens("saelens-layer-norm")

    sae = TopKSAE(TopKSAEConfig(d_in=D, d_sae=M, k=K, normalize_activations="constant_norm_rescale"))
    shake(sae)
    sae.W_dec.data = 0.1 * unit(sae.W_dec.data)
    sae.to(dtype=torch.bfloat16).save_model(HERE / "saelens-constant-norm-bfloat16")
    saelens("saelens-constant-norm-bfloat16")

    for name, normalize in (("sparsify/layers.0", True), ("sparsify/layers.1", False)):
        coder = SparseCoder(D, SparseCoderConfig(num_latents=M, k=K, normalize_decoder=normalize))
        shake(coder)
        if normalize:
            coder.set_decoder_norm_to_unit_norm()
        coder.half().save_to_disk(HERE / name)
        coder = SparseCoder.load_from_disk(HERE / name).float()
        acts, indices, _ = coder.encode(found["rows"])
        codes = torch.zeros(N, M).scatter(1, indices, acts)
        note(name, codes, torch.nn.functional.embedding_bag(indices, coder.W_dec, per_sample_weights=acts, mode="sum"))
        found[f"{name}.out"] += coder.b_dec.detach()

    trainer = TopKTrainer(10, D, M, K, layer=0, lm_name="none", warmup_steps=1, seed=0, device="cpu")
    shake(trainer.ae)
    with torch.no_grad():
        trainer.ae.decoder.weight.copy_(unit(trainer.ae.decoder.weight.T).T)
    folder = HERE / "dictionary_learning"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"trainer": trainer.config}, indent=4))
    torch.save(trainer.ae.state_dict(), folder / "ae.pt")  # as its trainSAE does
    subprocess.run([sys.executable, "-c", f"import torch; {CONVERT.partition(': ')[2]}"], cwd=folder, check=True)
    (folder / "ae.pt").unlink()
    note("dictionary_learning", trainer.ae.encode(found["rows"]), trainer.ae(found["rows"]))

    save_file({name: t.contiguous() for name, t in found.items()}, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
