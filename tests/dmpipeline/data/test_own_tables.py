"""Tables as people have them train well as they come; what cannot be taken says which column, item or key."""

import io
import json

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import sklearn.datasets
import torch
import yaml
from PIL import Image
from sklearn.model_selection import train_test_split

from dmpipeline.checks.verification import replay
from dmpipeline.cli.command import main
from dmpipeline.data.datasets import load_dataset, save_dataset
from dmpipeline.data.scaling import Moments
from dmpipeline.errors import RunExistsError, SpecError
from dmpipeline.models.recipes import find_recipe
from dmpipeline.runs.extension import extend
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec
from dmpipeline.training.ensembles import possible_methods
from dmpipeline.training.material import Material
from dmpipeline.training.train import Way

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(30, 4)) * [1, 1e3, 1e-3, 1] + [0, 1e5, 0, 7]
CLASSES = np.arange(30) % 3
TABLE = pd.DataFrame(INPUTS, columns=["height", "salary", "error", "age"])
LOADERS = {
    "wine": sklearn.datasets.load_wine,
    "breast_cancer": sklearn.datasets.load_breast_cancer,
    "iris": sklearn.datasets.load_iris,
    "diabetes": sklearn.datasets.load_diabetes,
    "diabetes_unscaled": lambda **how: sklearn.datasets.load_diabetes(scaled=False, **how),
}


def as_it_comes(folder, name, *, as_frame=False):
    source = LOADERS[name](as_frame=as_frame)
    inputs, test_inputs, labels, test_labels = train_test_split(
        source.data, source.target, test_size=0.2, random_state=0
    )
    return save_dataset(folder / name, (inputs, labels), (test_inputs, test_labels))


def says(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    return ended.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "least"),
    [("wine", 0.93), ("breast_cancer", 0.94), ("iris", 0.85), ("diabetes", 0.3), ("diabetes_unscaled", 0.3)],
)
def test_scikit_learns_tables_train_well_as_they_come(tmp_path, capsys, name, least):
    folder = as_it_comes(tmp_path, name)
    arguments = "--models", 24, "--held-out", 0
    assert says(capsys, "init", tmp_path / "run", "--dataset", folder, *arguments)[0] == 0
    run = Run.open(tmp_path / "run")
    run.train(way=Way("products", 24))
    dataset = run.dataset()
    if dataset.is_regression:
        errors = run.array("test_squared_errors")[:].mean(1)
        reached = 1 - errors.mean() / dataset.test_labels.var()
    else:
        reached = (run.array("test_logits")[:].argmax(-1) == dataset.test_labels).mean()
    assert reached >= least


def test_a_table_with_names_trains_the_same_rows_as_its_values(tmp_path):
    plain = Run.create(tmp_path / "a", RunSpec(dataset=str(as_it_comes(tmp_path, "wine")), n_models=2, **NO_HELD_OUT))
    (tmp_path / "framed").mkdir()
    framed = as_it_comes(tmp_path / "framed", "wine", as_frame=True)
    named = Run.create(tmp_path / "b", RunSpec(dataset=str(framed), n_models=2, **NO_HELD_OUT))
    for run in (plain, named):
        run.train(way=Way("products", 2))
    assert named.dataset().feature_names[:2] == ("alcohol", "malic_acid")
    assert (plain.array("test_logits")[:] == named.array("test_logits")[:]).all()


NO_HELD_OUT = {"held_out": {"n_subsets": 0}}
NUMBERS = INPUTS[:, 1] / 10 + INPUTS[:, 0]


def make_run(folder, labels=NUMBERS, **values):
    dataset = str(save_dataset(folder / "table", (TABLE, labels), (TABLE[:9], labels[:9])))
    return Run.create(folder / "run", RunSpec(dataset=dataset, **{"n_models": 6, **NO_HELD_OUT, **values}))


def test_inputs_are_standardised_by_the_full_training_set_and_constants_stay(tmp_path):
    constant = TABLE.assign(constant=np.float32(0.1))
    path = save_dataset(tmp_path / "table", (constant, CLASSES), (constant[:9] + 1, CLASSES[:9]))
    dataset = load_dataset(str(path))
    material = Material.of(dataset, find_recipe(RunSpec().recipe))
    stored = dataset.train_inputs.astype(np.float64)
    spread = np.where(stored.std(0) > 1e-9, stored.std(0), 1)
    np.testing.assert_allclose(material.train_inputs, (stored - stored.mean(0)) / spread, atol=1e-4)
    np.testing.assert_allclose(material.test_inputs, (dataset.test_inputs - stored.mean(0)) / spread, atol=1e-4)
    assert (material.train_inputs[:, 4] == 0).all()
    # what the dataset holds, and a function is given, is not scaled
    np.testing.assert_allclose(dataset.train_inputs[:, :4], INPUTS, rtol=1e-6)
    as_is = Material.of(load_dataset(str(path), inputs="as-is"), find_recipe(RunSpec().recipe))
    assert (as_is.train_inputs.numpy() == dataset.train_inputs).all()


def test_moments_do_not_depend_on_the_pieces_they_are_measured_in():
    values = RNG.normal(size=(101, 3)).astype(np.float32)
    whole = Moments.of(values)
    pieces = Moments.of(values, piece_bytes=100)
    np.testing.assert_allclose(pieces.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(pieces.std, whole.std, rtol=1e-12)
    np.testing.assert_allclose(whole.std, values.std(0, dtype=np.float64), rtol=1e-12)


def test_predictions_are_in_the_units_of_the_labels_in_every_way_of_training(tmp_path):
    outputs = ["squared_errors", "predictions"]
    run = make_run(tmp_path, outputs=outputs, recipe={"name": "perceptron", "batch_size": 5})
    dataset = run.dataset()
    methods = possible_methods(run.trainer().material)
    assert set(methods) == {"products", "vmap", "loop"}
    found = {}
    for method in methods:
        trainer = run.trainer(way=Way(method, 1 if method == "loop" else 3))
        found[method] = run.train_rows(trainer, range(6))["test_predictions"]
        np.testing.assert_allclose(found[method], found["products"], rtol=1e-3)
    errors = np.square(found["products"] - dataset.test_labels).mean()
    assert errors < 0.5 * dataset.test_labels.var()
    run.train(way=Way("products", 3))
    assert replay(run, 2).is_same


def test_what_is_decided_is_in_run_yaml_and_provenance_and_stays_at_an_extension(tmp_path):
    run = make_run(tmp_path, outputs=["squared_errors"])
    written = yaml.safe_load((run.path / "run.yaml").read_text())
    assert (written["task"], written["inputs"]) == ("regression", "standardised")
    assert written["recipe"] == {"name": "perceptron", "version": 1, "lr": 0.05, "weight_decay": 0.07, "epochs": 30}
    scaling = run.provenance["dataset"]["scaling"]
    np.testing.assert_allclose(scaling["inputs"]["mean"], INPUTS.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scaling["labels"]["std"], [NUMBERS.std()], rtol=1e-5)
    assert len(scaling["inputs"]["sha256"]) == 64
    again = Run.create(
        run.path, RunSpec(dataset=run.spec.dataset, n_models=6, outputs=["squared_errors"], **NO_HELD_OUT)
    )
    assert again.spec == run.spec
    with pytest.raises(RunExistsError, match="inputs 'standardised', not 'as-is'"):
        Run.create(run.path, run.spec.model_copy(update={"inputs": "as-is"}))
    longer = extend(run, 8)
    assert (longer.spec.task, longer.spec.inputs, longer.spec.recipe) == ("regression", "standardised", run.spec.recipe)


@pytest.mark.parametrize("given", [{"lr": 0.1}, {"weight_decay": 0.0}, {"momentum": 0.5}])
def test_hyperparameters_that_are_given_are_not_settled_otherwise(tmp_path, given):
    run = make_run(tmp_path, outputs=["squared_errors"], recipe={"name": "perceptron", "epochs": 2, **given})
    assert run.spec.recipe.overrides == {"epochs": 2, **given}


def test_a_run_without_these_fields_reads_and_trains_as_before(tmp_path):
    run = make_run(tmp_path, labels=CLASSES, inputs="as-is", recipe={"name": "perceptron", "epochs": 2, "lr": 1e-9})
    run.train(way=Way("products", 3))
    text = (run.path / "run.yaml").read_text().replace("task: classification\n", "").replace("inputs: as-is\n", "")
    (run.path / "run.yaml").write_text(text)
    facts = {name: fact for name, fact in run.provenance.items() if not name.startswith("spec")}
    (run.path / "provenance.json").write_text(json.dumps(facts))
    old = Run.open(run.path)
    assert (old.spec.task, old.spec.inputs, old.dataset().scaling) == (None, None, None)
    assert replay(old, 1).is_same


def test_digits_are_taken_as_they_are_and_say_so(tmp_path):
    run = Run.create(tmp_path / "run", RunSpec(n_models=2, **NO_HELD_OUT))
    assert (run.spec.task, run.spec.inputs, run.spec.recipe.overrides) == ("classification", "as-is", {})
    with pytest.raises(SpecError, match="task regression is to be classification"):
        Run.create(tmp_path / "other", RunSpec(task="regression", outputs=["predictions"]))
    with pytest.raises(SpecError, match="inputs standardised are pictures"):
        load_dataset("digits", inputs="standardised")


def test_pictures_are_taken_as_they_are_unless_their_values_are_none_of_pictures(tmp_path):
    pictures = RNG.integers(0, 256, (30, 5, 5), np.uint8)
    for name, inputs, form in (
        ("bytes", pictures, "as-is"),
        ("floats", pictures / 255, "as-is"),
        ("far", pictures.astype(float), "standardised"),
    ):
        dataset = load_dataset(str(save_dataset(tmp_path / name, (inputs, CLASSES), (inputs[:9], CLASSES[:9]))))
        assert (dataset.inputs_form, dataset.image_shape) == (form, (5, 5))
    with pytest.raises(SpecError, match="standardised of pictures of bytes is to be as-is"):
        load_dataset(str(tmp_path / "bytes"), inputs="standardised")


def test_a_function_is_given_inputs_and_labels_as_they_are(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    program = "def learn(dataset, mask, seed):\n    return dataset.train_inputs[:, 1:2], dataset.test_inputs[:, 1:2]\n"
    (tmp_path / "tables_function.py").write_text(program)
    recipe = {"name": "function", "function": "tables_function:learn"}
    run = make_run(tmp_path, outputs=["predictions"], recipe=recipe)
    assert (run.spec.task, run.spec.inputs) == ("regression", "as-is")
    run.train()
    np.testing.assert_allclose(run.array("train_predictions")[0], INPUTS[:, 1], rtol=1e-6)
    with pytest.raises(SpecError, match="'standardised' are not for recipe function"):
        Run.create(tmp_path / "other", run.spec.model_copy(update={"inputs": "standardised"}))


def test_init_prints_the_task_and_the_classes_with_their_counts(tmp_path, capsys):
    names = np.array(["auk", "emu", "newt"])[CLASSES]
    folder = save_dataset(tmp_path / "birds", (TABLE, names), (TABLE[:4], [*names[:3], "yak"]))
    code, said = says(capsys, "init", tmp_path / "a", "--dataset", folder, "--models", 5)
    assert code == 0
    assert "classification, 4 classes" in said.out
    assert "4 values an example, standardised by mean and deviation of all 30 training examples" in said.out
    assert ["newt", "10", "1"] in [line.split() for line in said.out.splitlines()]
    assert "warning: class 'yak' is in test but not in train: no model can learn that" in said.err.replace("\n", " ")
    code, said = says(capsys, "init", tmp_path / "b", "--dataset", folder, "--models", 5, "--inputs", "as-is", "--json")
    facts = json.loads(said.out)
    assert (facts["task"], facts["inputs"], facts["n_features"]) == ("classification", "as-is", 4)
    assert facts["classes"][0] == {"name": "auk", "n_train": 10, "n_test": 1}
    assert facts["classes"][3] == {"name": "yak", "n_train": 0, "n_test": 1}
    assert len(facts["warnings"]) == 1


def test_init_refuses_a_doubt_and_takes_the_users_word(tmp_path, capsys):
    folder = save_dataset(tmp_path / "stars", (TABLE, CLASSES * 1.0), (TABLE[:9], CLASSES[:9] * 1.0))
    code, said = says(capsys, "init", tmp_path / "run", "--dataset", folder, "--models", 5)
    assert code == 2
    assert "--task classification or --task regression" in " ".join(said.err.split())
    assert not (tmp_path / "run").exists()
    for task, shown in (("classification", "3 classes"), ("regression", "labels from 0 to 2")):
        code, said = says(capsys, "init", tmp_path / task, "--dataset", folder, "--models", 5, "--task", task)
        assert code == 0
        assert shown in said.out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.assign(place="north"), r"column 'place' \(\w+\) of the table holds no numbers; .*get_dummies"),
        (lambda t: t.assign(a=pd.Categorical(CLASSES), b="x"), r"columns 'a' \(category\), 'b' \(\w+\) of the table"),
        (
            lambda t: t.where(t.age < 7, np.nan),
            r"column 'age' \(\d+\)|columns 'height' \(\d+\), .* fill missing values",
        ),
        (
            lambda t: t.assign(age=pd.array([None, *[1] * 29], dtype="Int64")),
            r"in 1 of 30 examples, column 'age' \(1\)",
        ),
        (lambda t: t[["salary", "height", "error", "age"]], "they are in another order; give both the same"),
        (lambda t: t.drop(columns="age"), "differ, 'age' of test alone"),
        (lambda t: scipy.sparse.csr_matrix(t), r"sparse matrix of shape \(30, 4\) \(csr_matrix\); give \.toarray\(\)"),
        (lambda t: torch.from_numpy(t.to_numpy()).to_sparse(), r"layout torch\.sparse_coo; give \.to_dense\(\)"),
        (lambda t: np.ma.masked_greater(t.to_numpy(), 7), r"have a missing value \(masked\)"),
        (lambda t: t.astype(object).where(t.age < 7, None), "column"),
        (lambda t: t.age, r"of shape \(30,\) .* give inputs\.reshape\(-1, 1\)"),
        (lambda t: t.to_numpy() + 1j, "neither floats nor integers"),
        (lambda _: [[1, 2], [3]], "give examples of one shape"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, about the first sparse tensor of a process
def test_inputs_that_cannot_be_used_name_the_column_and_the_remedy(tmp_path, change, words):
    with pytest.raises(SpecError, match=words):
        save_dataset(tmp_path / "table", (change(TABLE), CLASSES), (TABLE[:9], CLASSES[:9]))
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.bool, torch.int32])
def test_tensors_of_any_kind_of_number_are_stored_exactly(tmp_path, dtype):
    tensor = torch.from_numpy(RNG.normal(size=(30, 4)) * 10).to(dtype)
    dataset = load_dataset(str(save_dataset(tmp_path / "table", (tensor, CLASSES), (tensor[:9], CLASSES[:9]))))
    assert (dataset.train_inputs == tensor.float().numpy()).all()


PICTURES = RNG.integers(0, 256, (9, 20, 20, 3), np.uint8)


class Items(torch.utils.data.Dataset):
    """Items made when they are asked for, as those of public datasets."""

    def __init__(self, make, n=9):
        self.make, self.n = make, n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return self.make(index)


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda i: {"image": Image.fromarray(PICTURES[i]), "label": i % 3}, None),
        (lambda i: {"pixel_values": torch.from_numpy(PICTURES[i]).permute(2, 0, 1), "labels": i % 3, "id": i}, None),
        (lambda i: {"picture": PICTURES[i], "target": i % 3}, None),
        (lambda i: {"img": PICTURES[i], "fine": i, "coarse": i % 3}, ("img", "coarse")),
    ],
)
def test_items_that_are_dicts_are_read_by_their_keys(tmp_path, make, keys):
    dataset = load_dataset(str(save_dataset(tmp_path / "birds", Items(make), [make(i) for i in range(4)], keys=keys)))
    assert (dataset.train_inputs == PICTURES).all()
    assert dataset.train_labels.tolist() == [i % 3 for i in range(9)]
    assert dataset.n_test == 4


def test_a_datasets_own_class_names_are_kept(tmp_path):
    items = Items(lambda i: (PICTURES[i], i % 3))
    items.classes = ["auk", "emu", "newt", "yak"]
    dataset = load_dataset(str(save_dataset(tmp_path / "birds", items, items)))
    assert (dataset.class_names, dataset.n_classes) == (("auk", "emu", "newt", "yak"), 4)


def raising(error):
    def make(index):
        if index == 7:
            raise error
        return PICTURES[index], index % 3

    return make


def truncated(index):
    file = io.BytesIO()
    Image.fromarray(PICTURES[index]).save(file, "JPEG")
    return Image.open(io.BytesIO(file.getvalue()[: 700 if index == 7 else None])), index % 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (raising(OSError("image file is truncated")), "item 7 of train: OSError: image file is truncated"),
        (raising(KeyError("label")), "item 7 of train: KeyError: 'label'"),
        (truncated, r"item 7 of train: \w+Error: .*; correct it, or leave this example out"),
        (lambda i: (PICTURES[i], None if i == 7 else "auk"), r"item 7 of train: the label is missing \(None\)"),
        (lambda i: {"img": PICTURES[i], "fine": i, "coarse": 0}, "keys 'img', 'fine', 'coarse'; say which .* as keys="),
        (
            lambda i: {"a": 1} if i == 7 else {"x": PICTURES[i], "y": i},
            "item 7 of train: a dict with the keys 'a' lacks",
        ),
        (lambda i: PICTURES[i], "item 0 of train: a ndarray is not an example; give"),
    ],
)
def test_an_item_that_cannot_be_had_is_named_with_its_own_error(tmp_path, make, words):
    with pytest.raises(SpecError, match=words) as caught:
        save_dataset(tmp_path / "birds", Items(make), (PICTURES, np.arange(9) % 3))
    assert "choose another path" not in str(caught.value)
    assert not (tmp_path / "birds").exists()


@pytest.mark.parametrize("part", [INPUTS, TABLE, torch.from_numpy(INPUTS), {"data": INPUTS, "target": CLASSES}])
def test_inputs_alone_are_not_taken_for_a_dataset(tmp_path, part):
    with pytest.raises(SpecError, match=r"train is a .*; give a pair"):
        save_dataset(tmp_path / "table", part, part)
