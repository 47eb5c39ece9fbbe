"""Go from an update to a radius; may import report and below, and uses capture and radius."""
