"""fastship beside what else one could use: same corpus, same sink, one run.

``python -m bench.peers``, or ``make bench-peers``.

``backlog`` is what is shipped, ``programs`` are the ways to ship it, ``original`` is the tool that fastship replaces,
``report`` writes the table and the chart, ``__main__`` runs the rounds.
"""
