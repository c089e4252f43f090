"""Nodes: drafter and verifier as coroutines over a Channel and an Engine, and nothing else."""

from dsdlab.nodes.drafter import DrafterNode
from dsdlab.nodes.generation import GenerationFailed
from dsdlab.nodes.record import GenerationRecord
from dsdlab.nodes.request import MODES, GenerationRequest
from dsdlab.nodes.verifier import VerifierNode

__all__ = [
    "MODES",
    "DrafterNode",
    "GenerationFailed",
    "GenerationRecord",
    "GenerationRequest",
    "VerifierNode",
]
