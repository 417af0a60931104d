"""Augmentation in NumPy: what Pillow computes for each operation, to the bit, and timm's rules for boxes as loops."""

import math

import numpy as np

FILL = (124, 116, 104)


def look_up(image, tables):
    return np.stack([np.asarray(table)[image[..., c]] for c, table in enumerate(tables)], -1).astype(np.uint8)


def auto_contrast(image):
    tables = []
    for c in range(3):
        low, high = int(image[..., c].min()), int(image[..., c].max())
        scale = 255 / (high - low) if high > low else 1
        offset = -low * scale if high > low else 0
        tables.append([min(max(int(i * scale + offset), 0), 255) for i in range(256)])
    return look_up(image, tables)


def equalize(image):
    tables = []
    for c in range(3):
        counts = [int((image[..., c] == i).sum()) for i in range(256)]
        brightest = [count for count in counts if count][-1]
        step = (sum(counts) - brightest) // 255
        tables.append([min((step // 2 + sum(counts[:i])) // step, 255) for i in range(256)] if step else range(256))
    return look_up(image, tables)


def blend(degenerate, image, factor):
    """degenerate + factor (image - degenerate) in float32, cut off below."""
    difference = image.astype(np.float32) - degenerate.astype(np.float32)
    return np.clip(degenerate.astype(np.float32) + np.float32(factor) * difference, 0, 255).astype(np.uint8)


def grey(image):
    red, green, blue = (image[..., c].astype(np.int64) for c in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 2**15 >> 16).astype(np.uint8)


def smooth(image):
    """3x3 with 5 in the middle and 1 around it over 13; the border is kept."""
    result = image.copy()
    for i in range(1, image.shape[0] - 1):
        for j in range(1, image.shape[1] - 1):
            window = image[i - 1 : i + 2, j - 1 : j + 2].astype(np.int64).sum((0, 1)) + 4 * image[i, j].astype(np.int64)
            result[i, j] = (window + 6.5) // 13
    return result


def affine(image, a, b, c, d, e, f):
    """At each pixel the image at (a x + b y + c, d x + e y + f), by Pillow's cubic, whose slope is that of a = -1."""
    height, width, _ = image.shape
    result = np.empty_like(image)

    def cubic(v, t):
        return v[1] + t * (v[2] - v[0] + t * (2 * (v[0] - v[1]) + v[2] - v[3] + t * (v[1] - v[0] + v[3] - v[2])))

    for i, j in np.ndindex(height, width):
        x, y = a * (j + 0.5) + b * (i + 0.5) + c, d * (j + 0.5) + e * (i + 0.5) + f
        if not (0 <= x < width and 0 <= y < height):
            result[i, j] = FILL
            continue
        left, top = math.floor(x - 0.5), math.floor(y - 0.5)
        columns = [min(max(left + k, 0), width - 1) for k in (-1, 0, 1, 2)]
        rows = [min(max(top + k, 0), height - 1) for k in (-1, 0, 1, 2)]
        lines = [cubic([image[r, s].astype(np.float64) for s in columns], x - 0.5 - left) for r in rows]
        result[i, j] = np.clip(cubic(lines, y - 0.5 - top), 0, 255).astype(np.uint8)
    return result


def rotate(image, degrees):
    """About the centre, counterclockwise."""
    height, width, _ = image.shape
    angle = -math.radians(degrees % 360)
    a, b = round(math.cos(angle), 15), round(math.sin(angle), 15)
    c = a * (-width / 2) + b * (-height / 2) + width / 2
    f = -b * (-width / 2) + a * (-height / 2) + height / 2
    return affine(image, a, b, c, -b, a, f)


def operate(image, name, magnitude, sign):
    """timm's policy "rand-inc1" at a magnitude of 0..10; `sign` is 1 or -1."""
    share = magnitude / 10
    factor = max(0.1, 1 + sign * share * 0.9)
    match name:
        case "AutoContrast":
            return auto_contrast(image)
        case "Equalize":
            return equalize(image)
        case "Invert":
            return 255 - image
        case "Rotate":
            return rotate(image, sign * share * 30)
        case "Posterize":
            step = 2 ** (4 + int(share * 4))
            return (image.astype(int) // step * step).astype(np.uint8)
        case "Solarize":
            return np.where(image.astype(int) < 256 - int(share * 256), image, 255 - image)
        case "SolarizeAdd":
            return np.where(image < 128, np.minimum(image.astype(int) + int(share * 110), 255), image).astype(np.uint8)
        case "Color":
            return blend(np.repeat(grey(image)[..., None], 3, -1), image, factor)
        case "Contrast":
            return blend(np.full_like(image, int(grey(image).mean() + 0.5)), image, factor)
        case "Brightness":
            return blend(np.zeros_like(image), image, factor)
        case "Sharpness":
            return blend(smooth(image), image, factor)
        case "ShearX":
            return affine(image, 1, sign * share * 0.3, 0, 0, 1, 0)
        case "ShearY":
            return affine(image, 1, 0, 0, sign * share * 0.3, 1, 0)
        case "TranslateX":
            return affine(image, 1, 0, sign * share * 0.45 * image.shape[1], 0, 1, 0)
        case "TranslateY":
            return affine(image, 1, 0, 0, 0, 1, sign * share * 0.45 * image.shape[0])


def cubic_weights(size, target):
    """Weights [target, size] of an antialiased resize by the cubic with a = -0.5, rounded to 22 bits as Pillow does."""
    scale = size / target
    support = 2 * max(scale, 1)
    weights = np.zeros((target, size))
    for i in range(target):
        centre = (i + 0.5) * scale
        for j in range(max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), size)):
            t = abs((j + 0.5 - centre) / max(scale, 1))
            weights[i, j] = (1.5 * t - 2.5) * t * t + 1 if t < 1 else max(2 - t, 0) ** 2 * (1 - t) / 2
    return np.round(weights / weights.sum(1, keepdims=True) * 2**22) / 2**22


def resizes(image, height, width):
    """Both orders of the two passes, each of which rounds to uint8: versions of Pillow differ in it."""
    down, across = cubic_weights(image.shape[0], height), cubic_weights(image.shape[1], width)
    vertically, horizontally = (
        lambda a: np.clip(np.floor(np.einsum("ij,jwc->iwc", down, a) + 0.5), 0, 255),
        lambda a: np.clip(np.floor(np.einsum("ij,hjc->hic", across, a) + 0.5), 0, 255),
    )
    return vertically(horizontally(image)), horizontally(vertically(image))


def crop_box(height, width, u, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3)):
    """(top, left, height, width) of a random resized crop."""
    for n in range(10):
        target = (area[0] + u[2 * n] * (area[1] - area[0])) * height * width
        ratio = math.exp(math.log(aspect[0]) + u[2 * n + 1] * (math.log(aspect[1]) - math.log(aspect[0])))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if w <= width and h <= height:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    if width / height < aspect[0]:
        w, h = width, round(width / aspect[0])
    elif width / height > aspect[1]:
        w, h = round(height * aspect[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def erased_box(height, width, u, probability=0.25):
    """(top, bottom, left, right), or None, of random erasing."""
    if u[0] >= probability:
        return None
    for n in range(10):
        target = (0.02 + u[3 + n] * (1 / 3 - 0.02)) * height * width
        ratio = math.exp(math.log(0.3) * (1 - 2 * u[13 + n]))
        h, w = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if h < height and w < width:
            top, left = int(u[1] * (height - h + 1)), int(u[2] * (width - w + 1))
            return top, top + h, left, left + w
    return None


def mixed(images, targets, lam, centre=None):
    """(images, targets) of mixup, or with a (row, column) of CutMix."""
    images, targets = np.asarray(images, np.float64), np.asarray(targets, np.float64)
    count, height, width, _ = images.shape
    result = np.empty_like(images)
    box = (0, 0, 0, 0)
    if centre is not None:
        h, w = int(height * math.sqrt(1 - lam)), int(width * math.sqrt(1 - lam))
        box = (
            max(centre[0] - h // 2, 0),
            min(centre[0] + (h + 1) // 2, height),
            max(centre[1] - w // 2, 0),
            min(centre[1] + (w + 1) // 2, width),
        )
    for i in range(count):
        other = images[count - 1 - i]
        result[i] = images[i] if centre is not None else lam * images[i] + (1 - lam) * other
        result[i, box[0] : box[1], box[2] : box[3]] = other[box[0] : box[1], box[2] : box[3]]
    if centre is not None:
        lam = 1 - (box[1] - box[0]) * (box[3] - box[2]) / (height * width)
    return result, np.stack([lam * targets[i] + (1 - lam) * targets[count - 1 - i] for i in range(count)])
