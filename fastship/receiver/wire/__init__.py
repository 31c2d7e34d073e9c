"""HTTP as it comes and goes: connections, requests, bodies on their way into a file, artifacts on their way out.

Knows files only as a ``Partial`` that it is given. Inside: (``reading`` > ``request`` > ``ingest`` | ``connection``)
> ``direct``.
"""
