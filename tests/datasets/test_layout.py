"""find_split: the usual folder layouts."""

from pathlib import Path

import pytest

from smca.datasets import find_split


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")


@pytest.mark.parametrize(
    ("files", "split", "images", "annotations"),
    [
        (["annotations/train.json", "train/"], "train", "train", "annotations/train.json"),
        (["annotations/val.json", "val/"], "val", "val", "annotations/val.json"),
        (["annotations/valid.json", "valid/"], "val", "valid", "annotations/valid.json"),
        (["annotations/val.json", "images/val/", "images/train/"], "val", "images/val", "annotations/val.json"),
        (["annotations/val.json", "images/"], "val", "images", "annotations/val.json"),
        (["annotations/instances_train2017.json", "train2017/"], "train", "train2017",
         "annotations/instances_train2017.json"),
        (["annotations/instances_val2014.json", "images/val2014/"], "val", "images/val2014",
         "annotations/instances_val2014.json"),
        (["train/_annotations.coco.json"], "train", "train", "train/_annotations.coco.json"),
        (["valid/_annotations.coco.json"], "val", "valid", "valid/_annotations.coco.json"),
        (["test/_annotations.coco.json"], "test", "test", "test/_annotations.coco.json"),
        (["annotations/instances_train.json", "images/train/"], "train", "images/train",
         "annotations/instances_train.json"),  # Datumaro
        (["annotations/instances_Validation.json", "images/Validation/"], "val", "images/Validation",
         "annotations/instances_Validation.json"),  # CVAT
        (["annotations/instances_default.json", "images/default/"], "train", "images/default",
         "annotations/instances_default.json"),
        (["annotations/instances_default.json", "images/"], "train", "images", "annotations/instances_default.json"),
        (["result.json", "images/"], "train", "images", "result.json"),  # Label Studio
        (["train/labels.json", "train/data/"], "train", "train/data", "train/labels.json"),  # FiftyOne
        (["labels.json", "data/"], "train", "data", "labels.json"),
        (["val/annotations.json", "val/JPEGImages/"], "val", "val/JPEGImages", "val/annotations.json"),  # labelme2coco
        (["annotations/validation.json", "validation/"], "val", "validation", "annotations/validation.json"),
        (["annotations/person_keypoints_train2017.json", "annotations/captions_train2017.json", "train2017/"], "train",
         "train2017", "annotations/person_keypoints_train2017.json"),
        (["train.json", "val.json", "images/"], "val", "images", "val.json"),
        (["annotations/train.json", "annotations/test.json", "train/", "test/"], "test", "test", "annotations/test.json"),
    ],
)  # fmt: skip
def test_layouts(tmp_path: Path, files: list[str], split: str, images: str, annotations: str) -> None:
    make(tmp_path, *files)
    assert find_split(tmp_path, split) == (tmp_path / images, tmp_path / annotations)


def test_other_annotation_files_of_coco_are_no_split(tmp_path: Path) -> None:
    make(tmp_path, "annotations/captions_train2017.json", "annotations/stuff_train2017.json", "train2017/")
    with pytest.raises(FileNotFoundError, match="no annotation file of the split 'train'"):
        find_split(tmp_path, "train")


def test_the_folder_that_holds_the_images_is_taken(tmp_path: Path) -> None:
    make(tmp_path, "val/images/", "val/a.jpg", "images/train/", "images/b.jpg")
    for name, image in (("val/_annotations.coco.json", "a.jpg"), ("annotations/train.json", "b.jpg")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{{"images": [{{"file_name": "{image}"}}]}}')
    assert find_split(tmp_path, "val")[0] == tmp_path / "val"
    assert find_split(tmp_path, "train")[0] == tmp_path / "images"


def test_an_export_without_splits_has_no_held_out_images(tmp_path: Path) -> None:
    make(tmp_path, "result.json", "images/")
    with pytest.raises(
        FileNotFoundError, match=r"result\.json is not split: divide it .* --val-json FILE --val-images DIR"
    ):
        find_split(tmp_path, "val")


def test_nothing_found_lists_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    make(tmp_path, "labels/", "annotations/trained.json")
    with pytest.raises(FileNotFoundError) as error:
        find_split(tmp_path, "train")
    for part in ("annotations/train.json", "instances_train.json", "train/_annotations.coco.json", "labels/",
                 "annotations/trained.json", "--train-json FILE --train-images DIR", str(tmp_path)):  # fmt: skip
        assert part in str(error.value)


def test_an_annotation_file_without_a_folder_of_images(tmp_path: Path) -> None:
    make(tmp_path, "annotations/train.json", "pictures/")
    with pytest.raises(FileNotFoundError, match="no folder with its images") as error:
        find_split(tmp_path, "train")
    assert "train/, images/train/, images/" in str(error.value)
    assert "pictures/" in str(error.value)


def test_several_years_are_ambiguous(tmp_path: Path) -> None:
    make(tmp_path, *(f"annotations/instances_val{year}.json" for year in (2014, 2017)), "val2014/", "val2017/")
    with pytest.raises(ValueError, match=r"instances_val2014.json, annotations/instances_val2017.json; keep one"):
        find_split(tmp_path, "val")


def test_a_missing_root_and_an_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        find_split(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="one of 'train', 'val', 'test', got 'dev'"):
        find_split(tmp_path, "dev")  # type: ignore[arg-type]
