"""Images with captions in every form that people have them."""

import io
import json
import pathlib
import tarfile

import numpy as np
from PIL import Image

CAPTIONS = ("a dog", "two cats on a mat", "the sea " * 60 + "at night", "ein Häuschen", "one tree")


def make_folder(root: pathlib.Path) -> pathlib.Path:
    """Five PNGs of several sizes in two folders, the captions in .txt and .json; and what is left out."""
    rng = np.random.default_rng(0)
    for i, caption in enumerate(CAPTIONS):
        path = root / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (17 + 7 * i, 20, 3), np.uint8)).save(path)
        if i % 2:
            about = {"caption": caption, "url": "https://nowhere", "similarity": 0.3}
            path.with_suffix(".json").write_text(json.dumps(about))
        else:
            path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    (root / "a" / "00.json").write_text(json.dumps({"caption": "never read: the .txt is"}))
    (root / "a" / "alone.txt").write_text("no image")
    (root / "00000_stats.json").write_text("{}")
    Image.new("RGB", (9, 9)).save(root / "b" / "silent.png")
    (root / "notes.md").write_text("no caption")
    return root


LEFT_OUT = {"images without a caption": 1, "captions without an image": 2, ".md": 1}


def make_tars(root: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The same images and captions in two tars, in the order of the folder's names."""
    root.mkdir()
    for name in ("a", "b"):
        with tarfile.open(root / f"shard-{name}.tar", "w") as archive:
            for path in sorted((folder / name).iterdir()):
                member = tarfile.TarInfo(path.name)
                member.size = path.stat().st_size
                archive.addfile(member, io.BytesIO(path.read_bytes()))
    return root


def in_order() -> list[str]:
    """The captions in the order of a set's images."""
    return [CAPTIONS[i].strip() for i in (0, 2, 4, 1, 3)]


def make_files(root: pathlib.Path, folder: pathlib.Path) -> list[pathlib.Path]:
    """The same captions as one file, in every form that is read, images by different names."""
    import pyarrow
    from pyarrow import parquet

    names = [f"{'ab'[i % 2]}/{i:02}.png" for i in range(len(CAPTIONS))]
    coco = {
        "info": {},
        "images": [{"id": 7 * i, "file_name": pathlib.PurePath(name).name} for i, name in enumerate(names)],
        "annotations": [{"image_id": 7 * i, "id": i, "caption": f" {text}\n"} for i, text in enumerate(CAPTIONS)]
        + [{"image_id": 0, "id": 99, "caption": "another caption of the first"}],
    }
    objects = [{"file_name": name, "text": text, "width": 3} for name, text in zip(names, CAPTIONS, strict=True)]
    written = {
        "coco.json": json.dumps(coco),
        "names.json": json.dumps(dict(zip(names, CAPTIONS, strict=True))),
        "list.json": json.dumps(objects),
        "lines.jsonl": "".join(json.dumps(one) + "\n" for one in objects),
    }
    for name, content in written.items():
        (root / name).write_text(content)
    keys = [pathlib.PurePath(name).stem for name in names]
    parquet.write_table(pyarrow.table({"key": keys, "caption": CAPTIONS}), root / "rows.parquet")
    return [root / name for name in (*written, "rows.parquet")]
