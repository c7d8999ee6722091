import hashlib
import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dmdata.catalog.entries import bundled, load_file
from dmdata.errors import FormatError
from dmpipeline.errors import IncompleteRunError, RunError, VerificationError
from dmpipeline.exporting.export import export_run
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec

SPEC = RunSpec(
    n_models=7, held_out={"n_subsets": 2, "n_retrainings": 2}, recipe={"hidden": 4, "epochs": 1}, block_models=4
)

ARRAYS = RunSpec().arrays


@pytest.fixture
def run(tmp_path):
    run = Run.create(tmp_path / "run", SPEC)
    run.train()
    return run


@pytest.fixture
def datamodels(tmp_path):
    path = tmp_path / "fitted.pt"
    torch.save({"weight": torch.rand(1437, 360), "bias": torch.rand(360), "lam": torch.rand(360)}, path)
    return path


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_an_export_has_the_releases_layout_and_numpys_own_bytes(tmp_path, run, datamodels):
    files = export_run(run, tmp_path / "release", datamodels)
    keys = [f"digits/data/{name}_50pct.npy" for name in ARRAYS] + ["digits/datamodels/test_50pct.pt"]
    assert [file.key for file in files] == keys
    assert files_in(tmp_path / "release") == sorted([*keys, "catalog.yaml"])
    for name, file in zip(ARRAYS, files, strict=False):
        saved = io.BytesIO()
        np.save(saved, run.array(name)[:])
        assert Path(file.url).read_bytes() == saved.getvalue()
    assert Path(files[-1].url).read_bytes() == datamodels.read_bytes()


def test_sizes_and_digests_are_those_of_the_files_and_stand_in_the_catalog(tmp_path, run, datamodels):
    files = export_run(run, tmp_path / "release", datamodels)
    catalog = load_file(tmp_path / "release")
    assert [artifact.name for artifact in catalog.artifacts()] == [file.name for file in files]
    for file in files:
        stored = catalog.find(file.name).stored
        content = Path(file.url).read_bytes()
        assert stored.n_bytes == file.n_bytes == len(content)
        assert stored.sha256 == file.sha256 == hashlib.sha256(content).hexdigest()
        assert catalog.find(file.name).url == file.url
    assert catalog.find("digits/50pct/test_datamodels/weight").schema.shape == (1437, 360)


def test_without_datamodels_none_are_listed(tmp_path, run):
    export_run(run, tmp_path / "release")
    assert "test_datamodels" not in (tmp_path / "release/catalog.yaml").read_text()


def test_an_export_again_replaces_the_first(tmp_path, run):
    first = export_run(run, tmp_path / "release")
    before = Path(first[0].url).read_bytes()
    Path(first[0].url).write_bytes(b"spoiled")
    calls = []
    again = export_run(run, tmp_path / "release", progress=lambda done, n_rows: calls.append((done, n_rows)))
    assert again == [replace(file, replaced=True) for file in first]
    assert Path(first[0].url).read_bytes() == before
    assert calls == [(4, 11), (8, 11), (11, 11)]


def test_an_interrupted_export_leaves_nothing_under_a_final_name(tmp_path, run):
    def interrupt(done, _):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_run(run, tmp_path / "release", progress=interrupt)
    assert files_in(tmp_path / "release") == []


def test_two_exports_into_one_folder_at_once_do_not_share_a_file(tmp_path, run):
    others = []

    def export_too(done, _):
        if not others:
            others.append(None)
            others[0] = export_run(run, tmp_path / "release")

    files = export_run(run, tmp_path / "release", progress=export_too)
    assert files == others[0]
    assert all(hashlib.sha256(Path(file.url).read_bytes()).hexdigest() == file.sha256 for file in files)
    assert files_in(tmp_path / "release") == sorted([*(file.key for file in files), "catalog.yaml"])


def test_what_a_killed_export_left_goes_once_nobody_can_be_writing_it(tmp_path, run):
    data = tmp_path / "release/digits/data"
    data.mkdir(parents=True)
    old, new, foreign = (
        data / f".{name}.partial" for name in ("train_masks_50pct.npy.0", "train_masks_50pct.npy.1", "x")
    )
    for path in (old, new, foreign):
        path.touch()
    for path in (old, foreign):
        os.utime(path, (0, 0))
    export_run(run, tmp_path / "release")
    assert (old.exists(), new.exists(), foreign.exists()) == (False, True, True)


def test_a_folder_that_cannot_be_written_is_a_run_error(tmp_path, run):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunError, match=f"{folder} cannot be written .*choose another path"):
            export_run(run, folder)
    (tmp_path / "release/catalog.yaml").mkdir(parents=True)
    with pytest.raises(RunError, match="cannot be written"):
        export_run(run, tmp_path / "release")
    assert files_in(tmp_path / "release") == []


def test_a_damaged_chunk_ends_the_export_with_the_command_that_finds_it(tmp_path, run):
    (run.path / "store.zarr/train_logits/c/1/0/0").write_bytes(b"scrambled")
    with pytest.raises(RunError, match="dmpipeline verify"):
        export_run(run, tmp_path / "release")
    assert files_in(tmp_path / "release") == []


def test_a_block_that_is_not_what_was_stored_is_not_exported(tmp_path, run):
    run.array("test_margins")[9, 0] += np.float16(1)
    with pytest.raises(VerificationError, match="rows 8 to 10"):
        export_run(run, tmp_path / "release")
    assert files_in(tmp_path / "release") == []


def test_an_incomplete_run_is_not_exported(tmp_path):
    run = Run.create(tmp_path / "run", SPEC)
    with pytest.raises(IncompleteRunError):
        export_run(run, tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_datamodels_that_are_missing_or_something_else_end_the_export(tmp_path, run):
    with pytest.raises(RunError, match="fit datamodels first"):
        export_run(run, tmp_path / "release", tmp_path / "none.pt")
    (tmp_path / "other.pt").write_bytes(b"no zip")
    with pytest.raises(FormatError, match=r"other\.pt"):
        export_run(run, tmp_path / "release", tmp_path / "other.pt")
    assert files_in(tmp_path / "release") == []


def exported(tmp_path, name, **changes):
    run = Run.create(tmp_path / name, SPEC.model_copy(update=changes))
    run.train()
    return run


def test_another_alpha_is_added_to_the_catalog_that_is_there(tmp_path, run):
    first = export_run(run, tmp_path / "release")
    second = export_run(exported(tmp_path, "other", alpha=0.75), tmp_path / "release")
    catalog = load_file(tmp_path / "release")
    assert [artifact.name for artifact in catalog.artifacts()] == [file.name for file in [*first, *second]]
    assert not any(file.replaced for file in second)
    for file in [*first, *second]:
        content = Path(file.url).read_bytes()
        assert catalog.find(file.name).stored.sha256 == hashlib.sha256(content).hexdigest() == file.sha256
        assert catalog.find(file.name).url == file.url
    assert catalog.find(second[0].name).alpha == 0.75


def test_of_another_seed_all_is_replaced_and_the_title_stays_true(tmp_path, run):
    export_run(run, tmp_path / "release")
    assert "seed 0" in load_file(tmp_path / "release").title
    other = exported(tmp_path, "other", alpha=0.75)
    export_run(other, tmp_path / "release")
    assert "seed 0" in load_file(tmp_path / "release").title
    again = export_run(exported(tmp_path, "again", seed=1), tmp_path / "release")
    catalog = load_file(tmp_path / "release")
    assert all(file.replaced for file in again)
    assert catalog.title == "digits, trained by dmpipeline"
    notes = {name: alpha.note for name, alpha in catalog.datasets["digits"].alphas.items()}
    assert notes == {"50pct": "perceptron@1, seed 1", "75pct": "perceptron@1, seed 0"}
    for file in again:
        assert catalog.find(file.name).stored.sha256 == hashlib.sha256(Path(file.url).read_bytes()).hexdigest()


def test_what_people_wrote_into_a_catalog_stays(tmp_path, run):
    export_run(run, tmp_path / "release")
    path = tmp_path / "release/catalog.yaml"
    titled = load_file(path).model_copy(update={"title": "Ours", "citation": "Us, 2026"})
    path.write_text(titled.dump())
    export_run(exported(tmp_path, "other", alpha=0.75), tmp_path / "release")
    catalog = load_file(path)
    assert (catalog.title, catalog.citation) == ("Ours", "Us, 2026")


def test_while_files_are_put_in_place_only_other_alphas_are_listed(tmp_path, run, monkeypatch):
    export_run(exported(tmp_path, "other", alpha=0.75), tmp_path / "release")
    export_run(run, tmp_path / "release")
    listed, put = [], os.replace

    def put_and_look(source, destination):
        if str(destination).endswith(".npy"):
            listed.append(set(load_file(tmp_path / "release").datasets["digits"].alphas))
        put(source, destination)

    monkeypatch.setattr(os, "replace", put_and_look)
    export_run(run, tmp_path / "release")
    assert listed == [{"75pct"}] * len(ARRAYS)
    assert set(load_file(tmp_path / "release").datasets["digits"].alphas) == {"50pct", "75pct"}


@pytest.mark.parametrize(
    ("fact", "value"), [("n_train", 1000), ("n_classes", 3), ("example_order", "another"), ("note", "fingerprint 0")]
)
def test_another_dataset_of_the_same_name_is_refused_before_anything_is_written(tmp_path, run, fact, value):
    export_run(run, tmp_path / "release")
    path = tmp_path / "release/catalog.yaml"
    catalog = load_file(path)
    digits = catalog.datasets["digits"].model_copy(update={fact: value})
    path.write_text(catalog.model_copy(update={"datasets": {"digits": digits}}).dump())
    before = {name: (tmp_path / "release" / name).stat().st_mtime_ns for name in files_in(tmp_path / "release")}
    with pytest.raises(RunError, match=f"another dataset named digits: its {fact} is .*another destination"):
        export_run(exported(tmp_path, "other", alpha=0.75), tmp_path / "release")
    assert {name: (tmp_path / "release" / name).stat().st_mtime_ns for name in files_in(tmp_path / "release")} == before


def test_alphas_of_one_catalog_agree_on_who_pays(tmp_path, run):
    export_run(run, tmp_path / "release", requester_pays=True)
    other = exported(tmp_path, "other", alpha=0.75)
    with pytest.raises(RunError, match="readers pay; add --requester-pays"):
        export_run(other, tmp_path / "release")
    export_run(run, tmp_path / "release")  # the only alpha there is may change it
    with pytest.raises(RunError, match="owner pays; leave out --requester-pays"):
        export_run(other, tmp_path / "release", requester_pays=True)


def test_a_catalog_of_files_elsewhere_or_a_damaged_one_is_not_replaced(tmp_path, run):
    path = tmp_path / "release/catalog.yaml"
    for text, words in ((bundled().dump(), "lists files in s3://"), ("version: [", "fix or remove it")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        with pytest.raises(RunError, match=words):
            export_run(run, tmp_path / "release")
        assert path.read_text() == text
    assert files_in(tmp_path / "release") == ["catalog.yaml"]
