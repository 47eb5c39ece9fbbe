"""Compute a radius from logits and their tangent; imports nothing else of safestep."""
