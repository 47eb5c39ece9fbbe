"""The Trainer of Hugging Face, guarded by hand and by StepSafetyCallback."""

import copy
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from safestep import SafeStep, read_run
from safestep.callbacks.hugging_face import StepSafetyCallback

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
    pytest.mark.filterwarnings("default::UserWarning:(torch|transformers|accelerate)"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
IGNORED = 5  # positions at the beginning that have no label
STEPS = 3
OPTIONS = {
    "accumulated and clipped": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "bfloat16": {"bf16": True, "use_cpu": True},
    "checkpointed": {"gradient_checkpointing": True},
    "checkpointed, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


class Guard(transformers.TrainerCallback):
    """Attaches a guard, and keeps the model before and after each step."""

    def __init__(self):
        self.reports, self.models = [], []

    def on_train_begin(self, args, state, control, model, optimizer, **_):
        self.guard = SafeStep(optimizer, model, action="monitor")

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.models.append([copy.deepcopy(model)])

    def on_optimizer_step(self, args, state, control, model, **_):
        self.models[-1].append(copy.deepcopy(model))
        self.reports.append(self.guard.last)


def examples():
    tokens = torch.randint(3, 64, (16, 12), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, :IGNORED] = -100
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def train(folder, options, *callbacks):
    """Return the model after a few steps, the same each time."""
    model = small_model(options)
    train_on(model, folder, options, callbacks=list(callbacks))
    return model


def small_model(options=()):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=12,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    if "bf16" not in options and "gradient_checkpointing" not in options:
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return transformers.GPT2LMHeadModel(config)


def train_on(model, folder, options, **trainer_options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, report_to=[],
        save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
        **({"use_cpu": True, "logging_strategy": "no"} | options),
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=examples(), **trainer_options
    )
    trainer.train()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_trainer_is_measured_and_trains_bitwise_as_without_a_guard(name, tmp_path):
    guard = Guard()

    watched = train(tmp_path, OPTIONS[name], guard)
    plain = train(tmp_path, OPTIONS[name])

    assert [report.status for report in guard.reports] == ["ok"] * STEPS
    assert {report.estimator for report in guard.reports} == {"jvp"}
    for one, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


class Spike(transformers.TrainerCallback):
    """Multiplies the learning rate of the second step by 10,000."""

    def on_pre_optimizer_step(self, args, state, control, optimizer, **_):
        if state.global_step == 1:
            for group in optimizer.param_groups:
                group["lr"] *= 1e4


def test_a_guard_attached_before_the_trainer_is_built_clips_a_spike(tmp_path):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard = SafeStep(optimizer, model)
    reports = []
    optimizer.register_step_post_hook(lambda *_: reports.append(guard.last))

    train_on(model, tmp_path, {}, optimizers=(optimizer, None), callbacks=[Spike()])

    assert [report.status for report in reports] == ["ok", "clipped", "ok"]
    assert reports[1].normalized_step * reports[1].scale == pytest.approx(1.0)


def test_r_of_a_trainer_is_that_of_all_accumulated_rows_with_a_label(tmp_path):
    """The Trainer shuffles: with all examples in each step, the order does not matter."""
    guard = Guard()
    options = {"gradient_accumulation_steps": 4, "max_grad_norm": 0.1}

    train(tmp_path, options, guard)

    tokens = torch.stack([example["input_ids"] for example in examples()])
    for (before, after), report in zip(guard.models, guard.reports, strict=True):
        before, after = before.double().train(), after.double()
        start = {name: p.detach() for name, p in before.named_parameters()}
        moved = {name: p.detach() - start[name] for name, p in after.named_parameters()}

        def logits(params, model=before):
            with sdpa_kernel(SDPBackend.MATH):
                output = functional_call(model, params, (tokens,)).logits
            return output[:, IGNORED - 1 : -1]

        _, tangent = torch.func.jvp(logits, (start,), (moved,))
        expected = float((tangent.amax(-1) - tangent.amin(-1)).max()) / math.pi
        assert report.normalized_step == pytest.approx(expected, rel=1e-4)  # float32


def resumable(folder, callback, *, steps=6, resume=None, **options):
    """Train for some steps with a checkpoint after three, and return the model and the Trainer."""
    model = small_model()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, report_to=[],
        save_steps=3, logging_steps=2, disable_tqdm=True, learning_rate=1e-2, use_cpu=True,
        gradient_accumulation_steps=2, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=examples(), callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


@pytest.mark.parametrize("name", OPTIONS)
def test_the_callback_leaves_training_bitwise_as_it_is(name, tmp_path):
    callback = StepSafetyCallback(max_normalized_step=1e9)

    watched = train(tmp_path / "watched", OPTIONS[name], callback)
    plain = train(tmp_path / "plain", OPTIONS[name])

    assert callback.last.status == "ok"
    assert len(read_run(tmp_path / "watched").steps["step"]) == STEPS
    for one, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_callback_clips_a_spike_and_says_so_in_the_logs(tmp_path):
    callback = StepSafetyCallback(run_dir=tmp_path / "run")

    train_on(
        small_model(), tmp_path, {"logging_strategy": "steps", "logging_steps": 1},
        callbacks=[Spike(), callback],
    )  # fmt: skip

    run = read_run(tmp_path / "run")
    assert list(run.steps["status"]) == ["ok", "clipped", "ok"]
    assert run["normalized_step"][1] * run["scale"][1] == pytest.approx(1.0)


def test_trackers_that_the_trainer_put_first_see_r(tmp_path):
    seen = []

    class Tracker(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            seen.append(dict(logs))

    train_on(
        small_model(), tmp_path,
        {"logging_strategy": "steps", "logging_steps": 1, "max_grad_norm": 1e6},
        callbacks=[Tracker(), StepSafetyCallback(audit_interval=1)],
    )  # fmt: skip

    *steps, _ = seen  # the last is the summary of the training
    assert len(steps) == STEPS
    for logs in steps:
        assert 0 < logs["safestep/normalized_step"] < 1
        assert logs["safestep/scale"] == 1
        assert logs["safestep/unmeasured"] == 0
        assert logs["safestep/gradient_ratio"] == pytest.approx(1.0, rel=1e-3)
        change = logs["safestep/divergence"] + logs["safestep/loss_slope"]
        assert logs["safestep/predicted_change"] == change < 0


def test_a_resumed_trainer_goes_on_bitwise(tmp_path):
    through, resumed = StepSafetyCallback(), StepSafetyCallback()
    model, _ = resumable(tmp_path, through)

    again, _ = resumable(tmp_path, resumed, resume=str(tmp_path / "checkpoint-3"))

    assert resumed.last.step == through.last.step
    assert resumed.last.normalized_step == through.last.normalized_step
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_logged_loss_is_that_of_the_step(tmp_path):
    _, trainer = resumable(tmp_path, StepSafetyCallback(), logging_first_step=False)

    losses = read_run(tmp_path)["loss"]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses.reshape(-1, 2).mean(1) == pytest.approx(logged, rel=1e-4)


def test_a_callback_restored_without_its_logits_is_refused(tmp_path):
    callback = StepSafetyCallback(logits=lambda output: output.logits)
    resumable(tmp_path, callback)

    with pytest.raises(ValueError, match="expected `logits` again"):
        resumable(
            tmp_path, StepSafetyCallback(logits=lambda output: output.logits),
            resume=str(tmp_path / "checkpoint-3"), restore_callback_states_from_checkpoint=True,
        )  # fmt: skip


def test_deepspeed_is_refused():
    arguments = SimpleNamespace(deepspeed="config.json")

    with pytest.raises(ValueError, match=r"DeepSpeed.*Use DDP or FSDP2"):
        StepSafetyCallback().on_train_begin(arguments, None, None)


@pytest.mark.parametrize(
    ("name", "other"),
    [("safestep.callbacks.hugging_face", "lightning"), ("safestep.callbacks", "transformers")],
)
def test_a_framework_is_imported_only_when_asked_for(name, other):
    program = f"import sys, {name}; print({other!r} in sys.modules)"

    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )

    assert result.stdout.strip() == "False"
