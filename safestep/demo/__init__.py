"""Watch runs that plain Adam and gradient clipping lose; may import guard and below.

``command`` is the command line, ``experiment`` the training loop, ``tasks`` and ``models`` what is
trained, ``jobs`` runs many at once, ``summary`` and ``figure`` show what came out.
"""
