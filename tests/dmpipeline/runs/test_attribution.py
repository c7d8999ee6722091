import copy
import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets
import torch
from torch import nn

from dmpipeline import fit, save_dataset
from dmpipeline.draws.masks import subset_masks
from dmpipeline.errors import SpecError
from dmpipeline.fitting.attribution import gradient_scores
from dmpipeline.fitting.guides import gradients
from dmpipeline.fitting.guides.gradients import Projection, log_odds_gradients
from dmpipeline.fitting.guides.layerwise import LinearLayers
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
    log_odds, by_name = log_odds_gradients(network, state, inputs, labels)
    got = torch.cat([by_name[name].flatten(1) for name in state], dim=1)
    for example in range(7):
        own = {name: value.clone().requires_grad_() for name, value in state.items()}
        logits = torch.func.functional_call(network, own, (inputs[example : example + 1],))[0]
        p = torch.softmax(logits.double(), -1)[labels[example]]
        expected = torch.log(p / (1 - p))
        torch.testing.assert_close(log_odds[example].double(), expected, rtol=1e-4, atol=1e-4)
        expected.backward()
        expected = torch.cat([value.grad.flatten() for value in own.values()])
        torch.testing.assert_close(got[example], expected, rtol=1e-3, atol=1e-5)


def test_scores_foresee_retrainings_and_do_not_depend_on_the_call(run, scores, held_out):
    masks, margins = held_out
    assert scores.shape == (run.dataset().n_train, run.dataset().n_test)
    assert lds(masks.astype(float) @ scores, margins) > 0.45
    np.testing.assert_allclose(gradient_scores(run), scores, rtol=1e-3, atol=1e-6)


def test_scores_are_those_of_the_formula(run):
    dataset = run.dataset()
    network, states = trained_again(run, range(2))
    inputs = torch.tensor(np.concatenate([dataset.train_inputs, dataset.test_inputs]))
    labels = torch.tensor(np.concatenate([dataset.train_labels, dataset.test_labels]), dtype=torch.int64)
    n_train, leverages = dataset.n_train, 0.0
    each = [log_odds_gradients(network, state, inputs, labels) for state in states]
    p = np.stack([1 / (1 + np.exp(-log_odds[:n_train].double().numpy())) for log_odds, _ in each])
    r = (p * (1 - p)).mean(0) + 0.001
    for _, by_name in each:
        rows = torch.cat([by_name[name].flatten(1) for name in states[0]], dim=1).double().numpy()
        of_train = rows[:n_train]
        damping = 2.0 * (r * np.square(of_train).sum(1)).mean()
        hessian = (of_train.T * r) @ of_train + damping * np.eye(rows.shape[1])
        leverages += of_train @ np.linalg.solve(hessian, rows[n_train:].T) / 2
    expected = (1 - p).mean(0)[:, None] * leverages
    got = gradient_scores(run, n_models=2, damping=2.0)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_projected_scores_near_the_exact_ones_as_projections_widen(run, scores, held_out):
    masks, margins = held_out
    exact = gradient_scores(run, n_models=2)
    n_parameters = sum(parameter.numel() for parameter in run.trainer().material.network.parameters())
    correlations = []
    for width in (128, 1000, 4000):  # the first two below the number of examples, the last one above
        projected = gradient_scores(run, n_models=2, projection=width)
        correlations.append(np.corrcoef(projected.ravel(), exact.ravel())[0, 1])
    assert 0.5 < correlations[0] < correlations[1] < correlations[2]
    assert correlations[2] > 0.95
    kept = gradient_scores(run, n_models=2, projection=n_parameters)  # as they are, and not layer by layer
    np.testing.assert_allclose(kept, exact, rtol=1e-3, atol=1e-4 * np.abs(exact).max())
    projected = gradient_scores(run, projection=np.int64(2048))
    assert lds(masks.astype(float) @ projected, margins) > lds(masks.astype(float) @ scores, margins) - 0.01


def test_projections_are_drawn_by_the_runs_seed_and_the_model(run):
    scores = gradient_scores(run, n_models=1, projection=200)
    np.testing.assert_allclose(gradient_scores(run, n_models=1, projection=200), scores, rtol=1e-3, atol=1e-6)
    sizes = {"weight": 700, "bias": 30}
    gradients = {name: torch.randn(3, size) for name, size in sizes.items()}

    def sketched(seed, model, size=200):
        into = torch.zeros(3, size)
        Projection.drawn(sizes, size, seed, model).add(gradients, into)
        return into

    assert torch.equal(sketched(4, 9), sketched(4, 9))
    for other in (sketched(5, 9), sketched(4, 10)):
        assert not torch.equal(sketched(4, 9), other)
    assert torch.equal(sketched(4, 9, 730), torch.cat([gradients["weight"], gradients["bias"]], dim=1))


@pytest.mark.parametrize("size", [7, 64, 199])
def test_products_of_projected_gradients_are_those_of_gradients_on_average(size):
    """Their variance over draws is at most that of a dense projection: (|x|^2 |y|^2 + (x'y)^2) / size."""
    sizes = {"first": 150, "second": 50}
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 200, generator=generator) for _ in range(2))
    y += x / 2
    products = []
    for model in range(2000):
        projection, into = Projection.drawn(sizes, size, 3, model), torch.zeros(2, size)
        projection.add({"first": torch.cat([x, y])[:, :150], "second": torch.cat([x, y])[:, 150:]}, into)
        products.append((into[0] @ into[1]).item())
    truth = (x @ y.T).item()
    variance = ((x @ x.T) * (y @ y.T) + truth**2).item() / size
    assert abs(np.mean(products) - truth) < 4 * np.sqrt(variance / 2000)
    assert np.var(products) < 1.15 * variance


def test_scores_as_a_prior_are_worth_half_as_many_models_again(run, scores, held_out):
    masks, margins = (run.array(name)[: run.spec.n_models] for name in ("train_masks", "test_margins"))

    def reached(n_models, prior=None):
        return lds(fit(masks[:n_models], margins[:n_models], prior=prior).predict(held_out[0]), held_out[1])

    assert reached(200, scores) > reached(300) > reached(200)


def test_progress_counts_the_models(run):
    seen = []
    gradient_scores(run, n_models=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_networks_that_normalise_batches_are_trained_again_as_they_were(tmp_path, monkeypatch):
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
    exact = gradient_scores(run, n_models=2)
    assert np.isfinite(exact).all()
    n_parameters = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    projected = gradient_scores(run, n_models=2, projection=n_parameters - 1)
    assert np.corrcoef(projected.ravel(), exact.ravel())[0, 1] > 0.9
    monkeypatch.setattr(gradients, "_BLOCK_EXAMPLES", 23)  # and then a block of one example
    np.testing.assert_allclose(gradient_scores(run, n_models=2), exact, rtol=1e-3, atol=1e-5 * np.abs(exact).max())


def test_a_users_network_is_scored_by_projected_gradients_as_by_all(tmp_path):
    inputs, labels = sklearn.datasets.load_wine(return_X_y=True)
    is_test = np.arange(len(labels)) % 5 == 0
    dataset = save_dataset(tmp_path / "wine", (inputs[~is_test], labels[~is_test]), (inputs[is_test], labels[is_test]))
    recipe = {"name": "module", "network": "torch.nn:Linear", "arguments": {"in_features": 13, "out_features": 3}}
    spec = RunSpec(dataset=str(dataset), n_models=4, held_out={"n_subsets": 0}, recipe=recipe)
    run = Run.create(tmp_path / "run", spec)
    exact = gradient_scores(run, n_models=4)
    kept = gradient_scores(run, n_models=4, projection=42)  # of 42 parameters
    np.testing.assert_allclose(kept, exact, rtol=1e-3, atol=1e-4 * np.abs(exact).max())
    assert np.corrcoef(gradient_scores(run, n_models=4, projection=41).ravel(), exact.ravel())[0, 1] > 0.9


class Branched(nn.Module):
    """Two layers in another order than they stand in, one without a bias and one whose output comes in twice."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(8, 3), nn.Linear(13, 8, bias=False)

    def forward(self, x):
        hidden = self.first(x)
        return self.last(torch.tanh(hidden) + hidden / 2)


class Tied(Branched):
    """One layer used twice."""

    def forward(self, x):
        return self.last(torch.tanh(self.first(x) + self.first(x**2)))


class Mixing(Branched):
    """An example's layers see the others."""

    def forward(self, x):
        return super().forward(x - x.mean(0) / 3)


class Scaled(Branched):
    """A weight outside of all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return super().forward(x) * self.scale


@pytest.mark.parametrize(("network", "is_used"), [(Branched, True), (Tied, False), (Mixing, False), (Scaled, False)])
@pytest.mark.parametrize("targets", ["test", "train"])
def test_gradients_are_taken_layer_by_layer_where_that_is_exact(network, is_used, targets, tmp_path, monkeypatch):
    inputs, labels = sklearn.datasets.load_wine(return_X_y=True)
    dataset = save_dataset(tmp_path / "wine", (inputs[::2], labels[::2]), (inputs[1::2], labels[1::2]))
    recipe = {"name": "module", "network": f"{__name__}:{network.__name__}", "lr": 0.02}
    outputs = [f"{targets}_margins"]
    spec = RunSpec(dataset=str(dataset), n_models=2, held_out={"n_subsets": 0}, recipe=recipe, outputs=outputs)
    run = Run.create(tmp_path / "run", spec)
    taken = []
    add = LinearLayers.add
    monkeypatch.setattr(LinearLayers, "add", lambda *arguments: taken.append(1) or add(*arguments))
    got = gradient_scores(run, n_models=2, targets=targets)
    assert len(taken) == (2 if is_used else 0)
    kept = gradient_scores(run, n_models=2, targets=targets, projection=10_000)
    np.testing.assert_allclose(got, kept, rtol=1e-3, atol=1e-4 * np.abs(kept).max())


MEASURED = """
import re, sys
from pathlib import Path
import numpy as np
from dmpipeline import Run, RunSpec, gradient_scores
from dmpipeline.fitting import attribution
from dmpipeline.fitting.guides import layerwise

def most():  # getrusage would begin with the most its parent ever had
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

recipe = {"name": "perceptron", "hidden": 5000, "epochs": 1}
run = Run.create(sys.argv[1], RunSpec(n_models=1, held_out={"n_subsets": 0}, recipe=recipe))
run.train()
layerwise.LinearLayers.of = classmethod(lambda *_, **__: None)  # as of a network with other layers
assert attribution.GRADIENTS_BYTES == 2**30
attribution.GRADIENTS_BYTES = 2**27  # or it takes a minute
gradient_scores(run, n_models=1, projection=100)
before = most()
alone = gradient_scores(run, n_models=1)
rise = most() - before
wide = gradient_scores(run, n_models=1, projection=2**25 // 1797)
np.testing.assert_allclose(alone, wide, rtol=1e-3, atol=1e-5)
print(before, rise)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is of Linux alone")
def test_gradients_that_would_not_fit_are_projected_without_being_told(tmp_path):
    """Those of digits by a perceptron of 375,010 parameters are 2.5 GiB; an eighth of 1 GiB holds 18,672 of each."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, rise = (int(number) * 1024 for number in done.stdout.split())
    assert before + rise < 2 * 2**30
    projected, solved = 2**27, 3 * 8 * 1437**2
    assert rise < projected + solved + 200 * 2**20


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"n_models": 0}, "from 1 to the run's 300"),
        ({"damping": 0.0}, "above 0"),
        ({"projection": 0}, "projection is 0; choose a whole number from 1"),
        ({"projection": 512.5}, "projection is 512.5; choose a whole number from 1"),
        ({"projection": "4096"}, "projection is '4096'; choose a whole number from 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(run, wrong, said):
    with pytest.raises(SpecError, match=said):
        gradient_scores(run, **wrong)
