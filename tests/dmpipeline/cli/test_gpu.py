"""What a GPU computes is what the processors compute.

Skipped where there is none; with ``DMDATA_GPU_REHEARSAL=1`` the same tests run on the CPU, so that they are known to be
right before a GPU is at hand. Pictures are made up: the machine with the GPU may have torch and little else.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from dmpipeline.checks.verification import TOLERANCE, replay
from dmpipeline.data.examples import checked_dataset
from dmpipeline.data.folders import save_dataset
from dmpipeline.draws.masks import draw_masks
from dmpipeline.fitting.fitting import fit
from dmpipeline.models.recipes import CifarFast, ConvNet, LogisticRegression, Module, Perceptron, Resnet9Release
from dmpipeline.moments.binary import Bits, code_rows
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec
from dmpipeline.training.ensembles import repeatable
from dmpipeline.training.material import COMPILER, Material
from dmpipeline.training.train import GradientTrainer, Way

IS_REHEARSED = os.environ.get("DMDATA_GPU_REHEARSAL") == "1"
DEVICE = "cpu" if IS_REHEARSED else "cuda"
BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not IS_REHEARSED and not torch.cuda.is_available(),
        reason="no CUDA device; DMDATA_GPU_REHEARSAL=1 runs these tests on the CPU",
    ),
    # of torch and its compiler, on machines that are not ours
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def pictures(side, n_channels, n=20):
    rng = np.random.default_rng(0)
    inputs, labels = rng.integers(0, 256, (n, side, side, n_channels), np.uint8), np.arange(n) % 3
    return checked_dataset("made", (inputs[4:], labels[4:]), (inputs[:4], labels[:4]), source="made", example_order="-")


def numbers(n=24):
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(n, 8)).astype(np.float32), np.arange(n) % 3
    return checked_dataset("made", (inputs[4:], labels[4:]), (inputs[:4], labels[:4]), source="made", example_order="-")


FEW = {"epochs": 2, "batch_size": 4, "schedule": "constant"}
CASES = {
    "perceptron": (numbers, Perceptron(hidden=5, **FEW)),
    "logistic": (numbers, LogisticRegression(weight_decay=0.1, label_smoothing=0.1, **FEW)),
    "altered convnet": (
        lambda: pictures(9, 3),
        ConvNet(channels=(3, 5), flip="alternating", translate=1, cutout=2, tta="mirror", **FEW),
    ),
    "resnet9": (lambda: pictures(11, 3, 12), Resnet9Release(**FEW | {"lr": 0.005, "epochs": 1, "precision": "single"})),
    "cifar-fast": (lambda: pictures(9, 3), CifarFast(widths=(4, 6), **FEW | {"lr": 0.05, "precision": "single"})),
}


def trained(case, way, device=DEVICE, compiler=COMPILER, **changes):
    make, recipe = CASES[case]
    dataset, indices = make(), np.arange(3, dtype=np.uint64)
    recipe = recipe.model_copy(update=changes)
    material = Material.of(dataset, recipe, device, compiler=compiler)
    trainer = GradientTrainer(dataset, recipe, seed=3, way=way, material=material)
    logits = trainer.train(draw_masks(3, indices, dataset.n_train, 0.6), indices, range(3))
    return np.concatenate([logits.train, logits.test], axis=1).astype(np.float64)


def difference(got, expected):
    """As `verify.Replay` has it: the mean absolute one, as a share of the deviation."""
    return np.abs(got - expected).mean() / expected.std()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", [Way("loop", 1), Way("vmap", 2)], ids=["loop", "vmap"])
def test_tiny_networks_are_those_of_the_processors(case, way):
    assert difference(trained(case, way), trained(case, Way("loop", 1), "cpu")) <= TOLERANCE


@pytest.mark.parametrize("way", [Way("loop", 1), Way("vmap", 3)], ids=["loop", "vmap"])
@pytest.mark.parametrize("case", ["altered convnet", "resnet9"])
def test_the_same_model_twice_is_the_same_to_the_bit(case, way):
    assert np.array_equal(trained(case, way, precision="half"), trained(case, way, precision="half"))


@pytest.mark.parametrize("way", [Way("loop", 1), Way("vmap", 3)], ids=["loop", "vmap"])
@pytest.mark.parametrize("case", ["perceptron", "cifar-fast", "resnet9"])
def test_half_precision_does_not_diverge(case, way):
    found = trained(case, way, precision="half")
    assert np.isfinite(found).all()
    assert difference(found, trained(case, way, precision="single")) < 0.25


@pytest.mark.parametrize("case", ["perceptron", "altered convnet"])
def test_a_compiled_network_trains_each_model_as_one_that_is_not(case):
    torch.compiler.reset()
    found = trained(case, Way("loop", 1, compiled=True), compiler="eager" if IS_REHEARSED else COMPILER)
    assert difference(found, trained(case, Way("loop", 1))) <= TOLERANCE


def test_a_row_of_a_run_is_replayed_on_the_processors_and_a_row_of_theirs_on_the_device(tmp_path):
    path = save_dataset(tmp_path / "made", *_parts(pictures(9, 1)))
    recipe = {"name": "convnet", "version": 1, "epochs": 2, "batch_size": 4, "channels": [3, 5]}
    for trained_on, replayed_on in ((DEVICE, "cpu"), ("cpu", DEVICE)):
        held_out = {"n_subsets": 1, "n_retrainings": 2}
        spec = RunSpec(dataset=str(path), recipe=recipe, n_models=2, held_out=held_out, block_models=2, seed=1)
        run = Run.create(tmp_path / f"run-{trained_on}-{replayed_on}", spec)
        run.train(device=trained_on, way=Way("loop", 1))
        assert replay(run, 3, device=replayed_on).agrees
        assert replay(run, 3, device=trained_on).is_same


def _parts(dataset):
    return [(dataset.train_inputs, dataset.train_labels), (dataset.test_inputs, dataset.test_labels)]


DROPPING = """
from torch import nn

def dropping():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
"""


def test_what_dropout_draws_depends_on_seed_and_model_alone(tmp_path, monkeypatch):
    (tmp_path / "gpu_users.py").write_text(DROPPING)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = Module(epochs=3, batch_size=5, lr=0.1, network="gpu_users:dropping")
    dataset = numbers()

    def of(*indices):
        chosen = np.array(indices, np.uint64)
        trainer = GradientTrainer(dataset, recipe, seed=3, device=DEVICE)
        return trainer.train(draw_masks(3, chosen, dataset.n_train, 0.6), chosen, range(len(chosen))).train

    first, again = of(0, 1, 2), of(2, 7, 0)
    assert np.array_equal(first[0], again[2])
    assert np.array_equal(first[2], again[0])


def test_a_step_recorded_as_a_graph_is_the_step_of_the_package(benchmarks):
    from gpu_ways import whole_steps

    make, recipe = CASES["resnet9"]
    dataset, indices = make(), np.array([0], np.uint64)
    trainer = GradientTrainer(dataset, recipe, seed=3, device=DEVICE)
    masks = draw_masks(3, indices, dataset.n_train, 0.6)
    with repeatable(trainer.material.device):
        (whole,) = whole_steps(trainer, masks, 1)
        group = trainer.begin(masks, indices)
        for step in trainer.steps(masks, indices):
            whole.step(*step)
            group.step(*step)
        found, expected = (of.outputs()[0].numpy() for of in (whole.group(), group))
    assert difference(found, expected) <= TOLERANCE


def test_products_of_int8_count_what_packed_bits_count(benchmarks):
    from gpu_ways import int8_counts

    masks = np.random.default_rng(0).random((10_001, 40)) < 0.5
    counts = np.zeros((40, 40), np.int32)
    with ThreadPoolExecutor(1) as pool:
        codes = code_rows(masks, pool)
        bits = Bits(40, len(codes))
        bits.append(codes, pool)
        bits.add_counts(counts, pool)
    assert np.array_equal(int8_counts(torch.from_numpy(masks).to(DEVICE)).cpu().numpy(), counts)


@pytest.mark.parametrize("how", [{}, {"is_positive": True}], ids=["lasso", "positive"])
def test_a_fit_on_the_device_is_the_fit_on_the_processors(how):
    rng = np.random.default_rng(2)
    masks = rng.random((600, 30)) < 0.5
    truth = rng.standard_normal((30, 6)) * (rng.random((30, 6)) < 0.4)
    outputs = masks @ truth + 0.5 * rng.standard_normal((600, 6))
    here, there = fit(masks, outputs, tol=1e-4, **how), fit(masks, outputs, tol=1e-4, device=DEVICE, **how)
    same = there.lam == here.lam  # neighbours on the grid may be as good
    assert same.mean() > 0.8
    np.testing.assert_allclose(there.weight[:, same], here.weight[:, same], atol=1e-3)
    np.testing.assert_allclose(there.validation_error, here.validation_error, rtol=1e-3)
