"""StepSafetyCallback with the shapes of the official examples, on ranks, with PEFT and TRL."""

import os
import subprocess
import sys

import pytest
import torch
import transformers
from helpers.scripts import PROCESSES

from safestep import read_run
from safestep.callbacks.hugging_face import StepSafetyCallback

pytestmark = [
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
    pytest.mark.filterwarnings("default::UserWarning:(torch|transformers|accelerate|peft|trl)"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
STEPS = 3
OPTIONS = {
    "max_steps": STEPS, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True,
    "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3,
}  # fmt: skip


def draw(*shape, most=64):
    return torch.randint(3, most, shape, generator=torch.Generator().manual_seed(0))


def causal_language_model():
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=12, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in draw(12, 12)]
    return transformers.GPT2LMHeadModel(config), rows


def sequence_classifier():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=3,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": index % 3} for index, row in enumerate(draw(12, 12))]
    return transformers.BertForSequenceClassification(config), rows


def image_classifier():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    images = draw(12, 3, 8, 8) / 64
    rows = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(images)]
    return transformers.ViTForImageClassification(config), rows


def low_rank_adapters():
    peft = pytest.importorskip("peft")
    model, rows = causal_language_model()
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    return peft.get_peft_model(model, config), rows


def train(shape, folder, *callbacks):
    torch.manual_seed(0)
    model, rows = shape()
    arguments = transformers.TrainingArguments(output_dir=str(folder), **OPTIONS)
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks)
    )
    trainer.train()
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [causal_language_model, sequence_classifier, image_classifier, low_rank_adapters]
)
def test_an_example_is_measured_and_trains_bitwise_as_without_a_guard(shape, tmp_path):
    callback = StepSafetyCallback(max_normalized_step=1e9)

    watched = train(shape, tmp_path / "watched", callback)
    plain = train(shape, tmp_path / "plain")

    assert list(read_run(tmp_path / "watched").steps["status"]) == ["ok"] * STEPS
    assert callback.last.normalized_step > 0
    for one, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_ranks_of_accelerate_launch_are_clipped_together(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
         "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
         "--main_process_port", "0", str(PROCESSES / "hugging_face_ranks.py"), str(tmp_path)],
        capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-3000:]
