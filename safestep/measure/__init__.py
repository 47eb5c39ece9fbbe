"""Go from an update to a radius; may import capture and below."""
