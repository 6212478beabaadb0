"""Folders that are whole or not there, and what verification finds in damaged ones."""

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from mambagen.errors import ModelError, ResourceError, UsageError
from mambagen.models import files
from mambagen.models.files import remove_partial_folders, verify_folder, write_folder_atomically

TEXTS = {"a.txt": b"first" * 100, "b.bin": bytes(range(256)) * 40}


def write(folder, texts=TEXTS, **options):
    writers = {name: (lambda path, text=text: path.write_bytes(text)) for name, text in texts.items()}
    write_folder_atomically(folder, writers, **options)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_holds_its_files_and_a_manifest_of_their_sums(folder):
    assert {path.name for path in folder.iterdir()} == {"a.txt", "b.bin", "manifest.json"}
    assert all((folder / name).read_bytes() == text for name, text in TEXTS.items())
    assert json.loads((folder / "manifest.json").read_text()) == {
        "format": 1,
        "files": {n: {"bytes": len(t), "sha256": hashlib.sha256(t).hexdigest()} for n, t in TEXTS.items()},
    }
    assert verify_folder(folder).files.keys() == TEXTS.keys()
    assert list(folder.parent.iterdir()) == [folder]


def test_unlisted_files_are_written_and_may_be_edited(tmp_path):
    write(tmp_path / "model", unlisted=["a.txt"])
    (tmp_path / "model" / "a.txt").write_text("edited")
    verify_folder(tmp_path / "model")


def test_parents_are_made(tmp_path):
    write(tmp_path / "some" / "where" / "model")
    verify_folder(tmp_path / "some" / "where" / "model")


def test_nothing_is_overwritten_unless_asked(folder, tmp_path):
    with pytest.raises(UsageError, match="already exists"):
        write(folder, {"a.txt": b"new"})
    assert (folder / "a.txt").read_bytes() == TEXTS["a.txt"]
    write(folder, {"a.txt": b"new"}, replace=True)
    assert (folder / "a.txt").read_bytes() == b"new"
    assert verify_folder(folder).files.keys() == {"a.txt"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_of_the_users_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(UsageError, match="is not a folder that mambagen wrote"):
        write(tmp_path / "thesis", replace=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_replacing_works_where_the_system_cannot_exchange(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    write(folder, {"a.txt": b"new"}, replace=True)
    assert (folder / "a.txt").read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two names in one step")
def test_a_folder_that_is_being_replaced_is_never_gone(folder):
    done, gone = threading.Event(), []

    def look():
        while not done.is_set():
            if not os.path.exists(folder / "a.txt"):
                gone.append(1)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for _ in range(60):
            write(folder, replace=True)
    finally:
        done.set()
        reader.join()
    assert not gone


def test_a_link_to_a_folder_stays_a_link(folder, tmp_path):
    (tmp_path / "latest").symlink_to("model")
    write(tmp_path / "latest", {"a.txt": b"new"}, replace=True)
    assert (tmp_path / "latest").is_symlink()
    assert (folder / "a.txt").read_bytes() == b"new"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bug")])
def test_a_failed_write_leaves_nothing_new_and_the_old_as_it_was(folder, tmp_path, error):
    def fail(path):
        path.write_bytes(b"half")
        raise error

    expected = ResourceError if isinstance(error, OSError) else type(error)
    for target in (folder, tmp_path / "other"):
        with pytest.raises(expected) as caught:
            write_folder_atomically(
                target, {"a.txt": lambda path: None or path.write_bytes(b""), "b": fail}, replace=True
            )
        if expected is ResourceError:
            assert str(caught.value).startswith(f"{target}: cannot be written: No space left on device; ")
    assert list(tmp_path.iterdir()) == [folder]
    verify_folder(folder)


def test_a_disk_that_takes_no_more_is_an_error_of_the_disk(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(ResourceError, match="model: cannot be written: File too large"):
            write(tmp_path / "model", {"big": bytes(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_a_parent_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"model: cannot be written: File exists \(.*file\)"):
        write(tmp_path / "file" / "model")


def edit(name, change):
    def apply(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def flip(data):
    return data[:300] + bytes([data[300] ^ 4]) + data[301:]


DAMAGE = {
    "a missing file": (lambda f: (f / "b.bin").unlink(), r"b\.bin: missing"),
    "a file cut off": (edit("b.bin", lambda data: data[:-1]), r"b\.bin: cut off: 10239 bytes where .* says 10240"),
    "a longer file": (edit("a.txt", lambda data: data + b"!"), r"a\.txt: changed: 501 bytes"),
    "a flipped bit": (edit("b.bin", flip), r"b\.bin: damaged or edited"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"model: has no manifest\.json"),
    "half a manifest": (
        edit("manifest.json", lambda data: data[: len(data) // 2]),
        r"manifest\.json:\d+: damaged: not JSON",
    ),
    "no text": (edit("manifest.json", lambda data: b"\xff\xfe" + data), r"manifest\.json: damaged"),
    "a list": (edit("manifest.json", lambda data: b"[1]"), r"manifest\.json: damaged: holds a list"),
    "a later version": (
        edit("manifest.json", lambda data: data.replace(b'"format": 1', b'"format": 2')),
        "format 2 is not",
    ),
    "an unknown key": (
        edit("manifest.json", lambda data: data.replace(b'"bytes"', b'"size"', 1)),
        r"manifest\.json: damaged",
    ),
    "a path outside": (
        edit("manifest.json", lambda data: data.replace(b"a.txt", b"../a.txt")),
        r"manifest\.json: damaged",
    ),
    "a folder for a file": (lambda f: ((f / "b.bin").unlink(), (f / "b.bin").mkdir()), r"b\.bin: "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_the_file_named(folder, damage):
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises(ModelError, match=message):
        verify_folder(folder)


def test_any_flipped_bit_is_found(folder):
    draw = random.Random(0)
    for _ in range(40):
        name = draw.choice(list(TEXTS))
        data = bytearray(TEXTS[name])
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(data)
        with pytest.raises(ModelError, match=name):
            verify_folder(folder)
        (folder / name).write_bytes(TEXTS[name])
    verify_folder(folder)


def test_only_the_named_files_are_read(folder):
    (folder / "b.bin").unlink()
    verify_folder(folder, ["a.txt"])
    with pytest.raises(ModelError, match=r"c\.txt: is not listed"):
        verify_folder(folder, ["c.txt"])


def test_what_is_no_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        verify_folder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        verify_folder(tmp_path / "file")


WRITER = """
import sys
from mambagen.models.files import write_folder_atomically
i = 0
print("ready", flush=True)
while True:
    i += 1
    text = (b"%d " % i) * 200_000
    writers = {name: lambda path: path.write_bytes(text) for name in ("one", "two")}
    write_folder_atomically(sys.argv[1], writers, replace=True)
"""


def test_a_killed_writer_leaves_a_whole_folder_every_time(tmp_path):
    target = tmp_path / "model"
    write(target, {"one": b"0", "two": b"0"})
    draw = random.Random(0)
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE)
        try:
            process.stdout.readline()
            time.sleep(draw.uniform(0.01, 0.15))
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
        verify_folder(target)
        assert (target / "one").read_bytes() == (target / "two").read_bytes()
    remove_partial_folders(tmp_path)
    assert list(tmp_path.iterdir()) == [target]
