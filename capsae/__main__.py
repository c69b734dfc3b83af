"""The command line: ``capsae`` or ``python -m capsae``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tomllib
from pathlib import Path

GUIDE = """\
Out-of-distribution detection from class activation profiles of sparse autoencoders.

In this order, each on what the one before it made (nothing is made twice):

  capsae profiles                      what can be run: data, backbone, sizes, what each needs
  capsae profiles imagenet20           one of them in full; every key it prints can follow --set
  capsae extract digits                images -> features (the embedded profiles have theirs already)
  capsae train --profile imagenet20 --out my-sae
                                       features -> sparse autoencoder and class activation profiles
  capsae score --profile imagenet20 photo.jpg holiday/ --out scores.csv
                                       your own images: class, scores, flag (needs the backbone's weights)
  capsae explain --profile imagenet20 photo.jpg
  capsae explain --from-set far/textures --row 3
                                       why one image got its score: latents too much or missing, their shares
  capsae detectors                     every score: formula, options, source
  capsae reproduce                     all of the book: execute what is not fresh, then build it

Change any setting:  --set sae.k=64 --set caps.core_fraction=0.2
Your own data:       a .toml file in place of a profile's name; start from `capsae profiles imagenet20`.
Results are kept in $CAPSAE_HOME, or .capsae of the project around the current folder, or ~/.cache/capsae.
"""


MIN_VAL = 40  # with fewer rows the 95 % quantile is their largest or second largest


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 2 wrong input, 130 interrupted)."""
    options = _parser().parse_args(arguments)
    _log(options.verbose)
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        sys.stderr.write("\ncapsae: interrupted; finished shards and stages are kept\n")
        return 130
    except BrokenPipeError:  # `capsae ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        if options.debug:
            raise
        sys.stderr.write(f"capsae: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("capsae", description=GUIDE, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--verbose", "-v", action="store_true", help="say more on stderr")
    profiled = argparse.ArgumentParser(add_help=False, parents=[common])
    profiled.add_argument("--profile", "-p", default=None, help="name or .toml file (default: imagenet20)")
    profiled.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; may repeat")
    profiled.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    profiled.add_argument("--quiet", "-q", action="store_true", help="no progress bars")
    weights = argparse.ArgumentParser(add_help=False)
    weights.add_argument("--checkpoint", metavar="FILE", help="the backbone's weights (default: as the profile says)")

    def add(name: str, run, help: str, parents=(profiled,)) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help, parents=list(parents), formatter_class=raw)
        command.set_defaults(run=run)
        return command

    command = add("profiles", _profiles, "list the profiles, or print one in full")
    command.add_argument("name", nargs="?", help="a profile's name or .toml file")

    command = add("extract", _extract, "extract the features of all sets; re-makes the pack of a profile that has one")
    command.add_argument("name", nargs="?", help="a profile's name or .toml file (as --profile)")
    command.add_argument("--out", metavar="FOLDER", help="of a re-made pack (default: packs/<name> here)")
    command.add_argument("--pixels", action="store_true", help="keep a pack's features, measure its images anew")

    command = add("train", _train, "train the SAE, make the class activation profiles, write both to a folder")
    command.add_argument("name", nargs="?", help="a profile's name or .toml file (as --profile)")
    command.add_argument(
        "--out", metavar="FOLDER", required=True, help="new or existing folder; its files are replaced"
    )

    command = add("score", _score, "score your own images", parents=(profiled, weights))
    command.add_argument("images", nargs="+", metavar="IMAGES", help="image files or folders of them")
    command.add_argument("--out", metavar="FILE.csv", help="where to write (default: standard output)")
    command.add_argument(
        "--method",
        action="append",
        help="a detector, or 'ours'; may repeat, flag follows the first (default: epd, ours)",
    )

    command = add("explain", _explain, "take the score of one image apart", parents=(profiled, weights))
    command.add_argument("image", nargs="?", help="an image file")
    command.add_argument(
        "--from-set", metavar="SET", help="a set of the profile, e.g. far/textures, in place of an image"
    )
    command.add_argument("--row", type=int, default=0, help="row of that set (default: 0)")
    command.add_argument("--method", default="epd", help="epd or ours (default: epd)")
    command.add_argument("--top", type=int, default=10, help="latents to show (default: 10)")
    command.add_argument("--out", metavar="FILE.csv", help="also write the whole table")

    command = add("detectors", _list_detectors, "list every score with formula, options and source", parents=(common,))

    command = add("reproduce", _reproduce, "execute what is not fresh and build the book", parents=(common,))
    command.add_argument("profiles", nargs="*", metavar="PROFILE", help="only the pages of these (default: all)")
    command.add_argument("--jobs", type=int, default=None, help="pages at a time (default: 2, or the number of cores)")
    command.add_argument("--dry-run", "-n", action="store_true", help="say what would be executed, and why")
    command.add_argument("--all", "-a", action="store_true", help="execute what is fresh, too")
    return parser


# --- commands


def _profiles(options) -> int:
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


def _extract(options) -> int:
    run = _run(options)
    profile = run.profile
    if not profile.pack:
        for name in profile.sets:
            features = run.inputs.features(name)
            bad = len(features.meta.get("bad_images", []))
            sys.stdout.write(
                f"{name}: {len(features)} x {features.cls.shape[1]}" + (f", {bad} bad images\n" if bad else "\n")
            )
        sys.stdout.write(f"kept in {run.store.root}\n")
        return 0

    from .packs import add_pixels, make_pack
    from .scoring import load_weights

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
    make_pack(profile.name, sources, backbone, out, notes=notes, device=options.device, progress=not options.quiet)
    sys.stdout.write(f"{out}: {', '.join(names)}\nuse it with --set pack={out}\n")
    return 0


def _train(options) -> int:
    import json

    run, out = _run(options), Path(options.out)
    best = run.history.attrs["best_epoch"]
    at_best = run.history.set_index("epoch").loc[best]
    out.mkdir(parents=True, exist_ok=True)
    run.sae.save(out)
    run.head.save(out / "head.safetensors")
    run.caps.save(out / "caps.safetensors")
    run.history.to_csv(out / "history.csv", index=False)
    (out / "provenance.json").write_text(json.dumps(run.provenance(), indent=1, default=str) + "\n", encoding="utf-8")
    figures = f"FVU {at_best['fvu']:.4f}, held out {at_best['held_out_fvu']:.4f}, dead {at_best['dead_fraction']:.1%}"
    sys.stdout.write(f"{out}: epoch {best} of {len(run.history)} kept; {figures}\n")
    return 0


def _score(options) -> int:
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


def _explain(options) -> int:
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


def _list_detectors(options) -> int:
    from . import detectors

    for name in detectors.available():
        info = detectors.info(name)
        defaults = ", ".join(f"{key}={value!r}" for key, value in info["defaults"].items()) or "none"
        sys.stdout.write(f"{name}  ({info['title']}, {info['group']}; {info['source']})\n")
        sys.stdout.write(f"  {info['formula']}\n  options: {defaults}\n\n")
    return 0


def _reproduce(options) -> int:
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
        try:
            overrides[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            overrides[key.strip()] = value.strip()  # a bare word: --set pack=none
    return overrides


def _dotted(values: dict, prefix: str = "") -> list[str]:
    """Every key as it can follow --set."""
    import json

    lines = []
    for key, value in values.items():
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


def _log(verbose: bool) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


if __name__ == "__main__":
    sys.exit(main())
