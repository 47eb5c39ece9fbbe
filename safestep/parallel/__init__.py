"""Handle tensors that are spread over ranks (shards, norms, collectives); may import radius."""
