"""What is trained, on which data, with which optimizer and learning rate."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from safestep.demo.models import CharacterGPT, DigitTransformer, digit_cnn, digit_mlp

Batch = tuple[Tensor, Tensor]


class Task(Protocol):
    """What an experiment asks of a task.

    Attributes:
        name: Name of its folder.
        title: Name in the table and the figure.
        num_steps: Length of a run.
        spike_step: Step at which the learning rate is multiplied.
        evaluates_every_step: Whether test accuracy is followed, or looked at once at the end.
        clips_under_guard: Whether a guarded run also clips its gradient, as the recipe does.
    """

    name: str
    title: str
    num_steps: int
    spike_step: int
    evaluates_every_step: bool
    clips_under_guard: bool

    def model(self, seed: int) -> nn.Module:
        """Return a new model."""
        ...

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of a model."""
        ...

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, without a spike."""
        ...

    def batch(self, seed: int, step: int) -> Batch:
        """Return the inputs and targets of a step."""
        ...

    def test_accuracy(self, model: nn.Module) -> dict[str, float]:
        """Return "test", the test accuracy in percent, and with BatchNorm "running" beside it."""
        ...


class DigitsTask:
    """Section 6.5 of the paper: scikit-learn's digits, full batch, Adam at 0.015 for 200 steps.

    Args:
        architecture: One of ``ARCHITECTURES``.

    Reference:
        Ghosts of Softmax: Complex Singularities That Limit Safe Step Sizes in Cross-Entropy,
        arXiv:2603.13552, Sec. 6.5.
    """

    num_steps = 200
    spike_step = 50
    evaluates_every_step = True
    clips_under_guard = False

    def __init__(self, architecture: str) -> None:
        self.name = architecture
        self.title, self._make_model = _DIGIT_MODELS[architecture]
        self._train, self._test = load_digits()

    def model(self, seed: int) -> nn.Module:
        """Return a new model, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._make_model()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return Adam with its defaults."""
        return torch.optim.Adam(model.parameters())

    def learning_rate(self, step: int) -> float:
        """Return 0.015, which is on the hot side for Adam: the paper's choice."""
        return 0.015

    def batch(self, seed: int, step: int) -> Batch:
        """Return the whole training set."""
        return self._train

    def test_accuracy(self, model: nn.Module) -> dict[str, float]:
        """Return the accuracy, with BatchNorm both by the batch's and by running statistics.

        The model's own statistics stay as they are.
        """
        images, labels = self._test
        has_statistics = any(True for _ in model.buffers())
        accuracy = {}
        for name, is_training in (("test", True), ("running", False))[: 1 + has_statistics]:
            model.train(is_training)
            buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
            with torch.no_grad():
                predicted = functional_call(model, buffers, (images,)).argmax(-1)
            accuracy[name] = 100 * (predicted == labels).double().mean().item()
        model.train()
        return accuracy


class TextTask:
    """A character GPT on the source text of Python's standard library, with a common recipe.

    AdamW, weight decay 0.1, gradient clipping at 1, warm-up and cosine, peak learning rate 1e-3.
    The text differs from one version of Python to the next, and so do the numbers.
    """

    name = "gpt"
    title = "Character GPT"
    num_steps = 300
    spike_step = 150
    evaluates_every_step = False
    clips_under_guard = True
    context = 64
    batch_size = 16

    def __init__(self) -> None:
        self._train, self._test, self._vocabulary_size = load_text()

    def model(self, seed: int) -> nn.Module:
        """Return a new model, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return CharacterGPT(self._vocabulary_size, self.context)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(model.parameters(), weight_decay=0.1)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate: 30 steps up to 1e-3, then half a cosine down to a tenth."""
        peak, warm_up = 1e-3, 30
        if step < warm_up:
            return peak * (step + 1) / warm_up
        progress = (step - warm_up) / (self.num_steps - warm_up)
        return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)

    def batch(self, seed: int, step: int) -> Batch:
        """Return random excerpts, the same for the same seed and step."""
        generator = torch.Generator().manual_seed(seed * self.num_steps + step)
        return self._excerpts(self._train, self.batch_size, generator)

    def test_accuracy(self, model: nn.Module) -> dict[str, float]:
        """Return how many characters of held-out text are predicted, in percent."""
        characters, following = self._excerpts(self._test, 64, torch.Generator().manual_seed(0))
        with torch.no_grad():
            predicted = model(characters).argmax(-1)
        return {"test": 100 * (predicted == following).double().mean().item()}

    def _excerpts(self, text: Tensor, count: int, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(text) - self.context, (count, 1), generator=generator)
        excerpts = text[starts + torch.arange(self.context + 1)]
        return excerpts[:, :-1], excerpts[:, 1:]


_DIGIT_MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "transformer": ("Transformer", DigitTransformer),
    "mlp": ("MLP + LayerNorm", digit_mlp),
    "cnn": ("CNN + BatchNorm", digit_cnn),
}
ARCHITECTURES = tuple(_DIGIT_MODELS)


@cache
def make_task(name: str) -> Task:
    """Return a task by the name of its folder: an architecture for the digits, or ``gpt``.

    Args:
        name: One of ``ARCHITECTURES``, or ``gpt``.

    Returns:
        The task, with its data in memory.
    """
    return TextTask() if name == TextTask.name else DigitsTask(name)


@cache
def load_digits() -> tuple[Batch, Batch]:
    """Return the training and the test set: the first fifth of the rows is the test set.

    Returns:
        Twice images ``[B, 64]`` in [0, 1] and labels ``[B]``.

    Raises:
        ImportError: If scikit-learn, which holds the data, is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "safestep demo: expected scikit-learn, whose digits are the data, got no such module. "
            "Run: pip install safestep[demo]"
        ) from error
    values, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(values / 16, dtype=torch.float32)
    targets = torch.tensor(labels, dtype=torch.long)
    size = len(images) // 5
    return (images[size:], targets[size:]), (images[:size], targets[:size])


@cache
def load_text(num_characters: int = 400_000) -> tuple[Tensor, Tensor, int]:
    """Return training and held-out text as character indices, and the size of the vocabulary.

    Args:
        num_characters: How much of the standard library is read, in the order of its file names.

    Returns:
        Nine tenths of the text, the last tenth, and the number of different characters.

    Raises:
        FileNotFoundError: If the standard library's source is not there.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    text = ""
    for file in sorted(folder.glob("*.py")):
        text += file.read_text(encoding="utf-8").encode("ascii", "ignore").decode()
        if len(text) >= num_characters:
            break
    if len(text) < num_characters:
        raise FileNotFoundError(
            f"safestep demo: expected {num_characters} characters of Python source in {folder}, "
            f"got {len(text)}. Use the default task, digits."
        )
    codes = torch.tensor(list(text[:num_characters].encode()), dtype=torch.long)
    characters, indices = codes.unique(return_inverse=True)
    cut = num_characters * 9 // 10
    return indices[:cut], indices[cut:], len(characters)
