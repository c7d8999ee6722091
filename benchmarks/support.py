"""Data support by retraining: how far estimated sets must be enlarged, and other orders of removal judged alike.

    python benchmarks/support.py RUN [--targets 100] [--retrainings 10]

RUN is a run of digits with datamodels; targets are drawn at random. For each the estimated set is enlarged by several
shares and retrained. The least share at which nine tenths of the sets flip is chosen on one half of the targets, and
told for the other. Then examples are removed in the order of the datamodels, of gradient scores, of nearness in pixels
within the target's class, and at random: the share of targets that flip, all by retraining.
"""

import argparse

import numpy as np

from dmpipeline import Run, data_support, gradient_scores
from dmpipeline.applications.counterfactuals import removal_order
from dmpipeline.applications.evidence import find_evidence
from dmpipeline.applications.retraining import TrainingSet, retrain

INFLATIONS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
SIZES = (5, 10, 20, 40, 80, 160, 320)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--targets", type=int, default=100)
    parser.add_argument("--retrainings", type=int, default=10)
    asked = parser.parse_args()
    run = Run.open(asked.run)
    evidence = find_evidence(run)
    targets = np.random.default_rng(5).permutation(evidence.n_targets)[: asked.targets].tolist()
    inflations(evidence, targets, asked.retrainings)
    mislabelling(evidence, targets[:40], asked.retrainings)
    curves(run, evidence, targets, asked.retrainings)


def inflations(evidence, targets, n_retrainings) -> None:
    """Print how many estimated sets flip when they are enlarged, and what is chosen on one half of the targets."""
    flips = {}
    for inflation in INFLATIONS:
        found = data_support(evidence, targets, n_retrainings, inflation=inflation)
        flips[inflation] = {row.target: row.flips for row in found if row.size}
        sizes = [row.size for row in found if row.size is not None]
        shares = found.shares()
        print(
            f"enlarged by {inflation:4.0%}: {len(sizes)} of {len(found)} targets have a set, median size "
            f"{np.median(sizes):.0f}, half of all targets within {found.half_within}; flipped {shares['flipped']:.0%}, "
            f"certified {shares['certified']:.0%}",
            flush=True,
        )
    halves = [set(targets[::2]), set(targets[1::2])]
    for chosen_on, told_for in (halves, halves[::-1]):
        least = next((i for i in INFLATIONS if share_of(flips[i], chosen_on) >= 0.9), None)
        if least is None:
            print("no share is enough for nine tenths of one half of the targets")
            continue
        print(
            f"chosen on one half: {least:.0%} ({share_of(flips[least], chosen_on):.0%} flip there); on the other half "
            f"{share_of(flips[least], told_for):.0%} flip"
        )


def share_of(flips, targets) -> float:
    found = [flip for target, flip in flips.items() if target in targets]
    return float(np.mean(found)) if found else 0.0


def mislabelling(evidence, targets, n_retrainings) -> None:
    """Print the same of mislabelled sets."""
    for inflation in (0.0, 0.2, 0.5):
        found = data_support(evidence, targets, n_retrainings, mislabel=True, inflation=inflation)
        sizes = [row.size for row in found if row.size is not None]
        print(
            f"mislabelled, enlarged by {inflation:.0%}: {len(sizes)} of {len(found)} have a set, median "
            f"{np.median(sizes):.0f}, half within {found.half_within}, factor {found.relabel_factor:.2f}; flipped "
            f"{found.shares()['flipped']:.0%}, certified {found.shares()['certified']:.0%}",
            flush=True,
        )


def curves(run, evidence, targets, n_retrainings) -> None:
    """Print the share of targets that flip within k by each order, by retraining."""
    dataset = run.dataset()
    pixels = dataset.train_inputs.reshape(dataset.n_train, -1)
    scores = gradient_scores(run)
    datamodels = evidence.datamodels()
    margins = retrain(run, [TrainingSet.of(dataset.n_train)], n_retrainings)[0].test.mean(axis=0)

    def near(target: int) -> np.ndarray:
        away = np.linalg.norm(pixels - dataset.test_inputs[target].reshape(-1), axis=1)
        away[dataset.train_labels != dataset.test_labels[target]] += 1e6
        return np.argsort(away)

    orders = {
        "datamodels": lambda target: removal_order(datamodels.weight[:, target]),
        "gradient scores": lambda target: removal_order(scores[:, target]),
        "nearest in pixels": near,
        "random": lambda target: np.random.default_rng(target).permutation(dataset.n_train),
    }
    print(f"\n{'flipped within':20}" + "".join(f"{k:7}" for k in SIZES))
    for name, order in orders.items():
        sets, of = [], []
        for target in targets:
            own = order(target)
            for k in SIZES:
                sets.append(TrainingSet.of(dataset.n_train, without=own[:k].tolist()))
                of.append((target, k))
        after = retrain(run, sets, n_retrainings)
        flipped = {case: bool(each.test[:, case[0]].mean() < 0) for case, each in zip(of, after, strict=True)}
        wrong = {target: bool(margins[target] < 0) for target in targets}
        shares = []
        for k in SIZES:
            within = [wrong[t] or any(flipped[t, smaller] for smaller in SIZES if smaller <= k) for t in targets]
            shares.append(np.mean(within))
        print(f"{name:20}" + "".join(f"{share:7.0%}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
