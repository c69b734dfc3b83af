"""What each command of the command line does: the parsed options in, the exit status out.

Modules load where they are used, so that the help waits for none of them.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

from .files import Output, check_folder, csv_text, replacing

TRAINED = (
    *("cfg.json", "sae.safetensors", "head.safetensors", "caps.safetensors", "history.csv", "provenance.json"),
    "scorer.json",
)
OVERFITTED = 3  # a held-out FVU so many times that of the training rows is told


def profiles(options) -> int:
    from .profiles import available, load_profile, overrides_of

    name = options.name or options.profile
    if name or options.set:
        profile = load_profile(name or "imagenet20", overrides_of(options.set))
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


def init(options) -> int:
    from .profiles import load_profile
    from .starting import look

    path = Path(options.out or Path(options.folder) / "capsae.toml")
    text, lists = look(options.folder, options.model, options.checkpoint)
    for name in (path, *(Path(options.folder) / name for name in lists)):
        if name.exists():
            raise FileExistsError(f"{name} is there; remove it, or name another by --out")
    if lists and options.out:
        raise ValueError(f"--out: without a folder 'test', lists are written beside the profile, into {options.folder}")
    for name, content in lists.items():
        Output(Path(options.folder) / name).write(content)
    Output(path).write(text)
    profile = load_profile(path)
    sys.stdout.write(
        f"{text}\n{path}: {profile.n_classes} classes; edit it as you like, then\n"
        f"  capsae train --profile {path} --out my-sae\n  capsae score --sae my-sae IMAGES --out scores.csv\n"
    )
    return 0


def extract(options) -> int:
    from . import distributed

    distributed.start()  # under torchrun, the ranks share the images
    run = _run(options)
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
    from .packs import add_pixels, make_pack, pack_info
    from .scoring import load_weights

    profile = run.profile
    names = [name for name in profile.sets if not (name == "val" and run.inputs.holdout)]
    files = (f"{name.replace('/', '__')}.safetensors" for name in names)
    out = check_folder(options.out or Path("packs") / profile.name, ("pack.json", *files), "pack.json", "sets")
    profile.check_files(names)
    run.inputs.source("train")
    if options.train_backbone:
        from .backbone import load_backbone
        from .tinyvit import save_with_provenance

        vit, source = run.inputs.train_backbone()
        weights = save_with_provenance(vit, out, profile.seed, source)
        backbone = load_backbone(run.inputs.backbone_settings(weights))
    else:
        backbone = None if options.pixels else load_weights(run)
    sources = {name: run.inputs.source(name) for name in names}
    if options.pixels:
        add_pixels(profile.pack, sources, out)
        sys.stdout.write(f"{out}: {', '.join(names)}: features as in {profile.pack!r}, pixel statistics new\n")
        return 0
    notes = f"made by `capsae extract {profile.name}`"
    settings = {"device": options.device, "progress": not options.quiet}
    settings["stored"] = pack_info(profile.pack).get("dtype", {}).get("stored", "float16")
    make_pack(profile.name, sources, backbone, out, notes=notes, **settings)
    sys.stdout.write(f"{out}: {', '.join(names)}\nuse it with --set pack={out}\n")
    return 0


def train(options) -> int:
    import json
    import tempfile

    from . import distributed
    from .scoring import save_scorer

    distributed.start()  # under torchrun, all ranks train one SAE
    out = check_folder(options.out, TRAINED, "provenance.json", "digests")
    run = _run(options)
    best = run.history.attrs["best_epoch"]
    at_best = run.history.set_index("epoch").loc[best]
    head, caps, provenance = run.head, run.caps, run.provenance()
    run.features("train"), run.features("val")  # by all ranks together, for the thresholds
    if distributed.rank() > 0:
        return 0  # the first one writes
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=out) as new:  # whole before the first old file goes
        new = Path(new)
        run.sae.save(new)
        head.save(new / "head.safetensors")
        caps.save(new / "caps.safetensors")
        save_scorer(run, new)
        (new / "history.csv").write_text(csv_text(run.history), encoding="utf-8")
        (new / "provenance.json").write_text(json.dumps(provenance, indent=1, default=str) + "\n", encoding="utf-8")
        for file in sorted(new.iterdir()):
            with replacing(out / file.name) as path:
                os.rename(file, path)
    fvu, held_out = at_best["fvu"], at_best["held_out_fvu"]
    figures = f"FVU {fvu:.4f}, held out {held_out:.4f}, dead {at_best['dead_fraction']:.1%}"
    sys.stdout.write(f"{out}: epoch {best} of {len(run.history)} kept; {figures}\n")
    if held_out > OVERFITTED * fvu + 0.01:
        sys.stderr.write(
            f"capsae: warning: the SAE is overfitted: FVU {held_out:.3f} on held-out rows, {fvu:.3f} on its training "
            "rows; more training images, or fewer latents (--set sae.latents=), would do\n"
        )
    sys.stdout.write(
        f"`capsae score --sae {out} IMAGES` and capsae.Scorer.load({str(out)!r}) need this folder alone; "
        "`explain` and `compare` take the SAE from the store: give them the same --profile and --set.\n"
    )
    return 0


def score(options) -> int:
    import pandas as pd
    from tqdm.auto import tqdm

    from .scoring import DEFAULT_METHODS, Scorer, doubts, find_images, join_features
    from .store import Store

    methods = tuple(map(_method, options.method)) if options.method else None
    if options.sae and (options.set or options.profile):
        raise ValueError("--sae FOLDER stands for itself: leave --profile and --set out")
    out = Output(options.out, "path,predicted,")
    kept_features = Output(options.features, what="--features") if options.features else None
    if kept_features and kept_features.path == out.path:
        raise ValueError(f"--out and --features are both {options.out!r}: give two names")
    images = find_images(options.images)
    logging.getLogger("capsae.features").setLevel(logging.ERROR)  # bad images are named below
    if options.sae:
        scorer, store = Scorer.load(options.sae, methods, options.checkpoint, options.device), Store()
    else:
        run = _run(options)
        scorer, store = Scorer.of(run, methods or DEFAULT_METHODS, options.checkpoint), run.store
    tables, parts = [], [] if kept_features else None
    bar = tqdm(total=len(images), unit="images", disable=options.quiet or len(images) <= 64)
    with out.rows() as add, bar:
        for table in scorer.blocks(images, store.scratch("score", scorer.key), parts):
            add(table)
            tables.append(table)
            bar.update(len(table))
    if kept_features:
        join_features(parts, kept_features.path)
    table, first = pd.concat(tables, ignore_index=True), next(iter(scorer.thresholds))
    for row in table[table["reason"] != ""].itertuples():
        sys.stderr.write(f"capsae: skipped {row.path}: {row.reason}\n")
    for warning in doubts(table, list(scorer.thresholds), scorer.n_val):
        sys.stderr.write(f"capsae: warning: {warning}\n")
    flagged, scored = int(table["flag"].sum()), int(table["flag"].notna().sum())
    sys.stderr.write(f"{flagged} of {scored} images flagged as out of distribution ({first} over its threshold)\n")
    return 0 if scored else 2


def explain(options) -> int:
    from .explain import describe, explain, plain_name
    from .scoring import class_names, find_images, observe

    if (options.image is None) == (options.from_set is None):
        raise ValueError("give one image file, or --from-set SET --row N")
    out = Output(options.out, "latent,profile,")
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
        out.table(table)
    return 0


def compare(options) -> int:
    from .analyses import meaning
    from .analyses.compare_report import compare_sides, report, side

    if not 0 < options.fdr < 1:
        raise ValueError(f"--fdr {options.fdr}: a share between 0 and 1 would do, such as 0.05")
    if options.a == options.b:
        raise ValueError(f"A and B are both {options.a!r}: two different sets or folders would do")
    out = Output(options.out, "latent,name,")
    run = _run(options)
    a, b = (side(run, given, options.checkpoint, which) for which, given in (("A", options.a), ("B", options.b)))
    for each in (*a.bad, *b.bad):
        sys.stderr.write(f"capsae: skipped {each['id']}: {each['why']}\n")
    table = compare_sides(a, b, meaning.of_run(run), options.fdr)
    sys.stdout.write(report(table, a, b, options.fdr, options.top) + "\n")
    if options.out:
        out.table(table)
        sys.stderr.write(f"capsae: wrote {options.out}\n")
    return 0


def evaluate(options) -> int:
    from .arrays import evaluate_arrays, load_arrays, outputs
    from .arrays_report import report
    from .profiles import overrides_of

    if options.sae and options.no_sae:
        raise ValueError("--sae and --no-sae: give one of the two")
    if options.out:
        outputs(options.out)
    settings = _grouped(overrides_of(options.set))
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


def store(options) -> int:
    from .kept import used
    from .store import Store

    kept = Store()
    entries = list(kept.entries())
    flags = used(kept, entries)
    if options.action == "list":
        sys.stdout.write(f"{'stage':14}{'key':22}{'experiment':18}{'MB':>9}{'days':>7}  used\n")
    for entry, flag in zip(entries, flags, strict=True):
        if options.action == "clean" and flag is not False:
            continue
        name = entry.provenance.get("profile", "?")
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

    names = [name for text in options.members for name in text.split(",")] or members()
    seeds = tuple(options.seeds) or SEEDS
    whole = tables.is_whole(names, seeds, RATES)
    if options.out:
        check_folder(options.out, (), "", "")
    folder = Path(options.out) if options.out else root() / (tables.FOLDER if whole else "build/zoo")
    for profile in options.profile or PROFILES:
        found = run_zoo(profile, names, seeds, options.jobs)
        path = tables.save(*found, folder)
        sys.stdout.write(f"{path}\n")
    if whole and not options.profile:
        path = folder / "backbones.csv"
        with replacing(path) as temporary:
            run_backbones().to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
        sys.stdout.write(f"{path}\n")
    return 0


def reproduce(options) -> int:
    from . import build
    from .plan import MAIN, pages

    known = pages()
    for name in options.profiles:
        if not any(page.profile == name for page in known.values()):
            have = ", ".join(dict.fromkeys(page.profile for page in known.values()))
            raise ValueError(f"profile {name!r} has no pages in the book; those of {have} can be reproduced")
    chosen = {name: page for name, page in known.items() if not options.main or page.notebook in MAIN}
    targets = [name for name, page in chosen.items() if not options.profiles or page.profile in options.profiles]
    targets = targets if len(targets) < len(known) else []
    return build.reproduce(jobs=options.jobs, dry_run=options.dry_run, targets=targets, everything=options.all)


def verify(options) -> int:
    from .plan import root
    from .verify import record, verify

    reports, lines = verify(root(), options.against, shown=sys.maxsize if options.all else 10)
    sys.stdout.writelines(f"{line}\n" for line in lines)
    if options.record:
        sys.stdout.write(f"{record(root(), reports, options.against)}\n")
    return int(any(report.differences for report in reports))


# --- helpers


def _run(options):
    _stay_offline_if_alone()
    from .pipeline import Run
    from .profiles import overrides_of

    name = getattr(options, "name", None)
    if name and options.profile and name != options.profile:
        raise ValueError(f"two profiles: {name!r} and --profile {options.profile!r}; give one")
    seeds = {} if options.seed is None else {"seed": options.seed, "sae.seed": options.seed}
    overrides = seeds | overrides_of(options.set)
    return Run(name or options.profile or "imagenet20", overrides, device=options.device, progress=not options.quiet)


def _method(name: str) -> str:
    from .detectors import OURS

    return OURS if name == "ours" else name


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
