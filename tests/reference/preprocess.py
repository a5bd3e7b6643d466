"""The reference of preprocessing: stored values -> HU -> windows -> u8 [3, 256, 256], in float64 with numpy and scipy.

Written from the recipe in docs, not from the Rust code, and meant to be read beside it. Four commands:

    preprocess.py cases [--write]              the synthetic cases of preprocess-cases.csv: digests agree (or are written)
    preprocess.py digest PATH...               prints `digest,SOP Instance UID,frame,file` of each frame's tensor
    preprocess.py compare TENSORS PATH...      every tensor of `edge classify --tensors TENSORS PATH...` against this one
    preprocess.py time                         how long numpy and scipy take for the slice of `cargo bench -p shared`

Digests are BLAKE3 of the tensor's bytes. Exit code 1 when something differs.
"""

import argparse
import csv
import pathlib
import statistics
import sys
import time
from dataclasses import dataclass, replace

import blake3
import numpy as np
from scipy import ndimage

SIDE = 256
WINDOWS_HU = ((-600.0, 1500.0), (100.0, 700.0), (40.0, 400.0))  # level, width: lung, PE, mediastinal
CASES = pathlib.Path(__file__).with_name("preprocess-cases.csv")


class Refused(Exception):
    """The recipe has no tensor for this image."""


@dataclass(frozen=True)
class Image:
    """Stored values [row, column] (int64, after masking and sign extension) and what they mean."""

    stored: np.ndarray
    slope: float = 1.0
    intercept: float = 0.0
    padding: int | None = None
    range_limit: int | None = None

    def is_padding(self):
        if self.padding is None:
            return np.zeros(self.stored.shape, bool)
        limit = self.padding if self.range_limit is None else self.range_limit
        low, high = sorted((self.padding, limit))
        return (self.stored >= low) & (self.stored <= high)

    def hounsfield(self):
        return self.slope * self.stored.astype(np.float64) + self.intercept


# ---- the recipe -----------------------------------------------------------------------------------------------------


def stored_values(cells, bits_stored, high_bit, is_signed):
    """Cells (unsigned integers) to stored values: bits outside of the field masked, then sign extension."""
    values = (cells.astype(np.int64) >> (high_bit + 1 - bits_stored)) & ((1 << bits_stored) - 1)
    if is_signed:
        values = np.where(values >= 1 << (bits_stored - 1), values - (1 << bits_stored), values)
    return values


def windowed(image, series=None, body_mask=False):
    """u8 [3, row, column] of one image; `series` are the images of its series where the range is theirs."""
    hu, padding = image.hounsfield(), image.is_padding()
    if body_mask:
        outside = ~body(hu, padding)
        hu, padding = np.where(outside, -1000.0, hu), padding & ~outside
    channels = []
    for level, width in WINDOWS_HU:
        low, high = level - width / 2, level + width / 2
        clipped = np.clip(hu, low, high)
        if series is None:
            scaled = ((clipped - low) * 255.0) / (high - low)
        else:
            in_series = np.concatenate([np.clip(i.hounsfield(), low, high)[~i.is_padding()] for i in series])
            least = in_series.min()
            most = (in_series - least).max()
            scaled = (clipped - least) / most * 255.0 if most > 0 else np.zeros(hu.shape)
        # The cast to u8 truncates; padding may lie below the series' minimum, and is overwritten.
        channels.append(np.where(padding, 0, np.trunc(np.clip(scaled, 0, 255))).astype(np.uint8))
    return np.stack(channels)


def body(hu, padding):
    """Bool [row, column]: the largest dense region after an opening, its holes filled, with a margin."""
    square, cross = np.ones((3, 3), bool), ndimage.generate_binary_structure(2, 1)
    dense = ndimage.binary_opening((hu >= -300.0) & ~padding, square, iterations=2)
    labels, n_regions = ndimage.label(dense, cross)
    if n_regions == 0:
        return np.ones(hu.shape, bool)
    sizes = np.bincount(labels.ravel())[1:]
    region = ndimage.binary_fill_holes(labels == 1 + int(sizes.argmax()), cross)
    return ndimage.binary_dilation(region, square, iterations=4)


def output_side(n, longer):
    """round_half_even(n x 256 / longer); Python's round() of an exact quotient of small integers is just that."""
    return round(n * SIDE / longer)


def resized(channels):
    """u8 [3, 256, 256] of u8 [3, row, column]: aligned-corner bilinear, floor(x + 0.5), centred, 0 around."""
    rows, columns = channels.shape[1:]
    height, width = (output_side(n, max(rows, columns)) for n in (rows, columns))
    if min(height, width) < 2:
        raise Refused(f"{rows} x {columns}: a side under 2 pixels")
    positions = np.meshgrid(
        np.arange(height) * (rows - 1) / (height - 1), np.arange(width) * (columns - 1) / (width - 1), indexing="ij"
    )
    out = np.zeros((3, SIDE, SIDE), np.uint8)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    for channel, plane in enumerate(channels):
        mean = ndimage.map_coordinates(plane.astype(np.float64), positions, order=1, mode="nearest")
        # Every mean is a multiple of 1 / divisor. Going to that integer removes the error of float64 (about 1e-12)
        # before the rounding, so that a tie is a tie.
        divisor = (height - 1) * (width - 1)
        total = np.rint(mean * divisor).astype(np.int64)
        assert np.abs(total - mean * divisor).max() < 1e-3
        out[channel, top : top + height, left : left + width] = (2 * total + divisor) // (2 * divisor)
    return out


def tensor(image, **options):
    return resized(windowed(image, **options))


def digest(array):
    return blake3.blake3(np.ascontiguousarray(array).tobytes()).hexdigest()


# ---- the synthetic cases, the same integers as shared/tests/scene --------------------------------------------------


def noise(seed, n_bytes):
    """SplitMix64's output, little-endian bytes."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, n_bytes // 8 + 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return z.astype("<u8").tobytes()[:n_bytes]


def chest():
    """Stored values of 512 x 512: body, lungs, a table below, air, and -2000 outside of the field of view."""
    y, x = np.mgrid[-256:256, -256:256]
    index = np.arange(512 * 512, dtype=np.uint64).reshape(512, 512)
    grain = ((index * np.uint64(2654435761) & np.uint64(0xFFFFFFFF)) >> np.uint64(24)).astype(np.int64) - 128
    distance = x * x + y * y
    is_lung = sum((x - c) ** 2 * 2 + y * y < 20000 for c in (-100, 100)) > 0
    is_table = (y >= 230) & (y < 240) & (np.abs(x) < 80)
    air = 24 + np.sign(grain) * (np.abs(grain) // 8)
    stored = np.where(is_lung, 200 + grain, 1064 + grain)
    stored = np.where(distance > 45000, np.where(is_table, 1064, air), stored)
    return np.where(distance > 65000, -2000, stored)


def case_image(case, seed):
    rescale = {
        "slope": float(case["slope"]),
        "intercept": float(case["intercept"]),
        "padding": int(case["padding"]) if case["padding"] else None,
        "range_limit": int(case["range_limit"]) if case["range_limit"] else None,
    }
    if case["scene"] == "chest":
        return Image(chest(), **rescale)
    rows, columns, allocated, stored, high = (
        int(case[name]) for name in ("rows", "columns", "bits_allocated", "bits_stored", "high_bit")
    )
    order = {"little": "<", "big": ">"}[case["byte_order"]]
    cells = np.frombuffer(noise(seed, rows * columns * allocated // 8), f"{order}u{allocated // 8}")
    return Image(stored_values(cells.reshape(rows, columns), stored, high, case["signed"] == "1"), **rescale)


def case_tensor(case):
    seed = int(case["seed"])
    image = case_image(case, seed)
    series = [image, case_image(case, seed + 1)] if case["normalisation"] == "series-minmax" else None
    return tensor(image, series=series, body_mask=case["body_mask"] == "1")


def run_cases(write):
    with CASES.open(newline="") as file:
        cases = list(csv.DictReader(file))
    n_wrong = 0
    for case in cases:
        try:
            found = digest(case_tensor(case))
        except Refused:
            found = "refused"
        if write:
            case["digest"] = found
        elif case["digest"] != found:
            n_wrong += 1
            print(f"{case['name']}: {found}, the file has {case['digest']}")
    if write:
        with CASES.open("w", newline="") as file:
            writer = csv.DictWriter(file, cases[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(cases)
    print(f"{len(cases)} cases, {n_wrong} differ")
    return n_wrong


# ---- DICOM files ----------------------------------------------------------------------------------------------------


def frames(path):
    """(SOP Instance UID, frame number or None, Image) of each frame of a file."""
    import pydicom

    data_set = pydicom.dcmread(path, force=True)
    n_frames = int(data_set.get("NumberOfFrames", 1))
    is_multi_frame = "PerFrameFunctionalGroupsSequence" in data_set
    bits = (int(data_set.BitsStored), int(data_set.HighBit), int(data_set.PixelRepresentation) == 1)
    cells = pixel_cells(data_set, n_frames)
    for index in range(n_frames):
        slope, intercept = rescale_of(data_set, index)
        image = Image(stored_values(cells[index], *bits), slope, intercept)
        image = replace(image, padding=padding_of(data_set, "PixelPaddingValue"))
        if image.padding is not None:
            image = replace(image, range_limit=padding_of(data_set, "PixelPaddingRangeLimit"))
        yield str(data_set.SOPInstanceUID), index + 1 if is_multi_frame else None, image


def pixel_cells(data_set, n_frames):
    """Unsigned cells [frame, row, column]; native ones straight from the bytes, compressed ones by pydicom's decoders."""
    import pydicom

    rows, columns, n_bytes = int(data_set.Rows), int(data_set.Columns), int(data_set.BitsAllocated) // 8
    if int(data_set.get("SamplesPerPixel", 1)) != 1:
        raise ValueError("colour")
    syntax = data_set.file_meta.get("TransferSyntaxUID") if "file_meta" in dir(data_set) else None
    if syntax is not None and pydicom.uid.UID(syntax).is_compressed and syntax != pydicom.uid.DeflatedExplicitVRLittleEndian:
        values = data_set.pixel_array
        return (values.astype(np.int64) & ((1 << (8 * n_bytes)) - 1)).reshape(n_frames, rows, columns)
    order = ">" if syntax == pydicom.uid.ExplicitVRBigEndian else "<"
    n_cells = n_frames * rows * columns
    return np.frombuffer(data_set.PixelData, f"{order}u{n_bytes}", n_cells).reshape(n_frames, rows, columns)


def rescale_of(data_set, index):
    """Rescale Slope and Intercept of a frame: its functional groups, the shared ones, or the data set itself."""
    for name, item in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        groups = data_set.get(name)
        if groups and "PixelValueTransformationSequence" in groups[item]:
            transformation = groups[item].PixelValueTransformationSequence[0]
            return float(transformation.RescaleSlope), float(transformation.RescaleIntercept)
    return float(data_set.RescaleSlope), float(data_set.RescaleIntercept)


def padding_of(data_set, name):
    """A padding attribute as a stored value: its 16 bits by Pixel Representation, whatever VR was written."""
    if name not in data_set:
        return None
    value = int(data_set[name].value) & 0xFFFF
    if int(data_set.PixelRepresentation) == 0:
        return value
    width = min(int(data_set.BitsStored), 16)
    return int(stored_values(np.array(value), width, width - 1, True))


def dicom_files(paths):
    for path in map(pathlib.Path, paths):
        yield from sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def run_digest(paths):
    for path in dicom_files(paths):
        for sop_uid, frame, image in frames(path):
            print(digest(tensor(image)), sop_uid, frame or "", path.name, sep=",")
    return 0


def compare_file(path, tensors):
    """(verdict, number of bytes that differ, greatest difference) of a file's frames."""
    rows = []
    for sop_uid, frame, image in frames(path):
        dumped = tensors / (sop_uid + (f".{frame}" if frame else "") + ".npy")
        if not dumped.exists():
            rows.append(("no tensor", 0, 0))
            continue
        found, expected = np.load(dumped), tensor(image)
        if found.shape != expected.shape or found.dtype != np.uint8:
            rows.append((f"wrong form {found.dtype} {found.shape}", expected.size, 255))
            continue
        difference = np.abs(found.astype(int) - expected.astype(int))
        rows.append(("equal" if not difference.any() else "DIFFERS", int((difference > 0).sum()), int(difference.max())))
    worst = max(rows, key=lambda row: (row[1], row[0]), default=("no frame", 0, 0))
    if worst[0] == "DIFFERS" and is_lossy(path):
        worst = ("lossy", *worst[1:])  # decoders of lossy syntaxes may differ by a stored value
    return worst, len(rows)


def is_lossy(path):
    """JPEG baseline and extended, JPEG-LS near-lossless, JPEG 2000 and its high-throughput kind."""
    import pydicom

    syntax = pydicom.dcmread(path, force=True, specific_tags=[]).file_meta.get("TransferSyntaxUID", "")
    return str(syntax).removeprefix("1.2.840.10008.1.2.4.") in ("50", "51", "53", "55", "81", "91", "203")


def run_compare(tensors, paths):
    counts = {}
    print(f"{'verdict':<12} {'frames':>6} {'bytes':>8} {'most':>4}  file")
    for path in dicom_files(paths):
        try:
            (verdict, n_bytes, most), n_frames = compare_file(path, pathlib.Path(tensors))
        except Exception as error:  # noqa: BLE001 - whatever a foreign file does to pydicom is the file's verdict
            (verdict, n_bytes, most), n_frames = ("unread", 0, 0), 0
            path = f"{path}: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
        counts[verdict] = counts.get(verdict, 0) + 1
        print(f"{verdict:<12} {n_frames:>6} {n_bytes:>8} {most:>4}  {path}")
    print(", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())), "(unread: not by this reference's decoders)")
    return sum(n for verdict, n in counts.items() if verdict == "DIFFERS" or verdict.startswith("wrong"))


# ---- the clock ------------------------------------------------------------------------------------------------------


def by_map_coordinates(hu, padding, positions):
    out = np.empty((3, SIDE, SIDE), np.uint8)
    for channel, (level, width) in enumerate(WINDOWS_HU):
        low, high = level - width / 2, level + width / 2
        u8 = ((np.clip(hu, low, high) - low) * 255.0 / (high - low)).astype(np.uint8)
        u8[padding] = 0
        mean = ndimage.map_coordinates(u8, positions, np.float64, order=1, mode="nearest")
        out[channel] = np.floor(mean + 0.5)
    return out


def by_zoom(hu, padding):
    out = np.empty((3, SIDE, SIDE), np.uint8)
    for channel, (level, width) in enumerate(WINDOWS_HU):
        low, high = level - width / 2, level + width / 2
        u8 = ((np.clip(hu, low, high) - low) * 255.0 / (high - low)).astype(np.uint8)
        u8[padding] = 0
        out[channel] = np.floor(ndimage.zoom(u8, 0.5, np.float64, order=1) + 0.5)
    return out


def run_time():
    cells = chest().astype("<i2")
    positions = np.meshgrid(*[np.arange(SIDE) * 511 / 255] * 2, indexing="ij")
    expected = tensor(Image(cells.astype(np.int64), 1.0, -1024.0, -2000))
    print("digest", digest(expected))

    def prepare():
        return 1.0 * cells.astype(np.float64) - 1024.0, cells == -2000

    ways = {
        "numpy + scipy map_coordinates": lambda: by_map_coordinates(*prepare(), positions),
        "numpy + scipy zoom": lambda: by_zoom(*prepare()),
    }
    for name, way in ways.items():
        n_different = int((way() != expected).sum())
        times = []
        for _ in range(60):
            start = time.perf_counter()
            way()
            times.append((time.perf_counter() - start) * 1e6)
        print(
            f"{name}: median {statistics.median(times):.0f} us, least {min(times):.0f}, greatest {max(times):.0f}; "
            f"{n_different} bytes differ from the exact rounding"
        )
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("cases").add_argument("--write", action="store_true")
    commands.add_parser("digest").add_argument("paths", nargs="+")
    compare = commands.add_parser("compare")
    compare.add_argument("tensors")
    compare.add_argument("paths", nargs="+")
    commands.add_parser("time")
    arguments = parser.parse_args()
    if arguments.command == "cases":
        n_wrong = run_cases(arguments.write)
    elif arguments.command == "digest":
        n_wrong = run_digest(arguments.paths)
    elif arguments.command == "compare":
        n_wrong = run_compare(arguments.tensors, arguments.paths)
    else:
        n_wrong = run_time()
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
