"""flame: distributed pretraining of linear-attention, delta-rule, state-space, sparse and softmax language models."""

__version__ = "0.1.0"
