"""Files and settings that someone else wrote: whatever is in them, they are read or refused with a sentence."""

import io
import json
import pathlib
import tempfile
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from gspn_jax.config import Config, ConfigError, from_dict, to_dict
from gspn_jax.data.latents import LatentMetadata, write_synthetic
from gspn_jax.metrics import npz
from gspn_jax.metrics.reference import read_reference
from gspn_jax.runs import checkpoints, manifest
from gspn_jax.runs.checkpoints import CheckpointError
from gspn_jax.state_dict import WeightsError, read_state_dict
from tests.training import tiny

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(values, path=()):
    """The path of every value in nested dicts and lists."""
    yield path
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for name, value in inner:
        yield from places(value, (*path, name))


def changed(values, path, new):
    """A copy of `values` with `new` at `path`."""
    if not path:
        return new
    copy = dict(values) if isinstance(values, dict) else list(values)
    copy[path[0]] = changed(values[path[0]], path[1:], new)
    return copy


CONFIG = json.loads(json.dumps(to_dict(tiny.config())))


@FUZZ
@given(st.sampled_from(list(places(CONFIG))), VALUES)
@example(("train", "steps"), "many")
@example(("train",), 3)
@example((), None)
def test_a_saved_config_is_read_or_refused(path, value):
    try:
        assert isinstance(from_dict(changed(CONFIG, path, value)), Config)
    except ConfigError as error:
        assert str(error)


def spoiled(content: bytes, edits: list[tuple[int, int]], length: int | None) -> bytes:
    """`content` with some bytes replaced, and cut or lengthened."""
    spoil = bytearray(content)
    for place, byte in edits:
        spoil[place % len(spoil)] = byte
    if length is not None:
        spoil = spoil[: length % (len(spoil) + 1)]
    return bytes(spoil)


EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4)
LENGTH = st.none() | st.integers(0, 10**6)


def in_a_file(content: bytes, name: str, read):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / name
        path.write_bytes(content)
        return read(path)


SAFETENSORS = save({"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, np.float16)})


@FUZZ
@given(EDITS, LENGTH)
def test_weights_are_read_or_refused(edits, length):
    try:
        found = in_a_file(spoiled(SAFETENSORS, edits, length), "w.safetensors", read_state_dict)
        assert all(value.dtype == np.float32 for value in found.values())
    except WeightsError as error:
        assert "w.safetensors" in str(error)


def archive(compression, **arrays) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, array in arrays.items():
            inner = io.BytesIO()
            np.save(inner, array)
            file.writestr(f"{name}.npy", inner.getvalue())
    return buffer.getvalue()


ARCHIVES = [
    archive(kind, mu=np.zeros(2048), sigma=np.eye(2048, 4), arr_0=np.zeros((4, 3, 3, 3), np.uint8))
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
]


@FUZZ
@given(st.sampled_from(ARCHIVES), EDITS, LENGTH)
def test_an_archive_of_arrays_is_read_or_refused(content, edits, length):
    def read(path):
        for name in npz.names(path, "--samples"):
            npz.read(path, name)
        images = npz.StoredImages(path, "--samples")
        assert sum(len(batch) for batch in images.batches(2)) == len(images)

    try:
        in_a_file(spoiled(content, edits, length), "s.npz", read)
    except ConfigError as error:
        assert "s.npz" in str(error)


@FUZZ
@given(st.sampled_from(ARCHIVES), EDITS, LENGTH)
def test_a_reference_is_read_or_refused(content, edits, length):
    try:  # sigma is not square: only what the damage hides sigma in can be read, as images
        assert in_a_file(spoiled(content, edits, length), "r.npz", read_reference).images
    except ConfigError as error:
        assert "r.npz" in str(error)


def test_an_archive_of_objects_is_not_unpickled(tmp_path):
    class Foreign:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "unpickled",)

    np.savez(tmp_path / "o.npz", arr_0=np.array([Foreign()], object))
    with pytest.raises(ConfigError):
        npz.read(tmp_path / "o.npz", "arr_0")
    with pytest.raises(ConfigError):
        npz.StoredImages(tmp_path / "o.npz", "--samples")
    assert not (tmp_path / "unpickled").exists()


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    write_synthetic(folder, records=8, shards=2, latent_shape=(8, 8, 4), num_classes=10)
    return json.loads((folder / "metadata.json").read_text())


@FUZZ
@given(st.data())
def test_metadata_of_latents_is_read_or_refused(latents, data):
    values = changed(latents, data.draw(st.sampled_from(list(places(latents)))), data.draw(VALUES))
    try:
        in_a_file(json.dumps(values).encode(), "metadata.json", lambda path: LatentMetadata.read(path.parent))
    except ConfigError as error:
        assert "metadata.json" in str(error)


META = {"config": CONFIG, "fingerprint": "f", "class_names": ["0"], "notes": {}}


@FUZZ
@given(st.sampled_from([path for path in places(META) if len(path) < 3]), VALUES, EDITS)
@example(("config",), [], [])
@example((), [], [])
def test_the_metadata_of_a_checkpoint_is_read_or_refused(path, value, edits):
    content = spoiled(json.dumps(changed(META, path, value)).encode(), edits, None)
    with tempfile.TemporaryDirectory() as run_dir:
        step = checkpoints.folder(run_dir) / "5"
        (step / "meta").mkdir(parents=True)
        (step / "meta" / "metadata").write_bytes(content)
        manifest.write(step)
        try:
            assert checkpoints.read_config(run_dir)[0] == 5
        except (CheckpointError, ConfigError) as error:
            assert str(error)


@FUZZ
@given(EDITS, LENGTH)
def test_a_manifest_that_was_changed_is_whole_or_says_what_is_wrong(edits, length):
    with tempfile.TemporaryDirectory() as folder:
        step = pathlib.Path(folder, "3")
        step.mkdir()
        for name in ("a", "b"):
            (step / name).write_text(name)
        manifest.write(step)
        path = step / manifest.NAME
        whole = path.read_bytes()
        path.write_bytes(spoiled(whole, edits, length))
        problem = manifest.problem(step)
        assert problem is None or isinstance(problem, str)
        if json_of(path) == json.loads(whole):
            assert problem is None


def json_of(path):
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None
