import hashlib
import sys

import numpy as np
import pytest
import yaml

from dmpipeline.errors import SpecError
from dmpipeline.models.recipes import (
    CifarFast,
    ConvNet,
    Function,
    LogisticRegression,
    Module,
    Perceptron,
    Recipe,
    Resnet9Release,
    Resnet18Release,
    code_digest,
    find_recipe,
    import_object,
    type_of_recipe,
)
from dmpipeline.spec import RecipeSpec, RunSpec

BUILT_IN = [Perceptron, LogisticRegression, ConvNet, Resnet9Release, Resnet18Release, CifarFast]


def recipe_of(text):
    """Look up the recipe of a run.yaml's text."""
    return find_recipe(RunSpec(recipe=yaml.safe_load(text)).recipe)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module that can be imported; return its name and file."""
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write(text, name="lab_of_a_user"):
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        written.append(name)
        return name, file

    yield write
    for name in written:
        sys.modules.pop(name, None)


def test_every_recipe_is_found_by_its_own_name_and_version():
    for (name, version), kind in type_of_recipe.items():
        overrides = {"module": {"network": "a:b"}, "function": {"function": "a:b"}}.get(name, {})
        recipe = find_recipe(RecipeSpec(name=name, version=version, **overrides))
        assert type(recipe) is kind
        assert (recipe.name, recipe.version) == (name, version)


def test_every_field_of_every_recipe_has_words_and_an_example_for_errors():
    for kind in type_of_recipe.values():
        for name, field in kind.model_fields.items():
            assert name in ("name", "version") or (field.description and field.examples), (kind, name)


def test_examples_of_fields_are_values_that_they_take():
    for kind in BUILT_IN:
        for name, field in kind.model_fields.items():
            if name not in ("name", "version", "mean", "std"):
                kind(**{name: field.examples[0]})
        kind(mean=kind.model_fields["mean"].examples[0], std=kind.model_fields["std"].examples[0])


def test_the_perceptron_is_the_one_that_earlier_rows_were_trained_with():
    recipe = Perceptron()
    assert (recipe.hidden, recipe.epochs, recipe.batch_size, recipe.lr) == (64, 15, 64, 0.3)
    assert (recipe.schedule, recipe.momentum, recipe.nesterov, recipe.weight_decay) == ("linear", 0.9, False, 0)
    assert (recipe.flip, recipe.translate, recipe.cutout, recipe.mean, recipe.std) == ("none", 0, 0, None, None)
    assert (recipe.label_smoothing, recipe.tta, recipe.precision) == (0, "none", "single")


def test_the_resnet9_is_trained_as_the_release_says():
    values = Resnet9Release().model_dump()
    assert values == {
        "name": "resnet9-release",
        "version": 1,
        "epochs": 24,
        "batch_size": 512,
        "lr": 0.5,
        "schedule": "triangle",
        "peak_epoch": 5,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 5e-4,
        "label_smoothing": 0.1,
        "flip": "random",
        "translate": 2,
        "cutout": 4,
        "mean": (125.307, 122.961, 113.8575),
        "std": (51.5865, 50.847, 51.255),
        "tta": "channel_flip",
        "precision": "half",
    }


def test_the_resnet18_has_the_second_hand_facts_of_the_release():
    recipe = Resnet18Release()
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.schedule) == (15, 512, 0.4, "triangle")


def test_a_linear_schedule_falls_from_lr_by_equal_steps_to_just_above_zero():
    recipe = Perceptron(lr=0.3, epochs=2)
    assert [recipe.rate(step, 5) for step in range(10)] == [0.3 * (1 - step / 10) for step in range(10)]


def test_a_constant_schedule_stays():
    assert {Perceptron(schedule="constant", lr=0.2).rate(step, 5) for step in range(75)} == {0.2}


def test_the_release_warms_up_for_five_epochs_and_falls_to_zero_over_nineteen():
    recipe = Resnet9Release()
    rates = np.array([recipe.rate(step, 48) for step in range(24 * 48)])
    assert rates[0] == 0
    assert rates[120] == pytest.approx(0.25)
    assert rates.argmax() == 240
    assert rates[240] == 0.5
    assert rates[240 + 19 * 24] == pytest.approx(0.25)
    assert rates[-1] == pytest.approx(0.5 / (19 * 48))
    knots = [0, 5 * 48, 24 * 48]
    np.testing.assert_allclose(rates, 0.5 * np.interp(np.arange(24 * 48), knots, [0, 1, 0]), rtol=1e-12)


def test_the_peak_may_lie_within_an_epoch():
    recipe = CifarFast(epochs=10, peak_epoch=2.5, lr=1.0)
    assert recipe.rate(5, 2) == 1.0
    assert recipe.rate(4, 2) == pytest.approx(0.8)


def test_yaml_gives_lists_for_tuples_and_whole_numbers_for_floats():
    recipe = recipe_of("{name: convnet, lr: 1, peak_epoch: 3, mean: [1, 2.5, 3], std: [1, 2, 3], channels: [4, 8]}")
    assert (recipe.lr, recipe.mean, recipe.std, recipe.channels) == (1.0, (1.0, 2.5, 3.0), (1.0, 2.0, 3.0), (4, 8))
    assert all(type(number) is float for number in (recipe.lr, recipe.peak_epoch, *recipe.mean))


def test_a_recipe_given_back_as_data_is_the_same_recipe():
    for kind in BUILT_IN:
        recipe = kind()
        data = yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))
        assert find_recipe(RecipeSpec(**data)) == recipe
        with pytest.raises(ValueError, match="frozen"):
            recipe.epochs = 3


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("{name: resnet9}", "recipe.name", "choose resnet9-release"),
        ("{name: resnet9-release, version: 2}", "recipe.version", "choose 1"),
        ("{name: resnet9-release, cutuot: 3}", "recipe.cutuot", "choose cutout"),
        ("{name: resnet9-release, epochs: 5}", "recipe.peak_epoch", "below epochs"),
        ("{schedule: triangle, peak_epoch: 15}", "recipe.peak_epoch", "below epochs"),
        ("{schedule: triangle, peak_epoch: 0}", "recipe.peak_epoch", "above 0"),
        ("{schedule: cosine}", "recipe.schedule", "linear, constant or triangle"),
        ("{lr: '1'}", "recipe.lr", "positive step size"),
        ("{lr: yes}", "recipe.lr", "positive step size"),
        ("{epochs: 2.5}", "recipe.epochs", "count of epochs"),
        ("{weight_decay: -1}", "recipe.weight_decay", "0 or more"),
        ("{weight_decay: .inf}", "recipe.weight_decay", "0 or more"),
        ("{label_smoothing: 1}", "recipe.label_smoothing", "below 1"),
        ("{momentum: 0, nesterov: true}", "recipe.nesterov", "needs momentum"),
        ("{nesterov: 1}", "recipe.nesterov", "or false"),
        ("{translate: -1}", "recipe.translate", "count of pixels"),
        ("{flip: yes}", "recipe.flip", "none, random or alternating"),
        ("{tta: flip}", "recipe.tta", "mirror or channel_flip"),
        ("{precision: double}", "recipe.precision", "single or half"),
        ("{mean: [1, 2, 3]}", "recipe.std", "as many as mean"),
        ("{std: [1, 2, 3]}", "recipe.std", "as many as mean"),
        ("{mean: [1, 2], std: [1]}", "recipe.std", "as many as mean"),
        ("{mean: [1], std: [0]}", "recipe.std", "positive"),
        ("{mean: [red], std: [1]}", "recipe.mean", "0..255"),
        ("{mean: [.nan], std: [1]}", "recipe.mean", "0..255"),
        (f"{{mean: [1{'0' * 400}], std: [1]}}", "recipe.mean", "0..255"),
        ("{mean: [], std: []}", "recipe.mean", "0..255"),
        ("{mean: 3, std: 3}", "recipe.mean", "0..255"),
        ("{name: convnet, channels: [1, 2, 3]}", "recipe.channels", "two counts"),
        ("{name: convnet, channels: [0, 2]}", "recipe.channels", "two counts"),
        ("{name: convnet, channels: 16}", "recipe.channels", "two counts"),
        ("{name: module}", "recipe.network", "package.module:name"),
        ("{name: module, network: 3}", "recipe.network", "package.module:name"),
        ("{name: module, network: 'a:b', arguments: [1]}", "recipe.arguments", "mapping of argument names"),
        ("{name: module, network: 'a:b', arguments: {1: 2}}", "recipe.arguments", "mapping of argument names"),
        ("{name: function}", "recipe.function", "package.module:name"),
        ("{name: function, function: 'a:b', epochs: 3}", "recipe.epochs", "choose"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_a_remedy(text, field, words):
    with pytest.raises(SpecError, match=words) as caught:
        recipe_of(text)
    assert caught.value.field == field


def test_a_mean_that_is_refused_is_the_only_complaint():
    with pytest.raises(SpecError) as caught:
        recipe_of("{mean: [red], std: [1]}")
    assert "recipe.std" not in str(caught.value)


@pytest.mark.parametrize(
    "path",
    ["", ":", "a", "a:", ":b", "a.b", "a b:c", "a:b:c", ".a:b", "a..b:c", "a.:b", "a:b.c", "a:b()", "../a:b", "a/b:c",
     "1a:b", "a:class", "import:b", "os:system('x')", "a:b\n", " a:b", "a-b:c"],
)  # fmt: skip
def test_a_path_of_another_form_is_refused_when_the_spec_is_read(path):
    with pytest.raises(SpecError, match=r"package.module:name") as caught:
        find_recipe(RecipeSpec(name="module", network=path))
    assert caught.value.field == "recipe.network"
    with pytest.raises(SpecError, match=r"package.module:name"):
        import_object(path)


def test_reading_a_spec_imports_nothing_and_importing_does(module):
    name, _ = module("raise RuntimeError('was run')")
    recipe = recipe_of(f"{{name: module, network: '{name}:Net'}}")
    assert recipe == Module(network=f"{name}:Net")
    assert recipe_of(f"{{name: function, function: '{name}:f'}}") == Function(function=f"{name}:f")
    assert name not in sys.modules
    with pytest.raises(SpecError, match="RuntimeError: was run"):
        import_object(recipe.network)


def test_an_object_is_imported_by_its_path(module):
    name, _ = module("def learn(): return 7")
    assert import_object(f"{name}:learn")() == 7


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("no_such_module_here:f", "PYTHONPATH"),
        ("lab_of_a_user.inner:f", "cannot be imported"),
        ("lab_of_a_user:lern", "choose learn"),
        ("lab_of_a_user:size", "can be called"),
    ],
)
def test_what_cannot_be_imported_is_explained(module, target, words):
    module("size = 3\ndef learn(): pass")
    with pytest.raises(SpecError, match=words) as caught:
        import_object(target)
    assert target in str(caught.value)
    assert caught.value.value == target


def test_a_package_that_the_users_module_lacks_is_named(module):
    name, _ = module("import no_such_package_here")
    with pytest.raises(SpecError, match="no_such_package_here"):
        import_object(f"{name}:f")


def test_the_digest_is_that_of_the_file_and_of_no_recipe_of_ours(module):
    name, file = module("class Net: pass\ndef learn(): pass\n")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert code_digest(Module(network=f"{name}:Net")) == digest
    assert code_digest(Function(function=f"{name}:learn")) == digest
    assert [code_digest(kind()) for kind in BUILT_IN] == [None] * len(BUILT_IN)


def test_the_digest_follows_an_object_to_the_file_that_defines_it(module):
    _, file = module("class Net: pass", name="nets_of_a_user")
    module("from functools import partial\nfrom nets_of_a_user import Net\nsmall = partial(Net)\n")
    assert code_digest(Module(network="lab_of_a_user:Net")) == hashlib.sha256(file.read_bytes()).hexdigest()
    own = file.with_name("lab_of_a_user.py")
    assert code_digest(Module(network="lab_of_a_user:small")) == hashlib.sha256(own.read_bytes()).hexdigest()


def test_the_digest_changes_with_the_code(module):
    name, file = module("def learn(): return 1")
    recipe = Function(function=f"{name}:learn")
    before = code_digest(recipe)
    file.write_text("def learn(): return 2")
    assert code_digest(recipe) != before


def test_an_object_without_a_source_file_is_refused():
    with pytest.raises(SpecError, match="module of your own"):
        code_digest(Function(function="builtins:print"))


def test_functions_are_no_recipes_of_epochs():
    assert not issubclass(Function, Recipe)
    assert issubclass(Module, Recipe)
