"""How far our scores are from pytorch-ood's and from their formulas, on equal arrays.

    python -m benchmarks.parity          # table; writes benchmarks/results/parity.json, the source of book/parity.md

The measure is the largest difference over the test rows, after the known constant, in standard deviations of the score:
an absolute one means little for distances of a thousand, a relative one little where a score crosses zero.
A pytorch-ood score is one function, `(train, val, test) -> scores`, and one line in PYTORCH_OOD.
"""

from __future__ import annotations

import argparse
import json
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from benchmarks.closed_forms import CLOSED_FORMS
from capsae import Observations, detectors
from capsae.features.featureset import LinearHead

OUT = Path("benchmarks/results/parity.json")
BAR = 1e-5
FORMULA = "closed form in float64"

# What pytorch-ood has under the same name, but not the same formula.
NOT_THE_SAME = {
    "entropy": "keeps probabilities above 1e-7, which adds up over the classes",
    "gen": "takes the mean of all classes and keeps probabilities off 0 and 1 by 1e-7",
}


def world(d: int = 768, classes: int = 20, n_train: int = 2000, n_test: int = 300, seed: int = 0):
    """(train, val, test) Observations; half of the test rows come from other classes.

    Two thirds of the directions carry little variance: where a spectrum is flat, float32 and float64 split it into
    principal and null directions in different ways, and ViM would measure that.
    """
    rng = np.random.default_rng(seed)
    centres, others = rng.normal(size=(2, classes, d))
    principal = rng.normal(size=(d // 3 - classes, d)) / np.sqrt(d // 3)
    head = LinearHead((centres / np.sqrt(d) / 2).astype(np.float32), rng.normal(size=classes).astype(np.float32))

    def observations(n, centres):
        labels = np.arange(n) % classes
        noise = rng.normal(size=(n, len(principal))) @ principal + 0.1 * rng.normal(size=(n, d))
        cls = (centres[labels] + noise + 0.5).astype(np.float32)
        labels = np.where(rng.random(n) < 0.1, rng.integers(classes, size=n), labels)  # the head makes mistakes
        return Observations(cls, labels=labels, head=head)

    train, val, near, far = (
        observations(n, of)
        for n, of in zip(
            (n_train, n_test, n_test - n_test // 2, n_test // 2), (centres, centres, centres, others), strict=True
        )
    )
    return train, val, Observations(np.concatenate([near.cls, far.cls]), head=head)


# --- pytorch-ood


def _tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _linear(obs) -> torch.nn.Linear:
    linear = torch.nn.Linear(*np.shape(obs.head.weight)[::-1])
    linear.weight.data, linear.bias.data = _tensor(obs.head.weight), _tensor(obs.head.bias)
    return linear.requires_grad_(False)


def _maps(obs) -> torch.Tensor:
    return _tensor(obs.cls)[:, :, None, None]


def _flat_head(obs):
    linear = _linear(obs)
    return lambda maps: linear(maps.flatten(1))


@contextmanager
def _float64():
    """pytorch-ood makes its covariances in torch's default precision."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _po():
    from pytorch_ood import detector

    return detector


def _on_logits(name):
    return lambda train, val, test: getattr(_po(), name)(None).predict_logits(_tensor(test.logits))


def _tempscale(train, val, test):
    found = _po().TemperatureScaling(None).fit_logits(_tensor(val.logits), _tensor(val.labels))
    return found.predict_logits(_tensor(test.logits))


def _klm(train, val, test):
    return _po().KLMatching(None).fit_logits(_tensor(val.logits)).predict_logits(_tensor(test.logits))


def _on_features(make):
    def scores(train, val, test):
        found = make(train).fit_features(_tensor(train.cls), _tensor(train.labels))
        return found.predict_features(_tensor(test.cls))

    return scores


def _knn(train, val, test):
    found = _po().KNN(None, k=50).fit_features(_tensor(train.cls64), _tensor(train.labels))
    return found.predict_features(_tensor(test.cls64))


def _gaussian(name):
    def scores(train, val, test):
        with _float64():
            found = getattr(_po(), name)(None).fit_features(_tensor(train.cls64), _tensor(train.labels))
            return found.predict_features(_tensor(test.cls64))

    return scores


def _react(train, val, test):
    found = _po().ReAct(None, _flat_head(train), percentile=0.9)
    return found.fit_feature_maps(_maps(val), _tensor(val.labels)).predict_feature_maps(_maps(test))


def _shaped(name, **options):
    def scores(train, val, test):
        return getattr(_po(), name)(None, _flat_head(test), **options).predict_feature_maps(_maps(test))

    return scores


def _gradnorm(train, val, test):
    linear = _linear(test).requires_grad_(True)
    found = _po().GradNorm(linear, param_filter=lambda name: name == "weight")
    return found.predict(_tensor(test.cls))


def _vim_dim(obs) -> int:
    return obs.cls.shape[1] // 3  # 256 of 768, OpenOOD's default


def _weights(obs):
    return {"w": _tensor(obs.head.weight), "b": _tensor(obs.head.bias)}


PYTORCH_OOD = {
    "msp": _on_logits("MaxSoftmax"),
    "maxlogit": _on_logits("MaxLogit"),
    "energy": _on_logits("EnergyBased"),
    "tempscale": _tempscale,
    "klm": _klm,
    "mds": _gaussian("Mahalanobis"),
    "rmds": _gaussian("RMD"),
    "knn": _knn,
    "vim": _on_features(lambda train: _po().ViM(None, _vim_dim(train), **_weights(train))),
    "react": _react,
    "ash_b": _shaped("ASH", variant="ash-b", percentile=0.9),
    "ash_p": _shaped("ASH", variant="ash-p", percentile=0.9),
    "ash_s": _shaped("ASH", variant="ash-s", percentile=0.65),
    "scale": _shaped("SCALE", percentile=0.85),
    "dice": _on_features(lambda train: _po().DICE(None, **_weights(train), p=0.9)),
    "she": _on_features(lambda train: _po().SHE(None, _linear(train))),
    "nnguide": _on_features(lambda train: _po().NNGuide(None, _linear(train), k=10)),
    "fdbd": _on_features(lambda train: _po().fDBD(None, _linear(train))),
    "nci": _on_features(lambda train: _po().NCI(None, _linear(train), alpha=1e-4)),
    "gradnorm": _gradnorm,
}

# What makes pytorch-ood's score ours: as text, and as (their scores, training rows) -> ours.
CONSTANTS = {
    "mds": ("theirs x 2 N", lambda s, n: 2 * n * s),
    "rmds": ("theirs x N", lambda s, n: n * s),
    "knn": ("theirs squared", lambda s, n: s**2),
}


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference in standard deviations of the reference's score."""
    return float(np.abs(ours - theirs).max() / theirs.std())


def measure(names=None, sets=None) -> list[dict]:
    """One row a method and reference: method, reference, version, options, constant, difference.

    ``sets`` are (train, val, test); default: :func:`world`.
    """
    train, val, test = sets or world()
    rows = []
    for name in CLOSED_FORMS if names is None else names:
        options = {"dim": _vim_dim(train)} if name == "vim" else {}
        if name in PYTORCH_OOD:
            theirs = PYTORCH_OOD[name](train, val, test).detach().numpy().astype(np.float64)
            words, convert = CONSTANTS.get(name, ("1", lambda s, n: s))
            if name == "tempscale":  # theirs stops after 50 steps: the score is compared at their temperature
                options = {"temperature": _their_temperature(val)}
                words = "at their temperature"
            ours = detectors.create(name, **options).fit(train, val).score(test)
            about = {"reference": "pytorch-ood", "version": version("pytorch-ood"), "constant": words}
            shown = {} if name == "tempscale" else options
            rows.append(
                {"method": name, **about, "options": shown, "difference": difference(ours, convert(theirs, len(train)))}
            )
        options = {} if name == "tempscale" else options
        ours = detectors.create(name, **options).fit(train, val).score(test)
        about = {"reference": FORMULA, "version": "", "constant": "1", "options": options}
        rows.append(
            {"method": name, **about, "difference": difference(ours, CLOSED_FORMS[name](train, val, test, **options))}
        )
    return rows


def _their_temperature(val) -> float:
    return _po().TemperatureScaling(None).fit_logits(_tensor(val.logits), _tensor(val.labels)).t.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rows = measure()
    for row in rows:
        row["difference"] = float(f"{row['difference']:.1e}")
        print(f"{row['method']:10} {row['reference']:24} {row['constant']:22} {row['difference']:.1e}")
    found = {"bar": BAR, "not_the_same": NOT_THE_SAME, "rows": rows}
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
