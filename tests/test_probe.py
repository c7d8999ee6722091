import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dmpipeline import probe
from dmpipeline.ensembles import Material
from dmpipeline.errors import SpecError
from dmpipeline.examples import checked_dataset
from dmpipeline.masks import draw_bernoulli_masks, draw_masks
from dmpipeline.probe import fastest_way, model_bytes, trained_a_second
from dmpipeline.recipes import Perceptron
from dmpipeline.train import GradientTrainer, Way

SMALL = Perceptron(hidden=5, epochs=2, batch_size=10)
MANY = 10**9


def numbers(n=60):
    inputs, labels = np.random.default_rng(0).normal(size=(n, 8)), np.arange(n) % 3
    return checked_dataset("made", (inputs, labels), (inputs, labels), source="made", example_order="as made")


def pictures(side, n_channels, n):
    inputs = np.random.default_rng(0).integers(0, 256, (n, side, side, n_channels), np.uint8)
    part = inputs, np.arange(n) % 3
    return checked_dataset("made", part, part, source="made", example_order="as made")


DATASET = numbers()


@pytest.fixture
def rates(monkeypatch):
    """Have each way be as fast as a function says; list what is tried."""
    tried = []

    def set_to(rate):
        def given(trainer, masks):
            tried.append(trainer.way)
            assert len(masks) == trainer.way.n_models
            return rate(trainer.way)

        monkeypatch.setattr(probe, "trained_a_second", given)
        return tried

    return set_to


def search(*, n_masks=2000, n_models=MANY, recipe=SMALL, **settings):
    masks = draw_masks(0, np.arange(n_masks, dtype=np.uint64), DATASET.n_train, 0.5)
    return fastest_way(DATASET, recipe, seed=0, masks=masks, n_models=n_models, **settings)


@pytest.mark.parametrize("best", [1, 4, 64, 256, 1024])
@pytest.mark.parametrize("method", ["products", "vmap"])
def test_the_search_climbs_up_or_down_to_the_fastest_group_of_the_fastest_method(rates, method, best):
    def rate(way):
        distance = abs(np.log2(way.n_models) - np.log2(best))
        return (100 if way.method == method else 1) * 2.0**-distance

    rates(rate)
    assert search() == Way(method, best)


def test_a_method_without_groups_is_chosen_where_it_is_the_fastest(rates):
    tried = rates(lambda way: 9.0 if way.method == "loop" else 1.0)
    assert search() == Way("loop", 1)
    assert len(tried) == len(set(tried))


def test_a_larger_group_must_be_worth_its_memory(rates):
    rates(lambda way: 100 + way.n_models / 1000)
    assert search(methods=("products",)).n_models <= 64


def test_no_group_is_larger_than_there_are_masks(rates):
    tried = rates(lambda way: way.n_models)
    assert search(n_masks=20) == Way("products", 20)
    assert max(way.n_models for way in tried) == 20


def test_one_mask_is_enough_and_needs_no_stack_of_one(rates):
    tried = rates(lambda way: {"products": 3.0, "vmap": 5.0, "loop": 4.0}[way.method])
    assert search(n_masks=1) == Way("loop", 1)
    assert Way("vmap", 1) not in tried


def test_no_group_is_tried_that_may_not_fit_memory(rates, monkeypatch):
    tried = rates(lambda way: way.n_models)
    one = model_bytes(Material.of(DATASET, SMALL), "products")
    monkeypatch.setattr(probe, "_free_bytes", lambda _: 2 * 10 * one * torch.get_num_threads())
    # the usual group is too large already
    assert search(methods=("products",)) == Way("products", 8)
    assert {way.n_models for way in tried} == {4, 8}


def test_of_given_methods_one_is_chosen_and_one_that_cannot_be_is_refused(rates):
    tried = rates(lambda _: 1.0)
    assert search(methods=("vmap",)).method == "vmap"
    assert {way.method for way in tried} == {"vmap"}
    with pytest.raises(SpecError, match="choose vmap or loop"):
        search(methods=("products",), recipe=Perceptron(nesterov=True))


def test_nothing_is_measured_where_there_is_nothing_to_choose(rates):
    tried = rates(lambda _: 1.0)
    assert search(methods=("loop",)) == Way("loop", 1)
    assert not tried


def test_a_short_run_is_trained_as_best_guessed(rates):
    def rate(way):
        time.sleep(0.01)
        return {"products": 50.0}.get(way.method, 99.0)

    tried = rates(rate)
    assert search(n_models=1) == Way("products", 64)
    assert tried == [Way("products", 64)]


def test_whoever_looks_on_is_told_each_way_and_its_rate(rates):
    rates(lambda way: float(way.n_models))
    told = []
    search(n_masks=64, tell=lambda way, rate: told.append((way, rate)))
    assert (Way("products", 64), 64.0) in told
    assert (Way("loop", 1), 1.0) in told


def test_on_a_device_a_compiled_loop_is_tried_and_left_where_it_cannot_be(rates, monkeypatch):
    # a processor that says it is another device: what is compiled there is the same
    monkeypatch.setattr(probe, "_compiles", lambda _: True)
    rates(lambda way: 5.0 if way.compiled else 1.0)
    assert search(methods=("loop",)) == Way("loop", 1, compiled=True)

    def fails(way):
        if way.compiled:
            raise RuntimeError("no compiler")
        return 1.0

    rates(fails)
    assert search(methods=("loop",)) == Way("loop", 1)


def test_measuring_leaves_no_threads_and_torch_as_it_was():
    threads, before = torch.get_num_threads(), threading.active_count()
    generator = torch.get_rng_state()
    told = []
    masks = draw_masks(0, np.arange(8, dtype=np.uint64), DATASET.n_train, 0.5)
    way = fastest_way(DATASET, SMALL, seed=0, masks=masks, n_models=20_000, tell=lambda *found: told.append(found))
    assert way in dict(told)
    assert all(rate > 0 for _, rate in told)
    assert torch.get_num_threads() == threads
    assert threading.active_count() == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_masks_of_unequal_sizes_are_no_obstacle():
    masks = draw_bernoulli_masks(0, np.arange(30, dtype=np.uint64), DATASET.n_train, 0.5)
    assert len(set(masks.sum(1))) > 3
    assert fastest_way(DATASET, SMALL, seed=0, masks=masks, n_models=1).method == "products"


def test_a_rate_is_about_what_training_takes(monkeypatch):
    monkeypatch.setattr(probe, "_TRIAL_SECONDS", 0.5)
    recipe = Perceptron(hidden=64, epochs=40, batch_size=10)
    trainer = GradientTrainer(DATASET, recipe, seed=0, way=Way("products", 32))
    indices = np.arange(32 * torch.get_num_threads(), dtype=np.uint64)
    masks = draw_masks(0, indices, DATASET.n_train, 0.5)
    trainer.train(masks, indices, range(len(masks)))
    rate = trained_a_second(trainer, masks[:32])
    began = time.perf_counter()
    trainer.train(masks, indices, range(len(masks)))
    # other programs share the machine
    assert 0.2 < rate * (time.perf_counter() - began) / len(masks) < 5


def test_a_worker_that_fails_ends_the_measurement_and_nobody_waits_for_it(monkeypatch):
    trainer = GradientTrainer(DATASET, SMALL, seed=0, way=Way("products", 2))
    masks = draw_masks(0, np.arange(2, dtype=np.uint64), DATASET.n_train, 0.5)
    begin, calls = trainer.begin, []

    def fails_once(*arguments):
        calls.append(None)
        if len(calls) == 1:
            raise MemoryError
        return begin(*arguments)

    monkeypatch.setattr(trainer, "begin", fails_once)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises((MemoryError, threading.BrokenBarrierError)):
            trained_a_second(trainer, masks)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(n_threads)


MEASURED = """
import os, sys, threading
import numpy as np
sys.path.insert(0, sys.argv[1])
from test_probe import pictures
from dmpipeline.ensembles import Material
from dmpipeline.masks import draw_masks
from dmpipeline.probe import model_bytes
from dmpipeline.recipes import CifarFast, ConvNet
from dmpipeline.train import GradientTrainer, Way

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def most_taken(trainer, masks, indices):
    most, done = [0], threading.Event()

    def watch():
        while not done.wait(0.0005):
            most[0] = max(most[0], resident_bytes())

    before, watcher = resident_bytes(), threading.Thread(target=watch)
    watcher.start()
    with trainer.mode():
        group = trainer.begin(masks, indices)
        for step, _ in zip(trainer.steps(masks, indices), range(2)):
            group.step(*step)
    done.set()
    watcher.join()
    return most[0] - before

convnet, fast = ConvNet(channels=(16, 32), batch_size=64), CifarFast(widths=(16, 32), batch_size=64)
for recipe, method in ((convnet, "products"), (fast, "vmap")):
    dataset, indices = pictures(16, 3, 80), np.arange(6, dtype=np.uint64)
    masks = draw_masks(0, indices, dataset.n_train, 0.9)
    trainer = GradientTrainer(dataset, recipe, seed=0, way=Way(method, 6))
    most_taken(trainer, masks[:1], indices[:1])  # what is loaded and compiled is no part of it
    print(6 * model_bytes(trainer.material, method), most_taken(trainer, masks, indices))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc to see what is resident")
def test_memory_is_foreseen_within_a_factor():
    # what is freed goes back at once, so that nothing is taken from there
    at_once = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
    program = [sys.executable, "-c", MEASURED, str(Path(__file__).parent)]
    done = subprocess.run(program, env=os.environ | at_once, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        foreseen, taken = map(int, line.split())
        assert foreseen / 2.5 < taken < 2.5 * foreseen, done.stdout
