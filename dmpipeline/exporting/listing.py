"""The catalog of a place that exports go to: what it lists before, and after an export has replaced its own part."""

from collections.abc import Mapping

from dmdata.catalog.entries import Catalog, DatasetEntry, StoredArray
from dmdata.errors import CatalogError
from dmpipeline.data.examples import Dataset
from dmpipeline.errors import RunError
from dmpipeline.exporting.places import Place
from dmpipeline.runs.store import Run

CATALOG = "catalog.yaml"
_BY_US = "trained by dmpipeline"
_FINGERPRINT = "fingerprint "


def catalog_of_export(run: Run, data: Dataset, stored: Mapping[str, StoredArray], *, requester_pays: bool) -> Catalog:
    """Catalog this run alone; notes state its recipe, and identify its dataset."""
    catalog, spec = run.catalog(stored, data), run.spec
    ((dataset, entry),) = catalog.datasets.items()
    recipe = f"{spec.recipe.name}@{spec.recipe.version}, seed {spec.seed}"
    alphas = {
        name: alpha.model_copy(update={"note": "; ".join(filter(None, [recipe, alpha.note]))})
        for name, alpha in entry.alphas.items()
    }
    entry = entry.model_copy(update={"alphas": alphas, "note": _FINGERPRINT + data.fingerprint})
    source = catalog.source.model_copy(update={"requester_pays": requester_pays})
    return catalog.model_copy(update={"source": source, "datasets": {dataset: entry}})


def listed_at(place: Place, ours: Catalog) -> Catalog | None:
    """Read the catalog that is there, if there is one, and make sure that what we export may be added to it."""
    text = place.read(CATALOG)
    if text is None:
        return None
    origin = f"{place.url}/{CATALOG}"
    try:
        catalog = Catalog.parse(text.decode(errors="replace"), origin=origin)
    except CatalogError as error:
        raise RunError(f"{error}; fix or remove it, or choose another destination", path=origin) from error
    if catalog.source.url.rstrip("/") != place.url:
        raise RunError(
            f"{origin} lists files in {catalog.source.url}, not next to it; choose another destination", path=origin
        )
    ((dataset, entry),) = ours.datasets.items()
    (alpha_name,) = entry.alphas
    if differing := _difference(catalog.datasets.get(dataset), entry):
        fact, there, wanted = differing
        raise RunError(
            f"{origin} lists another dataset named {dataset}: its {fact} is {there!r}, not {wanted!r}; "
            "choose another destination",
            path=origin,
        )
    wanted_pays = ours.source.requester_pays
    if _others(catalog, dataset, alpha_name).datasets and catalog.source.requester_pays != wanted_pays:
        there, remedy = (
            ("the bucket's owner pays", "leave out --requester-pays (requester_pays=False)")
            if wanted_pays
            else ("readers pay", "add --requester-pays (requester_pays=True)")
        )
        raise RunError(f"{origin} says that {there}; {remedy}, or choose another destination", path=origin)
    return catalog


def _difference(there: DatasetEntry | None, ours: DatasetEntry) -> tuple[str, object, object] | None:
    """Find the first fact by which two datasets of one name are not the same."""
    if there is None:
        return None
    for fact in ("n_train", "n_test", "n_classes", "example_order", "note"):
        old, new = getattr(there, fact), getattr(ours, fact)
        is_known = old is not None and (fact != "note" or old.startswith(_FINGERPRINT))
        if is_known and old != new:
            return fact, old, new
    return None


def _others(catalog: Catalog, dataset: str, alpha_name: str) -> Catalog:
    """Leave one dataset's alpha out of a catalog."""
    datasets = dict(catalog.datasets)
    if dataset in datasets:
        entry = datasets.pop(dataset)
        if alphas := {name: alpha for name, alpha in entry.alphas.items() if name != alpha_name}:
            datasets[dataset] = entry.model_copy(update={"alphas": alphas})
    return catalog.model_copy(update={"datasets": datasets})


def list_others(place: Place, listed: Catalog | None, dataset: str, alpha_name: str) -> None:
    """Have the catalog that is there list nothing that is about to be replaced."""
    if listed is None or alpha_name not in getattr(listed.datasets.get(dataset), "alphas", ()):
        return
    others = _others(listed, dataset, alpha_name)
    if others.datasets:
        source = others.source.model_copy(update={"url": "."})
        place.put(CATALOG, others.model_copy(update={"source": source}).dump().encode())
    else:
        place.remove(CATALOG)


def merged(listed: Catalog | None, ours: Catalog, dataset: str, alpha_name: str) -> Catalog:
    """Add this run to what else is listed; a title that people wrote stays, one of ours stays true."""
    if listed is None:
        return ours
    others = _others(listed, dataset, alpha_name)
    entry = ours.datasets[dataset]
    if there := others.datasets.get(dataset):
        alphas = {**there.alphas, **entry.alphas}
        alphas = dict(sorted(alphas.items(), key=lambda item: (item[1].alpha is None, item[1].alpha or 0.0)))
        entry = there.model_copy(update={"alphas": alphas})
    datasets = {**others.datasets, dataset: entry}
    title = listed.title
    if title.endswith(_BY_US) and title != ours.title:
        title = f"{', '.join(datasets)}, {_BY_US}" if others.datasets else ours.title
    source = listed.source.model_copy(update={"url": ".", "requester_pays": ours.source.requester_pays})
    return listed.model_copy(update={"title": title, "source": source, "datasets": datasets})
