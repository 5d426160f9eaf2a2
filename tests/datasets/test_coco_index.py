"""The index of a large annotation file: what is kept, when it is made anew, and who shares it."""

import io
import json
import os
import pickle
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress

import coco_folder
from smca.datasets import AnnotationOptions, CocoDetection, coco, coco_index, frame
from smca.datasets.coco_index import Texts
from smca.datasets.table import table_of


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Indexes are kept, of small files too; the list grows by one whenever one is made."""
    calls: list[str] = []
    original = coco.open_coco

    def counted(*arguments: Any) -> Any:
        calls.append("made")
        return original(*arguments)

    monkeypatch.setattr(coco, "open_coco", counted)
    monkeypatch.setattr(coco_index, "KEPT_FROM", 0)
    monkeypatch.setattr(coco_index, "_MAPPED_FROM", 0)
    monkeypatch.setattr(coco_index, "_SETTLED", 0.0)
    monkeypatch.setenv("SMCA_CACHE", str(tmp_path / "cache"))
    return calls


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    written: tuple[Path, Path] = coco_folder.write(tmp_path / "data", coco_folder.content())
    return written


def everything(data: CocoDetection) -> Any:
    samples = [
        (s.image.tolist(), s.boxes_xyxy.tolist(), s.labels.tolist(), s.image_id, s.original_size) for s in list(data)
    ]
    names, sizes, counts = list(data.file_names), data.sizes.tolist(), table_of(data).objects_per_image.tolist()
    own = data.with_own_ids(data.ground_truth()["annotations"])
    return samples, data.ground_truth(), data.report, data.categories, data.digest, names, sizes, counts, own


def index_of(tmp_path: Path) -> Path:
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    return folder


def test_a_later_start_finds_what_the_first_has_made(
    made: list[str], paths: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco_index.KEPT_FROM = 1 << 40
    plain = everything(CocoDetection(*paths))
    assert not (tmp_path / "cache").exists()  # a small file is not worth it
    coco_index.KEPT_FROM = 0
    assert everything(CocoDetection(*paths)) == plain
    assert "annotations.json (0 MB) and its images, once" in capsys.readouterr().err
    assert len(made) == 2
    again = CocoDetection(*paths)
    assert everything(again) == plain
    assert len(made) == 2
    assert again._index.kept_in == index_of(tmp_path)
    assert not capsys.readouterr().err
    # Its memory is the file's.
    owner: Any = again._index.file_xywh
    while isinstance(owner, np.ndarray) and not isinstance(owner, np.memmap):
        owner = owner.base
    assert isinstance(owner, np.memmap)


def test_texts_and_ids_that_are_no_numbers(made: list[str], tmp_path: Path) -> None:
    data = coco_folder.content()
    for entry, name in zip(data["images"], ("ä", 2.0, "3"), strict=True):
        for annotation in data["annotations"]:
            if annotation["image_id"] == entry["id"]:
                annotation["image_id"] = name
        entry["id"] = name
    paths = coco_folder.write(tmp_path / "data", data)
    first, second = everything(CocoDetection(*paths)), everything(CocoDetection(*paths))
    assert (first, len(made)) == (second, 1)
    assert {annotation["image_id"] for annotation in first[-1]} == {"ä", 2.0}
    texts = ["", "ä", "", "bc"]
    assert list(Texts.of(texts)) == texts
    assert [Texts.of(texts)[i] for i in range(4)] == texts
    assert Texts.of(texts)[1:3] == texts[1:3]
    assert Texts.of(texts)[-1] == "bc"
    with pytest.raises(IndexError):
        Texts.of(texts)[4]
    assert list(Texts.of([])) == []


def rewrite(paths: tuple[Path, Path]) -> None:
    """Another box, and otherwise the same file: as long, and as old."""
    before = paths[1].stat()
    paths[1].write_text(paths[1].read_text().replace("[1, 2, 10, 20]", "[1, 2, 11, 20]"))
    os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert paths[1].stat().st_size == before.st_size


def add_picture(paths: tuple[Path, Path]) -> None:
    Image.new("RGB", (9, 9)).save(paths[0] / "sub" / "new.png")


def rename_picture(paths: tuple[Path, Path]) -> None:
    (paths[0] / "a.png").rename(paths[0] / "z.png")
    coco_folder.write(paths[0].parent, json.loads(paths[1].read_text()))


def damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[tuple[Path, Path]], None]:
    def apply(paths: tuple[Path, Path]) -> None:
        file = index_of(paths[0].parents[1]) / name
        file.write_bytes(change(file.read_bytes()))

    return apply


@pytest.mark.parametrize(
    "change",
    [
        rewrite,
        add_picture,
        rename_picture,
        damage("index.json", lambda content: content[:-9]),
        damage("index.json", lambda content: b"{}"),
        damage("index.json", lambda content: content.replace(b'"frame"', b'"game"')),
        damage("file_xywh.npy", lambda content: content[:-8]),
        damage("names.npy", lambda content: b""),
    ],
    ids=["box", "picture", "renamed", "cut", "empty", "key", "array", "names"],
)
def test_it_is_made_anew_when_it_no_longer_holds(
    made: list[str], paths: tuple[Path, Path], change: Callable[[tuple[Path, Path]], None]
) -> None:
    CocoDetection(*paths)
    time.sleep(0.02)  # a tick of the file system's clock
    change(paths)
    data = everything(CocoDetection(*paths))
    assert len(made) == 2
    coco_index.KEPT_FROM = 1 << 40
    assert data == everything(CocoDetection(*paths))
    coco_index.KEPT_FROM = 0
    assert data == everything(CocoDetection(*paths))
    assert len(made) == 3


def test_it_stays_when_nothing_has_changed(made: list[str], paths: tuple[Path, Path], tmp_path: Path) -> None:
    CocoDetection(*paths)
    os.utime(paths[1])
    CocoDetection(*paths)
    assert json.loads((index_of(tmp_path) / "index.json").read_text())["signature"][1] == paths[1].stat().st_mtime_ns
    CocoDetection(*paths)
    assert len(made) == 1
    CocoDetection(*paths, options=AnnotationOptions(crowd="objects"))  # another one
    CocoDetection(*paths)
    assert len(made) == 2


def test_a_file_written_a_moment_ago_is_read_to_know_it(
    made: list[str], paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(coco_index, "_SETTLED", 60.0)
    CocoDetection(*paths)
    assert json.loads((index_of(tmp_path) / "index.json").read_text())["signature"] is None
    CocoDetection(*paths)
    assert len(made) == 1


def test_workers_that_are_started_anew_map_the_same_files(made: list[str], paths: tuple[Path, Path]) -> None:
    data = CocoDetection(*paths)
    sent = pickle.dumps(data)
    assert len(sent) < 1000
    assert everything(pickle.loads(sent)) == everything(data)
    coco_index.KEPT_FROM = 1 << 40
    assert everything(pickle.loads(pickle.dumps(CocoDetection(*paths)))) == everything(data)
    coco_index.KEPT_FROM = 0
    rewrite(paths)
    CocoDetection(*paths)
    with pytest.raises(ValueError, match="was made anew, of other data, while it was in use: start again"):
        pickle.loads(sent)


@pytest.mark.parametrize("obstacle", ["file", "full"])
def test_where_nothing_can_be_kept_it_is_said(
    made: list[str],
    paths: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    obstacle: str,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if obstacle == "file":
        (tmp_path / "cache").write_text("in the way")
    else:
        monkeypatch.setattr(np, "save", full)
    data = CocoDetection(*paths)
    assert "could not be kept in" in str(data.report)
    assert "SMCA_CACHE=DIR names another folder" in str(data.report)
    assert len(data) == 3
    if obstacle == "full":
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_of_several_at_once_one_makes_it(made: list[str], paths: tuple[Path, Path]) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(everything(CocoDetection(*paths)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(found) == 4
    assert all(each == found[0] for each in found)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads read the headers")
def test_processes_read_the_headers_of_many_images_and_are_forked_when_no_display_draws(
    made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A display that draws in a thread may hold a lock at that moment. Within a caller's own, they read all the same."""
    images, annotations = coco_folder.write(tmp_path / "data", coco_folder.content())
    copies = [f"copy {number}.png" for number in range(1000)]
    for number, name in enumerate(copies):
        Image.new("L", (10 + number % 7, 20)).save(images / name)
    data = coco_folder.content()
    data["images"] += [{"id": 1000 + number, "file_name": name} for number, name in enumerate(copies)]
    annotations.write_text(json.dumps(data))
    before, running = set(threading.enumerate()), list[set[threading.Thread]]()

    def noting(*arguments: Any) -> ProcessPoolExecutor:
        running.append(set(threading.enumerate()) - before)
        return ProcessPoolExecutor(*arguments)

    monkeypatch.setattr(frame, "_MANY", 1000)
    monkeypatch.setattr(frame.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(frame, "ProcessPoolExecutor", noting)
    sizes = CocoDetection(images, annotations).sizes
    assert running == [set()]
    assert sizes[3:].tolist() == [[20, 10 + number % 7] for number in range(1000)]
    shutil.rmtree(tmp_path / "cache")
    with Progress(console=Console(file=io.StringIO(), force_terminal=True), refresh_per_second=1000):
        again = CocoDetection(images, annotations).sizes
    assert len(running) == len(made) == 2
    assert np.array_equal(again, sizes)
