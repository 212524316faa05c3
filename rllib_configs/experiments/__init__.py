"""Experiments and searches for ``tprl compare``, each a literal."""
