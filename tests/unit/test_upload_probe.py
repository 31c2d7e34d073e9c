"""A link is measured by uploads that leave nothing behind, and only where nothing can be left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from lab import Destination, Receiver

from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload import LinkSpeed, LinkUnknown, measure_link
from fastship.upload.curl import Ended, Transfers
from fastship.upload.probe import _Append, _rate

UPLOAD = UploadSettings(retries=0, answer_timeout_s=5.0, stall_timeout_s=5.0)
SECONDS = 0.3


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    root = tmp_path_factory.mktemp("probe")
    (root / "tokens").write_text("sesame-sesame\n")
    (root / "commits").write_text("a" * 40 + "\n")
    (root / "token").write_text("sesame-sesame\n")
    files = ("--token-file", root / "tokens", "--commits", root / "commits")
    with contextlib.closing(Receiver(root / "store", *files, "--set", "receiver.reserve_bytes=0")) as started:
        yield started


def destination(receiver: Receiver) -> DestinationSettings:
    return DestinationSettings(url=receiver.url, token_file=str(receiver.root.parent / "token"))


def assert_empty(receiver: Receiver) -> None:
    assert not [*receiver.root.glob("uploads/*.part"), *receiver.root.glob("uploads/*.json")]
    assert receiver.stored() == set()


@pytest.mark.parametrize("connections", [1, 3])
def test_a_receiver_tells_its_rate_and_keeps_nothing(receiver: Receiver, connections: int) -> None:
    found = measure_link(
        destination(receiver),
        UPLOAD,
        connections=connections,
        seconds=SECONDS,
        limit_bytes=8_000_000,
        code_commit="a" * 40,
    )
    assert isinstance(found, LinkSpeed)
    assert found.bytes_per_s > 0
    assert found.connections == connections
    assert found.sent_bytes > 0
    assert_empty(receiver)


def test_the_limit_of_bandwidth_counts(receiver: Receiver) -> None:
    limited = UploadSettings(bandwidth=1_000_000)
    found = measure_link(
        destination(receiver), limited, connections=2, seconds=1.0, limit_bytes=8_000_000, code_commit="a" * 40
    )
    assert isinstance(found, LinkSpeed)
    assert found.bytes_per_s < 2_000_000
    assert_empty(receiver)


def test_what_refuses_is_told(receiver: Receiver) -> None:
    found = measure_link(destination(receiver), UPLOAD, connections=1, seconds=SECONDS, code_commit="b" * 40)
    assert isinstance(found, LinkUnknown)
    assert "commit" in found.reason
    stranger = DestinationSettings(url=receiver.url)
    found = measure_link(stranger, UPLOAD, connections=1, seconds=SECONDS)
    assert isinstance(found, LinkUnknown)
    assert "token" in found.reason
    assert_empty(receiver)


def test_to_a_server_that_stores_what_comes_nothing_is_sent() -> None:
    with contextlib.closing(Destination()) as server:
        found = measure_link(DestinationSettings(url=server.url), UPLOAD, connections=1, seconds=SECONDS)
        assert isinstance(found, LinkUnknown)
        assert "would be stored" in found.reason
        assert server.offers() == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_a_destination_that_is_not_there_is_told(url: str) -> None:
    found = measure_link(DestinationSettings(url=url), UPLOAD, connections=1, seconds=SECONDS)
    assert isinstance(found, LinkUnknown)
    assert found.reason


@pytest.mark.parametrize("at_once", [False, True])
def test_an_interrupted_measuring_takes_its_uploads_back(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """Also when the answers to both creations are taken at once, and the first is where it is interrupted."""
    from fastship.upload import probe

    poll = Transfers.poll
    held: list[Ended[int]] = []

    def poll_together(self: Transfers[int], timeout_s: float) -> list[Ended[int]]:
        """What asks whether uploads are kept as it comes, then both creations."""
        held.extend(poll(self, timeout_s))
        if len(held) == 1 and getattr(held[0].result, "status", 0) == 201:
            return []
        ended, held[:] = list(held), []
        return ended

    if at_once:
        monkeypatch.setattr(Transfers, "poll", poll_together)
    append = probe._append

    def interrupt(*_: object) -> None:
        """While the other upload may be there or not."""
        monkeypatch.setattr(Transfers, "poll", poll)
        monkeypatch.setattr(probe, "_append", append)
        raise KeyboardInterrupt

    monkeypatch.setattr(probe, "_append", interrupt)
    monkeypatch.setattr(probe, "_CANCEL_S", 60.0)  # a disk that others write to takes its time for a new upload
    with pytest.raises(KeyboardInterrupt):
        measure_link(destination(receiver), UploadSettings(), connections=2, seconds=SECONDS, code_commit="a" * 40)
    assert_empty(receiver)


def test_lines_are_counted_while_all_of_them_share_the_link() -> None:
    """Two connections on 1 MB/s: alone for 2 s, both for 4 s, the other alone for 2 s."""
    first = [_Append(0, 2, 2_000_000), _Append(2, 6, 2_000_000)]
    second = [_Append(2, 6, 2_000_000), _Append(6, 8, 2_000_000)]
    assert _rate([first, second]) == pytest.approx(1e6)
    assert _rate([first]) == pytest.approx(4e6 / 6)
    assert _rate([[_Append(0, 2, 2_000_000)], [_Append(2, 4, 2_000_000)]]) == pytest.approx(1e6)
