"""Models that users recognise, random weights: how r is measured, how well, and at what cost.

Set SAFESTEP_COVERAGE_TABLE to a path and the table of the README is written there.
"""

import copy
import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from safestep import SafeStep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:SafeStep.*no forward-mode derivative:UserWarning"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
]
VOCABULARY, LENGTH, BATCH = 256, 32, 8
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = SMALL | {
    "vocab_size": VOCABULARY, "intermediate_size": 128, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class ResNet(nn.Module):
    """Two residual stages with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.stem = self._block(3, 8)
        self.body = nn.ModuleList(self._block(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 10)

    @staticmethod
    def _block(inputs, outputs):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    def forward(self, images):
        hidden = self.stem(images)
        for block in self.body:
            hidden = functional.relu(hidden + block(hidden))
        return self.head(hidden.mean((2, 3)))


class UNet(nn.Module):
    """One level down and up again, classes for every pixel: [B, C, H, W]."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.SiLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, images):
        skip = self.down(images)
        hidden = self.up(self.middle(functional.max_pool2d(skip, 2)))
        return self.head(torch.cat((skip, hidden), 1))


class RecurrentLM(nn.Module):
    """A recurrent language model, logits of shape [B, V, T]."""

    def __init__(self, layer):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 64)
        self.layer = layer(64, 96, num_layers=2, batch_first=True)
        self.head = nn.Linear(96, VOCABULARY)

    def forward(self, tokens):
        return self.head(self.layer(self.embedding(tokens))[0]).movedim(-1, 1)


class Mixer(nn.Module):
    """An MLP-Mixer of two blocks over 16 patches."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, stride=4)
        self.tokens = nn.ModuleList(self._mlp(16, 32) for _ in range(2))
        self.channels = nn.ModuleList(self._mlp(24, 48) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(4))
        self.head = nn.Linear(24, 10)

    @staticmethod
    def _mlp(size, hidden):
        return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))

    def forward(self, images):
        hidden = self.patches(images).flatten(2).mT
        for index, (tokens, channels) in enumerate(zip(self.tokens, self.channels, strict=True)):
            hidden = hidden + tokens(self.norms[2 * index](hidden).mT).mT
            hidden = hidden + channels(self.norms[2 * index + 1](hidden))
        return self.head(hidden.mean(1))


class GraphNet(nn.Module):
    """Two rounds of messages along edges, summed at each node with scatter_add."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, nodes, edges):
        hidden = nodes
        for layer in (self.first, self.second):
            message = layer(hidden)
            index = edges[1].unsqueeze(-1).expand(-1, message.shape[-1])
            gathered = torch.zeros_like(message).scatter_add(0, index, message[edges[0]])
            hidden = torch.tanh(message + gathered)
        return self.head(hidden)


@dataclass
class Case:
    """A model, what it is called with, and the logits that its loss reads."""

    model: nn.Module
    inputs: dict
    logits: object = None  # from the output to the rows that count, classes last
    target: torch.Tensor | None = None  # where the model returns logits and no loss

    def loss(self, model):
        output = model(**self.inputs)
        return output.loss if self.target is None else functional.cross_entropy(output, self.target)

    def counted(self, model):
        output = model(**self.inputs)
        return self.logits(output) if self.logits else [output.movedim(1, -1)]


def tokens(*shape):
    return torch.randint(3, VOCABULARY, shape or (BATCH, LENGTH))


def images(size=16):
    return torch.randn(BATCH, 3, size, size)


def causal(name, **options):
    """Return a causal language model; its last position predicts nothing."""
    config = getattr(transformers, f"{name}Config")(**options)
    ids = tokens()
    return Case(
        getattr(transformers, f"{name}ForCausalLM")(config),
        {"input_ids": ids, "labels": ids},
        lambda output: [output.logits[:, :-1]],
    )


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=LENGTH,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    ids = tokens()
    model = transformers.GPT2LMHeadModel(config)
    return Case(model, {"input_ids": ids, "labels": ids}, lambda output: [output.logits[:, :-1]])


def bert():
    config = transformers.BertConfig(
        **SMALL, vocab_size=VOCABULARY, intermediate_size=128, num_labels=5,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    inputs = {"input_ids": tokens(), "labels": torch.randint(5, (BATCH,))}
    return Case(model, inputs, lambda output: [output.logits])


def t5():
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        dropout_rate=0, decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    return Case(
        model, {"input_ids": tokens(), "labels": tokens()}, lambda output: [output.logits]
    )  # fmt: skip


def vit():
    config = transformers.ViTConfig(
        **SMALL, intermediate_size=128, image_size=16, patch_size=4, num_labels=10,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    inputs = {"pixel_values": images(), "labels": torch.randint(10, (BATCH,))}
    return Case(model, inputs, lambda output: [output.logits])


def clip():
    text = SMALL | {"vocab_size": VOCABULARY, "intermediate_size": 128, "eos_token_id": 2}
    vision = SMALL | {"intermediate_size": 128, "image_size": 16, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    inputs = {"input_ids": tokens(), "pixel_values": images(), "return_loss": True}
    return Case(
        transformers.CLIPModel(config), inputs,
        lambda output: [output.logits_per_image, output.logits_per_text],
    )  # fmt: skip


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=64, encoder_layers=2, decoder_layers=2, num_mel_bins=8,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
        decoder_ffn_dim=128, max_source_positions=32, max_target_positions=LENGTH, dropout=0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    inputs = {"input_features": torch.randn(BATCH, 8, 64), "labels": tokens()}
    return Case(model, inputs, lambda output: [output.logits])


def mamba():
    return causal(
        "Mamba", vocab_size=VOCABULARY, hidden_size=64, state_size=4, num_hidden_layers=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


CASES = {
    "GPT-2": gpt2,
    "Llama": lambda: causal("Llama", **DECODER),
    "Mistral": lambda: causal("Mistral", **DECODER),
    "Qwen 3": lambda: causal("Qwen3", **DECODER, head_dim=16),
    "Gemma": lambda: causal("Gemma", **DECODER, head_dim=16),
    "Mixtral (MoE)": lambda: causal("Mixtral", **DECODER, num_local_experts=4),
    "BERT": bert,
    "T5": t5,
    "ViT": vit,
    "CLIP": clip,
    "Whisper": whisper,
    "Mamba": mamba,
    "ResNet, BatchNorm": lambda: Case(
        ResNet(), {"images": images()}, target=torch.randint(10, (BATCH,))
    ),
    "U-Net": lambda: Case(UNet(), {"images": images()}, target=torch.randint(5, (BATCH, 16, 16))),
    "LSTM language model": lambda: Case(
        RecurrentLM(nn.LSTM), {"tokens": tokens()}, target=tokens()
    ),
    "GRU language model": lambda: Case(RecurrentLM(nn.GRU), {"tokens": tokens()}, target=tokens()),
    "MLP-Mixer": lambda: Case(Mixer(), {"images": images()}, target=torch.randint(10, (BATCH,))),
    "graph network, scatter": lambda: Case(
        GraphNet(), {"nodes": torch.randn(20, 6), "edges": torch.randint(20, (2, 60))},
        target=torch.randint(4, (20,)),
    ),
}  # fmt: skip


def build(name):
    torch.manual_seed(0)
    return CASES[name]()


def take_step(case, optimizer):
    begin = perf_counter()
    optimizer.zero_grad()
    case.loss(case.model).backward()
    optimizer.step()
    return perf_counter() - begin


def reference(case, before, after):
    """Return r in float64 by reverse mode twice: J p is the derivative of <J^T u, p> by u."""
    model = copy.deepcopy(before).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernel has no float64
    case = copy.copy(case)
    case.inputs = {
        key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in case.inputs.items()
    }
    params = [p for p in model.parameters() if p.requires_grad]
    trained = [p for p in after.parameters() if p.requires_grad]
    change = [p.detach().double() - q.detach() for p, q in zip(trained, params, strict=True)]
    spreads = []
    with sdpa_kernel(SDPBackend.MATH):
        for logits in case.counted(model):
            u = torch.zeros_like(logits, requires_grad=True)
            pulled = torch.autograd.grad(
                logits, params, u, create_graph=True, materialize_grads=True, retain_graph=True
            )
            inner = sum((g * p).sum() for g, p in zip(pulled, change, strict=True))
            (tangent,) = torch.autograd.grad(inner, u, retain_graph=True)
            spreads.append(float((tangent.amax(-1) - tangent.amin(-1)).max()))
    return max(spreads) / math.pi


@pytest.fixture(scope="module")
def table():
    lines = [
        "| model | estimator | error of r | training unchanged | time of a step |",
        "|---|---|---|---|---|",
    ]
    yield lines
    if path := os.environ.get("SAFESTEP_COVERAGE_TABLE"):
        Path(path).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", CASES)
def test_r_is_measured_and_training_unchanged_for(name, table):
    watched, plain = build(name), build(name)
    torch.manual_seed(1)
    optimizers = [torch.optim.AdamW(case.model.parameters(), lr=1e-3) for case in (watched, plain)]
    guard = SafeStep(optimizers[0], watched.model, action="monitor", estimator="jvp")
    ratios = []
    for _ in range(10):
        before = copy.deepcopy(watched.model)
        seconds = [take_step(case, o) for case, o in zip((watched, plain), optimizers, strict=True)]
        ratios.append(seconds[0] / seconds[1])
    ratio = statistics.median(ratios[4:])

    assert guard.last.status == "ok", guard.last.reason
    expected = reference(watched, before, watched.model)
    error = abs(guard.last.normalized_step / expected - 1)
    pairs = zip(watched.model.state_dict().values(), plain.model.state_dict().values(), strict=True)
    is_unchanged = all(torch.equal(one, other) for one, other in pairs)
    table.append(
        f"| {name} | {guard.last.estimator} | {error:.0e} | {'yes' if is_unchanged else 'no'} "
        f"| {ratio:.1f} x |"
    )
    assert is_unchanged
    assert error <= (1e-4 if guard.last.estimator == "jvp" else 1e-2)
