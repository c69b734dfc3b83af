"""Compiled loops of the bootstrap (numba): all metrics of some replicates in one walk over the sorted samples.

``metrics.all_metrics`` is the readable form, tested to give the same; import this lazily, it needs numba. Weights are
counts of draws, ID samples first; replicates lie side by side, so that one instruction serves several.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_compiled = njit(nogil=True, cache=True, error_model="numpy")
_ALMOST = 1e-12
_WIDTH = 64  # replicates side by side


@_compiled
def fpr95(order, ends, n_id, weights, recall):
    """(replicates, 2): FPR95 with OOD positive, with ID positive; of weights (N, replicates)."""
    n_ood, replicates = len(order) - n_id, weights.shape[1]
    need_ood, need_id = np.ceil((recall - _ALMOST) * n_ood), np.ceil((recall - _ALMOST) * n_id)
    may_miss, need_ood = np.int32(n_id - need_id), np.int32(need_ood)
    out = np.empty((replicates, 2))
    for start in range(0, replicates, _WIDTH):
        columns = min(_WIDTH, replicates - start)
        id_above, ood_above, before = np.zeros((3, _WIDTH), np.int32)
        id_found, ood_missed = np.zeros((2, _WIDTH), np.int32)
        at = 0
        for t in range(len(ends)):
            for j in range(columns):
                before[j] = ood_above[j]
                # The last threshold from above at which the ID samples at or below still reach the recall.
                ood_missed[j] = ood_above[j] if id_above[j] <= may_miss else ood_missed[j]
            while at <= ends[t]:
                i = order[at]
                if i < n_id:
                    for j in range(columns):
                        id_above[j] += weights[i, start + j]
                else:
                    for j in range(columns):
                        ood_above[j] += weights[i, start + j]
                at += 1
            for j in range(columns):  # the first at which the OOD samples above reach it
                id_found[j] = id_above[j] if before[j] < need_ood else id_found[j]
        for j in range(columns):
            out[start + j, 0] = id_found[j] / n_id
            out[start + j, 1] = (n_ood - ood_missed[j]) / n_ood
    return out


@_compiled
def areas(order, ends, levels, n_id, correct, weights):
    """(replicates, 6): AUROC, AUPR-in, AUPR-out, AUTC, OSCR, AUROC of the correctly classified; of weights (N,
    replicates)."""
    n_ood, replicates = len(order) - n_id, weights.shape[1]
    pairs = float(n_id) * n_ood
    out = np.empty((replicates, 6))
    for start in range(0, replicates, _WIDTH):
        columns = min(_WIDTH, replicates - start)
        id_here, ood_here, hits_here, id_above, ood_above, hits = np.zeros((6, _WIDTH))
        auroc, aupr_in, aupr_out, oscr, apart = np.zeros((5, _WIDTH))
        top, bottom = np.full(_WIDTH, -np.inf), np.full(_WIDTH, np.inf)
        at = 0
        for t in range(len(ends)):
            id_here[:], ood_here[:], hits_here[:] = 0.0, 0.0, 0.0
            while at <= ends[t]:
                i = order[at]
                if i < n_id:
                    for j in range(columns):
                        id_here[j] += weights[i, start + j]
                        hits_here[j] += weights[i, start + j] * correct[i]
                else:
                    for j in range(columns):
                        ood_here[j] += weights[i, start + j]
                at += 1
            level = levels[t]
            for j in range(columns):
                drawn = id_here[j] + ood_here[j] > 0
                bottom[j] = level if drawn else bottom[j]
                top[j] = level if drawn and top[j] == -np.inf else top[j]
                apart[j] += level * (id_here[j] / n_id - ood_here[j] / n_ood) if drawn else 0.0
                id_below = n_id - id_above[j]
                term = id_here[j] * id_below / (id_below + n_ood - ood_above[j])
                aupr_in[j] += term if id_here[j] > 0 else 0.0
                id_above[j] += id_here[j]
                ood_above[j] += ood_here[j]
                beaten = ood_above[j] - 0.5 * ood_here[j]
                auroc[j] += id_here[j] * beaten
                oscr[j] += hits_here[j] * beaten
                hits[j] += hits_here[j]
                term = ood_here[j] * ood_above[j] / (id_above[j] + ood_above[j])
                aupr_out[j] += term if ood_here[j] > 0 else 0.0
        for j in range(columns):
            r = start + j
            out[r, 0] = auroc[j] / pairs
            out[r, 1] = aupr_in[j] / n_id
            out[r, 2] = aupr_out[j] / n_ood
            span = top[j] - bottom[j]
            out[r, 3] = 0.5 * (1 + apart[j] / span) if span > 0 else (0.5 if span == 0 else np.nan)
            out[r, 4] = oscr[j] / pairs
            out[r, 5] = oscr[j] / (hits[j] * n_ood)
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
