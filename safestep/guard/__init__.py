"""Decide and act on an optimizer's step; may import report and below."""
