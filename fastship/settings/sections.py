"""What can be set, with types, bounds and defaults. What each means stands in ``conf/default.toml``.

Every section is frozen. Imported by all of the package; imports nothing of it but, to load, ``layers``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

MAX_SIZE = 1 << 60  # far beyond any disk, and still an int64 for libcurl
MAX_DURATION_S = 10 * 366 * 86400.0  # ten years: more overflows the timeouts of select(2) and friends for nothing

Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE, extra={"kind": "size"})]
"""Bytes."""
Duration = Annotated[float, msgspec.Meta(ge=0, le=MAX_DURATION_S, extra={"kind": "duration"})]
"""Seconds."""
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
Percent = Annotated[float, msgspec.Meta(ge=0, le=100)]
File = Annotated[str, msgspec.Meta(extra={"kind": "path"})]
"""A path; ``~`` is the home directory, a relative one is relative to the settings file. ``""``: not set."""


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class SpoolSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    root: File = ""  # must be set; holds episodes/ outbox/ shipped/ quarantine/ on one file system
    scan_interval_s: Duration = 10.0
    order: Literal["name", "oldest", "newest"] = "name"


class DestinationSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: str = ""  # must be set to ship, e.g. https://receiver.example:8443
    token_file: File = ""
    commit_field: str = "X-Cis490-Code-Commit"
    ca_file: File = ""
    client_cert: File = ""
    client_key: File = ""
    proof: Literal["receipt", "status"] = "receipt"
    pause_min_s: Duration = 5.0
    pause_max_s: Duration = 300.0
    pause_after: Annotated[int, msgspec.Meta(ge=1)] = 3


Level = Annotated[int, msgspec.Meta(ge=-7, le=22)]


class PackSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Level | Literal["auto"] = "auto"
    level_min: Level = 1
    level_max: Level = 9
    frame_bytes: Annotated[int, msgspec.Meta(ge=4096, le=1 << 30, extra={"kind": "size"})] = 8 << 20
    threads: Count = 0
    owner: Literal["keep", "zero"] = "keep"
    page_cache: Literal["as-found", "keep", "drop"] = "as-found"


class WorkersSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    count: Count = 0
    heartbeat_timeout_s: Duration = 30.0
    stall_report_s: Duration = 120.0
    drain_timeout_s: Duration = 60.0
    poison_after: Annotated[int, msgspec.Meta(ge=1)] = 3


class UploadSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    connections: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    bandwidth: Size = 0
    one_shot_bytes: Size = 4 << 20
    stream_bytes: Size = 8 << 20
    connect_timeout_s: Duration = 10.0
    stall_timeout_s: Duration = 30.0
    answer_timeout_s: Duration = 120.0
    retries: Count = 5
    retry_min_s: Duration = 0.5
    retry_max_s: Duration = 30.0


class HostSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    nice: Annotated[int, msgspec.Meta(ge=0, le=19)] = 10
    io_class: Literal["none", "best-effort", "idle"] = "best-effort"
    io_priority: Annotated[int, msgspec.Meta(ge=0, le=7)] = 7
    reserved_cores: Count = 0
    memory_limit_bytes: Size = 0
    give_way: bool = True
    pause_max_s: Duration = 600.0
    memory_pressure_limit: Percent = 10.0
    io_pressure_limit: Percent = 0.0
    load_limit: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class DiskSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    reserve_bytes: Size = 10 << 30
    reserve_percent: Percent = 5.0
    outbox_limit_bytes: Size = 0


class RetentionSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    quarantine_keep_days: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    quarantine_cleanup_interval_s: Duration = 3600.0
    shipped_keep_days: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    shipped_max_bytes: Size = 0
    shipped_make_room: bool = False


class ReceiverSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    root: File = ""
    listen: str = "127.0.0.1:8490"
    workers: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    token_file: File = ""
    commits_file: File = ""
    commit_field: str = "X-Cis490-Code-Commit"
    tls_cert: File = ""
    tls_key: File = ""
    client_ca: File = ""
    verify: Literal["content", "artifact"] = "content"
    read_back: bool = False
    max_bytes: Size = 0
    max_ratio: Count = 1000
    reserve_bytes: Size = 512 << 20
    sync_bytes: Annotated[int, msgspec.Meta(ge=1 << 16, extra={"kind": "size"})] = 32 << 20
    upload_max_age_s: Duration = 7 * 86400.0
    max_requests: Annotated[int, msgspec.Meta(ge=1)] = 256
    max_connections: Annotated[int, msgspec.Meta(ge=1)] = 1000
    max_uploads: Annotated[int, msgspec.Meta(ge=1)] = 20_000
    token_rate: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    token_uploads: Count = 2000
    token_upload_bytes: Size = 0
    token_stored_bytes: Size = 0


class LogSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"


class Settings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All sections. ``Settings.load()`` is how one is made; ``Settings()`` alone has no spool and no destination."""

    spool: SpoolSettings = SpoolSettings()
    destination: DestinationSettings = DestinationSettings()
    pack: PackSettings = PackSettings()
    workers: WorkersSettings = WorkersSettings()
    upload: UploadSettings = UploadSettings()
    host: HostSettings = HostSettings()
    disk: DiskSettings = DiskSettings()
    retention: RetentionSettings = RetentionSettings()
    receiver: ReceiverSettings = ReceiverSettings()
    log: LogSettings = LogSettings()

    @classmethod
    def load(
        cls,
        path: Path | str | None = None,
        *,
        profile: str | None = None,
        overrides: Iterable[str] = (),
        values: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Settings:
        """Settings from a file (None: from none), a profile's name, ``section.key=value`` texts and plain values.

        Raises `SettingsError`. ``values`` is for programs: ``{"spool": {"root": "/data"}}``, the last layer.
        """
        from fastship.settings.layers import load_layers  # it reads what stands here

        return load_layers(path, profile=profile, overrides=overrides, values=values).settings
