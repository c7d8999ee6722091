"""mlcroissant, intake and frictionless as readers of exported catalogs, in a process and an environment of their own.

Each line of standard input is JSON: `read`, one of the three, `path`, and for intake the `entry` to open. The answer is
a line of JSON.
"""

import json
import sys

import intake
import mlcroissant
from frictionless import Package, validate


def croissant(path: str) -> dict:
    try:
        read = mlcroissant.Dataset(jsonld=path)
    except mlcroissant.ValidationError as error:
        return {"errors": [str(error)]}
    issues = read.metadata.ctx.issues
    files = {
        node.id: {"sha256": getattr(node, "sha256", None), "url": getattr(node, "content_url", None)}
        for node in read.metadata.distribution
    }
    return {"errors": sorted(issues.errors), "warnings": sorted(issues.warnings), "files": files}


def datapackage(path: str, *, validate_files: bool) -> dict:
    with open(path) as file:
        faults = [str(error) for error in Package.metadata_validate(json.load(file))]
    package = Package(path)
    if validate_files:
        faults += [str(fault) for fault in validate(path).flatten(["title", "message"])]
    return {"faults": faults, "resources": {each.name: each.path for each in package.resources}}


def opened(path: str, entry: str | None) -> dict:
    catalog = intake.open_catalog(path)
    if entry is None:
        return {"entries": sorted(catalog)}
    found = catalog[entry].read()
    if hasattr(found, "data_vars"):
        sums = {name: float(array.astype("float64").sum()) for name, array in found.data_vars.items()}
        return {"sums": sums, "sizes": dict(found.sizes)}
    return {"sum": float(found.astype("float64").sum()), "shape": list(found.shape)}


def answer(asked: dict) -> dict:
    if asked["read"] == "croissant":
        return croissant(asked["path"])
    if asked["read"] == "datapackage":
        return datapackage(asked["path"], validate_files=asked["validate_files"])
    return opened(asked["path"], asked.get("entry"))


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
