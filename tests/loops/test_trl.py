"""StepSafetyCallback in TRL's trainers, on models from configs and a tokenizer made here."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from safestep import read_run
from safestep.callbacks.hugging_face import StepSafetyCallback

trl = pytest.importorskip("trl", exc_type=(ImportError, RuntimeError))
datasets = pytest.importorskip("datasets")

pytestmark = [pytest.mark.loops, pytest.mark.filterwarnings("ignore")]
STEPS = 3
OPTIONS = {
    "max_steps": STEPS, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True,
    "save_strategy": "no", "disable_tqdm": True, "bf16": False,
}  # fmt: skip


def tokenizer():
    words = {word: index for index, word in enumerate(("<pad>", "<eos>", "<unk>", *"abcd"))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=0,
        eos_token_id=1, bos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def texts():
    for text in ("a b c d a b", "b c d", "a a b") * 4:
        yield {"text": text}


def preferences():
    for _ in range(12):
        yield {"prompt": "a b", "chosen": "c d", "rejected": "a"}


def fine_tune(folder, *callbacks):
    trained = model()
    trl.SFTTrainer(
        trained, args=trl.SFTConfig(output_dir=str(folder), **OPTIONS),
        train_dataset=datasets.IterableDataset.from_generator(texts),
        processing_class=tokenizer(), callbacks=list(callbacks),
    ).train()  # fmt: skip
    return trained


def prefer(folder, *callbacks):
    trained = model()
    trl.DPOTrainer(
        trained, ref_model=model(), args=trl.DPOConfig(output_dir=str(folder), **OPTIONS),
        train_dataset=datasets.IterableDataset.from_generator(preferences),
        processing_class=tokenizer(), callbacks=list(callbacks),
    ).train()  # fmt: skip
    return trained


@pytest.mark.parametrize("train", [fine_tune, prefer])
def test_a_trainer_of_trl_is_measured_and_trains_bitwise_as_without_a_guard(train, tmp_path):
    watched = train(tmp_path / "watched", StepSafetyCallback(max_normalized_step=1e9))
    plain = train(tmp_path / "plain")

    assert list(read_run(tmp_path / "watched").steps["status"]) == ["ok"] * STEPS
    for one, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
