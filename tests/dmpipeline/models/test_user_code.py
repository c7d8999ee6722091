"""What a user's own code prints, raises and returns: never in the data, told by the user's own lines, with a remedy."""

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from cluster_runs import write_letters
from sklearn.datasets import load_wine

from dmpipeline.checks.verification import replay
from dmpipeline.data.datasets import load_dataset
from dmpipeline.draws.masks import Purpose, draw_bits
from dmpipeline.errors import SpecError, TrainingError, UserCodeError
from dmpipeline.models.recipes import Function, Module
from dmpipeline.models.returned import checked_outputs
from dmpipeline.models.usercode import import_object
from dmpipeline.runs.store import Run
from dmpipeline.spec import RecipeSpec, RunSpec
from dmpipeline.training.train import Way, make_trainer

ROOT = str(Path(__file__).parents[3])
MAIN = "from dmpipeline.cli.command import main; main()"
FITS = """
    import numpy as np
    def outputs(dataset, value=0.0):
        return tuple(np.full((n, dataset.n_classes), value) for n in (dataset.n_train, dataset.n_test))
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a module into the working directory, which is on no path, and forget it at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    written = []

    def write(text, name="code_of_a_user"):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def wine(tmp_path_factory):
    """scikit-learn's wine as a file, every fourth example for testing."""
    x, y = load_wine(return_X_y=True)
    is_test = np.arange(len(x)) % 4 == 0
    path = tmp_path_factory.mktemp("wine") / "wine.npz"
    parts = {"train_inputs": x[~is_test], "train_labels": y[~is_test]}
    np.savez(path, **parts, test_inputs=x[is_test], test_labels=y[is_test])
    return load_dataset(str(path))


def trained(dataset, recipe, rows=(5, 6)):
    masks = np.zeros((len(rows), dataset.n_train), np.bool_)
    masks[:, ::2] = True
    return make_trainer(dataset, recipe, seed=0).train(masks, np.array(rows, np.uint64), rows)


def command(folder, *words):
    """Run a command as an installed script does, without the working directory on its path."""
    env = os.environ | {"PYTHONPATH": ROOT}
    program = [sys.executable, "-P", "-c", MAIN, *map(str, words)]
    return subprocess.run(program, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def made_run(folder, text, **changes):
    """Create a run of two blocks whose function `learn` of the module `mine` in the folder trains it."""
    (folder / "mine.py").write_text(textwrap.dedent(text))
    values = {"dataset": write_letters(folder), "n_models": 4, "held_out": {"n_subsets": 0}, "block_models": 2}
    spec = RunSpec(**(values | {"recipe": {"name": "function", "function": "mine:learn"}} | changes))
    (folder / "spec.yaml").write_text(spec.to_yaml())
    return command(folder, "init", "r", "--spec", "spec.yaml", "--json")


def test_nothing_that_a_users_code_prints_reaches_standard_output_and_it_is_found_in_the_working_directory(tmp_path):
    noise = """
        import atexit, ctypes, os, subprocess, sys, threading
        import numpy as np
        print("NOISE at import")
        atexit.register(print, "NOISE at exit")
        def learn(dataset, mask, seed):
            print("NOISE printed")
            sys.__stdout__.write("NOISE by the first stream")
            os.write(1, b"NOISE by number")
            ctypes.CDLL(None).puts(b"NOISE by C")
            subprocess.run(["echo", "NOISE of a process"])
            return [np.zeros((n, dataset.n_classes)) for n in (dataset.n_train, dataset.n_test)]
    """
    made = made_run(tmp_path, noise)
    done = command(tmp_path, "run", "r", "--json")
    assert (made.returncode, done.returncode) == (0, 0), made.stderr + done.stderr
    assert json.loads(made.stdout)["n_rows"] == 4
    assert json.loads(done.stdout)["n_rows_done"] == 4
    for how in ("at import", "at exit", "printed", "by the first stream", "by number", "by C", "of a process"):
        assert f"NOISE {how}" in done.stderr
    table = command(tmp_path, "run", "r", "--replay", "1")
    assert "NOISE" in table.stderr
    assert "NOISE" not in table.stdout
    assert table.stdout.split()[:1] == ["array"]


def test_a_function_that_fails_is_told_by_the_users_lines_in_the_terminal_and_on_record(tmp_path):
    made_run(tmp_path, "def half(n):\n    return 1 / n\n\ndef learn(dataset, mask, seed):\n    return half(0)\n")
    done = command(tmp_path, "run", "r", "-q")
    assert (done.returncode, done.stdout) == (1, "")
    first, *frames = done.stderr.splitlines()
    assert first.startswith("dmpipeline: row 0: recipe.function 'mine:learn' fails with ZeroDivisionError: division by")
    assert "dmpipeline init OTHER --spec RUN/run.yaml" in first
    assert [line.strip() for line in frames if "File" in line] == [
        f'File "{tmp_path}/mine.py", line {line}, in {name}' for line, name in ((5, "learn"), (2, "half"))
    ]
    assert "fault of dmpipeline" not in done.stderr
    record = (tmp_path / "r" / "failures" / "block-0.txt").read_text()
    assert "direct cause" in record
    assert "return 1 / n" in record.rpartition("\n\n")[2]


def test_the_causes_of_failed_blocks_are_told_where_a_cluster_trains(tmp_path):
    pytest.importorskip("distributed")
    made_run(
        tmp_path, "def learn(dataset, mask, seed):\n    print('NOISE')\n    raise ArithmeticError('will not do')\n"
    )
    done = command(tmp_path, "run", "r", "--workers", "1", "--json")
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "rows 0 to 1, 2 to 3" in done.stderr
    assert "fails with ArithmeticError: will not do" in done.stderr
    assert f'File "{tmp_path}/mine.py", line 3, in learn' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise SystemExit", "sys.exit"),
        ("import sys; sys.exit(0)", r"sys.exit\(0\)"),
        ("raise OSError(28, 'No space left')", "OSError: .*No space left"),
        ("raise MemoryError", "MemoryError"),
        ("learn(dataset, mask, seed)", "RecursionError"),
        ("raise BaseException('odd')", "BaseException: odd"),
        ("raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})", "cannot be shown"),
    ],
)
def test_whatever_a_function_raises_is_a_training_error_that_names_row_and_line(write, wine, body, words):
    name = write(f"def learn(dataset, mask, seed):\n    {body}\n")
    with pytest.raises(TrainingError, match=words) as caught:
        trained(wine, Function(function=f"{name}:learn"))
    assert caught.value.rows == [5]
    assert caught.value.exit_code == 1
    assert f"{name}.py" in caught.value.frames
    assert len(caught.value.frames.splitlines()) < 40
    assert "dmpipeline" not in caught.value.frames


def test_an_interrupt_stays_one_in_the_main_thread_and_is_the_codes_own_in_others(write, wine):
    recipe = Function(function=f"{write('def learn(*_): raise KeyboardInterrupt')}:learn")
    with pytest.raises(KeyboardInterrupt):
        trained(wine, recipe)
    found = []

    def work():
        try:
            trained(wine, recipe)
        except TrainingError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "KeyboardInterrupt" in str(found[0])


@pytest.mark.parametrize(
    ("text", "words", "line"),
    [
        ("x = 1\nif x:\nprint(x)\n", "IndentationError", "line 3"),
        ("import math\n1 / 0\n", "ZeroDivisionError", "line 2"),
        ("import sys\nsys.exit(3)\n", r"sys.exit\(3\)", "line 2"),
        ("def f(): return f()\nf()\n", "RecursionError", "line 1"),
        ("import json\njson.loads('{')\n", "JSONDecodeError", "line 2"),
        ("import no_such_package_here\n", "no_such_package_here was not found; install it", "line 1"),
    ],
)
def test_a_module_that_fails_as_it_is_imported_shows_its_own_line(write, text, words, line):
    with pytest.raises(UserCodeError, match=words) as caught:
        import_object(f"{write(text)}:learn")
    assert caught.value.exit_code == 1
    assert "code_of_a_user.py" in caught.value.frames
    assert line in caught.value.frames
    assert "importlib" not in caught.value.frames


def test_a_file_that_python_or_a_package_hides_is_named(write):
    for name in ("statistics", "yaml"):
        write("def learn(): pass", name=name)
        with pytest.raises(SpecError, match=rf"hides .*{name}\.py; rename"):
            import_object(f"{name}:learn")
        assert name != "statistics" or sys.modules.pop(name)
    import yaml

    sys.modules["yaml"] = yaml


NETWORK = """
    import torch
    from torch import nn
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(13, 3)
            {init}
        def forward(self, inputs):
            {forward}
            return self.layer(inputs)
"""


def test_a_network_whose_constructor_forward_or_training_fails_shows_the_users_line(write, wine):
    cases = {
        "built": ("open('no-weights.pt')", "", UserCodeError, "FileNotFoundError"),
        "tried": ("", "inputs.no_such", UserCodeError, "no_such"),
        # only where it is trained
        "trained": ("", "assert len(inputs) != 20 or not self.training, 'twenty'", TrainingError, "twenty"),
    }
    for case, (init, forward, kind, words) in cases.items():
        name = write(NETWORK.format(init=init or "pass", forward=forward or "pass"), name=f"network_{case}")
        with pytest.raises(kind, match=words) as caught:
            trained(wine, Module(network=f"{name}:Net", batch_size=20, epochs=1))
        assert f"{name}.py" in caught.value.frames
        assert "dmpipeline" not in caught.value.frames
    assert caught.value.rows == [5]


def logits(dataset, k=3):
    return [np.zeros((n, k)) for n in (dataset.n_train, dataset.n_test)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda *_: None, "returned None; return two arrays"),
        (lambda d, _: logits(d)[0], r"one ndarray of shape \(133, 3\)"),
        (lambda d, _: dict(zip(("train", "test"), logits(d), strict=True)), "a dict of 'train', 'test'"),
        (lambda d, _: (*logits(d), 3), "a tuple of 3"),
        (lambda d, _: logits(d)[::-1], "test before train"),
        (lambda d, m: (logits(d)[0][m], logits(d)[1]), "of the subset's examples alone"),
        (lambda d, _: (d.train_labels, d.test_labels), "one number an example"),
        (lambda d, _: [part.T for part in logits(d)], r"return outputs of all .*\(133, 3\) and \(45, 3\)"),
        (lambda d, _: (logits(d)[0], "text"), "array of real numbers"),
        (lambda d, _: (logits(d)[0].astype(complex), logits(d)[1]), "array of complex128"),
        (lambda d, _: ([[1.0, 2.0], [3.0]], logits(d)[1]), "not an array of numbers"),
        (lambda d, _: (__import__("scipy.sparse").sparse.csr_array(logits(d)[0]), logits(d)[1]), "toarray"),
    ],
)
def test_what_is_not_a_models_outputs_is_refused_with_what_to_return(wine, make, words):
    mask = np.arange(wine.n_train) % 2 == 0
    with pytest.raises(UserCodeError, match=words) as caught:
        checked_outputs(make(wine, mask), wine, mask, row=17, path="mine:learn")
    assert "mine:learn" in str(caught.value)
    assert "row 17" in str(caught.value)


def test_a_function_that_lacks_a_class_is_told_which_and_what_to_return(wine):
    mask = wine.train_labels != 1
    with pytest.raises(
        TrainingError, match=r"row 17: .*2 columns for 3 classes.*no example of class 1.*classes_"
    ) as no:
        checked_outputs(logits(wine, 2), wine, mask, row=17, path="mine:learn")
    assert (no.value.rows, no.value.classes) == ([17], [1])


@pytest.mark.parametrize(("value", "words"), [(-np.inf, "np.log"), (np.nan, "NaN"), (np.inf, "NaN or infinite")])
def test_outputs_that_are_not_finite_name_row_example_and_cause(wine, value, words):
    parts = logits(wine)
    parts[1][7, 2] = value
    with pytest.raises(TrainingError, match=rf"row 3: .*test outputs of which 1 are .*{words}.*example 7 first"):
        checked_outputs(parts, wine, wine.train_labels >= 0, row=3, path="mine:learn")


def test_outputs_are_taken_from_lists_tensors_and_numbers_of_any_width(wine):
    mask = wine.train_labels >= 0
    expected = [np.arange(part.size, dtype=np.float32).reshape(part.shape) / 8 for part in logits(wine)]
    ways = [
        lambda part: part.tolist(),
        lambda part: part.astype(np.float64),
        lambda part: np.asfortranarray(part),
        lambda part: torch.tensor(part, requires_grad=True),
        lambda part: torch.tensor(part).to(torch.float64),
        lambda part: np.ma.masked_array(part),
    ]
    for way in ways:
        found = checked_outputs([way(part) for part in expected], wine, mask, row=0, path="mine:learn")
        assert all((a == b).all() and a.dtype == np.float32 for a, b in zip(found, expected, strict=True))
    rounded = checked_outputs([torch.tensor(part).bfloat16() for part in expected], wine, mask, row=0, path="m:l")
    np.testing.assert_allclose(rounded[0], expected[0], rtol=0.01)


def test_a_seed_fits_scikit_learn_and_one_of_64_bits_is_there_by_name(write, wine):
    name = write(
        FITS
        + """
    from sklearn.ensemble import RandomForestClassifier
    seen = []
    def learn(dataset, mask, seed):
        model = RandomForestClassifier(2, random_state=seed).fit(dataset.train_inputs[mask], dataset.train_labels[mask])
        seen.append(seed)
        parts = (dataset.train_inputs, dataset.test_inputs)
        return tuple(np.log(np.clip(model.predict_proba(part), 1e-6, 1)) for part in parts)
    def long(dataset, mask, seed, *, seed64):
        seen.append((seed, seed64))
        return outputs(dataset)
"""
    )
    first, again = (trained(wine, Function(function=f"{name}:learn")) for _ in range(2))
    assert np.array_equal(first.test, again.test)
    trained(wine, Function(function=f"{name}:long"))
    seen, numbers = sys.modules[name].seen, [int(draw_bits(0, Purpose.TORCH_SEED, row, 1)[0]) for row in (5, 6)]
    assert seen[:2] == seen[2:4] == [number >> 32 for number in numbers]
    assert seen[4:] == [(number >> 32, number) for number in numbers]


def test_runs_of_the_first_version_keep_their_64_bit_seeds_and_are_resumed_by_a_spec_that_names_none(write, tmp_path):
    name = write(
        FITS
        + """
    def learn(dataset, mask, seed):
        return outputs(dataset, float(seed % 1000))
"""
    )
    recipe = {"name": "function", "function": f"{name}:learn"}
    values = {"dataset": write_letters(tmp_path), "n_models": 3, "held_out": {"n_subsets": 0}}
    old = Run.create(tmp_path / "old", RunSpec(**values, recipe=recipe | {"version": 1}))
    old.train()
    numbers = [int(draw_bits(0, Purpose.TORCH_SEED, row, 1)[0]) for row in range(3)]
    assert old.array("test_logits")[:, 0, 0].tolist() == [number % 1000 for number in numbers]
    assert RecipeSpec(**recipe).version == 2
    again = Run.create(tmp_path / "old", RunSpec(**values, recipe=recipe))
    assert again.spec.recipe.version == 1
    assert replay(again, 1).is_same
    new = Run.create(tmp_path / "new", RunSpec(**values, recipe=recipe))
    new.train()
    assert new.array("test_logits")[:, 0, 0].tolist() == [(number >> 32) % 1000 for number in numbers]


def test_a_regression_that_diverged_is_told_of_predictions_and_of_its_inputs_scale(tmp_path):
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(n, 4)) * 1e4 for n in (40, 6)]
    y = [part[:, 0] for part in x]
    np.savez(tmp_path / "n.npz", train_inputs=x[0], train_labels=y[0], test_inputs=x[1], test_labels=y[1])
    recipe = {"hidden": 4, "epochs": 4, "batch_size": 5, "lr": 0.5}
    spec = RunSpec(dataset=str(tmp_path / "n.npz"), inputs="as-is", n_models=4, recipe=recipe, outputs=["predictions"])
    run = Run.create(tmp_path / "run", spec)
    with pytest.raises(TrainingError, match="predictions are not finite") as caught:
        run.train(way=Way("products", 4))
    said = str(caught.value)
    assert "float16" not in said
    assert "inputs: standardised" in said
    assert "dmpipeline init OTHER --spec RUN/run.yaml --set lr=0.05" in said
    assert said.startswith("rows 0, 1, 2, 3")
