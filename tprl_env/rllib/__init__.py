"""Learning by reinforcement with Ray RLlib 2.60 (new API stack).

``config`` says what a run is, ``rollout`` makes episodes, ``algorithms`` hold the losses, ``run``
is the loop and its folder, ``experiments`` compare runs. Imports go up this list only.
"""
