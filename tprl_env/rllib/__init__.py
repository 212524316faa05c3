"""Training with Ray RLlib 2.60 (new API stack): scorer actors, module, fast runner, learner, loop.

The only layer that imports ray. ``scorer_*`` is the pool of actors that hold the LVLM, `module`
wraps the pruning policy as an RLModule, `runner` rolls out whole episodes and asks for all scores
at once, `connector` makes the learner's batch, `ppo` holds the loss, `train` the loop.
"""
