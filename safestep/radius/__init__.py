"""Turn logits and their tangent into a radius; imports nothing else of safestep."""
