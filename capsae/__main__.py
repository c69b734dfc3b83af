"""The command line: ``capsae`` or ``python -m capsae``."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from importlib.metadata import entry_points

from . import __version__
from .cli import commands, images

GUIDE = """\
Out-of-distribution detection from class activation profiles of sparse autoencoders.

In this order, each on what the one before it made (nothing is made twice):

  capsae experiments                   what can be run: data, backbone, sizes, what each needs
  capsae experiments imagenet20        one of them in full; every key it prints can follow --set
  capsae init FOLDER                   an experiment for your own images: ten lines of TOML
  capsae extract digits                images -> features (the embedded experiments have theirs already)
  capsae train --experiment imagenet20 --out my-sae
                                       features -> sparse autoencoder and class activation profiles
  capsae score --experiment imagenet20 photo.jpg holiday/ --out scores.csv
                                       your own images: class, scores, flag (needs the backbone's weights)
  capsae score --sae my-sae holiday/   the same from the folder of `train` alone
  capsae explain --experiment imagenet20 photo.jpg
  capsae explain --from-set far/textures --row 3
                                       why one image got its score: latents too much or missing, their shares
  capsae compare holiday/ archive/     which latents differ between two folders, or sets: test far/textures
  capsae evaluate features.safetensors --out table.csv
                                       features of your own, from any framework: every score, intervals and tests
  capsae store list                    what is kept of all this; `capsae store clean` removes what is out of date
  capsae detectors                     every score: formula, options, source
  capsae zoo                           every autoencoder and dictionary on the same features: tables in book/zoo
  capsae reproduce                     all of the book: execute what is not fresh, then build it
  capsae verify                        are the numbers made here those that are published?

Change any setting:  --set sae.k=64 --set caps.core_fraction=0.2
One more OOD set:    --set ood.far/mine=FOLDER    (beside embedded ones, too; needs the backbone's weights)
Your own data:       a .toml file in place of an experiment's name; `capsae init FOLDER` writes one.
Results are kept in $CAPSAE_HOME, or .capsae of the project around the current folder, or ~/.cache/capsae.
"""


# What a person's input or machine can cause; anything else is a fault of ours, and its message says so.
EXPECTED = (ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError)
REMEDY = {
    errno.ENOSPC: "the disk is full: free some of it, or set CAPSAE_HOME (results) or TMPDIR to another one",
    errno.EDQUOT: "your quota of this disk is used up: free some of it, or set CAPSAE_HOME to another one",
    errno.EACCES: "not allowed: correct its permissions, or name another place (results: CAPSAE_HOME)",
    errno.EROFS: "this disk cannot be written to: name another place (results: CAPSAE_HOME)",
    errno.EMFILE: "too many files are open: `ulimit -n 4096` before it, then again",
    errno.EISDIR: "a folder, where a file is needed",
    errno.ENOTDIR: "a file, where a folder is needed (results: CAPSAE_HOME)",
    errno.ENOENT: "not there, and cannot be made (results: CAPSAE_HOME)",
    errno.ENAMETOOLONG: "the name is too long for this disk",
}

AT_LEAST = {"jobs": 1, "top": 1, "row": 0, "seed": 0, "seeds": 0, "n_boot": 0}


class _Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP: the way out is that of Ctrl-C, so that temporary folders go."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 a difference or a bug, 2 wrong input, 130, 143 stopped."""
    _open_streams()
    options = _parser().parse_args(arguments)
    _log(options.verbose)
    try:
        with _stoppable():
            _check(options)
            status = options.run(options) or 0
            sys.stdout.flush()
            return status
    except KeyboardInterrupt as stop:
        _say("\ncapsae: stopped; what is finished is kept (shards, epochs, scored images): the same command goes on")
        return 143 if isinstance(stop, _Stopped) else 130
    except BrokenPipeError:  # `capsae ... | head`
        _mute()
        return 0
    except EXPECTED as error:
        if options.debug:
            raise
        _say(f"capsae: {_message(error)}")
        _mute()
        return 2
    except Exception as error:
        if options.debug:
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        _say(f"capsae: {type(error).__name__}: {first} (unexpected: --debug shows where; please report it)")
        return 1


def _message(error: Exception) -> str:
    """The message of an error; a bare one of the system gets its path and a remedy."""
    if isinstance(error, MemoryError):
        return f"not enough memory {str(error).strip()}; a smaller --batch-size, or fewer latents, would need less"
    if not isinstance(error, OSError) or error.errno is None or not error.strerror:
        return str(error)
    path = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return f"{path}{REMEDY.get(error.errno, error.strerror)} ({error.strerror}, errno {error.errno})"


def _open_streams() -> None:
    """Make closed streams (``>&-``) swallow what they get, and let no character be one that a stream cannot write."""
    for fd, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_RDWR), fd)  # or the next file opened is what C code prints to
            setattr(sys, name, open(os.devnull, "r" if fd == 0 else "w", encoding="utf-8"))  # noqa: SIM115
        elif fd and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")


def _mute() -> None:
    """What standard output still holds goes nowhere where it cannot be written, in place of a traceback at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _stoppable():
    """Let SIGTERM and SIGHUP unwind as Ctrl-C does, unless somebody (nohup) has them ignored."""

    def stop(number, frame):
        raise _Stopped

    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        signals = []
    before = {each: signal.getsignal(each) for each in signals}
    for each, handler in before.items():
        if handler is signal.SIG_DFL:
            signal.signal(each, stop)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _check(options) -> None:
    """Refuse numbers that mean nothing, and a device that this machine lacks, before any work."""
    for key, low in AT_LEAST.items():
        value = getattr(options, key, None)
        for each in value if isinstance(value, list) else [] if value is None else [value]:
            if each < low:
                raise ValueError(f"--{key.replace('_', '-')} {each}: {low} or more would do")
    device = getattr(options, "device", "auto")
    if device not in ("auto", "cpu"):
        import torch

        try:
            why = "it computes nothing" if torch.empty(1, device=device).device.type == "meta" else None
        except Exception as error:  # RuntimeError, AssertionError: as the build of torch has it
            why = (str(error).strip().splitlines() or [""])[0]
        if why:
            raise ValueError(f"--device {device} cannot be used here ({why}); auto or cpu would do")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("capsae", description=GUIDE, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"capsae {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--verbose", "-v", action="store_true", help="say more on stderr")
    of_experiment = argparse.ArgumentParser(add_help=False, parents=[common])
    of_experiment.add_argument("--experiment", "-p", default=None, help="name or .toml file (default: imagenet20)")
    of_experiment.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; may repeat"
    )
    of_experiment.add_argument("--seed", type=int, metavar="N", help="of splits, probe, intervals and SAE")
    of_experiment.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    of_experiment.add_argument("--quiet", "-q", action="store_true", help="no progress bars")
    weights = argparse.ArgumentParser(add_help=False)
    weights.add_argument(
        "--checkpoint", metavar="FILE", help="the backbone's weights (default: as the experiment says)"
    )

    def add(name: str, help: str, parents=(of_experiment,), run=None) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=help, description=help, parents=list(parents), formatter_class=raw)
        command.set_defaults(run=run or getattr(images, name, None) or getattr(commands, name))
        return command

    command = add("experiments", "list the experiments, or print one in full")
    command.add_argument("name", nargs="?", help="an experiment's name or .toml file")

    command = add(
        "init", "look at a folder of images and write an experiment for it: ten lines of TOML", parents=(common,)
    )
    command.add_argument("folder", metavar="FOLDER", help="train/<class>/, test/<class>/, far/<set>/; or class folders")
    command.add_argument("--model", metavar="NAME", help="timm's name (default: as the weights are called, or DeiT-Ti)")
    command.add_argument("--checkpoint", metavar="FILE", help="weights (default: the file in FOLDER, or timm's)")
    command.add_argument("--out", metavar="FILE.toml", help="default: FOLDER/capsae.toml")

    command = add("extract", "extract the features of all sets; re-makes the pack of an experiment that has one")
    command.add_argument("name", nargs="?", help="an experiment's name or .toml file (as --experiment)")
    command.add_argument("--out", metavar="FOLDER", help="of a re-made pack (default: packs/<name> here)")
    command.add_argument("--pixels", action="store_true", help="keep a pack's features, measure its images anew")
    command.add_argument("--train-backbone", action="store_true", help="digits: first train its ViT, from pixels")
    command.add_argument("--batch-size", type=int, metavar="N", help="images a forward pass (default: 128)")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of products; give later commands --set backbone.dtype=..."
    )

    command = add("train", "train the SAE, make the class activation profiles, write both to a folder")
    command.add_argument("name", nargs="?", help="an experiment's name or .toml file (as --experiment)")
    command.add_argument(
        "--out", metavar="FOLDER", required=True, help="new or existing folder; its files are replaced"
    )

    command = add("score", "score your own images", parents=(of_experiment, weights))
    command.add_argument("images", nargs="+", metavar="IMAGES", help="image files or folders of them")
    command.add_argument("--out", metavar="FILE.csv", help="where to write (default: standard output)")
    command.add_argument("--sae", metavar="FOLDER", help="of `capsae train --out`: no experiment and no training data")
    command.add_argument("--features", metavar="FILE", help="also keep the features (.safetensors)")
    command.add_argument(
        "--method",
        action="append",
        help="a detector, or 'ours'; may repeat, flag follows the first (default: epd, ours)",
    )

    command = add("explain", "take the score of one image apart", parents=(of_experiment, weights))
    command.add_argument("image", nargs="?", help="an image file")
    command.add_argument(
        "--from-set", metavar="SET", help="a set of the experiment, e.g. far/textures, in place of an image"
    )
    command.add_argument("--row", type=int, default=0, help="row of that set (default: 0)")
    command.add_argument("--method", default="epd", help="epd or ours (default: epd)")
    command.add_argument("--top", type=int, default=10, help="latents to show (default: 10)")
    command.add_argument("--out", metavar="FILE.csv", help="also write the whole table")

    command = add(
        "compare", "find the latents that differ between two sets of images", parents=(of_experiment, weights)
    )
    command.epilog = """for example:
  capsae compare --experiment imagenet20 holiday/ archive/ --out differences.csv
                                       two folders of images (needs the backbone's weights)
  capsae compare --experiment imagenet20 test far/textures
                                       two sets of the experiment (needs neither images nor weights)"""
    command.add_argument("a", metavar="A", help="a folder of images, or a set of the experiment, e.g. test")
    command.add_argument("b", metavar="B", help="another, e.g. far/textures")
    command.add_argument("--fdr", type=float, default=0.05, help="false discovery rate accepted (default: 0.05)")
    command.add_argument("--top", type=int, default=10, help="latents to show for each side (default: 10)")
    command.add_argument("--out", metavar="FILE.csv", help="also write the whole table, a row a latent")

    command = add(
        "evaluate",
        "compare all scores on features, logits and labels of your own, from any framework",
        parents=(common,),
    )
    kinds = ".safetensors, .npz, .csv, .parquet, or a folder of .npy or .csv; --layout lists keys"
    command.add_argument("arrays", metavar="FILE", help=kinds)
    command.add_argument("--layout", action=_PrintLayout, nargs=0, help="print the arrays that FILE holds, and stop")
    command.add_argument("--out", metavar="TABLE.csv", help="write the table, TABLE.compared.csv and TABLE.json")
    command.add_argument("--method", action="append", metavar="NAME", help="only this detector; may repeat")
    command.add_argument("--preset", choices=("ours", "openood"), help="defaults of the detectors that have it")
    command.add_argument("--against", metavar="NAME", help="test all others against this one (default: epd)")
    command.add_argument("--sae", metavar="FOLDER", help="a trained SAE (default: one is trained here)")
    command.add_argument("--no-sae", action="store_true", help="leave out the scores that need an SAE")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="sae.k=64, detectors.knn.k=10 ...; may repeat"
    )
    command.add_argument("--n-boot", type=int, default=1000, metavar="N", help="replicates (default: 1000; 0: none)")
    command.add_argument("--seed", type=int, default=0, help="of held-out rows, SAE and intervals (default: 0)")
    command.add_argument("--device", default="auto", help="of the SAE: auto, cpu, cuda ... (default: auto)")
    command.add_argument("--quiet", "-q", action="store_true", help="no progress bars")

    command = add("store", "list what is kept, or remove what no experiment's settings use", parents=(common,))
    command.add_argument("action", choices=("list", "clean"), help="clean keeps whatever it cannot judge: used '?'")
    command.add_argument("--dry-run", "-n", action="store_true", help="say what clean would remove")

    command = add("detectors", "list every score with formula, options and source", parents=(common,))

    for entry in entry_points(group="capsae.commands"):  # other packages' commands: in a clone, the book's
        with contextlib.suppress(ModuleNotFoundError):  # installed without them
            entry.load()(add, common)
    return parser


class _PrintLayout(argparse.Action):
    """Print the layout of ``capsae evaluate``'s file and stop, as --help does."""

    def __call__(self, parser, namespace, values, option_string=None):
        from .pipeline.arrays_io import LAYOUT

        sys.stdout.write(LAYOUT + "\n")
        parser.exit()


def _log(verbose: bool) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


if __name__ == "__main__":
    sys.exit(main())
