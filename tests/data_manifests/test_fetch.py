"""Fetching against a server that drops connections, ignores Range, flips bytes and hands out hostile archives."""

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mambagen.data_manifests import Manifest, cache_home, fetch, folder_of, present, verify
from mambagen.data_manifests.manifest import PIN_AT_FIRST_FETCH
from mambagen.errors import ResourceError
from tests.data_manifests.server import Behaviour, serving

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def a_manifest(*urls: str, sha256: str = SHA256, **more: Any) -> Manifest:
    return Manifest.model_validate(
        {
            "name": "toy",
            "title": "a toy",
            "kind": "dna",
            "licence": "none",
            "provenance": "made here",
            "files": [{"name": "toy.bin", "urls": urls, "sha256": sha256, "role": "sequence", **more}],
        }
    )


def fetch_quickly(manifest: Manifest, attempts: int = 3, **more: Any) -> Path:
    return fetch(manifest, attempts=attempts, pause=0.01, **more)


def final_files(manifest: Manifest) -> set[str]:
    """What lies under a name that a user would take for the real thing."""
    return {
        path.name
        for path in folder_of(manifest).iterdir()
        if not path.name.startswith(".") and ".part" not in path.name and path.name != "pins.json"
    }


def assert_clean_failure(manifest: Manifest, message: str, **more: Any) -> None:
    with pytest.raises(ResourceError, match=message) as caught:
        fetch_quickly(manifest, **more)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 5
    assert final_files(manifest) == set()
    assert not present(manifest)
    # nothing is left over from unpacking or from pooch's temporary files either
    assert {p.name for p in folder_of(manifest).iterdir()} <= {
        ".lock",
        "toy.bin.part",
        "toy.bin.part.json",
        "pins.json",
    }


def test_a_file_arrives_whole_with_progress_and_a_pin() -> None:
    with serving({"/toy.bin": Behaviour(CONTENT)}) as server:
        manifest = a_manifest(f"{server}/toy.bin", bytes=len(CONTENT))
        seen: list[tuple[str, int, int | None]] = []
        folder = fetch_quickly(manifest, progress=lambda *what: seen.append(what))
    assert (folder / "toy.bin").read_bytes() == CONTENT
    assert folder == cache_home() / "data" / "toy"
    assert seen[-1] == ("toy.bin", len(CONTENT), len(CONTENT))
    (report,) = verify(manifest)
    assert (report.state, report.bytes, report.sha256) == ("ok", len(CONTENT), SHA256)
    pin = json.loads((folder / "pins.json").read_text())["toy.bin"]
    assert (pin["sha256"], pin["bytes"], pin["url"]) == (SHA256, len(CONTENT), f"{server}/toy.bin")


def test_a_second_fetch_asks_the_server_for_nothing() -> None:
    behaviour = Behaviour(CONTENT)
    with serving({"/toy.bin": behaviour}) as server:
        manifest = a_manifest(f"{server}/toy.bin")
        fetch_quickly(manifest)
        fetch_quickly(manifest)
    assert behaviour.asked == [None]


def test_a_dropped_connection_is_taken_up_where_it_stopped() -> None:
    behaviour = Behaviour(CONTENT, drop_after=[100_000, 50_000])
    with serving({"/toy.bin": behaviour}) as server:
        folder = fetch_quickly(a_manifest(f"{server}/toy.bin"))
    assert (folder / "toy.bin").read_bytes() == CONTENT
    assert behaviour.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_run_goes_on_where_an_earlier_one_gave_up() -> None:
    behaviour = Behaviour(CONTENT, drop_after=[100_000], status=[])
    paths = {"/toy.bin": behaviour}
    with serving(paths) as server:
        manifest = a_manifest(f"{server}/toy.bin")
        behaviour.status = []
        with pytest.raises(ResourceError, match=r"connection ended|Incomplete|broken|failed"):
            fetch_quickly(manifest, attempts=1)
        assert final_files(manifest) == set()
        assert (folder_of(manifest) / "toy.bin.part").stat().st_size == 100_000
        fetch_quickly(manifest)
        assert behaviour.asked == [None, "bytes=100000-"]
        assert verify(manifest)[0].state == "ok"
        assert final_files(manifest) == {"toy.bin"}
        assert not list(folder_of(manifest).glob("*.part*"))


def test_a_server_that_ignores_range_sends_all_of_it_again() -> None:
    behaviour = Behaviour(CONTENT, drop_after=[100_000], ranges=False)
    with serving({"/toy.bin": behaviour}) as server:
        folder = fetch_quickly(a_manifest(f"{server}/toy.bin"))
    assert behaviour.asked == [None, "bytes=100000-"]
    assert (folder / "toy.bin").read_bytes() == CONTENT


def test_a_server_that_drops_and_ignores_range_does_not_hold_us_for_ever() -> None:
    behaviour = Behaviour(CONTENT, drop_after=[100_000] * 50, ranges=False)
    with serving({"/toy.bin": behaviour}) as server:
        assert_clean_failure(a_manifest(f"{server}/toy.bin"), "3 tries without progress")
    assert len(behaviour.asked) <= 5


def test_a_link_that_gives_a_little_each_time_gets_there() -> None:
    behaviour = Behaviour(CONTENT, drop_after=[30_000] * 9)
    with serving({"/toy.bin": behaviour}) as server:
        folder = fetch_quickly(a_manifest(f"{server}/toy.bin"), attempts=2)
    assert (folder / "toy.bin").read_bytes() == CONTENT
    assert len(behaviour.asked) == 10


def test_parts_of_two_versions_are_never_joined() -> None:
    """The file changes on the server between two tries, with no checksum to notice it by."""
    old, new = CONTENT, CONTENT[::-1]
    behaviour = Behaviour(old, drop_after=[100_000])
    with serving({"/toy.bin": behaviour}) as server:
        manifest = a_manifest(f"{server}/toy.bin", sha256=PIN_AT_FIRST_FETCH)
        with pytest.raises(ResourceError):
            fetch_quickly(manifest, attempts=1)
        behaviour.content, behaviour.etag = new, '"v2"'
        folder = fetch_quickly(manifest)
    assert (folder / "toy.bin").read_bytes() == new


@pytest.mark.parametrize("etag", ['"v1"', None])
def test_a_file_of_another_size_is_started_anew(etag: str | None) -> None:
    behaviour = Behaviour(CONTENT, drop_after=[100_000], etag=etag)
    with serving({"/toy.bin": behaviour}) as server:
        manifest = a_manifest(f"{server}/toy.bin", sha256=PIN_AT_FIRST_FETCH)
        with pytest.raises(ResourceError):
            fetch_quickly(manifest, attempts=1)
        behaviour.content = CONTENT[::-1] + b"more"
        folder = fetch_quickly(manifest)
    assert (folder / "toy.bin").read_bytes() == CONTENT[::-1] + b"more"


def test_a_part_longer_than_the_file_is_started_anew() -> None:
    behaviour = Behaviour(CONTENT, drop_after=[100_000])
    with serving({"/toy.bin": behaviour}) as server:
        short = CONTENT[:50_000]
        manifest = a_manifest(f"{server}/toy.bin", sha256=hashlib.sha256(short).hexdigest())
        with pytest.raises(ResourceError):
            fetch_quickly(manifest, attempts=1)
        behaviour.content = short  # the same ETag: the server answers 416
        folder = fetch_quickly(manifest)
    assert (folder / "toy.bin").read_bytes() == short


def test_a_server_that_sends_another_range_than_asked_for_is_not_believed() -> None:
    behaviour = Behaviour(CONTENT, drop_after=[100_000], wrong_range=True)
    with serving({"/toy.bin": behaviour}) as server:
        folder = fetch_quickly(a_manifest(f"{server}/toy.bin"))
    assert (folder / "toy.bin").read_bytes() == CONTENT


def test_a_file_without_a_length_is_fetched() -> None:
    with serving({"/toy.bin": Behaviour(CONTENT, length=False)}) as server:
        folder = fetch_quickly(a_manifest(f"{server}/toy.bin"))
    assert (folder / "toy.bin").read_bytes() == CONTENT


def test_a_passing_trouble_of_the_server_is_waited_out() -> None:
    behaviour = Behaviour(CONTENT, status=[503, 429])
    with serving({"/toy.bin": behaviour}) as server:
        fetch_quickly(a_manifest(f"{server}/toy.bin"))
    assert len(behaviour.asked) == 3


def test_a_flipped_byte_is_refused_and_nothing_is_kept() -> None:
    damaged = bytearray(CONTENT)
    damaged[123_456] ^= 1
    behaviour = Behaviour(bytes(damaged))
    with serving({"/toy.bin": behaviour}) as server:
        manifest = a_manifest(f"{server}/toy.bin")
        actual = hashlib.sha256(damaged).hexdigest()
        assert_clean_failure(manifest, f"sha256 is {actual}, its manifest says {SHA256}")
        assert not (folder_of(manifest) / "toy.bin.part").exists()  # a damaged part must not be gone on with
        behaviour.content = CONTENT
        fetch_quickly(manifest)
        assert verify(manifest)[0].state == "ok"


def test_another_size_than_the_manifest_says_is_refused() -> None:
    with serving({"/toy.bin": Behaviour(CONTENT)}) as server:
        manifest = a_manifest(f"{server}/toy.bin", sha256=PIN_AT_FIRST_FETCH, bytes=7)
        assert_clean_failure(manifest, "300,000 bytes, its manifest says 7")


def test_a_missing_file_is_told_at_once() -> None:
    with serving({}) as server:
        assert_clean_failure(a_manifest(f"{server}/toy.bin"), r"/toy\.bin: HTTP 404")


def test_nobody_answering_is_told() -> None:
    with serving({}) as server:
        pass  # the port is free again
    assert_clean_failure(a_manifest(f"{server}/toy.bin"), r"refused.*after 3 tries")


def test_the_second_address_helps_where_the_first_fails() -> None:
    with serving({"/b.bin": Behaviour(CONTENT)}) as server:
        manifest = a_manifest(f"{server}/a.bin", f"{server}/b.bin")
        folder = fetch_quickly(manifest)
        assert json.loads((folder / "pins.json").read_text())["toy.bin"]["url"] == f"{server}/b.bin"


def test_what_was_begun_from_the_second_address_is_gone_on_with() -> None:
    behaviour = Behaviour(CONTENT, drop_after=[100_000])
    with serving({"/b.bin": behaviour}) as server:
        manifest = a_manifest(f"{server}/a.bin", f"{server}/b.bin")
        with pytest.raises(ResourceError):
            fetch_quickly(manifest, attempts=1)
        fetch_quickly(manifest)
    assert behaviour.asked == [None, "bytes=100000-"]


# ---- pins -----------------------------------------------------------------------------------------------------------


def test_an_unknown_checksum_is_pinned_and_held_against_later() -> None:
    behaviour = Behaviour(CONTENT)
    with serving({"/toy.bin": behaviour}) as server:
        manifest = a_manifest(f"{server}/toy.bin", sha256=PIN_AT_FIRST_FETCH)
        folder = fetch_quickly(manifest)
        assert verify(manifest)[0].state == "ok"
        with open(folder / "toy.bin", "r+b") as file:  # a bit flips on the disk
            file.write(bytes([CONTENT[0] ^ 1]))
        (report,) = verify(manifest)
        assert report.state == "damaged"
        assert SHA256 in report.note
        fetch_quickly(manifest)  # heals it
        assert (folder / "toy.bin").read_bytes() == CONTENT
        (folder / "toy.bin").unlink()
        behaviour.content = CONTENT[::-1]
        with pytest.raises(ResourceError, match=f"the fetch of 20.* says {SHA256}"):
            fetch_quickly(manifest)
        assert final_files(manifest) == set()


def test_a_file_put_there_by_hand_is_taken_and_pinned(caplog: pytest.LogCaptureFixture) -> None:
    manifest = a_manifest("http://127.0.0.1:9/toy.bin", sha256=PIN_AT_FIRST_FETCH)
    folder_of(manifest).mkdir(parents=True)
    (folder_of(manifest) / "toy.bin").write_bytes(CONTENT)
    fetch_quickly(manifest)
    assert verify(manifest)[0].note.startswith("as at its first fetch")
    assert "taken as it is" in caplog.text


def test_damaged_pins_are_told(home: Path) -> None:
    manifest = a_manifest("http://127.0.0.1:9/toy.bin")
    folder_of(manifest).mkdir(parents=True)
    (folder_of(manifest) / "pins.json").write_text("{")
    with pytest.raises(ResourceError, match=r"pins\.json: it is damaged"):
        verify(manifest)


# ---- the disk -------------------------------------------------------------------------------------------------------


def test_too_little_room_is_told_before_anything_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"/toy.bin": Behaviour(CONTENT)}) as server:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
        assert_clean_failure(a_manifest(f"{server}/toy.bin"), "300,000 more bytes are needed and 1 are free")


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # writes beyond fail, as on a full disk
from mambagen.data_manifests import fetch, load_manifest
from mambagen.errors import ResourceError
try:
    fetch(load_manifest(sys.argv[1]), attempts=2, pause=0.01)
except ResourceError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_disk_that_takes_no_more_is_told_and_the_part_gone_on_with(tmp_path: Path) -> None:
    behaviour = Behaviour(CONTENT)
    with serving({"/toy.bin": behaviour}) as server:
        manifest = a_manifest(f"{server}/toy.bin")
        path = tmp_path / "toy.toml"
        path.write_text(
            f'name="toy"\ntitle="a toy"\nkind="dna"\nlicence="none"\nprovenance="here"\n[[files]]\nname="toy.bin"\n'
            f'urls=["{server}/toy.bin"]\nsha256="{SHA256}"\nrole="sequence"\n'
        )
        run = subprocess.run(
            [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=True, env=dict(os.environ)
        )
        assert "toy.bin.part: it cannot be written" in run.stdout
        assert final_files(manifest) == set()
        assert (folder_of(manifest) / "toy.bin.part").stat().st_size <= 100_000
        fetch_quickly(manifest)
        assert verify(manifest)[0].state == "ok"
        assert (behaviour.asked[-1] or "").startswith("bytes=")


def test_a_full_disk_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with serving({"/toy.bin": Behaviour(CONTENT)}) as server:
        monkeypatch.setattr(os, "fsync", full)
        assert_clean_failure(a_manifest(f"{server}/toy.bin"), "the disk is full; make room")


def test_a_cache_that_cannot_be_made_is_told(home: Path) -> None:
    home.write_text("a file where the folder should be")
    with pytest.raises(ResourceError, match=r"\); set MAMBAGEN_HOME to another folder"):
        fetch_quickly(a_manifest("http://127.0.0.1:9/toy.bin"))


# ---- archives -------------------------------------------------------------------------------------------------------


def a_tar(*members: tarfile.TarInfo, mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for member in members:
            content = b"x" * member.size if member.isreg() else None
            tar.addfile(member, io.BytesIO(content) if content is not None else None)
    return buffer.getvalue()


def a_member(name: str, size: int = 10, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, size if kind == tarfile.REGTYPE else 0, link
    return member


def a_zip(*names: str, mode: int = 0o100644) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name in names:
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            zipped.writestr(member, b"x" * 10)
    return buffer.getvalue()


HOSTILE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "dots": ("tar", lambda: a_tar(a_member("good.fa"), a_member("../evil")), r"unsafe name '\.\./evil'"),
    "dots inside": ("tar", lambda: a_tar(a_member("a/../../evil")), "unsafe name"),
    "dots of a folder": ("tar", lambda: a_tar(a_member("../evil/", kind=tarfile.DIRTYPE)), "unsafe name"),
    "absolute": ("tar", lambda: a_tar(a_member("/tmp/evil")), "unsafe name"),
    "backslash": ("tar", lambda: a_tar(a_member("..\\evil")), "unsafe name"),
    "symbolic link": ("tar", lambda: a_tar(a_member("l", kind=tarfile.SYMTYPE, link="/etc")), "link or a device"),
    "hard link": ("tar", lambda: a_tar(a_member("l", kind=tarfile.LNKTYPE, link="/etc/passwd")), "link or a device"),
    "device": ("tar", lambda: a_tar(a_member("d", kind=tarfile.CHRTYPE)), "link or a device"),
    "pipe": ("tar", lambda: a_tar(a_member("p", kind=tarfile.FIFOTYPE)), "link or a device"),
    "twice": ("tar", lambda: a_tar(a_member("a"), a_member("a")), "twice"),
    "too large": ("tar", lambda: a_tar(a_member("a", 600), a_member("b", 600)), "more than the 1,000 bytes"),
    "cut off": ("tar", lambda: a_tar(a_member("a", 500))[:-30], "cannot be unpacked"),
    "no tar": ("tar", lambda: b"not an archive at all", "cannot be unpacked"),
    "zip with dots": ("zip", lambda: a_zip("good.fa", "../evil"), "unsafe name"),
    "zip with a link": ("zip", lambda: a_zip("l", mode=0o120777), "link or a device"),
    "no zip": ("zip", lambda: b"not an archive at all", "cannot be unpacked"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    kind, make, message = HOSTILE[case]
    archive = make()
    before = {path for path in tmp_path.rglob("*") if "home" not in path.parts}
    with serving({"/toy.tgz": Behaviour(archive)}) as server:
        manifest = a_manifest(
            f"{server}/toy.tgz",
            sha256=hashlib.sha256(archive).hexdigest(),
            unpack=kind,
            unpacked_bytes_at_most=1_000,
        )
        assert_clean_failure(manifest, message)
    assert not list(tmp_path.rglob("*evil*"))
    assert {path for path in tmp_path.rglob("*") if "home" not in path.parts} == before


@pytest.mark.parametrize(
    ("kind", "archive"),
    [
        ("tar", a_tar(a_member("clips/", kind=tarfile.DIRTYPE), a_member("clips/a.wav"), a_member("./b.txt", 0))),
        ("tar", a_tar(a_member("clips/a.wav"), a_member("b.txt", 0), mode="w")),
        ("tar", a_tar(a_member("clips/a.wav"), a_member("b.txt", 0), mode="w:xz")),
        ("zip", a_zip("clips/a.wav", "b.txt")),
    ],
)
def test_a_good_archive_is_unpacked_and_its_files_are_verified(kind: str, archive: bytes) -> None:
    with serving({"/toy.tgz": Behaviour(archive)}) as server:
        manifest = a_manifest(f"{server}/toy.tgz", sha256=hashlib.sha256(archive).hexdigest(), unpack=kind)
        folder = fetch_quickly(manifest) / "toy.bin.unpacked"
        assert (folder / "clips" / "a.wav").read_bytes() == b"x" * 10
        assert (folder / "b.txt").exists()
        assert present(manifest)
        assert verify(manifest)[0].state == "ok"
        (folder / "clips" / "a.wav").write_bytes(b"y" * 10)
        (report,) = verify(manifest)
        assert report.state == "damaged"
        assert "clips/a.wav has changed" in report.note
        shutil.rmtree(folder / "clips")
        assert "clips/a.wav is missing" in verify(manifest)[0].note
    fetch_quickly(manifest)  # from the archive that is here: the server is gone
    assert (folder / "clips" / "a.wav").read_bytes() == b"x" * 10


def test_two_fetches_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    behaviour = Behaviour(CONTENT, drop_after=[100_000, 100_000])
    with serving({"/toy.bin": behaviour}) as server:
        path = tmp_path / "toy.toml"
        path.write_text(
            f'name="toy"\ntitle="a toy"\nkind="dna"\nlicence="none"\nprovenance="here"\n[[files]]\nname="toy.bin"\n'
            f'urls=["{server}/toy.bin"]\nsha256="{PIN_AT_FIRST_FETCH}"\nrole="sequence"\n'
        )
        code = "import sys; from mambagen.data_manifests import *; fetch(load_manifest(sys.argv[1]), pause=0.01)"
        runs = [subprocess.Popen([sys.executable, "-c", code, str(path)], env=dict(os.environ)) for _ in range(2)]
        assert [run.wait() for run in runs] == [0, 0]
    assert (cache_home() / "data" / "toy" / "toy.bin").read_bytes() == CONTENT
    assert len(behaviour.asked) == 3  # the second found everything in place
