"""The preset to start from: at present ``mapo``, in one file with every setting.

Chosen by ``rllib_configs/experiments/compare_optimizers.py`` (docs/experiments.md): from the same
imitations and with the same number of LVLM scores MAPO kept more accuracy than PPO at 29 and 14 of
144 tokens on ``crowded``, beyond the interval over five seeds, and was nowhere worse.
"""

from rllib_configs.mapo import CONFIG, build

__all__ = ["CONFIG", "build"]
