"""StepSafetyCallback on the ranks of ``accelerate launch``: ``hugging_face_ranks.py FOLDER``.

Fails unless the guard leaves training bitwise as it is, and clips a spike on all ranks by the same
factor. Accelerate sets up FSDP2 on accelerators only: on CPUs it would train by DDP all the same.
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from safestep.callbacks.hugging_face import StepSafetyCallback

warnings.simplefilter("ignore")
STEPS, SPIKE = 4, 2


class Spike(transformers.TrainerCallback):
    """Multiplies the learning rate of one step, and keeps the callback's reports."""

    def __init__(self, callback, factor):
        self.callback, self.factor, self.reports = callback, factor, []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **_):
        for group in optimizer.param_groups:
            group["lr"] *= self.factor if state.global_step == SPIKE else 1

    def on_optimizer_step(self, *_, **__):
        self.reports.append(self.callback and self.callback.last)


def train(folder, callback, factor=1.0):
    """Train; return the parameters and the reports of the steps."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=12, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tokens = torch.randint(3, 64, (32, 12), generator=torch.Generator().manual_seed(0))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, report_to=[],
        gradient_accumulation_steps=2, save_strategy="no", logging_strategy="no", use_cpu=True,
        disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    spike = Spike(callback, factor)
    trainer = transformers.Trainer(
        model=transformers.GPT2LMHeadModel(config), args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=[spike] if callback is None else [callback, spike],
    )  # fmt: skip
    trainer.train()
    return [p.detach().clone() for p in trainer.model.parameters()], spike.reports


def main():
    """Train plain, watched and with a spike."""
    folder = Path(sys.argv[1])
    plain, _ = train(folder / "plain", None)
    watched, reports = train(folder / "watched", StepSafetyCallback(max_normalized_step=1e9))
    assert [report.status for report in reports] == ["ok"] * STEPS, reports
    assert all(map(torch.equal, plain, watched))
    _, reports = train(folder / "spike", StepSafetyCallback(), factor=1e4)
    assert [report.status for report in reports] == ["ok", "ok", "clipped", "ok"], reports
    scales = torch.tensor([report.scale for report in reports])
    gathered = [torch.empty_like(scales) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, scales)
    assert all(torch.equal(scales, each) for each in gathered), gathered
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
