"""Ways of training and counting on a GPU that the package does not have, to be measured next to those it has."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmpipeline.models.augmentation import augmented
from dmpipeline.models.networks import named_tensors
from dmpipeline.training.ensembles import Group, begin_group, mean_losses
from dmpipeline.training.material import Material
from dmpipeline.training.train import GradientTrainer

State = dict[str, Tensor]
Step = tuple[Tensor, Tensor | None, float]

_WARM_UP_STEPS = 3
_INT8_ROWS = 8192  # of masks, at a time


class WholeStep:
    """One model whose whole step, from numbers of pictures to new weights, is kernels alone, as a CUDA graph needs it.

    Steps are those of `ensembles`, but for rounding. In half precision it computes in bfloat16, which needs no scaling
    of the loss, and so nothing that the host must look at. On a CPU it takes the same steps without a graph.
    """

    def __init__(self, material: Material, states: State, batch: int, *, is_half: bool) -> None:
        device = material.device
        self.material, self.recipe, self.is_half = material, material.recipe, is_half
        if self.recipe.nesterov:
            raise ValueError("Nesterov momentum is not among what this way knows")
        self.network = copy.deepcopy(material.network).to(device)
        with torch.no_grad():
            for name, tensor in named_tensors(self.network):
                tensor.copy_(states[name][0])
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.momenta = [torch.zeros_like(p) for p in self.parameters]
        self.examples, self.words = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        self.lr = torch.zeros((), device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graph: torch.cuda.CUDAGraph | None = None

    def capture(self) -> None:
        """Record the step as a graph; the model is left as it was."""
        if self.stream is None:
            return
        learned = [*(tensor for _, tensor in named_tensors(self.network)), *self.momenta]
        before = [tensor.detach().clone() for tensor in learned]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(_WARM_UP_STEPS):
                self._take()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self._take()
        with torch.no_grad():
            for tensor, value in zip(learned, before, strict=True):
                tensor.copy_(value)
        torch.cuda.synchronize()

    def step(self, examples: Tensor, words: Tensor | None, lr: float) -> None:
        """Take one step, on examples of shape (1, batch); on a GPU it is only begun, on the model's own stream."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            self.examples.copy_(examples[0])
            if words is not None:
                self.words.copy_(words[0])
            self.lr.fill_(lr)
            if self.graph is not None:
                self.graph.replay()
            else:
                self._take()

    def group(self) -> Group:
        """Put what was learned into a group of the package's, for its outputs."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        states = {name: tensor.detach()[None].clone() for name, tensor in named_tensors(self.network)}
        return begin_group(self.material, "loop", states, len(self.examples))

    def _take(self) -> None:
        recipe, device = self.recipe, self.material.device
        inputs = self.material.network_inputs(self.material.train_inputs[self.examples])
        if self.material.is_altered:
            inputs = augmented(inputs, self.words, recipe)
        if inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        is_half = self.is_half and device.type == "cuda"
        with torch.autocast(device.type, torch.bfloat16, enabled=is_half, cache_enabled=False):
            outputs = self.network(inputs)
        loss = mean_losses(outputs[None], self.material.labels[self.examples][None], recipe.label_smoothing).sum()
        gradients = list(torch.autograd.grad(loss, self.parameters))
        with torch.no_grad():
            if recipe.weight_decay:
                torch._foreach_add_(gradients, self.parameters, alpha=recipe.weight_decay)
            torch._foreach_mul_(self.momenta, recipe.momentum)
            torch._foreach_add_(self.momenta, gradients)
            torch._foreach_sub_(self.parameters, torch._foreach_mul(self.momenta, self.lr))


def whole_steps(trainer: GradientTrainer, masks: np.ndarray[Any, Any], n_models: int) -> list[WholeStep]:
    """Set up some models to be trained by whole steps, their graphs recorded, beginning as the package's would."""
    made = []
    for model in range(n_models):
        mask, index = masks[model : model + 1], np.array([model], np.uint64)
        (state,) = [trainer.begin(mask, index).states()[0]]
        batch = min(trainer.recipe.batch_size, int(mask.sum()))
        states = {name: tensor[None] for name, tensor in state.items()}
        made.append(WholeStep(trainer.material, states, batch, is_half=trainer.recipe.precision == "half"))
        made[-1].capture()
    return made


def over_again(make: Callable[[], Iterator[Step]]) -> Iterator[Step]:
    """Repeat the steps of a training for ever."""
    while True:
        yield from make()


def int8_counts(masks: Tensor) -> Tensor:
    """Count in how many rows both of two columns are set, by products of int8.

    Parameters
    ----------
    masks : bool or int8 tensor, shape (n_rows, n_columns)
        On the device that counts; more than 16 columns, a multiple of 8 as torch asks for on a GPU.

    Returns
    -------
    counts : int32 tensor, shape (n_columns, n_columns)
    """
    counts = torch.zeros(masks.shape[1], masks.shape[1], dtype=torch.int32, device=masks.device)
    for some in torch.split(masks, _INT8_ROWS):
        short = -len(some) % 8
        across = torch.nn.functional.pad(some.to(torch.int8), (0, 0, 0, short)).T.contiguous()
        counts += torch._int_mm(across, across.T)
    return counts
