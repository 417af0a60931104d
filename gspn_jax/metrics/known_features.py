"""Facts about Inception weights: files by their hash, and features of `self_test.fixed_images`."""

STRIDE = 128
"""Every 128th feature is stored."""

KNOWN_FILES = {
    "6726825d": "pt_inception-2015-12-05-6726825d.pth of pytorch-fid (weights-inception-2015-12-05-6726825d.pth of "
    "torch-fidelity), whose name has them"
}
"""First 8 hex digits of a file's SHA-256 -> which file that is. Its name is all that says so: the file itself was not
at hand when this was written, so no features of it are stored."""

# fmt: off
# by tests/metrics/torch_inception.py; tests/metrics/test_self_test.py computes them again
KNOWN_FEATURES: dict[str, dict[str, tuple[tuple[float, ...], ...]]] = {
    "6a2bd6f7a22a6a361b91854d71a59f965c07283f89597310845384a32a542bfe": {  # inception.random_state_dict(0)
        "pool": (
            (0, 0.07667931, 1.088049, 0, 0, 0.6516781, 0.01537587, 0.9382952, 0.007318807, 0.5173283, 0.1127957,
             0.2788041, 0.2498429, 0.9878928, 1.604331, 0.006995268),
            (0, 0.07437995, 1.21441, 0, 0, 0.7036163, 0.01648266, 1.095774, 0.007834454, 0.4984946, 0.1337193,
             0.2932438, 0.2724652, 1.15038, 1.783924, 0.01634671),
            (0, 0.1024974, 1.409977, 0, 0.0006161952, 0.7424404, 0.02094532, 1.184276, 0.00623132, 0.5040677,
             0.09954569, 0.3321687, 0.249028, 1.215835, 1.774132, 0.06111096),
        ),
        "spatial": (
            (0.5446954, 0.6704123, 1.127568, 0, 0, 0.4159861, 1.372907, 2.226938, 0.01034926, 2.048603, 0, 0, 0.5914825,
             1.327748, 1.02109, 0.2138139),
            (0.6381325, 0.9492287, 1.448087, 0, 0, 0.7301164, 1.649032, 2.406092, 0, 2.294146, 0, 0, 1.217242, 1.278475,
             0.9101239, 0.2284882),
            (0.6801816, 0.6316483, 1.400726, 0, 0, 0.74496, 1.480264, 1.81767, 0.1087842, 2.062844, 0, 0, 1.097134,
             1.430208, 0.6297203, 0.08440775),
        ),
        "logits": (
            (0.3484067, -0.246732, 0.675183, 1.040619, -0.4911815, 1.672664, 0.4949447, 1.29628),
            (0.2166349, -0.3195081, 0.7560505, 1.126878, -0.6512596, 1.859083, 0.5144892, 1.406446),
            (0.2300816, -0.330941, 0.7902002, 1.192937, -0.6886844, 1.902375, 0.6115987, 1.397241),
        ),
    },
}
"""`inception.digest` of weights -> kind of features -> those of each image, computed in float64 by PyTorch."""
