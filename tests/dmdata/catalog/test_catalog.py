"""The catalog holds the release as it is known, says how each fact is known, and takes nothing unsafe."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small_release import document, write_catalog

import dmdata
from dmdata.catalog.entries import Basis, Catalog, StoredArray, bundled, load_file
from dmdata.errors import CatalogError
from dmdata.money.prices import GIB

MODELS = {
    ("cifar", 10): 1_500_000,
    ("cifar", 20): 750_000,
    ("cifar", 50): 300_000,
    ("cifar", 75): 600_000,
    ("fmow", 20): 375_000,
    ("fmow", 50): 150_000,
    ("fmow", 75): 300_000,
}
SIZES = {"cifar": (50_000, 10_000, 10), "fmow": (21_404, 3_138, 62)}
ITEM_BYTES = {"bool": 1, "float16": 2}


def expected_arrays() -> dict[str, tuple[tuple[int, ...], str, str]]:
    """Name, shape, dtype and key of every ``.npy`` of the release, from the publisher's table."""
    table = {}
    for (dataset, percent), n_fitting in MODELS.items():
        n_models = n_fitting + 10_000
        n_train, n_test, n_classes = SIZES[dataset]
        arrays = {
            "train_masks": ((n_models, n_train), "bool"),
            "test_margins": ((n_models, n_test), "float16"),
            "train_margins": ((n_models, n_train), "float16"),
        }
        if dataset == "cifar":
            arrays["test_logits"] = ((n_models, n_test, n_classes), "float16")
            arrays["train_logits"] = ((n_models, n_train, n_classes), "float16")
        for array, (shape, dtype) in arrays.items():
            table[f"{dataset}/{percent}pct/{array}"] = (shape, dtype, f"{dataset}/data/{array}_{percent}pct.npy")
    return table


def toy(**changes: Any) -> dict[str, Any]:
    """Document of a catalog of one array, its entry changed."""
    about = document({"toy/50pct/test_margins": np.zeros((4, 3), np.float16)}, url=".", requester_pays=False)
    about["datasets"]["toy"]["alphas"]["50pct"]["arrays"]["test_margins"].update(changes)
    return about


def parse(about: dict[str, Any], origin: str = "/somewhere/catalog.yaml") -> Catalog:
    return Catalog.parse(yaml.safe_dump(about), origin=origin)


def test_every_npy_of_the_release_is_listed_with_its_shape_dtype_key_and_bytes() -> None:
    listed = {a.name: a for a in bundled().artifacts() if a.stored.format == "npy"}
    expected = expected_arrays()
    assert set(listed) == set(expected)
    for name, (shape, dtype, key) in expected.items():
        artifact = listed[name]
        assert artifact.schema is not None
        assert artifact.schema.shape == shape
        assert artifact.schema.dtype == dtype
        assert len(artifact.schema.dims) == len(shape)
        assert artifact.stored.key == key
        assert artifact.n_bytes == math.prod(shape) * ITEM_BYTES[dtype] + 128
        assert artifact.url == f"s3://madrylab-datamodels/{key}"


def test_only_the_datamodels_that_exist_are_listed() -> None:
    listed = {a.name: a for a in bundled().artifacts() if a.stored.format == "pt"}
    names = {f"{dataset}/{percent}pct/test_datamodels" for dataset, percent in MODELS}
    assert set(listed) == names | {"cifar/50pct/train_datamodels"}
    for name, artifact in listed.items():
        n_train, n_test, _ = SIZES[artifact.dataset]
        n_targets = n_train if name.endswith("/train_datamodels") else n_test
        shapes = {member: (schema.shape, schema.dtype) for member, schema in artifact.stored.members.items()}
        assert shapes == {
            "weight": ((n_train, n_targets), "float32"),
            "bias": ((n_targets,), "float32"),
            "lam": ((n_targets,), "float32"),
        }
        assert artifact.n_bytes >= 4 * n_targets * (n_train + 2)
    assert listed["cifar/75pct/test_datamodels"].stored.key == "cifar/datamodels/test_75pct.pt"
    assert listed["cifar/50pct/train_datamodels"].stored.key == "cifar/datamodels/train_50pct.pt"


def test_rows_are_those_for_fitting_then_ten_thousand_for_evaluation() -> None:
    for artifact in bundled().artifacts():
        n_fitting = MODELS[artifact.dataset, int(artifact.alpha_name.removesuffix("pct"))]
        assert artifact.rows.fit == (0, n_fitting)
        assert artifact.rows.evaluation == (n_fitting, n_fitting + 10_000)
        if artifact.stored.shape is not None:
            assert artifact.stored.shape[0] == n_fitting + 10_000


def test_sizes_order_terms_and_citation_are_known() -> None:
    catalog = bundled()
    for name, (n_train, n_test, n_classes) in SIZES.items():
        entry = catalog.datasets[name]
        assert (entry.n_train, entry.n_test, entry.n_classes) == (n_train, n_test, n_classes)
    assert catalog.datasets["cifar"].example_order == "CIFAR-10's own"
    for words in ("2012", "id_test", "time_after_2016"):
        assert words in catalog.datasets["fmow"].example_order
    assert catalog.source.requester_pays
    assert catalog.source.region is None, "nobody published it: the bucket must be asked"
    assert catalog.citation is not None
    assert "ilyas2022datamodels" in catalog.citation


def test_every_fact_says_how_it_is_known() -> None:
    facts = {"key", "format", "shape", "dtype", "dims", "n_bytes", "rows"}
    for artifact in bundled().artifacts():
        known = facts if artifact.stored.format == "npy" else {"key", "format", "n_bytes", "rows"}
        assert set(artifact.basis) == known, artifact.name
        assert all(isinstance(basis, Basis) for basis in artifact.basis.values())
        assert Basis.MEASURED not in artifact.basis.values(), "nothing was measured on the release yet"
    logits = bundled().find("cifar/10pct/train_logits")
    assert logits.basis["shape"] is Basis.INFERRED, "the page prints another shape, a misprint"


def test_the_published_sizes_are_reproduced() -> None:
    catalog = bundled()
    assert len(catalog.published_sizes) == 13
    for size in catalog.published_sizes:
        derived = sum(artifact.n_bytes for artifact in catalog.match(size.artifacts)) / GIB
        logits = all("logits" in pattern for pattern in size.artifacts)
        assert derived == pytest.approx(size.gib, rel=0.002 if logits else 0.045), size


def test_the_publishers_totals_come_out_within_two_percent() -> None:
    everything = dmdata.estimate(["cifar/**", "fmow/**"])
    without_logits = dmdata.estimate(["cifar/**", "fmow/**"], exclude=["**/*_logits"])
    assert everything.usd == pytest.approx(374, rel=0.02)
    assert without_logits.usd == pytest.approx(53, rel=0.02)
    assert everything.usd_low < everything.usd <= everything.usd_high


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar/20pct/train_datamodels", "CIFAR at 50% alone"),
        ("cifar/20pct/train_datamodels/weight", "CIFAR at 50% alone"),
        ("fmow/50pct/train_datamodels/weight", "CIFAR at 50% alone"),
        ("fmow/50pct/test_logits", "CIFAR alone"),
        ("fmow/10pct/test_margins", "choose 20%, 50% or 75%"),
        ("fmow/10pct/test_datamodels/lam", "choose 20%, 50% or 75%"),
    ],
)
def test_what_does_not_exist_gives_the_reason(name: str, words: str) -> None:
    with pytest.raises(CatalogError, match=re.escape(f"{name} was never released")) as caught:
        bundled().find(name)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest", "words"),
    [
        ("cifra/50pct/test_margins", "cifar", "dataset 'cifra'"),
        ("cifar/30pct/test_margins", "cifar/50pct", "alpha 30% is not released for cifar; choose 10%, 20%, 50% or 75%"),
        ("cifar/50pct/test_margin", "cifar/50pct/test_margins", "nearest: cifar/50pct/test_margins"),
        ("cifar/50pct/masks", "cifar/50pct/train_masks", "cifar/50pct/train_masks"),
        ("cifar/50pct/test_datamodels/weights", "cifar/50pct/test_datamodels/weight", "dmdata ls"),
        ("", "cifar", "dataset ''"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str, words: str) -> None:
    with pytest.raises(CatalogError) as caught:
        bundled().find(name)
    assert nearest in caught.value.nearest
    assert words in str(caught.value)


@settings(max_examples=25)
@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_name_is_found_or_refused_in_words(name: str) -> None:
    for look_up in (bundled().find, bundled().match):
        try:
            look_up(name)
        except CatalogError as error:
            assert str(error)  # noqa: PT017 - a name may also be found


def test_globs_stop_at_a_slash_and_two_stars_do_not() -> None:
    catalog = bundled()
    assert [a.name for a in catalog.match("cifar/50pct/*_margins")] == [
        "cifar/50pct/test_margins",
        "cifar/50pct/train_margins",
    ]
    everything = list(catalog.artifacts())
    assert catalog.match("**") == catalog.match(["cifar/**", "fmow/**"]) == everything
    assert catalog.match("*/*/*") == everything
    assert len(catalog.match("**/weight")) == 8
    assert len(catalog.match("**", exclude=["cifar/**"])) == 3 * 4
    with pytest.raises(CatalogError):
        catalog.match("cifar/*margins")


def test_a_pt_and_its_members_are_counted_once() -> None:
    whole, *rest = bundled().match(["cifar/50pct/test_datamodels/*", "cifar/50pct/test_datamodels"])
    assert (whole.member, rest) == (None, [])
    members = bundled().match("cifar/50pct/test_datamodels/*")
    assert [artifact.member for artifact in members] == ["weight", "bias", "lam"]
    assert {artifact.object_name for artifact in members} == {whole.name}
    assert [artifact.n_bytes for artifact in members] == [2_000_000_000, 40_000, 40_000]


def test_a_catalog_written_and_read_again_is_the_same() -> None:
    for catalog in (bundled(), parse(toy())):
        text = catalog.dump()
        assert Catalog.parse(text, origin="/elsewhere/catalog.yaml") == catalog
        assert "&id" not in text


@pytest.mark.parametrize(
    "key",
    ["../x.npy", "a/../../x.npy", "/etc/x.npy", "a\\..\\x.npy", "C:/x.npy", "s3://other/x.npy", "", "a\n.npy", "a\0b"],
)
def test_a_key_that_could_leave_its_source_is_refused(key: str) -> None:
    with pytest.raises(CatalogError, match="key"):
        parse(toy(key=key))


@pytest.mark.parametrize("name", ["..", "a/b", "", ".hidden", "a b", "-x", "a\\b"])
def test_a_name_that_could_leave_its_folder_is_refused(name: str) -> None:
    for part in ("dataset", "alpha", "array"):
        about = toy()
        parent = about["datasets"]
        if part != "dataset":
            parent = parent["toy"]["alphas"]
        if part == "array":
            parent = parent["50pct"]["arrays"]
        parent[name] = parent.popitem()[1]
        with pytest.raises(CatalogError, match="not a valid catalog"):
            parse(about)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_byte": 3}, "n_byte"),
        ({"n_bytes": -1}, "n_bytes"),
        ({"n_bytes": "many"}, "many"),
        ({"n_bytes": math.inf}, "n_bytes"),
        ({"n_bytes": 20}, "less than the 24"),
        ({"shape": [4]}, "1 sizes but 2 dims"),
        ({"shape": [-4, 3]}, "shape"),
        ({"shape": None}, "shape"),
        ({"dtype": "object"}, "plain number"),
        ({"dtype": "float17"}, "float17"),
        ({"dtype": "i4,i4"}, "plain number"),
        ({"format": "exe"}, "format"),
        ({"format": "pt"}, "members"),
        ({"basis": {}}, "no basis for"),
        ({"note": ["a"]}, "note"),
    ],
)
def test_a_wrong_field_is_refused_by_name_with_its_value(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CatalogError, match=re.escape(words)) as caught:
        parse(toy(**change))
    assert "/somewhere/catalog.yaml" in str(caught.value)


def test_a_basis_for_what_is_no_fact_is_refused() -> None:
    basis = dict.fromkeys(["key", "format", "shape", "dtype", "dims", "n_bytes", "colour"], "measured")
    with pytest.raises(CatalogError, match="colour"):
        parse(toy(basis=basis))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "just words",
        "a: [",
        "\t- x",
        "a: \x00",
        "title: &a x\ncitation: *a",
        "a: &a [*a]",
        "x: !!python/object/apply:os.system ['touch {marker}']",
        "!!python/name:os.system ''",
        "? [a, b]\n: c",
        "version: !!int ''",
        "version: !!int x",
        "version: !!float ''",
        "version: !!bool maybe",
        "version: !!timestamp x",
        "version: !!binary =",
        "[" * 5000,
        "version: " + "9" * 5000,
        "--- {}\n--- {}",
    ],
)
def test_text_that_is_no_safe_catalog_is_refused_and_runs_nothing(text: str, tmp_path: Path) -> None:
    marker = tmp_path / "was_run"
    with pytest.raises(CatalogError, match=r"weird\.yaml is not a"):
        Catalog.parse(text.replace("{marker}", str(marker)), origin="weird.yaml")
    assert not marker.exists()


@given(st.text(st.characters(codec="utf-8"), max_size=60) | st.text("[]{}:!&*?|>-'\"#%@, \nab1", max_size=30))
def test_no_text_gets_past_the_catalogs_schema(text: str) -> None:
    with pytest.raises(CatalogError):
        Catalog.parse(text, origin="fuzz.yaml")


def test_a_relative_source_starts_in_the_catalogs_folder(tmp_path: Path) -> None:
    about = toy()
    path = write_catalog(about, tmp_path)
    assert load_file(path).source.url == str(tmp_path)
    assert load_file(tmp_path) == load_file(path)
    about["source"]["url"] = "objects"
    assert parse(about, "s3://bucket/run/catalog.yaml").source.url == "s3://bucket/run/objects"
    assert parse(about, "catalog.yaml").source.url == "./objects"
    about["source"]["url"] = "s3://other/place"
    assert parse(about).source.url == "s3://other/place"


def test_a_relative_source_may_not_climb_out_of_the_catalogs_folder() -> None:
    about = toy()
    about["source"]["url"] = "../elsewhere"
    with pytest.raises(CatalogError, match=r"\.\./elsewhere"):
        parse(about)


def test_a_catalog_that_cannot_be_read_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=str(tmp_path / "none.yaml")):
        load_file(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CatalogError, match=r"binary\.yaml"):
        load_file(tmp_path / "binary.yaml")


def test_the_environment_chooses_the_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMDATA_CATALOG", write_catalog(toy(), tmp_path))
    assert list(dmdata.load_catalog().datasets) == ["toy"]
    assert dmdata.load_catalog(bundled()) is bundled()
    assert list(dmdata.load_catalog(tmp_path).datasets) == ["toy"]


def test_a_sha256_needs_no_basis_and_survives() -> None:
    catalog = parse(toy(sha256="ab" * 32))
    (artifact,) = catalog.artifacts()
    assert isinstance(artifact.stored, StoredArray)
    assert artifact.stored.sha256 == "ab" * 32
