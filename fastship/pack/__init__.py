"""From a directory to an artifact and back: `pack`, `fingerprint`, `measure`; `extract`, `list_members`.

The face of the package is what stands in ``__all__``. It imports ``frames``, ``episode``, ``durable`` and ``errors``;
the worker, the demo and the command line import it.
"""

from fastship.pack.extract import ExtractResult, extract, list_members
from fastship.pack.packing import EpisodeSize, PackOptions, Sink, fingerprint, measure, pack

__all__ = [
    "EpisodeSize",
    "ExtractResult",
    "PackOptions",
    "Sink",
    "extract",
    "fingerprint",
    "list_members",
    "measure",
    "pack",
]
