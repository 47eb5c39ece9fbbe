"""The small networks of the demo. None of them knows that it is guarded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGE_SIZE = 8
NUM_CLASSES = 10


class Block(nn.Module):
    """Pre-norm Transformer block: self-attention, then a feed-forward network twice as wide.

    Args:
        width: Features of a token.
        heads: Attention heads; divides `width`.
        is_causal: Whether a token sees only those before it.
    """

    def __init__(self, width: int, heads: int, *, is_causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.is_causal = is_causal
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens after the block. Shape ``[B, T, width]`` as the input's."""
        tokens = tokens + self._attend(self.attention_norm(tokens))
        return tokens + self.feed_forward(tokens)

    def _attend(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.query_key_value(tokens).chunk(3, dim=-1)
        )
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if self.is_causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        attended = scores.softmax(dim=-1) @ value
        return self.attention_out(attended.transpose(1, 2).flatten(2))


class DigitTransformer(nn.Module):
    """One block over the eight rows of the image as tokens, read out together.

    Args:
        width: Features of a token.
        heads: Attention heads.
    """

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Linear(IMAGE_SIZE, width)
        self.position = nn.Parameter(0.02 * torch.randn(IMAGE_SIZE, width))
        self.block = Block(width, heads)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(IMAGE_SIZE * width, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``[B, 10]`` of images ``[B, 64]``."""
        rows = images.unflatten(1, (IMAGE_SIZE, IMAGE_SIZE))
        tokens = self.block(self.embedding(rows) + self.position)
        return self.head(self.norm(tokens).flatten(1))


def digit_mlp(width: int = 64) -> nn.Sequential:
    """Return a perceptron with two hidden layers and LayerNorm: ``[B, 64]`` -> ``[B, 10]``.

    Args:
        width: Units of each hidden layer.

    Returns:
        The network.
    """
    return nn.Sequential(
        nn.Linear(IMAGE_SIZE**2, width), nn.LayerNorm(width), nn.ReLU(),
        nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(),
        nn.Linear(width, NUM_CLASSES),
    )  # fmt: skip


def digit_cnn(channels: int = 8) -> nn.Sequential:
    """Return two convolutions with BatchNorm and a mean over the image: ``[B, 64]`` -> ``[B, 10]``.

    Args:
        channels: Channels of the first convolution; the second has twice as many.

    Returns:
        The network.
    """
    return nn.Sequential(
        nn.Unflatten(1, (1, IMAGE_SIZE, IMAGE_SIZE)),
        nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.BatchNorm2d(2 * channels), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(2 * channels, NUM_CLASSES),
    )  # fmt: skip


class CharacterGPT(nn.Module):
    """A causal Transformer over characters.

    Args:
        vocabulary_size: Number of different characters.
        context: Characters that it sees at most.
        width: Features of a token.
        layers: Number of blocks.
        heads: Attention heads.
    """

    def __init__(
        self,
        vocabulary_size: int,
        context: int = 64,
        *,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads, is_causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary_size)

    def forward(self, characters: Tensor) -> Tensor:
        """Return the next character's logits ``[B, T, V]`` at each of ``[B, T]`` characters."""
        tokens = self.embedding(characters) + self.position[: characters.shape[1]]
        return self.head(self.norm(self.blocks(tokens)))
