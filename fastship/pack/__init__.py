"""From a directory to an artifact and back: `pack`, `fingerprint`, `measure`; `extract`, `list_members`;
`read_windows`;
and `LevelControl`, which chooses the level of each frame.

The face of the package is what stands in ``__all__``. It imports ``frames``, ``episode``, ``durable`` and ``errors``;
the worker, ``tune``, the demo and the command line import it.
"""

from fastship.pack.extract import ExtractResult, extract, list_members
from fastship.pack.level import Flow, LevelControl, level_without_link
from fastship.pack.packing import (
    Content,
    EpisodeSize,
    PackOptions,
    Sink,
    code_commit,
    digest_content,
    fingerprint,
    measure,
    pack,
)
from fastship.pack.sampling import read_windows

__all__ = [
    "Content",
    "EpisodeSize",
    "ExtractResult",
    "Flow",
    "LevelControl",
    "PackOptions",
    "Sink",
    "code_commit",
    "digest_content",
    "extract",
    "fingerprint",
    "level_without_link",
    "list_members",
    "measure",
    "pack",
    "read_windows",
]
