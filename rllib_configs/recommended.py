"""The preset to start from: at present ``mapo``, in one file with every setting.

Chosen by ``rllib_configs/experiments/compare_optimizers.py`` (docs/experiments.md): from the same
imitations and with the same number of LVLM scores MAPO had the highest mean over five seeds at 29
to 4 of 144 tokens on ``crowded``, beyond the paired interval against PPO at 29 only, and was
nowhere worse beyond it.
"""

from rllib_configs.mapo import CONFIG, build

__all__ = ["CONFIG", "build"]
