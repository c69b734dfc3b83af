"""The prediction is of the score as it was when it was stated."""

from pathlib import Path

from capsae.detectors import base, create, rpd
from capsae.detectors.baselines import distances
from capsae.pipeline.code import digest

PAGE = Path(__file__).resolve().parents[2] / "book" / "prediction.md"


def test_the_prediction_names_the_code_that_is_here():
    classes = (rpd.RPD, rpd.RPDPlus, distances.SoftRMDSPlusPlus)
    methods = [getattr(one, name) for one in classes for name in ("fit", "score", "_score") if name in vars(one)]
    found = digest(*classes, *methods, without=(base.create, base.register))[:16]
    assert f"`{found}`" in PAGE.read_text(), f"the score's code is {found}: state what this one is predicted to reach"
    assert create("rpd+").options == {"temperature": 2.0, "epsilon": 0.03}
