"""The README's sample of a dataset of one's own runs as shown, and scikit-learn's other tables by the same lines."""

import json
import re
from pathlib import Path

import pytest

from dmpipeline.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SAMPLE = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "load_wine" in code)
COMMANDS = re.findall(r"^    \$ dmpipeline (.* wine-run.*)$", README, re.M)
SHOWN = re.search(r"^    \$ dmpipeline init wine-run.*?\n(.*?)^    \$", README, re.M | re.S)[1]


def call(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured.err
    return captured.out, captured.err


def test_the_readmes_sample_has_all_steps():
    assert [command.split()[0] for command in COMMANDS] == ["init", "run", "verify", "fit", "evaluate", "report"]


@pytest.mark.parametrize(
    ("loader", "least"),
    [("load_wine", 0.9), ("load_breast_cancer", 0.92), ("load_iris", 0.85), ("load_diabetes", 0.3)],
)
def test_tables_of_scikit_learn_train_well_as_they_come(tmp_path, monkeypatch, capsys, loader, least, figures):
    monkeypatch.chdir(tmp_path)
    exec(SAMPLE.replace("load_wine", loader), {})  # noqa: S102 - the README's own lines
    printed = {command.split()[0]: call(capsys, *command.split()) for command in COMMANDS}
    if loader == "load_wine":
        said = "".join(printed["init"])
        for line in SHOWN.splitlines():
            assert line.strip() in (*(shown.strip() for shown in said.splitlines()), "...")
    scores = json.loads(call(capsys, "evaluate", "wine-run", "--json", "-q")[0])
    found = scores["r2_models" if loader == "load_diabetes" else "accuracy"]
    baseline = scores["baseline_accuracy"]
    figures.append(f"{loader} as it comes: {found:.3f} (baseline {baseline}), LDS {scores['lds']:.3f}")
    assert found >= least
    assert scores["warnings"] == []
    assert (tmp_path / "wine-run" / "report.html").exists()
