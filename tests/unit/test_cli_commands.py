"""The commands, run in this process as the console script runs them: output, exit codes, and words for mistakes."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from kept_logging import logging_kept
from lab import Destination, Lab, Reply

from fastship import cli
from fastship.cli import setup
from fastship.errors import FastshipError
from fastship.settings import Settings


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


class Run:
    """Runs a command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> Ran:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = self._capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ran(ended.value.code, out, err)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """In an empty directory, without settings of the host."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTSHIP_CONFIG", raising=False)
    monkeypatch.delenv("FASTSHIP_DEBUG", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where tracebacks go
    with logging_kept():
        yield Run(capsys)


# -- the frame of all commands -------------------------------------------------------------------------------

COMMANDS = ["demo", "init", "run", "once", "receive", "status"]
COMMANDS += ["quarantine", "holds", "verify", "scrub", "pack", "ls", "extract", "config", "bench", "tune"]


def test_help_names_every_command_and_the_exit_codes(run: Run) -> None:
    ran = run("--help")
    assert ran.code == 0
    listed = [
        line.split()[0]
        for line in ran.out.partition("Commands:")[2].splitlines()
        if line.startswith("  ") and line.strip()
    ]
    assert listed[: len(COMMANDS)] == COMMANDS
    for code in ("0 ", "2 ", "3 ", "4 ", "5 ", "70 "):
        assert code in ran.out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(run: Run, command: str) -> None:
    ran = run(command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"Usage: fastship {command}" in ran.out


def test_the_readme_names_every_command_and_each_flag_of_the_main_ones() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert set(COMMANDS) == set(cli.fastship.commands)
    for name in COMMANDS:
        assert f"`fastship {name}" in readme
    for name in ("demo", "init", "receive", "bench", "tune"):
        flags = {flag for option in cli.fastship.commands[name].params for flag in option.opts if flag.startswith("--")}
        for flag in flags - {"--quiet", "--debug", "--json", "--config", "--profile", "--set"}:
            assert f"[{flag}" in readme or f" {flag} " in readme


def test_version(run: Run) -> None:
    assert run("--version").out.startswith("fastship ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["--nonsense"], "No such option"),
        (["pack"], "Missing argument 'DIR'"),
        (["pack", "x"], "Missing option"),
        (["receive", "--workers", "0", "--root", "r"], "--workers"),
        (["receive"], "no place to store"),
        (["receive", "--root", "r", "--token-file", "gone"], "gone: no such file"),
        (["pack", "gone", "-o", "x"], "gone: No such file or directory"),
        (["pack", "/", "-o", "x"], "/ has no name"),
        (["ls", "gone"], "gone: No such file"),
        (["ls", "."], "is a directory"),
        (["extract", "gone", "-C", "y"], "gone: No such file"),
        (["demo", "--from", "gone"], "gone: No such file"),
        (["demo", "--seconds", "0"], "--seconds"),
    ],
)
def test_wrong_use_is_told_and_exits_2(run: Run, arguments: list[str], said: str) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("fastship: error: ")
    assert said in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("arguments", "said", "remedy"),
    [
        (["once"], "spool.root is not set", "fastship init"),
        (["run", "--set", "spool.root=s"], "destination.url is not set", "-c FILE"),
        (["status"], "spool.root is not set", "fastship init"),
        (["config", "show", "-c", "gone.toml"], "gone.toml: no such settings file", "fastship init"),
        (["config", "show", "--set", "pakc.level=3"], "unknown section pakc", "did you mean pack"),
        (["config", "show", "--profile", "archiv"], "unknown profile archiv", "did you mean archive"),
        (["config", "show", "--set", "pack.level"], "section.key=value", "pack.level=6"),
        (["pack", ".", "-o", "x", "--set", "pack.owner=me"], 'pack.owner = "me"', "keep"),
        (["receive", "--root", "r", "--listen", "here"], 'receiver.listen = "here"', "HOST:PORT"),
    ],
)
def test_wrong_settings_are_told_and_exit_3(run: Run, arguments: list[str], said: str, remedy: str) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out) == (3, "")
    told, tried = ran.err.splitlines()
    assert told.startswith("fastship: error: ")
    assert tried.startswith("  try: ")
    assert said in told
    assert remedy in tried


def test_an_unexpected_error_leaves_its_traceback_in_a_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("nobody foresaw this")

    monkeypatch.setattr(setup, "_values", fail)
    ran = run("config", "show")
    assert ran.code == 70
    assert "Traceback" not in ran.err
    assert "nobody foresaw this" in ran.err
    named = ran.err.rstrip().rpartition(" ")[2]
    assert "RuntimeError: nobody foresaw this" in Path(named).read_text()
    shown = run("config", "show", "--debug")
    assert shown.code == 70
    assert "Traceback" in shown.err


def test_what_may_not_be_read_is_told_with_its_name_and_is_no_fault_of_fastship(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/spool/episodes")

    monkeypatch.setattr(setup, "_values", refused)
    ran = run("config", "show")
    assert ran.code == 2
    assert ran.err.startswith("fastship: error: /spool/episodes: Permission denied\n  try: run it as a user who may")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EROFS])
def test_a_fault_of_the_host_is_told_with_what_to_do_and_leaves_no_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: int
) -> None:
    def failing(*_: object) -> None:
        raise OSError(fault, os.strerror(fault), "/spool/episodes")

    monkeypatch.setattr(setup, "_values", failing)
    ran = run("config", "show")
    assert ran.code == 70
    assert ran.err.startswith(f"fastship: error: {os.strerror(fault)}: /spool/episodes\n  try: ")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["run", "once", "status", "quarantine drop -y ep", "holds list", "verify --all"])
def test_no_spool_is_made_where_there_is_none(run: Run, tmp_path: Path, command: str) -> None:
    """Its disk may not be mounted yet."""
    (tmp_path / "mount").mkdir()
    url = ("--set", "destination.url=http://127.0.0.1:9")
    ran = run(*command.split(), "--set", f"spool.root={tmp_path / 'mount'}", *url)
    assert ran.code == 3
    assert "mount is not a spool yet: it has no episodes\n  try: mount its disk" in ran.err
    assert os.listdir(tmp_path / "mount") == []


def test_every_error_of_ours_is_a_sentence_with_its_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def descend(kind: type[FastshipError]) -> list[type[FastshipError]]:
        return [kind, *(one for below in kind.__subclasses__() for one in descend(below))]

    for kind in descend(FastshipError):
        error = kind("it is\x1b[2J so", remedy="do this")

        def fail(*_: object, error: FastshipError = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(setup, "_values", fail)
        assert run("config", "show") == Ran(kind.exit_code, "", "fastship: error: it is\\033[2J so\n  try: do this\n")


def test_an_interrupt_while_a_command_loads_ends_it_quietly() -> None:
    script = (
        "import os, signal, sys\n"
        "from fastship.__main__ import main\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'fastship.cli': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "main()\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (-signal.SIGINT, "", "")


def test_interrupted_is_130_without_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "_values", interrupt)
    ran = run("config", "show")
    assert (ran.code, ran.out) == (130, "")
    assert ran.err.strip() == "fastship: error: interrupted"


def test_a_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-m", "fastship", "config", "show", "--json"]
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("closing", "code"), [("<&-", 0), (">&-", 70), ("2>&-", 0), ("<&- 2>&-", 0), ("<&- >&- 2>&-", 70)]
)
def test_closed_streams_spoil_nothing(episode: Path, tmp_path: Path, closing: str, code: int) -> None:
    told = f"{sys.executable} -m fastship config show {closing}"
    ran = subprocess.run(["sh", "-c", told], cwd=tmp_path, stderr=subprocess.PIPE, timeout=60)
    assert (ran.returncode, b"Traceback" in ran.stderr) == (code, False)
    packed = f"{sys.executable} -m fastship pack ep-1 -o x {closing}"
    assert subprocess.run(["sh", "-c", packed], cwd=tmp_path, timeout=60).returncode in {0, code}
    assert subprocess.run(["zstd", "-tq", tmp_path / "x"]).returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["at the end", "at each line"])
@pytest.mark.parametrize("arguments", [["config", "show"], ["config", "show", "--json"]])
def test_a_full_disk_under_standard_output_is_told(unbuffered: str, arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "fastship", *arguments]
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, env=environment)
    assert ran.returncode == 70
    assert ran.stderr.startswith(
        b"fastship: error: standard output cannot be written: No space left on device\n  try: "
    )
    assert ran.stderr.count(b"\n") == 2


@pytest.mark.parametrize("arguments", [["--help"], ["status"], ["config", "show"], ["holds", "list"]])
def test_looking_loads_neither_curl_nor_zstd_nor_a_server(tmp_path: Path, arguments: list[str]) -> None:
    """Start-up stays quick only as long as nobody imports these at the top of a module."""
    code = (
        "import sys\nfrom fastship import cli\n"
        "heavy = {'pycurl', 'zstandard', 'uvicorn', 'rich', 'blake3'}\n"
        "try:\n    cli.main(sys.argv[1:])\n"
        "finally:\n    print(*sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    subprocess.run([sys.executable, "-m", "fastship", "init", "-q", tmp_path / "s"], check=True, timeout=60)
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path / "s", capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, ran.stderr.strip()) == (0, "")


# -- init and config -----------------------------------------------------------------------------------------


def test_init_makes_a_spool_whose_settings_load(run: Run, tmp_path: Path) -> None:
    ran = run("init", "lab", "--url", "https://receiver.example:8443")
    assert ran.code == 0
    assert "fastship run -c lab/fastship.toml" in ran.out
    settings = Settings.load("lab/fastship.toml")
    assert settings.spool.root == str(tmp_path / "lab")
    assert settings.destination.url == "https://receiver.example:8443"
    assert {"episodes", "outbox", "shipped", "quarantine"} <= {path.name for path in (tmp_path / "lab").iterdir()}
    assert run("config", "check", "-c", "lab/fastship.toml").code == 0


def test_what_init_says_to_type_next_can_be_typed(run: Run, tmp_path: Path) -> None:
    ran = run("init", "my lab's", "--url", "https://receiver.example")
    command = next(line for line in ran.out.splitlines() if "config check" in line)
    assert run(*shlex.split(command)[1:]).code == 0


def test_init_overwrites_nothing_and_makes_nothing_for_a_wrong_url(run: Run, tmp_path: Path) -> None:
    assert run("init", "lab", "--url", "receiver:8443").code == 3
    assert not (tmp_path / "lab").exists()
    assert run("init", "lab").code == 0
    (tmp_path / "lab/fastship.toml").write_text("# mine\n")
    assert run("init", "lab").code == 2
    assert (tmp_path / "lab/fastship.toml").read_text() == "# mine\n"


def test_an_init_that_is_cut_short_leaves_no_settings_and_may_be_repeated(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr("fastship.durable.write_all", full)
        ran = run("init", "lab", "--url", "http://r.example")
        assert ran.code == 2
        assert "No space left" in ran.err
    assert not list((tmp_path / "lab").glob("fastship.toml*"))
    assert run("init", "lab", "--url", "http://r.example").code == 0
    assert Settings.load(tmp_path / "lab" / "fastship.toml").destination.url == "http://r.example"


def test_init_completes_an_older_tools_spool_and_touches_no_episode(run: Run, tmp_path: Path) -> None:
    old = tmp_path / "old"
    (old / "episodes" / "ep1").mkdir(parents=True)
    (old / "episodes" / "ep1" / "done.marker").touch()
    (old / "quarantine" / "ep0").mkdir(parents=True)
    assert run("init", "old", "--url", "http://h").code == 0
    assert (old / "episodes" / "ep1" / "done.marker").exists()
    assert run("config", "check", "-c", "old/fastship.toml").code == 0
    assert run("status", "--json", "-c", "old/fastship.toml").json()["ready"] == 1


def test_init_with_quotes_in_its_url_cannot_break_the_file(run: Run) -> None:
    assert run("init", "lab", "--url", 'http://h/"x').code == 0
    assert Settings.load("lab/fastship.toml").destination.url == 'http://h/"x'


def test_config_show_reads_back_as_the_same_settings(run: Run, tmp_path: Path) -> None:
    changes = ["pack.frame_bytes=3000001", "upload.bandwidth=1.5MB", "spool.scan_interval_s=90", "pack.owner=zero"]
    flags = [part for text in changes for part in ("--set", text)]
    ran = run("config", "show", "--profile", "archive", "--set", 'spool.root=/a "b"\\c', *flags)
    (tmp_path / "again.toml").write_text(ran.out)
    assert Settings.load(tmp_path / "again.toml") == Settings.load(
        profile="archive", overrides=['spool.root=/a "b"\\c', *changes]
    )


def test_config_show_origin(run: Run, tmp_path: Path) -> None:
    (tmp_path / "fastship.toml").write_text("[pack]\nlevel = 4\n")
    ran = run("config", "show", "--origin", "--set", "pack.threads=2")
    lines = {line.split(" = ")[0]: line.partition("# ")[2] for line in ran.out.splitlines() if " = " in line}
    assert lines["level"] in {"fastship.toml", "profile default"}
    assert "threads = 2" in ran.out
    assert lines["threads"] == "--set pack.threads=2"
    assert tomllib.loads(ran.out)["pack"]["level"] == 4
    document = run("config", "show", "--origin", "--json").json()
    assert document["pack"]["level"] == {"value": 4, "origin": "fastship.toml"}
    assert run("config", "show", "--json").json()["pack"]["level"] == 4


def test_config_check_names_every_problem(run: Run, tmp_path: Path) -> None:
    run("init", "lab")
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o644)
    (tmp_path / "empty").touch(mode=0o600)
    (tmp_path / "lab/shipped").rmdir()
    flags = ["--set", "destination.token_file=token", "--set", "destination.ca_file=gone.pem"]
    flags += ["--set", "destination.client_cert=empty", "--set", "destination.client_key=empty"]
    ran = run("config", "check", "-c", "lab/fastship.toml", *flags)
    assert ran.code == 3
    for part in ("destination.url is not set", "chmod o-r", "gone.pem: No such file", "empty: is empty", "lab/shipped"):
        assert part in ran.err
    problems = run("config", "check", "-c", "lab/fastship.toml", "--json", *flags).json()["problems"]
    assert len(problems) == 6


def test_config_check_tells_what_this_host_cannot_do_and_refuses_a_memory_that_is_too_small(run: Run) -> None:
    run("init", "lab", "--url", "http://127.0.0.1:1")
    check = ("config", "check", "-c", "lab/fastship.toml", "--set")
    ran = run(*check, "host.reserved_cores=4096")
    assert ran.code == 0
    assert "note: host.reserved_cores = 4096: of " in ran.out
    told = run(*check, "host.reserved_cores=4096", "--json").json()
    assert told["ok"] is True
    assert any("reserved_cores" in note for note in told["notes"])
    ran = run(*check, "host.memory_limit_bytes=32MiB")
    assert ran.code == 3
    assert "host.memory_limit_bytes = 32MiB is less than a worker takes with one thread" in ran.err
    ran = run("once", "-c", "lab/fastship.toml", "--set", "host.memory_limit_bytes=32MiB")
    assert ran.code == 3
    assert "raise it to " in ran.err


# -- pack, ls, extract ---------------------------------------------------------------------------------------


@pytest.fixture
def episode(tmp_path: Path) -> Path:
    directory = tmp_path / "ep-1"
    (directory / "sub").mkdir(parents=True)
    (directory / "a.csv").write_bytes(b"1,2,3\n" * 5000)
    (directory / "sub" / "odd\nname").write_bytes(b"x")
    (directory / "done.marker").touch()
    return directory


def test_pack_ls_extract_go_round(run: Run, episode: Path, tmp_path: Path) -> None:
    packed = run("pack", "ep-1", "-o", "ep-1.tar.zst", "--json")
    assert packed.code == 0
    document = packed.json()
    assert document["artifact"]["bytes"] == (tmp_path / "ep-1.tar.zst").stat().st_size
    assert len(document["artifact"]["sha256"]) == len(document["content"]["blake3"]) == 64
    assert (document["content"]["members"], document["frames"]) == (5, 1)
    assert document["cpu_seconds"] > 0
    assert document["seconds"] > 0
    assert not (tmp_path / "ep-1.tar.zst.partial").exists()

    assert run("ls", "ep-1.tar.zst").out.splitlines() == [
        "ep-1/",
        "ep-1/a.csv",
        "ep-1/done.marker",
        "ep-1/sub/",
        "ep-1/sub/odd\\nname",
    ]
    assert run("ls", "-l", "ep-1.tar.zst").out.splitlines()[1].split()[2] == "30000"
    assert run("ls", "--json", "ep-1.tar.zst").json()[4]["name"] == "ep-1/sub/odd\nname"

    ran = run("extract", "ep-1.tar.zst", "-C", "out")
    assert (ran.code, ran.out) == (0, "")
    assert "extracted 5 members, 30.0 kB" in ran.err
    assert (tmp_path / "out/ep-1/a.csv").read_bytes() == (episode / "a.csv").read_bytes()
    one = run("extract", "ep-1.tar.zst", "ep-1/sub", "-C", "one", "--json")
    assert one.json()["bytes"] == 1
    assert not (tmp_path / "one/ep-1/a.csv").exists()


def test_pack_to_standard_output_is_the_same_artifact(episode: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastship", "pack", "ep-1", "-q", "-o"]
    subprocess.run([*command, "file"], cwd=tmp_path, check=True, timeout=60)
    piped = subprocess.run([*command, "-"], cwd=tmp_path, check=True, timeout=60, capture_output=True)
    assert piped.stdout == (tmp_path / "file").read_bytes()
    assert piped.stderr == b""


def test_pack_dot_uses_the_directorys_own_name(run: Run, episode: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(episode)
    assert run("pack", ".", "-o", "../x.tar.zst").code == 0
    assert run("ls", "../x.tar.zst").out.startswith("ep-1/\n")


def test_pack_replaces_only_when_told(run: Run, episode: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    ran = run("pack", "ep-1", "-o", "x")
    assert ran.code == 2
    assert "--force" in ran.err
    assert (tmp_path / "x").read_text() == "mine"
    assert run("pack", "ep-1", "-o", "x", "--force").code == 0
    assert run("ls", "x").code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "ep-1/inside"], "inside the directory"),
        (["-o", "gone/x"], "No such file"),
        (["-o", "ep-1"], "is a directory"),
        (["-o", ""], "no FILE"),
        (["-o", "."], "is a directory"),
        (["-o", "/"], "is a directory"),
        (["-o", "new/"], "is a directory"),
        (["-o", "fifo", "--force"], "only a file is replaced"),
        (["-o", "-", "--json"], "both want standard output"),
    ],
)
def test_pack_refuses_an_output_that_cannot_be(run: Run, episode: Path, arguments: list[str], said: str) -> None:
    os.mkfifo(episode.parent / "fifo")  # as /dev/null is: for root, replacing it would harm all
    before = sorted(episode.parent.rglob("*"))
    ran = run("pack", "ep-1", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert sorted(episode.parent.rglob("*")) == before


def test_force_keeps_a_link_and_replaces_what_it_leads_to(run: Run, episode: Path, tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("real")
    (tmp_path / "real").write_text("old")
    assert run("pack", "ep-1", "-o", "x", "--force").code == 0
    assert os.readlink(tmp_path / "x") == "real"
    assert run("ls", "real").code == 0


def test_pack_works_where_there_are_no_hard_links(
    run: Run, episode: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise PermissionError(errno.EPERM, "as vfat says")

    monkeypatch.setattr(os, "link", link)
    assert run("pack", "ep-1", "-o", "x").code == 0
    assert run("pack", "ep-1", "-o", "x").code == 2
    assert run("ls", "x").code == 0


def test_extract_of_nothing_makes_no_directory(run: Run, episode: Path, tmp_path: Path) -> None:
    assert run("extract", "nope", "-C", "out").code == 2
    assert not (tmp_path / "out").exists()


def test_a_pack_that_fails_leaves_no_file(run: Run, episode: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastship", "pack", "ep-1", "-o", "x"]
    limit = "import resource, signal, os, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); os.execv(sys.argv[1], sys.argv[1:])"
    ran = subprocess.run(
        [sys.executable, "-c", limit, *command], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode != 0
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.partial").exists()


def test_extract_tells_what_is_wrong(run: Run, episode: Path, tmp_path: Path) -> None:
    run("pack", "ep-1", "-o", "x")
    assert run("extract", "x", "ep-1/nothing", "-C", "out").code == 4
    assert run("extract", "x", "-C", "out").code == 0
    again = run("extract", "x", "-C", "out")
    assert again.code == 4
    assert "not overwritten" in again.err
    assert run("extract", "x", "-C", "x").code == 2
    data = bytearray((tmp_path / "x").read_bytes())
    data[len(data) // 3] ^= 0xFF
    (tmp_path / "x").write_bytes(data)
    damaged = run("extract", "x", "-C", "out2")
    assert damaged.code == 4
    assert "Traceback" not in damaged.err
    assert run("ls", "ep-1/a.csv").code == 4


def test_what_tar_and_zstd_made_is_read_as_well(run: Run, episode: Path, tmp_path: Path) -> None:
    import zstandard

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(episode, "ep-1")
    (tmp_path / "x.tar.zst").write_bytes(zstandard.compress((tmp_path / "x.tar").read_bytes()))
    assert "ep-1/a.csv" in run("ls", "x.tar.zst").out
    assert run("extract", "x.tar.zst", "-C", "out").code == 0
    assert (tmp_path / "out/ep-1/a.csv").read_bytes() == (episode / "a.csv").read_bytes()


# -- once, status, holds, quarantine: with a server ----------------------------------------------------------


def test_once_ships_and_counts(run: Run, lab: Lab) -> None:
    lab.episode("ep1")
    lab.episode("ep2")
    lab.episode("unfinished", marker=False)
    ran = run("once", "--json", "-c", lab.settings_file())
    assert ran.code == 0
    counts = ran.json()
    assert {
        "scanned",
        "shipped",
        "transient_failures",
        "conflicts",
        "fatal",
        "bytes_in",
        "bytes_out",
        "seconds",
    } == set(counts)
    assert (counts["scanned"], counts["shipped"]) == (2, 2)
    assert 0 < counts["bytes_out"] < counts["bytes_in"]
    assert "ep1 shipped" in ran.err
    quiet = run("once", "-q", "-c", lab.settings_file())
    assert quiet == Ran(0, "", "")
    assert run("once", "-c", lab.settings_file()).out == "nothing to ship\n"


def test_once_says_what_was_not_shipped_and_exits_4(run: Run, lab: Lab, destination: Destination) -> None:
    for name in ("ep1", "ep2", "ep3"):
        lab.episode(name)
    destination.say("ep1", Reply(409, b'{"error": "other content"}'))
    destination.say("ep2", Reply(422, b"not for me\x1b[2J"))
    ran = run("once", "-c", lab.settings_file())
    assert ran.code == 4
    assert ran.out.startswith("1 shipped, 1 held (see: fastship holds list), 1 quarantined")
    assert "\x1b" not in ran.out + ran.err

    config = ("-c", lab.settings_file())
    assert [one["episode"] for one in run("holds", "list", "--json", *config).json()] == ["ep1"]
    assert run("holds", "list", *config).out.splitlines()[1].startswith("ep1 ")
    assert [one["name"] for one in run("quarantine", "list", "--json", *config).json()] == ["ep2"]
    shown = run("quarantine", "show", "ep2", *config).out
    assert "422" in shown
    assert "not for me\\033[2J" in shown
    assert run("quarantine", "show", "ep9", *config).code == 2
    assert run("quarantine", "show", "ep2", "--json", *config).json()["quarantined"]["reason"]["status_code"] == 422
    status = run("status", "--json", *config).json()
    assert (status["running"], status["held"], status["quarantined"]) == (False, 1, 1)
    assert "1 held, 1 quarantined" in run("status", *config).out


def test_an_operators_word_on_holds_and_quarantine(run: Run, lab: Lab, destination: Destination) -> None:
    for name in ("ep1", "ep2", "ep3"):
        lab.episode(name)
    destination.say("ep1", Reply(409, b'{"error": "other content"}'))
    destination.say("ep2", Reply(409, b'{"error": "other content"}'))
    destination.say("ep3", Reply(422, b"no"))
    config = ("-c", lab.settings_file())
    assert run("once", "-q", *config).code == 4

    asked = run("holds", "drop-local", "ep2", *config)  # no terminal here to answer on
    assert asked.code == 2
    assert "--yes" in asked.err
    assert run("holds", "drop-local", "ep2", "--yes", *config).code == 0
    assert run("holds", "keep-local", "ep1", "--as", "ep1-again", *config).code == 0
    assert run("holds", "keep-local", "ep7", *config).code == 2
    assert run("holds", "list", *config).out == "nothing is held\n"
    assert lab.names("quarantine") == ["ep2", "ep3"]
    assert run("quarantine", "drop", "ep2", *config).code == 2
    assert run("quarantine", "drop", "ep2", "--yes", *config).code == 0
    assert run("quarantine", "retry", "ep3", "--as", "ep3b", *config).code == 0
    assert run("quarantine", "retry", "a", "b", "--as", "c", *config).code == 2
    assert run("quarantine", "list", *config).out == "nothing is in quarantine\n"
    assert run("once", "-q", *config).code == 0
    assert lab.names("shipped") == ["ep1-again", "ep3b"]


def test_status_of_no_spool(run: Run, tmp_path: Path) -> None:
    ran = run("status", "--set", "spool.root=nothing")
    assert ran.code == 3
    assert "fastship init" in ran.err
    assert not (tmp_path / "nothing").exists()
