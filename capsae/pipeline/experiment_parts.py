"""The parts of an experiment: sources of images, validation rows, profiles of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag


class Part(BaseModel):
    """A table of an experiment: unknown keys and other types are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Source(Part):
    classes: tuple[str, ...] | None = None  # keep these classes only, in this order
    limit: int | None = Field(None, ge=1)  # at most so many images, evenly spaced over the source
    exclude: str | None = None  # file that names images to leave out: a text file, or a .csv with a column id
    crop: float | None = Field(None, gt=0, le=1)  # in place of the backbone's, for a set whose images are cut already
    exif: bool | None = None  # false: images as they are stored, not turned as their EXIF orientation says


class Hub(_Source):
    """A Hugging Face data set."""

    kind: Literal["hub"]
    name: str
    config: str | None = None
    split: str
    image: str | None = None  # columns; None: found by type and name
    label: str | None = None
    id: str | None = None


class Parquet(_Source):
    """A local parquet file, a folder of them or a glob pattern, in the hub's layout."""

    kind: Literal["parquet"]
    path: str
    image: str | None = None
    label: str | None = None
    id: str | None = None


class ImageFolder(_Source):
    """``path/<class>/<image>``, or a flat folder of images without labels."""

    kind: Literal["folder"]
    path: str


class ImgList(_Source):
    """OpenOOD's image lists: lines of ``<path under root> <label>``."""

    kind: Literal["imglist"]
    list: str
    root: str
    class_names: tuple[str, ...] | None = None


class Builtin(_Source):
    """Images that installed packages carry or that are drawn: see ``capsae.data.builtin``."""

    kind: Literal["builtin"]
    name: str
    seed: int = 0


class Holdout(Part):
    """ID validation rows held out of train, stratified by class; "train" then excludes them."""

    fraction: float = Field(0.1, gt=0, lt=1)
    seed: int = Field(0, ge=0)


def _kind(value: Any) -> Any:
    return value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)


Source = Annotated[Hub | Parquet | ImageFolder | ImgList | Builtin, Discriminator("kind")]
Validation = Annotated[
    Annotated[Hub, Tag("hub")]
    | Annotated[Parquet, Tag("parquet")]
    | Annotated[ImageFolder, Tag("folder")]
    | Annotated[ImgList, Tag("imglist")]
    | Annotated[Builtin, Tag("builtin")]
    | Annotated[Holdout, Tag("holdout")],
    Discriminator(lambda value: _kind(value) or "holdout"),
]


class CapConfig(Part):
    """How class activation profiles are made and cut."""

    core_fraction: float = Field(0.15, gt=0, le=1)  # the paper's p: L = p * D
    correct_only: bool = False  # only training rows that the head predicts correctly


def path_fields(source: _Source | Holdout) -> tuple[str, ...]:
    """Return the keys of a source that name files or folders."""
    own = {Parquet: ("path",), ImageFolder: ("path",), ImgList: ("list", "root")}.get(type(source), ())
    return (*own, "exclude") if getattr(source, "exclude", None) else own
