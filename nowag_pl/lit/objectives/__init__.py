"""Objectives of end-to-end training, each chosen by its class_path."""

from nowag_pl.lit.objectives.balanced import BalancedNextToken
from nowag_pl.lit.objectives.base import Objective
from nowag_pl.lit.objectives.distillation import Distillation
from nowag_pl.lit.objectives.next_token import NextToken
from nowag_pl.lit.objectives.policy_gradient import PolicyGradient

__all__ = ["BalancedNextToken", "Distillation", "NextToken", "Objective", "PolicyGradient"]
