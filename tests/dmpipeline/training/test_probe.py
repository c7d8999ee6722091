import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from dmpipeline.data.examples import checked_dataset
from dmpipeline.draws.masks import draw_bernoulli_masks, draw_masks
from dmpipeline.errors import SpecError
from dmpipeline.models.recipes import Module, Perceptron
from dmpipeline.training.material import Material
from dmpipeline.training.probe import Machine, fastest_way, model_bytes, trained_a_second
from dmpipeline.training.train import GradientTrainer, Way

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


def machine(rate, **facts):
    """Make a machine on which each way is as fast as a function says, and the list of what it is asked to try."""
    tried = []

    def given(trainer, masks):
        tried.append(trainer.way)
        assert len(masks) == trainer.way.n_models
        return rate(trainer.way)

    return Machine(rate=given, **facts), tried


def search(*, n_masks=2000, n_models=MANY, recipe=SMALL, **settings):
    masks = draw_masks(0, np.arange(n_masks, dtype=np.uint64), DATASET.n_train, 0.5)
    return fastest_way(DATASET, recipe, seed=0, masks=masks, n_models=n_models, **settings)


@pytest.mark.parametrize("best", [1, 4, 64, 256, 1024])
@pytest.mark.parametrize("method", ["products", "vmap"])
def test_the_search_climbs_up_or_down_to_the_fastest_group_of_the_fastest_method(method, best):
    def rate(way):
        distance = abs(np.log2(way.n_models) - np.log2(best))
        return (100 if way.method == method else 1) * 2.0**-distance

    assert search(machine=machine(rate)[0]) == Way(method, best)


def test_a_method_without_groups_is_chosen_where_it_is_the_fastest():
    on, tried = machine(lambda way: 9.0 if way.method == "loop" else 1.0)
    assert search(machine=on) == Way("loop", 1)
    assert len(tried) == len(set(tried))


def test_a_larger_group_must_be_worth_its_memory():
    on, _ = machine(lambda way: 100 + way.n_models / 1000)
    assert search(methods=("products",), machine=on).n_models <= 64


def test_no_group_is_larger_than_there_are_masks():
    on, tried = machine(lambda way: way.n_models)
    assert search(n_masks=20, machine=on) == Way("products", 20)
    assert max(way.n_models for way in tried) == 20


def test_one_mask_is_enough_and_needs_no_stack_of_one():
    on, tried = machine(lambda way: {"products": 3.0, "vmap": 5.0, "loop": 4.0}[way.method])
    assert search(n_masks=1, machine=on) == Way("loop", 1)
    assert Way("vmap", 1) not in tried


def test_no_group_is_tried_that_may_not_fit_memory():
    one = model_bytes(Material.of(DATASET, SMALL), "products")
    on, tried = machine(lambda way: way.n_models, free_bytes=lambda _: 2 * 10 * one * torch.get_num_threads())
    # the usual group is too large already
    assert search(methods=("products",), machine=on) == Way("products", 8)
    assert {way.n_models for way in tried} == {4, 8}


def test_of_given_methods_one_is_chosen_and_one_that_cannot_be_is_refused():
    on, tried = machine(lambda _: 1.0)
    assert search(methods=("vmap",), machine=on).method == "vmap"
    assert {way.method for way in tried} == {"vmap"}
    with pytest.raises(SpecError, match="choose vmap or loop"):
        search(methods=("products",), recipe=Perceptron(nesterov=True))


def test_nothing_is_measured_where_there_is_nothing_to_choose():
    on, tried = machine(lambda _: 1.0)
    assert search(methods=("loop",), machine=on) == Way("loop", 1)
    assert not tried


def test_a_short_run_is_trained_as_best_guessed():
    hours = itertools.count()
    on, tried = machine(lambda way: {"products": 50.0}.get(way.method, 99.0), clock=lambda: 3600.0 * next(hours))
    assert search(n_models=1, machine=on) == Way("products", 64)
    assert tried == [Way("products", 64)]


def test_each_way_that_is_tried_is_reported_with_its_rate():
    told = []
    on, _ = machine(lambda way: float(way.n_models))
    search(n_masks=64, machine=on, tell=lambda way, rate: told.append((way, rate)))
    assert (Way("products", 64), 64.0) in told
    assert (Way("loop", 1), 1.0) in told


def test_where_compiling_may_be_worth_it_a_compiled_loop_is_tried_and_left_where_it_fails():
    on, _ = machine(lambda way: 5.0 if way.compiled else 1.0, is_worth_compiling=lambda _: True)
    assert search(methods=("loop",), machine=on) == Way("loop", 1, compiled=True)

    def fails(way):
        if way.compiled:
            raise RuntimeError("no compiler")
        return 1.0

    on, _ = machine(fails, is_worth_compiling=lambda _: True)
    assert search(methods=("loop",), machine=on) == Way("loop", 1)


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


def test_a_rate_counts_the_steps_that_fit_into_the_time_given():
    recipe = Perceptron(hidden=5, epochs=4, batch_size=10)
    trainer = GradientTrainer(DATASET, recipe, seed=0, way=Way("products", 32))
    masks = draw_masks(0, np.arange(32, dtype=np.uint64), DATASET.n_train, 0.5)
    n_threads, ticks = torch.get_num_threads(), itertools.count()
    torch.set_num_threads(1)
    try:
        # each step begins a second after the last: five of them, then six seconds have passed
        rate = trained_a_second(trainer, masks, seconds=5.5, clock=lambda: float(next(ticks)))
    finally:
        torch.set_num_threads(n_threads)
    n_steps = 4 * (30 // 10)
    assert rate == pytest.approx(5 * 32 / 6 / n_steps)


FAILING = """
from torch import nn

class Failing(nn.Module):
    fails = False

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, inputs):
        if Failing.fails:
            Failing.fails = False
            raise MemoryError
        return self.linear(inputs)
"""


def test_a_worker_that_fails_ends_the_measurement_and_no_other_waits_for_it(tmp_path, monkeypatch):
    (tmp_path / "failing_users.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = Module(epochs=2, batch_size=10, lr=0.1, network="failing_users:Failing")
    trainer = GradientTrainer(DATASET, recipe, seed=0)
    masks = draw_masks(0, np.arange(1, dtype=np.uint64), DATASET.n_train, 0.5)
    assert not trainer.material.draws  # found out by trying the network, before it fails
    sys.modules["failing_users"].Failing.fails = True
    n_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises((MemoryError, threading.BrokenBarrierError)):
            trained_a_second(trainer, masks)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(n_threads)
        del sys.modules["failing_users"]


MEASURED = """
import os, sys, threading
import numpy as np
sys.path.insert(0, sys.argv[1])
from test_probe import pictures
from dmpipeline.training.material import Material
from dmpipeline.draws.masks import draw_masks
from dmpipeline.training.probe import model_bytes
from dmpipeline.models.recipes import CifarFast, ConvNet
from dmpipeline.training.train import GradientTrainer, Way

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
