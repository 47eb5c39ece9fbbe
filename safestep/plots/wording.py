"""Numbers, counts and places as people write them."""

import math

from safestep.runlog.series import HUGE


def number(value: float) -> str:
    """Return the value to three figures.

    Args:
        value: Any float.

    Returns:
        The text.

    Example:
        >>> number(803.2), number(0.00124), number(1234567.0), number(3e-9), number(float("inf"))
        ('803', '0.00124', '1,230,000', '3e-09', 'infinite')
        >>> number(1e100)  # the largest that a report reckons with
        '1e+100 or more'
    """
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if abs(value) >= HUGE:
        return f"{value:.0e} or {'more' if value > 0 else 'less'}"
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3g}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:,.6f}".rstrip("0").rstrip(".")


def percent(share: float) -> str:
    """Return a share as a percentage, "unknown" where there is none.

    Args:
        share: Any float; 1 is all.

    Returns:
        The text.

    Example:
        >>> percent(0.5), percent(0.0123), percent(1e-5), percent(0.99999), percent(float("nan"))
        ('50 %', '1.2 %', 'under 0.1 %', 'over 99.9 %', 'unknown')
    """
    if not math.isfinite(share):
        return "unknown"
    if 0 < share < 0.001:
        return "under 0.1 %"
    if 0.999 < share < 1:
        return "over 99.9 %"
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def count(how_many: int, noun: str) -> str:
    """Return how many of a thing there are.

    Args:
        how_many: The number.
        noun: The thing, in the singular.

    Returns:
        The text.

    Example:
        >>> count(1, "step"), count(1200, "step"), count(2, "stretch")
        ('1 step', '1,200 steps', '2 stretches')
    """
    return f"{how_many:,} {noun if how_many == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Return a regular noun's plural.

    Args:
        noun: The noun.

    Returns:
        Its plural.

    Example:
        >>> plural("worker"), plural("micro-batch")
        ('workers', 'micro-batches')
    """
    return f"{noun}es" if noun.endswith("ch") else f"{noun}s"


def listed(things: list[str]) -> str:
    """Return things as a list in a sentence.

    Args:
        things: At least one.

    Returns:
        The text.

    Example:
        >>> listed(["a"]), listed(["a", "b", "c"])
        ('a', 'a, b and c')
    """
    *before, last = things
    return f"{', '.join(before)} and {last}" if before else last


def steps_between(first: int, last: int) -> str:
    """Return a range of steps.

    Args:
        first: First step.
        last: Last step, inclusive.

    Returns:
        The text.

    Example:
        >>> steps_between(3, 3), steps_between(0, 412)
        ('step 3', 'steps 0-412')
    """
    return f"step {first}" if first == last else f"steps {first}-{last}"


def sentence(text: str) -> str:
    """Return the text with a capital first letter and a full stop.

    Args:
        text: What to say.

    Returns:
        The sentence.
    """
    return f"{text[:1].upper()}{text[1:]}."
