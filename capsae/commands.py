"""What each command of the command line does: the parsed options in, the exit status out.

Modules load where they are used, so that the help waits for none of them.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tomllib
from pathlib import Path

from .files import replacing

MIN_VAL = 40  # with fewer rows the 95 % quantile is their largest or second largest


def profiles(options) -> int:
    from .profiles import available, load_profile

    name = options.name or options.profile
    if name or options.set:
        profile = load_profile(name or "imagenet20", _overrides(options.set))
        sys.stdout.writelines(f"{line}\n" for line in _dotted(profile.to_dict()))
        return 0
    for name in available():
        profile = load_profile(name)
        data = f"{profile.n_classes} classes, {len(profile.ood)} OOD sets, {profile.backbone.model}"
        sae = f"D = {profile.sae.latents}, k = {profile.sae.k}, p = {profile.caps.core_fraction}"
        sys.stdout.write(
            f"{name}\n  {profile.title}\n  {data}; {sae}\n  needs {profile.needs}{_pack_size(profile)}\n\n"
        )
    sys.stdout.write("capsae profiles NAME prints all keys of one.\n")
    return 0


def extract(options) -> int:
    from . import distributed

    distributed.start()  # under torchrun, the ranks share the images
    if options.dtype:
        options.set.append(f"backbone.dtype={options.dtype}")
    run = _run(options)
    if options.batch_size is not None:
        if options.batch_size < 1:
            raise ValueError(f"--batch-size {options.batch_size}: 1 or more images would do")
        run.inputs.extraction["batch_size"] = options.batch_size
    profile, first = run.profile, distributed.rank() == 0
    if profile.pack:
        with distributed.alone():  # a pack is small
            return _extract_pack(run, options) if first else 0
    for name in profile.sets:
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
    from .packs import add_pixels, make_pack
    from .scoring import load_weights

    profile = run.profile
    names = [name for name in profile.sets if not (name == "val" and run.inputs.holdout)]
    profile.check_files(names)
    run.inputs.source("train")
    backbone = None if options.pixels else load_weights(run)
    out = Path(options.out or Path("packs") / profile.name)
    sources = {name: run.inputs.source(name) for name in names}
    if options.pixels:
        add_pixels(profile.pack, sources, out)
        sys.stdout.write(f"{out}: {', '.join(names)}: features as in {profile.pack!r}, pixel statistics new\n")
        return 0
    notes = f"made by `capsae extract {profile.name}`"
    settings = {"device": options.device, "progress": not options.quiet} | run.inputs.extraction
    make_pack(profile.name, sources, backbone, out, notes=notes, **settings)
    sys.stdout.write(f"{out}: {', '.join(names)}\nuse it with --set pack={out}\n")
    return 0


def train(options) -> int:
    import json

    from . import distributed

    distributed.start()  # under torchrun, all ranks train one SAE
    run, out = _run(options), Path(options.out)
    best = run.history.attrs["best_epoch"]
    at_best = run.history.set_index("epoch").loc[best]
    head, caps, provenance = run.head, run.caps, run.provenance()
    if distributed.rank() > 0:
        return 0  # the first one writes
    out.mkdir(parents=True, exist_ok=True)
    run.sae.save(out)
    head.save(out / "head.safetensors")
    with replacing(out / "caps.safetensors") as path:
        caps.save(path)
    run.history.to_csv(out / "history.csv", index=False)
    (out / "provenance.json").write_text(json.dumps(provenance, indent=1, default=str) + "\n", encoding="utf-8")
    figures = f"FVU {at_best['fvu']:.4f}, held out {at_best['held_out_fvu']:.4f}, dead {at_best['dead_fraction']:.1%}"
    sys.stdout.write(f"{out}: epoch {best} of {len(run.history)} kept; {figures}\n")
    sys.stdout.write(
        f"In Python: capsae.sae.load({str(out)!r}). `capsae score`, `explain` and `compare` take it from the store: "
        "give them the same --profile and --set.\n"
    )
    return 0


def score(options) -> int:
    from .scoring import DEFAULT_METHODS, find_images, score_images

    images = find_images(options.images)
    _check_out(options.out)
    methods = tuple(map(_method, options.method)) if options.method else DEFAULT_METHODS
    logging.getLogger("capsae.features").setLevel(logging.ERROR)  # bad images are named below
    run = _run(options)
    table = score_images(run, images, options.checkpoint, methods)
    for row in table[table["reason"] != ""].itertuples():
        sys.stderr.write(f"capsae: skipped {row.path}: {row.reason}\n")
    for warning in _doubts(table, methods, len(run.features("val"))):
        sys.stderr.write(f"capsae: warning: {warning}\n")
    table.to_csv(options.out or sys.stdout, index=False)
    flagged, scored = int(table["flag"].sum()), int(table["flag"].notna().sum())
    sys.stderr.write(f"{flagged} of {scored} images flagged as out of distribution ({methods[0]} over its threshold)\n")
    return 0 if scored else 2


def _doubts(table, methods: tuple[str, ...], n_val: int) -> list[str]:
    """What makes a flag worth little: few rows behind the threshold, or scores that all tie with it."""
    found = []
    if n_val < MIN_VAL:
        found.append(f"the threshold rests on {n_val} ID validation rows: give it {MIN_VAL} or more")
    for name in methods:
        scores = table[name].dropna()
        if len(scores) and (scores == table.loc[scores.index, f"{name}_threshold"]).mean() > 0.5:
            found.append(
                f"most scores of {name} equal its threshold, so it flags nothing: more images or fewer latents may help"
            )
    return found


def explain(options) -> int:
    from .explain import describe, explain, plain_name
    from .scoring import class_names, find_images, observe

    if (options.image is None) == (options.from_set is None):
        raise ValueError("give one image file, or --from-set SET --row N")
    _check_out(options.out)
    run, row, method = _run(options), options.row, _method(options.method)
    if options.from_set:
        run.profile.source(options.from_set)
        observations, what = run.observations(options.from_set), f"{options.from_set}, row {row}"
    else:
        images = find_images([options.image])[:1]
        observations, _, bad = observe(run, images, options.checkpoint)
        row, what = 0, str(images[0])
        if observations is None:
            raise ValueError(f"{what}: {bad[0]['why']}")
    table = explain(run, observations, row, method)
    score = float(run.detectors([method])[method].score(observations.take([row]))[0])
    threshold = run.threshold(method)
    verdict = "out of distribution" if score > threshold else "in distribution"
    predicted = plain_name(class_names(run)[observations.predicted[row]])
    title = f"{what}: predicted {predicted}; {method} {score:.4f}, threshold {threshold:.4f}: {verdict}"
    sys.stdout.write(describe(table, score, title, options.top) + "\n")
    if options.out:
        table.to_csv(options.out, index=False)
    return 0


def compare(options) -> int:
    from .analyses import meaning
    from .analyses.compare_report import compare_sides, report, side

    if not 0 < options.fdr < 1:
        raise ValueError(f"--fdr {options.fdr}: a share between 0 and 1 would do, such as 0.05")
    if options.a == options.b:
        raise ValueError(f"A and B are both {options.a!r}: two different sets or folders would do")
    _check_out(options.out)
    run = _run(options)
    a, b = (side(run, given, options.checkpoint, which) for which, given in (("A", options.a), ("B", options.b)))
    for each in (*a.bad, *b.bad):
        sys.stderr.write(f"capsae: skipped {each['id']}: {each['why']}\n")
    table = compare_sides(a, b, meaning.of_run(run), options.fdr)
    sys.stdout.write(report(table, a, b, options.fdr, options.top) + "\n")
    if options.out:
        table.to_csv(options.out, index=False)
        sys.stderr.write(f"capsae: wrote {options.out}\n")
    return 0


def evaluate(options) -> int:
    from .arrays import evaluate_arrays, load_arrays
    from .arrays_report import report

    if options.sae and options.no_sae:
        raise ValueError("--sae and --no-sae: give one of the two")
    if options.n_boot < 0:
        raise ValueError(f"--n-boot {options.n_boot}: 0 (no intervals) or more would do")
    _check_out(options.out)
    settings = _grouped(_overrides(options.set))
    found = evaluate_arrays(
        load_arrays(options.arrays),
        [_method(name) for name in options.method] if options.method else None,
        sae=False if options.no_sae else options.sae,
        sae_settings=settings["sae"],
        options=settings["detectors"],
        preset=options.preset,
        against=_method(options.against) if options.against else None,
        n_boot=options.n_boot,
        seed=options.seed,
        device=options.device,
        progress=not options.quiet,
    )
    sys.stdout.write(report(found) + "\n")
    for path in found.save(options.out) if options.out else ():
        sys.stderr.write(f"capsae: wrote {path}\n")
    return 0


def detectors(options) -> int:
    from . import detectors

    for name in detectors.available():
        info = detectors.info(name)
        defaults = ", ".join(f"{key}={value!r}" for key, value in info["defaults"].items()) or "none"
        sys.stdout.write(f"{name}  ({info['title']}, {info['group']}; {info['source']})\n")
        openood = info["presets"].get("openood", info["defaults"])
        others = ", ".join(f"{key}={value!r}" for key, value in openood.items() if value != info["defaults"][key])
        sys.stdout.write(f"  {info['formula']}\n  options: {defaults}{others and f' (OpenOOD: {others})'}\n\n")
    return 0


def zoo(options) -> int:
    from .plan import root
    from .zoo import members, tables
    from .zoo.fitting import RATES, SEEDS
    from .zoo.runner import PROFILES, run_backbones, run_zoo

    if options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs}: 1 or more processes would do")
    if min(options.seeds, default=0) < 0:
        raise ValueError(f"--seeds {min(options.seeds)}: 0 or more would do")
    names = [name for text in options.members for name in text.split(",")] or members()
    seeds = tuple(options.seeds) or SEEDS
    whole = tables.is_whole(names, seeds, RATES)
    folder = Path(options.out) if options.out else root() / (tables.FOLDER if whole else "build/zoo")
    for profile in options.profile or PROFILES:
        found = run_zoo(profile, names, seeds, options.jobs)
        path = tables.save(*found, folder)
        sys.stdout.write(f"{path}\n")
    if whole and not options.profile:
        path = folder / "backbones.csv"
        run_backbones().to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
        sys.stdout.write(f"{path}\n")
    return 0


def reproduce(options) -> int:
    from . import publish
    from .plan import pages

    known = pages()
    for name in options.profiles:
        if not any(page.profile == name for page in known.values()):
            have = ", ".join(dict.fromkeys(page.profile for page in known.values()))
            raise ValueError(f"profile {name!r} has no pages in the book; those of {have} can be reproduced")
    targets = [str(publish.path_of(name)) for name, page in known.items() if page.profile in options.profiles]
    return publish.reproduce(jobs=options.jobs, dry_run=options.dry_run, targets=targets, everything=options.all)


# --- helpers


def _run(options):
    _stay_offline_if_alone()
    from .pipeline import Run

    name = getattr(options, "name", None)
    if name and options.profile and name != options.profile:
        raise ValueError(f"two profiles: {name!r} and --profile {options.profile!r}; give one")
    overrides = _overrides(options.set)
    return Run(name or options.profile or "imagenet20", overrides, device=options.device, progress=not options.quiet)


def _method(name: str) -> str:
    from .detectors import OURS

    return OURS if name == "ours" else name


def _overrides(texts: list[str]) -> dict:
    overrides = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {text!r}: write KEY=VALUE, e.g. --set sae.k=64 (a set of images is --from-set)")
        key = key.strip().replace('"', "")  # TOML's quotes around a set's name
        try:
            overrides[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            overrides[key] = value.strip()  # a bare word: --set pack=none
    return overrides


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


def _pack_size(profile) -> str:
    if not profile.pack:
        return ""
    from .packs import pack_info

    try:
        info = pack_info(profile.pack)
    except ValueError:
        return " (but its pack is missing)"
    images = sum(each["n"] for each in info["sets"].values())
    return f" ({images} images, {sum(each['bytes'] for each in info['sets'].values()) / 1e6:.1f} MB)"


def _check_out(out: str | None) -> None:
    if out and not Path(out).absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out!r}: no folder {str(Path(out).absolute().parent)!r}")


def _stay_offline_if_alone() -> None:
    """Spare a machine without network the hub's minute of retries; must come before huggingface_hub is imported."""
    import socket

    if any(
        os.environ.get(name) for name in ("HF_ENDPOINT", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HF_HUB_OFFLINE")
    ):
        return
    try:
        socket.getaddrinfo("huggingface.co", 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
