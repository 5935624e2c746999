"""Training losses as modules that hold options and state; no kernel lives here."""

from camkernels.losses.attention_consistency import AttentionConsistency, AttentionConsistencyLoss
from camkernels.losses.global_consistency import GlobalConsistencyLoss
from camkernels.losses.homogeneous_negative_cam import HomogeneousNegativeCAMLoss
from camkernels.losses.local_level import LocalLevelLoss
from camkernels.losses.pairwise_consistency import PairwiseConsistencyLoss
from camkernels.losses.stochastic_consistency import StochasticConsistencyLoss
from camkernels.losses.weighted_bce import WeightedBCEWithLogits

__all__ = [
    "AttentionConsistency",
    "AttentionConsistencyLoss",
    "GlobalConsistencyLoss",
    "HomogeneousNegativeCAMLoss",
    "LocalLevelLoss",
    "PairwiseConsistencyLoss",
    "StochasticConsistencyLoss",
    "WeightedBCEWithLogits",
]
