"""What `gpu.py` measures: each part yields rows. They run in a process of their own; see there for how."""

import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu_ways import Step, WholeStep, int8_counts, over_again, whole_steps

from dmpipeline.compute import available_threads
from dmpipeline.data.examples import Dataset, checked_dataset
from dmpipeline.draws.masks import draw_masks
from dmpipeline.fitting.fitting import fit_moments
from dmpipeline.models.recipes import ConvNet, Perceptron, Recipe, Resnet9Release, Resnet18Release
from dmpipeline.moments import binary
from dmpipeline.moments.moments import Moments
from dmpipeline.training.ensembles import Group, repeatable
from dmpipeline.training.material import COMPILER, Material
from dmpipeline.training.probe import fastest_way, model_bytes
from dmpipeline.training.train import GradientTrainer, Way

Array = np.ndarray[Any, Any]

SEED = 0
ALPHA = 0.5
TOLERANCE = 0.02  # that of `dmpipeline.checks.verification`, whose import is heavy; a test holds them equal
NEEDS_CUDA = "needs CUDA"
A100_SECONDS = 17
"""A CIFAR ResNet-9 on half of the examples, on an A100, as told second-hand of the release."""
N_FMOW, FMOW_CLASSES = 10_702, 62
"""Examples of a release's FMoW subset at 50%, and its classes."""


class Row(NamedTuple):
    """A line of the table; `met` is yes, no, or empty where there is no bar, or says that it needs CUDA."""

    what: str
    figure: str
    bar: str = ""
    met: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured: as on a GPU, or as little as shows that everything runs."""

    device: str
    is_full: bool

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def seconds(self) -> float:
        """How long steady steps are watched."""
        return 2.0 if self.is_full else 0.0

    def recipe(self) -> Resnet9Release:
        """The release's; a rehearsal's is shorter."""
        return Resnet9Release() if self.is_full else Resnet9Release(epochs=3, batch_size=8, lr=0.2, peak_epoch=1.0)

    def pictures(self) -> Dataset:
        """Shaped like CIFAR-10 where it is full size."""
        return made_pictures(50_000, 10_000, 32, 10) if self.is_full else made_pictures(96, 24, 11, 2)


def environment(size: Size) -> Iterator[Row]:
    """Say what machine this is."""
    if size.is_cuda:
        about = torch.cuda.get_device_properties(size.device)
        memory = f"{about.total_memory / 2**30:.0f} GiB, {about.multi_processor_count} multiprocessors"
        yield Row("GPU", about.name, note=f"{memory}, driver {_driver()}")
    else:
        yield Row("GPU", "none", met=NEEDS_CUDA)
    yield Row("torch", torch.__version__, note=f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    yield Row("Python", platform.python_version(), note=f"numpy {np.__version__}, {available_threads()} processors")


def equal(size: Size) -> Iterator[Row]:
    """Tiny networks trained on the device and on the processors, of the same draws."""
    few: dict[str, Any] = {"batch_size": 4, "schedule": "constant", "precision": "single"}
    few["epochs"] = 2 if size.is_full else 1
    n_train = 32 if size.is_full else 16
    grey, colour = made_pictures(n_train, 8, 8, 3, n_channels=1), made_pictures(n_train, 8, 11, 3)
    cases: list[tuple[str, Dataset, Recipe, Way]] = [
        ("ResNet-9 by loop", colour, Resnet9Release(**few | {"lr": 0.01}), Way("loop", 1)),
        ("ResNet-9 by vmap", colour, Resnet9Release(**few | {"lr": 0.01}), Way("vmap", 3)),
        ("convnet by loop", grey, ConvNet(channels=(4, 8), **few), Way("loop", 1)),
        ("convnet by vmap", grey, ConvNet(channels=(4, 8), **few), Way("vmap", 3)),
        ("perceptron by vmap", grey, Perceptron(hidden=8, **few), Way("vmap", 3)),
    ]
    for what, dataset, recipe, way in cases:
        here, there = (
            _logits(dataset, recipe, of, device) for of, device in ((Way("loop", 1), "cpu"), (way, size.device))
        )
        share = float(np.abs(there - here).mean() / here.std())
        note = "mean difference, as a share of the deviation"
        yield _judged(f"equal to the CPU's: {what}", f"{share:.2g}", f"<= {TOLERANCE}", share <= TOLERANCE, note)
    half = Resnet9Release(**few | {"lr": 0.01, "precision": "half"})
    first, again = (_logits(colour, half, Way("loop", 1), size.device) for _ in range(2))
    one = _logits(colour, half.model_copy(update={"precision": "single"}), Way("loop", 1), size.device)
    share = float(np.abs(first - one).mean() / one.std())
    note = "float16 against single precision, where small" if size.is_cuda else "a CPU computes both in single"
    yield _judged("half precision stays near single: ResNet-9", f"{share:.2g}", "<= 0.2", share <= 0.2, note)
    yield _same("same to the bit, twice: ResNet-9 by loop", first, again)
    deep = Resnet18Release(**few | {"lr": 0.01, "epochs": 1})
    first, again = (_logits(colour, deep, Way("loop", 1), size.device, n_models=1) for _ in range(2))
    yield _same("same to the bit, twice: ResNet-18 by loop", first, again)


def ways(size: Size) -> Iterator[Row]:
    """Seconds a model of each way, by steady steps."""
    trainer = GradientTrainer(size.pictures(), size.recipe(), seed=SEED, device=size.device)
    single = _sibling(trainer, precision="single")
    masks = _masks(8, trainer.dataset.n_train)
    with repeatable(trainer.material.device):
        yield _timed(size, "ResNet-9, loop, half precision", trainer, masks[:1], note="float16, loss scaling")
        yield _timed(size, "ResNet-9, loop, single precision", single, masks[:1], note="TensorFloat-32 in convolutions")
        without = _begin(trainer, masks[:1])
        without._half, without._scaler = torch.bfloat16, torch.amp.GradScaler("cuda", enabled=False)  # type: ignore[attr-defined]
        yield _timed(size, "ResNet-9, loop, bfloat16", trainer, masks[:1], without.step, note="no loss scaling")
    if size.is_cuda:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        yield _timed(size, _CHOOSING, trainer, masks[:1], note="float16, may differ from run to run")
        torch.backends.cudnn.benchmark = before
    else:
        yield Row(_CHOOSING, "", met=NEEDS_CUDA)
    del without, single
    yield from _graphed(size, trainer, masks)
    for n_models in (2, 4, 8):
        with repeatable(trainer.material.device):
            of_group = GradientTrainer(
                trainer.dataset, size.recipe(), seed=SEED, way=Way("vmap", n_models), material=trainer.material
            )
            if size.is_full or n_models == 2:
                yield _timed(size, f"ResNet-9, vmap of {n_models}", of_group, masks[:n_models], note="bfloat16")
            else:
                yield Row(f"ResNet-9, vmap of {n_models}", "", met=NEEDS_CUDA)
        _forget(size)


_CHOOSING = "ResNet-9, loop, half precision, cuDNN chooses"


def _graphed(size: Size, trainer: GradientTrainer, masks: Array) -> Iterator[Row]:
    """The whole step as a graph, of one model, and of several on streams of their own."""
    with repeatable(trainer.material.device):
        models = whole_steps(trainer, masks, 4)
        steps = over_again(lambda: trainer.steps(masks[:1], np.zeros(1, np.uint64)))
        for n_models, what in ((1, "a CUDA graph a step"), (2, "graphs on 2 streams"), (4, "graphs on 4 streams")):

            def step(*of: Any, some: list[WholeStep] = models[:n_models]) -> None:
                for model in some:
                    model.step(*of)

            seconds = _seconds_a_step(size, step, steps)
            if size.is_cuda:
                yield _rate(f"ResNet-9, {what}", seconds, trainer, masks[:n_models], "bfloat16, no loss scaling")
            else:
                yield Row(f"ResNet-9, {what}", "", met=NEEDS_CUDA, note="its steps ran")
    del models
    _forget(size)


def whole(size: Size) -> Iterator[Row]:
    """One whole training of two ways, from the draws to the outputs on all examples."""
    trainer = GradientTrainer(size.pictures(), size.recipe(), seed=SEED, device=size.device)
    masks = _masks(1, trainer.dataset.n_train)
    with repeatable(trainer.material.device):
        _warm(size, trainer, masks)
        yield from _whole_training(size, "loop", trainer, lambda: _begin(trainer, masks))
        yield _peak_memory(size, "peak memory, one model by loop", model_bytes(trainer.material, "loop"))

        def graphed() -> WholeStep:
            (model,) = whole_steps(trainer, masks, 1)
            return model

        yield from _whole_training(size, "CUDA graph", trainer, graphed, needs_cuda=True)


def compiled(size: Size) -> Iterator[Row]:
    """Networks compiled by torch, with its own CUDA graphs and without."""
    # a rehearsal is of what surrounds the compiler
    compiler = COMPILER if size.is_cuda else "eager"
    material = Material.of(size.pictures(), size.recipe(), size.device, compiler=compiler)
    trainer = GradientTrainer(
        material.dataset, material.recipe, seed=SEED, way=Way("loop", 1, compiled=True), material=material
    )
    masks = _masks(1, trainer.dataset.n_train)
    with repeatable(trainer.material.device):
        began = time.perf_counter()
        _warm(size, trainer, masks)
        seconds = time.perf_counter() - began
        yield _on_cuda(size, Row("compiling ResNet-9", f"{seconds:.1f} s", note="once a process, with its first steps"))
        what = "ResNet-9, compiled, torch's CUDA graphs"
        yield _on_cuda(size, _timed(size, what, trainer, masks, note="reduce-overhead, float16, loss scaling"))
        for row in _whole_training(size, "compiled", trainer, lambda: _begin(trainer, masks)):
            yield _on_cuda(size, row)
        network = trainer.material.compiled[0]
        plain = torch.compile(network, backend=compiler, dynamic=False)
        vars(trainer.material)["compiled"] = (network, plain)
        _warm(size, trainer, masks)
        what = "ResNet-9, compiled, no CUDA graphs"
        yield _on_cuda(size, _timed(size, what, trainer, masks, note="float16, loss scaling"))


def processes(size: Size) -> Iterator[Row]:
    """Several processes on one device, each of which trains a model by loop; a rehearsal has one."""
    most = 4 if size.is_full else 1
    context = multiprocessing.get_context("spawn")
    barrier, said = context.Barrier(most), context.Queue()
    started = [context.Process(target=_one_of, args=(n, size, barrier, said), daemon=True) for n in range(most)]
    for process in started:
        process.start()
    rates: dict[int, list[float]] = {2: [], 4: []}
    for _ in range(2 + 4 if size.is_full else 1):
        at_once, rate = said.get(timeout=120)
        if isinstance(rate, str):
            raise RuntimeError(f"a process failed: {rate}")
        rates[at_once].append(rate)
    for process in started:
        process.join()
    for n, found in rates.items():
        each = f"each {statistics.mean(1 / rate for rate in found):.3g} s" if found else ""
        figure = f"{1 / sum(found):.3g} s a model" if len(found) == n else ""
        yield _on_cuda(size, Row(f"ResNet-9, loop, half precision, {n} processes", figure, note=each))


def _one_of(number: int, size: Size, barrier: Any, said: Any) -> None:
    try:
        if not size.is_cuda:
            torch.set_num_threads(1)
        trainer = GradientTrainer(size.pictures(), size.recipe(), seed=SEED, device=size.device)
        masks = _masks(1, trainer.dataset.n_train)
        with repeatable(trainer.material.device):
            _warm(size, trainer, masks)
            for at_once in (2, 4) if size.is_full else (2,):
                barrier.wait(100)
                if number < at_once:
                    seconds = _seconds_of(size, trainer, masks)
                    said.put((at_once, 1 / (seconds * trainer.n_steps(int(masks[0].sum())))))
    except Exception as error:
        barrier.abort()
        said.put((0, f"{type(error).__name__}: {error}"))
        raise


def resnet18(size: Size) -> Iterator[Row]:
    """A ResNet-18 of the release's recipe on made-up pictures, by steady steps."""
    recipe = Resnet18Release() if size.is_full else Resnet18Release(batch_size=4, epochs=1, schedule="constant")
    dataset = made_pictures(2048, 8, 224, FMOW_CLASSES) if size.is_full else made_pictures(8, 4, 33, 2)
    trainer = GradientTrainer(dataset, recipe, seed=SEED, device=size.device)
    masks = _masks(1, dataset.n_train)
    n_steps = recipe.epochs * (N_FMOW // recipe.batch_size) if size.is_full else None
    with repeatable(trainer.material.device):
        what, note = (
            "ResNet-18 at 224, loop, half precision",
            f"of {recipe.epochs} epochs of {N_FMOW if size.is_full else dataset.n_train // 2:,}",
        )
        yield _timed(size, what, trainer, masks, note=note, n_steps=n_steps)
        yield _peak_memory(size, "peak memory, one ResNet-18 by loop", model_bytes(trainer.material, "loop"))
        _forget(size)
        (model,) = whole_steps(trainer, masks, 1)
        row = _timed(
            size, "ResNet-18 at 224, a CUDA graph a step", trainer, masks, model.step, note=note, n_steps=n_steps
        )
        yield _on_cuda(size, row)


def fit(size: Size) -> Iterator[Row]:
    """Datamodels solved on the device and on the processors, from the same second moments."""
    from fitting import planted

    n_models, n_train, n_targets = (20_000, 4_000, 512) if size.is_full else (1_100, 60, 8)
    small_masks, small_outputs = planted(220, 20, 2, n_effects=4, scale=0.3)
    small = Moments.of(small_masks, small_outputs, stop=200), Moments.of(small_masks, small_outputs, start=200)
    fit_moments(*small), fit_moments(*small, device=size.device)  # compiles, and starts the device's libraries
    masks, outputs = planted(n_models, n_train, n_targets, n_effects=min(40, n_train // 5), scale=0.3)
    n_fit = n_models * 10 // 11
    moments = Moments.of(masks, outputs, stop=n_fit), Moments.of(masks, outputs, start=n_fit)
    found, rates = [], []
    for device in (None, size.device):
        began = time.perf_counter()
        found.append(fit_moments(*moments, device=device))
        _wait(size)
        rates.append(n_targets / (time.perf_counter() - began))
    shape = f"{n_models:,} x {n_train:,} x {n_targets} from moments"
    yield Row("fit, processors", f"{rates[0]:.3g} targets a s", note=f"{shape}, {n_targets / rates[0]:.2f} s")
    note = f"on {size.device}, {n_targets / rates[1]:.2f} s"
    row = _judged("fit, device", f"{rates[1]:.3g} targets a s", f">= {rates[0]:.3g}", rates[1] >= rates[0], note)
    yield _on_cuda(size, row)
    here, there = found
    same = here.lam == there.lam
    yield _judged("fit, targets with the same lam", f"{same.mean():.1%}", ">= 80%", bool(same.mean() >= 0.8), "")
    scale = np.abs(here.weight[:, same]).max() if same.any() else 1.0
    largest = float(np.abs(here.weight - there.weight)[:, same].max() / scale) if same.any() else np.inf
    note = "of those, the largest difference over the largest weight"
    yield _judged("fit, same weights", f"{largest:.2g}", "<= 0.02", largest <= 0.02, note)


def int8(size: Size) -> Iterator[Row]:
    """X'X of masks by products of int8 on the device, against counts of packed bits on the processors."""
    n_models, n_train = (65_536, 8_192) if size.is_full else (1_000, 64)
    masks = np.random.default_rng(0).integers(0, 2, (n_models, n_train), np.uint8).view(np.bool_)
    wanted = np.zeros((n_train, n_train), np.int32)
    with ThreadPoolExecutor(available_threads()) as pool:
        for _ in range(2):  # the first compiles
            wanted[:] = 0
            began = time.perf_counter()
            codes = binary.code_rows(masks, pool)
            bits = binary.Bits(n_train, len(codes))
            bits.append(codes, pool)
            counted = time.perf_counter()
            bits.add_counts(wanted, pool)
            ended = time.perf_counter()
    note = f"{n_models:,} x {n_train:,}, and {counted - began:.2g} s to pack them"
    yield Row("X'X by packed bits, processors", f"{ended - counted:.3g} s", note=note)
    on_host = torch.from_numpy(masks)
    found = int8_counts(on_host[:8192].to(size.device))
    _wait(size)
    began = time.perf_counter()
    there = on_host.to(size.device)
    _wait(size)
    moved = time.perf_counter()
    found = int8_counts(there)
    _wait(size)
    seconds = time.perf_counter() - moved
    bar, is_faster = f"<= {ended - counted:.3g} s", seconds <= ended - counted
    note = f"and {moved - began:.2g} s to bring them there"
    row = _judged("X'X by int8 products, device", f"{seconds:.3g} s", bar, is_faster, note)
    yield _on_cuda(size, row)
    n_wrong = int((found.cpu().numpy() != wanted).sum())
    yield _judged("X'X by int8 products, counts that differ", f"{n_wrong:,}", "= 0", n_wrong == 0, "")


def probe(size: Size) -> Iterator[Row]:
    """The way that a run of this many models would be trained in."""
    dataset, recipe = size.pictures(), size.recipe()
    small = ConvNet(epochs=1, batch_size=8, channels=(4, 8))
    tried: list[str] = []

    def tell(way: Way, rate: float) -> None:
        tried.append(f"{_named(way)} {1 / rate:.3g} s" if rate else f"{_named(way)} not")

    began = time.perf_counter()
    masks = _masks(16 if size.is_full else 2, dataset.n_train)
    chosen = fastest_way(
        dataset, recipe if size.is_full else small, seed=SEED, masks=masks, n_models=1000, device=size.device, tell=tell
    )
    note = f"found in {time.perf_counter() - began:.1f} s; a model: {', '.join(tried)}"
    yield _on_cuda(size, Row("the way that the probe chooses", _named(chosen), note=note))


def _named(way: Way) -> str:
    return f"{way.method} {way.n_models}{' compiled' * way.compiled}"


PARTS: dict[str, Callable[[Size], Iterator[Row]]] = {
    part.__name__: part for part in (environment, equal, ways, whole, compiled, processes, resnet18, fit, int8, probe)
}


def made_pictures(n_train: int, n_test: int, side: int, n_classes: int, *, n_channels: int = 3) -> Dataset:
    """Make pictures of bytes up: each class has a grey pattern of its own, under noise of each picture's.

    A network that has learned tells nearly all of them, one that has not one in `n_classes`. Patterns are grey, so that
    channels may be reversed.
    """
    rng = np.random.default_rng(0)
    coarse = rng.choice([-20, 20], (n_classes, -(-side // 4), -(-side // 4)))
    patterns = np.kron(coarse, np.ones((1, 4, 4), int))[:, :side, :side, None].astype(np.int16)
    parts = []
    for n in (n_train, n_test):
        labels = rng.integers(0, n_classes, n)
        labels[:n_classes] = np.arange(n_classes)[:n]
        inputs = rng.integers(64, 192, (n, side, side, n_channels), np.uint8)
        for first in range(0, n, 1024):
            some = slice(first, first + 1024)
            inputs[some] = inputs[some] + patterns[labels[some]]
        parts.append((inputs, labels))
    return checked_dataset("made-up", *parts, source="made up", example_order="as made")


def _masks(n_models: int, n_train: int) -> Array:
    return draw_masks(SEED, np.arange(n_models, dtype=np.uint64), n_train, ALPHA)


def _sibling(trainer: GradientTrainer, **changes: Any) -> GradientTrainer:
    """The same with a changed recipe, and the same examples on the device."""
    recipe = trainer.recipe.model_copy(update=changes)
    other = GradientTrainer(trainer.dataset, recipe, seed=SEED, device=str(trainer.material.device))
    for name in ("train_inputs", "test_inputs", "labels"):
        vars(other.material)[name] = getattr(trainer.material, name)
    return other


def _begin(trainer: GradientTrainer, masks: Array) -> Group:
    return trainer.begin(masks, np.arange(len(masks), dtype=np.uint64))


def _logits(dataset: Dataset, recipe: Recipe, way: Way, device: str, *, n_models: int = 3) -> Array:
    """Outputs of some models on all examples."""
    trainer = GradientTrainer(dataset, recipe, seed=SEED, way=way, device=device)
    logits = trainer.train(_masks(n_models, dataset.n_train), np.arange(n_models, dtype=np.uint64), range(n_models))
    return np.concatenate([logits.train, logits.test], axis=1).astype(np.float64)


def _warm(size: Size, trainer: GradientTrainer, masks: Array) -> None:
    group, steps = _begin(trainer, masks), trainer.steps(masks, np.arange(len(masks), dtype=np.uint64))
    for _ in range(5 if size.is_full else 1):
        group.step(*next(steps))
    _wait(size)


def _seconds_a_step(size: Size, step: Callable[..., None], steps: Iterator[Step]) -> float:
    """Watch steady steps; the device is waited for after every tenth only, as it is in a training."""
    for _ in range(5 if size.is_full else 1):
        step(*next(steps))
    _wait(size)
    began, n_steps = time.perf_counter(), 0
    while not n_steps or time.perf_counter() - began < size.seconds:
        for _ in range(10 if size.is_full else 1):
            step(*next(steps))
            n_steps += 1
        _wait(size)
    return (time.perf_counter() - began) / n_steps


def _seconds_of(size: Size, trainer: GradientTrainer, masks: Array, step: Callable[..., None] | None = None) -> float:
    step = step or _begin(trainer, masks).step
    return _seconds_a_step(size, step, over_again(lambda: trainer.steps(masks, np.arange(len(masks), dtype=np.uint64))))


def _timed(
    size: Size,
    what: str,
    trainer: GradientTrainer,
    masks: Array,
    step: Callable[..., None] | None = None,
    *,
    note: str,
    n_steps: int | None = None,
) -> Row:
    return _rate(what, _seconds_of(size, trainer, masks, step), trainer, masks, note, n_steps)


def _rate(
    what: str, seconds: float, trainer: GradientTrainer, masks: Array, note: str, n_steps: int | None = None
) -> Row:
    """Seconds a model, of its steps alone."""
    n_steps, n_models = n_steps or trainer.n_steps(int(masks[0].sum())), len(masks)
    batch = min(trainer.recipe.batch_size, int(masks[0].sum()))
    figure = f"{seconds * n_steps / n_models:.3g} s a model"
    return Row(what, figure, note=f"{note}; {1e3 * seconds:.3g} ms a step of {n_models} x {batch}")


def _whole_training(
    size: Size, way: str, trainer: GradientTrainer, begin: Callable[[], Any], *, needs_cuda: bool = False
) -> Iterator[Row]:
    """Seconds and accuracy of one model."""
    masks, index = _masks(1, trainer.dataset.n_train), np.zeros(1, np.uint64)
    _forget(size)
    began = time.perf_counter()
    model = begin()
    for step in trainer.steps(masks, index):
        model.step(*step)
    _wait(size)
    trained = time.perf_counter()
    group = model.group() if isinstance(model, WholeStep) else model
    _, test = group.outputs()
    ended = time.perf_counter()
    accuracy = float((test[0].numpy().argmax(-1) == trainer.dataset.test_labels).mean())
    n_outputs = trainer.dataset.n_train + trainer.dataset.n_test
    note = f"one training; then {ended - trained:.2f} s for outputs on {n_outputs:,}"
    rows = [
        _judged(
            f"whole ResNet-9, {way}",
            f"{trained - began:.2f} s",
            f"<= {A100_SECONDS} s",
            trained - began <= A100_SECONDS,
            note,
        ),
        _judged(f"its accuracy, {way}", f"{accuracy:.1%}", "> 90%", accuracy > 0.9, "of made-up test pictures"),
    ]
    yield from (_on_cuda(size, row) for row in rows) if needs_cuda else rows


def _peak_memory(size: Size, what: str, n_bytes: int) -> Row:
    note = f"the probe reckons with {n_bytes / 2**30:.2f} GiB"
    if not size.is_cuda:
        return Row(what, "", met=NEEDS_CUDA, note=note)
    taken, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return Row(
        what, f"{taken / 2**30:.2f} GiB", note=f"with its examples; {held / 2**30:.2f} GiB held by torch; {note}"
    )


def _judged(what: str, figure: str, bar: str, is_met: bool, note: str) -> Row:
    return Row(what, figure, bar, "yes" if is_met else "no", note)


def _same(what: str, one: Array, other: Array) -> Row:
    return _judged(what, "same" if np.array_equal(one, other) else "differ", "same", np.array_equal(one, other), "")


def _on_cuda(size: Size, row: Row) -> Row:
    """Give a row as it is, or say that its figure needs CUDA, though everything ran."""
    return row if size.is_cuda else row._replace(met=NEEDS_CUDA)


def _forget(size: Size) -> None:
    if size.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _wait(size: Size) -> None:
    if size.is_cuda:
        torch.cuda.synchronize()


def _driver() -> str:
    try:
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return f"unknown{', CUDA_VISIBLE_DEVICES set' * ('CUDA_VISIBLE_DEVICES' in os.environ)}"
