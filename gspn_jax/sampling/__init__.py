"""Images: parameters -> images over a mesh, a run -> images, images -> an .npz, a grid, scores."""

from gspn_jax import extras

extras.require("train", "PIL", "tqdm", by=__name__)
