"""The receiver: takes artifacts over HTTP, verifies them, and stores each once, in a directory readable without it.

What always holds: an ``Upload-Offset`` that left the receiver is durable; a 201 means that the artifact and its
receipt are on disk under the episode's name and verified; an artifact once published is never replaced. The wire
is docs/protocol.md. Imports go one way (`make check` enforces it):

    __main__ > server > app > (shares | threads | verification | metrics) > (wire | store) > uploads > policy

Imports ``settings``, ``episode``, ``durable``, ``fields``, ``frames`` and ``errors`` of fastship, never ``upload``.
The command line and the tests import this package by the names below; ``scrub`` by itself, as it needs no server.
"""

from fastship.receiver.app import create_app
from fastship.receiver.server import serve

__all__ = ["create_app", "serve"]
