"""Every sparse autoencoder and dictionary on the same features, judged by the same measures.

    from companion import zoo

    zoo.members()                                  # names; zoo.member("jumprelu") tells title, formula, source, kind
    sae = zoo.fit("jumprelu", Run("imagenet20"))   # as the committed tables had it
    table = zoo.load("imagenet20")                 # the committed table, tidy

`capsae zoo` (or `make zoo`) makes the tables anew: `book/zoo/<experiment>.csv`, with `<experiment>.json` beside it.
"""

from .fitting import Member, member, members
from .tables import fit, load, load_grid, provenance

__all__ = ["Member", "fit", "load", "load_grid", "member", "members", "provenance"]
