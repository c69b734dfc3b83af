from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import small_experiment

import capsae
import capsae.features.extract
import capsae.pipeline.packs
from capsae.data.splits import check_classes, holdout_mask, stratified_mask
from capsae.detectors.baselines.pixels import pixel_controls_verdict
from capsae.features.featureset import FeatureSet
from capsae.pipeline.experiment_errors import ExperimentError
from capsae.pipeline.experiments import load_experiment
from capsae.pipeline.run import Run, load_features

METHODS = ["epd", "msp"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return small_experiment.write(tmp_path_factory.mktemp("experiment"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def run(experiment, store):
    return lambda **overrides: Run(
        experiment, {key.replace("__", "."): value for key, value in overrides.items()}, store, "cpu", progress=False
    )


# --- detectors that the data cannot feed


def test_without_pixel_statistics_their_controls_are_left_out_with_the_reason(run, tmp_path):
    one = run()
    assert "sharpness" in one.left_out() and "feature_norm" not in one.left_out()
    assert "no pixel statistics" in one.left_out()["sharpness"]
    assert "sharpness" not in one.chosen(None) and "epd" in one.chosen(None)
    with pytest.raises(ValueError, match="detector 'sharpness': pack .* holds no pixel statistics"):
        one.table(["sharpness"])


def test_with_pixel_statistics_the_controls_are_in_the_table(tmp_path, store):
    from capsae.data.images import PIXEL_STATISTICS

    rng = np.random.default_rng(0)
    sets = {name: small_experiment.features(name, n) for name, n in small_experiment.SETS.items()}
    sets = {k: replace(v, pixels=rng.lognormal(size=(len(v), len(PIXEL_STATISTICS)))) for k, v in sets.items()}
    path = small_experiment.write(tmp_path, sets)
    info = json.loads((tmp_path / "pack" / "pack.json").read_text())
    (tmp_path / "pack" / "pack.json").write_text(json.dumps(info | {"pixel_statistics": list(PIXEL_STATISTICS)}))
    one = Run(path, store=store, device="cpu", progress=False)
    assert one.left_out() == {} and "sharpness" in one.chosen(None)
    table = one.table(["msp", "sharpness", "feature_norm"])
    assert set(table["method"]) == {"msp", "sharpness", "feature_norm", "head"}
    assert not pixel_controls_verdict(table)["broken"].any()


# --- splits


def test_stratified_choices_nest_and_keep_every_class():
    labels = np.repeat([0, 1, 2], [100, 10, 1])
    small, large = stratified_mask(labels, 0.1, 0), stratified_mask(labels, 0.5, 0)
    assert [small[labels == c].sum() for c in range(3)] == [10, 1, 1]
    assert not (small & ~large).any()
    assert (stratified_mask(labels, 0.1, 1) != small).any()
    assert stratified_mask(labels, 1.0, 0).all()


def test_holdout_leaves_every_class_a_training_row():
    labels = np.repeat([0, 1, 2], [10, 2, 1])
    mask = holdout_mask(labels, 0.9, 0)
    assert [(~mask)[labels == c].sum() for c in range(3)] == [1, 1, 1]
    with pytest.raises(ValueError, match="every class has only one"):
        holdout_mask(np.arange(5), 0.1, 0)


def test_classes_without_samples_and_labels_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"here: class 1, 3 \(of 4\) has no training sample"):
        check_classes(np.array([0, 2]), 4, "here")
    with pytest.raises(ValueError, match=r"1 of 2 labels lie outside 0\.\.1, e\.g\. 7"):
        check_classes(np.array([0, 7]), 2, "here")
    check_classes(np.array([0]), 2, "here", every=False)


# --- features and head


def test_train_and_val_part_the_pack_by_class(run):
    one = run()
    train, val = one.features("train"), one.features("val")
    whole = capsae.pipeline.packs.load_pack(one.experiment.pack, "train")
    assert len(train) == 4 * 36 and len(val) == 4 * 4
    assert sorted([*train.ids, *val.ids]) == sorted(whole.ids)
    assert np.bincount(val.labels).tolist() == [4] * 4
    assert np.array_equal(run().features("val").ids, val.ids)
    assert not np.array_equal(run(val__seed=1).features("val").ids, val.ids)


def test_logits_are_the_heads(run):
    one = run()
    test = one.features("test")
    np.testing.assert_array_equal(test.logits, one.head.logits(test.cls))
    assert (test.logits.argmax(1) == test.labels).mean() > 0.9


def test_less_training_data_leaves_the_head_alone(run):
    whole, part = run(), run(train_fraction=0.25)
    assert len(part.features("train")) == 4 * 9
    assert part.digest("head") == whole.digest("head")
    np.testing.assert_array_equal(part.head.weight, whole.head.weight)
    assert part.digest("sae") != whole.digest("sae")
    assert part.caps.counts.tolist() == [9] * 4


def test_load_features_is_the_runs(experiment, store, run):
    one = load_features(load_experiment(experiment), "far/noise", device="cpu", store=store)
    assert one.digest() == run().features("far/noise").digest()
    assert capsae.load_features is load_features
    with pytest.raises(ValueError, match="far/nois'.*far/noise"):
        load_features(experiment, "far/nois", store=store)


# --- what is stored and when it is made anew


def test_a_second_run_trains_nothing(run, monkeypatch):
    first = run()
    expected = first.table(METHODS), first.history, first.caps.mean
    monkeypatch.setattr("capsae.sae.train_sae", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr("capsae.features.probe.fit_linear_probe", lambda *_, **__: pytest.fail("fitted again"))
    monkeypatch.setattr("capsae.pipeline.run.evaluate_scores", lambda *_, **__: pytest.fail("evaluated again"))
    second = run()
    assert second.table(METHODS).equals(expected[0])
    assert second.history.equals(expected[1]) and second.history.attrs["best_epoch"] == expected[1].attrs["best_epoch"]
    np.testing.assert_array_equal(second.caps.mean, expected[2])


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ({"sae__k": 5}, {"sae", "caps", "scores", "table"}),
        ({"n_boot": 10}, {"table"}),
        ({"caps__core_fraction": 0.3}, {"scores", "table"}),
        ({"caps__correct_only": True}, {"caps", "scores", "table"}),
        ({"predicted": "true"}, {"scores", "table"}),
        ({"val__seed": 5}, {"features", "head", "sae", "caps", "scores", "table"}),
        ({"detectors__knn__k": 3}, {"scores", "table"}),
        ({"title": "Another"}, set()),
    ],
)
def test_a_setting_changes_the_digests_of_what_it_reaches(run, override, changed):
    stages = ("features", "head", "sae", "caps", "scores", "table")
    base, other = run(), run(**override)
    assert {stage for stage in stages if base.digest(stage) != other.digest(stage)} == changed


def test_digests_compute_nothing(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("capsae.pipeline.packs.load_pack", lambda *_: pytest.fail("read features"))
    run = Run(experiment, store=tmp_path)
    assert len(run.digest("table")) == 64 and run.digest("table", METHODS) != run.digest("table")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no stage 'codes'"):
        run.digest("codes")


def test_provenance_names_everything(run):
    one = run()
    one.table(METHODS)
    record = one.provenance()
    assert record["experiment"] == "small" and record["seeds"] == {"experiment": 0, "sae": 0, "val": 0}
    assert set(record["digests"]) == {"features", "head", "sae", "caps", "table"} and record["device"] == "cpu"
    assert record["versions"]["torch"] and record["wall_s"]["sae"] >= 0


# --- SAE, profiles, scores


def test_the_kept_epoch_is_the_best_on_held_out_rows(run):
    history = run(sae__epochs=6, sae__lr=0.1).history
    assert history.attrs["best_epoch"] == history.loc[history["held_out_fvu"].idxmin(), "epoch"]


def test_caps_are_those_of_the_training_codes(run):
    one = run()
    train = one.features("train")
    whole = capsae.ClassActivationProfiles.fit(one.codes("train"), train.labels, 4)
    np.testing.assert_allclose(one.caps.mean, whole.mean, rtol=1e-12)
    hit = train.logits.argmax(1) == train.labels
    assert run(caps__correct_only=True).caps.counts.sum() == hit.sum()


def test_a_class_without_a_correct_row_is_refused(run, monkeypatch):
    one = run(caps__correct_only=True, sae__seed=9)
    train = one.features("train")
    one._features["train"] = replace(train, logits=np.roll(train.logits, 1, axis=1))
    with pytest.raises(ValueError, match="correct_only"):
        _ = one.caps


def test_observations_carry_labels_of_id_sets_only(run):
    one = run()
    assert one.observations("near/shifted").labels is None
    assert np.array_equal(one.observations("test").labels, one.features("test").labels)


def test_true_class_scores_id_under_its_label_and_claims_no_accuracy(run):
    base, other = run(), run(predicted="true")
    labels = base.features("test").labels
    assert np.array_equal(other.observations("test").predicted, labels)
    assert np.array_equal(other.observations("far/noise").predicted, base.observations("far/noise").predicted)
    assert "accuracy" in set(base.table(METHODS)["metric"]) and "accuracy" not in set(other.table(METHODS)["metric"])


def test_experiment_options_reach_the_detectors(run):
    one = run(caps__core_fraction=0.4, detectors__knn__k=3)
    assert one.detectors(["epd"])["epd"].core_fraction == 0.4
    assert one.detectors("knn")["knn"].k == 3


def test_the_threshold_keeps_95_percent_of_validation(run):
    one = run(val__fraction=0.5)
    scores = one.detectors(["epd"])["epd"].score(one.observations("val"))
    threshold = one.threshold("epd")
    assert 0.95 <= (scores <= threshold).mean() < 0.95 + 2 / len(scores)
    assert (scores < threshold).mean() < 0.95


def test_scores_hold_every_row_of_every_set(run):
    one = run()
    counts = one.scores(METHODS).groupby(["method", "set"])["row"].count()
    assert counts["epd", "val"] == 16 and counts["msp", "near/shifted"] == 80 and len(counts) == 8
    np.testing.assert_array_equal(
        one.scores("epd").query("set == 'test'")["score"], one.detectors("epd")["epd"].score(one.observations("test"))
    )


# --- refused before work starts


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"detectors.knn.kk": 3}, "detectors.knn.kk = 3.*known: k"),
        ({"detectors.knnn.k": 3}, "detectors.knnn: no such detector"),
        ({"pack": "nowhere"}, "no pack 'nowhere'"),
    ],
)
def test_refused_at_the_start(experiment, tmp_path, overrides, expected):
    with pytest.raises(ValueError, match=expected):
        Run(experiment, overrides, tmp_path)


def test_unknown_detector_is_refused_before_training(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("capsae.sae.train_sae", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ValueError, match="epdd"):
        Run(experiment, store=tmp_path).table(["epdd"])


def test_a_pack_of_another_backbone_or_without_a_set_is_refused(tmp_path):
    path = small_experiment.write(tmp_path)
    path.write_text(path.read_text().replace("vit_tiny_patch16_224", "vit_small_patch16_224"))
    with pytest.raises(ExperimentError, match="backbone.model = 'vit_small.*holds features made with 'vit_tiny"):
        Run(path)
    path.write_text(path.read_text().replace("vit_small", "vit_tiny").replace("far/noise", "far/other"))
    with pytest.raises(ExperimentError, match="it has no far/other"):
        Run(path)


def test_a_pack_without_a_class_is_refused(tmp_path):
    train = small_experiment.features("train", 10)
    sets = {name: small_experiment.features(name, 5) for name in small_experiment.SETS}
    path = small_experiment.write(tmp_path, sets | {"train": train.take(train.labels != 2)})
    with pytest.raises(ValueError, match=r"class 2 \(of 4\) has no training sample"):
        Run(path, store=tmp_path / "store").features("train")


# --- seeds of the SAE


def test_seeds_are_trained_together_and_are_those_of_runs_of_their_own(run, experiment, tmp_path, monkeypatch):
    import capsae.sae

    calls, train_saes = [], capsae.sae.train_saes

    def counted(x, configs, *args, **options):
        calls.append(configs)
        return train_saes(x, configs, *args, **options)

    monkeypatch.setattr("capsae.sae.train_saes", counted)
    one = Run(experiment, {"sae_seeds": 3}, tmp_path, "cpu", progress=False)
    found = one.scores_of_seeds(METHODS)
    assert [[config.seed for config in configs] for configs in calls] == [[0, 1, 2]]
    assert {name: of["test"].shape[0] for name, of in found.items()} == {"epd": 3, "msp": 1}
    assert list((tmp_path / "scratch").glob("seeds-*/*")) == []
    for seed in range(3):
        alone = run(sae__seed=seed)
        assert alone.digest("sae") == one.with_seed(seed).digest("sae")
        np.testing.assert_array_equal(
            found["epd"]["far/noise"][seed], alone.scores_of_seeds(["epd"])["epd"]["far/noise"][0]
        )
    again = Run(experiment, {"sae_seeds": 3}, tmp_path, "cpu", progress=False)
    again.scores_of_seeds(METHODS), [r.sae for r in again.seeds()]
    assert len(calls) == 1, "read from the store"
    other = Run(experiment, {"sae_seeds": 4}, tmp_path, "cpu", progress=False)
    assert [one.sae.config.seed for one in other.seeds()] == [0, 1, 2, 3]
    assert len(calls) == 1, "one alone needs no company"


def test_tables_are_means_over_seeds_and_tell_how_many(run):
    one, alone = run(sae_seeds=3), [run(sae__seed=seed) for seed in range(3)]
    table = one.table(METHODS).set_index(["method", "set", "group", "metric"])
    key = ("epd", "mean", "all", "auroc")
    values = [r.table(METHODS).set_index(["method", "set", "group", "metric"])["value"][key] for r in alone]
    assert table.loc[key, "value"] == pytest.approx(np.mean(values)) and table.loc[key, "seeds"] == 3
    assert table.loc["msp"]["seeds"].eq(1).all() and one.digest("table", METHODS) != alone[0].digest("table", METHODS)
    dots = one.seed_values(METHODS)
    dots = dots[(dots["method"] == "epd") & (dots["metric"] == "auroc")]
    np.testing.assert_allclose(dots["value"], values)
    compared = one.compare([("epd", "msp")], METHODS, n_boot=50).set_index(["set", "metric"])
    difference = table.loc[key, "value"] - table.loc[("msp", "mean", "all", "auroc"), "value"]
    assert compared.loc[("mean", "auroc"), "value"] == pytest.approx(difference)
    scores = one.scores(METHODS)
    assert scores.equals(alone[0].scores(METHODS)) and set(scores["set"]) == {
        "val",
        "test",
        "near/shifted",
        "far/noise",
    }
    assert one.provenance()["seeds"]["sae"] == "0 to 2"


# --- from images


@pytest.fixture
def images(tmp_path, monkeypatch):
    """An experiment of image folders, and an extractor that only looks at mean colours."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for folder, classes in {"train": "abcd", "test": "abcd", "shifted": "x", "noise": "y"}.items():
        for c, name in enumerate(classes):
            (tmp_path / folder / name).mkdir(parents=True)
            for row in range(6):
                colour = rng.integers(0, 40, size=3) + 60 * c
                Image.new("RGB", (8, 8), tuple(map(int, colour))).save(tmp_path / folder / name / f"{row}.png")
    calls = []

    def extract(source, backbone, out_dir, *, device, name, progress):
        calls.append(name)
        assert out_dir.is_dir()
        cls = np.stack([np.tile(np.asarray(source.image(i)).mean((0, 1)), 6)[:16] for i in range(len(source))])
        return FeatureSet(cls, source.labels, source.ids, name=name, class_names=source.class_names)

    monkeypatch.setattr(capsae.features.extract, "extract", extract)
    path = tmp_path / "folders.toml"
    path.write_text(small_experiment.TOML.format(pack='"none"'))
    return path, calls


def test_folders_are_extracted_once_and_read_afterwards(images, tmp_path):
    path, calls = images
    run = Run(path, store=tmp_path / "store", device="cpu", progress=False)
    assert len(run.features("train")) == 20 and len(run.features("val")) == 4
    assert run.features("near/shifted").labels.tolist() == [0] * 6
    again = Run(path, store=tmp_path / "store", device="cpu", progress=False)
    assert again.features("train").digest() == run.features("train").digest()
    assert calls == ["train", "near/shifted"]
    assert again.image("train", 3).size == (8, 8)
    assert np.asarray(again.image("val", 0)).mean() == pytest.approx(again.features("val").cls[0, :3].mean())
    assert not any((tmp_path / "store" / "scratch").iterdir())


def test_a_class_without_images_stops_before_extraction(images, tmp_path):
    import shutil

    path, calls = images
    shutil.rmtree(tmp_path / "train" / "d")
    run = Run(path, store=tmp_path / "store", progress=False)
    for set_name in ("train", "near/shifted"):
        with pytest.raises(ValueError, match=r"train: class 3 \(of 4\) has no training sample"):
            run.features(set_name)
    assert calls == []


def test_labels_beyond_n_classes_stop_before_extraction(images, tmp_path):
    path, calls = images
    with pytest.raises(ValueError, match=r"labels lie outside 0\.\.2"):
        Run(path, {"n_classes": 3}, tmp_path / "store").features("test")
    assert calls == []


def test_another_image_is_another_digest(images, tmp_path):
    from PIL import Image

    path, _ = images
    before = Run(path, store=tmp_path / "store").digest("features")
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "a" / "new.png")
    assert Run(path, store=tmp_path / "store").digest("features") != before


def test_unknown_backbone_is_refused_with_near_names(images, tmp_path):
    path, _ = images
    with pytest.raises(
        ExperimentError, match="backbone.model = 'deit_tinny_patch16_224'.*did you mean.*deit_tiny_patch16_224"
    ):
        Run(path, {"backbone.model": "deit_tinny_patch16_224"}, tmp_path / "store")
    with pytest.raises(ExperimentError, match="torchvision/vit_b_16"):
        Run(path, {"backbone.model": "torchvision/vit_b_17"}, tmp_path / "store")


def test_a_killed_training_goes_on_where_it_stood(experiment, tmp_path, monkeypatch):
    from capsae.sae.checkpoint import Checkpoint
    from capsae.sae.kernels.cpu_step import CompiledStep as Step

    class Killed(Exception):
        pass

    def save(self, *state, original=Checkpoint.save):
        original(self, *state)
        raise Killed

    whole = Run(experiment, None, tmp_path / "whole", "cpu", progress=False)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Checkpoint, "due", property(lambda self: self.identity and len(steps) == 3))
        patched.setattr(Checkpoint, "save", save)
        steps = []
        patched.setattr(Step, "update_average", lambda _: steps.append(1))
        _ = Run(experiment, None, tmp_path / "killed", "cpu", progress=False).sae
    assert [f.name for f in tmp_path.glob("killed/scratch/sae-*/*")] == ["cpu-1.safetensors"]
    counted, original = [], Step.update_average
    monkeypatch.setattr(Step, "update_average", lambda s: counted.append(1) or original(s))
    resumed = Run(experiment, None, tmp_path / "killed", "cpu", progress=False)
    _ = resumed.sae
    rest = len(counted)
    _ = whole.sae
    assert len(counted) == rest + 3 + rest  # no step was made twice
    for name, value in whole.sae.state_dict().items():
        assert (value == resumed.sae.state_dict()[name]).all(), name
    assert not list(tmp_path.glob("killed/scratch/*"))


# --- other sparse autoencoders


@pytest.mark.parametrize("name", ["topk", "batch_topk", "gsae", "mp", "abs_topk"])
def test_a_run_with_any_variant_goes_from_training_to_scores(run, name, tmp_path):
    from capsae.sae import load
    from capsae.sae.variants import thresholds as variants

    one = run(sae__variant=name)
    assert type(one.sae) is variants.REGISTRY[name]
    assert one.caps.n_latents == one.sae.n_latents == (96 if name == "abs_topk" else 48)
    table = one.table(["epd", "msp"])
    assert set(table["method"]) == {"epd", "msp", "head"}
    assert np.isfinite(table.loc[table["metric"].isin(["fpr95_ood_pos", "fpr95_id_pos", "auroc"]), "value"]).all()
    codes, again = one.codes("test"), load(one.sae.save(tmp_path)).encode(one.features("test").cls)
    np.testing.assert_array_equal(again.values, codes.values)
    np.testing.assert_array_equal(again.indices, codes.indices)


def test_a_variant_is_another_sae_and_its_options_count(run):
    digests = {
        run().digest("sae"),
        run(sae__variant="gsae").digest("sae"),
        run(sae__variant="gsae", sae__options__beta=2.0).digest("sae"),
    }
    assert len(digests) == 3 and run(sae__variant="topk").digest("sae") in digests
    with pytest.raises(ExperimentError, match="has no option 'alpha'; it has beta"):
        run(sae__variant="gsae", sae__options__alpha=2.0)
    with pytest.raises(ExperimentError, match="variant is 'top_q'"):
        run(sae__variant="top_q")
