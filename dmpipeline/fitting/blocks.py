"""Blocks of targets, solved one after another or by the workers of a cluster; what is kept of them is not solved again.

A task that a cluster loses is done again, with the same result except for rounding: processes may have compiled a
kernel separately.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmdata.copying.cluster import run_on_cluster
from dmpipeline.fitting.checkpoints import Arrays, Checkpoints
from dmpipeline.moments.tensors import map_tensors, save_tensors

Solve = Callable[[Arrays, Arrays, Callable[[int], None]], Arrays]
"""From the arrays that all blocks share and those of one block to its results; reports how many targets are done."""


@dataclass(frozen=True, slots=True)
class TargetBlock:
    """Some targets to solve, and what makes the arrays that describe them."""

    n_targets: int
    make: Callable[[], Arrays]


def solved_blocks(
    place: Checkpoints,
    solve: Solve,
    shared: tuple[str, Callable[[], Arrays]],
    blocks: Mapping[str, TargetBlock],
    progress: Callable[[int], None],
) -> dict[str, Arrays]:
    """Solve the blocks of targets whose results are not kept; return the results of all.

    Parameters
    ----------
    place : Checkpoints
    solve : callable
        With a scheduler, one that its workers can import.
    shared : name and callable
        What makes the arrays that all blocks share, and keeps them by this name; not called if nothing is left to
        solve.
    blocks : mapping of name to TargetBlock
    progress : callable
        Called with the number of targets done, in all blocks together.
    """
    left = {name: block for name, block in blocks.items() if not place.has(name)}
    done = sum(block.n_targets for name, block in blocks.items() if name not in left)
    if done:
        progress(done)
    results: dict[str, Arrays] = {}
    if left:
        arrays = shared[1]()
        if place.scheduler is not None:
            for n_targets in run_on_cluster(place.scheduler, _solve_there, _tasks(place, solve, shared[0], left)):
                done += n_targets
                progress(done)
        else:
            for name, block in left.items():
                results[name] = place.kept(
                    name,
                    lambda: solve(arrays, block.make(), lambda of_block: progress(done + of_block)),  # noqa: B023
                )
                done += block.n_targets
    for name in blocks.keys() - results.keys():
        results[name] = map_tensors(place.path(name))
    return {name: results[name] for name in blocks}


def _tasks(
    place: Checkpoints, solve: Solve, shared: str, blocks: Mapping[str, TargetBlock]
) -> Iterator[tuple[Any, ...]]:
    for name, block in blocks.items():
        problem = place.path(f"{name}-problem")
        save_tensors(block.make(), problem)
        yield solve, place.path(shared), problem, place.path(name), block.n_targets


def _solve_there(solve: Solve, shared: Path, problem: Path, result: Path, n_targets: int) -> int:
    if not result.exists():
        save_tensors(solve(map_tensors(shared), map_tensors(problem), lambda _: None), result)
    problem.unlink(missing_ok=True)
    return n_targets
