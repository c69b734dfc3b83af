"""Does decoding keep up? Images/s of the whole extraction against the bare forward pass, alternating in one run.

    python benchmarks/extraction.py                          # synthetic JPEGs of 500 x 375 pixels
    python benchmarks/extraction.py --images FOLDER          # a folder of images, or a parquet file
    python benchmarks/extraction.py --model vit_base_patch16_224 --count 20000 --batch 256

*Bare*: the network on batches that lie decoded, resized and as uint8 on its device already; features are fetched.
*Whole*: ``extract``, from encoded bytes in the page cache to shards on disk, fsync included. Both see the same
images, batches, dtype and threads. Each round measures one after the other; the ratio is the median over rounds of
whole / bare, and should be at least 0.9. Processor seconds are given beside the wall clock's, for a machine that is
busy with other things.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from capsae.data.open import open_source
from capsae.data.sources import ImageSource
from capsae.device import available_cores, pick_device, pick_dtype
from capsae.features.backbone import Backbone, load_backbone
from capsae.features.extract import extract

RESULTS = Path(__file__).parent / "results"


def synthetic_jpegs(folder: Path, count: int) -> dict:
    """Write JPEGs of about ImageNet's size and detail (110 kB on average there) and return the source's spec."""
    rng = np.random.default_rng(0)
    for i in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8))
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
        image = Image.blend(coarse, noise.filter(ImageFilter.GaussianBlur(1)), 0.8)
        image.save(folder / f"{i:05d}.jpg", quality=95)
    return {"kind": "folder", "path": str(folder)}


def read_all(source: ImageSource) -> int:
    """Read every image's bytes once, so that all of them lie in the page cache; their mean size."""
    sizes = []
    for row in source.rows:
        data = source.read(int(row))
        if isinstance(data, bytes):
            sizes.append(len(data))
        else:
            sizes.append(len(Path(data).read_bytes()))
    return round(statistics.mean(sizes))


def bare(backbone: Backbone, batches: list[torch.Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """Forward all batches; fetch each result while the next is computed, as the extractor does."""
    previous = None
    for batch in batches:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = backbone.forward(batch)
        if previous is not None:
            previous[0].float().cpu()
        previous = out
    previous[0].float().cpu()


def clocked(work, *args, **kwargs) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    work(*args, **kwargs)
    return time.perf_counter() - wall, time.process_time() - processor


def main(argv: list[str] | None = None) -> dict:
    """Run the benchmark and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of images or parquet file; default: synthetic JPEGs")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--machine", default=platform.node() or "machine", help="name for the file of results")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)

    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
    torch.manual_seed(0)
    backbone = load_backbone(args.model).to(device)
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        if args.images is None:
            (temporary / "jpegs").mkdir()
            spec = synthetic_jpegs(temporary / "jpegs", args.count)
        else:
            kind = (
                "folder" if Path(args.images).is_dir() and not list(Path(args.images).glob("*.parquet")) else "parquet"
            )
            spec = {"kind": kind, "path": args.images} | ({"label": ""} if kind == "parquet" else {})
        source = open_source(spec | {"limit": args.count})
        mean_bytes = read_all(source)
        first = source.image(0).size
        prepared = np.stack([backbone.prepare(source.image(i)) for i in range(len(source))])
        batches = [torch.from_numpy(prepared[i : i + args.batch]).to(device) for i in range(0, len(source), args.batch)]
        options = {"batch_size": args.batch, "device": args.device, "dtype": args.dtype, "workers": args.workers}
        rounds = []
        for number in range(-1, args.rounds):  # the first one warms up
            plain = clocked(bare, backbone, batches, device, dtype)
            whole = clocked(extract, source, backbone, temporary / f"out{number}", progress=False, **options)
            if number >= 0:
                rounds.append((*plain, *whole))

    n = len(source)
    result = {
        "benchmark": "extraction",
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": {
            "model": args.model,
            "images": "synthetic JPEG" if args.images is None else Path(args.images).name,
            "pixels": list(first),
            "mean_bytes": mean_bytes,
            "count": n,
            "batch": args.batch,
            "dtype": str(dtype).removeprefix("torch."),
            "workers": args.workers or available_cores(),
            "rounds": args.rounds,
        },
        "bare_images_per_second": round(statistics.median(n / r[0] for r in rounds), 1),
        "whole_images_per_second": round(statistics.median(n / r[2] for r in rounds), 1),
        "ratio": round(statistics.median(r[0] / r[2] for r in rounds), 4),
        "ratio_of_each_round": [round(r[0] / r[2], 4) for r in rounds],
        "ratio_of_processor_time": round(statistics.median(r[1] / r[3] for r in rounds), 4),
        "target": 0.9,
        "load_average": round(os.getloadavg()[0], 2),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.machine}-extraction.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result, indent=1) + f"\n{path}\n")
    return result


def describe_machine(device: torch.device) -> dict:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": cpu, "cores": available_cores(), "threads": torch.get_num_threads(), "gpu": gpu}


if __name__ == "__main__":
    main()
