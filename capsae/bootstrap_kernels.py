"""Compiled loops of the bootstrap (numba): all metrics of one replicate in one walk over the sorted samples.

``metrics.all_metrics`` is the readable form, tested to give the same; import this lazily, it needs numba. Weights are
counts of draws: one row a replicate, ID samples first, so that a row lies in a core's first cache.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_compiled = njit(nogil=True, cache=True, error_model="numpy")
_ALMOST = 1e-12


@_compiled
def fpr95(order, ends, n_id, weights, recall):
    """(replicates, 2): FPR95 with OOD positive, with ID positive."""
    n_ood = len(order) - n_id
    need_ood, need_id = (recall - _ALMOST) * n_ood, (recall - _ALMOST) * n_id
    out = np.empty((len(weights), 2))
    for r in range(len(weights)):
        row = weights[r]
        id_above = ood_above = 0
        at, found = 0, False
        for t in range(len(ends)):
            # The last threshold from above at which the ID samples at or below still reach the recall.
            if n_id - id_above >= need_id:
                out[r, 1] = n_ood - ood_above
            elif found:
                break
            while at <= ends[t]:
                i = order[at]
                w = row[i]
                if i < n_id:
                    id_above += w
                else:
                    ood_above += w
                at += 1
            if not found and ood_above >= need_ood:
                out[r, 0] = id_above
                found = True
        out[r, 0] /= n_id
        out[r, 1] /= n_ood
    return out


@_compiled
def areas(order, ends, levels, n_id, correct, weights):
    """(replicates, 6): AUROC, AUPR-in, AUPR-out, AUTC, OSCR, AUROC of the correctly classified."""
    n_ood = len(order) - n_id
    out = np.empty((len(weights), 6))
    for r in range(len(weights)):
        row = weights[r]
        at = id_above = ood_above = hits = 0
        auroc = aupr_in = aupr_out = oscr = apart = 0.0
        top, bottom = -np.inf, np.inf
        for t in range(len(ends)):
            id_here = ood_here = hits_here = 0
            while at <= ends[t]:
                i = order[at]
                w = row[i]
                if i < n_id:
                    id_here += w
                    hits_here += w * correct[i]
                else:
                    ood_here += w
                at += 1
            if id_here + ood_here == 0:
                continue
            if top == -np.inf:
                top = levels[t]
            bottom = levels[t]
            apart += levels[t] * (id_here / n_id - ood_here / n_ood)
            if id_here:
                id_below = n_id - id_above
                aupr_in += id_here * id_below / (id_below + n_ood - ood_above)
            id_above += id_here
            ood_above += ood_here
            beaten = ood_above - 0.5 * ood_here
            auroc += id_here * beaten
            oscr += hits_here * beaten
            hits += hits_here
            if ood_here:
                aupr_out += ood_here * ood_above / (id_above + ood_above)
        pairs = float(n_id) * n_ood
        out[r, 0] = auroc / pairs
        out[r, 1] = aupr_in / n_id
        out[r, 2] = aupr_out / n_ood
        span = top - bottom
        out[r, 3] = 0.5 * (1 + apart / span) if span > 0 else (0.5 if span == 0 else np.nan)
        out[r, 4] = oscr / pairs
        out[r, 5] = oscr / (float(hits) * n_ood)
    return out


@_compiled
def errors(order, ends, failed, weights, recall):
    """(replicates, 2) of ID samples sorted ascending: AURC, share of the failures that are flagged."""
    n = len(order)
    out = np.empty((len(weights), 2))
    for r in range(len(weights)):
        row = weights[r]
        at = accepted = wrong = 0
        area, flagged = 0.0, -1
        for t in range(len(ends)):
            here = wrong_here = 0
            while at <= ends[t]:
                i = order[at]
                here += row[i]
                wrong_here += row[i] * failed[i]
                at += 1
            for j in range(1, here + 1):
                area += (wrong + j * wrong_here / here) / (accepted + j)
            accepted += here
            wrong += wrong_here
            if flagged < 0 and accepted >= (recall - _ALMOST) * n:
                flagged = wrong
        out[r, 0] = area / n
        out[r, 1] = (wrong - flagged) / wrong if wrong else np.nan
    return out
