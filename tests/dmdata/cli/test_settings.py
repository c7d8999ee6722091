"""What a user set holds, in the order flag, environment, file, default; what is wrong is named and changes nothing."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from servers.loopback import LoopbackS3

import dmdata
from dmdata.cli.command import main
from dmdata.errors import BudgetError, SettingsError, SourceError
from dmdata.money.prices import GIB, PRICES, Destination, price_table, quote
from dmdata.settings import (
    LinkOverrides,
    PriceOverrides,
    Settings,
    config_path,
    set_in_file,
    settings,
    settings_in_force,
)

NAME = "cifar/50pct/test_margins"


def write(text: str) -> None:
    config_path().parent.mkdir(parents=True, exist_ok=True)
    config_path().write_text(text)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_a_flag_comes_before_the_environment_before_the_file_before_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def priced_to(*flags: str) -> str:
        return str(json.loads(run(capsys, "estimate", NAME, "--json", *flags)[1])["to"])

    assert priced_to() == "internet"
    write("to: same-region\n")
    assert priced_to() == "same-region"
    assert dmdata.estimate(NAME).destination is Destination.SAME_REGION
    monkeypatch.setenv("DMDATA_TO", "cross-region")
    assert priced_to() == "cross-region"
    assert priced_to("--to", "internet") == "internet"


def test_each_setting_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    write("max_cost: 5\nused_gib: 7\n")
    monkeypatch.setenv("DMDATA_USED_GIB", "12.5")
    origins = {setting.name: (setting.value, setting.origin) for setting in settings_in_force()}
    assert origins["max_cost"] == (5.0, str(config_path()))
    assert origins["used_gib"] == (12.5, "DMDATA_USED_GIB")
    assert origins["offline"] == (False, "default")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_cots: 5", "no setting max_cots; choose max_cost"),
        ("max_cost: lots", "max_cost is 'lots'"),
        ("max_cost: -1", "greater than or equal to 0"),
        ("max_cost: .inf", "finite"),
        ("to: moon", "to is 'moon'"),
        ("- 5", "not a list of settings"),
        ("{", "not valid YAML"),
        ("prices: {usd_per_gt: 1}", "no setting prices.usd_per_gt"),
        ("prices: {internet_tiers: [[100, 0.09]]}", r"end with \.inf"),
        ("prices: {internet_tiers: [[100, 0.09], [50, 0.05], [.inf, 0.01]]}", "must rise"),
        ("prices: {cross_region_usd_per_gib: [0.02, 0.01]}", "lowest price"),
        ("prices: {internet_tiers: []}", "at least 1 item"),
        ("prices: {internet_tiers: [[100, 0], [.inf, 0.09]]}", "must not rise.*free_gib"),
        ("prices: {internet_tiers: [[.nan, 0.09], [.inf, 0.09]]}", "greater than 0"),
        ("prices: {internet_tiers: [[.inf, .nan]]}", "finite|greater"),
        ("prices: {date: 2027-13-45}", "not valid YAML"),
        ("prices: {date: '2027-13-45'}", "should be a day"),
        ("prices: {date: today}", "should be a day"),
        ("prices: {date: 2027-01-31 10:00:00}", "should be a day"),
        ("max_cost: yes", "yes or no"),
        ("used_gib: .inf", "finite"),
        ("link: {bytes_per_second: .inf}", "finite"),
        ("link: {bytes_per_second: 0}", "greater than or equal to 1"),
        ("link: {seconds_to_first_byte: 1e300}", "less than or equal to 3600"),
        ("link: {n_connections: 0}", "greater than or equal to 1"),
        ("5: 5", "not a list of settings"),
        ("!!python/object/apply:os.system ['touch /nowhere']", "not valid YAML"),
    ],
)
def test_a_config_file_with_a_fault_is_named_and_spends_nothing(text: str, words: str) -> None:
    write(text)
    with pytest.raises(SettingsError, match=words) as caught:
        settings()
    assert str(config_path()) in str(caught.value)
    with pytest.raises((SettingsError, BudgetError)):
        dmdata.estimate(NAME)


@pytest.mark.parametrize(
    "text",
    [
        "aws_secret_access_key: hunter2",
        "catalog: {password: hunter2}",
        "catalog: [hunter2]",
        "max_cost: {x: hunter2}",
        "key: 'hunter2",
        "{hunter2",
        "hunter2",
        "- hunter2",
    ],
)
def test_what_an_error_says_of_the_file_holds_no_secret_from_it(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(text)
    for arguments in (["config"], ["config", "--json", "--debug"], ["estimate", NAME]):
        code, out, err = run(capsys, *arguments)
        assert code == 2
        assert "hunter2" not in out + err


def test_a_catalog_s_url_is_shown_without_its_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    write("catalog: https://me:hunter2@host/c.yaml?X-Amz-Signature=hunter2\n")
    for arguments in (["config"], ["config", "--json"]):
        code, out, err = run(capsys, *arguments)
        assert (code, "https://host/c.yaml" in out) == (0, True)
        assert "hunter2" not in out + err
    assert "hunter2" in str(settings().catalog), "what is used is what was set"


def test_a_day_is_read_with_or_without_quotes() -> None:
    for text in ("2027-01-31", "'2027-01-31'"):
        write(f"prices: {{date: {text}}}\n")
        assert price_table().date == "2027-01-31"


def test_every_example_in_an_error_is_a_setting_that_holds() -> None:
    def examples(model: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
        for name, field in model.model_fields.items():
            yield f"{prefix}{name}", field.examples[0]
            if hasattr(field.annotation, "model_fields"):
                yield from examples(field.annotation, f"{name}.")

    listed = list(examples(Settings))
    assert len(listed) > 12
    for name, example in listed:
        config_path().unlink(missing_ok=True)
        set_in_file(name, example)
        assert name.split(".")[0] in config_path().read_text()
        settings()


def test_a_file_with_faults_is_mended_by_the_commands_its_errors_name(capsys: pytest.CaptureFixture[str]) -> None:
    write("max_cots: 5\nmax_cost: lots\nprices: {usd_per_gt: 1}\n")
    for _ in range(3):
        code, _, err = run(capsys, "config")
        assert code == 2
        command = err.strip().rpartition("dmdata config ")[2]
        assert run(capsys, "config", *command.split())[0] == 0
    assert run(capsys, "config")[0] == 0
    assert settings().max_cost == 5.0


@pytest.mark.parametrize(("variable", "text"), [("DMDATA_USED_GIB", "many"), ("DMDATA_OFFLINE", "perhaps")])
def test_a_variable_with_a_fault_is_named(variable: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(SettingsError, match=variable):
        settings()


def test_the_monthly_budget_and_offline_may_stand_in_the_file(s3: LoopbackS3) -> None:
    s3.put("x.npy", b"x")
    write("max_cost: 0\n")
    with pytest.raises(BudgetError, match=r"config\.yaml"):
        dmdata.open("s3://madrylab-datamodels/x.npy")
    write("offline: true\n")
    with pytest.raises(SourceError, match="offline"):
        dmdata.open("s3://madrylab-datamodels/x.npy")
    assert s3.n_requests == 0


def test_prices_of_ones_own_are_reckoned_with_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    write("prices: {date: '2027-01-01', usd_per_get: 0.000001, internet_tiers: [[.inf, 0.05]]}\n")
    assert quote(GIB, 10, Destination.INTERNET).usd == pytest.approx(0.05 + 1e-5)
    assert price_table().cross_region_usd_per_gib == PRICES.cross_region_usd_per_gib
    assert math.floor(price_table().break_even_gap_bytes(Destination.INTERNET)) == 21_474
    data = json.loads(run(capsys, "prices", "show", "--json")[1])
    assert (data["date"], data["internet_tiers"]) == ("2027-01-01", [[None, 0.05]])
    assert data["overridden"] == ["date", "internet_tiers", "usd_per_get"]
    assert data["destinations"]["same-region"] == {"usd_per_gib": 0.0, "break_even_gap_bytes": None}
    assert str(config_path()) in run(capsys, "prices", "show")[1]


def test_a_gap_is_merged_by_the_price_in_force(tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "x.npy", np.zeros((5, 10_000), np.uint8))
    array = dmdata.open(tmp_path / "x.npy")
    assert array.plan(np.s_[:, 3]).n_requests == 5
    write("prices: {usd_per_get: 0.000001}\n")
    assert array.plan(np.s_[:, 3]).n_requests == 5, "an open array keeps the prices it was opened at"
    assert dmdata.open(tmp_path / "x.npy").plan(np.s_[:, 3]).n_requests == 1


def test_the_config_command_sets_shows_and_unsets(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "config", "path")[1].strip() == str(config_path())
    assert run(capsys, "config", "set", "max_cost", "2.5")[0] == 0
    assert run(capsys, "config", "set", "prices.usd_per_get", "0.000001")[0] == 0
    shown = json.loads(run(capsys, "config", "--json")[1])["settings"]
    assert shown["max_cost"] == {"value": 2.5, "from": str(config_path())}
    assert shown["prices"]["value"] == {"usd_per_get": 0.000001}
    before = config_path().read_text()
    code, _, err = run(capsys, "config", "unset", "max_cots")
    assert (code, "no setting max_cots; choose max_cost" in err) == (2, True)
    for name, value in (
        ("max_cost", "lots"),
        ("", "1"),
        ("prices.", "1"),
        ("prices", "5"),
        ("color", "red"),
        ("prices.color", "red"),
        ("max_cost.x", "1"),
    ):
        code, _, err = run(capsys, "config", "set", name, value)
        assert code == 2, err
        assert config_path().read_text() == before
    assert run(capsys, "config", "unset", "max_cost")[0] == 0
    assert run(capsys, "config", "unset", "prices.usd_per_get")[0] == 0
    assert settings() == type(settings())()


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("max_cost", "2.5", "2.5"),
        ("offline", "true", "true"),
        ("to", "same-region", "same-region"),
        ("prices.usd_per_get", "0.000001", "0.000001"),
        ("prices.internet_tiers", "[[500, 0.09], [.inf, 0.02]]", "[[500.0, 0.09], [.inf, 0.02]]"),
    ],
)
def test_config_get_prints_what_config_set_takes(
    capsys: pytest.CaptureFixture[str], name: str, value: str, shown: str
) -> None:
    assert run(capsys, "config", "set", name, value)[0] == 0
    code, out, _ = run(capsys, "config", "get", name)
    assert (code, out) == (0, f"{shown}\n")
    before = settings()
    assert run(capsys, "config", "set", name, out.strip())[0] == 0
    assert settings() == before
    facts = json.loads(run(capsys, "config", "get", name, "--json")[1])
    assert (facts["name"], facts["from"]) == (name, str(config_path()))


def test_config_get_of_what_is_not_set_or_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "config", "get", "max_cost") == (0, "\n", "max_cost is not set\n")
    assert run(capsys, "config", "get", "prices.free_gib", "--json")[1].count("null") == 1
    code, _, err = run(capsys, "config", "get", "max_cots")
    assert (code, "no setting max_cots; choose max_cost" in err) == (2, True)


def test_help_lists_the_names_that_can_be_set_and_prices_alone_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("set", "get"):
        shown = run(capsys, "config", command, "--help")[1].split()
        assert {"max_cost,", "prices.usd_per_get,", "link.n_connections."} <= set(shown)
    assert run(capsys, "prices") == run(capsys, "prices", "show")
    assert json.loads(run(capsys, "prices", "--json")[1])["usd_per_get"] == pytest.approx(4e-7)


def test_tiers_of_ones_own_are_shown_as_json_and_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    tiers = "[[500, 0.09], [.inf, 0.02]]"
    assert run(capsys, "config", "set", "prices.internet_tiers", tiers)[0] == 0
    shown = json.loads(run(capsys, "config", "--json")[1])["settings"]
    assert shown["prices"]["value"] == {"internet_tiers": [[500, 0.09], [None, 0.02]]}
    assert "internet_tiers: to 500: $0.09; above: $0.02" in run(capsys, "config")[1]
    assert "with your own internet_tiers" in run(capsys, "estimate", NAME)[2], "nobody takes one's own for list prices"


def test_set_says_when_a_variable_comes_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DMDATA_MAX_COST", "7")
    code, out, err = run(capsys, "config", "set", "max_cost", "2.5", "--json")
    assert (code, json.loads(out)["name"]) == (0, "max_cost")
    assert "DMDATA_MAX_COST is set too" in err
    assert json.loads(run(capsys, "config", "path", "--json")[1]) == {"path": str(config_path())}


def test_a_fast_link_or_a_slow_one_changes_the_seconds_and_never_the_dollars() -> None:
    before = dmdata.estimate(NAME, select="0:1000,42")
    write("link: {bytes_per_second: 1e15, seconds_to_first_byte: 3600, n_connections: 1}\n")
    after = dmdata.estimate(NAME, select="0:1000,42")
    assert (after.usd, after.n_bytes) == (before.usd, before.n_bytes)
    assert after.seconds > 1000 * before.seconds
    assert after.fastest.n_requests < before.fastest.n_requests


def test_spend_by_several_groupings_with_what_is_left_of_the_month(
    s3: LoopbackS3, capsys: pytest.CaptureFixture[str]
) -> None:
    from dmdata.objects.address import Address
    from dmdata.reading.fetch import Transport

    s3.put("x.npy", b"no array")
    Transport(Address("s3://madrylab-datamodels/x.npy", requester_pays=True), "x").start(4)
    assert json.loads(run(capsys, "spend", "--json")[1])["month"]["left_usd"] is None
    write("max_cost: 2\n")
    data = json.loads(run(capsys, "spend", "--by", "day", "--by", "artifact", "--by", "destination", "--json")[1])
    assert list(data["by_artifact"]) == ["x"]
    assert list(data["by_destination"]) == ["internet"]
    assert len(data["by_day"]) == 1
    assert data["month"]["usd"] == data["usd"] > 0
    assert data["month"]["left_usd"] == pytest.approx(2 - data["usd"])
    out, err = run(capsys, "spend", "--by", "day", "--by", "artifact")[1:]
    assert " day " in out
    assert " artifact " in out
    assert "of $2.00" in err
    day = next(iter(data["by_day"]))
    for flags, n_reads in (
        (["--since", day], 1),
        (["--since", "2999-01-01"], 0),
        (["--month", day[:7]], 1),
        (["--month", "2001-01"], 0),
        (["--month", day[:7], "--since", "2999-01-01"], 0),
    ):
        shown = json.loads(run(capsys, "spend", *flags, "--by", "artifact", "--json")[1])
        assert (shown["reads"], len(shown["by_artifact"])) == (n_reads, n_reads)
        assert shown["month"] == data["month"], "the budget is of the month that is"
    assert run(capsys, "spend", "--since", "yesterday")[0] == 2


def test_what_is_known_of_the_month_narrows_the_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    def priced(**known: Any) -> tuple[float, float, float]:
        price = dmdata.estimate(NAME, **known)
        return price.usd_low, price.usd, price.usd_high

    low, usd, high = priced()
    assert low < usd == high
    left = priced(used_gib=0, free_tier=True)
    assert left[0] == left[1] == left[2] == pytest.approx(low)
    assert priced(used_gib=20_000)[0] == priced(used_gib=20_000)[2] < usd, "far behind the free tier all is known"
    flags = ["--used-gib", "0", "--free-tier", "--json"]
    assert json.loads(run(capsys, "estimate", NAME, *flags)[1])["usd"] == pytest.approx(low)


def test_an_estimate_shows_both_ends_of_each_artifact(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(run(capsys, "estimate", "cifar/50pct/*_margins", "--select", ":,42", "--json")[1])
    for part in (data, *data["artifacts"]):
        fastest = part["fastest"]
        assert fastest["seconds"] < part["seconds"]
        assert fastest["usd"] > part["usd"]
        assert set(fastest) == {"bytes", "requests", "usd", "usd_low", "usd_high", "seconds"}
    assert "fastest" in run(capsys, "estimate", "cifar/50pct/*_margins", "--select", ":,42")[1]


def test_spend_sets_the_sources_own_word_beside_the_ledger(s3: LoopbackS3, capsys: pytest.CaptureFixture[str]) -> None:
    s3.put("x.npy", b"no array")
    run(capsys, "doctor")
    from dmdata.objects.address import Address
    from dmdata.reading.fetch import Transport

    Transport(Address("s3://madrylab-datamodels/x.npy", requester_pays=True), "x").start(4)
    data = json.loads(run(capsys, "spend", "--by", "charged", "--json")[1])
    assert (
        data["by_charged"]
        == data["charged"]
        == {"confirmed": {"bytes": 4, "requests": 1, "usd": data["usd"], "reads": 1}}
    )


def settings_fault() -> str:
    try:
        settings()
    except SettingsError as error:
        return str(error)
    return ""


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
    st.datetimes(),
    st.binary(max_size=4),
    st.sampled_from(["internet", "2027-01-31", "0.09", 100, 0.09, math.inf]),
)
_NAMES = st.one_of(
    st.sampled_from([*Settings.model_fields, *PriceOverrides.model_fields, *LinkOverrides.model_fields]), _SCALARS
)
_DOCUMENTS = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3), max_leaves=12
)


@settings_of_hypothesis(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(document=st.dictionaries(_NAMES, _DOCUMENTS, max_size=3), to=st.sampled_from(Destination))
def test_whatever_the_file_holds_it_is_settings_that_price_a_read_or_a_named_fault(
    document: Any, to: Destination
) -> None:
    write(yaml.safe_dump(document))
    if fault := settings_fault():
        assert str(config_path()) in fault
        return
    json.dumps([str(setting.value) for setting in settings_in_force()])
    price = dmdata.estimate(NAME, select="0:1000,42", to=to)
    for way in (price.cheapest, price.fastest):
        assert 0 <= way.usd_low <= way.usd == way.usd_high < math.inf
        assert 0 <= way.seconds < math.inf


@settings_of_hypothesis(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_is_settings_or_a_named_fault(text: str) -> None:
    config_path().parent.mkdir(parents=True, exist_ok=True)
    config_path().write_text(text, encoding="utf-8")
    assert str(config_path()) in (settings_fault() or str(config_path()))


@settings_of_hypothesis(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["max_cost", "to", "prices", "prices.date", "link.n_connections", "x", "prices.x", "."]),
    text=st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.sampled_from(["1", "{}", "[1]", "null"])
    ),
)
def test_what_set_accepts_can_be_read_again_and_what_it_refuses_leaves_the_file(name: str, text: str) -> None:
    write("used_gib: 5\n")
    before = config_path().read_text()
    try:
        set_in_file(name, text)
    except SettingsError:
        assert config_path().read_text() == before
    else:
        assert settings().used_gib == 5


@pytest.mark.parametrize("name", ["max_cost", "to"])
def test_a_file_that_cannot_be_written_is_an_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("dear")
    monkeypatch.setenv("DMDATA_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(SettingsError, match="DMDATA_HOME"):
        set_in_file(name, {"max_cost": "1", "to": "internet"}[name])


@pytest.mark.parametrize(("text", "words"), [("max_cost: 0", "at most $0.00 a month"), ("", "no monthly budget")])
def test_the_doctor_tells_a_budget_of_nothing_from_none(
    text: str, words: str, s3: LoopbackS3, capsys: pytest.CaptureFixture[str]
) -> None:
    write(text)
    assert words in run(capsys, "doctor")[1]


def test_an_estimate_says_its_bounds_and_how_to_narrow_them(capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "estimate", "cifar/**")[2]
    assert "between $204" in said
    assert "--used-gib and --free-tier narrow it" in said
    said = run(capsys, "estimate", "cifar/**", "--used-gib", "0", "--free-tier")[2]
    assert "between" not in said
    assert "narrow" not in said
    assert "between" not in run(capsys, "estimate", "cifar/**", "--to", "same-region")[2]


def test_whoever_agrees_is_told_what_the_budget_will_reserve_whatever_is_set_of_the_month(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("mirror", NAME, str(tmp_path / "m.zarr"))
    asked = run(capsys, *arguments)
    assert (asked[0], "cost up to $0.52" in asked[2]) == (6, True)
    write("free_tier: true\nused_gib: 0\n")
    assert dmdata.estimate(NAME).usd < 0.01
    assert run(capsys, *arguments) == asked
    code, _, err = run(capsys, *arguments, "-y", "--max-cost", "0.3")
    assert (code, f"reading {NAME} would cost up to $0.52" in err) == (8, True)
    assert json.loads(run(capsys, *arguments, "--dry-run", "--json")[1])["usd"] == pytest.approx(0.52, rel=0.01)


@pytest.mark.parametrize("select", [None, "0:1000,42", ":,42", "::7"])
def test_the_fastest_of_several_reads_is_never_slower_than_the_cheapest(
    select: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("--select", select) if select else ()
    for arguments in (("estimate", "cifar/50pct/*_margins"), ("mirror", NAME, str(tmp_path / "m.zarr"), "--dry-run")):
        price = json.loads(run(capsys, *arguments, *chosen, "--json")[1])
        for part in (price, *price["artifacts"]):
            assert part["fastest"]["seconds"] <= part["seconds"]
            assert part["usd"] <= part["fastest"]["usd"]


@pytest.mark.parametrize("number", ["nan", "inf", "-1"])
@pytest.mark.parametrize("arguments", [["get", NAME, "-y", "--max-cost"], ["estimate", NAME, "--used-gib"]])
def test_amounts_on_the_command_line_are_finite(
    arguments: list[str], number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments, number)
    assert (code, out, arguments[-1] in err) == (2, "", True)
