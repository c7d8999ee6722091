"""Products of examples' gradients without the gradients, of networks that learn nothing but linear layers.

An example's gradient in such a layer's weights is the outer product of what went in, a, and of the slope at what came
out, d. So the product of two examples' gradients is the sum over layers of (a_i'a_j + 1) (d_i'd_j), the 1 for the bias:
exact, and for a few hundred units a thousand times cheaper than by all weights.
"""

from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor, nn

from dmpipeline.fitting.guides.gradients import Examples, add_by_products, log_odds_gradients, log_odds_of
from dmpipeline.training.layers import State

Factors = list[tuple[Tensor, Tensor]]
"""For each layer, what goes in, (n_examples, n_in), and the slope at what comes out, (n_examples, n_out)."""

_EXAMPLES_AT_ONCE = 1024
_TRIED = 4
_TOLERANCE = 1e-3


class LinearLayers:
    """Scores by products of gradients, (n_train, n_examples).

    Parameters
    ----------
    examples : Examples
    network : torch.nn.Module
        In evaluation mode.
    layers : list of torch.nn.Linear
        That hold all it learned, in the order in which they are used.
    """

    def __init__(self, examples: Examples, network: nn.Module, layers: list[nn.Linear]) -> None:
        self.examples, self.network, self.layers = examples, network, layers
        self.products = torch.empty(examples.n_train, examples.n_all)

    @classmethod
    def of(cls, examples: Examples, network: nn.Module, state: State) -> Self | None:
        """Return it if the network learns by linear layers alone, each used once for an example by itself; else None.

        Whether an example's layers depend on other examples cannot be seen from outside: the products of the first few
        are compared with those of their gradients.
        """
        layers = [module for module in network.modules() if type(module) is nn.Linear]
        own = [parameter for layer in layers for parameter in layer.parameters()]
        learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if not layers or len(own) != len(learned) or {*map(id, own)} != {*map(id, learned)}:
            return None
        with examples.user_code():
            _, inputs, labels = next(iter(examples.blocks(_EXAMPLES_AT_ONCE)))
            used, factors = _factors(network, layers, state, inputs, labels)
            is_one_each = sorted(map(id, used)) == sorted(map(id, layers))
            if not is_one_each or any(len(a) != len(labels) or a.ndim != 2 for a, _ in factors):
                return None
            _, gradients = log_odds_gradients(network, state, inputs[:_TRIED], labels[:_TRIED])
        found = cls(examples, network, used)
        each = torch.cat([gradient.flatten(1) for gradient in gradients.values()], 1)
        right = each @ each.T
        some = [(a[:_TRIED], d[:_TRIED]) for a, d in factors]
        is_right = torch.allclose(
            found._products(some, some), right, rtol=0, atol=_TOLERANCE * float(right.abs().max())
        )
        return found if is_right else None

    def add(
        self,
        leverages: Tensor,
        state: State,
        model_index: int,  # noqa: ARG002 - nothing is drawn
        curvatures: Tensor,
        damping: float,
    ) -> None:
        """Add a model's; see `Scorer`."""
        examples, n_train = self.examples, self.examples.n_train
        with examples.user_code():
            parts = [
                _factors(self.network, self.layers, state, inputs, labels)[1]
                for _, inputs, labels in examples.blocks(_EXAMPLES_AT_ONCE)
            ]
        whole = [
            (torch.cat([a for a, _ in of_layer]), torch.cat([d for _, d in of_layer]))
            for of_layer in zip(*parts, strict=True)
        ]
        for start in range(0, n_train, _EXAMPLES_AT_ONCE):
            some = slice(start, min(start + _EXAMPLES_AT_ONCE, n_train))
            self.products[some] = self._products([(a[some], d[some]) for a, d in whole], whole)
        with_targets = self.products[:, examples.of_targets]
        add_by_products(leverages, self.products[:, :n_train], lambda some: with_targets[:, some], curvatures, damping)

    def _products(self, left: Factors, right: Factors) -> Tensor:
        """Multiply the gradients of some examples with those of others, (n_left, n_right)."""
        products = torch.zeros(len(left[0][0]), len(right[0][0]))
        for layer, (a, d), (others_a, others_d) in zip(self.layers, left, right, strict=True):
            of_inputs = a @ others_a.T
            if layer.bias is not None:
                of_inputs += 1
            products += of_inputs.mul_(d @ others_d.T)
        return products


def _factors(
    network: nn.Module, layers: list[nn.Linear], state: State, inputs: Tensor, labels: Tensor
) -> tuple[list[nn.Linear], Factors]:
    """Return the layers in the order in which they are used, and each one's factors."""
    used: list[nn.Linear] = []
    given, probes = [], []

    def see(layer: nn.Linear, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        used.append(layer)
        given.append(inputs[0].detach())
        probes.append(torch.zeros_like(out, requires_grad=True))
        return out + probes[-1]

    with ExitStack() as stack, torch.enable_grad():
        for layer in layers:
            stack.callback(layer.register_forward_hook(see).remove)
        # what was learned in inference mode cannot be differentiated through
        own = {name: tensor.clone() for name, tensor in state.items()}
        log_odds = log_odds_of(torch.func.functional_call(network, own, (inputs.clone(),)), labels)
        slopes = torch.autograd.grad(log_odds.sum(), probes, allow_unused=True, materialize_grads=True)
    return used, list(zip(given, slopes, strict=True))
