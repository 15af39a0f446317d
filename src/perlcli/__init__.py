"""Reinforcement learning from human feedback with LoRA adapters on one frozen base (PERL, arXiv 2403.10704)."""

__version__ = "0.1.0"
