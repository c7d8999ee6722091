"""The tutorials show what their code prints, and scikit-learn's other tables train by the same lines."""

import json
from dataclasses import replace

import pytest
from documentation.pages import Reader, blocks_of
from servers.loopback import LoopbackS3

OWN_DATA = "docs/tutorials/own-data.md"


def require_learned(reader: Reader, loader: str, least: float, figures: list[str]) -> None:
    """Fail unless the models of the run that the tutorial makes have learned at least so much."""
    scores = json.loads(reader.type(["dmpipeline", "evaluate", "wine-run", "--json", "-q"]))
    found, baseline = scores["r2_models" if loader == "load_diabetes" else "accuracy"], scores["baseline_accuracy"]
    figures.append(f"{loader} as it comes: {found:.3f} (baseline {baseline}), LDS {scores['lds']:.3f}")
    assert found >= least
    assert scores["warnings"] == []


def test_the_tutorial_on_the_release_shows_what_it_prints(reader: Reader, release: LoopbackS3) -> None:
    reader.follow("docs/tutorials/release.md")
    assert all(request.charged for request in release.log if request.status in (200, 206))


def test_the_tutorial_on_own_data_shows_what_it_prints(reader: Reader, figures: list[str]) -> None:
    reader.follow(OWN_DATA)
    typed = [command[1] for block in blocks_of(OWN_DATA) for command, _ in block.commands]
    assert typed == ["init", "run", "verify", "fit", "evaluate", "report"]
    require_learned(reader, "load_wine", 0.9, figures)


def test_the_tutorial_on_uses_shows_what_it_prints(reader: Reader) -> None:
    reader.follow("docs/tutorials/uses.md")
    verdict = json.loads(reader.type(["dmpipeline", "verify", "other-run", "--against", "digits-run", "--json", "-q"]))[
        "verdict"
    ]
    assert verdict in ("agrees", "undecided")


@pytest.mark.parametrize(
    ("loader", "least"),
    [
        ("load_diabetes", 0.3),
        pytest.param("load_breast_cancer", 0.92, marks=pytest.mark.slow),
        pytest.param("load_iris", 0.85, marks=pytest.mark.slow),
    ],
)
def test_tables_of_scikit_learn_train_well_as_they_come(
    reader: Reader, loader: str, least: float, figures: list[str]
) -> None:
    first, *others = blocks_of(OWN_DATA)
    reader.execute(replace(first, text=first.text.replace("load_wine", loader)))
    for block in others:
        for command, _ in block.commands:
            reader.type(command)
    require_learned(reader, loader, least, figures)
