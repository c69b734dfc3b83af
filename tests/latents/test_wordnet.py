"""The taxonomy of WordNet: facts that anybody can look up, and the extract that is made again where WordNet lies."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from capsae.latents import wordnet
from capsae.pipeline.packs import load_pack
from companion.chapters.ontology import make_wordnet

DEBIAN = Path("/usr/share/wordnet")
BEAGLE, DALMATIAN, FOX, TENCH, CHURCH = "n02088364", "n02110341", "n02120079", "n01440764", "n03028079"
DOG, HOUND, CANINE, CARNIVORE, VERTEBRATE, ENTITY = (
    *("n02084071", "n02087551", "n02083346", "n02075296", "n01471682", "n00001740"),
)  # fmt: skip


@pytest.fixture(scope="module")
def mini():
    return wordnet.load([wordnet.wnid(name) for name in load_pack("mini80", "train").class_names])


def _fake(folder, notice="  1 WordNet 3.0 Copyright 2006 by Princeton University.\n"):
    """A small data.noun: a city that is an instance of a place and a kind of thing, a village, a hidden verb."""
    lines = [
        "00000001 03 n 01 entity 0 000 | all",
        "00000002 03 n 01 place 0 001 @ 00000001 n 0000 | where | with a bar",
        "00000003 03 n 02 big_thing 0 large_thing 1 002 @ 00000001 n 0000 ~ 00000004 n 0000 | large",
        "00000004 15 n 01 Rome 0 003 @i 00000002 n 0000 @ 00000003 n 0000 %p 00000009 n 0000 | a city",
        "00000005 15 n 0a " + " ".join(f"village{i} 0" for i in range(10)) + " 001 @ 00000002 n 0000 | a village",
    ]
    (folder / "data.noun").write_text(notice + "\n".join(lines) + "\n")
    return folder


def test_beagle_is_a_hound_is_a_dog_is_a_carnivore():
    of = wordnet.load([BEAGLE, DALMATIAN, FOX, TENCH, CHURCH])
    assert {BEAGLE, HOUND, DOG, CANINE, CARNIVORE, VERTEBRATE, ENTITY} <= of.ancestors(BEAGLE)
    assert [of.name(s) for s in (BEAGLE, HOUND, DOG, CARNIVORE, CHURCH)] == [
        *("beagle", "hound", "dog", "carnivore", "church"),
    ]  # fmt: skip
    assert DOG not in of.ancestors(FOX) and CARNIVORE in of.ancestors(FOX)
    assert of.members(DOG).tolist() == [True, True, False, False, False]
    assert of.members(VERTEBRATE).tolist() == [True, True, True, True, False]
    assert of.depth(ENTITY) == 0 < of.depth(VERTEBRATE) < of.depth(CARNIVORE) < of.depth(DOG) < of.depth(BEAGLE)
    # beagle - hound - hunting dog - dog - dalmatian; beagle ... dog - canine - fox - Arctic fox
    distance = of.path_distance()
    assert distance[0, 1] == 4 and distance[0, 2] == 6 and distance[1, 2] == 4


def test_synsets_divide_the_classes_and_each_division_is_asked_once(mini):
    sets = [mini.members(synset) for synset in mini.synsets]
    assert all(2 <= members.sum() < len(mini.leaves) for members in sets)
    assert len({members.tobytes() for members in sets}) == len(sets) == 43
    assert [mini.depth(s) for s in mini.synsets] == sorted(mini.depth(s) for s in mini.synsets)
    names = [mini.name(synset) for synset in mini.synsets]
    assert {"dog", "bird", "artifact", "carnivore"} <= set(names) and len(set(names)) == len(names)
    # mammal, placental and so on have the same 18 classes here: the lowest stands for them
    assert "placental" in names and "mammal" not in names
    placental = mini.synsets[names.index("placental")]
    mammal = next(s for s in mini.ancestors(placental) if mini.name(s) == "mammal")
    assert (mini.members(mammal) == mini.members(placental)).all() and mini.depth(mammal) < mini.depth(placental)


def test_path_distance_is_a_count_of_links_by_way_of_common_ancestors(mini):
    distance = mini.path_distance()
    assert (distance == distance.T).all() and (np.diag(distance) == 0).all() and distance.dtype.kind == "i"

    def climb(synset):  # every way up, by recursion: no shared code
        ways = {synset: 0}
        for parent in mini.parents[synset]:
            for above, links in climb(parent).items():
                ways[above] = min(links + 1, ways.get(above, 99))
        return ways

    ways = [climb(leaf) for leaf in mini.leaves[::7]]
    for i, j in combinations(range(len(ways)), 2):
        shortest = min(ways[i][s] + ways[j][s] for s in ways[i].keys() & ways[j].keys())
        assert distance[7 * i, 7 * j] == shortest > 0


def test_every_class_of_the_packs_is_in_the_extract_with_all_above_it():
    found = wordnet.embedded()
    assert found["wnids"] == make_wordnet.packed_wnids() and len(found["wnids"]) == 1000
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in found["licence"]
    assert "appear on ALL copies" in " ".join(found["licence"].split())
    above = {parent for of in found["synsets"].values() for parent in of["hypernyms"]}
    assert above | set(found["wnids"]) == set(found["synsets"])
    assert [s for s, of in found["synsets"].items() if not of["hypernyms"]] == [ENTITY]
    assert wordnet.EXTRACT.stat().st_size < 200_000


@pytest.mark.skipif(not (DEBIAN / "data.noun").is_file(), reason="needs Debian's package wordnet-base")
def test_the_extract_is_what_wordnet_gives_today(tmp_path):
    assert wordnet.extract(DEBIAN, make_wordnet.packed_wnids()) == wordnet.embedded()
    again = make_wordnet.write_extract(DEBIAN, make_wordnet.packed_wnids(), tmp_path / "again.json")
    assert again.read_bytes() == wordnet.EXTRACT.read_bytes()


def test_a_folder_serves_other_classes(tmp_path, monkeypatch):
    folder = _fake(tmp_path)
    rome, village = "n00000004", "n00000005"
    of = wordnet.load([rome, village], folder)
    assert of.ancestors(rome) == {rome, "n00000001", "n00000002", "n00000003"}  # an instance of a place, a big thing
    assert of.name("n00000003") == "big thing" and len(of.lemmas[village]) == 10
    assert of.path_distance().tolist() == [[0, 2], [2, 0]]
    assert "licence" in wordnet.extract(folder, [rome])
    monkeypatch.delenv(wordnet.FOLDER, raising=False)
    with pytest.raises(ValueError, match="n00000004 .* CAPSAE_WORDNET"):
        wordnet.load([BEAGLE, rome])
    monkeypatch.setenv(wordnet.FOLDER, str(folder))
    assert wordnet.load([rome, village]).lemmas == of.lemmas
    assert wordnet.load([BEAGLE]).name(BEAGLE) == "beagle"  # what the extract knows needs no folder
    with pytest.raises(ValueError, match=f"no synset {BEAGLE}"):
        wordnet.load([BEAGLE, rome])


def test_what_is_no_synset_is_refused(tmp_path):
    for wrong, message in (
        ([], "no synsets"),
        ([None], "None is no noun"),
        (["tench"], "'tench' is no"),
        ([TENCH] * 2, "twice"),
    ):
        with pytest.raises(ValueError, match=message):
            wordnet.load(wrong)
    of = wordnet.load([BEAGLE, TENCH])
    for ask in (of.name, of.members, of.depth, of.ancestors):
        with pytest.raises(ValueError, match="n03028079"):
            ask(CHURCH)
    with pytest.raises(FileNotFoundError, match="data.noun"):
        wordnet.extract(tmp_path, [BEAGLE])
    _fake(tmp_path, "  1 WordNet 3.1 Copyright 2011 by Princeton University.\n")
    with pytest.raises(ValueError, match="3.1.*WordNet 3.0 alone"):
        wordnet.extract(tmp_path, ["n00000001"])


def test_class_names_give_their_synset():
    assert wordnet.wnid("n01440764_tench") == wordnet.wnid("n01440764") == TENCH
    for name in ("tench", "n0144", "n014407645_x", "xn01440764_tench", "7"):
        assert wordnet.wnid(name) is None
