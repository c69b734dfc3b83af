"""The command line: ``capsae`` or ``python -m capsae``."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from . import commands

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
  capsae compare holiday/ archive/     which latents differ between two folders, or sets: test far/textures
  capsae evaluate features.safetensors --out table.csv
                                       features of your own, from any framework: every score, intervals and tests
  capsae detectors                     every score: formula, options, source
  capsae zoo                           every autoencoder and dictionary on the same features: tables in book/zoo
  capsae reproduce                     all of the book: execute what is not fresh, then build it

Change any setting:  --set sae.k=64 --set caps.core_fraction=0.2
Your own data:       a .toml file in place of a profile's name; start from `capsae profiles imagenet20`.
Results are kept in $CAPSAE_HOME, or .capsae of the project around the current folder, or ~/.cache/capsae.
"""


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
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        if options.debug:
            raise
        sys.stderr.write(f"capsae: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("capsae", description=GUIDE, formatter_class=raw)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

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

    def add(name: str, help: str, parents=(profiled,)) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=help, description=help, parents=list(parents), formatter_class=raw)
        command.set_defaults(run=getattr(commands, name))
        return command

    command = add("profiles", "list the profiles, or print one in full")
    command.add_argument("name", nargs="?", help="a profile's name or .toml file")

    command = add("extract", "extract the features of all sets; re-makes the pack of a profile that has one")
    command.add_argument("name", nargs="?", help="a profile's name or .toml file (as --profile)")
    command.add_argument("--out", metavar="FOLDER", help="of a re-made pack (default: packs/<name> here)")
    command.add_argument("--pixels", action="store_true", help="keep a pack's features, measure its images anew")
    command.add_argument("--batch-size", type=int, metavar="N", help="images a forward pass (default: 128)")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of products; give later commands --set backbone.dtype=..."
    )

    command = add("train", "train the SAE, make the class activation profiles, write both to a folder")
    command.add_argument("name", nargs="?", help="a profile's name or .toml file (as --profile)")
    command.add_argument(
        "--out", metavar="FOLDER", required=True, help="new or existing folder; its files are replaced"
    )

    command = add("score", "score your own images", parents=(profiled, weights))
    command.add_argument("images", nargs="+", metavar="IMAGES", help="image files or folders of them")
    command.add_argument("--out", metavar="FILE.csv", help="where to write (default: standard output)")
    command.add_argument(
        "--method",
        action="append",
        help="a detector, or 'ours'; may repeat, flag follows the first (default: epd, ours)",
    )

    command = add("explain", "take the score of one image apart", parents=(profiled, weights))
    command.add_argument("image", nargs="?", help="an image file")
    command.add_argument(
        "--from-set", metavar="SET", help="a set of the profile, e.g. far/textures, in place of an image"
    )
    command.add_argument("--row", type=int, default=0, help="row of that set (default: 0)")
    command.add_argument("--method", default="epd", help="epd or ours (default: epd)")
    command.add_argument("--top", type=int, default=10, help="latents to show (default: 10)")
    command.add_argument("--out", metavar="FILE.csv", help="also write the whole table")

    command = add("compare", "find the latents that differ between two sets of images", parents=(profiled, weights))
    command.epilog = """for example:
  capsae compare --profile imagenet20 holiday/ archive/ --out differences.csv
                                       two folders of images (needs the backbone's weights)
  capsae compare --profile imagenet20 test far/textures
                                       two sets of the profile (needs neither images nor weights)"""
    command.add_argument("a", metavar="A", help="a folder of images, or a set of the profile, e.g. test")
    command.add_argument("b", metavar="B", help="another, e.g. far/textures")
    command.add_argument("--fdr", type=float, default=0.05, help="false discovery rate accepted (default: 0.05)")
    command.add_argument("--top", type=int, default=10, help="latents to show for each side (default: 10)")
    command.add_argument("--out", metavar="FILE.csv", help="also write the whole table, a row a latent")

    command = add(
        "evaluate",
        "compare all scores on features, logits and labels of your own, from any framework",
        parents=(common,),
    )
    command.add_argument("arrays", metavar="FILE", help=".safetensors, .npz, or a folder of .npy; --layout lists keys")
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

    command = add("detectors", "list every score with formula, options and source", parents=(common,))

    command = add("zoo", "fit and measure every autoencoder and dictionary; a killed run goes on", parents=(common,))
    command.add_argument(
        "--profile", "-p", action="append", metavar="NAME", help="may repeat (default: imagenet20 and mini80)"
    )
    command.add_argument("--members", action="append", default=[], metavar="A,B", help="only these (default: all)")
    command.add_argument("--seeds", type=int, nargs="+", default=[], metavar="N", help="default: 0 1 2 3 4")
    command.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default: 2)")
    command.add_argument(
        "--out", metavar="FOLDER", help="of the tables (default: book/zoo; build/zoo where not all is run)"
    )

    command = add("reproduce", "execute what is not fresh and build the book", parents=(common,))
    command.add_argument("profiles", nargs="*", metavar="PROFILE", help="only the pages of these (default: all)")
    command.add_argument("--jobs", type=int, default=None, help="pages at a time (default: 2, or the number of cores)")
    command.add_argument("--dry-run", "-n", action="store_true", help="say what would be executed, and why")
    command.add_argument("--all", "-a", action="store_true", help="execute what is fresh, too")
    return parser


class _PrintLayout(argparse.Action):
    """Print the layout of ``capsae evaluate``'s file and stop, as --help does."""

    def __call__(self, parser, namespace, values, option_string=None):
        from .arrays_io import LAYOUT

        sys.stdout.write(LAYOUT + "\n")
        parser.exit()


def _log(verbose: bool) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


if __name__ == "__main__":
    sys.exit(main())
