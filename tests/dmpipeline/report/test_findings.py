"""What the page says of copies: the first of them, how many more there are, and no more than the set can tell."""

import numpy as np

from dmpipeline.data.folders import save_dataset
from dmpipeline.report.contents import Contents, empty_facts
from dmpipeline.report.findings import _add_duplicates, _add_leakage
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec


def test_of_a_set_that_repeats_itself_the_first_copies_are_shown_and_the_others_counted(tmp_path):
    inputs, labels = np.tile(np.eye(4, 12, dtype=np.float32), (22, 1)), ["a", "a", "b", "b"] * 22
    save_dataset(tmp_path / "texts", (inputs[:80], labels[:80]), (inputs[80:], labels[80:]))
    run = Run.create(tmp_path / "run", RunSpec(dataset=str(tmp_path / "texts"), n_models=4))
    contents = Contents(empty_facts(run="texts-run"))
    _add_leakage(contents, run, lambda *_: None)
    _add_duplicates(contents, run, lambda *_: None)
    leaked, duplicates = contents.facts["leakage"], contents.facts["duplicates"]
    assert leaked["sentence"].startswith(
        "8 of 8 test examples have an identical training example. Below are the first 50"
    )
    assert leaked["sentence"].endswith("more: dmpipeline leakage texts-run")
    assert duplicates["sentence"].endswith("more: dmpipeline leakage texts-run --duplicates")
    assert [len(each["rows"]) for each in (leaked, duplicates)] == [50, 50]
    assert "copies" not in leaked["sentence"]
