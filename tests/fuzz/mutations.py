"""What may become of a file, a JSON value, a tensor or a command line."""

import json
import os
import pickle
import shutil

import numpy as np

from npformer import checkpoint

NUMBERS = [0, -1, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 10**400, -(10**400)]
NUMBERS += [30_000_000, 200_000_000, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan"), 1.5]
WORDS = ["", "x", "x" * 5000, "é\u2028\ud7ff", "../../etc/passwd", "/dev/zero", "\x00", "\x1b[31m"]
WORDS += ["sort", "g2p", "torch", "numpy", "relu", "NaN", "1", "None", "float32", "{}", "%s%n"]
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "I32", "U8", "BOOL", "C64", "X", "", 3]
CAST = ["f8", "f4", "f2", "i8", "i4", "u1", "?"]


class Trap:
    """Whoever unpickles it leaves a mark in the working folder."""

    def __reduce__(self):
        return os.mkdir, ("UNPICKLED",)


PICKLED = pickle.dumps(Trap())


def value(rng):
    """Something that nobody expects there."""
    kind = rng.integers(6)
    if kind == 0:
        return WORDS[rng.integers(len(WORDS))]
    if kind == 1:
        return [None, True, False, [], {}, [[]], {"": None}, [1] * 300][rng.integers(8)]
    if kind == 2:
        return int(rng.integers(-5, 100))
    return NUMBERS[rng.integers(len(NUMBERS))]


def in_json(rng, x):
    """One place of a JSON value is changed; strings that hold JSON are gone into."""
    if isinstance(x, str) and x.startswith(("{", "[")) and rng.random() < 0.8:
        try:
            return as_text(in_json(rng, json.loads(x)))
        except ValueError:
            return x[: rng.integers(len(x))]
    if isinstance(x, dict) and x and rng.random() < 0.92:
        key, changed = list(x)[rng.integers(len(x))], dict(x)
        kind = rng.integers(10)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            changed[WORDS[rng.integers(len(WORDS))]] = changed.pop(key)
        elif kind == 2:
            changed[WORDS[rng.integers(len(WORDS))]] = value(rng)
        else:
            changed[key] = in_json(rng, x[key])
        return changed
    if isinstance(x, list) and x and rng.random() < 0.9:
        i, changed = int(rng.integers(len(x))), list(x)
        kind = rng.integers(6)
        if kind == 0:
            del changed[i]
        elif kind == 1:
            changed.insert(i, changed[i])
        else:
            changed[i] = in_json(rng, x[i])
        return changed
    return value(rng)


def as_text(x):
    return json.dumps(x, ensure_ascii=bool(len(str(x)[:1])))


def in_bytes(rng, raw):
    """What a disk, a network or an editor does to a file."""
    kind, n = rng.integers(8), len(raw)
    at = int(rng.integers(n + 1)) if rng.random() < 0.5 else int(rng.integers(min(n, 200) + 1))
    if kind == 0 and n:
        changed = bytearray(raw)
        changed[at % n] ^= 1 << rng.integers(8)
        return bytes(changed)
    if kind == 1:
        return raw[:at]
    if kind == 2:
        return raw[:at] + rng.bytes(int(rng.integers(1, 20))) + raw[at:]
    if kind == 3:
        return raw[:at] + raw[at + int(rng.integers(1, 20)) :]
    if kind == 4:
        return raw[:at] + rng.bytes(min(8, n - at)) + raw[at + 8 :]
    if kind == 5:
        return raw + raw[: rng.integers(n + 1)]
    junk = [b"", b"[" * 10**5, b'{"a":' * 10**5, b"\xff\xfe", PICKLED, b"1" * 5000, bytes(100)]
    return junk[rng.integers(len(junk))]


def in_safetensors(rng, raw):
    """The header, the numbers, or both written anew, with a checksum that is right."""
    n = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + n]), raw[8 + n :]
    if rng.random() < 0.35:
        names = [name for name in header if name != "__metadata__"]
        entry = header[names[rng.integers(len(names))]]
        kind = rng.integers(4)
        if kind == 0:
            entry["dtype"] = DTYPES[rng.integers(len(DTYPES))]
        elif kind == 1:
            entry["shape"] = in_json(rng, entry["shape"])
        elif kind == 2:
            entry["data_offsets"] = in_json(rng, entry["data_offsets"])
        else:
            header = in_json(rng, header)
        text = as_text(header).encode("utf-8", "replace")
        return len(text).to_bytes(8, "little") + text + data
    return None  # by name, see in_tensors


def in_tensors(rng, path):
    """Other tensors or metadata under a checksum that is right: by somebody who means it."""
    tensors, metadata = checkpoint.load_tensors(path)
    names = list(tensors)
    name = names[rng.integers(len(names))]
    x, kind = tensors[name], rng.integers(9)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[WORDS[rng.integers(5)] + "y"] = tensors.pop(name)
    elif kind == 2:
        tensors[name] = x.astype(CAST[rng.integers(len(CAST))])
    elif kind == 3:
        tensors[name] = x.reshape(-1)[: rng.integers(x.size + 1)]
    elif kind == 4:
        tensors[name] = np.zeros(rng.integers(0, 400, rng.integers(3)), x.dtype)
    elif kind == 5:
        tensors[name] = np.full(x.shape, [np.nan, np.inf, -1e38][rng.integers(3)]).astype(x.dtype)
    elif kind == 6:
        tensors[name] = x[None]
    elif metadata:
        key = list(metadata)[rng.integers(len(metadata))]
        changed = in_json(rng, metadata[key])
        metadata[key] = changed if isinstance(changed, str) else as_text(changed)
    try:
        checkpoint.save_tensors(path, tensors, metadata)
    except ValueError:  # such a thing cannot be written
        path.write_bytes(in_bytes(rng, path.read_bytes()))


def in_place(rng, path):
    """What is no file at all."""
    path.unlink()
    kind = rng.integers(6)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path)
    elif kind == 3:
        path.symlink_to("/dev/zero")
    elif kind == 4:
        path.symlink_to("/dev/null")


def in_folder(rng, folder):
    """One to three changes to files of a folder; what they were, in words."""
    said = []
    for _ in range(1 + int(rng.integers(3) == 0) + int(rng.integers(5) == 0)):
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        if not paths:
            break
        path = paths[rng.integers(len(paths))]
        kind = rng.random()
        try:
            if kind < 0.06:
                in_place(rng, path)
                said.append(f"{path.name}: no file any more")
            elif kind < 0.3:
                path.write_bytes(in_bytes(rng, path.read_bytes()))
                said.append(f"{path.name}: bytes")
            elif path.suffix == ".json":
                changed = in_json(rng, json.loads(path.read_bytes()))
                path.write_text(as_text(changed), encoding="utf-8", errors="replace")
                said.append(f"{path.name}: JSON")
            elif path.suffix == ".safetensors":
                changed = in_safetensors(rng, path.read_bytes())
                if changed is None:
                    in_tensors(rng, path)
                else:
                    path.write_bytes(changed)
                said.append(f"{path.name}: {'tensors' if changed is None else 'header'}")
            else:
                path.write_bytes(in_bytes(rng, path.read_bytes()))
                said.append(f"{path.name}: bytes")
        except (ValueError, OverflowError, RecursionError, KeyError, AttributeError, TypeError):
            # Broken by the change before
            if path.is_file() and not path.is_symlink():
                path.write_bytes(in_bytes(rng, path.read_bytes()[:10_000]))
            said.append(f"{path.name}: bytes, again")
    return ", ".join(said)


def in_arguments(rng, line, words):
    """A command line with some of it left out, doubled, swapped or replaced."""
    line = list(line)
    for _ in range(1 + int(rng.integers(3))):
        at, kind = int(rng.integers(1, len(line) + 1)), rng.integers(6)
        word = words[rng.integers(len(words))]
        if kind == 0 and at < len(line):
            del line[at]
        elif kind == 1 and at < len(line):
            line[at] = word
        elif kind == 2 and at < len(line):
            x = value(rng)
            line[at] = (x if isinstance(x, str) else as_text(x)).replace("\0", "0")
        elif kind == 3:
            line.insert(at, word)
        elif kind == 4 and at < len(line):
            line.insert(at, line[at])
        elif at < len(line):
            line[at] = in_bytes(rng, line[at].encode()).decode("utf-8", "replace")[:3000]
            line[at] = line[at].replace("\0", "0")
    return line


def fresh(good, folder):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder, symlinks=True)
    return folder
