"""What the receiver found, beside the receipt here: what counts as equal, and what is said where it is not."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from sample import manifest_of, receipt_of

from fastship.custody import Ledger, _judge
from fastship.episode import Receipt, ReceivedArtifact, ReceivedContent
from fastship.errors import SpoolError, UsageError
from fastship.settings import Settings, SpoolSettings
from fastship.spool import Spool
from fastship.upload import Reread

RECEIPT = Receipt(
    episode="ep1",
    artifact=ReceivedArtifact("aa" * 32, 10),
    content=ReceivedContent("bb" * 32, 20, 1),
    verified="content",
)
UNPACKED_BY_NOBODY = msgspec.structs.replace(RECEIPT, content=None, verified="artifact")
SOUND = Reread(episode="ep1", verdict="sound", artifact_sha256="aa" * 32, content_blake3="bb" * 32)


def found(**changes: object) -> Reread:
    return msgspec.structs.replace(SOUND, **changes)


@pytest.mark.parametrize(
    ("found", "receipt", "state"),
    [
        (SOUND, RECEIPT, "equal"),
        (found(verdict="mended"), RECEIPT, "equal"),
        (found(artifact_sha256="cc" * 32), RECEIPT, "equal"),  # packed otherwise: the content is the identity
        (found(content_blake3="cc" * 32), RECEIPT, "differs"),
        (found(content_blake3=None), RECEIPT, "equal"),
        (found(content_blake3=None, artifact_sha256="cc" * 32), RECEIPT, "differs"),
        (SOUND, UNPACKED_BY_NOBODY, "equal"),
        (found(artifact_sha256="cc" * 32), UNPACKED_BY_NOBODY, "differs"),
        (SOUND, None, "equal"),
        (found(verdict="missing"), RECEIPT, "missing"),
        (found(verdict="rotted"), RECEIPT, "rotted"),
        (found(verdict="rotted"), None, "rotted"),
        (found(verdict="failed"), RECEIPT, "unknown"),
        (found(verdict="failed"), None, "unknown"),
        (found(verdict="something new"), None, "unknown"),
    ],
)
def test_what_counts_as_equal(found: Reread, receipt: Receipt | None, state: str) -> None:
    judged, error = _judge(found, receipt)
    assert judged == state
    assert bool(error) == (state != "equal")


def test_only_what_was_retired_can_be_asked_for(tmp_path: Path) -> None:
    settings = Settings(spool=SpoolSettings(root=str(tmp_path / "spool")))
    with pytest.raises(SpoolError, match="is not a spool yet"):
        Ledger(settings)
    assert not (tmp_path / "spool").exists()
    spool = Spool(tmp_path / "spool")
    spool.create()
    (spool.paths.episodes / "ep1").mkdir()
    manifest = manifest_of("ep1")
    assert spool.retire([("ep1", receipt_of(manifest), manifest)]) == {}
    (spool.paths.shipped / "without-receipt").mkdir()
    ledger = Ledger(settings)
    assert list(ledger.episodes()) == ["ep1"]
    ledger.require(["ep1", "without-receipt"])
    with pytest.raises(UsageError, match="there is no receipt of ep2"):
        ledger.require(["ep1", "ep2"])
