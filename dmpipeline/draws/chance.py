"""What chance explains: how many subsets there are, and whether a count is beyond what is expected."""

import math


def log_choose(n: int, k: float) -> float:
    """Compute the natural logarithm of how many subsets of size k a set of n has; k may be an average size."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def is_beyond_chance(n_found: int, expected: float, *, rarely: float) -> bool:
    """Decide whether chance gives that many or more with a probability below `rarely`.

    Parameters
    ----------
    n_found : int
    expected : float
        Mean of a Poisson count, whose upper tail is bounded by Chernoff's bound.
    rarely : float
    """
    if n_found <= expected:
        return False
    if expected <= 0:
        return True
    return n_found - expected - n_found * math.log(n_found / expected) < math.log(rarely)
