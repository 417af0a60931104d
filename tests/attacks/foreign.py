"""Files as other people make them, for the rows of `test_foreign`: each function returns a row's `before`."""

import io
import json
import os
import pathlib
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable

import numpy as np

from tests.attacks.given import Given, write_images

Before = Callable[[Given, pathlib.Path], object]

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
DIT = {"hidden": 32, "depth": 2, "patch": 2, "channels": 4, "out_channels": 8, "num_classes": 10, "grid": 2}


def encoded(kind: str = "PNG", size: tuple[int, int] = (8, 8), mode: str = "RGB", **options) -> bytes:
    """A black image as a file of that kind."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def files(contents: dict[str, bytes | None]) -> Before:
    """{here}/NAME of each content; None is a black PNG."""

    def before(_given: Given, here: pathlib.Path) -> None:
        for name, content in contents.items():
            path = here / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded() if content is None else content)

    return before


def links(contents: dict[str, str]) -> Before:
    """{here}/images/a/0.png, and links in {here}/images to where they say, {here} being the row's folder."""

    def before(_given: Given, here: pathlib.Path) -> None:
        write_images(here / "images" / "a", 1)
        write_images(here / "elsewhere" / "b", 2)
        for name, target in contents.items():
            (here / "images" / name).symlink_to(target.format(here=here))

    return before


def pipe(_given: Given, here: pathlib.Path) -> None:
    """{here}/images/a/0.png is a pipe that nobody writes to."""
    (here / "images" / "a").mkdir(parents=True)
    os.mkfifo(here / "images" / "a" / "0.png")


def claiming_png(width: int, height: int) -> bytes:
    """A PNG of few bytes that claims to be large."""
    small = encoded()
    header = b"IHDR" + struct.pack(">II", width, height) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


def claiming_tiff(width: int, height: int) -> bytes:
    """A TIFF of 250 bytes, LZW, that claims to be large."""
    tags = {256: width, 257: height, 258: 8, 259: 5, 262: 1, 273: 122, 277: 1, 278: height, 279: 100}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + bytes(100)


def tars(contents: dict[str, dict[str, bytes | None] | bytes]) -> Before:
    """{here}/tars/NAME, each a tar of the files it says or, of bytes, those bytes."""

    def before(_given: Given, here: pathlib.Path) -> None:
        for name, content in contents.items():
            path = here / "tars" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else tar(content))

    return before


def tar(contents: dict[str, bytes | None]) -> bytes:
    """A tar of files; None is a black PNG."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content := encoded() if content is None else content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def imagenet(*classes: str) -> bytes:
    """A tar of a tar a class, as ILSVRC2012_img_train.tar is."""
    return tar({f"{name}.tar": tar({f"{name}_1.JPEG": encoded("JPEG")}) for name in classes})


# --- weights


def dit(change: Callable[[dict], dict] = dict, dtype=np.float32) -> Before:
    """{here}/dit.safetensors, of the original DiT's names with 11 rows of classes, in another type."""

    def before(_given: Given, here: pathlib.Path) -> None:
        save_safetensors(here / "dit.safetensors", change(dit_tensors()), dtype)

    return before


def dit_tensors() -> dict[str, np.ndarray]:
    from tests.models.numpy_dit import random_state_dict

    return random_state_dict(**DIT)


def save_safetensors(path: pathlib.Path, tensors: dict[str, np.ndarray], dtype=np.float32) -> None:
    """Writes types that `safetensors.numpy` has no name for, too (safetensors' format: a header, then the values)."""
    import ml_dtypes

    names = {
        np.dtype(np.float64): "F64",
        np.dtype(np.float32): "F32",
        np.dtype(np.float16): "F16",
        np.dtype(ml_dtypes.bfloat16): "BF16",
        np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
        np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
        np.dtype(np.int8): "I8",
        np.dtype(np.complex64): "C64",
    }
    header, data = {}, b""
    for name, value in tensors.items():
        stored = np.ascontiguousarray(value.astype(dtype)).tobytes()
        offsets = [len(data), len(data) + len(stored)]
        header[name] = {"dtype": names[np.dtype(dtype)], "shape": list(value.shape), "data_offsets": offsets}
        data += stored
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def torch_file(make: Callable) -> Before:
    """{here}/dit.pt, of what `make(torch, tensors)` gives."""

    def before(_given: Given, here: pathlib.Path) -> None:
        import torch

        content = make(torch, {name: torch.tensor(value) for name, value in dit_tensors().items()})
        torch.save(content, here / "dit.pt")

    return before


def torch_program(_given: Given, here: pathlib.Path) -> None:
    """{here}/dit.pt is a TorchScript archive, as inception-2015-12-05.pt is."""
    import torch

    torch.jit.script(torch.nn.Linear(2, 2)).save(str(here / "dit.pt"))


def autoencoder(**config) -> Before:
    """{here}/vae, a folder as diffusers writes it, with these values in config.json."""

    def before(given: Given, here: pathlib.Path) -> None:
        (here / "vae").mkdir()
        shutil.copy(given.vae, here / "vae" / "diffusion_pytorch_model.safetensors")
        (here / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"} | config))

    return before


# --- arrays and statistics


def npz(**arrays) -> Before:
    """{here}/s.npz of these arrays."""
    return lambda _given, here: np.savez_compressed(here / "s.npz", **arrays)


def npz_claiming(name: str, shape: tuple[int, ...], kind: str, held: int) -> Before:
    """{here}/s.npz, where `name` claims a shape and holds so many bytes, all zero."""

    def before(_given: Given, here: pathlib.Path) -> None:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": shape})
        with (
            zipfile.ZipFile(here / "s.npz", "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open(f"{name}.npy", "w", force_zip64=True) as file,
        ):
            file.write(header.getvalue())
            for _ in range(held // 2**20):
                file.write(bytes(2**20))
            file.write(bytes(held % 2**20))

    return before


TFDS = "tensorflow_datasets.core.features."
IMAGE = {
    "pythonClassName": TFDS + "image_feature.Image",
    "image": {"shape": {"dimensions": ["8", "8", "3"]}, "dtype": "uint8", "encodingFormat": "png"},
}
SPLIT = {
    "name": "train",
    "shardLengths": ["5"],
    "numBytes": "9",
    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
}
INFO = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [SPLIT]}


def classes(count: str) -> dict:
    """A feature of labels."""
    return {"pythonClassName": TFDS + "class_label_feature.ClassLabel", "classLabel": {"numClasses": count}}


def labelled(**features: dict) -> dict:
    """A features.json of images with labels, some of whose features are others."""
    named = {"image": IMAGE, "label": classes("2")} | features
    return {"pythonClassName": TFDS + "features_dict.FeaturesDict", "featuresDict": {"features": named}}


def prepared(features=None, info=None):
    """A row's `before`: {here}/tfds/tiny, a set of tensorflow-datasets of these two files, JSON or text."""

    def before(_given: Given, here: pathlib.Path) -> None:
        folder = here / "tfds" / "tiny" / "1.0.0"
        folder.mkdir(parents=True)
        for name, content in (
            ("features.json", labelled() if features is None else features),
            ("dataset_info.json", INFO if info is None else info),
        ):
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return before
