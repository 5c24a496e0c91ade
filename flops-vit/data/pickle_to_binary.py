#!/usr/bin/env python3
"""Converts CIFAR-10 or CIFAR-100 from its Python form (pickles) to its binary form, which flops-vit reads.

    python3 pickle_to_binary.py cifar-10-batches-py [OUTPUT]
    python3 pickle_to_binary.py cifar-100-python [OUTPUT]

The .bin files and the class names go to OUTPUT, or beside the pickles. Needs Python 3.8 or later and nothing else: the
arrays are read without numpy. A pickle can run any code when it is loaded; here it can only make arrays, and whatever else
one asks for is refused.
"""

import argparse
import pathlib
import pickle
import sys

PIXELS = 3 * 32 * 32

# pickle -> keys of the label bytes before each image
BATCHES = {f"data_batch_{i}": ["labels"] for i in range(1, 6)}
BATCHES["test_batch"] = ["labels"]
BATCHES.update({name: ["coarse_labels", "fine_labels"] for name in ("train", "test")})
# pickle -> key of a list of class names, file of the binary form
NAMES = {
    "batches.meta": [("label_names", "batches.meta.txt")],
    "meta": [("fine_label_names", "fine_label_names.txt"), ("coarse_label_names", "coarse_label_names.txt")],
}


class Wrong(Exception):
    """An error of a file."""


class Type:
    """Stands for numpy.dtype."""

    def __init__(self, name, *_):
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state):
        pass


class Array:
    """Stands for numpy.ndarray: its shape and its bytes."""

    def __setstate__(self, state):
        _, self.shape, dtype, self.by_columns, self.bytes = state
        self.type = dtype.name

    def rows(self):
        count = self.shape[0]
        if self.type != "u1" or tuple(self.shape) != (count, PIXELS) or len(self.bytes) != count * PIXELS:
            raise Wrong(f"data of shape {self.shape} and type {self.type}, expected [images, {PIXELS}] of type u1")
        if self.by_columns:
            return [self.bytes[row::count] for row in range(count)]
        return [self.bytes[row * PIXELS :][:PIXELS] for row in range(count)]


def from_buffer(buffer, dtype, shape, order):
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", bytes(buffer)))
    return array


def latin1(text, encoding):
    """Recovers bytes that Python 3 pickled for Python 2."""
    return text.encode("latin1")


KNOWN = {("numpy", "ndarray"): Array, ("numpy", "dtype"): Type, ("_codecs", "encode"): latin1}
for core in ("numpy.core", "numpy._core"):
    KNOWN[f"{core}.multiarray", "_reconstruct"] = lambda *_: Array()
    KNOWN[f"{core}.numeric", "_frombuffer"] = from_buffer


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return KNOWN[module, name]
        except KeyError:
            raise Wrong(f"it asks for {module}.{name}, which no CIFAR file needs") from None


def text(value):
    return value.decode() if isinstance(value, bytes) else value


def read(path):
    """Returns the dictionary in `path`."""
    try:
        with path.open("rb") as file:
            content = Unpickler(file, encoding="bytes").load()
    except Wrong:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise Wrong(f"it is no pickle: {error}") from None
    if not isinstance(content, dict):
        raise Wrong(f"it holds a {type(content).__name__}, expected a dictionary")
    return {text(key): value for key, value in content.items()}


def get(content, key):
    if key not in content:
        raise Wrong(f"it has no {key}: it holds {', '.join(map(str, content))}")
    return content[key]


def records(content, label_keys):
    """Joins the labels and the planes of each image, in the order of the binary form."""
    data = get(content, "data")
    if not isinstance(data, Array):
        raise Wrong("its data is no array")
    rows, labels = data.rows(), [get(content, key) for key in label_keys]
    if any(len(column) != len(rows) for column in labels):
        raise Wrong(f"{len(rows)} images, but {', '.join(str(len(column)) for column in labels)} labels")
    if any(label not in range(256) for column in labels for label in column):
        raise Wrong("a label is no number from 0 to 255")
    return b"".join(bytes(column[i] for column in labels) + row for i, row in enumerate(rows))


def write(path, content):
    """Writes a file atomically: it is whole or absent."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
    print(f"{path}: {len(content)} bytes")


def convert(source, output):
    """Converts the pickles of a folder and returns their number."""
    count = 0
    for name in [*BATCHES, *NAMES]:
        path = source / name
        if not path.is_file():
            continue
        try:
            content = read(path)
            if name in BATCHES:
                write(output / f"{name}.bin", records(content, BATCHES[name]))
                count += 1
            for key, file in NAMES.get(name, []):
                write(output / file, "".join(f"{text(line)}\n" for line in get(content, key)).encode())
        except Wrong as error:
            raise Wrong(f"{path}: {error}") from None
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=pathlib.Path, help="folder of the pickles")
    parser.add_argument("output", type=pathlib.Path, nargs="?", help="folder of the binary files [default: SOURCE]")
    args = parser.parse_args()
    output = args.output or args.source
    try:
        output.mkdir(parents=True, exist_ok=True)
        if convert(args.source, output) == 0:
            raise Wrong(f"{args.source}: there are no pickles of CIFAR here (data_batch_1 … test_batch, or train and test)")
    except (Wrong, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
