"""Reference pages and the README name all that there is, and their examples are valid."""

import re
import shlex
from pathlib import Path

import pytest
from documentation.pages import ROOT, Reader, blocks_of
from servers.loopback import LoopbackS3

import dmdata
import dmpipeline
from dmdata.settings import Settings

SOURCES = [path for package in (dmdata, dmpipeline) for path in Path(package.__path__[0]).rglob("*.py")]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_the_page_on_catalogs_names_every_field_and_its_example_is_a_catalog() -> None:
    page = text_of("docs/reference/catalog.md")
    example = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1]
    catalog = dmdata.Catalog.parse(example, origin="catalog.yaml")
    names = [artifact.name for artifact in catalog.artifacts(members=True)]
    assert names[:3] == ["digits/50pct/test_margins", "digits/50pct/test_datamodels", f"{names[1]}/weight"]
    table = page.partition("| entry |")[2]
    schema = dmdata.Catalog.model_json_schema()
    overrides = schema["$defs"].pop("PriceOverrides")["properties"]
    fields = {name for record in (schema, *schema["$defs"].values()) for name in record.get("properties", {})}
    assert {name for name in fields - set(overrides) if f"`{name}`" not in table} == set()


def test_the_page_on_the_environment_names_every_setting_and_variable() -> None:
    page = text_of("docs/reference/environment.md")
    read = {name for path in SOURCES for name in re.findall(r"\bDMDATA_[A-Z_]+\b", path.read_text(encoding="utf-8"))}
    settable = {name for name in Settings.model_fields if f"`{name}`" not in page}
    assert (settable, {name for name in read - {"DMDATA_NAME"} if f"`{name}`" not in page}) == (set(), set())


def test_links_of_the_readme_lead_to_files() -> None:
    for page in ("README.md", "SECURITY.md"):
        links = re.findall(r"\]\((?!https?:)([^)#]+)", text_of(page))
        assert links
        assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_guide_to_costs_shows_what_it_prints(reader: Reader) -> None:
    reader.follow("docs/how-to/costs.md")


def test_every_command_of_the_documentation_is_accepted(reader: Reader) -> None:
    for page in (*PAGES, "README.md"):
        for block in blocks_of(page):
            for (program, *words), _ in block.commands:
                names = [word for word in words if re.fullmatch(r"[a-z]+", word)]
                options = {word for word in words if word.startswith("--")}
                depth = 2 if names[0] in ("catalog", "config", "prices", "cache") and len(names) > 1 else 1
                help_text = reader.type([program, *names[:depth], "--help"])
                unknown = {option for option in options if option not in help_text}
                assert not unknown, f"{block.where}: {shlex.join([program, *words])} has no {unknown}"


def test_the_guide_to_reading_runs_on_the_release(reader: Reader, release: LoopbackS3) -> None:
    [sample] = [block for block in blocks_of("docs/how-to/read.md") if block.language == "python"]
    reader.execute(sample)
    assert reader.names["some"].shape == (3, 2)
    assert release.n_object_bytes < 30_000_000


def test_the_readmes_python_and_guides_run_on_what_the_demo_leaves(
    reader: Reader, release: LoopbackS3, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert release.keys()
    reader.type(["dmpipeline", "demo", "demo", "--models", "1000", "--held-out", "40"])
    [sample] = [block for block in blocks_of("README.md") if block.language == "python"]
    reader.execute(sample)
    *explained, lds, usd = capsys.readouterr().out.splitlines()
    assert explained[0].startswith("Influences: "), explained
    assert f"# {float(usd):.4f}," in sample.text
    assert 0.3 < float(lds) < 1
    outputs = dmdata.open("demo/digits/50pct/test_margins")
    reader.names |= {"outputs": outputs, "scores": reader.names["dm"].weight}
    reader.execute(blocks_of("docs/how-to/fit.md")[0])
    assert Path("test_50pct.pt").exists()
    monkeypatch.setenv("DMDATA_CATALOG", "demo/export")
    [sample] = blocks_of("docs/how-to/views.md")
    reader.execute(sample)
    shown = re.findall(r"^# (torch.*)$", sample.text, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == shown
