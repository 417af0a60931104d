"""Images: parameters -> images over a mesh, a run -> images, images -> an .npz, a grid, scores."""
