"""Names of latents: made from the classes' activation, lifted by a taxonomy, checked on other rows and by chance."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from capsae.caps import ClassActivationProfiles
from capsae.latents import naming as meaning
from capsae.sae import SparseCodes

NAMES = ["beagle", "husky", "cat", "truck", "church"]


class Taxonomy:
    """dog = beagle, husky; animal = dog and cat; artifact = truck, church."""

    leaves = tuple("abcde")
    synsets = ("animal", "artifact", "dog")
    _of = {"dog": "ab", "animal": "abc", "artifact": "de"}

    def members(self, synset):
        return np.array([leaf in self._of[synset] for leaf in self.leaves])

    def name(self, synset):
        return synset

    def depth(self, synset):
        return {"dog": 2}.get(synset, 1)


def _caps(sums, fired=50):
    sums = np.asarray(sums, dtype=float)
    return ClassActivationProfiles(sums, np.where(sums > 0, fired, 0), np.full(len(sums), 100))


def _codes(dense):
    dense = np.asarray(dense, np.float32)
    indices = np.tile(np.arange(dense.shape[1], dtype=np.int32), (len(dense), 1))
    return SparseCodes(dense, indices, dense.shape[1])


def test_the_fewest_classes_that_hold_the_activation():
    shares = np.array([[0.5, 0.3, 0.2], [0.8, 0.2, 0.0], [1 / 3, 1 / 3, 1 / 3], [0, 0, 0]])
    assert meaning.held(shares, 0.8).tolist() == [[True, True, False], [True, False, False], [True] * 3, [False] * 3]
    assert meaning.held(shares, 1.0)[1].tolist() == [True, True, False]
    with pytest.raises(ValueError, match="hold is 0"):
        meaning.held(shares, 0)


def test_selectivity_is_one_for_one_class_and_zero_for_all_alike():
    found = meaning.selectivity(np.array([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0], [0, 0, 0, 0]]))
    assert found[:3] == pytest.approx([1, 0, 0.5]) and np.isnan(found[3])


def test_classes_count_alike_however_many_rows_they_have():
    sums = np.array([[10.0], [10.0]])
    caps = ClassActivationProfiles(sums, np.array([[5], [5]]), np.array([10, 90]))
    assert meaning.posterior(caps)[0] == pytest.approx([0.9, 0.1])


def test_names_are_classes_then_the_lowest_synset_that_is_filled_enough():
    sums = np.array(
        # one class, dog, animal (two of three: filled), artifact and animal: none, spread over all, dead, rare
        [
            [9, 5, 5, 0, 2, 0, 1],
            [0, 5, 0, 0, 2, 0, 0],
            [0, 0, 5, 5, 2, 0, 0],
            [1, 0, 0, 5, 2, 0, 0],
            [0, 0, 0, 0, 2, 0, 0],
        ]
    )
    caps = _caps(sums)
    caps.active[:, 6] = np.where(caps.sums[:, 6] > 0, meaning.LEAST - 1, 0)
    named = meaning.name_latents(caps, NAMES, Taxonomy())
    assert named.table["kind"].tolist() == ["class", "synset", "synset", "none", "none", "dead", "rare"]
    assert named.table["base"].tolist() == pytest.approx([0.2, 0.4, 0.6, 0, 0, 0, 0])
    counted = meaning.name_counts(named)
    assert counted["name"].tolist() == ["animal", "dog"] and counted["latents"].tolist() == [1, 1]
    assert counted["classes"].tolist() == [3, 2] and counted["share"].tolist() == [0.5, 0.5]
    assert named.table["name"].tolist() == ["beagle", "dog", "animal", "", "", "", ""]
    assert named.members.sum(1).tolist() == [1, 2, 3, 0, 0, 0, 0]
    assert named.named.tolist() == [True] * 3 + [False] * 4
    strict = meaning.name_latents(caps, NAMES, Taxonomy(), fill=0.7)
    assert strict.table["kind"].tolist()[:4] == ["class", "synset", "none", "none"]
    plain = meaning.name_latents(caps, NAMES)
    assert plain.table["kind"].tolist()[:3] == ["class", "none", "none"]
    assert plain.table["classes"][1] == "beagle, husky"
    shares = meaning.kind_shares(named)
    assert shares["named"] == pytest.approx(3 / 7) and shares["narrow"] == pytest.approx(1 / 7)
    assert sum(shares[k] for k in meaning.KINDS) == pytest.approx(1)


def test_names_and_taxonomy_must_fit_the_profiles():
    with pytest.raises(ValueError, match="class_names has 2 names, the profiles 5"):
        meaning.name_latents(_caps(np.ones((5, 2))), ["a", "b"])
    with pytest.raises(ValueError, match="taxonomy has 5 leaves, the profiles 2"):
        meaning.name_latents(_caps(np.ones((2, 2))), ["a", "b"], Taxonomy())


def test_the_embedded_wordnet_names_dogs():
    names = ["n02088364_beagle", "n02086240_Shih-Tzu", "n01440764_tench", "n03028079_church"]
    taxonomy = meaning.taxonomy_of(names)
    named = meaning.name_latents(_caps([[4.0, 0], [4, 0], [0, 4], [0, 4]]), names, taxonomy)
    assert named.table["name"].tolist() == ["dog", ""]
    assert meaning.taxonomy_of(["0", "1"]) is None


def test_classes_that_wordnet_lacks_are_said_and_do_not_stop(caplog, monkeypatch):
    monkeypatch.delenv("CAPSAE_WORDNET", raising=False)
    assert meaning.taxonomy_of(["n00000001_a", "n00000002_b"]) is None
    assert "not by WordNet" in caplog.text


@pytest.fixture(scope="module")
def planted():
    """600 rows of 3 classes: latent 0 fires for class 0 alone, 1 for classes 0 and 1, 2 anywhere, 3 never."""
    rng, labels = np.random.default_rng(0), np.repeat([0, 1, 2], 200)
    dense = np.zeros((600, 4))
    dense[:, 0] = (labels == 0) * (rng.random(600) < 0.5)
    dense[:, 1] = (labels < 2) * (rng.random(600) < 0.5)
    dense[:, 2] = rng.random(600) < 0.3
    return _codes(dense * rng.gamma(2.0, size=dense.shape)), labels


def test_permuted_labels_tell_what_is_selective(planted):
    codes, labels = planted
    p = meaning.permuted(codes, labels, 3, permutations=99)
    assert p[0] == p[1] == 0.01 and p[2] > 0.05 and np.isnan(p[3])
    q = meaning.false_discovery(p)
    assert (q[:2] <= 0.05).all() and q[2] == p[2] and np.isnan(q[3])
    # A latent that knows nothing gets a uniform p.
    null = [meaning.permuted(codes, np.random.default_rng(s).permutation(labels), 3, 39, s)[:3] for s in range(40)]
    assert 0.01 <= (np.array(null) <= 0.1).mean() <= 0.2


def test_names_are_checked_on_other_rows(planted):
    codes, labels = planted
    named = meaning.name_latents(ClassActivationProfiles.fit(codes, labels, 3), ["a", "b", "c"])
    assert named.table["kind"].tolist() == ["class", "none", "none", "dead"]
    each, summary = meaning.check_names(named, codes, labels, n_boot=50)
    fires = codes.values[:, 0] > 0
    assert each["latent"].tolist() == [0] and each["fired"][0] == fires.sum() and each["precision"][0] == 1
    assert each["recall"][0] == pytest.approx(fires.sum() / 200) and each["base"][0] == pytest.approx(1 / 3)
    cells = summary[summary["kind"] == "named"].set_index("measure")
    assert cells.loc["lift", "value"] == pytest.approx(2 / 3) and cells.loc["lift", "lo"] > 0.5
    assert cells.loc["recall", "lo"] < each["recall"][0] < cells.loc["recall", "hi"]
    assert not summary.loc[summary["kind"] == "narrow", "latents"].any()  # a class of a third of the rows is broad
    # On rows with other labels, the name is worth nothing.
    other = meaning.check_names(named, codes, np.random.default_rng(1).permutation(labels), n_boot=50)[1]
    lift = other[other["kind"] == "named"].set_index("measure").loc["lift"]
    assert lift["lo"] < 0 < lift["hi"]


def test_a_dictionary_with_cleaner_latents_has_more_names(planted):
    codes, labels = planted
    blurred = codes.dense()
    blurred[:, 0] = np.roll(blurred[:, 0], 300)
    both = {"clean": codes, "half": _codes(np.where(np.arange(4) == 0, blurred + codes.dense(), codes.dense()))}
    found = meaning.compare_shares(both, labels, ["a", "b", "c"], halves=5).set_index(["dictionary", "kind"])
    assert found.loc[("clean", "class"), "value"] == 0.25 and found.loc[("half", "class"), "value"] == 0
    assert found.loc[("half", "class"), "difference"] == 0.25 and found.loc[("half", "class"), "difference_lo"] > 0
    assert found.loc[("clean", "dead"), "value"] == 0.25
    holds = meaning.over_holds(both, labels, ["a", "b", "c"], holds=(0.4, 0.9))
    assert holds["dictionary"].unique().tolist() == ["clean", "half", "clean, labels permuted"]
    at = holds[(holds["dictionary"] == "half") & (holds["kind"] == "class")].set_index("hold")
    assert at.loc[0.9, "difference"] == 0.25 and at.loc[0.9, "difference_lo"] > 0
    alone = meaning.compare_shares(both, labels, ["a", "b", "c"], holds=(0.9,)).set_index(["dictionary", "kind"])
    gap = alone.loc[("half", "none")]  # several thresholds: wider intervals
    again = holds[(holds["dictionary"] == "half") & (holds["kind"] == "none")].set_index("hold").loc[0.9]
    assert gap["difference"] == again["difference"]
    assert again["difference_hi"] - again["difference_lo"] >= gap["difference_hi"] - gap["difference_lo"]
    wide = holds[holds["kind"] == "named"].pivot(index="hold", columns="dictionary", values="value")
    assert wide.loc[0.9, "clean"] == 0.25 and wide.loc[0.9, "clean, labels permuted"] == 0


def test_top_rows_are_those_of_the_largest_activations(planted):
    codes, labels = planted
    features = SimpleNamespace(labels=labels, ids=np.array([f"row-{i}" for i in range(600)]))
    rows = meaning.top_rows(codes, [1, 3], features, ["a", "b", "c"], n=5)
    dense = codes.dense()[:, 1]
    assert rows["row"].tolist() == np.argsort(-dense)[:5].tolist() and rows["latent"].unique().tolist() == [1]
    assert rows["id"][0] == f"row-{dense.argmax()}" and rows["class"].isin(["a", "b"]).all()
