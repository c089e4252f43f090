"""What the packages promise by name; a change here is a change for users."""

from __future__ import annotations

import importlib

import pytest

NAMES = {
    "dsdlab.decoding": {
        "FINISH_EOS", "FINISH_LENGTH", "Q_LEVELS", "Sampling", "SparseQ", "accepted_length", "apply_limits",
        "confidence", "gumbel", "log_softmax", "pick", "probabilities", "residual", "sample_rejection",
        "sparsify", "uniform", "verify", "verify_rejection", "warp",
    },
    "dsdlab.nodes": {
        "MODES", "DrafterNode", "GenerationFailed", "GenerationRecord", "GenerationRequest", "VerifierNode",
    },
    "dsdlab.policies": {
        "FOREVER_S", "RUN_AHEAD", "Decision", "Outcome", "Pace", "PolicyError", "StaticWindow",
        "WindowPolicy",
        "load_window_policy", "window_policy_names",
    },
    "dsdlab.report": {"render"},
}  # fmt: skip


@pytest.mark.parametrize("package", sorted(NAMES))
def test_exported_names(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) == NAMES[package]
    assert all(hasattr(module, name) for name in module.__all__)


def test_light_packages_stay_light() -> None:
    """Nodes and protocol must not pull in torch: they run in simulators and on small edges."""
    import subprocess
    import sys

    code = "import sys, dsdlab.nodes, dsdlab.protocol, dsdlab.decoding; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
