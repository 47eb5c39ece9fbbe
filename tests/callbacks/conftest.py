"""A small Lightning run, quiet and on one core."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset


@pytest.fixture
def loader():
    """Return a function to batches of four classes that a small network can learn."""

    def make(*, size=64, batch_size=16, **options):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(size, 8, generator=generator)
        return DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size, **options)

    return make


@pytest.fixture
def fit(loader, tmp_path):
    """Return a function that trains a module from a fixed seed and returns the trainer.

    ``data=False`` takes the module's own loaders.
    """
    from lightning.pytorch import Trainer, seed_everything

    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": tmp_path,
    }

    def run(module, *callbacks, data=None, ckpt_path=None, **options):
        seed_everything(0, verbose=False)
        options = {"max_epochs": 2, **quiet, **options}
        with warnings.catch_warnings():
            for message in _LIGHTNING_NOISE:
                warnings.filterwarnings("ignore", message)
            trainer = Trainer(callbacks=list(callbacks), **options)
            trainer.fit(module, loader() if data is None else data or None, ckpt_path=ckpt_path)
        return trainer

    return run


# About the machine and about lightning's own code, none of them about the callback.
_LIGHTNING_NOISE = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r".*does not have many workers",
)
