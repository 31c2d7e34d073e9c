"""The supervisor process: ``signals``, ``gauge`` -> ``host`` (care for others), ``disk`` (how short it is) -> ``crew``
(its workers) -> ``tally`` (what came of it) -> ``patrol`` (what it does on the disk unasked) -> ``loop`` (all it does,
in turn): each imports only those before it.

The supervisor alone moves episodes between states, under the spool lock. The shipper imports it.
"""

from fastship.supervisor.loop import Supervisor

__all__ = ["Supervisor"]
