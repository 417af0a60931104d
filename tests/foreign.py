"""What a pickle of somebody else may hold."""

import pathlib


class Foreign:
    """An object whose unpickling leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)
