"""From a directory to an artifact and back: `pack`, `fingerprint`, `measure`; `extract`, `list_members`;
`read_windows`.

The face of the package is what stands in ``__all__``. It imports ``frames``, ``episode``, ``durable`` and ``errors``;
the worker, ``tune``, the demo and the command line import it.
"""

from fastship.pack.extract import ExtractResult, extract, list_members
from fastship.pack.packing import EpisodeSize, PackOptions, Sink, fingerprint, measure, pack
from fastship.pack.sampling import read_windows

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
    "read_windows",
]
