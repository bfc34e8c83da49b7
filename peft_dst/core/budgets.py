"""How many components of each silo may differ from the seed. All rounding of the project lives here."""

from __future__ import annotations

from collections.abc import Sequence


def allocate_budgets(
    sizes: Sequence[int], *, epsilon: float | None = None, num_free_parameters: int | None = None
) -> list[int]:
    """Share the total budget among silos in proportion to their sizes, by largest remainder.

    The total is `round(epsilon * n)` (Eq. 1 summed over the silos) or `num_free_parameters`. Every silo first gets the
    whole part of its share; what is left goes, one each, to the largest fractional parts (the earlier silo wins a tie).
    So a tiny silo may get nothing, and no silo ever gets more than its share rounded up.

    Args:
        sizes: number of components of each silo.
        epsilon: fraction of free parameters, 0 < epsilon <= 1.
        num_free_parameters: the total itself; exactly one of the two must be given.

    Returns:
        One budget a silo, in the order of `sizes`; they add up to the total.

    Raises:
        ValueError: if the total is zero or larger than the number of components.
    """
    if (epsilon is None) == (num_free_parameters is None):
        raise ValueError("give exactly one of epsilon and num_free_parameters")
    n = sum(sizes)
    if epsilon is not None:
        total = round(epsilon * n)
        quotas = [divmod(epsilon * size, 1) for size in sizes]
        asked = f"epsilon={epsilon:g}"
    else:
        assert num_free_parameters is not None
        total = num_free_parameters
        # Integer remainders (over the common denominator n) instead of floats: exact at any model size.
        quotas = [divmod(total * size, n) if n else (0, 0) for size in sizes]
        asked = f"num_free_parameters={num_free_parameters}"
    if total < 1:
        raise ValueError(
            f"{asked} leaves no free parameter among the {n:,} tuned ones: every budget would be zero. "
            f"Use epsilon >= {1 / max(n, 1):.1e}, or set num_free_parameters."
        )
    if total > n:
        raise ValueError(f"{asked} asks for {total:,} free parameters, but only {n:,} are tuned. Lower it.")
    budgets = [int(whole) for whole, _ in quotas]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-quotas[i][1], i))
    for i in by_remainder[: total - sum(budgets)]:
        budgets[i] += 1
    return budgets
