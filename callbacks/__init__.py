"""Lightning callbacks, installed as ``safestep.callbacks``."""
