"""Losses around an event whose effect is known: the truth that the verdict is tested against."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class History:
    """A loss with an event, and the same without noise.

    Attributes:
        name: What happens.
        loss: One value a step; NaN where nothing was logged, infinite where it was not finite.
        signal: The loss without noise.
        first, last: The event's steps.
    """

    name: str
    loss: np.ndarray
    signal: np.ndarray
    first: int
    last: int

    @property
    def rise(self) -> float:
        """Largest true rise over the level at the event: mean of any ten steps after it."""
        after = self.signal[self.first + 1 :][:200]
        means = np.convolve(after, np.ones(10) / 10, mode="valid")
        return float(means.max() - self.signal[self.first])

    @property
    def final_rise(self) -> float:
        """True rise at the end."""
        return float(self.signal[-50:].mean() - self.signal[self.first])

    @property
    def material(self) -> float:
        """The least rise that counts: 5 % of the level and 0.02."""
        return max(0.05 * abs(float(self.signal[self.first])), 0.02)


EFFECTS = (
    "nothing", "nothing, falling", "nothing, rising", "nothing, slow noise", "nothing, wild noise",
    "shift", "shift, falling", "slow recovery", "slow rise", "lost for some steps", "lost and up",
    "sparse shift", "sparse nothing", "held shift", "held nothing",
)  # fmt: skip


def make_history(effect: str, seed: int, *, length: int = 400, first: int = 150) -> History:
    """Return a history with an effect, its level, noise and size drawn from the seed."""
    rng = np.random.default_rng([seed, EFFECTS.index(effect)])
    time = np.arange(length, dtype=float)
    level = np.exp(rng.uniform(np.log(0.2), np.log(6)))
    noise = level * np.exp(rng.uniform(np.log(0.002), np.log(0.15)))
    size = level * np.exp(rng.uniform(np.log(0.1), np.log(3)))
    signal = np.full(length, level)
    since = np.maximum(time - first - 1, -1)
    is_after = since >= 0
    if "falling" in effect:
        signal = level * (1 + rng.uniform(0.5, 2) * np.exp(-time / rng.uniform(40, 200)))
    if effect == "nothing, rising":
        signal = level * (1 + rng.uniform(0.1, 0.5) * time / length)
    if "shift" in effect or effect == "lost and up":
        signal = signal + size * is_after
    if effect == "slow recovery":
        signal = signal + size * is_after * np.exp(-since / rng.uniform(10, 60))
    if effect == "slow rise":
        signal = signal + size * is_after * (1 - np.exp(-(since + 1) / rng.uniform(5, 30)))
    loss = signal + noise * _noise(rng, effect, length)
    if "lost" in effect:
        loss[first + 1 : first + 1 + rng.integers(6, 40)] = np.inf
        signal = np.where(np.isinf(loss), np.inf, signal)
    if "sparse" in effect:
        loss = np.where(time % 5 == 0, loss, np.nan)
    last = first + 100 if "held" in effect else first + int(rng.integers(0, 4))
    return History(effect, loss, signal, first, last)


def _noise(rng: np.random.Generator, effect: str, length: int) -> np.ndarray:
    if effect == "nothing, wild noise":
        return rng.standard_t(3, length)
    white = rng.normal(size=length)
    if effect != "nothing, slow noise":
        return white
    slow = np.zeros(length)
    for step in range(1, length):
        slow[step] = 0.6 * slow[step - 1] + 0.8 * white[step]
    return slow
