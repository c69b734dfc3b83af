"""Dictionaries without gradients: each is tested for what it claims, and all for the same interface."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from sklearn.decomposition import PCA as SklearnPCA
from sklearn.linear_model import OrthogonalMatchingPursuit

from capsae import sae as zoo
from capsae.sae import SAEConfig, TopKSAE, measures
from capsae.sae.dictionaries import methods as dictionaries
from capsae.sae.dictionaries import pursuit

D, M, N = 16, 10, 300


def planted(n: int = N, atoms: int = M, active: int = 2, seed: int = 0, signed: bool = False, d: int = D):
    """Rows that are sparse sums of unit atoms, and the atoms (atoms, d)."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(atoms, d))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    a = np.zeros((n, atoms))
    for row in a:
        row[rng.permutation(atoms)[:active]] = rng.uniform(1, 2, active) * (
            rng.choice([-1, 1], active) if signed else 1
        )
    return (a @ w).astype(np.float32), w


SETTINGS = {
    "itda": (40, 3, {"admit": 0.02, "passes": 8}),
    "semi_nmf": (M, 3, {"steps": 20}),
    "kmeans": (M, 3, {}),
    "pca": (M, 3, {}),
    "random": (40, 3, {}),
    "dense_relu": (D, D, {}),
}


def make(method: str, x, seed: int = 0, normalize: str = "sample", **options):
    latents, k, own = SETTINGS[method]
    return dictionaries.create(method, latents, k, normalize, seed, **(own | options)).fit(x)


def test_all_methods_are_here():
    assert set(SETTINGS) == set(dictionaries.METHODS)


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("normalize", ["sample", "dataset"])
def test_one_interface(method, normalize, tmp_path):
    x = planted()[0] + 3
    model = make(method, x, normalize=normalize)
    codes = model.encode(x)
    assert codes.values.dtype == np.float32 and codes.indices.dtype == np.int32
    assert (codes.values >= 0).all() and (np.diff(codes.values, axis=1) <= 0).all()
    assert codes.n_latents == len(model.decoder) == len(model.atoms) * (2 if model.signed else 1)
    assert codes.indices.min() >= 0 and codes.indices.max() < codes.n_latents
    assert all(len(set(row)) == len(row) for row in codes.indices)
    assert measures.l0(codes) <= SETTINGS[method][1]
    np.testing.assert_allclose(model.decoder.norm(dim=1), 1, atol=1e-5)
    by_hand = codes.dense() @ model.decoder.numpy() + model.pre_bias.numpy()
    np.testing.assert_allclose(model.decode(codes), by_hand, atol=1e-4)
    assert model.fvu(x) == pytest.approx(measures.fvu(model, x, codes), rel=1e-4)

    folder = model.save(tmp_path)
    assert json.loads((folder / "cfg.json").read_text())["kind"] == method
    again = zoo.load(folder)
    assert type(again) is type(model) and again.config == model.config
    unseen = planted(seed=1)[0] + 3
    for name in ("values", "indices"):
        np.testing.assert_array_equal(getattr(again.encode(unseen), name), getattr(model.encode(unseen), name))
    np.testing.assert_array_equal(again.reconstruct(unseen), model.reconstruct(unseen))


@pytest.mark.parametrize("method", SETTINGS)
def test_a_seed_decides_all(method):
    x = planted()[0]
    first, same, other = make(method, x, 3), make(method, x, 3), make(method, x, 4)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name
    assert torch.equal(first.decoder, other.decoder) == (method in ("pca", "dense_relu"))  # that draw nothing


@pytest.mark.parametrize("method", ["itda", "semi_nmf", "kmeans"])
def test_options_change_something(method):
    x = planted(active=4)[0]
    others = {
        "itda": {"tau": 0.4, "duplicate": 0.3, "admit": 0.04, "batch_size": 50, "passes": 1},
        "semi_nmf": {"steps": 5, "ridge": 10.0, "encode_steps": 1},
        "kmeans": {"steps": 1},
    }[method]
    assert set(others) == set(dictionaries.METHODS[method].defaults)
    reference = make(method, x).reconstruct(x)
    for name, value in others.items():
        found = make(method, x, **{name: value}).reconstruct(x)
        assert found.shape != reference.shape or not np.allclose(found, reference, atol=1e-6), name


# --- pursuit


def test_omp_equals_scikit_learn():
    x, w = planted(40, atoms=30, active=4, signed=True)
    values, indices, residual = pursuit.omp(torch.from_numpy(x), torch.from_numpy(w).float(), 4)
    for row, v, i, r in zip(x, values, indices, residual, strict=True):
        model = OrthogonalMatchingPursuit(n_nonzero_coefs=4, fit_intercept=False).fit(w.T, row)
        dense = np.zeros(30)
        dense[i] = v
        np.testing.assert_allclose(dense, model.coef_, atol=1e-4)
        np.testing.assert_allclose(r, row - dense @ w, atol=1e-4)


def test_omp_stops_where_nothing_is_left_and_survives_dependent_atoms():
    w = F.normalize(torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]]), dim=1)
    values, indices, residual = pursuit.omp(torch.tensor([[2.0, 3, 1], [0, 0, 0], [0, 5, 0]]), w, 9)
    assert values.shape == (3, 4) and values.isfinite().all()
    assert torch.allclose(residual, torch.tensor([[0.0, 0, 1], [0, 0, 0], [0, 0, 0]]), atol=1e-5)
    assert (values[1] == 0).all() and (values[2] != 0).sum() == 1
    assert all(len(set(row)) == 4 for row in indices.tolist())


def test_nonnegative_fit_equals_scipy():
    x, w = planted(30, atoms=20, active=6, signed=True)
    indices = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(i))[:6] for i in range(30)])
    w32 = torch.from_numpy(w).float()
    values = pursuit.nonnegative_fit(torch.from_numpy(x), w32, indices, sweeps=300)
    for row, v, i in zip(x, values, indices, strict=True):
        np.testing.assert_allclose(v, nnls(w[i].T, row.astype(float))[0], atol=1e-3)
    errors = [
        (
            torch.from_numpy(x)
            - (pursuit.nonnegative_fit(torch.from_numpy(x), w32, indices, s)[:, None] @ w32[indices])[:, 0]
        )
        .square()
        .sum()
        .item()
        for s in range(6)
    ]
    assert all(b <= a + 1e-3 for a, b in zip(errors, errors[1:], strict=False)) and errors[-1] < errors[1]


def test_kmeans_finds_clusters_and_empty_ones_move():
    rng = np.random.default_rng(0)
    centres = 10 * rng.normal(size=(6, 4))
    x = torch.from_numpy(np.repeat(centres, 50, 0) + 0.1 * rng.normal(size=(300, 4))).float()
    found = pursuit.kmeans(x, 6)
    distance = np.linalg.norm(centres[:, None] - found.numpy()[None], axis=2)
    assert (distance.min(1) < 0.1).all() and len(set(distance.argmin(1))) == 6
    rows = pursuit.kmeans(x[:9], 9)
    assert sorted(rows[:, 0].tolist()) == sorted(x[:9, 0].tolist())
    copies = torch.cat([x[:2]] * 5)
    assert pursuit.kmeans(copies, 4).isfinite().all()
    with pytest.raises(ValueError, match="needs as many rows, found 9"):
        pursuit.kmeans(x[:9], 10)


# --- what each claims


def test_itda_atoms_are_training_rows():
    x = planted()[0] + 3
    model = make("itda", x, normalize="dataset")
    u = model.normalize(x) - model.pre_bias.numpy()
    assert len(set(model.rows.tolist())) == len(model.rows) <= 40
    np.testing.assert_allclose(model.atoms, F.normalize(torch.from_numpy(u), dim=1)[model.rows], atol=1e-6)


def test_itda_drops_near_duplicates_and_admits_a_share_of_a_batch():
    x, _ = planted(100)
    twice = np.concatenate([x, x * 1.001, -x])
    model = dictionaries.create("itda", 80, 2, "none", tau=1e-6, admit=0.05, batch_size=100, passes=3).fit(twice)
    cosines = (model.atoms @ model.atoms.T).abs().fill_diagonal_(0)
    assert cosines.max() <= 0.98
    assert len(model.rows) <= 3 * 3 * 5
    assert len(dictionaries.create("itda", 7, 2, "none", admit=0.5).fit(x).rows) == 7
    few = dictionaries.create("itda", 80, 2, "none", tau=0.9, batch_size=10).fit(x)
    assert len(few.rows) < 20  # as many as are needed, no more
    assert few.encode(x).n_latents == 2 * len(few.rows)
    with pytest.raises(ValueError, match="smaller tau"):
        dictionaries.create("itda", 5, 2, "none", tau=1.5).fit(x)


def test_itda_reconstructs_what_is_on_its_atoms():
    """One atom a row, each seen alone: its dictionary is the planted one, up to the mean that is taken off."""
    x, w = planted(200, active=1)
    model = dictionaries.create("itda", M, 3, "none", tau=1e-4, admit=0.2).fit(x)
    assert model.fvu(x) < 0.02
    assert dictionaries.create("itda", 4, 3, "none", admit=0.2).fit(x).fvu(x) > 0.1


def test_dictionaries_of_the_same_images_share_rows():
    x, _ = planted(400, atoms=40, active=3)
    rng = np.random.default_rng(1)
    noisy, other = x + 0.01 * rng.normal(size=x.shape).astype(np.float32), rng.permutation(x)
    a, b, c = (dictionaries.create("itda", 30, 4, "none").fit(rows).rows for rows in (x, noisy, other))
    assert len(a) == len(b) == 30
    assert measures.jaccard(a, b) > 2 * measures.jaccard(a, c)


def test_semi_nmf_objective_never_rises():
    for seed in range(3):
        objective = make("semi_nmf", planted(seed=seed)[0], steps=40).objective
        assert len(objective) == 40 and objective[-1] < objective[0]
        assert (objective.diff() <= 1e-4 * objective[:-1]).all()


def test_semi_nmf_recovers_what_kmeans_cannot():
    """Sums of three non-negative parts: parts are not cluster centres."""
    x, w = planted(1000, atoms=6, active=3, d=12)
    nmf = dictionaries.create("semi_nmf", 6, 6, "none", steps=200).fit(x)
    clusters = dictionaries.create("kmeans", 6, 6, "none").fit(x)
    centred = w - w.mean(0)  # the mean of the rows is taken off, and so its share of every atom
    assert nmf.fvu(x) < 0.05 < clusters.fvu(x)
    better, worse = (measures.max_cosines(centred, model.decoder).mean() for model in (nmf, clusters))
    assert better > worse


def test_kmeans_code_of_one_is_the_nearest_centroid():
    x = planted(active=1)[0]
    model = dictionaries.create("kmeans", M, 1, "none").fit(x)
    centroids = model.decoder.numpy() * model.lengths.numpy()[:, None] + model.pre_bias.numpy()
    closest = np.linalg.norm(x[:, None] - centroids[None], axis=2).argmin(1)
    codes = model.encode(x)
    assert codes.k == 1 and (codes.indices[:, 0] == closest).all()
    np.testing.assert_allclose(model.reconstruct(x), centroids[closest], atol=1e-5)
    more = dictionaries.create("kmeans", M, 4, "none").fit(x)
    nearest = np.argsort(np.linalg.norm(x[:, None] - centroids[None], axis=2), axis=1)[:, :4]
    assert (np.sort(more.encode(x).indices) == np.sort(nearest)).all()
    assert more.fvu(x) < model.fvu(x)


def test_kmeans_recovers_atoms_that_fire_alone():
    x, w = planted(500, active=1, atoms=8, d=32)
    model = dictionaries.create("kmeans", 8, 1, "none").fit(x)
    centred = w - x.mean(0)
    assert measures.max_cosines(centred, model.decoder).mean() > 0.9


def test_pca_is_pca_and_splits_signs():
    x = planted(active=5)[0]
    model = dictionaries.create("pca", 6, 6, "none").fit(x)
    reference = SklearnPCA(6).fit(x.astype(np.float64))
    assert abs((reference.components_ * model.atoms.numpy()).sum(1)) == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(model.reconstruct(x), reference.inverse_transform(reference.transform(x)), atol=1e-3)
    dense = model.encode(x).dense()
    assert ((dense[:, :6] > 0) & (dense[:, 6:] > 0)).sum() == 0
    signed = dense[:, :6] - dense[:, 6:]
    np.testing.assert_allclose(signed, (x - x.mean(0)) @ model.atoms.numpy().T, atol=1e-4)
    assert dictionaries.create("pca", D, D, "none").fit(x).fvu(x) < 1e-9
    part = dictionaries.create("pca", D, 2, "none").fit(x)
    z = (x - x.mean(0)) @ part.atoms.numpy().T
    np.testing.assert_allclose(np.sort(part.encode(x).values), np.sort(abs(z))[:, -2:], atol=1e-4)
    with pytest.raises(ValueError, match="latents is 17; PCA of 16 columns"):
        dictionaries.create("pca", 17, 2).fit(x)


def test_random_dictionary_is_the_untrained_sae_with_a_gain():
    x = planted()[0]
    model = make("random", x, seed=5)
    sae = TopKSAE.untrained(D, SAEConfig(latents=40, k=3, seed=5))
    assert torch.equal(model.decoder, sae.decoder)
    sae.pre_bias.data = model.pre_bias
    codes, plain = model.encode(x), sae.encode(x)
    np.testing.assert_array_equal(codes.indices, plain.indices)
    np.testing.assert_allclose(codes.values, plain.values * model.gain.item(), rtol=1e-6)
    best = model.fvu(x)
    for factor in (0.9, 1.1):  # no other gain reconstructs better
        model.gain = model.gain * factor
        assert model.fvu(x) > best
        model.gain = model.gain / factor


def test_dense_relu_keeps_the_positive_half():
    x = planted()[0]
    model = make("dense_relu", x)
    u = model.normalize(x)
    np.testing.assert_array_equal(model.encode(x).dense(), np.maximum(u, 0))
    np.testing.assert_array_equal(model.decode(model.encode(x)), np.maximum(u, 0))
    assert dictionaries.create("dense_relu", D, 2).fit(x).encode(x).k == 2
    with pytest.raises(ValueError, match="latents is 9; the features have 16 columns"):
        dictionaries.create("dense_relu", 9, 2).fit(x)


def test_what_is_refused(tmp_path):
    x = planted()[0]
    with pytest.raises(ValueError, match="no dictionary is named 'ica'; there are itda"):
        dictionaries.create("ica", 3, 1)
    with pytest.raises(TypeError, match="ITDA has no option 'thau'; it has tau"):
        dictionaries.create("itda", 3, 1, thau=1)
    with pytest.raises(ValueError, match="k is 4, latents 3"):
        dictionaries.create("pca", 3, 4)
    with pytest.raises(ValueError, match="normalize is 'zca'"):
        dictionaries.create("pca", 3, 2, "zca")
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 300 rows, first in row 7"):
        x[7, 2] = np.nan
        dictionaries.create("pca", 3, 2).fit(x)
    folder = make("pca", planted()[0]).save(tmp_path / "pca")
    with pytest.raises(ValueError, match="holds a 'pca', not an SAE; capsae.sae.load would do"):
        TopKSAE.load(folder)
    topk = TopKSAE.untrained(D, SAEConfig(latents=M, k=2)).save(tmp_path / "topk")
    assert isinstance(zoo.load(topk), TopKSAE)
    with pytest.raises(ValueError, match="'topk'"):
        dictionaries.load(topk)


def test_experiments_read_split_codes():
    """EPD's road: codes of a signed method go through profiles as any others."""
    from capsae import ClassActivationProfiles, energy_profile_divergence

    x, _ = planted(active=1, atoms=4)
    labels = np.arange(N) % 4
    codes = make("pca", x).encode(x)
    caps = ClassActivationProfiles.fit(codes, labels, 4)
    assert caps.n_latents == 2 * M and np.isfinite(energy_profile_divergence(codes, labels, caps)).all()
