"""The receiver: takes artifacts over HTTP, verifies them, and stores each once, in a directory readable without it.

What always holds: an ``Upload-Offset`` that left the receiver is durable; a 201 means that the artifact and its
receipt are on disk under the episode's name and verified; an artifact once published is never replaced. The wire
is docs/protocol.md. Inside, imports go one way:

    __main__ > server > (connection | app)      app > (reading | small > ending > store) > uploads
    app > verification > custody > store        scrub > custody
    app > reading > request > ingest > direct > partial      connection > direct
    uploads > (lock > partial | reserved)                    uploads > decisions > (access | answers)

Imports ``settings``, ``episode``, ``durable``, ``fields``, ``frames`` and ``errors`` of fastship, never ``upload``.
The command line and the tests import this package by the names below; ``scrub`` by itself, as it needs no server.
"""

from fastship.receiver.app import create_app
from fastship.receiver.server import serve

__all__ = ["create_app", "serve"]
