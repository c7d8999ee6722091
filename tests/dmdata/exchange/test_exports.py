"""A catalog in the forms that other tools read: what it says is there, and nothing that it does not say."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from small_release import write_locally

import dmdata
from dmdata.catalog.entries import load_file
from dmdata.cli.command import main

NAME = "toy/50pct/test_margins"
FORMS = ("croissant", "intake", "datapackage")
BUNDLED = dmdata.load_catalog("")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local release of one array, whose digest is known, and its catalog."""
    catalog = Path(write_locally({NAME: np.arange(12, dtype=np.float16).reshape(4, 3)}, tmp_path / "release"))
    document = yaml.safe_load(catalog.read_text())
    document["datasets"]["toy"]["alphas"]["50pct"]["arrays"]["test_margins"]["sha256"] = "ab" * 32
    catalog.write_text(yaml.safe_dump(document))
    return catalog.parent


def exported(form: str, **where: Any) -> dict[str, Any]:
    text = dmdata.export_catalog(form, **where)
    document: dict[str, Any] = yaml.safe_load(text) if form == "intake" else json.loads(text)
    return document


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["catalog", "export", *arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_each_object_of_the_release_is_in_croissant_with_its_address_and_size() -> None:
    document = exported("croissant", catalog="")
    files = {each["@id"]: each for each in document["distribution"]}
    assert list(files) == [artifact.name for artifact in BUNDLED.artifacts()]
    for artifact in BUNDLED.artifacts():
        file = files[artifact.name]
        assert file["contentUrl"] == artifact.url
        assert file["contentSize"] == f"{artifact.stored.n_bytes} B"
        assert file["dmdata_basis"] == artifact.stored.basis
        assert file.get("dmdata_shape") == (list(artifact.schema.shape) if artifact.schema else None)
    assert files["cifar/50pct/test_datamodels"]["dmdata_members"]["weight"]["shape"] == [50_000, 10_000]


def test_what_the_catalog_does_not_say_is_not_in_any_form_and_the_gap_is_stated() -> None:
    unsaid = re.compile(r"^ *\"?(?:licenses?|creator|contributors|datePublished|sha256|hash)\"?:", re.MULTILINE)
    for form in FORMS:
        assert not unsaid.findall(dmdata.export_catalog(form, catalog=""))
    croissant, package = exported("croissant", catalog=""), exported("datapackage", catalog="")
    assert croissant["isLiveDataset"] is True
    assert "The checksums of 37 of 37 files are not known" in croissant["description"]
    assert "checksums of 37 of 37" in package["description"]
    assert not any("sha256" in each for each in croissant["distribution"])
    assert not any("hash" in each for each in package["resources"])


@pytest.mark.parametrize("form", FORMS)
def test_that_readers_pay_is_said_in_every_form(form: str) -> None:
    document = exported(form, catalog="")
    about = document["metadata"] if form == "intake" else document
    assert "requester pays" in about["description"]
    release = about["dmdata_release" if form == "croissant" else "release"]
    assert release["source"]["requester_pays"] is True
    assert release["datasets"]["cifar"]["alphas"]["50pct"]["rows"]["fit"] == [0, 300_000]
    assert release["datasets"]["cifar"]["basis"]["n_train"] == "published"
    assert {each["gib"] for each in release["published_sizes"]} >= {49, 346}


def test_intake_has_no_entry_that_would_download_a_paid_array_without_its_price() -> None:
    entries = exported("intake", catalog="")["entries"]
    assert {entry["kwargs"]["engine"] for entry in entries.values()} == {"dmdata"}
    assert {"cifar/50pct", "cifar/50pct/test_margins"} <= set(entries)


def test_files_are_named_from_the_folder_of_the_catalog_with_their_digests(folder: Path) -> None:
    key = load_file(folder).find(NAME).stored.key
    [file] = exported("croissant", catalog=folder)["distribution"]
    assert (file["contentUrl"], file["sha256"]) == (key, "ab" * 32)
    assert "isLiveDataset" not in exported("croissant", catalog=folder)
    [resource] = exported("datapackage", catalog=folder)["resources"]
    assert (resource["path"], resource["hash"]) == (key, "sha256:" + "ab" * 32)
    assert resource["bytes"] == (folder / key).stat().st_size
    intake = exported("intake", catalog=folder)
    assert intake["data"][f"data of {NAME}.npy"]["kwargs"]["url"] == "{CATALOG_DIR}/" + key
    assert intake["entries"][NAME]["kwargs"]["catalog"] == "{CATALOG_DIR}/catalog.yaml"


def test_files_elsewhere_are_named_by_their_whole_path_and_refused_by_a_data_package(
    folder: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    [file] = exported("croissant", catalog=folder, folder=elsewhere)["distribution"]
    assert Path(file["contentUrl"]) == folder / load_file(folder).find(NAME).stored.key
    [above] = exported("croissant", catalog=folder, folder=tmp_path)["distribution"]
    assert above["contentUrl"].startswith("release/")
    with pytest.raises(dmdata.CatalogError, match=r"is not below .*elsewhere.*-o .*release/datapackage\.json"):
        exported("datapackage", catalog=folder, folder=elsewhere)


def test_a_password_in_an_address_is_not_exported(tmp_path: Path) -> None:
    text = BUNDLED.dump().replace("s3://madrylab-datamodels", "https://me:hush@example.org/x")
    (tmp_path / "catalog.yaml").write_text(text)
    for form in FORMS:
        assert "hush" not in dmdata.export_catalog(form, catalog=tmp_path)


def test_the_command_writes_a_file_once_and_lists_what_the_form_has_no_field_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "croissant.json"
    arguments = ("--to", "croissant", "--catalog", str(folder), "-o", str(file))
    code, out, err = run(capsys, *arguments)
    assert code == 0
    assert json.loads(file.read_text()) == exported("croissant", catalog=folder)
    assert "croissant.json" in out
    assert "no fields for shape" in err
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "--force" in err
    code, out, _ = run(capsys, *arguments, "--force", "--json")
    assert json.loads(out)["form"] == "croissant"
    assert any("License" in note for note in json.loads(out)["notes"])


def test_a_folder_that_is_missing_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "--to", "intake", "-o", str(tmp_path / "missing" / "intake.yaml"))
    assert code == 2
    assert f"{tmp_path / 'missing'} is not a folder; make it" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
def test_without_a_file_the_export_is_on_standard_output(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--to", form, "--catalog", "")[1] == dmdata.export_catalog(form, catalog="")
    assert json.loads(run(capsys, "--to", form, "--catalog", "", "--json", "-q")[1]) == exported(form, catalog="")


def test_another_form_is_an_error_that_names_the_forms() -> None:
    with pytest.raises(dmdata.CatalogError, match=r"'stac' is not a form .*croissant, intake, datapackage"):
        dmdata.export_catalog("stac")  # type: ignore[arg-type]
