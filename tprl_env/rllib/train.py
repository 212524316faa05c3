"""The public path of `train`."""

from tprl_env.rllib.run.train import TrainResult, train

__all__ = ["TrainResult", "train"]
