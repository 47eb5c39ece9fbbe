"""A model that several test files build."""

from torch import nn


def mlp(dropout=0.0):
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 3))
