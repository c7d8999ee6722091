"""Masks of one's own are called what they are: `given`, with their own sizes, and no alpha."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from cluster_runs import write_letters

import dmdata
from dmdata.catalog.entries import load_file
from dmdata.errors import CatalogError
from dmpipeline import workflow
from dmpipeline.cli.command import commands
from dmpipeline.draws.masks import given_masks
from dmpipeline.draws.subsets import SubsetSizes
from dmpipeline.exporting.export import export_run
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.report.of_run import report_run
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec
from dmpipeline.training.train import Way

N_TRAIN = 40


@pytest.fixture
def masks(tmp_path):
    """The full set less one to eight examples, for 16 models and 4 held-out subsets."""
    rng = np.random.default_rng(0)
    masks = np.ones((20, N_TRAIN), np.bool_)
    for n, mask in enumerate(masks):
        mask[rng.choice(N_TRAIN, 1 + n % 8, replace=False)] = False
    np.save(tmp_path / "own.npy", masks)
    return tmp_path / "own.npy"


def trained(folder, masks, **values):
    settings = {"recipe": {"hidden": 4, "epochs": 1}, "n_models": 16, "held_out": {"n_subsets": 4, "n_retrainings": 2}}
    spec = RunSpec(dataset=write_letters(folder, N_TRAIN, 7), masks=str(masks), **(settings | values))
    run = Run.create(folder / "run", spec)
    run.train(way=Way("products", 4))
    return run


def call(*words):
    done = CliRunner().invoke(commands, [str(word) for word in words])
    assert done.exit_code == 0, done.exception
    return done


def test_sizes_are_those_of_the_masks(masks):
    spec = RunSpec(masks=str(masks), n_models=16, held_out={"n_subsets": 4})
    sizes = SubsetSizes.of(spec, N_TRAIN)
    counted = given_masks(spec, N_TRAIN).sum(1)
    assert (sizes.smallest, sizes.mean, sizes.largest) == (32, counted.mean(), 39)
    assert sizes.in_words == f"32 to 39 of 40 examples, {counted.mean():.0f} on average"
    assert SubsetSizes.of(RunSpec(alpha=0.3), 40).in_words == "12 of 40 examples"
    assert SubsetSizes.of(RunSpec(alpha=0.3, masks="bernoulli"), 40).in_words == "about 12 of 40 examples"


def test_a_run_of_given_masks_is_catalogued_fitted_exported_and_shown_as_that(tmp_path, masks):
    run = trained(tmp_path, masks)
    workflow.fit_run(run, validation=0.2)
    page = report_run(run, workflow.evaluate_run(run)).read_text()
    assert "on the subsets of own.npy" in page
    assert "32 to 39 of 40 examples" in page
    assert "50%" not in page.partition("</h1>")[0].partition("<h1>")[2]
    export_run(run, tmp_path / "export", run.datamodels_path)
    for place in (run.path, tmp_path / "export"):
        alpha = load_file(place).datasets["letters"].alphas["given"]
        assert alpha.alpha is None
        assert "given subsets of 32 to 39 of 40 examples" in alpha.note
        assert dmdata.open("letters/given/test_margins", catalog=place).shape == (24, 7)
        assert Datamodels.load("letters/given/test_datamodels", catalog=place).n_targets == 7
    assert (tmp_path / "export/letters/data/train_masks_given.npy").exists()
    assert (tmp_path / "export/letters/datamodels/test_given.pt").exists()
    facts = json.loads(call("status", run.path, "--json").stdout)
    assert (facts["alpha"], facts["subsets"]["smallest"], facts["subsets"]["largest"]) == (None, 32, 39)
    text = call("status", run.path).stdout
    assert "on the subsets of own.npy" in text
    assert "alpha" not in text


def test_an_export_holds_given_and_drawn_subsets_side_by_side(tmp_path, masks):
    given = trained(tmp_path, masks)
    drawn = Run.create(tmp_path / "drawn", given.spec.model_copy(update={"masks": "exact", "alpha": 0.3}))
    drawn.train(way=Way("products", 4))
    for run in (given, drawn):
        export_run(run, tmp_path / "export")
    assert list(load_file(tmp_path / "export").datasets["letters"].alphas) == ["30pct", "given"]
    with pytest.raises(CatalogError, match="alpha 50% is not released for letters; choose 30% or given"):
        dmdata.open("letters/50pct/test_margins", catalog=tmp_path / "export")


def test_a_run_whose_masks_were_catalogued_by_an_alpha_keeps_that_name(tmp_path, masks):
    run = trained(tmp_path, masks)
    facts = json.loads((run.path / "provenance.json").read_text())
    del facts["subsets"]
    (run.path / "provenance.json").write_text(json.dumps(facts))
    old = Run.open(run.path)
    assert old.datamodels_path.name == "test_50pct.pt"
    workflow.fit_run(old, validation=0.2)
    assert workflow.evaluate_run(old).n_targets == 7
    alpha = load_file(old.path).datasets["letters"].alphas["50pct"]
    assert (alpha.alpha, alpha.note) == (None, f"given subsets of {SubsetSizes.of(old.spec, N_TRAIN).in_words}")
    masks.unlink()
    assert "sizes that are not known" in call("status", old.path).stdout


def test_init_shows_the_sizes_and_says_that_an_alpha_is_not_used(tmp_path, masks):
    dataset = write_letters(tmp_path, N_TRAIN, 7)
    words = ["--dataset", dataset, "--models", 16, "--held-out", 4, "--masks", masks]
    done = call("init", tmp_path / "one", *words, "--alpha", 0.3)
    assert "32 to 39 of 40 examples" in done.stdout
    assert "alpha 30% is not used: the subsets are those in" in done.stderr
    done = CliRunner().invoke(commands, [*map(str, ["init", tmp_path / "two", *words, "--alpha", 0.3, "--alpha", 0.6])])
    assert done.exit_code == 2
    assert "have no alpha, so there is one run of them; leave out --alpha" in done.stderr
    assert not (tmp_path / "two").exists()
    done = call("init", tmp_path / "drawn", "--dataset", dataset, "--models", 16, "--alpha", 0.3, "--json")
    assert json.loads(done.stdout)["subsets"] == {"smallest": 12, "mean": 12.0, "largest": 12, "n_train": 40}
