"""What a fit takes is forecast from a small one."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dmpipeline.cli.command import main
from dmpipeline.errors import SpecError
from dmpipeline.fitting.forecast import CORE_USD_PER_HOUR, GPU_SECONDS, Forecast, Rates

RATES = Rates(pairs=4e10, sums=4e9, path_numbers=1e8, gram_numbers=4e8)


def test_time_is_that_of_the_parts_and_shared_by_the_cores():
    forecast = Forecast(
        300_000, 50_000, 10_000, 1000, n_cores=2, usd_per_core_hour=0.05, usd_per_gpu_hour=4, rates=RATES
    )
    assert forecast.moments_seconds == (300_000 * 50_000**2 / 2 / 4e10 + 300_000 * 50_000 * 10_000 / 4e9) / 2
    assert forecast.paths_seconds == (3 * 50_000**2 / 4e8 + 10_000 * 50_000 * 1000 / 1e8) / 2
    many = Forecast(300_000, 50_000, 10_000, 1000, n_cores=96, usd_per_core_hour=0.05, usd_per_gpu_hour=4, rates=RATES)
    assert many.seconds == pytest.approx(forecast.seconds / 48)
    assert many.usd == pytest.approx(forecast.usd)
    assert forecast.gpu_seconds == GPU_SECONDS * 50_000**2 * 10_000
    on_gpu = forecast.moments_seconds * 2 / 3600 * 0.05 + forecast.gpu_seconds / 3600 * 4
    assert forecast.usd_with_gpu == pytest.approx(on_gpu)
    assert forecast.as_dict()["seconds"] == forecast.moments_seconds + forecast.paths_seconds


def test_more_weights_than_examples_are_refused():
    with pytest.raises(SpecError, match="more than the 50 examples"):
        Forecast(100, 50, 5, 51, n_cores=1, usd_per_core_hour=0, usd_per_gpu_hour=0, rates=RATES)


def test_measured_rates_are_positive():
    rates = Rates.measured(n_models=1024, n_train=512, n_targets=32)
    assert all(0 < rate < 1e15 for rate in (rates.pairs, rates.sums, rates.path_numbers, rates.gram_numbers))


MEMORY = """
import resource
import numpy as np
from dmpipeline import fit
from dmpipeline.draws.masks import draw_masks
n, p, t = 2000, 4500, 600
masks = draw_masks(0, np.arange(n, dtype=np.uint64), p, 0.5)
outputs = np.random.default_rng(0).standard_normal((n, t)).astype(np.float16)
fit(masks[:200, :50], outputs[:200])
def most():
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
before = most()
fit(masks, outputs)
print(most() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_fit_takes_the_memory_that_was_foreseen():
    said = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    foreseen = Forecast(
        2000, 4500, 600, 10, n_cores=1, usd_per_core_hour=0, usd_per_gpu_hour=0, rates=RATES
    ).memory_bytes
    assert 0.6 * foreseen < int(said) < foreseen * 1.05


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_the_fit_of_a_release_is_planned_next_to_its_training_and_download(capsys, monkeypatch):
    monkeypatch.setattr(Rates, "measured", classmethod(lambda _: RATES))
    code, out, err = call(capsys, "plan", "cifar/50pct", "--fit", "--nonzero", "1500", "--cores", "96", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert set(data["fit"]) == {"cifar/50pct/test_datamodels", "cifar/50pct/train_datamodels"}
    planned = data["fit"]["cifar/50pct/train_datamodels"]
    shape = {name: planned[name] for name in ("n_models", "n_train", "n_targets", "n_nonzero", "n_cores")}
    assert shape == {"n_models": 300_000, "n_train": 50_000, "n_targets": 50_000, "n_nonzero": 1500, "n_cores": 96}
    assert planned["usd"] == pytest.approx(planned["seconds"] / 3600 * 96 * CORE_USD_PER_HOUR)
    assert not data["fitting_left_out"]
    code, out, err = call(capsys, "plan", "cifar/50pct", "--fit")
    assert "300,000 x 50,000 x 10,000" in out
    assert "rates measured here just now" in err
    assert "of an A100, assumed" in err
    assert "paths on a GPU" in out
    code, _, err = call(capsys, "plan", "cifar/50pct/test_margins", "--fit")
    assert (code, "names of datamodels" in err) == (2, True)


def test_the_fit_of_a_run_takes_the_weights_of_the_last(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Rates, "measured", classmethod(lambda _: RATES))
    run = str(tmp_path / "run")
    call(capsys, "init", run, "--models", "60", "--held-out", "2", "--retrainings", "2")
    guessed = json.loads(call(capsys, "plan", run, "--fit", "--seconds-per-model", "1", "--json")[1])["fit"][run]
    assert (guessed["n_train"], guessed["n_targets"], guessed["n_nonzero"]) == (1437, 360, 0.02 * 1437)
    call(capsys, "run", run)
    fitted = json.loads(call(capsys, "fit", run, "--json")[1])
    planned = json.loads(call(capsys, "plan", run, "--fit", "--seconds-per-model", "1", "--json")[1])["fit"][run]
    assert planned["n_nonzero"] == fitted["nonzero_weights"]
    assert planned["usd"] == 0
    assert np.isfinite(planned["seconds"])
