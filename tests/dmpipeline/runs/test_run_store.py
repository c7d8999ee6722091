import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from cluster_runs import write_letters
from processes import Child

from dmdata.catalog.entries import load_file
from dmdata.errors import FormatError
from dmpipeline.data.datasets import load_dataset
from dmpipeline.draws.masks import draw_mask
from dmpipeline.errors import IncompleteRunError, RunError, RunExistsError, SpecError, TrainingError
from dmpipeline.models.outputs import correct_class_margins
from dmpipeline.runs.claims import Claims
from dmpipeline.runs.preparation import Prepared
from dmpipeline.runs.store import Run
from dmpipeline.runs.training import RowTrainer, presence
from dmpipeline.spec import RunSpec
from dmpipeline.training.train import GradientTrainer, Way

ARRAYS = RunSpec().arrays

TINY = {"name": "perceptron", "hidden": 6, "epochs": 1}


def tiny_spec(**changes):
    values = {"n_models": 11, "held_out": {"n_subsets": 3, "n_retrainings": 2}, "recipe": TINY, "block_models": 4}
    return RunSpec(**(values | changes))


@pytest.fixture
def largest_file():
    """Let no file grow beyond so many bytes while a block runs, as a full disk would not."""

    @contextlib.contextmanager
    def limited(n_bytes):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


def contents(run):
    return {name: run.array(name)[:] for name in ARRAYS}


def same(one, other):
    return all((one[name] == other[name]).all() for name in ARRAYS)


@pytest.fixture
def letters(tmp_path):
    return write_letters(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = Run.create(tmp_path_factory.mktemp("runs") / "undisturbed", tiny_spec())
    run.train()
    return run


def test_a_trained_run_holds_the_masks_logits_and_margins_of_its_spec(undisturbed):
    digits, spec, stored = load_dataset("digits"), undisturbed.spec, contents(undisturbed)
    subsets = spec.subset_indices(range(spec.n_rows))
    for row, subset in enumerate(subsets.tolist()):
        assert (stored["train_masks"][row] == draw_mask(spec.seed, subset, digits.n_train, spec.alpha)).all()
    for part, labels in (("train", digits.train_labels), ("test", digits.test_labels)):
        margins = correct_class_margins(stored[f"{part}_logits"], labels).astype(np.float16)
        assert (stored[f"{part}_margins"] == margins).all()
    held_out = stored["train_masks"][spec.rows.held_out]
    assert (held_out[0::2] == held_out[1::2]).all()
    assert undisturbed.n_rows_done == spec.n_rows == 17


def test_arrays_have_names_for_dimensions_and_chunks_that_blocks_fill(undisturbed):
    dims = {name: undisturbed.array(name).metadata.dimension_names for name in ARRAYS}
    assert dims["train_masks"] == ("model", "train_example")
    assert dims["test_logits"] == ("model", "test_example", "class")
    assert {undisturbed.array(name).chunks[0] for name in ARRAYS} == {undisturbed.spec.block_models}


def test_masks_take_little_more_than_one_bit_an_entry(tmp_path):
    run = Run.create(tmp_path / "run", RunSpec(n_models=500, held_out={"n_subsets": 0}, recipe=TINY))
    run.train()
    n_bytes = sum(path.stat().st_size for path in (run.path / "store.zarr/train_masks/c").rglob("*") if path.is_file())
    assert n_bytes < 0.15 * run.array("train_masks").size


def test_the_same_spec_resumes_and_trains_nothing_twice(undisturbed):
    before = undisturbed.provenance
    calls = []
    again = Run.create(undisturbed.path, tiny_spec())
    again.train(lambda done, n_rows: calls.append((done, n_rows)))
    assert set(calls) == {(17, 17)}
    assert again.provenance == before


def test_another_spec_in_the_same_place_is_refused_naming_the_difference(undisturbed):
    with pytest.raises(RunExistsError, match=r"alpha 0\.5, not 0\.2"):
        Run.create(undisturbed.path, tiny_spec(alpha=0.2))


def test_a_place_that_holds_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunExistsError, match="empty directory"):
        Run.create(tmp_path, tiny_spec())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_directory_becomes_a_run_and_a_broken_off_creation_is_no_obstacle(tmp_path):
    (tmp_path / ".creating-0123").mkdir()
    run = Run.create(tmp_path, tiny_spec())
    assert run.n_rows_done == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "provenance.json", "run.yaml", "store.zarr"]


@pytest.mark.parametrize("n_renamed", [0, 1, 2])
def test_a_creation_killed_between_its_steps_is_begun_anew(tmp_path, monkeypatch, letters, n_renamed):
    class Killed(BaseException):
        pass

    calls, rename = [], os.rename

    def rename_or_die(source, target):
        if len(calls) == n_renamed:
            raise Killed
        calls.append(target)
        rename(source, target)

    spec = tiny_spec(dataset=letters)
    with monkeypatch.context() as dying:
        dying.setattr(os, "rename", rename_or_die)
        with pytest.raises(Killed):
            Run.create(tmp_path / "run", tiny_spec(dataset=letters, n_models=5))
    assert not (tmp_path / "run/run.yaml").exists()
    run = Run.create(tmp_path / "run", spec)
    assert run.array("train_masks").shape[0] == spec.n_rows
    assert sorted(path.name for path in run.path.iterdir()) == ["lock", "provenance.json", "run.yaml", "store.zarr"]


def test_trained_models_without_a_spec_are_not_taken_for_a_broken_off_creation(tmp_path, letters):
    run = Run.create(tmp_path / "run", tiny_spec(dataset=letters))
    with pytest.raises(KeyboardInterrupt):
        run.train(interrupted_after(4))
    before = contents(run)
    (run.path / "run.yaml").rename(tmp_path / "lost.yaml")
    with pytest.raises(RunExistsError, match="trained models"):
        Run.create(run.path, run.spec)
    (tmp_path / "lost.yaml").rename(run.path / "run.yaml")
    again = contents(Run.open(run.path))
    assert all(np.array_equal(again[name], before[name], equal_nan=name != "train_masks") for name in ARRAYS)


@pytest.mark.parametrize("name", ["provenance.json", "store.zarr"])
def test_a_file_of_somebody_elses_that_bears_one_of_our_names_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(RunExistsError, match="other files"):
        Run.create(tmp_path, tiny_spec())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_place_that_cannot_be_is_named_with_a_remedy(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunExistsError, match="is a file"):
        Run.create(tmp_path / "file", tiny_spec())
    for path in (tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(RunError, match=f"{path} cannot be written .*choose another path"):
            Run.create(path, tiny_spec())
    with pytest.raises(RunError, match=r"cannot be opened|no run\.yaml"):
        Run.open(tmp_path / ("x" * 300))


def test_a_full_disk_ends_training_with_the_runs_path_and_it_goes_on_from_there(tmp_path, letters, largest_file):
    run = Run.create(tmp_path / "run", tiny_spec(dataset=letters))
    run.train(blocks=[])  # how it is trained is on record
    with largest_file(100), pytest.raises(RunError, match=f"{run.path} cannot be written .*make room"):
        run.train()
    assert run.n_rows_done == 0
    run.train()
    run.require_complete()


@pytest.mark.parametrize("damage", [b"", b"scrambled" * 9])
def test_a_damaged_chunk_names_the_run_and_the_command_that_finds_it(tmp_path, letters, damage):
    run = Run.create(tmp_path / "run", tiny_spec(dataset=letters))
    run.train()
    (run.path / "store.zarr/test_logits/c/1/0/0").write_bytes(damage)
    run.read_block(run.spec.blocks[0])
    with pytest.raises(RunError, match="dmpipeline verify") as caught:
        run.read_block(run.spec.blocks[1])
    assert str(run.path) in str(caught.value)
    (run.path / "store.zarr/block_digests/c/1/0").write_bytes(damage)
    with pytest.raises(RunError, match="dmpipeline verify"):
        run.require_complete()


@pytest.mark.parametrize("text", ["", "[]", "3", '{"zarr_format": 3, "node_type": "array"}'])
@pytest.mark.parametrize("place", ["zarr.json", "train_masks/zarr.json"])
def test_damaged_metadata_of_the_store_is_a_run_error(tmp_path, letters, place, text):
    run = Run.create(tmp_path / "run", tiny_spec(dataset=letters))
    (run.path / "store.zarr" / place).write_text(text)
    with pytest.raises(RunError, match="restore"):
        Run.open(run.path).array("train_masks")


@pytest.mark.parametrize("changes", [{"dataset": "letters"}, {"recipe": {"name": "resnet"}}, {"recipe": {"hiden": 3}}])
def test_a_spec_that_cannot_be_used_creates_nothing(tmp_path, changes):
    with pytest.raises(SpecError):
        Run.create(tmp_path / "run", tiny_spec(**changes))
    assert not (tmp_path / "run").exists()


def test_opening_what_is_no_run_says_how_to_create_one(tmp_path):
    with pytest.raises(RunError, match="dmpipeline init"):
        Run.open(tmp_path)
    (tmp_path / "run.yaml").write_text(RunSpec().to_yaml())
    with pytest.raises(RunError, match=r"store\.zarr"):
        Run.open(tmp_path)


def test_an_incomplete_run_counts_what_is_missing_and_names_the_command(tmp_path):
    run = Run.create(tmp_path / "run", tiny_spec())
    with pytest.raises(IncompleteRunError, match="dmpipeline run") as caught:
        run.require_complete()
    assert caught.value.n_missing == 17
    assert np.isnan(run.array("test_margins")[:]).all()


def interrupted_after(n_rows):
    def progress(done, _):
        if done >= n_rows:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_run_keeps_its_blocks_and_ends_as_an_undisturbed_one(tmp_path, undisturbed):
    run = Run.create(tmp_path / "run", tiny_spec())
    with pytest.raises(KeyboardInterrupt):
        run.train(interrupted_after(8))
    assert run.n_rows_done == 8
    calls = []
    Run.open(run.path).train(lambda done, _: calls.append(done))
    assert calls[0] == 8
    assert same(contents(run), contents(undisturbed))
    assert [session["n_rows"] for session in run.provenance["sessions"]] == [8, 9]


def test_a_block_without_a_digest_is_trained_again_over_whatever_is_there(tmp_path, undisturbed):
    run = Run.create(tmp_path / "run", tiny_spec())
    run.array("test_logits")[2:9] = 7  # as a process killed between its data and its digest may leave it
    run.train()
    assert same(contents(run), contents(undisturbed))


TRAINER = textwrap.dedent("""
    import sys
    from dmpipeline.runs.store import Run

    print("ready", flush=True)
    sys.stdin.readline()
    Run.open(sys.argv[1]).train(lambda done, n_rows: print(done, flush=True))
""")


def trainer(run):
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def begin(*processes):
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()


def test_a_run_killed_without_warning_loses_only_the_block_in_flight(tmp_path, letters):
    # blocks slow enough to be killed within one
    spec = tiny_spec(dataset=letters, recipe=TINY | {"epochs": 300})
    run = Run.create(tmp_path / "run", spec)
    with trainer(run) as process:
        begin(process)
        while int(process.stdout.readline()) < 4:
            pass
        os.kill(process.pid, signal.SIGKILL)
    kept = run.n_rows_done
    assert 4 <= kept < spec.n_rows
    run.train()
    assert [session["n_rows"] for session in run.provenance["sessions"]] == [spec.n_rows - kept]
    whole = Run.create(tmp_path / "whole", spec)
    whole.train()
    assert same(contents(run), contents(whole))


def test_two_trainers_of_one_run_share_its_blocks_and_train_none_twice(tmp_path, letters):
    spec = tiny_spec(dataset=letters, n_models=60, recipe=TINY | {"epochs": 60})
    run = Run.create(tmp_path / "run", spec)
    with trainer(run) as one, trainer(run) as other:
        begin(one, other)
        one.communicate()
        other.communicate()
    assert (one.returncode, other.returncode) == (0, 0)
    sessions = [session["n_rows"] for session in run.provenance["sessions"]]
    assert sum(sessions) == spec.n_rows
    assert len(sessions) == 2
    whole = Run.create(tmp_path / "whole", spec)
    whole.train()
    assert same(contents(run), contents(whole))


def train_by(kind, run, way):
    """Train all that is missing of a run by another kind of trainer."""
    prepared = Prepared.of(run)
    trainer = kind(prepared.dataset, prepared.recipe, seed=run.spec.seed, way=way)
    with presence(run) as lock:
        for _ in RowTrainer(run, trainer).missing(Claims(run.path, run.spec.blocks, lock, "by hand")):
            pass


@pytest.fixture
def claims_when_stored(monkeypatch):
    """List blocks, as (block, blocks that are claimed then), by the moments when their digests come into place."""
    stored = []

    def look(digest):
        program = f"import fcntl; file = open({str(digest.parents[4] / 'lock')!r}, 'a+b')\n"
        program += "def free(n):\n"
        program += "    try: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, n)\n"
        program += "    except OSError: return False\n"
        program += "    return True\n"
        program += "print([n for n in range(5) if not free(n)])"
        said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        stored.append((int(digest.parent.name), json.loads(said)))

    replace = os.replace

    def look_and_replace(source, place, **options):
        if "block_digests/c" in str(place):
            look(Path(place))
        replace(source, place, **options)

    monkeypatch.setattr(os, "replace", look_and_replace)
    return stored


def test_a_block_is_begun_before_the_one_before_it_is_stored_and_claimed_until_it_is(
    tmp_path, letters, claims_when_stored
):
    run = Run.create(tmp_path / "run", tiny_spec(dataset=letters))
    run.train(way=Way("products", 2))
    # a block is claimed when it is begun
    assert claims_when_stored == [(0, [0, 1]), (1, [1, 2]), (2, [2, 3]), (3, [3, 4]), (4, [4])]


def test_where_one_thread_alone_trains_no_block_is_begun_early(tmp_path, letters, claims_when_stored, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "dropping.py").write_text(
        "from torch import nn\ndef network():\n    return nn.Sequential(nn.Linear(8, 3), nn.Dropout(0.5))\n"
    )
    recipe = {"name": "module", "network": "dropping:network", "epochs": 1}
    Run.create(tmp_path / "alone", tiny_spec(dataset=letters, recipe=recipe)).train(way=Way("loop", 1))
    assert claims_when_stored == [(block, [block]) for block in range(5)]


class FailingAtLast(GradientTrainer):
    def start(self, masks, model_indices, rows):
        finish = super().start(masks, model_indices, rows)

        def finish_or_fail():
            if rows.start == 4:
                raise ArithmeticError("not this one")
            return finish()

        return finish_or_fail


def test_a_block_that_fails_leaves_those_before_it_and_none_after_it_claimed_or_stored(tmp_path, letters):
    whole = Run.create(tmp_path / "whole", tiny_spec(dataset=letters))
    whole.train(way=Way("products", 2))
    run = Run.create(tmp_path / "run", tiny_spec(dataset=letters))
    n_threads = threading.active_count()
    with pytest.raises(ArithmeticError, match="not this one"):
        train_by(FailingAtLast, run, Way("products", 2))
    assert threading.active_count() == n_threads
    assert (run.n_rows_done, list(run.failures())) == (4, [1])
    with trainer(run) as other:
        begin(other)
        other.communicate()
    assert same(contents(run), contents(whole))


class FailingAtOnce(GradientTrainer):
    def start(self, masks, model_indices, rows):
        raise MemoryError("outputs of a block")


def test_a_block_that_cannot_even_be_started_is_on_record(tmp_path, letters):
    run = Run.create(tmp_path / "run", tiny_spec(dataset=letters))
    with pytest.raises(MemoryError):
        train_by(FailingAtOnce, run, Way("products", 2))
    assert "MemoryError: outputs of a block" in run.failures()[0]


class FailingToPrepare(GradientTrainer):
    def workers(self):
        raise RuntimeError("CUDA out of memory\nand so on")


def test_a_trainer_that_cannot_be_prepared_is_on_record_and_an_error_of_training(tmp_path, letters):
    run = Run.create(tmp_path / "run", tiny_spec(dataset=letters))
    with pytest.raises(TrainingError, match=r"could not be prepared \(RuntimeError: CUDA out of memory\); .*status -v"):
        train_by(FailingToPrepare, run, Way("products", 2))
    assert "CUDA out of memory" in run.failures()[0]


class Counting(GradientTrainer):
    n_started = 0

    def start(self, masks, model_indices, rows):
        self.n_started += len(rows)
        return super().start(masks, model_indices, rows)


@pytest.fixture
def counting(tmp_path, letters):
    """A run, and its trainer, which counts the models that it starts to train; it starts blocks ahead."""
    run = Run.create(tmp_path / "run", tiny_spec(dataset=letters))
    prepared = Prepared.of(run)
    trainer = Counting(prepared.dataset, prepared.recipe, seed=run.spec.seed, way=Way("products", 2))
    assert trainer.n_ahead == 2
    return run, trainer


def test_a_turn_that_ends_stores_the_blocks_that_it_has_begun_and_begins_no_other(counting):
    run, trainer = counting
    n_turns = 0
    while run.n_rows_done < run.spec.n_rows:
        n_turns, turn = n_turns + 1, []
        with presence(run) as lock:
            claims = Claims(run.path, run.spec.blocks, lock, "one")
            turn.extend(RowTrainer(run, trainer).missing(claims, may_start=lambda turn=turn: not turn))
        assert trainer.n_started == run.n_rows_done
    assert n_turns == 3, "two blocks each"


@pytest.mark.parametrize(("n_others", "n_claimed"), [(0, 2), (3, 2), (4, 1)])
def test_a_block_is_started_ahead_only_if_there_are_others_for_all_other_workers(counting, n_others, n_claimed):
    run, trainer = counting
    with presence(run) as lock:
        claims = Claims(run.path, run.spec.blocks, lock, "one")
        with contextlib.closing(RowTrainer(run, trainer).missing(claims, n_others=n_others)) as stored:
            assert next(stored) == 4
    assert trainer.n_started == 4 * n_claimed


STORING = """
import fcntl, shutil, sys, time
from pathlib import Path

run, whole, blocks = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
lock = open(run / "lock", "a+b")
for block in blocks:
    fcntl.lockf(lock, fcntl.LOCK_EX, 1, int(block))
print("ready", flush=True)
sys.stdin.readline()
for block in blocks:
    time.sleep(2)
    names = {folder.name for folder in (whole / "store.zarr").iterdir() if (folder / "c" / block).exists()}
    for name in sorted(names, key=lambda name: name == "block_digests"):
        shutil.copytree(*(path / "store.zarr" / name / "c" / block for path in (whole, run)))
    fcntl.lockf(lock, fcntl.LOCK_UN, 1, int(block))
"""


def test_progress_counts_what_other_processes_store_while_this_one_waits(tmp_path, letters):
    spec = tiny_spec(dataset=letters)
    run, whole = Run.create(tmp_path / "run", spec), Run.create(tmp_path / "whole", spec)
    whole.train()
    command = [sys.executable, "-c", STORING, str(run.path), str(whole.path), "2", "3"]
    reported = []

    def progress(n_done, _):
        if n_done == 9:
            begin(other)
        reported.append(n_done)

    with Child(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        run.train(progress=progress)
    assert reported == [0, 4, 8, 9, 13, 17, 17]
    assert same(contents(run), contents(whole))


def test_a_diverging_model_fails_with_its_row_and_leaves_no_block(tmp_path):
    run = Run.create(tmp_path / "run", tiny_spec(recipe=TINY | {"lr": 1e30}))
    with pytest.raises(TrainingError) as caught:
        run.train()
    assert set(caught.value.rows) <= set(range(4))
    assert run.n_rows_done == 0


def test_a_dataset_is_found_from_anywhere_and_refused_once_it_changed(tmp_path, letters, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run.create("run", tiny_spec(dataset="letters.npz"))
    monkeypatch.chdir("/")
    run.train()
    with np.load(letters) as arrays:
        changed = dict(arrays) | {"test_labels": np.zeros(20, int)}
    np.savez(letters, **changed)
    with pytest.raises(RunError, match="restore the dataset"):
        run.train()


def test_a_run_says_how_it_came_about(undisturbed):
    facts = undisturbed.provenance
    assert facts["dataset"]["fingerprint"] == load_dataset("digits").fingerprint
    assert facts["versions"]["zarr"] == zarr.__version__
    assert [session["n_rows"] for session in facts["sessions"]] == [17]
    assert facts["sessions"][0]["seconds"] > 0


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"dataset": 3, "sessions": []})])
def test_damaged_provenance_is_a_run_error(tmp_path, text):
    run = Run.create(tmp_path / "run", tiny_spec())
    (run.path / "provenance.json").write_text(text)
    with pytest.raises(RunError, match=r"provenance\.json"):
        run.dataset()


def test_the_catalog_lists_every_array_with_its_shape_and_rows(undisturbed):
    catalog = load_file(undisturbed.path)
    assert [artifact.name for artifact in catalog.artifacts()] == [f"digits/50pct/{name}" for name in ARRAYS]
    for name in ARRAYS:
        artifact, array = catalog.find(f"digits/50pct/{name}"), undisturbed.array(name)
        assert artifact.schema.shape == array.shape
        assert artifact.schema.dtype == str(array.dtype)
        assert artifact.schema.dims == array.metadata.dimension_names
        assert (zarr.open_array(artifact.url, mode="r")[:] == array[:]).all()
        assert (artifact.rows.fit, artifact.rows.evaluation, artifact.rows.n_retrainings) == ((0, 11), (11, 17), 2)


def test_fitted_datamodels_join_the_catalog_and_anything_else_does_not(tmp_path):
    run = Run.create(tmp_path / "run", tiny_spec())
    run.train()
    run.datamodels_path.parent.mkdir()
    torch.save(
        {"weight": torch.zeros(1437, 360), "bias": torch.zeros(360), "lam": torch.zeros(360)}, run.datamodels_path
    )
    run.write_catalog()
    weight = load_file(run.path).find("digits/50pct/test_datamodels/weight")
    assert weight.schema.shape == (1437, 360)
    assert weight.url == str(run.datamodels_path)
    torch.save({"weight": torch.zeros(3)}, run.datamodels_path)
    with pytest.raises(FormatError, match="bias and lam"):
        run.write_catalog()
