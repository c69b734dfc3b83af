"""What the commands do (those for own images: :mod:`.images`): the parsed options in, the exit status out.

Modules load where they are used, so that the help waits for none of them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ..files import Output, check_folder
from .run import method_of, run_of


def experiments(options) -> int:
    from ..pipeline.experiments import available, load_experiment, overrides_of

    name = options.name or options.experiment
    if name or options.set:
        experiment = load_experiment(name or "imagenet20", overrides_of(options.set))
        sys.stdout.writelines(f"{line}\n" for line in _dotted(experiment.to_dict()))
        return 0
    for name in available():
        experiment = load_experiment(name)
        data = f"{experiment.n_classes} classes, {len(experiment.ood)} OOD sets, {experiment.backbone.model}"
        sae = f"D = {experiment.sae.latents}, k = {experiment.sae.k}, p = {experiment.caps.core_fraction}"
        sys.stdout.write(
            f"{name}\n  {experiment.title}\n  {data}; {sae}\n  needs {experiment.needs}{_pack_size(experiment)}\n\n"
        )
    sys.stdout.write("capsae experiments NAME prints all keys of one.\n")
    return 0


def extract(options) -> int:
    from .. import distributed

    distributed.start()  # under torchrun, the ranks share the images
    if options.dtype:
        options.set.append(f"backbone.dtype={options.dtype}")
    run = run_of(options)
    if options.batch_size is not None:
        if options.batch_size < 1:
            raise ValueError(f"--batch-size {options.batch_size}: 1 or more images would do")
        run.inputs.extraction["batch_size"] = options.batch_size
    experiment, first = run.experiment, distributed.rank() == 0
    if experiment.pack:
        with distributed.alone():  # a pack is small
            return _extract_pack(run, options) if first else 0
    for name in experiment.sets:
        features = run.inputs.features(name)
        bad = len(features.meta.get("bad_images", []))
        if first:
            left_out = features.meta.get("left_out", 0)
            line = f"{name}: {len(features)} x {features.cls.shape[1]}" + (f", {bad} bad images" if bad else "")
            line += f", {left_out} files left out" if left_out else ""
            sys.stdout.write(line + "\n")
    if first:
        sys.stdout.write(f"kept in {run.store.root}\n")
    return 0


def _extract_pack(run, options) -> int:
    from ..pipeline.own_images import load_weights
    from ..pipeline.packs import add_pixels, make_pack, pack_info

    experiment = run.experiment
    names = [name for name in experiment.sets if not (name == "val" and run.inputs.holdout)]
    files = (f"{name.replace('/', '__')}.safetensors" for name in names)
    out = check_folder(options.out or Path("packs") / experiment.name, ("pack.json", *files), "pack.json", "sets")
    experiment.check_files(names)
    run.inputs.source("train")
    if options.train_backbone:
        from ..features.backbone import load_backbone
        from ..features.tinyvit import save_with_provenance

        vit, source = run.inputs.train_backbone()
        weights = save_with_provenance(vit, out, experiment.seed, source)
        backbone = load_backbone(run.inputs.backbone_settings(weights))
    else:
        backbone = None if options.pixels else load_weights(run)
    sources = {name: run.inputs.source(name) for name in names}
    if options.pixels:
        add_pixels(experiment.pack, sources, out)
        sys.stdout.write(f"{out}: {', '.join(names)}: features as in {experiment.pack!r}, pixel statistics new\n")
        return 0
    notes = f"made by `capsae extract {experiment.name}`"
    settings = {"device": options.device, "progress": not options.quiet} | run.inputs.extraction
    info = pack_info(experiment.pack)
    settings |= {"stored": info.get("dtype", {}).get("stored", "float16"), "images_of": info.get("images")}
    make_pack(experiment.name, sources, backbone, out, notes=notes, **settings)
    sys.stdout.write(f"{out}: {', '.join(names)}\nuse it with --set pack={out}\n")
    return 0


def compare(options) -> int:
    from .report_compare import compare_sides, report, side

    if not 0 < options.fdr < 1:
        raise ValueError(f"--fdr {options.fdr}: a share between 0 and 1 would do, such as 0.05")
    if options.a == options.b:
        raise ValueError(f"A and B are both {options.a!r}: two different sets or folders would do")
    out = Output(options.out, "latent,name,")
    run = run_of(options)
    a, b = (side(run, given, options.checkpoint, which) for which, given in (("A", options.a), ("B", options.b)))
    for each in (*a.bad, *b.bad):
        sys.stderr.write(f"capsae: skipped {each['id']}: {each['why']}\n")
    from ..pipeline.latents import of_run

    table = compare_sides(a, b, of_run(run), options.fdr)
    sys.stdout.write(report(table, a, b, options.fdr, options.top) + "\n")
    if options.out:
        out.table(table)
        sys.stderr.write(f"capsae: wrote {options.out}\n")
    return 0


def evaluate(options) -> int:
    from ..pipeline.arrays import evaluate_arrays, outputs
    from ..pipeline.arrays_io import load_arrays
    from ..pipeline.experiments import overrides_of
    from .report_arrays import report

    if options.sae and options.no_sae:
        raise ValueError("--sae and --no-sae: give one of the two")
    if options.out:
        outputs(options.out)
    settings = _grouped(overrides_of(options.set))
    found = evaluate_arrays(
        load_arrays(options.arrays),
        [method_of(name) for name in options.method] if options.method else None,
        sae=False if options.no_sae else options.sae,
        sae_settings=settings["sae"],
        options=settings["detectors"],
        preset=options.preset,
        against=method_of(options.against) if options.against else None,
        n_boot=options.n_boot,
        seed=options.seed,
        device=options.device,
        progress=not options.quiet,
    )
    sys.stdout.write(report(found) + "\n")
    for path in found.save(options.out) if options.out else ():
        sys.stderr.write(f"capsae: wrote {path}\n")
    return 0


def store(options) -> int:
    from ..pipeline.kept import used
    from ..pipeline.store import Store

    kept = Store()
    entries = list(kept.entries())
    flags = used(kept, entries)
    if options.action == "list":
        sys.stdout.write(f"{'stage':14}{'key':22}{'experiment':18}{'MB':>9}{'days':>7}  used\n")
    for entry, flag in zip(entries, flags, strict=True):
        if options.action == "clean" and flag is not False:
            continue
        name = entry.provenance.get("experiment", "?")
        sys.stdout.write(
            f"{entry.stage:14}{entry.key:22}{name:18}{entry.size / 1e6:9.1f}{entry.age / 86400:7.1f}"
            f"  {({True: 'yes', False: 'no', None: '?'})[flag]}\n"
        )
        if options.action == "clean" and not options.dry_run:
            kept.remove(entry)
    chosen = [e for e, flag in zip(entries, flags, strict=True) if options.action == "list" or flag is False]
    what = {"list": "in", "clean": "would be removed from" if options.dry_run else "removed from"}[options.action]
    size = sum(entry.size for entry in chosen) / 1e6
    sys.stdout.write(f"{len(chosen)} artefacts, {size:.1f} MB {what} {kept.root}\n")
    return 0


def detectors(options) -> int:
    from .. import detectors

    for name in detectors.available():
        info = detectors.info(name)
        defaults = ", ".join(f"{key}={value!r}" for key, value in info["defaults"].items()) or "none"
        sys.stdout.write(f"{name}  ({info['title']}, {info['group']}; {info['source']})\n")
        openood = info["presets"].get("openood", info["defaults"])
        others = ", ".join(f"{key}={value!r}" for key, value in openood.items() if value != info["defaults"][key])
        sys.stdout.write(f"  {info['formula']}\n  options: {defaults}{others and f' (OpenOOD: {others})'}\n\n")
    return 0


# --- helpers


def _grouped(overrides: dict) -> dict[str, dict]:
    """``sae.KEY`` and ``detectors.NAME.KEY`` as nested dicts; anything else is refused."""
    groups: dict[str, dict] = {"sae": {}, "detectors": {}}
    for key, value in overrides.items():
        group, _, rest = key.partition(".")
        name, _, option = rest.rpartition(".")
        if group not in groups or not rest or (group == "detectors") != bool(name):
            raise ValueError(f"--set {key}={value!r}: sae.KEY and detectors.NAME.KEY can be set here")
        (groups["sae"] if group == "sae" else groups["detectors"].setdefault(name, {}))[option] = value
    return groups


def _dotted(values: dict, prefix: str = "") -> list[str]:
    """Every key as it can follow --set; together a TOML file."""
    import json

    lines = []
    for key, value in values.items():
        key = key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)
        if isinstance(value, dict):
            lines += _dotted(value, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key} = {json.dumps(value, ensure_ascii=False)}")
    return lines


def _pack_size(experiment) -> str:
    if not experiment.pack:
        return ""
    from ..pipeline.packs import pack_info

    try:
        info = pack_info(experiment.pack)
    except ValueError:
        return " (but its pack is missing)"
    images = sum(each["n"] for each in info["sets"].values())
    return f" ({images} images, {sum(each['bytes'] for each in info['sets'].values()) / 1e6:.1f} MB)"
