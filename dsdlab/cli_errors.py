"""What goes wrong, said in one line: bad input and missing parts end a command with exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click


class UserError(click.ClickException):
    """Something the user can mend: one line on standard error, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:  # noqa: ARG002 - click names it
        click.echo(f"dsdlab: error: {' '.join(self.format_message().split())}", err=True)


def _user_errors() -> tuple[type[Exception], ...]:
    """The exceptions that mean bad input or a missing part, wherever they are raised."""
    from dsdlab.models.base import ModelError
    from dsdlab.nodes import GenerationFailed
    from dsdlab.policies import PolicyError
    from dsdlab.probe import ProbeError
    from dsdlab.protocol import ChannelClosed, ConnectFailed, ListenFailed, ProtocolError, Refused
    from dsdlab.scenario import ScenarioError
    from dsdlab.sim.costs import UnfitProfile
    from dsdlab.sim.fit import UnfitMeasures
    from dsdlab.sim.grid import GridFailed
    from dsdlab.sim.prediction import PredictionError
    from dsdlab.sim.trace import TraceError
    from dsdlab.sweep.simulated import CompareError
    from dsdlab.sweep.store import StoreError
    from testbed.control import NodeDied, NodeError
    from testbed.links.base import LinkError
    from testbed.runtimes.base import RuntimeFailed

    return (
        ModelError,
        GenerationFailed,
        PolicyError,
        ProbeError,
        ChannelClosed,
        ConnectFailed,
        ListenFailed,
        ProtocolError,
        Refused,
        ScenarioError,
        UnfitProfile,
        UnfitMeasures,
        GridFailed,
        PredictionError,
        TraceError,
        CompareError,
        StoreError,
        NodeDied,
        NodeError,
        LinkError,
        RuntimeFailed,
    )


def guarded(action: Callable[[], Any]) -> Any:
    """Run `action`; what the user can mend becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        return action()
    except click.ClickException:
        raise
    except KeyboardInterrupt:
        click.echo("dsdlab: interrupted", err=True)
        sys.exit(130)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        raise UserError(f"{where}{e.strerror or e}") from None
    except Exception as e:
        if isinstance(e, _user_errors()):
            raise UserError(str(e)) from None
        raise
