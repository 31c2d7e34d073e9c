"""A Hypothesis state machine gone through for a share of its histories: what the models of the tests have in common."""

from __future__ import annotations

import faults
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def go_through(machine: type[RuleBasedStateMachine], whole: int, *, least: int, steps: int) -> int:
    """Of ``whole`` histories of at most ``steps`` the share of this run, at least ``least``; how many that were."""
    histories = faults.times(whole, least)
    run_state_machine_as_test(
        seed(faults.SEED)(machine),
        settings=settings(
            max_examples=histories,
            stateful_step_count=steps,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        ),
    )
    return histories
