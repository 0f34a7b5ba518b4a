"""The download, from a server on this machine; the archive, against the bytes it was made of."""

import functools
import hashlib
import io
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from fewbits._errors import FileError
from fewbits.lab.data import _cifar10, load
from fewbits.lab.data._cifar10 import download, read_archive

MEMBERS = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def records(seed: int, count: int = 4, label: int | None = None) -> np.ndarray:
    """(count, 3073) uint8: a label, then the red, green and blue planes."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 256, (count, 3073), dtype=np.uint8)
    rows[:, 0] = generator.integers(0, 10, count) if label is None else label
    return rows


def archive(parts: dict[str, bytes]) -> bytes:
    """A .tar.gz with the members in the folder that the authors' archive has."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in parts.items():
            about = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return file.getvalue()


def whole(**changed: bytes) -> dict[str, bytes]:
    parts = {name: records(i).tobytes() for i, name in enumerate(MEMBERS)}
    return parts | {f"{name}.bin": content for name, content in changed.items()}


# -- download -------------------------------------------------------------------------------------


@dataclass
class Server:
    """What a local server sends, and what it was asked.

    `cut` ends the connection after so many bytes of a body; `ranges` says whether it can resume.
    """

    content: bytes
    cut: int | None = None
    ranges: bool = True
    url: str = ""
    asked: list[str | None] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    def __init__(self, state: Server, *args) -> None:
        self.state = state
        super().__init__(*args)

    def do_GET(self) -> None:
        state = self.state
        wanted = self.headers["Range"]
        state.asked.append(wanted)
        start = 0
        if wanted and state.ranges:
            match = re.fullmatch(r"bytes=(\d+)-", wanted)
            assert match
            start = int(match[1])
        if self.path != "/archive":
            self.send_error(404)
            return
        if start >= len(state.content):
            self.send_error(416)
            return
        body = state.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: state.cut]
        self.wfile.write(body)
        state.sent.append(len(body))

    def log_message(self, format: str, *args) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server(np.random.default_rng(0).bytes(3_000_000))
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, state)) as http:
        state.url = f"http://127.0.0.1:{http.server_address[1]}/archive"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_download_is_whole_and_asked_for_once(server: Server, tmp_path: Path):
    target = tmp_path / "cache" / "archive"
    seen = []

    def progress(items, total: int):
        seen.append(total)
        return items

    for _ in range(2):
        assert download(server.url, sha256(server.content), target, progress) == target
        assert target.read_bytes() == server.content
    assert server.asked == [None]
    assert seen == [3]  # chunks of 1 MiB
    assert list(target.parent.iterdir()) == [target]


def test_an_interrupted_download_fetches_only_the_rest(server: Server, tmp_path: Path):
    target = tmp_path / "archive"
    server.cut = 1_200_000
    with pytest.raises(
        FileError, match=r"cannot be downloaded .*What has arrived is kept: run aga"
    ):
        download(server.url, sha256(server.content), target)
    assert not target.exists()
    server.cut = None
    download(server.url, sha256(server.content), target)
    assert target.read_bytes() == server.content
    assert server.asked == [None, "bytes=1200000-"]
    until = time.monotonic() + 10
    while len(server.sent) < 2 and time.monotonic() < until:
        time.sleep(0.01)  # the server notes what it has sent after the last byte has arrived
    assert server.sent == [1_200_000, 1_800_000]


def test_a_server_that_cannot_resume_sends_it_all_again(server: Server, tmp_path: Path):
    target = tmp_path / "archive"
    target.with_name("archive.part").write_bytes(b"x" * 5_000_000)  # longer than the whole, too
    server.ranges = False
    download(server.url, sha256(server.content), target)
    assert target.read_bytes() == server.content
    assert server.sent == [3_000_000]


def test_a_part_that_is_whole_is_kept_without_another_byte(server: Server, tmp_path: Path):
    target = tmp_path / "archive"
    target.with_name("archive.part").write_bytes(server.content)
    download(server.url, sha256(server.content), target)  # killed before it got its name
    assert target.read_bytes() == server.content
    assert server.sent == []


def test_wrong_content_is_deleted_so_that_the_next_run_starts_anew(server: Server, tmp_path: Path):
    target = tmp_path / "archive"
    part = target.with_name("archive.part")
    part.write_bytes(b"another file's beginning")
    wanted = sha256(server.content)
    with pytest.raises(FileError, match=f"the download's SHA-256 is [0-9a-f]{{64}}, not {wanted}"):
        download(server.url, wanted, target)
    assert not part.exists()
    assert not target.exists()
    download(server.url, wanted, target)
    assert target.read_bytes() == server.content


def test_a_missing_file_and_a_silent_server_are_named(server: Server, tmp_path: Path):
    with pytest.raises(FileError, match=r"nowhere: cannot be downloaded to .*\(Not Found\)"):
        download(server.url.replace("archive", "nowhere"), "0", tmp_path / "archive")
    with pytest.raises(FileError, match="cannot be downloaded .*refused.*give --data a folder"):
        download("http://127.0.0.1:1/archive", "0", tmp_path / "archive")


def test_a_cache_that_cannot_be_written_is_named(server: Server, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match=r"file/archive\.part \("):
        download(server.url, "0", tmp_path / "file" / "archive")


def test_cifar10_is_downloaded_once_into_the_cache_and_read(
    server: Server, own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    server.content = archive(whole())
    monkeypatch.setattr(_cifar10, "URL", server.url)
    monkeypatch.setattr(_cifar10, "SHA256", sha256(server.content))
    for _ in range(2):
        data = load("cifar10")
        assert len(data.train_labels) == 20
    assert len(server.asked) == 1
    assert [f.name for f in own_cache.iterdir()] == ["cifar-10-binary.tar.gz"]


# -- the archive ----------------------------------------------------------------------------------


def test_the_archive_keeps_every_pixel_and_label(tmp_path: Path):
    path = tmp_path / "archive.tar.gz"
    # Other files lie in the real archive, and the order of members is free.
    path.write_bytes(archive({"readme.html": b"<p>", **dict(reversed(whole().items()))}))
    data = read_archive(path)
    train = np.concatenate([records(i) for i in range(5)])
    for images, labels, rows in (
        (data.train_images, data.train_labels, train),
        (data.test_images, data.test_labels, records(5)),
    ):
        assert labels.tolist() == rows[:, 0].tolist()
        assert images.dtype == torch.uint8
        assert np.array_equal(images.numpy(), rows[:, 1:].reshape(-1, 3, 32, 32))
    assert data.shape == (3, 32, 32)
    assert data.classes[3] == "cat"
    assert len(data.classes) == 10
    assert data.flips


def test_a_label_above_9_is_refused(tmp_path: Path):
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(archive(whole(data_batch_3=records(2, label=10).tobytes())))
    with pytest.raises(FileError, match=r"data_batch_3\.bin has the label 10, above 9"):
        read_archive(path)


@pytest.mark.parametrize("content", [b"", records(0).tobytes()[:-1]])
def test_records_that_are_cut_short_are_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(archive(whole(test_batch=content)))
    with pytest.raises(FileError, match=r"test_batch\.bin has [\d,]+ bytes, no multiple of 3,073"):
        read_archive(path)


def test_an_archive_without_a_batch_is_refused(tmp_path: Path):
    path = tmp_path / "archive.tar.gz"
    parts = whole()
    del parts["data_batch_4.bin"]
    path.write_bytes(archive(parts))
    with pytest.raises(FileError, match=r"is no CIFAR-10 archive .*data_batch_4\.bin"):
        read_archive(path)


def damaged(content: bytes, how: str) -> bytes:
    if how == "no gzip":
        return b"<html>Please log in</html>"
    if how == "cut short":
        return content[: len(content) // 2]
    start = len(content) * (3 if how == "scrambled early" else 7) // 10
    scrambled = bytes(byte ^ 0x55 for byte in content[start : start + 500])
    return content[:start] + scrambled + content[start + 500 :]


@pytest.mark.parametrize("how", ["no gzip", "cut short", "scrambled early", "scrambled late"])
def test_a_damaged_archive_is_refused(tmp_path: Path, how: str):
    path = tmp_path / "archive.tar.gz"
    # Few values, so that they compress: gzip stores noise as it is and would notice damage late.
    content = archive({name: (records(0) // 64).tobytes() for name in MEMBERS})
    path.write_bytes(damaged(content, how))
    with pytest.raises(FileError, match=r"archive\.tar\.gz: is no CIFAR-10 archive \(.*Delete it"):
        read_archive(path)
