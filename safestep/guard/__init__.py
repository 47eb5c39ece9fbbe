"""Decide and act on an optimizer's step; may import workers and below."""
