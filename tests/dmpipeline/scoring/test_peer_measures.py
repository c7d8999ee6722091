"""Our measures of attributions are those of dattri and quanda, which `make measures` installs."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Child

from dmpipeline.scoring.attributions import class_detection, find_proponents, mislabel_detection, top_k_cardinality
from dmpipeline.scoring.evaluation import evaluate

ROOT = Path(__file__).parents[3]
MEASURES = ROOT / ".venv-measures"

pytestmark = pytest.mark.measures


@pytest.fixture(scope="module")
def ask():
    """Ask a peer for one of its measures."""
    if not (MEASURES / ".installed").exists():
        pytest.skip("dattri and quanda are not installed; make measures")
    command = [MEASURES / "bin" / "python", "-I", ROOT / "tests" / "servers" / "peer_measures.py"]
    with Child(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"

        def answer(measure, **arrays):
            sent = {name: np.asarray(value).tolist() for name, value in arrays.items()}
            process.stdin.write(json.dumps({"measure": measure, **sent}) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield answer
        process.stdin.close()


def drawn(seed, n_train, n_targets):
    """Scores without ties, which each library breaks in its own way, and whose sums are exact in any order."""
    rng = np.random.default_rng(seed)
    return rng, rng.permutation(n_train * n_targets).reshape(n_train, n_targets) / 8.0 - n_train


sizes = {"n_train": st.integers(6, 40), "n_targets": st.integers(2, 8), "seed": st.integers(0, 10_000)}


@settings(max_examples=25, deadline=None)
@given(n_subsets=st.integers(4, 30), **sizes)
def test_the_lds_is_dattris(ask, n_subsets, n_train, n_targets, seed):
    rng, scores = drawn(seed, n_train, n_targets)
    masks = np.argsort(rng.random((n_subsets, n_train)), axis=1) < n_train // 2
    outputs = masks @ scores / scores.std() + 3 * rng.standard_normal((n_subsets, n_targets))
    ours = evaluate(scores, masks, outputs, n_retrainings=1, n_bootstraps=2).target_lds
    theirs = ask("dattri.lds", scores=scores, masks=masks, outputs=outputs)
    assert ours == pytest.approx(theirs, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.05, 0.9), **sizes)
def test_the_area_of_mislabel_detection_is_dattris_and_makes_quandas(ask, share, n_train, n_targets, seed):
    rng, scores = drawn(seed, n_train, n_targets)
    own = scores[:, 0]
    wrong = np.sort(rng.choice(n_train, max(1, int(share * n_train)), replace=False))
    auc = mislabel_detection(own, wrong).auc
    assert auc == pytest.approx(ask("dattri.mislabel_detection_auc", scores=own, mislabelled=wrong), abs=1e-6)
    m, is_first = len(wrong), own.argmax() in wrong
    area = m / (2 * n_train) + (n_train - m) / n_train * auc - is_first / (2 * m * n_train)
    assert area == pytest.approx(ask("quanda.mislabelling", scores=own, mislabelled=wrong), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 6), **sizes)
def test_classes_subclasses_and_cardinality_are_quandas(ask, k, n_train, n_targets, seed):
    rng, scores = drawn(seed, n_train, n_targets)
    labels, of_targets = rng.integers(0, 3, n_train), rng.integers(0, 3, n_targets)
    proponents = find_proponents(scores, k).indices
    assert top_k_cardinality(proponents) == pytest.approx(ask("quanda.cardinality", scores=scores, k=k))
    share = class_detection(proponents, labels, of_targets)[0]
    for kind in ("class", "subclass"):
        theirs = ask(f"quanda.{kind}_detection", scores=scores, k=k, labels=labels, target_labels=of_targets)
        assert share == pytest.approx(theirs, abs=1e-6)
