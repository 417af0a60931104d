"""Attacks by data and weights of other people (B): read, or refused in a sentence.

What is read, and that it is read right, is compared in the tests of the reader: tests/data, tests/convert,
tests/autoencoder, tests/metrics.
"""

import io
import zipfile

import ml_dtypes
import numpy as np
import pytest

from gspn_jax import classify
from tests.attacks import foreign
from tests.attacks.attack import GOES_ON, Attack, convert, draw, evaluate, flags, prepare, rows, train
from tests.attacks.foreign import LFS_POINTER, autoencoder, dit, encoded, files, links, npz, tar, tars, torch_file


def latents(*arguments, source=("--images", "{here}/images"), vae="{vae}", before=None):
    """prepare latents of the row's images, of 8 pixels unless the arguments say."""
    size = () if "--image-size" in arguments else ("--image-size", "8")
    return prepare("latents", "--vae", vae, "--output", "{here}/out", *source, *size, *arguments, before=before)


def of_tars(contents, *arguments, source="{here}/tars"):
    return latents(*arguments, source=("--tars", source), before=tars(contents))


def samples(*arguments, path="{here}/s.npz", before=None):
    return evaluate("--samples", path, *arguments, before=before)


def imported(name, *arguments, before):
    return convert(
        "import", "--weights", f"{{here}}/{name}", "--heads", "2", "--output", "{here}/run", *arguments, before=before
    )


FOLDER = ("--data.source", "folder", "--data.path", "{here}/images", "--data.channels", "3", "--data.num-classes", "2")
BEGUN = ("out", "out/*")
RUN = ("run", "run/*")
LAST = ("--null-row", "last")

IMAGES = [
    Attack(
        "B9",
        "train on a folder of class folders without images",
        train(*FOLDER, before=lambda given, here: (here / "images" / "a").mkdir(parents=True)),
        "{here}/images",
    ),
    Attack(
        "B9",
        "images as .webp, .bmp, .gif, .tif and .JPEG",
        latents(
            before=files(
                {
                    f"images/a/{kind}.{end}": encoded(kind)
                    for kind, end in (
                        ("WEBP", "webp"),
                        ("BMP", "bmp"),
                        ("GIF", "gif"),
                        ("TIFF", "tif"),
                        ("JPEG", "JPEG"),
                    )
                }
            )
        ),
        "found 5 images of 1 class",
        GOES_ON,
        writes=BEGUN,
    ),
    Attack(
        "B9",
        "files of other kinds, hidden ones and ones without an extension",
        latents(
            before=files(dict.fromkeys(("images/a/0.png", "images/a/1.heic", "images/a/._0.png", "images/a/x"), None))
        ),
        ("found 1 image of 1 class", "1 .heic", "1 hidden", "1 files without an extension"),
        GOES_ON,
        writes=BEGUN,
    ),
    Attack(
        "B9",
        "a class folder that is a link",
        latents(before=links({"b": "{here}/elsewhere/b"})),
        "found 3 images of 2 classes, first: a, b",
        GOES_ON,
        writes=BEGUN,
    ),
    Attack(
        "B9",
        "links to nothing, to themselves and to the folder they lie in",
        latents(before=links({"a/1.png": "nowhere.png", "a/2.png": "2.png", "a/up": "{here}/images", "again": "."})),
        ("found 1 image of 1 class", "3 links in a loop", "1 broken links"),
        GOES_ON,
        writes=BEGUN,
    ),
    Attack("B9", "a pipe in place of an image", latents(before=foreign.pipe), "found no JPEG, PNG"),
    Attack(
        "B9",
        "a device in place of an image, scored",
        samples(path="{here}/images/b", before=links({"b": "/dev", "a/1.png": "/dev/zero"})),
        "found none below",
    ),
    Attack(
        "B9",
        "an EPS, which is a program, called x.jpg",
        latents(before=files({"images/a/x.jpg": encoded("EPS")})),
        "x.jpg is not a usable image: its format is not recognised",
        writes=BEGUN,
    ),
    Attack(
        "B9",
        "an EPS called x.jpg among samples",
        samples(path="{here}/images", before=files({"images/x.jpg": encoded("EPS")})),
        "x.jpg is not a usable image: its format is not recognised",
    ),
    Attack(
        "B9",
        "a page of HTML called x.jpg",
        latents(before=files({"images/a/x.jpg": b"<html>404</html>"})),
        "x.jpg is not a usable image: its format is not recognised",
        writes=BEGUN,
    ),
    Attack(
        "B9",
        "a Git LFS pointer called x.jpg",
        latents(before=files({"images/a/x.jpg": LFS_POINTER})),
        "x.jpg is not a usable image: it is a Git LFS pointer",
        writes=BEGUN,
    ),
    Attack(
        "B9",
        "a first image that is empty, to be left out",
        latents("--bad-images", "skip", before=files({"images/a/!.png": b"", "images/a/0.png": None})),
        "!.png is not a usable image: the file is empty; it is left out",
        GOES_ON,
        writes=BEGUN,
    ),
    Attack(
        "B9",
        "a first image that is empty, among samples of their own size",
        samples(path="{here}/images", before=files({"images/!.png": b"", "images/0.png": None})),
        "!.png is not a usable image: the file is empty",
    ),
    Attack(
        "B9",
        "a PNG that claims 2147483647 x 1 pixels",
        latents(before=files({"images/a/0.png": foreign.claiming_png(2**31 - 1, 1)})),
        "0.png is not a usable image",
        writes=BEGUN,
        memory=2**29,
    ),
    Attack(
        "B9",
        "a TIFF of 234 bytes that claims 24 x 5898244 pixels",
        latents(before=files({"images/a/0.tif": foreign.claiming_tiff(24, 5898244)})),
        "0.tif is not a usable image",
        writes=BEGUN,
        memory=2**29,
    ),
    Attack(
        "B9",
        "a PNG of 1 x 20000 pixels, made 256 x 256",
        latents("--image-size", "256", before=files({"images/a/0.png": encoded(size=(1, 20000))})),
        "found 1 image",
        GOES_ON,
        writes=BEGUN,
        memory=2**30,
    ),
    Attack(
        "B9",
        "a TIFF of floating-point pixels",
        latents(before=files({"images/a/0.tif": encoded("TIFF", mode="F")})),
        "floating-point pixels have no known range",
        writes=BEGUN,
    ),
    Attack(
        "B10",
        "train on the folder above train/ and val/",
        train(*FOLDER, before=files({"images/train/n1/0.png": None, "images/val/n1/0.png": None})),
        ("must be classes, found the parts of a set, train, val", "give one of them, such as"),
    ),
    Attack(
        "B10",
        "prepare the folder above train/ and val/",
        latents(before=files({"images/train/n1/0.png": None, "images/val/n1/0.png": None})),
        "must be classes, found the parts of a set, train, val",
    ),
    Attack(
        "B10",
        "the same, insisting on two classes",
        latents("--num-classes", "2", before=files({"images/train/n1/0.png": None, "images/val/n1/0.png": None})),
        "found 2 images of 2 classes, first: train, val",
        GOES_ON,
        writes=BEGUN,
    ),
    Attack(
        "B10",
        "another number of classes than there are",
        latents("--num-classes", "3", source=("--images", "{images}")),
        "--num-classes is 3, but 6 images of 2 classes, first: a, b were found",
    ),
    Attack(
        "B10",
        "the usual folder of downloads, with the validation archive",
        of_tars(
            {
                "ILSVRC2012_img_train.tar": foreign.imagenet("n01", "n02"),
                "ILSVRC2012_img_val.tar": {"ILSVRC2012_val_1.JPEG": encoded("JPEG")},
            }
        ),
        ("found ILSVRC2012_img_val.tar, whose name says 'val'", "ILSVRC2012_img_train.tar"),
    ),
    Attack(
        "B10",
        "a folder with a test archive of another name",
        of_tars({"train.tar": foreign.imagenet("n01", "n02"), "my-test-2.tar": {"1.png": None}}),
        "found my-test-2.tar, whose name says 'test'",
    ),
    Attack(
        "B10",
        "the training archive beside that of the third task, which has some of its classes",
        of_tars(
            {
                "ILSVRC2012_img_train.tar": foreign.imagenet("n01", "n02"),
                "ILSVRC2012_img_train_t3.tar": foreign.imagenet("n02"),
            }
        ),
        "must lie in one tar, found n02.tar in",
    ),
    Attack(
        "B10",
        "the training archive by its name",
        of_tars(
            {"ILSVRC2012_img_train.tar": foreign.imagenet("n01", "n02"), "ILSVRC2012_img_val.tar": b""},
            source="{here}/tars/ILSVRC2012_img_train.tar",
        ),
        "found 2 images of 2 classes, first: n01, n02",
        GOES_ON,
        writes=BEGUN,
    ),
    Attack(
        "B10",
        "one tar of class folders",
        of_tars({"imagenet.tar": {f"imagenet/train/n0{i}/{i}.png": None for i in (1, 2, 3)}}),
        "found 3 images of 3 classes, first: n01, n02, n03",
        GOES_ON,
        writes=BEGUN,
    ),
    Attack(
        "B10",
        "one tar with train/ and val/",
        of_tars({"imagenet.tar": {"train/n01/1.png": None, "val/n01/1.png": None}}),
        "found the parts of a set, train, val",
    ),
    Attack(
        "B10",
        "one tar with class folders and an image beside them",
        of_tars({"imagenet.tar": {"n01/1.png": None, "n02/1.png": None, "3.png": None}}),
        ("must all lie in class folders, or none", "3.png"),
    ),
    Attack(
        "B10",
        "shards of webdataset whose labels leave numbers out",
        of_tars({f"shard-00000{i}.tar": {"0.png": None, "0.cls": b"7"} for i in range(2)}),
        "go up to 7 without 7 of the numbers below it",
    ),
    Attack(
        "B10",
        "the same, with the number of classes",
        of_tars({f"shard-00000{i}.tar": {"0.png": None, "0.cls": b"7"} for i in range(2)}, "--num-classes", "8"),
        "found 2 images of 8 classes",
        GOES_ON,
        writes=BEGUN,
    ),
    Attack(
        "B10",
        "shards without labels",
        of_tars({f"shard-00000{i}.tar": {f"{i}.png": None} for i in range(2)}),
        "are numbered like shards of one set (shard-000000.tar to shard-000001.tar)",
    ),
    Attack(
        "B10",
        "a shard with its labels in .json",
        of_tars({"a.tar": {"0.png": None, "0.json": b"{}"}}),
        "found 1 .json files beside 1 images, whose labels are not read",
    ),
    Attack(
        "B10",
        "a label that is a word",
        of_tars({"a.tar": {"0.png": None, "0.cls": b"cat"}}),
        "must have a number as .cls beside it, found b'cat'",
    ),
    Attack(
        "B10",
        "tars that are compressed",
        of_tars({"n01.tar.gz": b"\x1f\x8b"}),
        "a folder of tar files without compression, found none",
    ),
    Attack("B10", "a page of HTML called n01.tar", of_tars({"n01.tar": b"<html>" * 200}), "found otherwise"),
    Attack(
        "B10",
        "a tar cut in its middle",
        of_tars({"n01.tar": tar({"n01/1.png": None, "n02/2.png": None})[:1200]}),
        "n01.tar must be a tar file without compression, found otherwise",
    ),
]

WEIGHTS = [
    *(
        Attack(
            "B11",
            f"a DiT in {np.dtype(dtype).name}",
            imported("dit.safetensors", *LAST, before=dit(dtype=dtype)),
            f"32 tensors of {np.dtype(dtype).name}",
            GOES_ON,
            writes=RUN,
            slow=dtype in (np.float64, ml_dtypes.float8_e5m2),
        )
        for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float64)
    ),
    Attack(
        "B11",
        "a DiT in int8",
        imported("dit.safetensors", *LAST, before=dit(dtype=np.int8)),
        "must be of floating point, found int8: quantized weights are not read",
    ),
    Attack(
        "B11",
        "a DiT of complex numbers",
        imported("dit.safetensors", *LAST, before=dit(dtype=np.complex64)),
        "F8_E8M0, found C64",
    ),
    Attack(
        "B11",
        "a table of 11 classes, the last of which may be the null class",
        imported("dit.safetensors", before=dit()),
        "--null-row must be last or none for a table of 11 classes",
    ),
    Attack(
        "B11",
        "a table without a null class",
        imported("dit.safetensors", "--null-row", "none", before=dit()),
        "it was taken for a model of ddpm",
        GOES_ON,
        writes=RUN,
    ),
    Attack(
        "B11",
        "a SiT, which has the same names",
        imported("dit.safetensors", *LAST, "--objective", "flow", before=dit()),
        "32 tensors of float32",
        GOES_ON,
        writes=RUN,
    ),
    Attack(
        "B11",
        "names of data-parallel and compiled modules",
        imported(
            "dit.safetensors",
            *LAST,
            before=dit(lambda tensors: {f"module._orig_mod.{name}": value for name, value in tensors.items()}),
        ),
        "it was taken for a model",
        GOES_ON,
        writes=RUN,
    ),
    Attack(
        "B11",
        "positions that are not DiT's, in float16",
        imported(
            "dit.safetensors",
            *LAST,
            before=dit(lambda tensors: tensors | {"pos_embed": tensors["pos_embed"] + 0.01}, np.float16),
        ),
        "must be the fixed sine-cosine table of DiT",
    ),
    Attack(
        "B11",
        "a block whose number has 5,000 digits",
        imported(
            "dit.safetensors",
            *LAST,
            before=dit(lambda tensors: tensors | {f"blocks.{'9' * 5000}.attn.qkv.bias": np.zeros(3)}),
        ),
        "must be numbered from 0 to 2, found one of 5,000 digits",
    ),
    Attack(
        "B11",
        "a block with the number 99999999",
        imported(
            "dit.safetensors",
            *LAST,
            before=dit(lambda tensors: tensors | {"blocks.99999999.attn.qkv.bias": np.zeros(3)}),
        ),
        "must be numbered from 0 to 2, found 99999999",
        memory=2**29,
    ),
    *(
        Attack("B11", f"a Git LFS pointer as {name}", make, "is a Git LFS pointer")
        for name, make in (
            ("dit.pt", imported("dit.pt", before=files({"dit.pt": LFS_POINTER}))),
            ("dit.safetensors", imported("dit.safetensors", before=files({"dit.safetensors": LFS_POINTER}))),
            (
                "a classifier's model.safetensors",
                flags(
                    classify.main,
                    "evaluate",
                    "--run",
                    "{here}/model.safetensors",
                    "--images",
                    "{images}",
                    before=files({"model.safetensors": LFS_POINTER}),
                ),
            ),
            ("vae.safetensors", latents(vae="{here}/vae.safetensors", before=files({"vae.safetensors": LFS_POINTER}))),
            (
                "inception.pth",
                samples("--inception", "{here}/i.pth", path="{images}", before=files({"i.pth": LFS_POINTER})),
            ),
        )
    ),
    Attack(
        "B12",
        "the folder of SDXL's autoencoder, whose scale is another",
        latents(source=("--images", "{images}"), vae="{here}/vae", before=autoencoder(scaling_factor=0.13025)),
        "(latent - 0) * 0.13025",
        GOES_ON,
        writes=BEGUN,
    ),
    Attack(
        "B12",
        "an autoencoder with a shift",
        latents(
            source=("--images", "{images}"),
            vae="{here}/vae",
            before=autoencoder(scaling_factor=0.3611, shift_factor=0.1159),
        ),
        "(latent - 0.1159) * 0.3611",
        GOES_ON,
        writes=BEGUN,
    ),
    Attack(
        "B12",
        "a file that does not tell its scale",
        latents(source=("--images", "{images}")),
        "does not tell the scale of its latents: taken for Stable Diffusion 1's, 0.18215",
        GOES_ON,
        writes=BEGUN,
    ),
    Attack(
        "B12",
        "the scale by a flag",
        latents("--vae-scale", "0.13025", source=("--images", "{images}")),
        "(latent - 0) * 0.13025",
        GOES_ON,
        writes=BEGUN,
    ),
    Attack(
        "B12",
        "another scale by a flag than the file's",
        latents(
            "--vae-scale",
            "0.18215",
            source=("--images", "{images}"),
            vae="{here}/vae",
            before=autoencoder(scaling_factor=0.13025),
        ),
        "tells of latents of scaling_factor 0.13025 and shift_factor 0, found 0.18215 and 0 asked for",
    ),
    *(
        Attack(
            "B12",
            f"an autoencoder with {name} {value!r}",
            latents(source=("--images", "{images}"), vae="{here}/vae", before=autoencoder(**{name: value})),
            said,
        )
        for name, value, said in (
            ("scaling_factor", "large", "must be greater than 0"),
            ("scaling_factor", -1, "must be greater than 0"),
            ("scaling_factor", float("nan"), "is not finite"),
            ("latents_mean", [0.0] * 4, "must have one scale and shift"),
            ("norm_num_groups", 16, "norm_num_groups must be 32, found 16"),
        )
    ),
    Attack(
        "B12",
        "a folder without an autoencoder",
        latents(source=("--images", "{images}"), vae="{images}"),
        "must hold diffusion_pytorch_model.safetensors, or a folder vae with it",
    ),
    Attack(
        "B13",
        "settings of another program beside the samples",
        samples(before=npz(arr_0=np.zeros((8, 4, 4, 3), np.uint8), settings=np.array("seed=3 cfg=1.5"))),
        "found no --inception",
    ),
    Attack(
        "B13",
        "samples in Fortran order",
        samples(before=npz(arr_0=np.asfortranarray(np.zeros((8, 4, 4, 3), np.uint8)))),
        "found no --inception",
    ),
    Attack(
        "B13",
        "samples as floats",
        samples(before=npz(arr_0=np.zeros((8, 4, 4, 3)))),
        "must have images as uint8 [N, H, W, 3], found float64 [8, 4, 4, 3]",
    ),
    Attack(
        "B13",
        "samples as Python objects",
        samples(before=npz(arr_0=np.array([{}, {}], object))),
        "it holds Python objects, whose code is not run",
    ),
    Attack(
        "B13",
        "samples that claim to be more than they are",
        samples(before=foreign.npz_claiming("arr_0", (10**9, 64, 64, 3), "|u1", 1000)),
        "it claims uint8 [1000000000, 64, 64, 3] and holds 1,000 bytes",
        memory=2**29,
    ),
    Attack(
        "B13",
        "features of 82 MB in 0.1 MB",
        evaluate(
            *("--samples", "{images}", "--inception", "{other_weights}", "--reference", "{here}/s.npz"),
            before=foreign.npz_claiming("features", (10_000, 2048), "<f4", 10_000 * 2048 * 4),
        ),
        "it claims 0.1 GB of what takes 0.1 MB in the file",
        memory=2**30,
    ),
    Attack("B14", "a run directory in a bucket", train("--run-dir", "s3://bucket/run"), "a folder of this machine"),
    Attack(
        "B14",
        "a home in a flag that the shell leaves alone",
        draw(run="~/no such run"),
        "no checkpoint in {home}/no such run",
    ),
    Attack(
        "B15",
        "a features.json that names a module to import",
        latents(
            source=("--tfds", "tiny", "--tfds-dir", "{here}/tfds"),
            before=foreign.prepared({"pythonClassName": "this.Foreign", "featuresDict": {}}),
        ),
        "must be tensorflow-datasets' own, found the class 'this.Foreign'",
    ),
    *(
        Attack(
            "B15",
            f"a set of tensorflow-datasets {what}",
            latents(source=("--tfds", "tiny", "--tfds-dir", "{here}/tfds"), before=foreign.prepared(**files)),
            says,
        )
        for what, files, says in (
            (
                "whose label names a module to import",
                {"features": foreign.labelled(label={"pythonClassName": "this.Foreign"})},
                "found the class 'this.Foreign'",
            ),
            (
                "that names a module within tensorflow-datasets that is none",
                {"features": {"pythonClassName": foreign.TFDS + "os.system"}},
                "found 'tiny'",
            ),
            (
                "whose class is a number",
                {"features": {"pythonClassName": 3}},
                "must be as tensorflow-datasets wrote them",
            ),
            ("whose features.json is empty", {"features": ""}, "found 'tiny'"),
            ("whose features.json is a list", {"features": []}, "found the class ''"),
            ("whose features.json nests", {"features": "[" * 10**5}, "must be as tensorflow-datasets wrote them"),
            ("whose dataset_info.json nests", {"info": "[" * 10**5}, "must be as tensorflow-datasets wrote them"),
            (
                "whose image has a side of letters",
                {"features": foreign.labelled(image=foreign.IMAGE | {"image": {"shape": {"dimensions": ["a"]}}})},
                "must be as tensorflow-datasets wrote them",
            ),
            ("of -3 classes", {"features": foreign.labelled(label=foreign.classes("-3"))}, "found -3"),
            ("of 10**12 classes", {"features": foreign.labelled(label=foreign.classes(str(10**12)))}, "to 1,000,000"),
            ("without its split", {"info": foreign.INFO | {"splits": []}}, "data.split must be a split of 'tiny'"),
            ("without its shards", {}, "the shards of 'train' must be files in"),
            (
                "whose shards lie elsewhere",
                {"info": foreign.INFO | {"splits": [foreign.SPLIT | {"filepathTemplate": "../../../etc/passwd"}]}},
                "etc/passwd",
            ),
        )
    ),
    Attack(
        "B15",
        "a set of tensorflow-datasets whose description is fetched from elsewhere",
        latents(source=("--tfds", "huggingface:mnist")),
        "whose description is code from elsewhere",
    ),
]


def repeated(torch, tensors):
    return tensors | {"blocks.0.attn.qkv.weight": torch.zeros(1).expand(131072, 131072)}


def zip_archive() -> bytes:
    """One that holds a text."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.txt", "no weights")
    return packed.getvalue()


ZIP = zip_archive()


def holds_itself(torch, tensors):
    content = {}
    content["model"] = content
    return content


TORCH = [
    *(
        Attack(
            "B11",
            f"a DiT under {told}",
            imported("dit.pt", *LAST, before=torch_file(make)),
            f"32 tensors of float32 under '{wrapper}'",
            GOES_ON,
            writes=RUN,
        )
        for told, wrapper, make in (
            ("model_ema, beside model", "model_ema", lambda torch, t: {"model": {"x": t["pos_embed"]}, "model_ema": t}),
            (
                "state_dict, model and module.",
                "model",
                lambda torch, t: {"state_dict": {"model": {f"module.{name}": value for name, value in t.items()}}},
            ),
            (
                "ema, of parameters that require a gradient",
                "ema",
                lambda torch, t: {"ema": {name: torch.nn.Parameter(value) for name, value in t.items()}},
            ),
        )
    ),
    *(
        Attack("B11", f"a PyTorch file with {told}", imported("dit.pt", *LAST, before=before), said, memory=2**31)
        for told, before, said in (
            ("a tensor of 69 GB that repeats one value", torch_file(repeated), "found a few that are repeated"),
            (
                "a tensor without values (meta)",
                torch_file(lambda torch, t: t | {"a": torch.zeros(3, device="meta")}),
                "must be a dense tensor with its values, found one without values (meta)",
            ),
            (
                "a sparse tensor",
                torch_file(lambda torch, t: t | {"a": torch.eye(3).to_sparse()}),
                "must be a dense tensor with its values, found one of layout torch.sparse_coo",
            ),
            (
                "a quantized tensor",
                torch_file(lambda torch, t: t | {"a": torch.quantize_per_tensor(torch.ones(3), 1, 0, torch.qint8)}),
                "quantized weights are not read",
            ),
            ("a number", torch_file(lambda torch, t: 3), "must hold a state_dict"),
            ("a scalar among its tensors", torch_file(lambda torch, t: t | {"step": 3}), "must hold a state_dict"),
            ("a dictionary that holds itself", torch_file(holds_itself), "must hold a state_dict"),
            ("nothing", torch_file(lambda torch, t: {}), "must hold a state_dict"),
            (
                "a whole module in place of its state_dict",
                torch_file(lambda torch, t: torch.nn.Linear(2, 2)),
                "whose code is not run: save a state_dict()",
            ),
            ("a program (TorchScript)", foreign.torch_program, "it is a TorchScript archive"),
            ("an archive of other files (.zip)", files({"dit.pt": ZIP}), "it is damaged, or of another kind"),
            ("a page of HTML", files({"dit.pt": b"<html>404</html>"}), "it is damaged, or of another kind"),
        )
    ),
]

ATTACKS = IMAGES + WEIGHTS + TORCH


@rows(IMAGES + WEIGHTS)
def test_it_is_read_or_refused(attack, withstand):
    withstand(attack)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
@rows(TORCH)
def test_a_torch_file_is_read_or_refused(attack, withstand):
    withstand(attack)
