"""dattri's and quanda's measures of attributions as oracles, in a process and an environment of their own.

Each line of standard input is JSON: `measure` and its arrays. The answer is a line of JSON, a number or a list of them.
"""

import json
import sys
from importlib.metadata import version

import torch

if "+cpu" in torch.__version__ and "+cpu" not in version("torchvision"):
    # quanda imports torchvision, whose binary for a GPU does not load next to a torch without; no measure uses it, but
    # torchvision asks for these operators as it is imported
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from dattri.metric import lds, mislabel_detection_auc
from quanda.metrics.downstream_eval import ClassDetectionMetric, MislabelingDetectionMetric, SubclassDetectionMetric
from quanda.metrics.heuristics import TopKCardinalityMetric

MODEL = torch.nn.Linear(1, 1)  # quanda asks a model for its device


def pairs(labels: list[int]) -> list[tuple[torch.Tensor, int]]:
    return [(torch.zeros(1), label) for label in labels]


def answer(asked: dict) -> float | list[float]:
    measure, scores = asked["measure"], torch.tensor(asked["scores"], dtype=torch.float64)
    if measure == "dattri.lds":
        subsets = torch.tensor([[i for i, is_in in enumerate(mask) if is_in] for mask in asked["masks"]])
        return lds(scores, (torch.tensor(asked["outputs"], dtype=torch.float64), subsets))[0].tolist()
    if measure == "dattri.mislabel_detection_auc":
        truth = torch.zeros(len(scores))
        truth[asked["mislabelled"]] = 1
        return float(mislabel_detection_auc(scores, truth)[0])
    if measure == "quanda.mislabelling":
        metric = MislabelingDetectionMetric(
            MODEL, pairs([0] * len(scores)), asked["mislabelled"], precomputed_self_influence=scores
        )
        return metric.compute()["score"]
    if measure == "quanda.cardinality":
        metric = TopKCardinalityMetric(MODEL, pairs([0] * len(scores)), top_k=asked["k"])
        metric.update(scores.T)
        return metric.compute()["score"]
    labels, of_targets = asked["labels"], torch.tensor(asked["target_labels"])
    if measure == "quanda.class_detection":
        metric = ClassDetectionMetric(MODEL, pairs(labels), s=asked["k"])
    else:
        metric = SubclassDetectionMetric(MODEL, pairs([0] * len(labels)), torch.tensor(labels), s=asked["k"])
    metric.update(scores.T, of_targets)
    return metric.compute()["score"]


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
