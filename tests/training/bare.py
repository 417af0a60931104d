"""A machine that has JAX and little else, made by what cannot be imported."""

ABSENT = (
    "grain",
    "array_record",
    "tensorflow_datasets",
    "tyro",
    "tensorboardX",
    "sklearn",
    "safetensors",
    "torch",
    "matplotlib",
    "pytest",
)
"""What a bare machine may lack."""


BARE = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
