"""A run next to a reference: what is read, what is found, and what the verdict is."""

import json
import shutil

import numpy as np
import pytest
import yaml
import zarr
from planted_run import N_TRAIN, planted_run
from servers.loopback import BUCKET

import dmdata
from dmpipeline.checks.findings import LEVELS
from dmpipeline.checks.verification import CHECKS
from dmpipeline.cli.command import main
from dmpipeline.errors import SpecError
from dmpipeline.exporting.export import export_run
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec
from dmpipeline.workflow.fit_step import fit_run
from dmpipeline.workflow.reference import portions
from dmpipeline.workflow.verify_step import verify

N_MODELS = 320


def made(directory, seed, **overrides):
    spec = RunSpec(
        n_models=N_MODELS,
        held_out={"n_subsets": 12, "n_retrainings": 2},
        outputs=["test_margins"],
        seed=seed,
        **overrides,
    )
    run = Run.create(directory, spec)
    run.train()
    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ours(place):
    return made(place / "ours", 1)


@pytest.fixture(scope="module")
def other(place):
    return made(place / "other", 2)


@pytest.fixture
def planted(other, tmp_path):
    """A copy of the other run, to plant a fault in."""

    def plant(array, change):
        copy = Run.open(shutil.copytree(other.path, tmp_path / "planted", dirs_exist_ok=True))
        stored = zarr.open_group(copy.path / "store.zarr", mode="r+")[array]
        stored[:] = change(stored[:])
        return copy

    return plant


def failed(verification):
    return {finding.check for finding in verification if not finding.passed}


def detail(verification, check):
    return next(finding.detail for finding in verification if finding.check == check)


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return ended.value.code, json.loads(captured.out) if captured.out.startswith("{") else captured.out, captured.err


def test_a_run_by_itself_agrees_and_every_finding_has_its_level(ours):
    verification = verify(ours)
    assert verification.verdict == "agrees"
    assert (verification.reference, verification.usd, verification.n_rows) == (None, None, ours.spec.n_rows)
    assert {finding.check for finding in verification} == set(CHECKS)
    assert [finding.level for finding in verification] == sorted(
        (finding.level for finding in verification), key=LEVELS.index
    )


def test_rows_trained_again_are_a_finding_and_none_are_by_default(ours, place, tmp_path):
    assert "replays" not in {finding.check for finding in verify(ours)}
    assert "3 rows trained again from their seeds are what is stored" in detail(verify(ours, replays=3), "replays")
    changed = Run.open(shutil.copytree(ours.path, tmp_path / "changed"))
    changed.array("test_margins")[:] = 0.5 * changed.array("test_margins")[:]
    verification = verify(changed, replays=2)
    assert {"replays", "digests"} <= failed(verification)
    assert verification.verdict == "differs"
    assert not verification[0].passed


def test_two_runs_of_one_recipe_agree_and_too_few_rows_are_said_to_be_undecided(ours, other):
    verification = verify(ours, other)
    assert not failed(verification)
    assert verification.verdict == "agrees"
    assert verification.usd == 0
    few = verify(ours, other, max_rows=40)
    assert (few.verdict, few.n_rows) == ("undecided", 40)
    assert "undecided after 40 rows: about " in detail(few, "evidence")
    assert "rows of the reference would decide ($" in detail(few, "evidence")


def test_reading_goes_on_in_portions_and_stops_at_the_first_that_decides(ours, other):
    calls = []
    verification = verify(ours, str(other.path), margin=0.06, progress=lambda done, total: calls.append((done, total)))
    assert calls[-3:] == [(100, 320), (300, 320), (320, 320)]
    assert verification.n_rows == N_MODELS
    verification = verify(ours, str(other.path), margin=0.5)
    assert (verification.verdict, verification.n_rows) == ("agrees", 100)


def test_a_reference_of_the_same_models_is_said_to_be_that_and_statistics_are_left_out(tmp_path, capsys):
    run = planted_run(tmp_path / "planted")
    export_run(run, tmp_path / "export")
    for reference in (run.path, tmp_path / "export"):
        verification = verify(run, reference)
        assert (verification.verdict, verification.n_rows) == ("agrees", 100)
        told = detail(verification, "same_models")
        assert "all 100 rows of the reference that were read are models that ours holds too" in told
        assert not {"location", "rms_shift", "test_order", "evidence"} & {finding.check for finding in verification}
    few = verify(run, tmp_path / "export", max_rows=30)
    assert few.verdict == "agrees"
    code, data, said = call(capsys, "verify", run.path, "--against", tmp_path / "export", "--json")
    assert (code, data["verdict"], data["passed"]) == (0, "agrees", True)
    assert f"planted/50pct of {tmp_path / 'export'}: the 100 rows that were read are models of its own" in said


def test_copies_of_our_models_with_a_fault_are_not_passed_for_the_same(tmp_path):
    run = planted_run(tmp_path / "planted", held_out={"n_subsets": 0})
    folder = tmp_path / "copied"
    export_run(run, folder)
    (path,) = folder.rglob("test_margins_*.npy")
    margins = np.load(path)
    np.save(path, margins[:, [0, 1, 3, 2, *range(4, margins.shape[1])]])
    verification = verify(run, folder)
    assert verification.verdict == "differs"
    assert "shared_models" in {finding.check for finding in verification}
    np.save(path, margins + 3 * margins.std(axis=0) * (np.arange(margins.shape[1]) == 3))
    assert verify(run, folder).verdict == "differs"


def test_what_both_have_is_compared_on_one_side_alone(tmp_path):
    rng = np.random.default_rng(0)
    masks = rng.random((600, N_TRAIN)) < 0.5
    np.save(tmp_path / "ours.npy", masks)
    np.save(tmp_path / "half.npy", np.where(np.arange(600)[:, None] % 2, masks, rng.random(masks.shape) < 0.5))
    run, again, half = (
        planted_run(tmp_path, name=name, seed=seed, masks=str(tmp_path / file), held_out={"n_subsets": 0})
        for name, seed, file in (("run", 0, "ours.npy"), ("again", 1, "ours.npy"), ("half", 0, "half.npy"))
    )
    verification = verify(run, half, max_rows=300)
    assert not failed(verification)
    assert "150 of 300 rows of the reference are models that ours holds too" in detail(verification, "shared_models")
    assert verification.verdict == "undecided"
    few = verify(run, half, max_rows=30)
    assert few.verdict == "undecided"
    assert "and 15 of the reference, without those that both have, are too few to compare" in detail(few, "evidence")
    # trainings of their own on the same subsets: the noise of the subsets is not taken for that of two draws
    verification = verify(run, again)
    assert not failed(verification)
    assert "600 of 600 are other trainings on subsets that ours has too" in detail(verification, "shared_models")
    assert verification.verdict == "undecided"


def test_a_run_agrees_with_itself(ours):
    verification = verify(ours, ours.path)
    assert verification.verdict == "agrees"
    assert "same_models" in {finding.check for finding in verification}


def test_an_order_of_test_examples_that_is_off_by_one_differs_and_is_said(ours, planted):
    verification = verify(ours, planted("test_margins", lambda margins: np.roll(margins, -1, axis=1)))
    assert verification.verdict == "differs"
    assert verification.n_rows == 100
    assert "test example i of the reference is i + 1 of ours" in detail(verification, "test_order")


def test_an_order_of_training_examples_that_is_off_is_said_though_outputs_are_the_same(ours, planted):
    verification = verify(ours, planted("train_masks", lambda masks: np.roll(masks, 2, axis=1)))
    assert failed(verification) == {"train_order"}
    assert verification.verdict == "differs"


def test_a_row_of_another_alpha_differs_by_its_mask(ours, planted):
    def one_row(masks):
        masks[40, :] = np.arange(masks.shape[1]) % 5 == 0
        return masks

    verification = verify(ours, planted("train_masks", one_row))
    assert failed(verification) == {"reference_masks"}
    assert "mask 40 has 288" in detail(verification, "reference_masks")


def test_a_row_stored_twice_and_one_that_is_not_finite_are_found_in_the_reference(ours, planted):
    def twice(margins):
        margins[7], margins[9, 3] = margins[5], np.nan
        return margins

    verification = verify(ours, planted("test_margins", twice))
    assert "1 rows have outputs that are not finite, row 9 the first" in detail(verification, "reference_rows")
    assert "1 rows have the outputs of an earlier row, row 7 the first" in detail(verification, "reference_rows")


def test_another_recipe_differs(ours, place):
    longer = made(place / "longer", 3, recipe={"lr": 0.6})
    verification = verify(ours, longer)
    assert verification.verdict == "differs"
    assert {finding.level for finding in verification if not finding.passed} == {"statistics"}


def test_the_views_at_test_time_that_a_reference_averaged_are_found(tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures, labels = (digits.images * 15).astype(np.uint8), digits.target
    path = tmp_path / "pictures.npz"
    np.savez(
        path,
        train_inputs=pictures[:200],
        train_labels=labels[:200],
        test_inputs=pictures[200:240],
        test_labels=labels[200:240],
    )
    runs = []
    for seed, tta in ((1, "none"), (2, "mirror")):
        spec = RunSpec(
            dataset=str(path),
            n_models=40,
            held_out={"n_subsets": 0},
            recipe={"name": "convnet", "epochs": 20, "batch_size": 20, "channels": [4, 8], "tta": tta},
            outputs=["test_margins"],
            seed=seed,
        )
        runs.append(Run.create(tmp_path / tta, spec))
        runs[-1].train()
    verification = verify(*runs, tta=8)
    assert "tta" in failed(verification), detail(verification, "tta")
    assert "views at test time that fit the reference best: mirror" in detail(verification, "tta")
    assert "--set tta=mirror" in detail(verification, "tta")
    assert "tta" not in {finding.check for finding in verify(*runs)}


def test_ensembles_of_other_examples_are_not_compared(ours, place, tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "small.npz"
    np.savez(
        path,
        train_inputs=rng.standard_normal((60, 8)).astype(np.float32),
        train_labels=np.arange(60) % 3,
        test_inputs=rng.standard_normal((7, 8)).astype(np.float32),
        test_labels=np.arange(7) % 3,
    )
    spec = RunSpec(dataset=str(path), n_models=30, held_out={"n_subsets": 0}, recipe={"hidden": 4, "epochs": 1})
    small = Run.create(tmp_path / "small", spec)
    small.train()
    verification = verify(ours, small)
    assert failed(verification) == {"reference"}
    assert "they are not of the same targets" in detail(verification, "reference")


def test_a_damaged_run_is_not_compared_and_says_so(ours, other, tmp_path):
    damaged = Run.open(shutil.copytree(ours.path, tmp_path / "damaged"))
    (damaged.path / "store.zarr/test_margins/c/0/0").write_bytes(b"short")
    verification = verify(damaged, other)
    assert {"digests", "reference"} <= failed(verification)
    assert "missing or damaged" in detail(verification, "reference")


@pytest.fixture(scope="module")
def exported(other, place):
    """The other run in the release's layout, with datamodels whose weights are of standardised masks, unsaid."""
    import torch

    fit_run(other)
    raw = Datamodels.load(other.datamodels_path)
    written = raw.to_standardised(mean=0.5)
    path = place / "written.pt"
    torch.save({name: torch.tensor(getattr(written, name)) for name in ("weight", "bias", "lam")}, path)
    export_run(other, place / "release", path)
    return place / "release"


def test_a_release_is_found_by_its_folder_and_by_name_and_read_alike(ours, exported):
    by_folder = verify(ours, exported, refit=False)
    by_name = verify(ours, "digits/50pct", catalog=exported, refit=False)
    assert by_folder.as_dict()["findings"][1:] != []
    assert [f.effect for f in by_folder] == [f.effect for f in by_name]
    with pytest.raises(SpecError, match=r"lists no test_margins"):
        verify(ours, _catalog_without(exported, "test_margins"))


def _catalog_without(folder, array):
    document = yaml.safe_load((folder / "catalog.yaml").read_text())
    del document["datasets"]["digits"]["alphas"]["50pct"]["arrays"][array]
    path = folder / "without.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_datamodels_are_compared_where_both_have_some_and_another_space_is_found(ours, exported):
    assert "ours are not fitted" in detail(verify(ours, exported), "weights")
    fit_run(ours)
    verification = verify(ours, exported)
    assert not failed(verification)
    assert "weights of the reference are of standardised masks" in detail(verification, "weight_space")
    refit = {finding.check: finding for finding in verification if finding.level == "refit"}
    assert {"weight_space", "weight_scale", "weights", "our_lds", "their_lds"} == set(refit)
    assert refit["weight_scale"].passed
    assert refit["weight_scale"].effect == pytest.approx(1, abs=0.2)
    assert refit["weights"].effect > 0.3
    assert refit["our_lds"].passed
    assert refit["their_lds"].passed


def test_the_command_ends_with_three_on_what_differs_and_with_none_on_what_is_undecided(ours, planted, other, capsys):
    code, data, said = call(
        capsys, "verify", ours.path, "--against", other.path, "--max-rows", "40", "--json", "--no-refit"
    )
    assert code == 0
    assert data["verdict"] == "undecided"
    assert "would decide" in said
    wrong = planted("test_margins", lambda margins: np.roll(margins, -1, axis=1))
    code, data, said = call(capsys, "verify", ours.path, "--against", wrong.path, "--json")
    assert code == 3
    assert (data["verdict"], data["passed"]) == ("differs", False)
    assert {"level", "check", "passed", "detail", "effect", "low", "high", "margin", "n_rows"} == set(
        data["findings"][0]
    )
    assert not data["findings"][0]["passed"]
    assert f"differs from {wrong.path}" in said


def test_a_paid_reference_is_priced_and_asked_for_before_anything_is_read(ours, exported, tmp_path, capsys):
    document = yaml.safe_load((exported / "catalog.yaml").read_text())
    document["source"] |= {"url": "s3://nobody-reads-this", "requester_pays": True}
    (tmp_path / "catalog.yaml").write_text(yaml.safe_dump(document))
    asked = ["verify", ours.path, "--against", "digits/50pct", "--catalog", tmp_path, "--no-refit"]
    code, data, _ = call(capsys, *asked, "--dry-run", "--json")
    assert code == 0
    assert [artifact["name"] for artifact in data["artifacts"]] == [
        "digits/50pct/train_masks",
        "digits/50pct/test_margins",
    ]
    assert data["bytes"] == pytest.approx(N_MODELS * (1437 + 2 * 360), rel=0.01)
    assert data["usd"] > 0
    assert call(capsys, *asked)[0] == 6
    assert call(capsys, *asked, "-y", "--max-cost", "0.0000001")[0] == 8


@pytest.mark.parametrize(
    ("to", "tensors"),
    [
        ("internet", ("weight", "bias", "lam")),
        (
            "same-region",
            (
                *("weight", "bias", "lam", "gap", "kkt", "validation_error"),
                *("limit_variance", "limit_linear", "limit_error", "fitted_masks"),
            ),
        ),
    ],
)
def test_the_price_of_a_comparison_with_datamodels_is_what_is_paid_in_the_end(
    ours, other, exported, s3, tmp_path, capsys, to, tensors
):
    fit_run(ours)
    if len(tensors) > 3:
        exported = tmp_path / "release"
        export_run(other, exported, other.datamodels_path)
    document = yaml.safe_load((exported / "catalog.yaml").read_text())
    document["source"] |= {"url": f"s3://{BUCKET}", "requester_pays": True}
    (tmp_path / "catalog.yaml").write_text(yaml.safe_dump(document))
    for path in exported.rglob("*.*"):
        s3.put(path.relative_to(exported).as_posix(), path.read_bytes())
    asked = ["verify", ours.path, "--against", "digits/50pct", "--catalog", tmp_path, "--refit", "--to", to]
    # so small a margin that all rows are read
    asked += ["--margin", "0.06", "--json"]
    code, priced, _ = call(capsys, *asked, "--dry-run")
    assert code == 0
    arrays = ["train_masks", "test_margins"]
    assert [part["name"].rpartition("/")[2] for part in priced["artifacts"]] == [*arrays, *tensors, *arrays]
    code, data, said = call(capsys, *asked, "-y")
    assert (code, data["n_rows"]) == (0, N_MODELS), said
    spent = dmdata.spend()
    assert spent.n_bytes == s3.n_object_bytes
    assert spent.n_bytes <= priced["bytes"] <= 1.001 * spent.n_bytes
    # a tensor inside a file may have a header of its own
    assert spent.n_requests <= priced["requests"] <= spent.n_requests + len(tensors)
    assert spent.usd <= priced["usd"] <= spent.usd * priced["requests"] / spent.n_requests


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--margin", "0", "choose more than 0"), ("--max-rows", "3", "at least 20"), ("--replay", "-1", "0 or more")],
)
def test_numbers_that_cannot_be_used_are_refused_before_the_run_is_read(tmp_path, capsys, ours, option, value, said):
    code, _, told = call(capsys, "verify", ours.path, option, value)
    assert code == 2
    assert said in told


def test_portions_grow_threefold_and_end_with_all():
    assert portions(3000) == [100, 300, 1000, 3000]
    assert portions(100) == [100]
    assert portions(60) == [60]
    assert portions(450) == [100, 300, 450]
