import copy

import numpy as np
import pytest
import torch

from dmpipeline import fit
from dmpipeline.draws.masks import subset_masks
from dmpipeline.errors import SpecError
from dmpipeline.fitting.attribution import gradient_scores, log_odds_gradients
from dmpipeline.models.outputs import correct_class_margins
from dmpipeline.runs.store import Run
from dmpipeline.scoring.correlation import lds
from dmpipeline.spec import RunSpec
from dmpipeline.training.train import Way


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Digits, 300 models on halves, and 30 held-out subsets trained eight times each."""
    spec = RunSpec(n_models=300, held_out={"n_subsets": 30, "n_retrainings": 8})
    made = Run.create(tmp_path_factory.mktemp("runs") / "digits", spec)
    made.train()
    return made


@pytest.fixture(scope="module")
def scores(run):
    return gradient_scores(run)


@pytest.fixture(scope="module")
def held_out(run):
    rows = run.spec.rows.held_out
    margins = run.array("test_margins")[rows].astype(float)
    return run.array("train_masks")[rows][::8], margins.reshape(30, 8, -1).mean(axis=1)


def trained_again(run, rows):
    """The network's form, and what each of these rows has learned."""
    trainer = run.trainer()
    states = trainer.states(subset_masks(run.spec, rows, trainer.dataset.n_train), run.spec.model_indices(rows))
    return trainer.material.network, states


def test_models_trained_again_are_those_of_the_run(run):
    dataset = run.dataset()
    network, states = trained_again(run, range(3, 6))
    for row, state in zip(range(3, 6), states, strict=True):
        with torch.no_grad():
            logits = torch.func.functional_call(network, state, (torch.tensor(dataset.test_inputs),)).numpy()
        margins = correct_class_margins(logits.astype(np.float16), dataset.test_labels)
        np.testing.assert_allclose(margins, run.array("test_margins")[row], atol=0.02)


def test_gradients_of_all_examples_are_those_of_each(run):
    dataset = run.dataset()
    network, (state,) = trained_again(run, range(1))
    inputs, labels = torch.tensor(dataset.test_inputs[:7]), torch.tensor(dataset.test_labels[:7], dtype=torch.int64)
    got = log_odds_gradients(network, state, inputs, labels)
    for example in range(7):
        own = {name: value.clone().requires_grad_() for name, value in state.items()}
        logits = torch.func.functional_call(network, own, (inputs[example : example + 1],))[0]
        p = torch.softmax(logits.double(), -1)[labels[example]]
        torch.log(p / (1 - p)).backward()
        expected = torch.cat([value.grad.flatten() for value in own.values()])
        torch.testing.assert_close(got[example], expected, rtol=1e-3, atol=1e-5)


def test_scores_foresee_retrainings_and_do_not_depend_on_the_call(run, scores, held_out):
    masks, margins = held_out
    assert scores.shape == (run.dataset().n_train, run.dataset().n_test)
    assert lds(masks.astype(float) @ scores, margins) > 0.45
    np.testing.assert_allclose(gradient_scores(run), scores, rtol=1e-3, atol=1e-6)


def test_scores_as_a_prior_are_worth_half_as_many_models_again(run, scores, held_out):
    masks, margins = (run.array(name)[: run.spec.n_models] for name in ("train_masks", "test_margins"))

    def reached(n_models, prior=None):
        return lds(fit(masks[:n_models], margins[:n_models], prior=prior).predict(held_out[0]), held_out[1])

    assert reached(200, scores) > reached(300) > reached(200)


def test_progress_counts_the_models(run):
    seen = []
    gradient_scores(run, n_models=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_networks_that_normalise_batches_are_trained_again_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    parts = {f"{part}_inputs": rng.integers(0, 256, (24, 9, 9, 3), np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "pictures.npz", **parts, train_labels=np.arange(24) % 3, test_labels=np.arange(24) % 3)
    recipe = {"name": "cifar-fast", "widths": [4, 6], "epochs": 3, "batch_size": 4, "tta": "none"}
    spec = RunSpec(dataset=str(tmp_path / "pictures.npz"), n_models=2, held_out={"n_subsets": 0}, recipe=recipe)
    run = Run.create(tmp_path / "run", spec)
    run.train(way=Way("loop", 1))
    trainer, rows = run.trainer(), range(2)
    material, network = trainer.material, copy.deepcopy(trainer.material.network).eval()
    inputs = material.network_inputs(material.test_inputs)
    with torch.no_grad():
        learned = [
            torch.func.functional_call(network, state, (inputs,)).numpy()
            for state in trainer.states(subset_masks(spec, rows, 24), spec.model_indices(rows))
        ]
    np.testing.assert_allclose(np.stack(learned), run.array("test_logits")[:], atol=0.01)
    assert np.isfinite(gradient_scores(run, n_models=2)).all()


@pytest.mark.parametrize(
    ("wrong", "said"), [({"n_models": 0}, "from 1 to the run's 300"), ({"damping": 0.0}, "above 0")]
)
def test_settings_that_cannot_be_are_refused(run, wrong, said):
    with pytest.raises(SpecError, match=said):
        gradient_scores(run, **wrong)
