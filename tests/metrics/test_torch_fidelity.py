"""FID, Inception score, KID, precision and recall beside torch-fidelity's, on photographs of CIFAR-10.

Both sides start from the same pixels and the same random weights of Inception, and print a table. The number of images
a side is set by GSPN_TORCH_FIDELITY_IMAGES.
"""

import os
import pathlib
import sys
import tarfile
import types

import numpy as np
import pytest
from PIL import Image

from gspn_jax.metrics import inception
from gspn_jax.metrics.extractor import Extractor
from gspn_jax.metrics.frechet import Gaussian, frechet_distance, moments
from gspn_jax.metrics.kid import kernel_distance
from gspn_jax.metrics.reference import Reference
from gspn_jax.metrics.scores import Collector
from tests.real_images import archive

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

COUNT = int(os.environ.get("GSPN_TORCH_FIDELITY_IMAGES", 120))
ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
METRICS = ("fid", "is", "kid", "precision", "recall")

TOLERANCE = {"fid": 1e-4, "is": 1e-5, "kid": 1e-3, "precision": 0, "recall": 0}
"""Relative, from pixels. Networks in float32 sum in another order; with fewer images than features torch-fidelity's
root has rounding errors for eigenvalues; its KID is float32; precision and recall are shares of images."""


@pytest.fixture
def torch_fidelity(monkeypatch):
    """It imports torchvision, of which these metrics use nothing and whose builds do not load beside every PyTorch."""

    def module(name, **contents):
        stub = types.ModuleType(name)
        vars(stub).update(contents)
        monkeypatch.setitem(sys.modules, name, stub)
        return stub

    functional = module("torchvision.transforms.functional")
    transforms = module("torchvision.transforms", functional=functional)
    datasets = module("torchvision.datasets", CIFAR10=object, CIFAR100=object, STL10=object)
    module("torchvision", transforms=transforms, datasets=datasets)
    yield pytest.importorskip("torch_fidelity")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def photographs():
    """COUNT animals of the test set as samples, COUNT of all ten classes of the training set as the reference."""
    samples, real = [], []
    with tarfile.open(archive("cifar10_images.tar.gz")) as tar:
        for member in tar:
            split, name, number = pathlib.Path(member.name).parts[-3:] if member.isfile() else ("",) * 3
            index = int(number.partition(".")[0] or 0)
            if split == "test" and name in ANIMALS and len(samples) < COUNT and index <= COUNT // len(ANIMALS) + 1:
                chosen = samples
            elif split == "train" and len(real) < COUNT and index <= COUNT // 10 + 1:
                chosen = real
            else:
                continue
            chosen.append(np.asarray(Image.open(tar.extractfile(member)).convert("RGB")))
    assert len(samples) == len(real) == COUNT
    return np.stack(samples), np.stack(real)


class Pixels(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = torch.tensor(images.transpose(0, 3, 1, 2))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def theirs(torch_fidelity, weights, samples, real) -> dict[str, float]:
    found = torch_fidelity.calculate_metrics(
        input1=Pixels(samples),
        input2=Pixels(real),
        cuda=False,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        isc_splits=1,
        feature_layer_prc="2048",
        kid_subset_size=min(1000, COUNT),
        batch_size=20,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    names = (
        "frechet_inception_distance",
        "inception_score_mean",
        "kernel_inception_distance_mean",
        "precision",
        "recall",
    )
    return {metric: found[name] for metric, name in zip(METRICS, names, strict=True)}


def features_of(extractor, images):
    batches = [(features, np.asarray(mask)) for features, mask in extractor.stream([images])]
    return inception.Features(
        *(
            np.concatenate(
                [np.asarray(part)[mask] for part, mask in zip(parts, [mask for _, mask in batches], strict=True)]
            )
            for parts in zip(*[f for f, _ in batches], strict=True)
        )
    )


def test_metrics_are_those_of_torch_fidelity(torch_fidelity, photographs, tmp_path, capsys):
    samples, real = photographs
    state_dict = inception.random_state_dict(0)
    torch.save({name: torch.tensor(value) for name, value in state_dict.items()}, tmp_path / "inception.pth")

    extractor = Extractor(inception.load(tmp_path / "inception.pth"), batch_size=24)
    sampled, target = (features_of(extractor, images) for images in (samples, real))
    pool = target.pool.astype(np.float64)
    collector = Collector(METRICS)
    collector.add(sampled, np.ones(len(sampled.pool), bool))
    gaussian = Gaussian(pool.mean(0), np.cov(pool, rowvar=False), COUNT)
    ours = collector.scores(Reference("", "", gaussian, features=target.pool))
    their = theirs(torch_fidelity, tmp_path / "inception.pth", samples, real)

    with capsys.disabled():
        print(f"\n{COUNT} images a side\n| metric | gspn-jax | torch-fidelity | relative difference |")
        for name in METRICS:
            print(f"| {name} | {ours[name]:.8g} | {their[name]:.8g} | {abs(ours[name] / their[name] - 1):.1e} |")
    for name, tolerance in TOLERANCE.items():
        assert ours[name] == pytest.approx(their[name], rel=tolerance or 1e-7), name  # shares are float32 there

    # from the same activations, where they do not depend on the network's rounding
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    score = isc_features_to_metric(torch.tensor(sampled.logits), splits=1)["inception_score_mean"]
    assert ours["is"] == pytest.approx(score, rel=1e-10)
    settings = {"kid_subset_size": COUNT // 2, "kid_subsets": 20, "verbose": False}
    kid = kid_features_to_metric(torch.tensor(sampled.pool).double(), torch.tensor(target.pool).double(), **settings)[
        "kernel_inception_distance_mean"
    ]
    found = kernel_distance(sampled.pool, target.pool, subsets=20, subset_size=COUNT // 2)
    assert found == pytest.approx(kid, rel=1e-8)
    few = COUNT // 2  # features, so that covariances are regular
    fid = fid_statistics_to_metric(
        *(fid_features_to_statistics(torch.tensor(part.pool[:, :few]).double()) for part in (sampled, target)),
        verbose=False,
    )["frechet_inception_distance"]
    found = frechet_distance(*moments(sampled.pool[:, :few]), *moments(target.pool[:, :few]))
    assert found == pytest.approx(fid, rel=1e-6)  # the small eigenvalues of a general matrix
    # tr (C1 C2)^(1/2) is the sum of the singular values of X1 X2^T, exact where there are fewer images than features
    x, y = (part.pool - part.pool.astype(np.float64).mean(0) for part in (sampled, target))
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    squares = (x**2).sum() + (y**2).sum() - 2 * cross
    mean = sampled.pool.astype(np.float64).mean(0) - target.pool.astype(np.float64).mean(0)
    truth = mean @ mean + squares / (COUNT - 1)
    assert gaussian.distance(Gaussian(*moments(sampled.pool), COUNT)) == pytest.approx(truth, rel=1e-8)
    # few images, whose features random weights make nearly collinear: the most that float32 sums can be off
    assert ours["fid"] == pytest.approx(truth, rel=1e-5)
