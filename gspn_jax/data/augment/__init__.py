"""Augmentation for classification: crops, flips and RandAugment on the host (`host`), erasing and mixing on the device.

What happens to an image follows from (seed, epoch, index) alone (`draws`), so that a resumed run, another number of
hosts and another number of workers see the same images. Ranges and magnitudes are those of timm 1.0.31.
"""
