"""Step-size safety controller and diagnostics for PyTorch training."""
