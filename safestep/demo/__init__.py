"""Layer 3, demo: watch training runs that plain Adam and gradient clipping lose.

``command`` is the command line, ``experiment`` the training loop, ``tasks`` and ``models`` what is
trained, ``jobs`` runs many at once, ``summary`` and ``figure`` show what came out.
"""
