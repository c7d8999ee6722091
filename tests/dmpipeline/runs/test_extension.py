import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from cluster_runs import faults, write_letters
from processes import Child

from dmpipeline import workflow
from dmpipeline.errors import RunError, SpecError
from dmpipeline.runs.extension import extend
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec
from dmpipeline.training.train import GradientTrainer, Way
from dmpipeline.workflow.run_arrays import RowsOf

WAY = Way("products", 8)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return write_letters(tmp_path_factory.mktemp("data"), 40, 6)


@pytest.fixture
def spec(letters):
    def made(**changes):
        values = {
            "dataset": letters,
            "n_models": 10,
            "held_out": {"n_subsets": 3, "n_retrainings": 2},
            "recipe": {"hidden": 4, "epochs": 1},
            "block_models": 4,
        }
        return RunSpec(**(values | changes))

    return made


def trained(path, spec, blocks=None):
    run = Run.create(path, spec)
    run.train(way=WAY, blocks=blocks)
    return run


def contents(run):
    """All arrays of a run, NaN for what is not trained."""
    return {name: run.array(name)[:] for name in (*run.spec.arrays, "block_digests")}


def same(one, other):
    return all(np.array_equal(one[name], other[name], equal_nan=one[name].dtype.kind == "f") for name in one)


def rows_done(run):
    """The rows that are done, as the numbers their models are drawn from, which an extension leaves as they are."""
    rows = []
    for block, block_rows in enumerate(run.spec.blocks):
        whole = np.ones(len(block_rows), bool)
        is_done = whole if run.digests()[block].any() else run.read_partial(block_rows).is_done
        rows += [row for row, done in zip(block_rows, is_done, strict=True) if done]
    return set(run.spec.model_indices(rows).tolist())


def rows_trained_by(run, monkeypatch):
    """Train a run; return the numbers of the models that were trained for it."""
    trained, original = [], GradientTrainer.start

    def start(trainer, masks, model_indices, rows):
        trained.extend(model_indices.tolist())
        return original(trainer, masks, model_indices, rows)

    with monkeypatch.context() as patch:
        patch.setattr(GradientTrainer, "start", start)
        run.train(way=WAY)
    return trained


@pytest.mark.parametrize("n_models", [11, 12, 14, 18, 30])
@pytest.mark.parametrize("n_before", [0, 2, 8, 10])
def test_an_extended_run_is_the_larger_run_made_from_scratch_to_the_bit(tmp_path, spec, n_before, n_models):
    run = extend(trained(tmp_path / "run", spec(n_models=n_before)), n_models)
    assert run.spec.n_models == n_models
    assert run.n_rows_done < run.spec.n_rows
    run.train()
    assert same(contents(run), contents(trained(tmp_path / "whole", spec(n_models=n_models))))
    assert not faults(run)


@pytest.mark.parametrize("block_models", [3, 7, 250])
def test_an_extension_trains_the_new_rows_and_no_other_whatever_the_size_of_blocks(
    tmp_path, monkeypatch, spec, block_models
):
    run = extend(trained(tmp_path / "run", spec(block_models=block_models)), 15)
    assert run.n_rows_done == 16
    assert sorted(rows_trained_by(run, monkeypatch)) == [10, 11, 12, 13, 14]
    assert run.provenance["sessions"][-1]["n_rows"] == 5
    assert same(contents(run), contents(trained(tmp_path / "whole", spec(n_models=15, block_models=block_models))))
    assert not faults(run)


@pytest.mark.parametrize("blocks", [[], [0], [1, 3], [0, 1, 2, 3], [2, 3]])
@pytest.mark.parametrize("n_models", [13, 18])
def test_rows_that_are_done_stay_done(tmp_path, monkeypatch, spec, blocks, n_models):
    before = trained(tmp_path / "run", spec(), blocks)
    done = rows_done(before)
    run = extend(before, n_models)
    assert rows_done(run) == done
    assert run.n_rows_done == len(done)
    again = extend(run, n_models + 3)  # extended once more before its missing rows were trained
    assert rows_done(again) == done
    wanted = set(again.spec.model_indices(range(again.spec.n_rows)).tolist())
    assert sorted(rows_trained_by(again, monkeypatch)) == sorted(wanted - done)
    assert same(contents(again), contents(trained(tmp_path / "whole", spec(n_models=n_models + 3))))


def test_a_row_of_a_cut_block_that_was_damaged_is_trained_again_and_it_alone(tmp_path, monkeypatch, spec):
    run = extend(trained(tmp_path / "run", spec()), 13)
    run.array("test_margins")[9] += 1
    assert sorted(rows_trained_by(run, monkeypatch)) == [9, 10, 11, 12]
    assert same(contents(run), contents(trained(tmp_path / "whole", spec(n_models=13))))


def test_many_extensions_end_as_one(tmp_path, spec):
    run = trained(tmp_path / "run", spec(n_models=1))
    for n_models in (2, 9, 13):
        run = extend(run, n_models)
        run.train()
    assert same(contents(run), contents(trained(tmp_path / "whole", spec(n_models=13))))
    numbers = [(fact["n_models_before"], fact["n_models"]) for fact in run.provenance["extensions"]]
    assert numbers == [(1, 2), (2, 9), (9, 13)]
    assert sum(session["n_rows"] for session in run.provenance["sessions"]) >= run.spec.n_rows


def test_an_extension_says_so_and_takes_the_catalog_back_until_all_is_there(tmp_path, spec):
    run = trained(tmp_path / "run", spec())
    assert (run.path / "catalog.yaml").exists()
    run = extend(run, 14)
    assert run.provenance["extensions"][0]["n_models"] == 14
    assert not (run.path / "catalog.yaml").exists()
    assert sorted(path.name for path in run.path.iterdir()) == ["lock", "provenance.json", "run.yaml", "store.zarr"]
    run.train()
    assert (run.path / "catalog.yaml").exists()


def test_the_same_number_changes_nothing_and_fewer_are_refused(tmp_path, spec):
    run = trained(tmp_path / "run", spec())
    assert extend(run, 10) is run
    with pytest.raises(SpecError, match="never shrinks"):
        extend(run, 9)
    assert run.n_rows_done == run.spec.n_rows


def test_given_masks_are_not_extended(tmp_path, spec):
    np.save(tmp_path / "masks.npy", np.random.default_rng(0).random((13, 40)) < 0.5)
    run = trained(tmp_path / "run", spec(masks=str(tmp_path / "masks.npy")))
    with pytest.raises(SpecError, match="masks"):
        extend(run, 14)


@pytest.mark.parametrize("damage", [b"", b"scrambled" * 9])
def test_a_damaged_block_that_would_move_is_trained_again(tmp_path, spec, damage):
    run = trained(tmp_path / "run", spec(n_models=8))
    (run.path / "store.zarr/test_logits/c/2/0/0").write_bytes(damage)
    run = extend(run, 12)
    # of the held-out rows 8 to 13, now 12 to 17, those in the second block alone are sound
    assert not run.digests()[3].any()
    assert run.digests()[4].any()
    run.train()
    assert same(contents(run), contents(trained(tmp_path / "whole", spec(n_models=12))))


def test_a_block_that_was_altered_is_not_carried_over_as_if_it_were_right(tmp_path, spec):
    run = trained(tmp_path / "run", spec(n_models=8))
    run.array("test_margins")[9] += 1
    done = rows_done(run)
    run = extend(run, 13)
    assert len(done - rows_done(run)) == 4  # the whole block: its digest does not say which row
    run.train()
    assert same(contents(run), contents(trained(tmp_path / "whole", spec(n_models=13))))


def test_a_run_opened_before_it_was_extended_neither_trains_nor_extends(tmp_path, spec):
    old = trained(tmp_path / "run", spec(), [0])
    extend(Run.open(old.path), 14)
    for act in (old.train, lambda: extend(old, 20)):
        with pytest.raises(RunError, match="open it again"):
            act()
    assert Run.open(old.path).spec.n_models == 14


class Killed(BaseException):
    pass


STEPS = ("rename", "replace", "link", "unlink", "rmdir", "mkdir")


def calls_until_killed(monkeypatch, act, n_calls=None):
    """Die before the call of this number of the functions of os that alter a directory; return how many there were."""
    calls = []

    def dying(original):
        def call_or_die(*arguments, **options):
            if len(calls) == n_calls:
                raise Killed
            calls.append(arguments)
            return original(*arguments, **options)

        return call_or_die

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        for name in STEPS:
            patch.setattr(os, name, dying(getattr(os, name)))
        act()
    return len(calls)


def test_killed_at_any_step_it_is_the_old_run_or_the_new_one(tmp_path, monkeypatch, spec):
    template = trained(tmp_path / "template", spec())
    old, whole = contents(template), contents(trained(tmp_path / "whole", spec(n_models=14)))

    def copy(name):
        return Run.open(shutil.copytree(template.path, tmp_path / name))

    complete = copy("complete")
    n_steps = calls_until_killed(monkeypatch, lambda: extend(complete, 14))
    carried = contents(Run.open(complete.path))
    outcomes = []
    # how the new store comes about in strides, how it is put in place at every step
    for n_calls in (*range(0, n_steps - 40, 9), *range(n_steps - 40, n_steps)):
        run = copy(f"run-{n_calls}")
        assert calls_until_killed(monkeypatch, lambda run=run: extend(run, 14), n_calls) == n_calls
        again = Run.open(run.path)
        outcomes.append(again.spec.n_models)
        if again.spec.n_models == 10:
            assert same(contents(again), old)
            again = extend(again, 14)
        assert again.spec == complete.spec.model_copy(update={"n_models": 14})
        assert not [entry for entry in run.path.iterdir() if entry.name.startswith(".ext")]
        found = contents(again)
        assert all(
            np.array_equal(found[name], carried[name], equal_nan=found[name].dtype.kind == "f") for name in carried
        )
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {10, 14}
    again.train()
    assert same(contents(again), whole)


EXTENDER = textwrap.dedent("""
    import os, sys
    from dmpipeline.runs import directory
    from dmpipeline.runs.extension import extend
    from dmpipeline.runs.store import Run

    step, n_calls = sys.argv[2], [0]
    original = getattr(os, step)

    def stop(*arguments, **options):
        n_calls[0] += 1
        if n_calls[0] == int(sys.argv[3]):
            print("there", flush=True)
            sys.stdin.readline()
        return original(*arguments, **options)

    run = Run.open(sys.argv[1])
    put = directory.put_extended

    def put_extended(*arguments):
        setattr(os, step, stop)
        put(*arguments)

    directory.put_extended = put_extended
    extend(run, 14)
""")


@pytest.mark.parametrize(("step", "number"), [("rename", 1), ("rename", 3), ("replace", 2)])
def test_killed_for_real_it_is_the_old_run_or_the_new_one(tmp_path, spec, step, number):
    run = trained(tmp_path / "run", spec())
    program = [sys.executable, "-c", EXTENDER, str(run.path), step, str(number)]
    with Child(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "there\n"
        os.kill(process.pid, signal.SIGKILL)
    again = Run.open(run.path)
    assert again.spec.n_models == (10 if (step, number) == ("rename", 1) else 14)
    extended = extend(again, 14)
    extended.train(way=WAY)
    assert same(contents(extended), contents(trained(tmp_path / "whole", spec(n_models=14))))


TRAINER = textwrap.dedent("""
    import sys
    from dmpipeline.runs.store import Run

    def progress(done, n_rows):
        print(done, flush=True)
        sys.stdin.readline()

    Run.open(sys.argv[1]).train(progress)
""")


def test_while_another_process_trains_the_run_is_not_extended(tmp_path, spec):
    run = trained(tmp_path / "run", spec(), [])
    with Child(
        [sys.executable, "-c", TRAINER, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            for _ in range(2):  # before it begins, and after its first block
                process.stdout.readline()
                process.stdin.write("go\n")
                process.stdin.flush()
            with pytest.raises(RunError, match="being trained by another process"):
                extend(run, 14)
        finally:
            process.kill()
    assert Run.open(run.path).spec.n_models == 10
    assert extend(run, 14).spec.n_models == 14


def test_a_fit_after_an_extension_reads_only_the_new_rows(tmp_path, spec, monkeypatch):
    run = trained(tmp_path / "run", spec(n_models=40))
    read = []
    of_rows = RowsOf.__getitem__

    def recorded(rows, key):
        start, stop, _ = key.indices(rows.shape[0])
        read.extend(range(start, stop))
        return of_rows(rows, key)

    monkeypatch.setattr(RowsOf, "__getitem__", recorded)
    workflow.fit_run(run)
    assert set(read) == set(range(40))
    run = extend(run, 60)
    run.train()
    read.clear()
    found = workflow.fit_run(run)
    # the first few tell that these are the same models
    assert not set(read) & set(range(16, 40))
    assert set(range(40, 60)) <= set(read)
    fresh = trained(tmp_path / "fresh", spec(n_models=60))
    np.testing.assert_allclose(found.weight, workflow.fit_run(fresh).weight, atol=1e-6)
