"""Settings: that what is documented is what is built, and that every mistake is told in words."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastship.errors import EXIT_SETTINGS, SettingsError
from fastship.settings import Settings, find_settings_file, layers, load_layers, units

CONF = Path(__file__).parents[2] / "conf"


def all_keys() -> list[str]:
    return [
        f"{section}.{key}"
        for section in Settings.__struct_fields__
        for key in getattr(Settings(), section).__struct_fields__
    ]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_may_begin_with_a_byte_order_mark_and_have_lines_of_windows(tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_bytes(b"\xef\xbb\xbf[pack]\r\nlevel = 7\r\n")
    assert Settings.load(tmp_path / "f.toml").pack.level == 7


# -- conf/default.toml is the documentation ------------------------------------------------------------------


def test_default_profile_names_every_setting_and_no_other() -> None:
    written = tomllib.loads((CONF / "default.toml").read_text())
    assert [f"{section}.{key}" for section, keys in written.items() for key in keys] == all_keys()


def test_default_profile_values_equal_the_built_in_ones() -> None:
    loaded = load_layers(None)
    assert loaded.settings == Settings()
    assert set(loaded.origins) == set(all_keys())
    assert set(loaded.origins.values()) == {"profile default"}


def test_every_setting_has_a_comment_of_its_group() -> None:
    """A key stands under a comment, or under a key of a comment that names it or speaks of both."""
    bare, commented = [], False
    for line in (CONF / "default.toml").read_text().splitlines():
        if line.startswith("#"):
            commented = True
        elif not line or line.startswith("["):
            commented = False
        elif not commented:
            bare.append(line)
    assert bare == []


@pytest.mark.parametrize("name", ["throughput", "balanced", "archive", "lowmem", "ci", "default"])
def test_every_profile_loads(name: str) -> None:
    assert isinstance(Settings.load(profile=name), Settings)
    assert name in layers.profile_names()


def test_a_profile_inherits_and_says_which_values_are_its_own() -> None:
    loaded = load_layers(None, profile="archive")
    assert loaded.settings.pack.level == 18
    assert loaded.origins["pack.level"] == "profile archive"
    assert loaded.origins["upload.retries"] == "profile default"


def test_a_profile_that_inherits_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "default.toml", "")
    write(tmp_path / "a.toml", 'inherits = "b"\n')
    write(tmp_path / "b.toml", 'inherits = "a"\n')
    monkeypatch.setattr(layers, "_conf", lambda: tmp_path)
    with pytest.raises(SettingsError, match="inherits itself"):
        Settings.load(profile="a")


# -- layers --------------------------------------------------------------------------------------------------


def test_later_layers_win_and_the_origin_follows(tmp_path: Path) -> None:
    file = write(tmp_path / "f.toml", 'profile = "archive"\n[pack]\nframe_bytes = "2MiB"\nowner = "zero"\n')
    loaded = load_layers(file, overrides=["pack.owner=keep"], values={"upload": {"retries": 9}})
    assert (loaded.settings.pack.level, loaded.settings.pack.frame_bytes) == (18, 2 << 20)
    assert (loaded.settings.pack.owner, loaded.settings.upload.retries) == ("keep", 9)
    assert loaded.origins["pack.level"] == "profile archive"
    assert loaded.origins["pack.frame_bytes"] == str(file)
    assert loaded.origins["pack.owner"] == "--set pack.owner=keep"
    assert loaded.origins["upload.retries"] == "given directly"


def test_a_level_is_a_number_or_auto() -> None:
    assert Settings().pack.level == Settings.load().pack.level == "auto"
    assert Settings.load(overrides=["pack.level=auto"]).pack.level == "auto"
    assert Settings.load(overrides=['pack.level="auto"', "pack.level_min=-3"]).pack.level_min == -3
    assert Settings.load(overrides=["pack.level=22"]).pack.level == 22
    for wrong in ("automatic", "23", "3.5", "true"):
        with pytest.raises(SettingsError) as caught:
            Settings.load(overrides=[f"pack.level={wrong}"])
        assert caught.value.remedy == 'set pack.level to a whole number from -7 to 22 or "auto"'
    with pytest.raises(SettingsError, match=r"pack\.level_max = 2 is less than pack\.level_min"):
        Settings.load(overrides=["pack.level_min=3", "pack.level_max=2"])


def test_profile_on_the_command_line_beats_the_files(tmp_path: Path) -> None:
    file = write(tmp_path / "f.toml", 'profile = "ci"\n')
    assert Settings.load(file, profile="archive").pack.level == 18


def test_paths_are_relative_to_the_file_or_to_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    home = tmp_path / "home"
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(home))
    file = write(
        tmp_path / "f.toml", '[spool]\nroot = "spool"\n[destination]\ntoken_file = "~/token"\nca_file = "/ca"\n'
    )
    loaded = Settings.load(file, overrides=["receiver.root=store"])
    assert loaded.spool.root == str(tmp_path / "spool")
    assert loaded.destination.token_file == str(home / "token")
    assert loaded.destination.ca_file == "/ca"
    assert loaded.destination.client_cert == ""
    assert loaded.receiver.root == str(elsewhere / "store")


@pytest.mark.parametrize(
    ("text", "section", "key", "value"),
    [
        ("pack.frame_bytes=1MiB", "pack", "frame_bytes", 1 << 20),
        ('pack.frame_bytes="64kB"', "pack", "frame_bytes", 64000),
        ("upload.bandwidth=10MB/s", "upload", "bandwidth", 10_000_000),
        ("spool.scan_interval_s=500ms", "spool", "scan_interval_s", 0.5),
        ("spool.scan_interval_s=3", "spool", "scan_interval_s", 3.0),
        ("spool.root=/data/1", "spool", "root", "/data/1"),
        ("spool.order=oldest", "spool", "order", "oldest"),
        ('spool.order="newest"', "spool", "order", "newest"),
        ("pack.level=-7", "pack", "level", -7),
        ("host.give_way=false", "host", "give_way", False),
        (" pack.level = 4 ", "pack", "level", 4),
        ("destination.url=http://h:1/a=b", "destination", "url", "http://h:1/a=b"),
        ("destination.commit_field=123", "destination", "commit_field", "123"),
    ],
)
def test_overrides_are_read_by_the_type_of_the_setting(text: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(Settings.load(overrides=[text]), section), key) == value


def test_search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTSHIP_CONFIG", raising=False)
    named = write(tmp_path / "named.toml", "")
    monkeypatch.setenv("FASTSHIP_CONFIG", str(named))
    assert find_settings_file() == named
    write(tmp_path / "fastship.toml", "")
    assert find_settings_file() == Path("fastship.toml")
    (tmp_path / "fastship.toml").unlink()
    monkeypatch.setenv("FASTSHIP_CONFIG", str(tmp_path / "gone.toml"))
    with pytest.raises(SettingsError, match="FASTSHIP_CONFIG"):
        find_settings_file()


# -- units ---------------------------------------------------------------------------------------------------


@given(st.integers(min_value=0, max_value=1 << 60))
def test_a_formatted_size_is_read_back(size: int) -> None:
    assert units.parse_size(units.format_size(size)) == size


@given(st.integers(min_value=0, max_value=10**12).map(lambda ms: ms / 1000))
def test_a_formatted_duration_is_read_back(seconds: float) -> None:
    assert units.parse_duration(units.format_duration(seconds)) == pytest.approx(seconds, rel=1e-9)


@pytest.mark.parametrize(("size", "text"), [(0, "0"), (8 << 20, "8MiB"), (64000, "64000"), (1 << 40, "1TiB")])
def test_format_size(size: int, text: str) -> None:
    assert units.format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0s"), (0.5, "500ms"), (90.0, "90s"), (300.0, "5min"), (7200.0, "2h")]
)
def test_format_duration(seconds: float, text: str) -> None:
    assert units.format_duration(seconds) == text


@pytest.mark.parametrize("text", ["", "8 mib", "MiB", "-1", "1iB", "1e9", "8MiB 2", "0.1", "\u0661"])
def test_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="MiB"):
        units.parse_size(text)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 m", "inf", "5 minutes", "1e3"])
def test_not_a_duration(text: str) -> None:
    with pytest.raises(ValueError, match="30s"):
        units.parse_duration(text)


# -- mistakes ------------------------------------------------------------------------------------------------

MISTAKES = [
    ("[spol]\n", ["unknown section spol", "F"], "spool"),
    ("spol = 1\n", ["unknown section spol"], "spool"),
    ("spool = 1\n", ["spool is a section"], "[spool]"),
    ("[pack]\nlevle = 3\n", ["unknown setting pack.levle", "F"], "pack.level"),
    ("[pack]\nzzzzzzzzzz = 3\n", ["unknown setting pack.zzzzzzzzzz"], "pack.threads"),
    ("[pack]\nlevel = 99\n", ["pack.level = 99", "F", "from -7 to 22"], "pack.level"),
    ('[pack]\nlevel = "high"\n', ['pack.level = "high"', "a whole number"], "pack.level"),
    ("[pack]\nlevel = true\n", ["pack.level = True"], "pack.level"),
    ("[host]\ngive_way = 1\n", ["host.give_way = 1", "true or false"], "true or false"),
    ('[host]\nio_class = "low"\n', ['"best-effort"'], "idle"),
    ("[host]\nnice = -5\n", ["host.nice = -5", "from 0 to 19"], "19"),
    ("[pack]\nlevel = 3.0\n", ["pack.level = 3.0"], "pack.level"),
    ('[pack]\nframe_bytes = "8 megs"\n', ['pack.frame_bytes = "8 megs"', "a size like 8MiB from 4KiB to 1GiB"], "size"),
    ("[pack]\nframe_bytes = 100\n", ["pack.frame_bytes = 100", "from 4KiB to 1GiB"], "size"),
    ('[pack]\nowner = "root"\n', ['pack.owner = "root"', 'one of "keep", "zero"'], "keep"),
    ('[spool]\nscan_interval_s = "soon"\n', ['spool.scan_interval_s = "soon"', "a time like 30s"], "time"),
    ("[spool]\nscan_interval_s = -1\n", ["spool.scan_interval_s = -1"], "time"),
    ("[spool]\nscan_interval_s = inf\n", ["spool.scan_interval_s = inf"], "time"),
    ("[spool]\nscan_interval_s = nan\n", ["spool.scan_interval_s = nan"], "time"),
    ("[spool]\nscan_interval_s = [1]\n", ["spool.scan_interval_s = [1]"], "time"),
    ("[spool]\nroot = 7\n", ["spool.root = 7", "a path"], "path"),
    ('[spool]\nroot = "a\\u0000b"\n', ["spool.root"], "path"),
    ('[spool]\nroot = "~no-such-user-here/x"\n', ["spool.root"], "path"),
    ("[upload]\nconnections = 0\n", ["upload.connections = 0", "from 1 to 64"], "upload.connections"),
    ('[upload]\nretry_max_s = "100ms"\n', ["upload.retry_max_s = 100ms", "upload.retry_min_s", "F"], "raise"),
    ('[destination]\npause_max_s = "1s"\n', ["destination.pause_max_s", "destination.pause_min_s"], "raise"),
    ('[destination]\nurl = "receiver:8443"\n', ['"receiver:8443"', "F", "URL"], "https://"),
    ('[destination]\nurl = "http://h/?a=1"\n', ["destination.url", "URL"], "https://"),
    ('[destination]\ncommit_field = "X: y"\n', ["destination.commit_field", "field name"], "letters"),
    ('[destination]\nclient_key = "k"\n', ["destination.client_key", "without destination.client_cert"], "both"),
    ('[receiver]\ntls_cert = "k"\n', ["receiver.tls_cert", "without receiver.tls_key"], "both"),
    ('[receiver]\nlisten = "localhost"\n', ["receiver.listen", "F"], "HOST:PORT"),
    ('[receiver]\nlisten = "localhost:70000"\n', ["receiver.listen"], "HOST:PORT"),
    ("profile = 3\n", ["profile must be a name"], "default"),
    ('profile = "archiv"\n', ["unknown profile archiv", "F"], "archive"),
    ("[pack\n", ["not valid TOML", "line 1"], "quotes"),
    ("[pack]\nframe_bytes = 8MiB\n", ["not valid TOML", "line 2"], "quotes"),
]


@pytest.mark.parametrize(("text", "said", "remedy"), MISTAKES)
def test_a_mistake_is_told_with_its_place_and_a_remedy(tmp_path: Path, text: str, said: list[str], remedy: str) -> None:
    file = write(tmp_path / "settings.toml", text)
    with pytest.raises(SettingsError) as caught:
        Settings.load(file)
    for part in said:
        assert (str(file) if part == "F" else part) in caught.value.message
    assert remedy in caught.value.remedy
    assert caught.value.exit_code == EXIT_SETTINGS


@pytest.mark.parametrize(
    "text", ["", "pack", "pack.level", "level=3", "=3", "pack.=3", ".level=3", "pakc.level=3", "pack.lvl=3"]
)
def test_a_mistaken_override(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load(overrides=[text])
    assert f"--set {text}" in caught.value.message
    assert caught.value.remedy


def test_an_override_sets_one_value_only() -> None:
    with pytest.raises(SettingsError, match=r"pack\.level"):
        Settings.load(overrides=["pack.level=3\nw=4"])


def test_a_password_in_the_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load(values={"destination": {"url": "https://me:geheim@host"}})
    assert "geheim" not in caught.value.message + caught.value.remedy


@pytest.mark.parametrize(
    ("make", "said"), [(lambda p: None, "no such settings file"), (lambda p: p.mkdir(), "cannot be read")]
)
def test_a_file_that_cannot_be_read(tmp_path: Path, make: Any, said: str) -> None:
    make(tmp_path / "f.toml")
    with pytest.raises(SettingsError, match=said):
        Settings.load(tmp_path / "f.toml")


def test_a_file_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_bytes(b"\xff\xfe[\x00p")
    with pytest.raises(SettingsError, match="not valid TOML"):
        Settings.load(tmp_path / "f.toml")


def test_values_of_a_program_may_be_paths(tmp_path: Path) -> None:
    assert Settings.load(values={"spool": {"root": tmp_path}}).spool.root == str(tmp_path)


def test_sections_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Settings().pack.level = 4  # type: ignore[misc]
